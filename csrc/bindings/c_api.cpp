// SPDX-License-Identifier: MIT
// The C API: turns statuses into codes and keeps exceptions inside. No mathematics, no loops.
#include <cstring>
#include <exception>
#include <string>

#include "balance/balance.h"
#include "common/sm.h"
#include "common/status.h"
#include "cpu/features.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "fused_experts/fused_experts.h"
#include "grouped_gemm/fp8.h"
#include "grouped_gemm/grouped_gemm.h"
#include "kimi_ops.h"
#include "muon_clip/muon_clip.h"
#include "newton_schulz/newton_schulz.h"
#include "permute/permute.h"
#include "qk_clip/qk_clip.h"
#include "topk_gate/topk_gate.h"

namespace {

thread_local std::string last_error;

template <class Call>
kimi_status guard(const Call& call) noexcept {
  try {
    kimi::Status status = call();
    if (!status.is_ok()) last_error = std::move(status.message);
    return status.code;
  } catch (const std::exception& exception) {
    last_error = exception.what();
  } catch (...) {
    last_error = "unknown exception";
  }
  return KIMI_INTERNAL_ERROR;
}

template <class Params>
using Op = kimi::Status (*)(const Params&, kimi_device, void*);

template <class Params>
kimi_status call(const char* name, Op<Params> op, const Params* params, kimi_device device,
                 void* stream) {
  return guard([&] {
    if (!params) return kimi::invalid(name, ": params: expected a pointer, got NULL");
    if (device != KIMI_DEVICE_CPU && device != KIMI_DEVICE_CUDA)
      return kimi::invalid(name, ": device: expected KIMI_DEVICE_CPU or KIMI_DEVICE_CUDA, got ",
                           int(device));
    return op(*params, device, stream);
  });
}

}  // namespace

