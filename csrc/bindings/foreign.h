// SPDX-License-Identifier: MIT
// The slower door: arrays that have no table of functions but speak DLPack through Python (NumPy).
#pragma once

#include <Python.h>

#include "bindings/dlpack.h"

namespace kimi::bindings {

// Memory of this library on a CPU, 64-byte aligned, or NULL where there is no more.
dlpack::ManagedVersioned* allocate_foreign(dlpack::DataType type, int ndim, const int64_t* sizes,
                                           int64_t bytes);
// The memory as an array of the framework of `like`: like.__array_namespace__().from_dlpack(...).
// Takes the memory, also where it raises.
PyObject* object_of_foreign(dlpack::ManagedVersioned* memory, PyObject* like);

}  // namespace kimi::bindings
