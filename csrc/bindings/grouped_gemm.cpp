// SPDX-License-Identifier: MIT
#include "bindings/experts.h"

namespace kimi::bindings {
namespace {

void check_pair(const Tensor& a, const Tensor& b, bool shapes_fit, const char* shapes) {
  for (const Tensor* rows : {&a, &b}) refuse_number(*rows);
  a.of(kFloats);
  b.of({a.dtype});
  if (!shapes_fit)
    a.call->value_error(a.call->keep("a, " + std::string(b.name)), "expected shapes ", shapes,
                        ", got ", a.shape_text(), " and ", b.shape_text(), "; reshape them");
  if (a.dtype == kFloat64 && a.is_cuda())
    a.call->type_error("a", "expected float32 at most on CUDA, got float64; use a.float()");
}

// ---- c[r] = a[r] b[e(r)] + bias[e(r)]

struct Forward {
  Tensor a, b;
  kimi_grouped_gemm_params p = {};

  Forward(const Tensor& a_, const Tensor& b_, const Tensor& offsets, const Tensor& starts)
      : a(a_), b(b_) {
    check_pair(a, b, a.ndim == 2 && b.ndim == 3, "[R, K] and [E, K, N]");
    if (b.size(1) != a.size(1))
      b.call->value_error("b", "expected shape [E, K=", a.size(1), ", N], got ", b.shape_text(),
                          "; for weights [E, N, K] pass w.transpose(1, 2)");
    const Groups groups = groups_of(offsets, starts, b.size(0), a);
    p.offsets = groups.offsets;
    p.starts = groups.starts;
    b = b.apart();
    p.b = b.data();
    p.b_expert_stride = b.stride(0);
    p.b_k_stride = b.stride(1);
    p.b_n_stride = b.stride(2);
    p.n = b.size(2);
    p.num_experts = int32_t(b.size(0));
    p.b_storage = storage(b.dtype);
  }
};

void multiply(Call& call, kimi_grouped_gemm_params& p, const Tensor& rows, void* out, Type type) {
  const Tensor a = rows.with_a_unit_stride();
  p.a = a.data();
  p.num_rows = a.size(0);
  p.k = a.size(1);
  p.a_row_stride = a.stride(0);
  p.a_k_stride = a.stride(1);
  p.dtype = native(a.dtype);
  p.out = out;
  p.out_dtype = native(type);
  call.workspace(p, kimi_grouped_gemm_workspace_bytes);
  call.run(kimi_grouped_gemm, p);
}

PyObject* grouped_gemm(Call& call) {
  const Tensor a = call.tensor("a"), b = call.tensor("b"), offsets = call.tensor("offsets");
  const Tensor bias = call.optional("bias");
  const Type type = call.type("out_dtype");
  Forward forward(a, b, offsets, call.optional("starts"));
  check_result_type(call, "out_dtype", type, a.dtype);
  forward.p.bias = bias_of(bias, a.dtype, b.size(0), b.size(2));
  if (!is_native(a.dtype)) return call.not_implemented();
  const Output out = call.empty(type, {a.size(0), b.size(2)});
  multiply(call, forward.p, a, out.data(), type);
  return call.result(out);
}

PyObject* grouped_gemm_out(Call& call) {
  const Tensor a = call.tensor("a"), b = call.tensor("b"), offsets = call.tensor("offsets");
  const Tensor bias = call.optional("bias"), out = call.tensor("out");
  const bool accumulate = call.truth();
  const Tensor starts = call.optional("starts");
  Forward forward(a, b, offsets, starts);
  forward.p.accumulate = accumulate;
  check_result_type(call, "out", out.dtype, a.dtype);
  forward.p.bias = bias_of(bias, a.dtype, b.size(0), b.size(2));
  check_out(out, {a.size(0), b.size(2)}, a);
  out.writable({&a, &b, &offsets, &bias, &starts});
  if (!is_native(a.dtype)) return call.not_implemented();
  const Tensor dense = out.is_dense() || accumulate ? out.dense() : call.empty_tensor(out);
  multiply(call, forward.p, a, dense.data(), out.dtype);
  call.write_back(out, dense);
  return call.none();
}

// ---- dw[e] = a[rows of e]^T dc[rows of e]

struct Wgrad {
  Tensor a, dc;
  kimi_grouped_gemm_wgrad_params p = {};

  Wgrad(const Tensor& a_, const Tensor& dc_, const Tensor& offsets, const Tensor& starts)
      : a(a_), dc(dc_) {
    check_pair(a, dc, a.ndim == 2 && dc.ndim == 2, "[R, K] and [R, N]");
    if (a.size(0) != dc.size(0))
      a.call->value_error("dc", "expected ", a.size(0), " rows, got ", dc.size(0),
                          "; pass the gradient of a's rows");
    const Groups groups = groups_of(offsets, starts, -1, a);
    p.offsets = groups.offsets;
    p.starts = groups.starts;
    p.num_experts = int32_t(offsets.size(0));
    p.k = a.size(1);
    p.n = dc.size(1);
  }

