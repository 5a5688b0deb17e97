// SPDX-License-Identifier: MIT
// A pybind11 module, _C or _simt, with the functions of python.cpp.
#include <pybind11/pybind11.h>

void kimi_bind(pybind11::module_& m);

PYBIND11_MODULE(KIMI_MODULE_NAME, m) { kimi_bind(m); }
