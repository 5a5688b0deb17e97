// SPDX-License-Identifier: MIT
// The pybind11 module: unpacks integers into params structs and calls the C API. Pointers come as
// Python integers (Tensor.data_ptr()), 0 for NULL. KIMI_INVALID_ARGUMENT becomes ValueError, any
// other failure RuntimeError. The GIL is released during every op.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "kimi_ops.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_if_error(kimi_status status) {
  if (status == KIMI_OK) return;
  if (status == KIMI_INVALID_ARGUMENT) throw py::value_error(kimi_last_error());
  throw std::runtime_error(kimi_last_error());
}

template <class Params>
void call(kimi_status (*op)(const Params*, kimi_device, void*), const Params& params, int device,
          Address stream) {
  kimi_status status;
  {
    py::gil_scoped_release release;
    status = op(&params, kimi_device(device), pointer<void>(stream));
  }
  raise_if_error(status);
}

void topk_gate(Address logits, Address expert_bias, Address valid, Address weights, Address indices,
               Address tokens_per_expert, int64_t num_tokens, int64_t logits_stride,
               int num_experts, int top_k, int num_groups, int topk_groups, int group_score_topk,
               bool renormalize, float scaling_factor, int dtype, int score_function, int device,
               Address stream) {
  kimi_topk_gate_params p = {};
  p.logits = pointer<const void>(logits);
  p.expert_bias = pointer<const float>(expert_bias);
  p.valid = pointer<const uint8_t>(valid);
  p.weights = pointer<float>(weights);
  p.indices = pointer<int32_t>(indices);
  p.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
  p.num_tokens = num_tokens;
  p.logits_stride = logits_stride;
  p.num_experts = num_experts;
  p.top_k = top_k;
  p.num_groups = num_groups;
  p.topk_groups = topk_groups;
  p.group_score_topk = group_score_topk;
  p.renormalize = renormalize;
  p.scaling_factor = scaling_factor;
  p.logits_dtype = kimi_dtype(dtype);
  p.score_function = kimi_score_function(score_function);
  call(kimi_topk_gate, p, device, stream);
}

void topk_gate_backward(Address grad_weights, Address logits, Address indices, Address grad_logits,
                        int64_t num_tokens, int64_t logits_stride, int num_experts, int top_k,
                        bool renormalize, float scaling_factor, int dtype, int score_function,
                        int device, Address stream) {
  kimi_topk_gate_backward_params p = {};
  p.grad_weights = pointer<const float>(grad_weights);
  p.logits = pointer<const void>(logits);
  p.indices = pointer<const int32_t>(indices);
  p.grad_logits = pointer<void>(grad_logits);
  p.num_tokens = num_tokens;
  p.logits_stride = logits_stride;
  p.num_experts = num_experts;
  p.top_k = top_k;
  p.renormalize = renormalize;
  p.scaling_factor = scaling_factor;
  p.logits_dtype = kimi_dtype(dtype);
  p.score_function = kimi_score_function(score_function);
  call(kimi_topk_gate_backward, p, device, stream);
}

void update_expert_bias(Address bias, Address tokens_per_expert, int64_t num_experts, float rate,
                        bool counts_are_int64, bool centered, int device, Address stream) {
  kimi_update_expert_bias_params p = {};
  p.bias = pointer<float>(bias);
  p.tokens_per_expert = pointer<const void>(tokens_per_expert);
  p.num_experts = num_experts;
  p.rate = rate;
  p.counts_are_int64 = counts_are_int64;
  p.centered = centered;
  call(kimi_update_expert_bias, p, device, stream);
}

void sequence_balance_loss(Address logits, Address indices, Address loss, Address tokens_per_expert,
                           Address workspace, int64_t num_tokens, int64_t num_sequences,
                           int64_t logits_stride, int num_experts, int top_k, float coefficient,
                           int dtype, int score_function, int device, Address stream) {
  kimi_sequence_balance_loss_params p = {};
  p.logits = pointer<const void>(logits);
  p.indices = pointer<const int32_t>(indices);
  p.loss = pointer<float>(loss);
  p.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
  p.workspace = pointer<void>(workspace);
  p.num_tokens = num_tokens;
  p.num_sequences = num_sequences;
  p.logits_stride = logits_stride;
  p.num_experts = num_experts;
  p.top_k = top_k;
  p.coefficient = coefficient;
  p.logits_dtype = kimi_dtype(dtype);
  p.score_function = kimi_score_function(score_function);
  call(kimi_sequence_balance_loss, p, device, stream);
}

