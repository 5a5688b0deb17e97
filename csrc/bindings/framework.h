// SPDX-License-Identifier: MIT
// What the bindings know of torch, told by Python once (bind_torch): its types, its table of
// functions for tensors, and the functions that say who watches. No header and no library of torch.
#pragma once

#include <Python.h>

#include <string>

#include "bindings/dlpack.h"

namespace kimi::bindings {

// A Python exception is set: unwinds to the entry of the call.
struct Raised {};

// An owned reference.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* owned) : object_(owned) {}
  Object(Object&& other) noexcept : object_(other.release()) {}
  Object& operator=(Object&& other) noexcept {
    Py_XDECREF(object_);
    object_ = other.release();
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_ = nullptr;
};

std::string shown(PyObject* object);
// What the exception that is set says; it is cleared. Raised where it is none that is handled.
std::string caught();

// `owned`, or Raised where it is NULL.
inline Object checked(PyObject* owned) {
  if (!owned) throw Raised();
  return Object(owned);
}

struct Torch {
  PyTypeObject* tensor = nullptr;  // NULL: not bound
  PyTypeObject* parameter = nullptr;
  const dlpack::Exchange* exchange = nullptr;
  // Functions without arguments, from torch; NULL where this torch has none.
  PyObject *dispatch_modes = nullptr, *function_modes = nullptr, *functorch = nullptr,
           *tracing = nullptr, *grad_enabled = nullptr, *num_threads = nullptr,
           *current_device = nullptr;
  PyObject* function_mode_at = nullptr;   // (index) -> the mode
  PyObject* device_mode = nullptr;        // the type of a mode that only names a device
  PyObject* exchange_device = nullptr;    // (device) -> the one before
  PyObject* increment_version = nullptr;  // (tensor)
  PyObject* out_of_memory = nullptr;      // the exception of a full GPU
  PyObject* dual_levels = nullptr;        // the dict of torch.autograd.forward_ad
  PyObject* dtypes = nullptr;             // dict: torch.dtype -> (code, bits)
  bool is(PyTypeObject* type) const { return type == tensor || type == parameter; }
};
extern Torch torch;

// bind_torch(tensor, parameter, functions): `functions` maps the names of the fields above.
void bind_torch(PyObject* tensor, PyObject* parameter, PyObject* functions);

// The table of version 1 of a type, or NULL without one.
const dlpack::Exchange* exchange_of(PyTypeObject* type);

// Which way a call on these arguments goes (lists of tensors count).
enum Way : int {
  kDirect = 0,     // nobody watches: straight to the native function
  kGradient = 1,   // a gradient is wanted, by autograd alone
  kWatched = 2,    // a mode, a transform, a tracer, a subclass, another device: to the operator
  kOtherwise = 3,  // nobody watches, but what was checked is for torch to compute
};
Way way(PyObject* const* arguments, Py_ssize_t count);

// The result of a function without arguments, as a number; None is 0.
long ask(PyObject* function);

}  // namespace kimi::bindings
