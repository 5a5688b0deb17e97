// SPDX-License-Identifier: MIT
// The ops that multiply matrices: arguments of python/kimi_ops/jax in order, then its attributes.
#include "bindings/xla/ops.h"

namespace kimi::xla {
namespace {

constexpr std::initializer_list<const char*> kActivations = {"silu", "gelu", "situ", "gelu_tanh",
                                                             "relu2"};
constexpr float kSituGate = 4.0f, kSituUp = 25.0f;  // the bounds of Kimi K3
constexpr std::initializer_list<const char*> kMethods = {"standard", "symmetric", "gram"};

kimi_expert_weights weights_of(const Tensor& w) {
  return {w.data, nullptr, w.size(1) * w.size(2), w.size(2), 1, kimi_storage(native(w.dtype))};
}

// What the experts' forward and backward take alike, from x on.
template <class Params>
void set_layer(Frame& f, Params& p) {
  const Tensor& x = f.next("x", kFloats, {kAny, kAny});
  p.x = x.data;
  p.num_tokens = x.size(0);
  p.hidden = p.x_stride = x.size(1);
  p.dtype = native(x.dtype);
  const Tensor& gate_up = f.next("w_gate_up", {x.dtype}, {kAny, kAny, p.hidden});
  if (gate_up.size(1) % 2) f.refuse("w_gate_up: expected shape [E, 2F, H]: gate rows over up rows");
  p.num_experts = int32_t(gate_up.size(0));
  p.width = gate_up.size(1) / 2;
  p.w_gate_up = weights_of(gate_up);
  p.w_down = weights_of(f.next("w_down", {x.dtype}, {p.num_experts, p.hidden, p.width}));
  const Tensor& weights = f.next("weights", {kF32}, {p.num_tokens, kAny});
  p.weights = weights.as<float>();
  p.top_k = int32_t(weights.size(1));
  const Tensor& row_map = f.next("row_map", {kS32}, {p.num_tokens, p.top_k});
  const Tensor& source = f.next("source", {kS32}, {p.num_tokens * p.top_k});
  const Tensor& offsets = f.next("offsets", {kS32}, {p.num_experts});
  p.row_map = row_map.as<int32_t>();
  p.source = source.as<int32_t>();
  p.offsets = offsets.as<int32_t>();
  p.activation = kimi_activation(f.choice("activation", kActivations));
  p.numbers.gate_bound = kSituGate;
  p.numbers.up_bound = kSituUp;
}

}  // namespace

// b_is_nk: b is [E, N, K] instead of [E, K, N].
Status grouped_gemm(Frame& f) {
  kimi_grouped_gemm_params p = {};
  const bool nk = f.integer("b_is_nk") != 0;
  const Tensor& a = f.next("a", kFloats, {kAny, kAny});
  p.a = a.data;
  p.num_rows = a.size(0);
  p.k = p.a_row_stride = a.size(1);
  p.a_k_stride = 1;
  p.dtype = native(a.dtype);
  const Tensor& b =
      nk ? f.next("b", {a.dtype}, {kAny, kAny, p.k}) : f.next("b", {a.dtype}, {kAny, p.k, kAny});
  p.b = b.data;
  p.b_storage = kimi_storage(p.dtype);
  p.num_experts = int32_t(b.size(0));
  p.n = b.size(nk ? 1 : 2);
  p.b_expert_stride = p.k * p.n;
  p.b_k_stride = nk ? 1 : p.n;
  p.b_n_stride = nk ? p.k : 1;
  p.offsets = f.next("offsets", {kS32}, {p.num_experts}).as<int32_t>();
  p.bias = f.optional("bias", a.dtype, {p.num_experts, p.n});
  const Tensor& out = f.out({a.dtype, kF32}, {p.num_rows, p.n});
  p.out = out.data;
  p.out_dtype = native(out.dtype);
  return f.run(kimi_grouped_gemm, p, kimi_grouped_gemm_workspace_bytes);
}

Status grouped_gemm_wgrad(Frame& f) {
  kimi_grouped_gemm_wgrad_params p = {};
  const Tensor& a = f.next("a", kFloats, {kAny, kAny});
  const Tensor& dc = f.next("dc", {a.dtype}, {a.size(0), kAny});
  const Tensor& offsets = f.next("offsets", {kS32}, {kAny});
  p.a = a.data;
  p.dc = dc.data;
  p.offsets = offsets.as<int32_t>();
  p.num_rows = a.size(0);
  p.k = p.a_row_stride = a.size(1);
  p.n = p.dc_row_stride = p.out_k_stride = dc.size(1);
  p.a_k_stride = p.dc_n_stride = p.out_n_stride = 1;
  p.out_expert_stride = p.k * p.n;
  p.num_experts = int32_t(offsets.size(0));
  p.dtype = native(a.dtype);
  const Tensor& out = f.out({a.dtype, kF32}, {p.num_experts, p.k, p.n});
  p.out = out.data;
  p.out_dtype = native(out.dtype);
  return f.run(kimi_grouped_gemm_wgrad, p, kimi_grouped_gemm_wgrad_workspace_bytes);
}

Status fused_experts(Frame& f) {
  kimi_fused_experts_params p = {};
  set_layer(f, p);
  const DataType dtype = f.arguments[0].dtype;
  p.y = f.out({dtype}, {p.num_tokens, p.hidden}).data;
  // [0, 2F]: no backward follows
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
  set_layer(f, p);
  if (dy.dtype != f.arguments[1].dtype || dy.dims != f.arguments[1].dims)
    f.refuse("dy: expected the shape and dtype of x");
  const int64_t pairs = p.num_tokens * p.top_k;
  p.gate_up = f.next("gate_up", {dy.dtype}, {pairs, 2 * p.width}).data;
  p.dx = f.out({dy.dtype}, {p.num_tokens, p.hidden}).data;
  p.grad_w_gate_up = f.out({dy.dtype}, {p.num_experts, 2 * p.width, p.hidden}).data;
  p.grad_w_down = f.out({dy.dtype}, {p.num_experts, p.hidden, p.width}).data;
  p.grad_weights = f.out({kF32}, {p.num_tokens, p.top_k}).as<float>();
  return f.run(kimi_fused_experts_backward, p, kimi_fused_experts_backward_workspace_bytes);
}

Status newton_schulz(Frame& f) {
  kimi_newton_schulz_params p = {};
  const Tensor& g = f.next("g", kFloats, {kAny, kAny, kAny});
  const Tensor& x = f.out({g.dtype}, {g.size(0), g.size(1), g.size(2)});
  p.num_matrices = g.size(0);
  p.rows = g.size(1);
  p.cols = p.g_row_stride = p.x_row_stride = g.size(2);
  p.g_col_stride = p.x_col_stride = 1;
  p.g_dtype = p.x_dtype = native(g.dtype);
  p.dtype = kimi_dtype(f.choice("dtype", {"float32", "bfloat16", "float16"}));
  p.method = kimi_newton_schulz_method(f.choice("method", kMethods));
  p.eps = float(f.number("eps"));
  const std::vector<double>& numbers = f.numbers("coefficients");
  const std::vector<float> coefficients(numbers.begin(), numbers.end());
  if (coefficients.empty() || coefficients.size() % 3)
    f.refuse("coefficients: expected three numbers a step");
  p.coefficients = coefficients.data();
  p.steps = int32_t(coefficients.size() / 3);
  std::vector<const void*> in;
  std::vector<void*> out;
  const int64_t bytes = p.rows * p.cols * (g.dtype == kF32 ? 4 : 2);
  for (int64_t e = 0; e < p.num_matrices; ++e) {
    in.push_back(g.as<const char>() + e * bytes);
    out.push_back(x.as<char>() + e * bytes);
  }
  p.g = in.data();
  p.x = out.data();
  return f.run(kimi_newton_schulz, p, kimi_newton_schulz_workspace_bytes);
}

Status attention_max_logits(Frame& f) {
  kimi_attention_max_logits_params p = {};
  const Tensor& q = f.next("q", kFloats, {kAny, kAny, kAny, kAny});
  const Tensor& k = f.next("k", {q.dtype}, {q.size(0), kAny, kAny, q.size(3)});
  p.q = q.data;
  p.k = k.data;
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.queries = q.size(2);
  p.dim = p.q_row_stride = p.k_row_stride = q.size(3);
  p.kv_heads = k.size(1);
  p.keys = k.size(2);
  p.q_head_stride = p.queries * p.dim;
  p.k_head_stride = p.keys * p.dim;
  p.q_batch_stride = p.heads * p.q_head_stride;
  p.k_batch_stride = p.kv_heads * p.k_head_stride;
  p.q_col_stride = p.k_col_stride = 1;
  p.scale = float(f.number("scale"));
  p.causal = f.int32("causal");
  p.dtype = native(q.dtype);
  p.max_logits = f.out({kF32}, {p.heads}).as<float>();
  return f.run(kimi_attention_max_logits, p, kimi_attention_max_logits_workspace_bytes);
}

}  // namespace kimi::xla