extern "C" {

const char* kimi_version(void) { return KIMI_OPS_VERSION; }
const char* kimi_last_error(void) { return last_error.c_str(); }

kimi_isa kimi_detected_isa(void) { return kimi::cpu::detected_isa(); }
kimi_isa kimi_current_isa(void) { return kimi::cpu::current_isa(); }
kimi_status kimi_set_isa(kimi_isa isa) {
  return guard([&] { return kimi::cpu::set_isa(isa); });
}
const char* kimi_isa_name(kimi_isa isa) { return kimi::cpu::isa_name(isa); }
kimi_status kimi_set_max_sm(int32_t sm) {
  return guard([&] { return kimi::set_max_sm(sm); });
}
int32_t kimi_max_sm(void) { return kimi::max_sm(); }

const char* kimi_cpu_engine(const char* op) {
  if (op && std::strcmp(op, "topk_gate") == 0) return kimi_isa_name(kimi::topk_gate_isa());
  if (op && std::strcmp(op, "balance") == 0) return kimi_isa_name(kimi::balance_isa());
  if (op && std::strcmp(op, "permute") == 0) return kimi_isa_name(kimi::permute_isa());
  if (op && std::strcmp(op, "grouped_gemm") == 0) return kimi_isa_name(kimi::grouped_gemm_isa());
  if (op && std::strcmp(op, "fused_experts") == 0) return kimi_isa_name(kimi::fused_experts_isa());
  if (op && std::strcmp(op, "newton_schulz") == 0) return kimi_isa_name(kimi::newton_schulz_isa());
  if (op && std::strcmp(op, "qk_clip") == 0) return kimi_isa_name(kimi::qk_clip_isa());
  if (op && std::strcmp(op, "muon_clip") == 0) return kimi_isa_name(kimi::muon_clip_isa());
  return nullptr;
}

kimi_status kimi_set_num_threads(int num_threads) {
  return guard([&] {
    if (num_threads < 0)
      return kimi::invalid("set_num_threads: num_threads: expected 0 or more, got ", num_threads);
    kimi::cpu::set_num_threads(num_threads);
    return kimi::Status::ok();
  });
}
int kimi_num_threads(void) { return kimi::cpu::num_threads(); }
void kimi_advise_huge_pages(void* memory, size_t bytes) {
  kimi::cpu::advise_huge_pages(memory, bytes);
}
const char* kimi_cuda_architectures(void) { return KIMI_OPS_CUDA_ARCHITECTURES; }

kimi_status kimi_topk_gate(const kimi_topk_gate_params* params, kimi_device device, void* stream) {
  return call("topk_gate", kimi::topk_gate, params, device, stream);
}
kimi_status kimi_topk_gate_backward(const kimi_topk_gate_backward_params* params,
                                    kimi_device device, void* stream) {
  return call("topk_gate_backward", kimi::topk_gate_backward, params, device, stream);
}

kimi_status kimi_update_expert_bias(const kimi_update_expert_bias_params* params,
                                    kimi_device device, void* stream) {
  return call("update_expert_bias", kimi::update_expert_bias, params, device, stream);
}

size_t kimi_sequence_balance_loss_workspace_bytes(int64_t num_tokens, int64_t num_sequences,
                                                  int32_t num_experts) {
  return kimi::balance::loss_workspace_bytes(num_tokens, num_sequences, num_experts);
}
kimi_status kimi_sequence_balance_loss(const kimi_sequence_balance_loss_params* params,
                                       kimi_device device, void* stream) {
  return call("sequence_balance_loss", kimi::sequence_balance_loss, params, device, stream);
}
kimi_status kimi_sequence_balance_loss_backward(
    const kimi_sequence_balance_loss_backward_params* params, kimi_device device, void* stream) {
  return call("sequence_balance_loss_backward", kimi::sequence_balance_loss_backward, params,
              device, stream);
}

size_t kimi_z_loss_workspace_bytes(int64_t num_tokens) {
  return kimi::balance::z_workspace_bytes(num_tokens);
}
kimi_status kimi_z_loss(const kimi_z_loss_params* params, kimi_device device, void* stream) {
  return call("z_loss", kimi::z_loss, params, device, stream);
}
kimi_status kimi_z_loss_backward(const kimi_z_loss_backward_params* params, kimi_device device,
                                 void* stream) {
  return call("z_loss_backward", kimi::z_loss_backward, params, device, stream);
}

size_t kimi_permute_plan_workspace_bytes(const kimi_permute_plan_params* params,
                                         kimi_device device) {
  return params ? kimi::permute_plan_workspace_bytes(*params, device) : 0;
}
kimi_status kimi_permute_plan(const kimi_permute_plan_params* params, kimi_device device,
                              void* stream) {
  return call("permute_plan", kimi::permute_plan, params, device, stream);
}
kimi_status kimi_permute(const kimi_permute_params* params, kimi_device device, void* stream) {
  return call("permute", kimi::permute, params, device, stream);
}
kimi_status kimi_unpermute(const kimi_unpermute_params* params, kimi_device device, void* stream) {
  return call("unpermute", kimi::unpermute, params, device, stream);
}
kimi_status kimi_unpermute_backward(const kimi_unpermute_backward_params* params,
                                    kimi_device device, void* stream) {
  return call("unpermute_backward", kimi::unpermute_backward, params, device, stream);
}
kimi_status kimi_sort_chunks(const kimi_sort_chunks_params* params, kimi_device device,
                             void* stream) {
  return call("sort_chunks", kimi::sort_chunks, params, device, stream);
}

size_t kimi_grouped_gemm_workspace_bytes(const kimi_grouped_gemm_params* params,
                                         kimi_device device) {
  return params ? kimi::grouped_gemm_workspace_bytes(*params, device) : 0;
}
kimi_status kimi_grouped_gemm(const kimi_grouped_gemm_params* params, kimi_device device,
                              void* stream) {
  return call("grouped_gemm", kimi::grouped_gemm, params, device, stream);
}
size_t kimi_grouped_gemm_wgrad_workspace_bytes(const kimi_grouped_gemm_wgrad_params* params,
                                               kimi_device device) {
  return params ? kimi::grouped_gemm_wgrad_workspace_bytes(*params, device) : 0;
}
kimi_status kimi_grouped_gemm_wgrad(const kimi_grouped_gemm_wgrad_params* params,
                                    kimi_device device, void* stream) {
  return call("grouped_gemm_wgrad", kimi::grouped_gemm_wgrad, params, device, stream);
}

kimi_status kimi_fp8_rows(const kimi_fp8_rows_params* params, kimi_device device, void* stream) {
  return call("fp8_rows", kimi::fp8_rows, params, device, stream);
}
kimi_status kimi_grouped_gemm_fp8(const kimi_grouped_gemm_fp8_params* params, kimi_device device,
                                  void* stream) {
  return call("grouped_gemm_fp8", kimi::grouped_gemm_fp8, params, device, stream);
}
int32_t kimi_grouped_gemm_fp8_served(kimi_device device) {
  return kimi::serves_grouped_gemm_fp8(device) ? 1 : 0;
}

size_t kimi_fused_experts_workspace_bytes(const kimi_fused_experts_params* params,
                                          kimi_device device) {
  return params ? kimi::fused_experts_workspace_bytes(*params, device) : 0;
}
kimi_status kimi_fused_experts(const kimi_fused_experts_params* params, kimi_device device,
                               void* stream) {
  return call("fused_experts", kimi::fused_experts, params, device, stream);
}
size_t kimi_fused_experts_backward_workspace_bytes(const kimi_fused_experts_backward_params* params,
                                                   kimi_device device) {
  return params ? kimi::fused_experts_backward_workspace_bytes(*params, device) : 0;
}
kimi_status kimi_fused_experts_backward(const kimi_fused_experts_backward_params* params,
                                        kimi_device device, void* stream) {
  return call("fused_experts_backward", kimi::fused_experts_backward, params, device, stream);
}

size_t kimi_matrix_product_workspace_bytes(const kimi_matrix_product_params* params, kimi_device) {
  return params ? kimi::matrix_product_workspace_bytes(*params) : 0;
}
kimi_status kimi_matrix_product(const kimi_matrix_product_params* params, kimi_device device,
                                void* stream) {
  return call("matrix_product", kimi::matrix_product, params, device, stream);
}
size_t kimi_newton_schulz_workspace_bytes(const kimi_newton_schulz_params* params, kimi_device) {
  return params ? kimi::newton_schulz_workspace_bytes(*params) : 0;
}
kimi_status kimi_newton_schulz(const kimi_newton_schulz_params* params, kimi_device device,
                               void* stream) {
  return call("newton_schulz", kimi::newton_schulz, params, device, stream);
}

size_t kimi_attention_max_logits_workspace_bytes(const kimi_attention_max_logits_params* params,
                                                 kimi_device) {
  return params ? kimi::attention_max_logits_workspace_bytes(*params) : 0;
}
kimi_status kimi_attention_max_logits(const kimi_attention_max_logits_params* params,
                                      kimi_device device, void* stream) {
  return call("attention_max_logits", kimi::attention_max_logits, params, device, stream);
}
kimi_status kimi_scale_rows(const kimi_scale_rows_params* params, kimi_device device,
                            void* stream) {
  return call("scale_rows", kimi::scale_rows, params, device, stream);
}
kimi_status kimi_muon_momentum(const kimi_muon_momentum_params* params, kimi_device device,
                               void* stream) {
  return call("muon_momentum", kimi::muon_momentum, params, device, stream);
}
kimi_status kimi_muon_update(const kimi_muon_update_params* params, kimi_device device,
                             void* stream) {
  return call("muon_update", kimi::muon_update, params, device, stream);
}
kimi_status kimi_adamw(const kimi_adamw_params* params, kimi_device device, void* stream) {
  return call("adamw", kimi::adamw, params, device, stream);
}
kimi_status kimi_squares(const kimi_squares_params* params, kimi_device device, void* stream) {
  return call("squares", kimi::squares, params, device, stream);
}

}  // extern "C"
