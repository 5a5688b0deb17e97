// SPDX-License-Identifier: MIT
#include "bindings/ops.h"
#include "permute/check.h"

namespace kimi::bindings {
namespace {

PyObject* permute_plan(Call& call) {
  const Tensor indices =
      call.tensor("indices").of({kInt32}).shape({"T", "K"}, "reshape to one row a token").dense();
  kimi_permute_plan_params p = {};
  p.indices = indices.data<int32_t>();
  p.num_tokens = indices.size(0);
  p.top_k = int32_t(indices.size(1));
  p.num_experts = call.int32("num_experts");
  const int64_t align = call.integer("align");
  call.between("align", align, 1, INT32_MAX);
  p.align = int32_t(align);
  call.check(permutation::check_plan(p));
  if (indices.is_cuda() && call.reads(indices))  // the CPU engine looks at every id by itself
    call.check(permutation::check_ids("permute_plan", call.on_host(indices).data<int32_t>(),
                                      indices.count(), p.num_experts));
  const int64_t rows = indices.count() + int64_t{p.num_experts} * (p.align - 1);
  const Output row_map = call.empty_like(indices), source = call.empty(kInt32, {rows});
  const Output offsets = call.empty(kInt32, {p.num_experts});
  const Output counts = call.empty(kInt32, {p.num_experts});
  p.row_map = row_map.data<int32_t>();
  p.source = source.data<int32_t>();
  p.offsets = offsets.data<int32_t>();
  p.tokens_per_expert = counts.data<int32_t>();
  call.workspace(p, kimi_permute_plan_workspace_bytes);
  call.run(kimi_permute_plan, p);
  return call.result({row_map, source, offsets, counts});
}

// Rows that travel: whatever could lead outside of memory is refused.
Tensor rows_of(Tensor x, int64_t rows, const char* letter) {
  Call& call = *x.call;
  if (x.dtype == kFloat64)
    call.type_error(x.name,
                    "expected a dtype of at most 32 bits, got float64; "
                    "kimi_ops.reference.permute.",
                    call.op, " computes in float64");
  if (x.ndim != 2 || x.size(0) != rows)
    call.value_error(x.name, "expected shape [", letter, "=", rows, ", H], got ", x.shape_text(),
                     "; use the plan made for these rows");
  return x.dense_rows();
}

struct Maps {
  Tensor row_map, source;
  int64_t tokens() const { return row_map.size(0); }
  int32_t top_k() const { return int32_t(row_map.size(1)); }
  int64_t rows() const { return source.size(0); }
};

Maps maps(Call& call) {
  const Maps plan = {call.tensor("row_map").of({kInt32}).shape({"T", "K"}).dense(),
                     call.tensor("source").of({kInt32}).shape({"cap"}).dense()};
  if (call.reads(plan.row_map)) {
    const Tensor rows = call.on_host(plan.row_map);
    call.check(permutation::check_row_map(std::string(call.op).c_str(), rows.data<int32_t>(),
                                          rows.count(), plan.rows()));
  }
  return plan;
}

// The weights [T, K] of a plan's pairs.
const float* weights_of(const Tensor& weights, const Maps& plan) {
  return weights.of({kFloat32})
      .shape_like(plan.row_map, "pass one for each pair of the plan")
      .dense()
      .data<float>();
}

PyObject* permute(Call& call) {
  Tensor x = call.tensor("x");
  const Maps plan = maps(call);
  x = rows_of(x, plan.tokens(), "T");
  const Output y = call.empty(x.dtype, {plan.rows(), x.size(1)});
  kimi_permute_params p = {};
  p.x = x.data();
  p.row_map = plan.row_map.data<int32_t>();
  p.source = plan.source.data<int32_t>();
  p.y = y.data();
  p.num_tokens = plan.tokens();
  p.num_rows = plan.rows();
  p.row_bytes = x.size(1) * x.bytes();
  p.x_stride_bytes = x.stride(0) * x.bytes();
  p.top_k = plan.top_k();
  call.run(kimi_permute, p);
  return call.result(y);
}

PyObject* unpermute(Call& call) {
  Tensor y = call.tensor("y");
  const Maps plan = maps(call);
  const Tensor weights = call.optional("weights");
  y = rows_of(y, plan.rows(), "cap").of(kNatives);
  const Output x = call.empty(y.dtype, {plan.tokens(), y.size(1)});
  kimi_unpermute_params p = {};
  p.y = y.data();
  p.row_map = plan.row_map.data<int32_t>();
  p.weights = weights ? weights_of(weights, plan) : nullptr;
  p.x = x.data();
  p.num_tokens = plan.tokens();
  p.hidden = y.size(1);
  p.y_stride = y.size(0) > 1 ? y.stride(0) : p.hidden;  // that of one row may be anything
  p.top_k = plan.top_k();
  p.dtype = native(y.dtype);
  call.run(kimi_unpermute, p);
  return call.result(x);
}

PyObject* unpermute_backward(Call& call) {
  const Tensor grad_x = call.tensor("grad_x");
  Tensor y = call.tensor("y");
  const Maps plan = maps(call);
  const Tensor weights = call.tensor("weights");
  y = rows_of(y, plan.rows(), "cap").of(kNatives);
  const Tensor dx = grad_x.of({y.dtype}).shape({plan.tokens(), y.size(1)}).dense_rows();
  kimi_unpermute_backward_params p = {};
  p.weights = weights_of(weights, plan);
  const Output grad_y = call.empty_like(y), grad_weights = call.empty_like(weights);
  p.grad_x = dx.data();
  p.y = y.data();
  p.row_map = plan.row_map.data<int32_t>();
  p.source = plan.source.data<int32_t>();
  p.grad_y = grad_y.data();
  p.grad_weights = grad_weights.data<float>();
  p.num_tokens = plan.tokens();
  p.num_rows = plan.rows();
  p.hidden = y.size(1);
  p.grad_x_stride = dx.stride(0);
  p.y_stride = y.stride(0);
  p.top_k = plan.top_k();
  p.dtype = native(y.dtype);
  call.run(kimi_unpermute_backward, p);
  return call.result({grad_y, grad_weights});
}

PyObject* sort_chunks(Call& call) {
  Tensor x = call.tensor("x");
  const Tensor sizes = call.tensor("split_sizes").of({kInt32}).shape({"C"}).dense();
  const Tensor order = call.tensor("order").of({kInt32}).shape_like(sizes).dense();
  call.between("split_sizes.shape[0]", sizes.size(0), 0, KIMI_SORT_CHUNKS_MAX);
  x = rows_of(x, x.ndim ? x.size(0) : 0, "R");
  const Output y = call.empty_like(x);
  kimi_sort_chunks_params p = {};
  p.x = x.data();
  p.split_sizes = sizes.data<int32_t>();
  p.order = order.data<int32_t>();
  p.y = y.data();
  p.num_rows = x.size(0);
  p.row_bytes = x.size(1) * x.bytes();
  p.x_stride_bytes = x.stride(0) * x.bytes();
  p.num_chunks = int32_t(sizes.size(0));
  p.inverse = call.truth();
  call.run(kimi_sort_chunks, p);
  return call.result(y);
}

}  // namespace

void define_permute(Methods& methods) {
  methods.add<permute_plan, 3>("permute_plan");
  methods.add<permute, 3>("permute");
  methods.add<unpermute, 4>("unpermute");
  methods.add<unpermute_backward, 5>("unpermute_backward");
  methods.add<sort_chunks, 4>("sort_chunks");
}

}  // namespace kimi::bindings
