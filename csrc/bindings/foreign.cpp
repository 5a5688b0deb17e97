// SPDX-License-Identifier: MIT
#include "bindings/foreign.h"

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <utility>

#include "bindings/dense.h"
#include "bindings/framework.h"

namespace py = pybind11;

namespace kimi::bindings {
namespace {

constexpr size_t kAlignment = 64;

struct Memory : Dense {
  using Dense::Dense;
  ~Memory() { std::free(managed.tensor.data); }
};

constexpr const char* kUnused = "dltensor_versioned";

// What `from_dlpack` of any framework takes: it gives its memory away once.
class Exported {
 public:
  explicit Exported(dlpack::ManagedVersioned* memory) : memory_(memory) {}
  Exported(Exported&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  ~Exported() {
    if (memory_) memory_->deleter(memory_);
  }
  dlpack::DataType dtype() const {
    if (!memory_) throw py::buffer_error("kimi_ops: this memory has been taken already");
    return memory_->tensor.dtype;
  }
  py::capsule capsule() {
    if (!memory_) throw py::buffer_error("kimi_ops: this memory has been taken already");
    PyObject* capsule = PyCapsule_New(memory_, kUnused, [](PyObject* self) {
      if (!PyCapsule_IsValid(self, kUnused)) return;  // taken: its new owner frees it
      auto* memory = static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(self, kUnused));
      memory->deleter(memory);
    });
    if (!capsule) throw py::error_already_set();
    memory_ = nullptr;
    return py::reinterpret_steal<py::capsule>(capsule);
  }

 private:
  dlpack::ManagedVersioned* memory_;
};

// The tensor in a capsule that nobody has taken yet, as elements of another kind: frameworks that lack
// a type pass its bits as whole numbers.
py::object retyped(py::object capsule, int code) {
  dlpack::Tensor* tensor = nullptr;
  if (void* memory = PyCapsule_IsValid(capsule.ptr(), kUnused)
                         ? PyCapsule_GetPointer(capsule.ptr(), kUnused)
                         : nullptr)
    tensor = &static_cast<dlpack::ManagedVersioned*>(memory)->tensor;
  else if (PyCapsule_IsValid(capsule.ptr(), "dltensor"))
    tensor =
        &static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
  if (!tensor) throw py::type_error("kimi_ops: expected a capsule of DLPack that is not taken yet");
  tensor->dtype.code = uint8_t(code);
  return capsule;
}

}  // namespace

dlpack::ManagedVersioned* allocate_foreign(dlpack::DataType type, int ndim, const int64_t* sizes,
                                           int64_t bytes) {
  auto memory = std::make_unique<Memory>(type, ndim, sizes);
  const size_t whole = (size_t(bytes) + kAlignment) / kAlignment * kAlignment;
  void*& data = memory->managed.tensor.data = std::aligned_alloc(kAlignment, whole);
  if (!data) return nullptr;
  memory->managed.deleter = [](dlpack::ManagedVersioned* self) {
    delete static_cast<Memory*>(static_cast<Dense*>(self->context));
  };
  return &memory.release()->managed;
}

PyObject* object_of_foreign(dlpack::ManagedVersioned* memory, PyObject* like) {
  Exported exported(memory);
  try {
    const py::object space = py::handle(like).attr("__array_namespace__")();
    return space.attr("from_dlpack")(py::cast(std::move(exported))).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    throw Raised();
  }
}

void define_exported(py::module_& m) {
  py::class_<Exported>(m, "Exported", py::module_local(),
                       "Memory of this library on its way to another, through from_dlpack.")
      .def_property_readonly(
          "dtype",
          [](const Exported& self) { return py::make_tuple(self.dtype().code, self.dtype().bits); })
      .def("__dlpack__", [](Exported& self, const py::kwargs&) { return self.capsule(); })
      .def("__dlpack_device__",
           [](const Exported&) { return py::make_tuple(int(dlpack::kCpu), 0); });
  m.def("retyped", &retyped, "A capsule of DLPack as elements of another kind.");
}

}  // namespace kimi::bindings
