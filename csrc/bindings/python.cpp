// SPDX-License-Identifier: MIT
// The functions of the pybind11 modules: they unpack integers into params structs and call the C
// API. Pointers come as Python integers (Tensor.data_ptr()), 0 for NULL. KIMI_INVALID_ARGUMENT
// becomes ValueError, any other failure RuntimeError. The GIL is released during every op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "kimi_ops.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

void raise_if_error(kimi_status status) {
  if (status == KIMI_OK) return;
  if (status == KIMI_INVALID_ARGUMENT) throw py::value_error(kimi_last_error());
  throw std::runtime_error(kimi_last_error());
}

template <class Field>
struct FieldTraits;
template <class P, class T>
struct FieldTraits<T P::*> {
  using Params = P;
  using Type = T;
};
template <auto field>
using TypeOf = typename FieldTraits<decltype(field)>::Type;

// What Python passes for a field: an address for a pointer, an int for an enum, (data, scale,
// expert, row and column stride, storage) for expert weights, else itself.
using Weights = std::tuple<Address, Address, int64_t, int64_t, int64_t, int>;
template <class T>
using Argument = std::conditional_t<
    std::is_pointer_v<T>, Address,
    std::conditional_t<std::is_enum_v<T>, int, std::conditional_t<std::is_class_v<T>, Weights, T>>>;

template <auto field, class Params>
void set(Params& params, const Argument<TypeOf<field>>& value) {
  using T = TypeOf<field>;
  if constexpr (std::is_pointer_v<T>) {
    params.*field = reinterpret_cast<T>(value);
  } else if constexpr (std::is_class_v<T>) {
    const auto& [data, scale, expert, row, column, storage] = value;
    params.*field = {reinterpret_cast<const void*>(data),
                     reinterpret_cast<const void*>(scale),
                     expert,
                     row,
                     column,
                     kimi_storage(storage)};
  } else {
    params.*field = static_cast<T>(value);
  }
}

// m.name(fields..., device, stream) calls `op` with these fields of its params, the others zero.
template <class Params, auto op, auto... fields>
void bind(py::module_& m, const char* name) {
  m.def(name, [](Argument<TypeOf<fields>>... values, int device, Address stream) {
    Params params = {};
    (set<fields>(params, values), ...);
    kimi_status status;
    {
      py::gil_scoped_release release;
      status = op(&params, kimi_device(device), reinterpret_cast<void*>(stream));
    }
    raise_if_error(status);
  });
}

// m.name(fields..., device) is the bytes of workspace that `op` says.
template <class Params, auto op, auto... fields>
void bind_workspace(py::module_& m, const char* name) {
  m.def(name, [](Argument<TypeOf<fields>>... values, int device) {
    Params params = {};
    (set<fields>(params, values), ...);
    return op(&params, kimi_device(device));
  });
}

kimi_isa isa_from_name(const std::string& name) {
  for (int isa = KIMI_ISA_PORTABLE; isa <= KIMI_ISA_AMX; ++isa)
    if (name == kimi_isa_name(kimi_isa(isa))) return kimi_isa(isa);
  throw py::value_error("set_isa: isa: expected portable, avx2, avx512, avx512_bf16 or amx, got " +
                        name);
}

}  // namespace

