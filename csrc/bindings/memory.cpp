// SPDX-License-Identifier: MIT
// The memory of a call: what its arguments lie in, and what its outputs and workspaces get.
#include <algorithm>

#include "bindings/dense.h"
#include "bindings/foreign.h"
#include "bindings/kept.h"
#include "bindings/tensors.h"

namespace kimi::bindings {

// ---- arguments ---------------------------------------------------------------------------------

// One device a call: arguments are beside the first tensor.
Tensor Call::argument(PyObject* object, std::string_view name) {
  const Tensor tensor = view_of(object, name);
  if (tensor.device != device_) refuse_device(name, name_of(tensor.device));
  return tensor;
}

void Call::refuse_device(std::string_view name, const std::string& got) const {
  const std::string mend = speaks_torch()
                               ? "move it with .to(" + std::string(origin_name_) + ".device)"
                               : "copy it to that device";
  value_error(name, "expected on ", name_of(device_), " as ", origin_name_, ", got ", got, "; ",
              mend);
}

Tensor Call::view_of(PyObject* object, std::string_view name) {
  PyTypeObject* type = Py_TYPE(object);
  const dlpack::Exchange* exchange = torch.is(type) ? torch.exchange : exchange_of(type);
  if (!exchange || !exchange->view) return foreign(object, name);
  dlpack::Tensor view;
  if (exchange->view(object, &view) != 0) {
    const std::string reason = caught();
    const Object device(PyObject_GetAttrString(object, "device"));
    if (!device.get()) PyErr_Clear();
    if (has_device_ && device.get() && shown(device.get()) != name_of(device_))
      refuse_device(name, shown(device.get()));
    type_error(name,
               "expected a dense tensor in the memory of a CPU or a CUDA device, got one that "
               "DLPack cannot describe: ",
               reason);
  }
  if (!has_device_) {
    has_device_ = true;
    device_ = view.device;
    origin_ = object;
    origin_name_ = name;
    exchange_ = exchange;
  }
  return tensor_of(view, object, name);
}

// What kernels may read: memory at addresses that its type may have.
Tensor Call::tensor_of(const dlpack::Tensor& view, PyObject* object, std::string_view name) {
  const int64_t* strides = view.strides;
  for (int i = 0; i < view.ndim; ++i)
    if (view.shape[i] <= 1 && view.strides[i] < 0) {  // one place has no direction
      if (strides == view.strides)
        strides = strides_.emplace_back(view.strides, view.strides + view.ndim).data();
      strides_.back()[i] = -view.strides[i];
    }
  Tensor tensor{this,       object,      name,
                view.dtype, view.device, view.ndim,
                view.shape, strides,     static_cast<char*>(view.data) + view.byte_offset};
  if (tensor.count() == 0) return tensor;
  if (!view.data)
    type_error(name, "expected a tensor with memory, got ", Py_TYPE(object)->tp_name,
               " without any; call torch.ops.kimi_ops.", op);
  const int parts = view.dtype.code == dlpack::kComplex ? 2 : 1;
  const uintptr_t align = uintptr_t(std::clamp(view.dtype.bits / 8 / parts, 1, 8));
  if (const uintptr_t past = reinterpret_cast<uintptr_t>(tensor.address) % align)
    value_error(name, "expected memory at a multiple of ", align, " bytes, got an address ", past,
                " past one; pass a copy");
  return tensor;
}

// Anything else that speaks DLPack: `object.__dlpack__()`, whose capsule is kept. On a GPU it has to
// know its `stream` too, as those of kimi_ops.numpy do.
Tensor Call::foreign(PyObject* object, std::string_view name) {
  const Object method(PyObject_GetAttrString(object, "__dlpack__"));
  if (!method.get()) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw Raised();
    PyErr_Clear();
    type_error(name, "expected ", kind(), ", got ", Py_TYPE(object)->tp_name);
  }
  const Object none = checked(PyTuple_New(0));
  const Object options = checked(Py_BuildValue("{s(ii)}", "max_version", int(dlpack::kMajor), 0));
  PyObject* capsule = PyObject_Call(method.get(), none.get(), options.get());
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer before DLPack 1.0
    PyErr_Clear();
    capsule = PyObject_CallNoArgs(method.get());
  }
  if (!capsule)
    type_error(name, "expected an array that DLPack can describe, got one of which ",
               Py_TYPE(object)->tp_name, " says: ", caught());
  kept_.push_back(capsule);
  dlpack::Tensor* view = nullptr;
  bool read_only = false;
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    auto* managed =
        static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->version.major != dlpack::kMajor)
      type_error(name, "expected version 1 of DLPack, got ", managed->version.major);
    read_only = managed->flags & dlpack::kReadOnly;
    view = &managed->tensor;
  } else {
    void* managed = PyCapsule_GetPointer(capsule, "dltensor");
    if (!managed) type_error(name, "expected a DLPack capsule of __dlpack__, got none: ", caught());
    view = &static_cast<dlpack::Managed*>(managed)->tensor;
  }
  if (has_device_ && view->device != device_) refuse_device(name, name_of(view->device));
  if (view->device.type == dlpack::kCuda && !PyObject_HasAttrString(object, "stream"))
    type_error(name, "expected an array on a CPU, got a ", Py_TYPE(object)->tp_name, " on ",
               name_of(view->device),
               "; call the function of kimi_ops.numpy, which asks for its "
               "memory and stream");
  if (view->device.type != dlpack::kCpu && view->device.type != dlpack::kCuda)
    type_error(name, "expected an array in the memory of a CPU or a CUDA device, got one on ",
               name_of(view->device), "; copy it to one of these");
  if (!has_device_) {
    has_device_ = true;
    device_ = view->device;
    origin_ = object;
    origin_name_ = name;
  }
  dlpack::Tensor with_strides = *view;
  if (!view->strides)
    with_strides.strides = strides_.emplace_back(dense_strides(view->ndim, view->shape)).data();
  Tensor tensor = tensor_of(with_strides, object, name);
  tensor.read_only = read_only;
  return tensor;
}