  void run(Call& call, const int64_t* out_strides, void* out, Type type) {
    a = a.with_a_unit_stride();
    dc = dc.with_a_unit_stride();
    p.a = a.data();
    p.dc = dc.data();
    p.num_rows = a.size(0);
    p.a_row_stride = a.stride(0);
    p.a_k_stride = a.stride(1);
    p.dc_row_stride = dc.stride(0);
    p.dc_n_stride = dc.stride(1);
    p.dtype = native(a.dtype);
    p.out = out;
    p.out_dtype = native(type);
    p.out_expert_stride = out_strides[0];
    p.out_k_stride = out_strides[1];
    p.out_n_stride = out_strides[2];
    call.workspace(p, kimi_grouped_gemm_wgrad_workspace_bytes);
    call.run(kimi_grouped_gemm_wgrad, p);
  }
};

PyObject* grouped_gemm_wgrad(Call& call) {
  const Tensor a = call.tensor("a"), dc = call.tensor("dc"), offsets = call.tensor("offsets");
  const Type type = call.type("out_dtype");
  Wgrad wgrad(a, dc, offsets, call.optional("starts"));
  check_result_type(call, "out_dtype", type, a.dtype);
  if (!is_native(a.dtype)) return call.not_implemented();
  const int64_t k = a.size(1), n = dc.size(1), strides[] = {k * n, n, 1};
  const Output out = call.empty(type, {offsets.size(0), k, n});
  wgrad.run(call, strides, out.data(), type);
  return call.result(out);
}

PyObject* grouped_gemm_wgrad_out(Call& call) {
  const Tensor a = call.tensor("a"), dc = call.tensor("dc"), offsets = call.tensor("offsets");
  const Tensor out = call.tensor("out");
  const bool accumulate = call.truth();
  const Tensor starts = call.optional("starts");
  Wgrad wgrad(a, dc, offsets, starts);
  wgrad.p.accumulate = accumulate;
  check_result_type(call, "out", out.dtype, a.dtype);
  check_out(out, {offsets.size(0), a.size(1), dc.size(1)}, a);
  out.writable({&a, &dc, &offsets, &starts});
  if (!is_native(a.dtype)) return call.not_implemented();
  Tensor target = out;
  if (out.stride(1) != 1 && out.stride(2) != 1 && out.size(1) > 1 && out.size(2) > 1)
    target = wgrad.p.accumulate ? out.dense() : call.empty_tensor(out);
  wgrad.run(call, target.strides, target.data(), out.dtype);
  call.write_back(out, target);
  return call.none();
}

// ---- quantised weights [E, N, K], of which b is the transpose

PyObject* quantized_gemm(Call& call) {
  const Tensor a = call.tensor("a");
  const Tensor data = call.tensor("data").of({kFloat8, kInt32}).shape({"E", "N", "K"});
  const Tensor scale = call.tensor("scale"), offsets = call.tensor("offsets");
  const Tensor bias = call.optional("bias");
  const Type type = call.type("out_dtype");
  const bool packed = data.dtype == kInt32;
  const int64_t k = data.size(2) * (packed ? kInt4Word : 1);
  kimi_grouped_gemm_params p = {};
  refuse_number(a);
  a.of(kFloats);
  if (a.ndim != 2 || a.size(1) != k)
    call.value_error("a", "expected shape [R, K=", k, "] beside a quantised weight [", data.size(0),
                     ", ", data.size(1), ", ", k, "] [E, N, K], got ", a.shape_text(),
                     "; reshape it");
  if (a.is_cuda())
    call.type_error("a", "expected a CPU tensor, got ", a.device_text(), "; dequantise the weight");
  p.b = data.data();
  p.b_scale = scale_of(scale, data, k);
  if (!data.is_dense() || !scale.is_dense())
    call.value_error("data, scale", "expected contiguous tensors, got strides ",
                     data.strides_text(), " and ", scale.strides_text(),
                     "; pass contiguous copies");
  p.offsets = offsets_of(offsets, data.size(0), a);
  check_result_type(call, "out_dtype", type, a.dtype);
  p.bias = bias_of(bias, a.dtype, data.size(0), data.size(1));
  if (!is_native(a.dtype)) return call.not_implemented();
  p.n = data.size(1);
  p.num_experts = int32_t(data.size(0));
  p.b_expert_stride = p.n * k;
  p.b_k_stride = 1;
  p.b_n_stride = k;
  p.b_storage = storage(data.dtype);
  const Output out = call.empty(type, {a.size(0), p.n});
  multiply(call, p, a, out.data(), type);
  return call.result(out);
}

}  // namespace

void define_grouped_gemm(Methods& methods) {
  methods.add<grouped_gemm, 6>("grouped_gemm");
  methods.add<grouped_gemm_out, 7>("grouped_gemm_out", "grouped_gemm");
  methods.add<grouped_gemm_wgrad, 5>("grouped_gemm_wgrad");
  methods.add<grouped_gemm_wgrad_out, 6>("grouped_gemm_wgrad_out", "grouped_gemm_wgrad");
  methods.add<quantized_gemm, 6>("quantized_gemm", "grouped_gemm");
}

}  // namespace kimi::bindings