void kimi_bind(py::module_& m) {
  m.doc() = "Native ops on raw addresses; use the functions of kimi_ops.";
  m.def("version", &kimi_version);
  m.def("detected_isa", [] { return kimi_isa_name(kimi_detected_isa()); });
  m.def("current_isa", [] { return kimi_isa_name(kimi_current_isa()); });
  m.def("set_max_sm", [](int32_t sm) { raise_if_error(kimi_set_max_sm(sm)); });
  m.def("max_sm", &kimi_max_sm);
  m.def("set_isa",
        [](const std::string& isa) { raise_if_error(kimi_set_isa(isa_from_name(isa))); });
  m.def("cpu_engine", &kimi_cpu_engine);
  m.def("num_threads", &kimi_num_threads);
  m.def("set_num_threads", [](int n) { raise_if_error(kimi_set_num_threads(n)); });
  m.def("cuda_architectures", &kimi_cuda_architectures);
  m.def("advise_huge_pages", [](Address address, size_t bytes) {
    kimi_advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
  {
    using P = kimi_topk_gate_params;
    bind<P, kimi_topk_gate, &P::logits, &P::expert_bias, &P::valid, &P::weights, &P::indices,
         &P::tokens_per_expert, &P::num_tokens, &P::logits_stride, &P::num_experts, &P::top_k,
         &P::num_groups, &P::topk_groups, &P::group_score_topk, &P::renormalize, &P::scaling_factor,
         &P::logits_dtype, &P::score_function>(m, "topk_gate");
  }
  {
    using P = kimi_topk_gate_backward_params;
    bind<P, kimi_topk_gate_backward, &P::grad_weights, &P::logits, &P::indices, &P::grad_logits,
         &P::num_tokens, &P::logits_stride, &P::num_experts, &P::top_k, &P::renormalize,
         &P::scaling_factor, &P::logits_dtype, &P::score_function>(m, "topk_gate_backward");
  }
  {
    using P = kimi_update_expert_bias_params;
    bind<P, kimi_update_expert_bias, &P::bias, &P::tokens_per_expert, &P::num_experts, &P::rate,
         &P::counts_are_int64, &P::centered>(m, "update_expert_bias");
  }
  {
    using P = kimi_sequence_balance_loss_params;
    bind<P, kimi_sequence_balance_loss, &P::logits, &P::indices, &P::loss, &P::tokens_per_expert,
         &P::workspace, &P::num_tokens, &P::num_sequences, &P::logits_stride, &P::num_experts,
         &P::top_k, &P::coefficient, &P::logits_dtype, &P::score_function>(m,
                                                                           "sequence_balance_loss");
  }
  {
    using P = kimi_sequence_balance_loss_backward_params;
    bind<P, kimi_sequence_balance_loss_backward, &P::grad_loss, &P::logits, &P::tokens_per_expert,
         &P::grad_logits, &P::num_tokens, &P::num_sequences, &P::logits_stride, &P::num_experts,
         &P::top_k, &P::coefficient, &P::logits_dtype, &P::score_function>(
        m, "sequence_balance_loss_backward");
  }
  {
    using P = kimi_z_loss_params;
    bind<P, kimi_z_loss, &P::logits, &P::valid, &P::loss, &P::log_sum_exp, &P::valid_tokens,
         &P::workspace, &P::num_tokens, &P::logits_stride, &P::num_experts, &P::coefficient,
         &P::logits_dtype>(m, "z_loss");
  }
  {
    using P = kimi_z_loss_backward_params;
    bind<P, kimi_z_loss_backward, &P::grad_loss, &P::logits, &P::log_sum_exp, &P::valid_tokens,
         &P::grad_logits, &P::num_tokens, &P::logits_stride, &P::num_experts, &P::coefficient,
         &P::logits_dtype>(m, "z_loss_backward");
  }
  {
    using P = kimi_grouped_gemm_params;
    bind<P, kimi_grouped_gemm, &P::a, &P::b, &P::b_scale, &P::offsets, &P::bias, &P::out,
         &P::workspace, &P::num_rows, &P::k, &P::n, &P::a_row_stride, &P::a_k_stride,
         &P::b_expert_stride, &P::b_k_stride, &P::b_n_stride, &P::num_experts, &P::dtype,
         &P::b_storage, &P::out_dtype>(m, "grouped_gemm");
    bind_workspace<P, kimi_grouped_gemm_workspace_bytes, &P::num_experts, &P::dtype>(
        m, "grouped_gemm_workspace_bytes");
  }
  {
    using P = kimi_grouped_gemm_wgrad_params;
    bind<P, kimi_grouped_gemm_wgrad, &P::a, &P::dc, &P::offsets, &P::out, &P::workspace,
         &P::num_rows, &P::k, &P::n, &P::a_row_stride, &P::a_k_stride, &P::dc_row_stride,
         &P::dc_n_stride, &P::out_expert_stride, &P::out_k_stride, &P::out_n_stride,
         &P::num_experts, &P::accumulate, &P::dtype, &P::out_dtype>(m, "grouped_gemm_wgrad");
    bind_workspace<P, kimi_grouped_gemm_wgrad_workspace_bytes, &P::num_experts, &P::dtype>(
        m, "grouped_gemm_wgrad_workspace_bytes");
  }
  {
    using P = kimi_fp8_rows_params;
    bind<P, kimi_fp8_rows, &P::x, &P::data, &P::scale, &P::num_rows, &P::k, &P::x_row_stride,
         &P::scale_stride, &P::dtype>(m, "fp8_rows");
  }
  {
    using P = kimi_grouped_gemm_fp8_params;
    bind<P, kimi_grouped_gemm_fp8, &P::a, &P::a_scale, &P::b, &P::b_scale, &P::offsets, &P::bias,
         &P::out, &P::num_rows, &P::k, &P::n, &P::a_row_stride, &P::a_scale_stride, &P::num_experts,
         &P::out_dtype>(m, "grouped_gemm_fp8");
  }
  m.def("grouped_gemm_fp8_served",
        [](int device) { return kimi_grouped_gemm_fp8_served(kimi_device(device)) != 0; });
  {
    using P = kimi_fused_experts_params;
    bind<P, kimi_fused_experts, &P::x, &P::w_gate_up, &P::w_down, &P::weights, &P::row_map,
         &P::source, &P::offsets, &P::y, &P::gate_up, &P::workspace, &P::num_tokens, &P::hidden,
         &P::width, &P::x_stride, &P::num_experts, &P::top_k, &P::dtype, &P::activation>(
        m, "fused_experts");
    bind_workspace<P, kimi_fused_experts_workspace_bytes, &P::num_tokens, &P::hidden, &P::width,
                   &P::num_experts, &P::top_k, &P::dtype>(m, "fused_experts_workspace_bytes");
  }
  {
    using P = kimi_fused_experts_backward_params;
    bind<P, kimi_fused_experts_backward, &P::dy, &P::x, &P::w_gate_up, &P::w_down, &P::weights,
         &P::row_map, &P::source, &P::offsets, &P::gate_up, &P::dx, &P::grad_w_gate_up,
         &P::grad_w_down, &P::grad_weights, &P::workspace, &P::num_tokens, &P::hidden, &P::width,
         &P::dy_stride, &P::x_stride, &P::num_experts, &P::top_k, &P::dtype, &P::activation>(
        m, "fused_experts_backward");
    bind_workspace<P, kimi_fused_experts_backward_workspace_bytes, &P::gate_up, &P::num_tokens,
                   &P::hidden, &P::width, &P::num_experts, &P::top_k, &P::dtype>(
        m, "fused_experts_backward_workspace_bytes");
  }
  {
    using P = kimi_permute_params;
    bind<P, kimi_permute, &P::x, &P::row_map, &P::source, &P::y, &P::num_tokens, &P::num_rows,
         &P::row_bytes, &P::x_stride_bytes, &P::top_k>(m, "permute");
  }
  {
    using P = kimi_unpermute_params;
    bind<P, kimi_unpermute, &P::y, &P::row_map, &P::weights, &P::x, &P::num_tokens, &P::hidden,
         &P::y_stride, &P::top_k, &P::dtype>(m, "unpermute");
  }
  {
    using P = kimi_unpermute_backward_params;
    bind<P, kimi_unpermute_backward, &P::grad_x, &P::y, &P::row_map, &P::source, &P::weights,
         &P::grad_y, &P::grad_weights, &P::num_tokens, &P::num_rows, &P::hidden, &P::grad_x_stride,
         &P::y_stride, &P::top_k, &P::dtype>(m, "unpermute_backward");
  }
  {
    using P = kimi_sort_chunks_params;
    bind<P, kimi_sort_chunks, &P::x, &P::split_sizes, &P::order, &P::y, &P::num_rows, &P::row_bytes,
         &P::x_stride_bytes, &P::num_chunks, &P::inverse>(m, "sort_chunks");
  }
  {
    using P = kimi_permute_plan_params;
    bind<P, kimi_permute_plan, &P::indices, &P::row_map, &P::source, &P::offsets,
         &P::tokens_per_expert, &P::workspace, &P::num_tokens, &P::top_k, &P::num_experts,
         &P::align>(m, "permute_plan");
    bind_workspace<P, kimi_permute_plan_workspace_bytes, &P::num_tokens, &P::top_k, &P::num_experts,
                   &P::align>(m, "permute_plan_workspace_bytes");
  }
  {
    using P = kimi_matrix_product_params;
    bind<P, kimi_matrix_product, &P::a, &P::b, &P::c, &P::d, &P::workspace, &P::rows, &P::cols,
         &P::depth, &P::a_row_stride, &P::a_col_stride, &P::b_row_stride, &P::b_col_stride,
         &P::c_stride, &P::d_stride, &P::alpha, &P::beta, &P::delta, &P::symmetric, &P::dtype>(
        m, "matrix_product");
    bind_workspace<P, kimi_matrix_product_workspace_bytes, &P::rows, &P::cols, &P::depth,
                   &P::dtype>(m, "matrix_product_workspace_bytes");
  }
  {
    using P = kimi_newton_schulz_params;
    bind<P, kimi_newton_schulz, &P::g, &P::x, &P::coefficients, &P::restarts, &P::workspace,
         &P::num_matrices, &P::rows, &P::cols, &P::g_row_stride, &P::g_col_stride, &P::x_row_stride,
         &P::x_col_stride, &P::steps, &P::num_restarts, &P::eps, &P::g_dtype, &P::dtype,
         &P::x_dtype, &P::method>(m, "newton_schulz");
    bind_workspace<P, kimi_newton_schulz_workspace_bytes, &P::num_matrices, &P::rows, &P::cols,
                   &P::g_row_stride, &P::g_col_stride, &P::dtype, &P::method>(
        m, "newton_schulz_workspace_bytes");
  }
  {
    using P = kimi_attention_max_logits_params;
    bind<P, kimi_attention_max_logits, &P::q, &P::k, &P::max_logits, &P::workspace, &P::batch,
         &P::heads, &P::kv_heads, &P::queries, &P::keys, &P::dim, &P::q_batch_stride,
         &P::q_head_stride, &P::q_row_stride, &P::q_col_stride, &P::k_batch_stride,
         &P::k_head_stride, &P::k_row_stride, &P::k_col_stride, &P::scale, &P::causal, &P::dtype>(
        m, "attention_max_logits");
    bind_workspace<P, kimi_attention_max_logits_workspace_bytes, &P::batch, &P::heads, &P::queries,
                   &P::dim, &P::dtype>(m, "attention_max_logits_workspace_bytes");
  }
  {
    using P = kimi_scale_rows_params;
    bind<P, kimi_scale_rows, &P::weight, &P::factors, &P::heads, &P::rows_of_head, &P::first,
         &P::last, &P::cols, &P::row_stride, &P::dtype>(m, "scale_rows");
  }
  {
    using P = kimi_muon_momentum_params;
    bind<P, kimi_muon_momentum, &P::grads, &P::buffers, &P::updates, &P::sizes, &P::squares,
         &P::count, &P::momentum, &P::nesterov, &P::maximize, &P::grad_dtype, &P::buffer_dtype>(
        m, "muon_momentum");
  }
  {
    using P = kimi_muon_update_params;
    bind<P, kimi_muon_update, &P::params, &P::directions, &P::copies, &P::shapes, &P::rates,
         &P::count, &P::decay, &P::cautious, &P::param_dtype, &P::direction_dtype>(m,
                                                                                   "muon_update");
  }
  {
    using P = kimi_adamw_params;
    bind<P, kimi_adamw, &P::params, &P::grads, &P::exp_avgs, &P::exp_avg_sqs, &P::sizes, &P::steps,
         &P::count, &P::lr, &P::beta1, &P::beta2, &P::eps, &P::weight_decay, &P::maximize,
         &P::cautious, &P::param_dtype, &P::grad_dtype>(m, "adamw");
  }
  {
    using P = kimi_squares_params;
    bind<P, kimi_squares, &P::x, &P::sizes, &P::squares, &P::count, &P::dtype>(m, "squares");
  }
  m.def("sequence_balance_loss_workspace_bytes", &kimi_sequence_balance_loss_workspace_bytes);
  m.def("z_loss_workspace_bytes", &kimi_z_loss_workspace_bytes);
}
