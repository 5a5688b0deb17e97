// SPDX-License-Identifier: MIT
#include "bindings/experts.h"
#include "fused_experts/activation_names.h"
#include "permute/check.h"

namespace kimi::bindings {
namespace {

// A stack of matrices [E, rows, columns] as it is stored, and what its sizes stand for.
struct Weights {
  Tensor data, scale;
  bool packed() const { return data.dtype == kInt32; }
  int64_t columns() const { return data.size(2) * (packed() ? kInt4Word : 1); }
  std::string shape_text() const {
    return "[" + std::to_string(data.size(0)) + ", " + std::to_string(data.size(1)) + ", " +
           std::to_string(columns()) + "]";
  }

  void check_type(const Tensor& x) const {
    Call& call = *data.call;
    if (is_quantised(data.dtype)) {
      const bool served = !x.is_cuda() || (!packed() && call.served(kimi_grouped_gemm_fp8_served));
      if (x.dtype == kFloat64 || !served)
        call.type_error(data.name, "expected ", call.kind(), " beside ", name_of(x.dtype),
                        " tokens on ", x.device_text(), ", got ",
                        packed() ? "Int4GroupWeight" : "Fp8BlockWeight", "; pass ", data.name,
                        ".dequantize(x.dtype)");
    } else if (data.dtype != x.dtype) {
      call.type_error(data.name, "expected ", name_of(x.dtype), " beside ", name_of(x.dtype),
                      " tokens, got ", name_of(data.dtype), "; convert it");
    }
  }

  // The struct of the C API; `width` columns of a matrix that are in use.
  kimi_expert_weights stored(int64_t width) const {
    const int64_t words = packed() ? kInt4Word : 1;
    const void* scales = nullptr;
    if (is_quantised(data.dtype)) {
      if (!scale || !data.is_dense() || !scale.is_dense())
        data.call->value_error(
            data.name, "expected contiguous data and scale of a quantised weight, got ",
            scale ? scale.strides_text() : "none", "; pass both as they were quantised");
      scales = scale_of(scale, data, width);
    }
    return {
        data.data(),        scales, data.stride(0) * words, data.stride(1) * words, data.stride(2),
        storage(data.dtype)};
  }
};

// A name and the numbers that it has.
template <class Params>
void set_activation(Call& call, Params& p) {
  p.activation = call.choice<kimi_activation>("activation", kActivations);
  const std::vector<double> given = call.numbers("activation");
  const std::vector<float*> wanted = numbers_of(p.activation, p.numbers);
  if (given.size() != wanted.size())
    call.value_error("activation", "expected ", wanted.size(), " numbers of ",
                     kActivations.begin()[p.activation], ", got ", given.size(),
                     "; kimi_ops.activations makes them");
  for (size_t i = 0; i < wanted.size(); ++i) *wanted[i] = float(given[i]);
}

// What forward and backward take alike.
struct Layer {
  Call& call;
  Tensor x;
  Weights w_gate_up = {}, w_down = {};
  Tensor weights = {}, b_gate_up = {}, b_down = {};
  const void *b_gate_up_data = nullptr, *b_down_data = nullptr;

  int64_t tokens() const { return x.size(0); }
  int64_t hidden() const { return x.size(1); }
  int64_t experts() const { return w_gate_up.data.size(0); }
  int64_t both() const { return w_gate_up.data.size(1); }
  int32_t top_k() const { return int32_t(weights.size(1)); }
  int64_t pairs() const { return tokens() * top_k(); }

  void check(const Tensor& ids, const char* name_of_ids) {
    x.of(kFloats);
    w_gate_up.check_type(x);
    w_down.check_type(x);
    const Type wide = x.dtype == kFloat64 ? kFloat64 : kFloat32;
    for (const auto& [tensor, type] :
         {std::pair<const Tensor*, Type>(&weights, wide), std::pair(&ids, kInt32)})
      if (tensor->dtype != type)
        call.type_error(tensor->name, "expected ", name_of(type), " beside ", name_of(x.dtype),
                        " tokens, got ", name_of(tensor->dtype), "; convert it");
    x.shape({"T", "H"}, "flatten the batch");
    const Tensor &gate_up = w_gate_up.data, &down = w_down.data;
    if (gate_up.ndim != 3 || both() % 2 || w_gate_up.columns() != hidden())
      call.value_error("w_gate_up", "expected shape [E, 2F, H=", hidden(), "], got ",
                       gate_up.ndim == 3 ? w_gate_up.shape_text() : gate_up.shape_text(),
                       "; stack gate rows over up rows");
    if (down.ndim != 3 || down.size(0) != experts() || down.size(1) != hidden() ||
        w_down.columns() != both() / 2)
      call.value_error("w_down", "expected shape [", experts(), ", ", hidden(), ", ", both() / 2,
                       "], got ", down.ndim == 3 ? w_down.shape_text() : down.shape_text(),
                       "; pass [E, H, F]");
    if (ids.ndim != 2 || ids.size(0) != tokens() || ids.size(1) < 1)
      call.value_error(name_of_ids, "expected shape [T=", tokens(), ", K >= 1], got ",
                       ids.shape_text());
    weights.shape_like(ids);
    b_gate_up_data = bias_of(b_gate_up, x.dtype, experts(), both());
    b_down_data = bias_of(b_down, x.dtype, experts(), hidden());
  }

