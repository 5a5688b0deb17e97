// SPDX-License-Identifier: MIT
// What the Hopper kernels serve, and which of them.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/dtype.h"
#include "gemm/sm90/job.h"

namespace kimi::gemm::sm90 {
namespace {

constexpr int64_t kBytes = 2;  // of an element
constexpr int64_t kTileRows = 128;
constexpr int64_t kMultiprocessors = 132;
constexpr long kMostSwizzle = 256;  // times all column tiles it fits 32 bits

bool is_stride(int64_t elements) {
  return elements > 0 && elements * kBytes % 16 == 0 && elements * kBytes < int64_t{1} << 40;
}

// TMA can load it, or cp.async if it has an index, along the dimension of length `along`.
bool is_loadable(const Matrix& m, int64_t stride, int64_t along) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && is_stride(stride) &&
         (m.index == nullptr || (along % 8 == 0 && m.divisor > 0));
}

bool serves_k(const Product& p) {
  return p.rows >= 1 && p.rows <= INT_MAX && p.a.outer_stride == 1 && p.b.outer_stride == 1 &&
         (p.a.index == nullptr || p.b.index == nullptr) &&
         is_loadable(p.a, p.a.depth_stride, p.rows) && is_loadable(p.b, p.b.depth_stride, p.cols);
}

bool serves_m(const Product& p) {
  const bool outer = b_major(p) == Major::kOuter;
  return p.depth >= 1 && p.depth <= INT_MAX && p.a.depth_stride == 1 && p.b.index == nullptr &&
         (!outer || p.b.outer_stride == 1) &&
         (p.groups.count == 1 || is_stride(p.b.group_stride)) &&
         is_loadable(p.a, p.a.outer_stride, p.depth) &&
         is_loadable(p.b, outer ? p.b.depth_stride : p.b.outer_stride, p.depth);
}

// Not A outer-major and B depth-major, which no kernel has.
bool serves_batch(const Product& p) {
  const auto is_operand = [&](const Matrix& m, Major major) {
    const bool by_depth = major == Major::kDepth;
    return (by_depth || m.outer_stride == 1) && m.index == nullptr &&
           is_loadable(m, by_depth ? m.outer_stride : m.depth_stride, p.depth) &&
           (p.groups.count == 1 || is_stride(m.group_stride));
  };
  return p.rows >= 1 && p.rows <= INT_MAX && p.depth >= 1 && p.depth <= INT_MAX &&
         (a_major(p) == Major::kDepth || b_major(p) == Major::kOuter) &&
         is_operand(p.a, a_major(p)) && is_operand(p.b, b_major(p));
}

}  // namespace

Trial& trial() {
  const auto read = [] { return std::getenv("KIMI_OPS_TRIAL"); };
  static const bool changes = read() != nullptr;
  static thread_local Trial value;  // threads may launch side by side
  if (changes) value = trial_of(read());
  return value;
}

Trial trial_of(const char* text) {
  Trial trial;
  const struct {
    const char* name;
    int32_t* value;
  } all[] = {
      {"swizzle", &trial.swizzle}, {"turn", &trial.turn},         {"lead", &trial.lead},
      {"boxes", &trial.boxes},     {"prefetch", &trial.prefetch}, {"order", &trial.order},
      {"permute", &trial.permute}, {"gather", &trial.gather},     {"noinc", &trial.noinc},
      {"store", &trial.store},     {"epilogue", &trial.epilogue}, {"promote", &trial.promote},
  };
  while (text != nullptr && *text != '\0') {
    const char* const end = text + std::strcspn(text, ",");
    bool known = false;
    for (const auto& [name, value] : all) {
      const size_t length = std::strlen(name);
      if (std::strncmp(text, name, length) != 0 || text[length] != '=') continue;
      char* last = nullptr;
      const long wanted = std::strtol(text + length + 1, &last, 10);
      const long least = value == &trial.swizzle, most = least > 0 ? kMostSwizzle : 1 << 30;
      known = last == end && end > text + length + 1 && wanted >= least && wanted <= most;
      if (known) *value = static_cast<int32_t>(wanted);
    }
    if (!known)
      std::fprintf(stderr,
                   "kimi_ops: KIMI_OPS_TRIAL: %.*s: expected name=number with a name and "
                   "a value of gemm/sm90/job.h; it is as without\n",
                   static_cast<int>(end - text), text);
    text = *end == ',' ? end + 1 : end;
  }
  return trial;
}

Major a_major(const Product& p) { return p.a.depth_stride == 1 ? Major::kDepth : Major::kOuter; }
Major b_major(const Product& p) { return p.b.depth_stride == 1 ? Major::kDepth : Major::kOuter; }

bool serves(const Product& p) {
  const int64_t rows = p.groups.num_rows;
  if (p.dtype != KIMI_BFLOAT16 && p.dtype != KIMI_FLOAT16) return false;
  if (p.groups.count < 1 || p.cols < 1 || p.cols > INT_MAX / 2) return false;
  if (p.grouping == Grouping::kBatch) return serves_batch(p);
  if (rows < 1 || rows > INT_MAX) return false;
  return p.grouping == Grouping::kK ? serves_k(p) : serves_m(p);
}

bool is_narrow(const Product& p) {
  if (p.grouping == Grouping::kK) return false;
  // Cycles by count (kernel.cuh), of groups that are alike.
  const auto cycles = [&](int64_t tile_cols, int64_t of_stage) {
    const int64_t rows = p.groups.num_rows, groups = std::min<int64_t>(p.groups.count, rows);
    const int64_t tiles =
        p.grouping == Grouping::kBatch
            ? most_tiles(p, kTileRows, tile_cols)
            : groups * ceil_div(rows, groups * kTileRows) * ceil_div(p.cols, tile_cols);
    return ceil_div(tiles, kMultiprocessors) * (ceil_div(p.depth, 64) * of_stage + 5000);
  };
  return cycles(128, 640) < cycles(256, 1024);
}

Status store(const Product& p, const StoreParams& out, bool narrow, void* stream) {
  if (!serves(p)) return invalid("product_sm90: operands: expected what serves accepts");
  const bool of_k = p.grouping == Grouping::kK;
  if (p.dtype == KIMI_BFLOAT16)
    return of_k ? store_k<bf16>(p, out, stream) : store_m<bf16>(p, out, narrow, stream);
  return of_k ? store_k<fp16>(p, out, stream) : store_m<fp16>(p, out, narrow, stream);
}

}  // namespace kimi::gemm::sm90
