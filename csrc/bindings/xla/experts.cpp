// SPDX-License-Identifier: MIT
// The routed experts of a layer. Quantised weights, which carry their scale, are read only.
#include "bindings/xla/ops.h"
#include "common/integer.h"
#include "common/storage.h"
#include "fused_experts/activation_names.h"

namespace kimi::xla {
namespace {

constexpr int64_t kInt4Word = 8;  // nibbles in an int32

template <class Params>
void set_activation(Frame& f, Params& p) {
  p.activation = kimi_activation(f.choice("activation", kActivations));
  const std::vector<double> given = f.numbers("numbers");
  const std::vector<float*> wanted = numbers_of(p.activation, p.numbers);
  if (given.size() != wanted.size())
    f.refuse("activation: expected " + std::to_string(wanted.size()) + " numbers, got " +
             std::to_string(given.size()) + "; kimi_ops.activations makes them");
  for (size_t i = 0; i < wanted.size(); ++i) *wanted[i] = float(given[i]);
}

// What the experts' forward and backward take alike, from x on.
template <class Params>
DataType set_layer(Frame& f, Params& p) {
  const Tensor& x = f.next("x", kFloats, {kAny, kAny});
  p.x = x.data;
  p.num_tokens = x.size(0);
  p.hidden = p.x_stride = x.size(1);
  p.dtype = native(x.dtype);
  const Stack gate_up = stack_of(f, "w_gate_up", x.dtype, kAny, kAny, p.hidden);
  if (gate_up.rows % 2) f.refuse("w_gate_up: expected shape [E, 2F, H]: gate rows over up rows");
  p.num_experts = int32_t(gate_up.experts);
  p.width = gate_up.rows / 2;
  p.w_gate_up = gate_up.weights;
  p.w_down = stack_of(f, "w_down", x.dtype, p.num_experts, p.hidden, p.width).weights;
  p.b_gate_up = f.optional("b_gate_up", x.dtype, {p.num_experts, 2 * p.width});
  p.b_down = f.optional("b_down", x.dtype, {p.num_experts, p.hidden});
  const Tensor& weights = f.next("weights", {kF32}, {p.num_tokens, kAny});
  p.weights = weights.as<float>();
  p.top_k = int32_t(weights.size(1));
  const Tensor& row_map = f.next("row_map", {kS32}, {p.num_tokens, p.top_k});
  const Tensor& source = f.next("source", {kS32}, {p.num_tokens * p.top_k});
  const Tensor& offsets = f.next("offsets", {kS32}, {p.num_experts});
  p.row_map = row_map.as<int32_t>();
  p.source = source.as<int32_t>();
  p.offsets = offsets.as<int32_t>();
  set_activation(f, p);
  return x.dtype;
}

}  // namespace

Stack stack_of(Frame& f, const std::string& name, DataType dtype, int64_t experts, int64_t rows,
               int64_t columns) {
  const DataType stored = f.next_dtype();
  const bool packed = stored == kS32, quantised = packed || stored == kF8;
  if (quantised && columns == kAny)
    f.refuse(name + ": expected quantised weights as [E, N, K], got their transpose");
  if (packed && columns % kInt4Word)
    f.refuse(name + ": expected a multiple of 8 columns beside INT4 weights, got " +
             std::to_string(columns));
  const Tensor& w = f.next(name, {quantised ? stored : dtype},
                           {experts, rows, packed ? columns / kInt4Word : columns});
  if (columns == kAny) columns = w.size(2);
  const int64_t scale_rows = packed ? w.size(1) : ceil_div(w.size(1), kFp8Block);
  const void* scale =
      f.optional(name + " scale", packed ? kBF16 : kF32,
                 {w.size(0), scale_rows, ceil_div(columns, packed ? kInt4Group : kFp8Block)});
  if (quantised && !scale && w.count() > 0)
    f.refuse(name + ": expected the scale of a quantised weight, got none");
  const kimi_storage storage = packed          ? KIMI_STORAGE_INT4_GROUP
                               : stored == kF8 ? KIMI_STORAGE_FP8_BLOCK
                                               : kimi_storage(native(stored));
  return {{w.data, scale, w.size(1) * columns, columns, 1, storage}, w.size(0), w.size(1), columns};
}

// [g; u] of shape [0, 2F]: no backward follows.
Status fused_experts(Frame& f) {
  kimi_fused_experts_params p = {};
  const DataType dtype = set_layer(f, p);
  p.weights_first = f.int32("weights_first");
  p.y = f.out({dtype}, {p.num_tokens, p.hidden}).data;
  const Tensor& gate_up = f.out({dtype}, {kAny, 2 * p.width});
  if (gate_up.size(0) != 0 && gate_up.size(0) != p.num_tokens * p.top_k)
    f.refuse("gate_up: expected a row for each pair, or none");
  p.gate_up = gate_up.size(0) ? gate_up.data : nullptr;
  return f.run(kimi_fused_experts, p, kimi_fused_experts_workspace_bytes);
}

Status fused_experts_backward(Frame& f) {
  kimi_fused_experts_backward_params p = {};
  const Tensor& dy = f.next("dy", kFloats, {kAny, kAny});
  p.dy = dy.data;
  p.dy_stride = dy.size(1);
  const DataType dtype = set_layer(f, p);
  if (dy.dtype != dtype || dy.dims != Shape{p.num_tokens, p.hidden})
    f.refuse("dy: expected the shape and dtype of x");
  p.gate_up = f.optional("gate_up", dtype, {p.num_tokens * p.top_k, 2 * p.width});
  p.dx = f.out({dtype}, {p.num_tokens, p.hidden}).data;
  p.grad_w_gate_up = f.out({dtype}, {p.num_experts, 2 * p.width, p.hidden}).data;
  p.grad_w_down = f.out({dtype}, {p.num_experts, p.hidden, p.width}).data;
  p.grad_weights = f.out({kF32}, {p.num_tokens, p.top_k}).as<float>();
  if (p.b_gate_up) p.grad_b_gate_up = f.out({dtype}, {p.num_experts, 2 * p.width}).data;
  if (p.b_down) p.grad_b_down = f.out({dtype}, {p.num_experts, p.hidden}).data;
  return f.run(kimi_fused_experts_backward, p, kimi_fused_experts_backward_workspace_bytes);
}

}  // namespace kimi::xla
