// SPDX-License-Identifier: MIT
// A tensor argument: what it is called in messages, its checks, its copies in another order.
#include <algorithm>

#include "bindings/tensors.h"
#include "common/volume.h"

namespace kimi::bindings {
namespace {

std::string text_of_list(const int64_t* values, int count, char open, char close) {
  std::string text(1, open);
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + close;
}

}  // namespace

std::string name_of(dlpack::Device device) {
  if (device.type == dlpack::kCpu) return "cpu";
  if (device.type == dlpack::kCuda) return "cuda:" + std::to_string(device.id);
  return "device type " + std::to_string(int(device.type));
}

std::string name_of(Type type) {
  const std::string bits = std::to_string(type.bits);
  switch (type.code) {
    case dlpack::kInt:
      return "int" + bits;
    case dlpack::kUInt:
      return "uint" + bits;
    case dlpack::kFloat:
      return "float" + bits;
    case dlpack::kBfloat:
      return "bfloat" + bits;
    case dlpack::kComplex:
      return "complex" + bits;
    case dlpack::kBool:
      return "bool";
    case dlpack::kFloat8_e4m3fn:
      return "float8_e4m3fn";
    case dlpack::kFloat8_e4m3fnuz:
      return "float8_e4m3fnuz";
    case dlpack::kFloat8_e5m2:
      return "float8_e5m2";
    case dlpack::kFloat8_e5m2fnuz:
      return "float8_e5m2fnuz";
    case dlpack::kFloat8_e8m0fnu:
      return "float8_e8m0fnu";
    case dlpack::kFloat4_e2m1fn:
      return "float4_e2m1fn_x2";
  }
  return "DLPack type " + std::to_string(int(type.code)) + " of " + bits + " bits";
}

std::string shape_text(int ndim, const int64_t* sizes) {
  return text_of_list(sizes, ndim, '[', ']');
}

bool is_native(Type type) { return type == kFloat32 || type == kBfloat16 || type == kFloat16; }

kimi_dtype native(Type type) {
  return type == kFloat32 ? KIMI_FLOAT32 : type == kBfloat16 ? KIMI_BFLOAT16 : KIMI_FLOAT16;
}

kimi_storage storage(Type type) {
  if (type == kFloat8) return KIMI_STORAGE_FP8_BLOCK;
  if (type == kInt32) return KIMI_STORAGE_INT4_GROUP;
  return kimi_storage(native(type));
}

int64_t Tensor::count() const {
  int64_t count = 1;
  for (int i = 0; i < ndim; ++i) count = volume(count, sizes[i]);
  return count;
}

bool Tensor::is_dense() const {
  if (count() == 0) return true;  // whatever its strides, which NumPy makes 0
  int64_t step = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (sizes[i] != 1 && strides[i] != step) return false;
    step = volume(step, sizes[i]);
  }
  return true;
}

std::string Tensor::device_text() const { return bindings::name_of(device); }

std::string Tensor::strides_text() const {
  std::string text = text_of_list(strides, ndim, '(', ')');
  if (ndim == 1) text.insert(text.size() - 1, ",");
  return text;
}

const Tensor& Tensor::of(Types expected, std::string_view mend) const {
  if (std::find(expected.begin(), expected.end(), dtype) != expected.end()) return *this;
  std::string names, cast;
  for (const Type& type : expected) names += (names.empty() ? "" : ", ") + name_of(type);
  const std::string first = name_of(*expected.begin());
  if (mend.empty())
    mend = cast = call->speaks_torch() ? "cast it with .to(torch." + first + ")"
                                       : "cast it with .astype('" + first + "')";
  call->type_error(name, "expected ", names, ", got ", name_of(dtype), "; ", mend);
}

const Tensor& Tensor::shape(Dims expected, std::string_view mend) const {
  bool fits = ndim == int(expected.size());
  for (int i = 0; fits && i < ndim; ++i) {
    const Dim& want = expected.begin()[i];
    fits = want.letter || want.size == sizes[i];
  }
  if (fits) return *this;
  std::string wanted;
  for (const Dim& want : expected)
    wanted +=
        (wanted.empty() ? "" : ", ") + (want.letter ? want.letter : std::to_string(want.size));
  call->value_error(name, "expected shape [", wanted, "], got ", shape_text(),
                    mend.empty() ? "" : "; ", mend);
}

const Tensor& Tensor::shape_like(const Tensor& other, std::string_view mend) const {
  if (ndim == other.ndim && std::equal(sizes, sizes + ndim, other.sizes)) return *this;
  call->value_error(name, "expected shape ", other.shape_text(), ", got ", shape_text(),
                    mend.empty() ? "" : "; ", mend);
}

const Tensor& Tensor::writable(std::initializer_list<const Tensor*> inputs) const {
  for (int i = 0; i < ndim; ++i)
    if (strides[i] == 0 && sizes[i] > 1 && count() > 0)
      call->value_error(name,
                        "expected elements with memory of their own, got an expanded tensor of "
                        "strides ",
                        strides_text(), "; pass a contiguous copy");
  if (read_only)
    call->value_error(name, "expected an array that may be written, got a read-only one; copy it");
  const auto extent = [](const Tensor& x) {
    int64_t first = 0, last = x.count() > 0;
    for (int i = 0; last && i < x.ndim; ++i)
      (x.strides[i] < 0 ? first : last) += (x.sizes[i] - 1) * x.strides[i];
    return std::pair(x.address + first * x.bytes(), x.address + last * x.bytes());
  };
  const auto [begin, end] = extent(*this);
  for (const Tensor* input : inputs) {
    if (!*input || input->device != device) continue;
    const auto [first, last] = extent(*input);
    if (first < end && begin < last && first < last && begin < end)
      call->value_error(name, "expected memory of its own, got some that ", input->name,
                        " uses too; pass another one");
  }
  return *this;
}

Tensor Tensor::contiguous() const {
  static PyObject* const method = PyUnicode_InternFromString("contiguous");
  if (!PyObject_HasAttr(object, method))
    call->value_error(name, "expected elements side by side, got strides ", strides_text(),
                      "; pass a contiguous copy");
  return call->keep(checked(PyObject_CallMethodNoArgs(object, method)), name);
}

Tensor Tensor::dense() const { return !object || is_dense() ? *this : contiguous(); }

bool Tensor::at_one_place(int dims) const {
  bool several = false;
  for (int i = 0; i < dims; ++i) {
    if (sizes[i] > 1 && strides[i] != 0) return false;
    several = several || sizes[i] > 1;
  }
  return several && count() > 0;
}

Tensor Tensor::dense_rows() const {
  const bool dense = sizes[ndim - 1] <= 1 || count() == 0 || strides[ndim - 1] == 1;
  const bool backwards = *std::min_element(strides, strides + ndim) < 0;
  return dense && !backwards && !at_one_place(ndim - 1) ? *this : contiguous();
}

Tensor Tensor::with_a_unit_stride() const {
  const bool unit = std::find(strides, strides + ndim, 1) != strides + ndim || count() < 2;
  return unit ? apart() : contiguous();
}

Tensor Tensor::apart() const { return at_one_place(ndim) ? contiguous() : *this; }

}  // namespace kimi::bindings
