// SPDX-License-Identifier: MIT
// One call of an op from Python: its arguments are taken and checked here, once, its outputs and
// workspace come from the allocator of the first tensor's framework, and `run` calls the C API.
//
//   PyObject* permute(Call& call) {
//     const Tensor x = call.tensor("x"), row_map = call.tensor("row_map") ...
//     x.shape({"T", "H"});
//     kimi_permute_params p = {...};
//     p.y = call.output(y = call.empty(x.dtype, {rows, hidden}));
//     call.run(kimi_permute, p);
//     return call.result(y);
//   }
//
// Messages: `op: argument: what was expected, what came, how to mend it`.
#pragma once

#include <initializer_list>
#include <list>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/framework.h"
#include "common/status.h"

namespace kimi::bindings {

using Type = dlpack::DataType;
constexpr Type kFloat64 = {dlpack::kFloat, 64, 1}, kFloat32 = {dlpack::kFloat, 32, 1},
               kFloat16 = {dlpack::kFloat, 16, 1}, kBfloat16 = {dlpack::kBfloat, 16, 1},
               kFloat8 = {dlpack::kFloat8_e4m3fn, 8, 1}, kInt32 = {dlpack::kInt, 32, 1},
               kInt64 = {dlpack::kInt, 64, 1}, kUint8 = {dlpack::kUInt, 8, 1},
               kBool = {dlpack::kBool, 8, 1};
using Types = std::initializer_list<Type>;

std::string name_of(Type type);  // as torch writes it: "float32"
std::string name_of(dlpack::Device device);
std::string shape_text(int ndim, const int64_t* sizes);

// The C API's name of a float of 16 or 32 bits.
bool is_native(Type type);
kimi_dtype native(Type type);
kimi_storage storage(Type type);

// A size that is expected: a number, or a letter for any.
struct Dim {
  Dim(int64_t size) : size(size) {}
  Dim(const char* letter) : letter(letter) {}
  int64_t size = 0;
  const char* letter = nullptr;
};
using Dims = std::initializer_list<Dim>;

class Call;

// A tensor argument; the checks return it.
class Tensor {
 public:
  Call* call = nullptr;
  PyObject* object = nullptr;  // borrowed: from the arguments, or kept by the call; NULL: None
  std::string_view name;
  Type dtype = {};
  dlpack::Device device = {};
  int ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  char* address = nullptr;
  bool read_only = false;

  explicit operator bool() const { return object != nullptr; }
  int64_t size(int i) const { return sizes[i]; }
  int64_t stride(int i) const { return strides[i]; }
  int64_t count() const;
  int64_t bytes() const { return dtype.bits * dtype.lanes / 8; }  // of an element
  bool is_cuda() const { return device.type == dlpack::kCuda; }
  bool is_dense() const;
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(address);
  }
  std::string device_text() const;
  std::string shape_text() const { return bindings::shape_text(ndim, sizes); }
  std::string strides_text() const;

  const Tensor& of(Types expected, std::string_view mend = {}) const;  // dtype
  const Tensor& shape(Dims expected, std::string_view mend = {}) const;
  const Tensor& shape_like(const Tensor& other, std::string_view mend = {}) const;
  // Refuses an output whose elements share memory, with each other or with an input.
  const Tensor& writable(std::initializer_list<const Tensor*> inputs) const;
  // Itself, or a copy where its memory is in another order.
  Tensor dense() const;
  Tensor dense_rows() const;          // the last dimension side by side, no other one backwards
  Tensor with_a_unit_stride() const;  // some dimension side by side
  Tensor apart() const;               // not all elements at one place

 private:
  // Whether the first dimensions, of several elements, have strides of 0 (an expanded tensor).
  bool at_one_place(int dims) const;
  Tensor contiguous() const;
};

struct Output {
  PyObject* object;
  char* address;
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(address);
  }
};

class Call {
 public:
  Call(const char* op, PyObject* const* arguments, bool of_torch);
  Call(const Call&) = delete;
  ~Call();

  std::string_view op;  // the prefix of messages

  // The next argument. Tensors lie on one device.
  Tensor tensor(const char* name);
  Tensor optional(const char* name);  // may be None
  std::vector<Tensor> tensors(const char* name);
  int64_t integer(const char* name);
  int32_t int32(const char* name);
  double number(const char* name);
  bool truth();
  Type type(const char* name);  // a torch.dtype, or DLPack's (code, bits)
  std::vector<int64_t> integers(const char* name);
  std::vector<double> numbers(const char* name);
  template <class Enum = int>
  Enum choice(const char* name, std::initializer_list<const char*> expected) {
    return Enum(choose(name, expected));
  }

  template <class... Parts>
  [[noreturn]] void type_error(std::string_view name, const Parts&... parts) const {
    raise(PyExc_TypeError, name, text_of(parts...));
  }
  template <class... Parts>
  [[noreturn]] void value_error(std::string_view name, const Parts&... parts) const {
    raise(PyExc_ValueError, name, text_of(parts...));
  }
  void between(const char* name, int64_t value, int64_t low, int64_t high,
               std::string_view why = {}) const {
    if (value < low || value > high)
      value_error(name, "expected ", low, "..", high, why, ", got ", value);
  }

  // Unset memory on the device of the first tensor.
  Output empty(Type type, std::initializer_list<int64_t> sizes) {
    return allocate(type, int(sizes.size()), sizes.begin());
  }
  Output empty_like(const Tensor& like) { return allocate(like.dtype, like.ndim, like.sizes); }
  Output allocate(Type type, int ndim, const int64_t* sizes);
  Tensor empty_tensor(const Tensor& like);  // dense, freed when the call ends
  void* workspace(size_t bytes);            // freed, in the order of the stream, when the call ends
  template <class Params>
  void workspace(Params& params, size_t (*bytes)(const Params*, kimi_device)) {
    params.workspace_bytes = bytes(&params, device());
    params.workspace = workspace(params.workspace_bytes);
  }

