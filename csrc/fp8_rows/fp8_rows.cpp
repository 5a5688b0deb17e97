// SPDX-License-Identifier: MIT
// FP8 rows: argument checks, the choice of the device, rows on the CPU.
#include "fp8_rows/fp8_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/strides.h"
#include "cpu/parallel.h"
#include "permute/check.h"

namespace kimi {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

Status check(const Fp8RowsParams& p, kimi_device device) {
  const char* op = "fp8_rows";
  if (p.num_rows < 0 || p.k < 0)
    return invalid(op, ": R, K: expected 0 or more, got ", p.num_rows, ", ", p.k);
  if (p.num_rows > kMaxRows)
    return invalid(op, ": R: expected below 2^31 rows, got ", p.num_rows, "; split the rows");
  if (!is_dtype(p.dtype))
    return invalid(op, ": dtype: expected a kimi_dtype (0..2), got ", int(p.dtype));
  if (p.scale_stride < p.num_rows)
    return invalid(op, ": scale_stride: expected R = ", p.num_rows, " or more, got ",
                   p.scale_stride);
  if (p.top_k < 0 || (p.top_k > 0 && p.num_tokens < 0))
    return invalid(op, ": top_k, T: expected 0 or more, got ", p.top_k, ", ", p.num_tokens);
  const int64_t items = p.top_k > 0 ? p.num_tokens : p.num_rows;
  if (p.k > 0 && ((items > 0 && !p.x) || (p.num_rows > 0 && (!p.data || !p.scale))))
    return invalid(op, ": x, data, scale: expected pointers, got NULL");
  if (p.k > 0) KIMI_RETURN_IF_ERROR(check_strides(op, "x_row_stride", {{items, p.x_row_stride}}));
  if (p.top_k == 0) return Status::ok();
  if (p.num_tokens > 0 && !p.row_map)
    return invalid(op, ": row_map: expected a pointer beside top_k = ", p.top_k, ", got NULL");
  if (device == KIMI_DEVICE_CUDA) return Status::ok();
  return permutation::check_row_map(op, p.row_map, p.num_tokens * p.top_k, p.num_rows);
}

template <class T>
void quantize_block(const T* x, int64_t count, e4m3* data, float& scale) {
  float most = 0.0f;
  bool nan = false;
  for (int64_t k = 0; k < count; ++k) {
    const float size = std::fabs(to_float(x[k]));
    most = std::max(most, size);
    nan |= size != size;
  }
  scale = std::max(most / fp8::kMax, fp8::kSmallestScale);
  if (nan) scale = std::numeric_limits<float>::quiet_NaN();
  for (int64_t k = 0; k < count; ++k) data[k] = from_float<e4m3>(to_float(x[k]) / scale);
}

// The rows of an item: of a token all its slots, of a row itself.
struct Places {
  const int32_t* rows;
  int64_t row, count;

  Places(const Fp8RowsParams& p, int64_t item)
      : rows(p.top_k > 0 ? p.row_map + item * p.top_k : nullptr),
        row(item),
        count(std::max(p.top_k, 1)) {}
  int64_t operator[](int64_t i) const { return rows ? rows[i] : row; }
};

void quantize_rows(const Fp8RowsParams& p) {
  const int64_t items = p.top_k > 0 ? p.num_tokens : p.num_rows;
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(p.k, 1));
  cpu::parallel_for(items, grain, [&](int64_t first, int64_t last) {
    dispatch(p.dtype, [&]<class T>() {
      for (int64_t item = first; item < last; ++item) {
        const T* const x = static_cast<const T*>(p.x) + item * p.x_row_stride;
        const Places rows(p, item);
        for (int64_t k = 0; k < p.k; k += fp8::kBlock) {
          const int64_t count = std::min<int64_t>(fp8::kBlock, p.k - k);
          e4m3 data[fp8::kBlock];
          float scale;
          quantize_block(x + k, count, data, scale);
          for (int64_t i = 0; i < rows.count; ++i) {
            if (rows[i] < 0) continue;
            std::memcpy(static_cast<e4m3*>(p.data) + rows[i] * p.k + k, data, size_t(count));
            p.scale[k / fp8::kBlock * p.scale_stride + rows[i]] = scale;
          }
        }
      }
    });
  });
  if (p.top_k == 0 || !p.source) return;
  for (int64_t r = 0; r < p.num_rows; ++r) {
    if (p.source[r] >= 0) continue;
    std::memset(static_cast<e4m3*>(p.data) + r * p.k, 0, size_t(p.k));
    for (int64_t kb = 0; kb < fp8::blocks(p.k); ++kb)
      p.scale[kb * p.scale_stride + r] = fp8::kSmallestScale;
  }
}

}  // namespace

Status fp8_rows(const Fp8RowsParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("fp8_rows", fp8_rows_cuda(p, stream));
  quantize_rows(p);
  return Status::ok();
}

}  // namespace kimi