  template <class Params>
  void set(Params& p) {
    x = x.dense_rows();
    p.x = x.data();
    p.x_stride = x.stride(0);
    for (Weights* w : {&w_gate_up, &w_down}) w->data = w->data.apart();
    p.w_gate_up = w_gate_up.stored(hidden());
    p.w_down = w_down.stored(both() / 2);
    p.b_gate_up = b_gate_up_data;
    p.b_down = b_down_data;
    p.weights = weights.dense().data<float>();
    p.num_tokens = tokens();
    p.hidden = hidden();
    p.width = both() / 2;
    p.num_experts = int32_t(experts());
    p.top_k = top_k();
    p.dtype = native(x.dtype);
  }
};

struct Plan {
  Tensor row_map, source, offsets;

  explicit Plan(Call& call)
      : row_map(call.tensor("row_map")),
        source(call.tensor("source")),
        offsets(call.tensor("offsets")) {}

  template <class Params>
  void set(Params& p, const Layer& layer) {
    source.of({kInt32}).shape({layer.pairs()});
    offsets.of({kInt32}).shape({layer.experts()});
    p.row_map = row_map.dense().data<int32_t>();
    p.source = source.dense().data<int32_t>();
    p.offsets = offsets.dense().data<int32_t>();
  }
};

struct Forward {
  Output y, gate_up;

