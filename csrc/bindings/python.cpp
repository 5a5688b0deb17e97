// SPDX-License-Identifier: MIT
// The functions of the pybind11 modules: the library's own by pybind11, the ops' as methods that
// take tensors (tensors.h).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings/kept.h"
#include "bindings/ops.h"
#include "kimi_ops_parallel.h"

namespace py = pybind11;

namespace kimi::bindings {

void define_exported(py::module_& m);
void define_comm(py::module_& m, Methods& methods);

namespace {

void raise_if_error(kimi_status status) {
  if (status == KIMI_OK) return;
  if (status == KIMI_INVALID_ARGUMENT) throw py::value_error(kimi_last_error());
  throw std::runtime_error(kimi_last_error());
}

kimi_isa isa_from_name(const std::string& name) {
  for (int isa = KIMI_ISA_PORTABLE; isa <= KIMI_ISA_AMX; ++isa)
    if (name == kimi_isa_name(kimi_isa(isa))) return kimi_isa(isa);
  throw py::value_error("set_isa: isa: expected portable, avx2, avx512, avx512_bf16 or amx, got " +
                        name);
}

Methods& methods() {
  static Methods table;
  define_topk_gate(table);
  define_all_to_all(table);
  define_balance(table);
  define_permute(table);
  define_grouped_gemm(table);
  define_fp8(table);
  define_fused_experts(table);
  define_newton_schulz(table);
  define_qk_clip(table);
  define_muon_clip(table);
  return table;
}

void add_functions(py::module_& m, PyMethodDef* functions) {
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace
}  // namespace kimi::bindings

namespace kimi::xla {
void define(py::module_& m);
}

void kimi_bind(py::module_& m) {
  using namespace kimi::bindings;
  m.doc() = "Native ops on tensors, checked here; the functions of kimi_ops are the public ones.";
  m.def("version", &kimi_version);
  m.def("detected_isa", [] { return kimi_isa_name(kimi_detected_isa()); });
  m.def("current_isa", [] { return kimi_isa_name(kimi_current_isa()); });
  m.def("set_max_sm", [](int32_t sm) { raise_if_error(kimi_set_max_sm(sm)); });
  m.def("max_sm", &kimi_max_sm);
  m.def("set_batch_invariant", [](bool wanted) { kimi_set_batch_invariant(wanted); });
  m.def("batch_invariant", [] { return kimi_batch_invariant() != 0; });
  m.def("set_isa",
        [](const std::string& isa) { raise_if_error(kimi_set_isa(isa_from_name(isa))); });
  m.def("cpu_engine", &kimi_cpu_engine);
  m.def("num_threads", &kimi_num_threads);
  m.def("set_num_threads", [](int n) { raise_if_error(kimi_set_num_threads(n)); });
  m.def("release_kept_memory", &release_kept);
  m.def("cuda_architectures", &kimi_cuda_architectures);
  m.def("all_to_all_buffer_bytes",
        [](int world, int halves, int64_t max_tokens, int64_t row_bytes, int64_t beside_bytes,
           int num_experts, int top_k, bool direct, int64_t hidden, bool wide_wire) {
          kimi_all_to_all_dispatch_params there = {};
          there.peers.world = world;
          there.peers.halves = halves;
          there.max_tokens = max_tokens;
          there.row_bytes = row_bytes;
          there.beside_bytes = beside_bytes;
          there.num_experts = num_experts;
          there.top_k = top_k;
          there.direct = direct;
          kimi_all_to_all_combine_params home = {};
          home.max_tokens = max_tokens;
          home.hidden = hidden;
          home.wire_dtype = wide_wire ? KIMI_FLOAT32 : KIMI_BFLOAT16;
          return kimi_all_to_all_buffer_bytes(&there, &home);
        });
  m.def("cuda_serves_fp8", [] { return kimi_grouped_gemm_fp8_served(KIMI_DEVICE_CUDA) != 0; });
  m.def("serve_cpu_tensors_by_cuda",
        [](bool cuda) { device_of_cpu_tensors = cuda ? KIMI_DEVICE_CUDA : KIMI_DEVICE_CPU; });
  m.def("cpu_tensors_go_to_cuda", [] { return device_of_cpu_tensors == KIMI_DEVICE_CUDA; });
  m.def("bind_torch", [](py::object tensor, py::object parameter, py::dict functions) {
    try {
      bind_torch(tensor.ptr(), parameter.ptr(), functions.ptr());
    } catch (const Raised&) {
      throw py::error_already_set();
    }
  });
  define_exported(m);
  kimi::xla::define(m);
  Methods& ops = methods();
  define_comm(m, ops);
  add_functions(m, ops.direct());
  py::module_ eager = m.def_submodule("eager", "The ops for calls that nobody watches.");
  add_functions(eager, ops.eager());
}