// ---- outputs and workspaces -----------------------------------------------------------------------

namespace {

void refuse_allocation(void*, const char*, const char* message) {
  const bool room = std::string_view(message).find("CUDA out of memory") == std::string_view::npos;
  PyErr_SetString(room || !torch.out_of_memory ? PyExc_RuntimeError : torch.out_of_memory, message);
}

dlpack::ManagedVersioned* allocate_in(const dlpack::Exchange* exchange, dlpack::Device device,
                                      Type type, int ndim, const int64_t* sizes) {
  dlpack::Tensor like{nullptr, device, ndim, type, const_cast<int64_t*>(sizes), nullptr, 0};
  dlpack::ManagedVersioned* memory = nullptr;
  if (exchange->allocate(&like, &memory, nullptr, refuse_allocation) != 0) {
    if (!PyErr_Occurred()) PyErr_NoMemory();
    throw Raised();
  }
  return memory;
}

char* address_of(const dlpack::ManagedVersioned& memory) {
  return static_cast<char*>(memory.tensor.data) + memory.tensor.byte_offset;
}

}  // namespace

// Unset memory on a GPU, dense, of an array that makes it itself. It is freed when the call has
// queued its work and not when that is done: its framework may give it to what comes later on the
// same stream alone (kimi_ops/numpy/gpu.py).
Object Call::made_by_origin(Type type, int ndim, const int64_t* sizes) {
  bytes_of(type, ndim, sizes);
  const Object shape = checked(PyTuple_New(ndim));
  for (int i = 0; i < ndim; ++i)
    PyTuple_SET_ITEM(shape.get(), i, checked(PyLong_FromLongLong(sizes[i])).release());
  return checked(
      PyObject_CallMethod(origin_, "empty", "O(ii)", shape.get(), int(type.code), int(type.bits)));
}

// Of dense memory; refused where no memory is so large, also so that sums of some are numbers still.
int64_t Call::bytes_of(Type type, int ndim, const int64_t* sizes) const {
  int64_t bytes = type.bits * type.lanes / 8;
  for (int i = 0; i < ndim; ++i) bytes = volume(bytes, sizes[i]);
  if (bytes > kTooMany / 2)
    value_error("", "expected results and working memory of less than 2^62 bytes, got a shape ",
                shape_text(ndim, sizes), " of ", name_of(type), "; make the arguments smaller");
  return bytes;
}

// Unset memory of the first tensor's framework, dense.
dlpack::ManagedVersioned* Call::memory(Type type, int ndim, const int64_t* sizes) {
  const int64_t bytes = bytes_of(type, ndim, sizes);
  const auto allocate = [&](Type t, int n, const int64_t* of) {
    if (exchange_) return allocate_in(exchange_, device_, t, n, of);
    dlpack::ManagedVersioned* memory = allocate_foreign(t, n, of, bytes);
    if (!memory)
      raise(PyExc_MemoryError, "",
            text_of("expected ", bytes, " bytes of memory for a shape ", shape_text(ndim, sizes),
                    " of ", name_of(type), ", got none; free some or make the arguments smaller"));
    return memory;
  };
  if (bytes < kKeptFrom || device_.type != dlpack::kCpu) return allocate(type, ndim, sizes);
  return take_kept(type, ndim, sizes, bytes,
                   [&](int64_t count) { return allocate(kUint8, 1, &count); });
}

Output Call::allocate(Type type, int ndim, const int64_t* sizes) {
  // A size that an option sets may be nonsense still: the op says so before it writes.
  constexpr int kMostDims = 64;  // as many as torch has
  int64_t clean[kMostDims];
  if (ndim > kMostDims) value_error("", "expected at most ", kMostDims, " dimensions, got ", ndim);
  for (int i = 0; i < ndim; ++i) clean[i] = std::max<int64_t>(sizes[i], 0);
  if (origin_allocates()) {
    outputs_.push_back(made_by_origin(type, ndim, clean).release());
    return {outputs_.back(), view_of(outputs_.back(), origin_name_).address};
  }
  dlpack::ManagedVersioned* memory = this->memory(type, ndim, clean);
  void* object = nullptr;
  char* address = address_of(*memory);
  if (exchange_) {
    if (exchange_->to_object(memory, &object) != 0) throw Raised();
  } else {
    try {
      object = object_of_foreign(memory, origin_);
    } catch (const Raised&) {
      type_error(origin_name_, "expected an array whose framework takes results of ", name_of(type),
                 ", got ", Py_TYPE(origin_)->tp_name, ": ", caught(), "; pass another's");
    }
  }
  outputs_.push_back(static_cast<PyObject*>(object));
  return {outputs_.back(), address};
}

Tensor Call::empty_tensor(const Tensor& like) {
  return view_of(empty_like(like).object, like.name);
}

void* Call::workspace(size_t bytes) {
  if (bytes == 0) return nullptr;
  const int64_t size = int64_t(bytes);
  if (origin_allocates()) return keep(made_by_origin(kUint8, 1, &size), "workspace").address;
  managed_.push_back(memory(kUint8, 1, &size));
  return address_of(*managed_.back());
}

}  // namespace kimi::bindings
