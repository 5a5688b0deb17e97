// SPDX-License-Identifier: MIT
// The ops' methods of the module, a file an op, and what several of them take in the same way.
#pragma once

#include <algorithm>
#include <vector>

#include "bindings/tensors.h"

namespace kimi::bindings {

// Each op as a method twice: `direct` does the work; `eager` looks who watches first, and where
// the work is not for it says so by a Way.
class Methods {
 public:
  // `op` takes `count` arguments by position, in the order of torch.ops.kimi_ops.<name>; messages
  // begin with `prefix`, the name of the public function.
  template <PyObject* (*op)(Call&), int count>
  void add(const char* name, const char* prefix = nullptr) {
    static const char* const shown = prefix ? prefix : name;
    add_to(direct_, name, [](PyObject*, PyObject* const* arguments, Py_ssize_t given) {
      return enter(shown, arguments, given, count, op);
    });
    add_to(eager_, name, [](PyObject*, PyObject* const* arguments, Py_ssize_t given) {
      return enter_eager(shown, arguments, given, count, op);
    });
  }
  // The tables that CPython keeps pointers into.
  PyMethodDef* direct() { return finished(direct_); }
  PyMethodDef* eager() { return finished(eager_); }

 private:
  using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
  static void add_to(std::vector<PyMethodDef>& table, const char* name, Function function) {
    table.push_back({name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                     METH_FASTCALL, nullptr});
  }
  static PyMethodDef* finished(std::vector<PyMethodDef>& table) {
    table.push_back({});
    return table.data();
  }
  std::vector<PyMethodDef> direct_, eager_;
};

void define_topk_gate(Methods& methods);
void define_all_to_all(Methods& methods);
void define_balance(Methods& methods);
void define_permute(Methods& methods);
void define_grouped_gemm(Methods& methods);
void define_fp8(Methods& methods);
void define_fused_experts(Methods& methods);
void define_newton_schulz(Methods& methods);
void define_qk_clip(Methods& methods);
void define_muon_clip(Methods& methods);

constexpr Types kNatives = {kFloat32, kBfloat16, kFloat16};
constexpr std::initializer_list<const char*> kScoreFunctions = {"sigmoid", "softmax",
                                                                "sqrtsoftplus"};
constexpr const char* kFlatten = "flatten batch and sequence first";

// Router logits [T, E] whose rows are dense.
template <class Params>
void set_logits(Params& p, const Tensor& logits) {
  p.logits = logits.data();
  p.num_tokens = logits.size(0);
  p.num_experts = int32_t(std::min<int64_t>(logits.size(1), INT32_MAX));
  p.logits_stride = logits.stride(0);
  p.logits_dtype = native(logits.dtype);
}

// The mask [T] of rows that count.
inline const uint8_t* valid_of(const Tensor& valid, const Tensor& rows) {
  return valid.of({kBool}).shape({rows.size(0)}).dense().data<uint8_t>();
}

}  // namespace kimi::bindings
