// SPDX-License-Identifier: MIT
#include "bindings/experts.h"

namespace kimi::bindings {
namespace {

constexpr int64_t kTmaBytes = 16;  // what TMA wants addresses and strides to be multiples of
constexpr int64_t kScaleRows = kTmaBytes / int64_t{sizeof(float)};

PyObject* fp8_rows(Call& call) {
  const Tensor x = call.tensor("x").of(kNatives).shape({"R", "K"}).dense_rows();
  const int64_t rows = x.size(0), columns = x.size(1), blocks = ceil_div(columns, kFp8Block);
  kimi_fp8_rows_params p = {};
  p.x = x.data();
  p.num_rows = rows;
  p.k = columns;
  p.x_row_stride = rows > 1 ? x.stride(0) : columns;
  p.scale_stride = ceil_div(rows, kScaleRows) * kScaleRows;
  p.dtype = native(x.dtype);
  const Output data = call.empty(kFloat8, {rows, columns});
  const Output scale = call.empty(kFloat32, {blocks, p.scale_stride});  // of blocks, then of rows
  p.data = data.data();
  p.scale = scale.data<float>();
  call.run(kimi_fp8_rows, p);
  // [R, blocks], where rows lie side by side
  const Object turned = checked(PyObject_GetAttrString(scale.object, "mT"));
  Object rows_of_scale = checked(PyObject_CallMethod(turned.get(), "narrow", "iiL", 0, 0, rows));
  Object pair = checked(PyTuple_New(2));
  PyTuple_SET_ITEM(pair.get(), 0, call.result(data));
  PyTuple_SET_ITEM(pair.get(), 1, rows_of_scale.release());
  return pair.release();
}

struct Product {
  Tensor a, a_scale, b, b_scale, offsets, bias;

  explicit Product(Call& call)
      : a(call.tensor("a.data")),
        a_scale(call.tensor("a.scale")),
        b(call.tensor("b.data")),
        b_scale(call.tensor("b.scale")),
        offsets(call.tensor("offsets")),
        bias(call.optional("bias")) {}

  kimi_grouped_gemm_fp8_params checked(const char* name, Type type) {
    Call& call = *a.call;
    kimi_grouped_gemm_fp8_params p = {};
    a.of({kFloat8});
    b.of({kFloat8}).shape({"E", "N", "K"});
    p.num_experts = int32_t(b.size(0));
    p.n = b.size(1);
    p.k = b.size(2);
    a.shape({"R", p.k}, call.keep("pass rows of the K = " + std::to_string(p.k) + " of b"));
    const int64_t blocks = ceil_div(p.k, kFp8Block);
    a_scale.of({kFloat32}).shape({a.size(0), blocks});
    b_scale.of({kFloat32}).shape({b.size(0), ceil_div(p.n, kFp8Block), blocks});
    if (!b.is_dense() || !b_scale.is_dense())
      call.value_error("b", "expected contiguous tensors, got strides ", b.strides_text(), " and ",
                       b_scale.strides_text(), "; call .contiguous()");
    if (a.stride(1) != 1 && p.k > 1)
      call.value_error("a.data", "expected contiguous columns, got strides ", a.strides_text(),
                       "; call .contiguous()");
    p.offsets = offsets_of(offsets, p.num_experts, a);
    if (!is_native(type))
      call.type_error(name, "expected bfloat16, float16 or float32 beside FP8 rows, got ",
                      name_of(type), "; choose one of these");
    p.bias = bias_of(bias, type, p.num_experts, p.n);
    p.a = a.data();
    p.a_scale = a_scale.data<float>();
    p.b = b.data();
    p.b_scale = b_scale.data<float>();
    p.num_rows = a.size(0);
    p.a_row_stride = p.num_rows > 1 ? a.stride(0) : p.k;
    p.a_scale_stride = a_scale.stride(1);
    p.out_dtype = native(type);
    return p;
  }

  // Whether the kernel can read the operands where they lie.
  bool readable(const kimi_grouped_gemm_fp8_params& p) const {
    if (p.num_rows == 0 || p.n == 0 || p.k == 0) return true;  // nothing is read
    const auto even = [](auto value) { return uint64_t(value) % kTmaBytes == 0; };
    const auto lies = [&](const void* memory) { return even(reinterpret_cast<uintptr_t>(memory)); };
    const bool rows = even(p.k) && even(p.a_row_stride) && p.a_row_stride >= p.k;
    const bool scales = (a_scale.stride(0) == 1 || p.num_rows == 1) &&
                        p.a_scale_stride % kScaleRows == 0 && p.a_scale_stride >= p.num_rows;
    return rows && scales && lies(p.a) && lies(p.b) && lies(p.a_scale);
  }

  // NotImplemented: the caller copies what is not readable, or dequantises.
  bool run(Call& call, const kimi_grouped_gemm_fp8_params& p) const {
    if (!call.served(kimi_grouped_gemm_fp8_served) || !readable(p)) return false;
    call.run(kimi_grouped_gemm_fp8, p);
    return true;
  }
};

PyObject* grouped_gemm_fp8(Call& call) {
  Product product(call);
  const Type type = call.type("out_dtype");
  kimi_grouped_gemm_fp8_params p = product.checked("out_dtype", type);
  const Output out = call.empty(type, {p.num_rows, p.n});
  p.out = out.data();
  return product.run(call, p) ? call.result(out) : call.not_implemented();
}

PyObject* grouped_gemm_fp8_out(Call& call) {
  Product product(call);
  const Tensor out = call.tensor("out");
  kimi_grouped_gemm_fp8_params p = product.checked("out", out.dtype);
  check_out(out, {p.num_rows, p.n}, product.a);
  product.a.name = "a";  // as the caller knows the operands
  product.b.name = "b";
  out.writable({&product.a, &product.a_scale, &product.b, &product.b_scale, &product.offsets,
                &product.bias});
  const Tensor dense = out.is_dense() ? out : call.empty_tensor(out);
  p.out = dense.data();
  if (!product.run(call, p)) return call.not_implemented();
  call.write_back(out, dense);
  return call.none();
}

// Whether rows and weights on the device of x have a kernel of their own.
PyObject* fp8_served(Call& call) {
  call.tensor("x");
  return PyBool_FromLong(call.served(kimi_grouped_gemm_fp8_served));
}

}  // namespace

void define_fp8(Methods& methods) {
  methods.add<fp8_rows, 1>("fp8_rows");
  methods.add<grouped_gemm_fp8, 7>("grouped_gemm_fp8", "grouped_gemm");
  methods.add<grouped_gemm_fp8_out, 7>("grouped_gemm_fp8_out", "grouped_gemm");
  methods.add<fp8_served, 1>("grouped_gemm_fp8_served");
}

}  // namespace kimi::bindings
