// SPDX-License-Identifier: MIT
// Rows to their experts and back.
#include "bindings/xla/ops.h"
#include "permute/check.h"

namespace kimi::xla {
namespace {

// What only travels.
constexpr Types kPayloads = {kF32, kBF16, kF16, kF8, kS32, kU32, kS64, kU8, kPred};

// Rows of pairs are places in memory: looked at where the host can read them.
Status check_places(const Frame& f, const Tensor& row_map, int64_t rows) {
  if (!f.reads()) return Status::ok();
  return permutation::check_row_map(f.op.c_str(), row_map.as<int32_t>(), row_map.count(), rows);
}

}  // namespace

Status permute_plan(Frame& f) {
  kimi_permute_plan_params p = {};
  const Tensor& indices = f.next("indices", {kS32}, {kAny, kAny});
  p.indices = indices.as<int32_t>();
  p.num_tokens = indices.size(0);
  p.top_k = int32_t(indices.size(1));
  p.num_experts = f.int32("num_experts");
  p.align = f.int32("align");
  const int64_t rows = indices.count() + int64_t{p.num_experts} * (p.align - 1);
  p.row_map = f.out({kS32}, {p.num_tokens, p.top_k}).as<int32_t>();
  p.source = f.out({kS32}, {rows}).as<int32_t>();
  p.offsets = f.out({kS32}, {p.num_experts}).as<int32_t>();
  p.tokens_per_expert = f.out({kS32}, {p.num_experts}).as<int32_t>();
  return f.run(kimi_permute_plan, p, kimi_permute_plan_workspace_bytes);
}

Status permute(Frame& f) {
  kimi_permute_params p = {};
  const Tensor& x = f.next("x", kPayloads, {kAny, kAny});
  const Tensor& row_map = f.next("row_map", {kS32}, {x.size(0), kAny});
  const Tensor& source = f.next("source", {kS32}, {kAny});
  KIMI_RETURN_IF_ERROR(check_places(f, row_map, source.size(0)));
  p.x = x.data;
  p.row_map = row_map.as<int32_t>();
  p.source = source.as<int32_t>();
  p.num_tokens = x.size(0);
  p.num_rows = source.size(0);
  p.row_bytes = p.x_stride_bytes = x.size(1) * bytes_of(x.dtype);
  p.top_k = int32_t(row_map.size(1));
  p.y = f.out({x.dtype}, {p.num_rows, x.size(1)}).data;
  return f.run(kimi_permute, p);
}

Status unpermute(Frame& f) {
  kimi_unpermute_params p = {};
  const Tensor& y = f.next("y", kFloats, {kAny, kAny});
  const Tensor& row_map = f.next("row_map", {kS32}, {kAny, kAny});
  KIMI_RETURN_IF_ERROR(check_places(f, row_map, y.size(0)));
  p.y = y.data;
  p.row_map = row_map.as<int32_t>();
  p.num_tokens = row_map.size(0);
  p.top_k = int32_t(row_map.size(1));
  p.weights = static_cast<const float*>(f.optional("weights", kF32, {p.num_tokens, p.top_k}));
  p.hidden = p.y_stride = y.size(1);
  p.dtype = native(y.dtype);
  p.x = f.out({y.dtype}, {p.num_tokens, p.hidden}).data;
  return f.run(kimi_unpermute, p);
}

Status unpermute_backward(Frame& f) {
  kimi_unpermute_backward_params p = {};
  const Tensor& grad_x = f.next("grad_x", kFloats, {kAny, kAny});
  const Tensor& y = f.next("y", {grad_x.dtype}, {kAny, grad_x.size(1)});
  const Tensor& row_map = f.next("row_map", {kS32}, {grad_x.size(0), kAny});
  KIMI_RETURN_IF_ERROR(check_places(f, row_map, y.size(0)));
  p.num_tokens = grad_x.size(0);
  p.num_rows = y.size(0);
  p.top_k = int32_t(row_map.size(1));
  p.hidden = p.grad_x_stride = p.y_stride = grad_x.size(1);
  p.grad_x = grad_x.data;
  p.y = y.data;
  p.row_map = row_map.as<int32_t>();
  p.source = f.next("source", {kS32}, {p.num_rows}).as<int32_t>();
  p.weights = f.next("weights", {kF32}, {p.num_tokens, p.top_k}).as<float>();
  p.dtype = native(y.dtype);
  p.grad_y = f.out({y.dtype}, {p.num_rows, p.hidden}).data;
  p.grad_weights = f.out({kF32}, {p.num_tokens, p.top_k}).as<float>();
  return f.run(kimi_unpermute_backward, p);
}

Status sort_chunks(Frame& f) {
  kimi_sort_chunks_params p = {};
  const Tensor& x = f.next("x", kPayloads, {kAny, kAny});
  const Tensor& sizes = f.next("split_sizes", {kS32}, {kAny});
  p.x = x.data;
  p.split_sizes = sizes.as<int32_t>();
  p.num_chunks = int32_t(sizes.size(0));
  p.order = f.next("order", {kS32}, {p.num_chunks}).as<int32_t>();
  p.num_rows = x.size(0);
  p.row_bytes = p.x_stride_bytes = x.size(1) * bytes_of(x.dtype);
  p.inverse = f.int32("inverse");
  p.y = f.out({x.dtype}, {x.size(0), x.size(1)}).data;
  return f.run(kimi_sort_chunks, p);
}

}  // namespace kimi::xla
