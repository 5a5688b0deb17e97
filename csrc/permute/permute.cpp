// SPDX-License-Identifier: MIT
// permute: argument checks, choice of the engine, threads over tokens or rows.
#include "permute/permute.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common/dtype.h"
#include "common/engine.h"
#include "common/strides.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "permute/check.h"

namespace kimi {

size_t permute_plan_workspace_bytes_cpu(const PermutePlanParams& p);
Status permute_plan_cpu(const PermutePlanParams& p);

namespace {

constexpr int64_t kBytesPerThread = 64 << 10;  // less work than this stays in one thread

int64_t grain(int64_t bytes_of_one) {
  return std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(bytes_of_one, 1));
}

Status check_pointers(const char* op, bool needed, std::initializer_list<const void*> pointers) {
  if (needed && std::find(pointers.begin(), pointers.end(), nullptr) != pointers.end())
    return invalid(op, ": expected pointers for every input and output, got NULL");
  return Status::ok();
}

Status check_rows(const char* op, int64_t tokens, int32_t top_k, int64_t stride) {
  if (tokens < 0) return invalid(op, ": num_tokens: expected 0 or more, got ", tokens);
  if (top_k < 1) return invalid(op, ": top_k: expected 1 or more, got ", top_k);
  if (stride < 0) return invalid(op, ": stride: expected 0 or more, got ", stride);
  return Status::ok();
}

Status check_dtype(const char* op, kimi_dtype dtype) {
  if (is_dtype(dtype)) return Status::ok();
  return invalid(op, ": dtype: expected a kimi_dtype (0..2), got ", int(dtype));
}

Status check(const PermutePlanParams& p) {
  KIMI_RETURN_IF_ERROR(permutation::check_plan(p));
  KIMI_RETURN_IF_ERROR(
      check_pointers("permute_plan", true, {p.offsets, p.tokens_per_expert, p.workspace}));
  KIMI_RETURN_IF_ERROR(check_pointers("permute_plan", p.align > 1, {p.source}));
  return check_pointers("permute_plan", p.num_tokens > 0, {p.indices, p.row_map, p.source});
}

// Rows of y whose source is -1 become zero.
template <class Params>
void clear_padding(const Params& p, char* y, int64_t row_bytes) {
  cpu::parallel_for(p.num_rows, grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (p.source[row] < 0) std::memset(y + row * row_bytes, 0, size_t(row_bytes));
  });
}

void sort_chunks_cpu(const SortChunksParams& p) {
  // starts[c]: where chunk c begins in its natural order; placed: chunk by chunk in the new order.
  std::vector<int64_t> starts(size_t(p.num_chunks) + 1, 0);
  for (int32_t c = 0; c < p.num_chunks; ++c) starts[c + 1] = starts[c] + p.split_sizes[c];
  const char* x = static_cast<const char*>(p.x);
  char* y = static_cast<char*>(p.y);
  int64_t placed = 0;
  for (int32_t i = 0; i < p.num_chunks; ++i) {
    const int64_t natural = starts[p.order[i]], rows = p.split_sizes[p.order[i]];
    const int64_t from = p.inverse ? placed : natural, to = p.inverse ? natural : placed;
    cpu::parallel_for(rows, grain(p.row_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        std::memcpy(y + (to + row) * p.row_bytes, x + (from + row) * p.x_stride_bytes,
                    size_t(p.row_bytes));
    });
    placed += rows;
  }
  if (p.num_rows > placed)
    std::memset(y + placed * p.row_bytes, 0, size_t((p.num_rows - placed) * p.row_bytes));
}

Status check_chunks(const SortChunksParams& p) {
  int64_t total = 0;
  std::vector<bool> seen(size_t(p.num_chunks), false);
  for (int32_t c = 0; c < p.num_chunks; ++c) {
    if (p.split_sizes[c] < 0)
      return invalid("sort_chunks: split_sizes[", c, "]: expected 0 or more rows, got ",
                     p.split_sizes[c]);
    total += p.split_sizes[c];
    if (p.order[c] < 0 || p.order[c] >= p.num_chunks || seen[size_t(p.order[c])])
      return invalid("sort_chunks: order[", c, "]: expected a permutation of 0..", p.num_chunks - 1,
                     ", got ", p.order[c]);
    seen[size_t(p.order[c])] = true;
  }
  if (total > p.num_rows)
    return invalid("sort_chunks: split_sizes: expected a sum of at most R = ", p.num_rows,
                   " rows, got ", total);
  return Status::ok();
}

}  // namespace

size_t permute_plan_workspace_bytes(const PermutePlanParams& p, kimi_device device) {
#if defined(KIMI_OPS_CUDA)
  if (device == KIMI_DEVICE_CUDA) return permute_plan_workspace_bytes_cuda(p);
#endif
  (void)device;
  return permute_plan_workspace_bytes_cpu(p);
}

Status permute_plan(const PermutePlanParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("permute_plan", permute_plan_cuda(p, stream));
  return permute_plan_cpu(p);
}

