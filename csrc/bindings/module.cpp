// SPDX-License-Identifier: MIT
// A pybind11 module, _C or _simt, with the functions of python.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(KIMI_HOST_SIMT)
#include "simt.h"
#endif

void kimi_bind(pybind11::module_& m);

PYBIND11_MODULE(KIMI_MODULE_NAME, m) {
  kimi_bind(m);
#if defined(KIMI_HOST_SIMT)
  m.def("launches", &simt::launches, "Kernels that this thread has run on the host.");
  m.def(
      "take_streams",
      [] {
        std::vector<uintptr_t> streams;
        for (const void* stream : simt::take_streams())
          streams.push_back(reinterpret_cast<uintptr_t>(stream));
        return streams;
      },
      "The streams that this thread has worked on since this was called last.");
#endif
}
