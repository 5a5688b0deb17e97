// SPDX-License-Identifier: MIT
// Products of matrices.
#include "bindings/xla/ops.h"
#include "common/integer.h"
#include "common/storage.h"

namespace kimi::xla {

// b_is_nk: b is [E, N, K], which quantised weights are always, instead of [E, K, N].
Status grouped_gemm(Frame& f) {
  kimi_grouped_gemm_params p = {};
  const bool nk = f.int32("b_is_nk") != 0;
  const Tensor& a = f.next("a", kFloats, {kAny, kAny});
  p.a = a.data;
  p.num_rows = a.size(0);
  p.k = p.a_row_stride = a.size(1);
  p.a_k_stride = 1;
  p.dtype = native(a.dtype);
  const Stack b = stack_of(f, "b", a.dtype, kAny, nk ? kAny : p.k, nk ? p.k : kAny);
  p.b = b.weights.data;
  p.b_scale = b.weights.scale;
  p.b_storage = b.weights.storage;
  p.num_experts = int32_t(b.experts);
  p.n = nk ? b.rows : b.columns;
  p.b_expert_stride = p.k * p.n;
  p.b_k_stride = nk ? 1 : p.n;
  p.b_n_stride = nk ? p.k : 1;
  p.offsets = f.next("offsets", {kS32}, {p.num_experts}).as<int32_t>();
  p.bias = f.optional("bias", a.dtype, {p.num_experts, p.n});
  p.starts = static_cast<const int32_t*>(f.optional("starts", kS32, {p.num_experts}));
  p.accumulate = f.int32("accumulate");
  const Types types = {a.dtype, kF32};
  const Tensor& out = p.accumulate ? f.over("out", f.next("out", types, {p.num_rows, p.n}))
                                   : f.out(types, {p.num_rows, p.n});
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
  p.num_experts = int32_t(offsets.size(0));
  p.starts = static_cast<const int32_t*>(f.optional("starts", kS32, {p.num_experts}));
  p.num_rows = a.size(0);
  p.k = p.a_row_stride = a.size(1);
  p.n = p.dc_row_stride = p.out_k_stride = dc.size(1);
  p.a_k_stride = p.dc_n_stride = p.out_n_stride = 1;
  p.out_expert_stride = p.k * p.n;
  p.dtype = native(a.dtype);
  p.accumulate = f.int32("accumulate");
  const Types types = {a.dtype, kF32};
  const Shape shape = {p.num_experts, p.k, p.n};
  const Tensor& out =
      p.accumulate ? f.over("out", f.next("out", types, shape)) : f.out(types, shape);
  p.out = out.data;
  p.out_dtype = native(out.dtype);
  return f.run(kimi_grouped_gemm_wgrad, p, kimi_grouped_gemm_wgrad_workspace_bytes);
}

// For Hopper. Scales of rows come as [ceil(K / 128), R padded to a multiple of 4].
Status grouped_gemm_fp8(Frame& f) {
  kimi_grouped_gemm_fp8_params p = {};
  const Tensor& a = f.next("a", {kF8}, {kAny, kAny});
  p.a = a.data;
  p.num_rows = a.size(0);
  p.k = p.a_row_stride = a.size(1);
  const Tensor& scale = f.next("a scale", {kF32}, {ceil_div(p.k, kFp8Block), kAny});
  p.a_scale = scale.as<float>();
  p.a_scale_stride = scale.size(1);
  const Stack b = stack_of(f, "b", kF8, kAny, kAny, p.k);
  p.b = b.weights.data;
  p.b_scale = static_cast<const float*>(b.weights.scale);
  p.num_experts = int32_t(b.experts);
  p.n = b.rows;
  p.offsets = f.next("offsets", {kS32}, {p.num_experts}).as<int32_t>();
  const Tensor& out = f.out(kFloats, {p.num_rows, p.n});
  p.out = out.data;
  p.out_dtype = native(out.dtype);
  p.bias = f.optional("bias", out.dtype, {p.num_experts, p.n});
  return f.run(kimi_grouped_gemm_fp8, p);
}

Status matrix_product(Frame& f) {
  kimi_matrix_product_params p = {};
  const Tensor& a = f.next("a", kFloats, {kAny, kAny});
  p.a = a.data;
  p.rows = a.size(0);
  p.depth = p.a_row_stride = a.size(1);
  p.symmetric = f.int32("symmetric");
  // of a symmetric result no b is a^T
  p.b = f.optional("b", a.dtype, {p.depth, p.symmetric ? p.rows : kAny});
  p.cols = p.b ? f.arguments[1].size(1) : p.rows;
  p.b_row_stride = p.b ? p.cols : 1;
  p.b_col_stride = p.b ? 1 : p.depth;
  if (!p.b) p.b = a.data;
  p.a_col_stride = 1;
  p.c = f.optional("c", a.dtype, {p.rows, p.cols});
  p.c_stride = p.d_stride = p.cols;
  p.alpha = float(f.number("alpha"));
  p.beta = float(f.number("beta"));
  p.dtype = native(a.dtype);
  p.d = f.out({a.dtype}, {p.rows, p.cols}).data;
  return f.run(kimi_matrix_product, p, kimi_matrix_product_workspace_bytes);
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
  p.method = kimi_newton_schulz_method(f.choice("method", {"standard", "symmetric", "gram"}));
  p.eps = float(f.number("eps"));
  p.aol = f.int32("aol");
  const std::vector<double> numbers = f.numbers("coefficients");
  const std::vector<float> coefficients(numbers.begin(), numbers.end());
  if (coefficients.empty() || coefficients.size() % 3)
    f.refuse("coefficients: expected three numbers a step");
  const std::vector<int64_t> steps = f.integers("restarts");
  const std::vector<int32_t> restarts(steps.begin(), steps.end());
  p.coefficients = coefficients.data();
  p.steps = int32_t(coefficients.size() / 3);
  p.restarts = restarts.data();
  p.num_restarts = int32_t(restarts.size());
  std::vector<const void*> in;
  std::vector<void*> out;
  const int64_t bytes = p.rows * p.cols * bytes_of(g.dtype);
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