Status permute(const PermuteParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check_rows("permute", p.num_tokens, p.top_k, p.x_stride_bytes));
  if (p.num_rows < 0 || p.row_bytes < 0)
    return invalid("permute: num_rows, row_bytes: expected 0 or more, got ", p.num_rows, " and ",
                   p.row_bytes);
  KIMI_RETURN_IF_ERROR(check_pointers("permute", p.num_rows > 0, {p.source}));
  KIMI_RETURN_IF_ERROR(check_pointers("permute", p.num_rows > 0 && p.row_bytes > 0, {p.y}));
  KIMI_RETURN_IF_ERROR(check_pointers("permute", p.num_tokens > 0, {p.row_map}));
  KIMI_RETURN_IF_ERROR(check_pointers("permute", p.num_tokens > 0 && p.row_bytes > 0, {p.x}));
  if (p.num_rows == 0 || p.row_bytes == 0) return Status::ok();
  KIMI_RETURN_IF_ERROR(
      check_strides("permute", "x_stride_bytes", {{p.num_tokens, p.x_stride_bytes}}));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("permute", permute_cuda(p, stream));
  const bool around_cache = p.num_rows * p.row_bytes > cpu::kStreamBytes;
  const auto& engine = permutation::kEngines.best();
  cpu::parallel_for(p.num_tokens, grain(p.row_bytes * p.top_k), [&](int64_t begin, int64_t end) {
    engine.permute(p, begin, end, around_cache);
  });
  clear_padding(p, static_cast<char*>(p.y), p.row_bytes);
  return Status::ok();
}

Status unpermute(const UnpermuteParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check_rows("unpermute", p.num_tokens, p.top_k, p.y_stride));
  KIMI_RETURN_IF_ERROR(check_dtype("unpermute", p.dtype));
  if (p.hidden < 0) return invalid("unpermute: hidden: expected 0 or more, got ", p.hidden);
  if (p.num_tokens == 0 || p.hidden == 0) return Status::ok();
  KIMI_RETURN_IF_ERROR(
      check_strides("unpermute", "y_stride", {{p.num_tokens * p.top_k, p.y_stride}}));
  KIMI_RETURN_IF_ERROR(check_pointers("unpermute", true, {p.row_map, p.x}));
  // Without rows there is no y, and every pair is dropped; on a GPU that cannot be seen from here.
  const auto kept = [](int32_t row) { return row >= 0; };
  if (!p.y && device == KIMI_DEVICE_CPU)
    KIMI_RETURN_IF_ERROR(check_pointers(
        "unpermute", std::any_of(p.row_map, p.row_map + p.num_tokens * p.top_k, kept), {p.y}));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("unpermute", unpermute_cuda(p, stream));
  const auto& engine = permutation::kEngines.best();
  cpu::parallel_for(p.num_tokens, grain(p.hidden * p.top_k * 2),
                    [&](int64_t begin, int64_t end) { engine.unpermute(p, begin, end); });
  return Status::ok();
}

Status unpermute_backward(const UnpermuteBackwardParams& p, kimi_device device,
                          [[maybe_unused]] void* stream) {
  const char* op = "unpermute_backward";
  KIMI_RETURN_IF_ERROR(
      check_rows(op, p.num_tokens, p.top_k, std::min(p.grad_x_stride, p.y_stride)));
  KIMI_RETURN_IF_ERROR(check_dtype(op, p.dtype));
  if (p.hidden < 0 || p.num_rows < 0)
    return invalid(op, ": hidden, num_rows: expected 0 or more, got ", p.hidden, " and ",
                   p.num_rows);
  KIMI_RETURN_IF_ERROR(
      check_pointers(op, p.num_tokens > 0, {p.row_map, p.weights, p.grad_weights}));
  KIMI_RETURN_IF_ERROR(check_pointers(op, p.num_rows > 0, {p.source}));
  KIMI_RETURN_IF_ERROR(check_pointers(op, p.num_rows > 0 && p.hidden > 0, {p.y, p.grad_y}));
  KIMI_RETURN_IF_ERROR(check_pointers(op, p.num_tokens > 0 && p.hidden > 0, {p.grad_x}));
  if (p.hidden > 0) {
    KIMI_RETURN_IF_ERROR(check_strides(op, "y_stride", {{p.num_rows, p.y_stride}}));
    KIMI_RETURN_IF_ERROR(check_strides(op, "grad_x_stride", {{p.num_tokens, p.grad_x_stride}}));
  }
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA(op, unpermute_backward_cuda(p, stream));
  const int64_t row_bytes = p.hidden * size_of(p.dtype);
  const bool around_cache = p.num_rows * row_bytes > cpu::kStreamBytes;
  const auto& engine = permutation::kEngines.best();
  cpu::parallel_for(p.num_tokens, grain(row_bytes * p.top_k), [&](int64_t begin, int64_t end) {
    engine.unpermute_backward(p, begin, end, around_cache);
  });
  clear_padding(p, static_cast<char*>(p.grad_y), row_bytes);
  return Status::ok();
}

Status sort_chunks(const SortChunksParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check_rows("sort_chunks", p.num_rows, 1, p.x_stride_bytes));
  if (p.num_chunks < 0 || p.num_chunks > KIMI_SORT_CHUNKS_MAX)
    return invalid("sort_chunks: num_chunks: expected 0..", KIMI_SORT_CHUNKS_MAX, ", got ",
                   p.num_chunks);
  if (p.row_bytes < 0)
    return invalid("sort_chunks: row_bytes: expected 0 or more, got ", p.row_bytes);
  KIMI_RETURN_IF_ERROR(check_pointers("sort_chunks", p.num_chunks > 0, {p.split_sizes, p.order}));
  KIMI_RETURN_IF_ERROR(
      check_pointers("sort_chunks", p.num_rows > 0 && p.row_bytes > 0, {p.x, p.y}));
  if (p.row_bytes > 0)
    KIMI_RETURN_IF_ERROR(
        check_strides("sort_chunks", "x_stride_bytes", {{p.num_rows, p.x_stride_bytes}}));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("sort_chunks", sort_chunks_cuda(p, stream));
  KIMI_RETURN_IF_ERROR(check_chunks(p));
  sort_chunks_cpu(p);
  return Status::ok();
}

}  // namespace kimi