void sequence_balance_loss_backward(Address grad_loss, Address logits, Address tokens_per_expert,
                                    Address grad_logits, int64_t num_tokens, int64_t num_sequences,
                                    int64_t logits_stride, int num_experts, int top_k,
                                    float coefficient, int dtype, int score_function, int device,
                                    Address stream) {
  kimi_sequence_balance_loss_backward_params p = {};
  p.grad_loss = pointer<const float>(grad_loss);
  p.logits = pointer<const void>(logits);
  p.tokens_per_expert = pointer<const int32_t>(tokens_per_expert);
  p.grad_logits = pointer<void>(grad_logits);
  p.num_tokens = num_tokens;
  p.num_sequences = num_sequences;
  p.logits_stride = logits_stride;
  p.num_experts = num_experts;
  p.top_k = top_k;
  p.coefficient = coefficient;
  p.logits_dtype = kimi_dtype(dtype);
  p.score_function = kimi_score_function(score_function);
  call(kimi_sequence_balance_loss_backward, p, device, stream);
}

void z_loss(Address logits, Address valid, Address loss, Address log_sum_exp, Address valid_tokens,
            Address workspace, int64_t num_tokens, int64_t logits_stride, int num_experts,
            float coefficient, int dtype, int device, Address stream) {
  kimi_z_loss_params p = {};
  p.logits = pointer<const void>(logits);
  p.valid = pointer<const uint8_t>(valid);
  p.loss = pointer<float>(loss);
  p.log_sum_exp = pointer<float>(log_sum_exp);
  p.valid_tokens = pointer<int32_t>(valid_tokens);
  p.workspace = pointer<void>(workspace);
  p.num_tokens = num_tokens;
  p.logits_stride = logits_stride;
  p.num_experts = num_experts;
  p.coefficient = coefficient;
  p.logits_dtype = kimi_dtype(dtype);
  call(kimi_z_loss, p, device, stream);
}

void z_loss_backward(Address grad_loss, Address logits, Address log_sum_exp, Address valid_tokens,
                     Address grad_logits, int64_t num_tokens, int64_t logits_stride,
                     int num_experts, float coefficient, int dtype, int device, Address stream) {
  kimi_z_loss_backward_params p = {};
  p.grad_loss = pointer<const float>(grad_loss);
  p.logits = pointer<const void>(logits);
  p.log_sum_exp = pointer<const float>(log_sum_exp);
  p.valid_tokens = pointer<const int32_t>(valid_tokens);
  p.grad_logits = pointer<void>(grad_logits);
  p.num_tokens = num_tokens;
  p.logits_stride = logits_stride;
  p.num_experts = num_experts;
  p.coefficient = coefficient;
  p.logits_dtype = kimi_dtype(dtype);
  call(kimi_z_loss_backward, p, device, stream);
}

kimi_permute_plan_params plan_params(int64_t num_tokens, int top_k, int num_experts, int align) {
  kimi_permute_plan_params p = {};
  p.num_tokens = num_tokens;
  p.top_k = top_k;
  p.num_experts = num_experts;
  p.align = align;
  return p;
}

size_t permute_plan_workspace_bytes(int64_t num_tokens, int top_k, int num_experts, int align,
                                    int device) {
  const kimi_permute_plan_params p = plan_params(num_tokens, top_k, num_experts, align);
  return kimi_permute_plan_workspace_bytes(&p, kimi_device(device));
}

void permute_plan(Address indices, Address row_map, Address source, Address offsets,
                  Address tokens_per_expert, Address workspace, int64_t num_tokens, int top_k,
                  int num_experts, int align, int device, Address stream) {
  kimi_permute_plan_params p = plan_params(num_tokens, top_k, num_experts, align);
  p.indices = pointer<const int32_t>(indices);
  p.row_map = pointer<int32_t>(row_map);
  p.source = pointer<int32_t>(source);
  p.offsets = pointer<int32_t>(offsets);
  p.tokens_per_expert = pointer<int32_t>(tokens_per_expert);
  p.workspace = pointer<void>(workspace);
  call(kimi_permute_plan, p, device, stream);
}

void permute(Address x, Address row_map, Address source, Address y, int64_t num_tokens,
             int64_t num_rows, int64_t row_bytes, int64_t x_stride_bytes, int top_k, int device,
             Address stream) {
  kimi_permute_params p = {};
  p.x = pointer<const void>(x);
  p.row_map = pointer<const int32_t>(row_map);
  p.source = pointer<const int32_t>(source);
  p.y = pointer<void>(y);
  p.num_tokens = num_tokens;
  p.num_rows = num_rows;
  p.row_bytes = row_bytes;
  p.x_stride_bytes = x_stride_bytes;
  p.top_k = top_k;
  call(kimi_permute, p, device, stream);
}