  Forward(Call& call, kimi_fused_experts_params& p, const Layer& layer, bool save)
      : y(call.empty_like(layer.x)),
        gate_up(call.empty(layer.x.dtype, {save ? layer.pairs() : 0, layer.both()})) {
    p.y = y.data();
    p.gate_up = save ? gate_up.data() : nullptr;
    call.workspace(p, kimi_fused_experts_workspace_bytes);
    call.run(kimi_fused_experts, p);
  }
};

// (x, w_gate_up, w_down, weights, indices, scales or None, biases or None, activation and its
// numbers, weights_first, save) -> y, gate_up and the plan that it made: row_map, source, offsets.
PyObject* fused_experts(Call& call) {
  Layer layer{call, call.tensor("x")};
  layer.w_gate_up.data = call.tensor("w_gate_up");
  layer.w_down.data = call.tensor("w_down");
  layer.weights = call.tensor("weights");
  const Tensor given = call.tensor("indices");
  layer.w_gate_up.scale = call.optional("w_gate_up scale");
  layer.w_down.scale = call.optional("w_down scale");
  kimi_fused_experts_params p = {};
  layer.b_gate_up = call.optional("b_gate_up");
  layer.b_down = call.optional("b_down");
  set_activation(call, p);
  p.weights_first = call.truth();
  const bool save = call.truth();
  layer.check(given, "indices");
  const Tensor indices = given.dense();
  if (call.reads(indices)) {
    const Tensor ids = call.on_host(indices);
    call.check(permutation::check_ids("fused_experts", ids.data<int32_t>(), ids.count(),
                                      int32_t(layer.experts())));
  }
  if (!is_native(layer.x.dtype)) return call.not_implemented();
  layer.set(p);

  kimi_permute_plan_params plan = {};
  const Output row_map = call.empty_like(indices), source = call.empty(kInt32, {layer.pairs()});
  const Output offsets = call.empty(kInt32, {layer.experts()});
  plan.indices = indices.data<int32_t>();
  p.row_map = plan.row_map = row_map.data<int32_t>();
  p.source = plan.source = source.data<int32_t>();
  p.offsets = plan.offsets = offsets.data<int32_t>();
  plan.tokens_per_expert = static_cast<int32_t*>(call.workspace(size_t(layer.experts()) * 4));
  plan.num_tokens = layer.tokens();
  plan.num_experts = p.num_experts;
  plan.top_k = p.top_k;
  plan.align = 1;
  call.workspace(plan, kimi_permute_plan_workspace_bytes);
  call.run(kimi_permute_plan, plan);

  const Forward forward(call, p, layer, save);
  return call.result({forward.y, forward.gate_up, row_map, source, offsets});
}

// The same with the plan of the ids beside it: torch.ops.kimi_ops.fused_experts.
PyObject* fused_experts_planned(Call& call) {
  Layer layer{call, call.tensor("x")};
  layer.w_gate_up.data = call.tensor("w_gate_up");
  layer.w_down.data = call.tensor("w_down");
  layer.weights = call.tensor("weights");
  Plan plan(call);
  layer.w_gate_up.scale = call.optional("w_gate_up scale");
  layer.w_down.scale = call.optional("w_down scale");
  kimi_fused_experts_params p = {};
  layer.b_gate_up = call.optional("b_gate_up");
  layer.b_down = call.optional("b_down");
  set_activation(call, p);
  p.weights_first = call.truth();
  const bool save = call.truth();
  layer.x.of(kNatives);
  layer.check(plan.row_map, "row_map");
  layer.set(p);
  plan.set(p, layer);
  const Forward forward(call, p, layer, save);
  return call.result({forward.y, forward.gate_up});
}

PyObject* fused_experts_backward(Call& call) {
  const Tensor dy = call.tensor("dy");
  Layer layer{call, call.tensor("x")};
  layer.w_gate_up.data = call.tensor("w_gate_up");
  layer.w_down.data = call.tensor("w_down");
  layer.weights = call.tensor("weights");
  Plan plan(call);
  const Tensor gate_up = call.optional("gate_up");
  layer.b_gate_up = call.optional("b_gate_up");
  layer.b_down = call.optional("b_down");
  kimi_fused_experts_backward_params p = {};
  set_activation(call, p);
  const std::vector<int64_t> wanted = call.integers("wanted");
  layer.x.of(kNatives);
  const Weights* matrices[] = {&layer.w_gate_up, &layer.w_down};
  for (const Weights* w : matrices) w->data.of({layer.x.dtype});
  layer.check(plan.row_map, "row_map");
  dy.of({layer.x.dtype}).shape_like(layer.x);
  if (gate_up) {
    gate_up.of({layer.x.dtype}).shape({layer.pairs(), layer.both()});
    p.gate_up = gate_up.dense().data();
  }
  constexpr int kInputs = 6;
  const Tensor* inputs[kInputs] = {&layer.x,       &layer.w_gate_up.data, &layer.w_down.data,
                                   &layer.weights, &layer.b_gate_up,      &layer.b_down};
  bool possible = wanted.size() == kInputs;
  for (int i = 0; possible && i < kInputs; ++i) possible = !wanted[i] || *inputs[i];
  if (!possible)
    call.value_error("wanted", "expected 6 truth values, got ", wanted.size(),
                     " or one for a missing bias; pass one for each of x, w_gate_up, w_down, "
                     "weights, b_gate_up, b_down");
  layer.set(p);
  plan.set(p, layer);
  const Tensor dense_dy = dy.dense_rows();
  p.dy = dense_dy.data();
  p.dy_stride = dense_dy.stride(0);
  std::vector<Output> gradients;
  for (int i = 0; i < kInputs; ++i)
    gradients.push_back(wanted[i] ? call.empty_like(*inputs[i])
                                  : call.empty(i == 3 ? kFloat32 : layer.x.dtype, {0}));
  const auto memory = [&](int i) { return wanted[i] ? gradients[i].address : nullptr; };
  p.dx = memory(0);
  p.grad_w_gate_up = memory(1);
  p.grad_w_down = memory(2);
  p.grad_weights = reinterpret_cast<float*>(memory(3));
  p.grad_b_gate_up = memory(4);
  p.grad_b_down = memory(5);
  call.workspace(p, kimi_fused_experts_backward_workspace_bytes);
  call.run(kimi_fused_experts_backward, p);
  return call.result(
      {gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], gradients[5]});
}

}  // namespace

void define_fused_experts(Methods& methods) {
  methods.add<fused_experts, 13>("fused_experts");
  methods.add<fused_experts_planned, 15>("fused_experts_planned", "fused_experts");
  methods.add<fused_experts_backward, 14>("fused_experts_backward");
}

}  // namespace kimi::bindings