  // Whether the caller has torch's tensors, for messages that say how to mend something.
  bool speaks_torch() const { return has_device_ ? exchange_ != nullptr : of_torch_; }
  const char* kind() const { return speaks_torch() ? "a torch.Tensor" : "an array"; }

  kimi_device device();  // also sets the number of threads, for workspaces that depend on it
  template <class Params>
  void run(kimi_status (*function)(const Params*, kimi_device, void*), const Params& params) {
    struct Arguments {
      decltype(function) op;
      const Params& params;
    } arguments{function, params};
    run(
        [](const void* self, kimi_device device, void* stream) {
          const auto& a = *static_cast<const Arguments*>(self);
          return a.op(&a.params, device, stream);
        },
        &arguments);
  }
  bool served(int32_t (*ask)(kimi_device));  // asked with the call's device as the current one
  void check(kimi_status status) const;
  void check(const Status& status) const;
  // Whether the host may read values: on a GPU only where the environment asks for checks.
  bool reads(const Tensor& tensor) const;
  Tensor on_host(const Tensor& tensor);
  // After `run` wrote to `written`: the targets themselves, or copies whose values they take.
  struct Written {
    std::span<const Tensor> targets, written;
  };
  void write_back(std::initializer_list<Written> lists);
  void write_back(const Tensor& target, const Tensor& written) {
    write_back({Written{{&target, 1}, {&written, 1}}});
  }

  PyObject* result(const Output& output, bool transposed = false);  // .mT of it
  PyObject* result(std::initializer_list<Output> outputs);          // a tuple
  PyObject* list(const std::vector<Output>& outputs);
  PyObject* none();
  // The caller computes it by other means; everything has been checked.
  PyObject* not_implemented();

  Tensor view_of(PyObject* object, std::string_view name);
  Tensor keep(Object object, std::string_view name);  // a temporary of this call
  std::string_view keep(std::string name);
  const int32_t* keep(std::vector<int32_t> numbers) {
    return numbers_.emplace_back(std::move(numbers)).data();
  }

 private:
  template <class... Parts>
  static std::string text_of(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return std::move(text).str();
  }
  [[noreturn]] void raise(PyObject* type, std::string_view name, const std::string& text) const;
  int choose(const char* name, std::initializer_list<const char*> expected);
  PyObject* next() { return arguments_[next_++]; }
  std::vector<PyObject*> items(const char* name, const char* what);
  Tensor argument(PyObject* object, std::string_view name);
  Tensor foreign(PyObject* object, std::string_view name);
  Tensor tensor_of(const dlpack::Tensor& view, PyObject* object, std::string_view name);
  [[noreturn]] void refuse_device(std::string_view name, const std::string& got) const;
  // Without a table of functions the memory and the stream of a GPU are the first array's to give.
  bool origin_allocates() const { return device_.type == dlpack::kCuda && !exchange_; }
  Object made_by_origin(Type type, int ndim, const int64_t* sizes);
  int64_t bytes_of(Type type, int ndim, const int64_t* sizes) const;
  void run(kimi_status (*function)(const void*, kimi_device, void*), const void* arguments);
  PyObject* handed_over(const Output& output);
  dlpack::ManagedVersioned* memory(Type type, int ndim, const int64_t* sizes);

  PyObject* const* arguments_;
  bool of_torch_;
  Py_ssize_t next_ = 0;
  bool has_device_ = false;
  dlpack::Device device_ = {dlpack::kCpu, 0};
  PyObject* origin_ = nullptr;  // the first tensor: what outputs are like
  std::string_view origin_name_;
  const dlpack::Exchange* exchange_ = nullptr;  // of the first tensor's type; NULL: foreign
  std::vector<PyObject*> kept_;
  std::vector<PyObject*> outputs_;
  std::vector<dlpack::ManagedVersioned*> managed_;  // workspaces
  std::list<std::string> names_;
  std::list<std::vector<int64_t>> strides_;
  std::list<std::vector<int32_t>> numbers_;
};

// A CPU tensor goes to this device of the C API: the host-run CUDA kernels of tests are one too.
extern kimi_device device_of_cpu_tensors;

template <class Body>
PyObject* enter(const char* op, PyObject* const* arguments, Py_ssize_t given, Py_ssize_t expected,
                const Body& body, bool of_torch = false) {
  try {
    if (given != expected) {
      PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", op, expected, given);
      return nullptr;
    }
    Call call(op, arguments, of_torch);
    return body(call);
  } catch (const Raised&) {
  } catch (const std::exception& exception) {
    PyErr_Format(PyExc_RuntimeError, "%s: %s", op, exception.what());
  }
  return nullptr;
}

template <class Body>
PyObject* enter_eager(const char* op, PyObject* const* arguments, Py_ssize_t given,
                      Py_ssize_t expected, const Body& body) {
  try {
    const Way taken = way(arguments, given);
    if (taken != kDirect) return PyLong_FromLong(taken);
  } catch (const Raised&) {
    return nullptr;
  }
  PyObject* result = enter(op, arguments, given, expected, body, true);
  if (result != Py_NotImplemented) return result;
  Py_DECREF(result);
  return PyLong_FromLong(kOtherwise);
}

}  // namespace kimi::bindings