void unpermute(Address y, Address row_map, Address weights, Address x, int64_t num_tokens,
               int64_t hidden, int64_t y_stride, int top_k, int dtype, int device, Address stream) {
  kimi_unpermute_params p = {};
  p.y = pointer<const void>(y);
  p.row_map = pointer<const int32_t>(row_map);
  p.weights = pointer<const float>(weights);
  p.x = pointer<void>(x);
  p.num_tokens = num_tokens;
  p.hidden = hidden;
  p.y_stride = y_stride;
  p.top_k = top_k;
  p.dtype = kimi_dtype(dtype);
  call(kimi_unpermute, p, device, stream);
}

void unpermute_backward(Address grad_x, Address y, Address row_map, Address source, Address weights,
                        Address grad_y, Address grad_weights, int64_t num_tokens, int64_t num_rows,
                        int64_t hidden, int64_t grad_x_stride, int64_t y_stride, int top_k,
                        int dtype, int device, Address stream) {
  kimi_unpermute_backward_params p = {};
  p.grad_x = pointer<const void>(grad_x);
  p.y = pointer<const void>(y);
  p.row_map = pointer<const int32_t>(row_map);
  p.source = pointer<const int32_t>(source);
  p.weights = pointer<const float>(weights);
  p.grad_y = pointer<void>(grad_y);
  p.grad_weights = pointer<float>(grad_weights);
  p.num_tokens = num_tokens;
  p.num_rows = num_rows;
  p.hidden = hidden;
  p.grad_x_stride = grad_x_stride;
  p.y_stride = y_stride;
  p.top_k = top_k;
  p.dtype = kimi_dtype(dtype);
  call(kimi_unpermute_backward, p, device, stream);
}

void sort_chunks(Address x, Address split_sizes, Address order, Address y, int64_t num_rows,
                 int64_t row_bytes, int64_t x_stride_bytes, int num_chunks, bool inverse,
                 int device, Address stream) {
  kimi_sort_chunks_params p = {};
  p.x = pointer<const void>(x);
  p.split_sizes = pointer<const int32_t>(split_sizes);
  p.order = pointer<const int32_t>(order);
  p.y = pointer<void>(y);
  p.num_rows = num_rows;
  p.row_bytes = row_bytes;
  p.x_stride_bytes = x_stride_bytes;
  p.num_chunks = num_chunks;
  p.inverse = inverse;
  call(kimi_sort_chunks, p, device, stream);
}

kimi_isa isa_from_name(const std::string& name) {
  for (int isa = KIMI_ISA_PORTABLE; isa <= KIMI_ISA_AMX; ++isa)
    if (name == kimi_isa_name(kimi_isa(isa))) return kimi_isa(isa);
  throw py::value_error("set_isa: isa: expected portable, avx2, avx512, avx512_bf16 or amx, got " +
                        name);
}

}  // namespace

PYBIND11_MODULE(KIMI_MODULE_NAME, m) {
  m.doc() = "Native ops on raw addresses; use the functions of kimi_ops.";
  m.def("version", &kimi_version);
  m.def("detected_isa", [] { return kimi_isa_name(kimi_detected_isa()); });
  m.def("current_isa", [] { return kimi_isa_name(kimi_current_isa()); });
  m.def("set_isa",
        [](const std::string& isa) { raise_if_error(kimi_set_isa(isa_from_name(isa))); });
  m.def("cpu_engine", &kimi_cpu_engine);
  m.def("num_threads", &kimi_num_threads);
  m.def("set_num_threads", [](int n) { raise_if_error(kimi_set_num_threads(n)); });
  m.def("cuda_architectures", &kimi_cuda_architectures);
  m.def("topk_gate", &topk_gate);
  m.def("topk_gate_backward", &topk_gate_backward);
  m.def("permute_plan_workspace_bytes", &permute_plan_workspace_bytes);
  m.def("permute_plan", &permute_plan);
  m.def("permute", &permute);
  m.def("unpermute", &unpermute);
  m.def("unpermute_backward", &unpermute_backward);
  m.def("sort_chunks", &sort_chunks);
  m.def("update_expert_bias", &update_expert_bias);
  m.def("sequence_balance_loss", &sequence_balance_loss);
  m.def("sequence_balance_loss_backward", &sequence_balance_loss_backward);
  m.def("sequence_balance_loss_workspace_bytes", &kimi_sequence_balance_loss_workspace_bytes);
  m.def("z_loss", &z_loss);
  m.def("z_loss_backward", &z_loss_backward);
  m.def("z_loss_workspace_bytes", &kimi_z_loss_workspace_bytes);
}
