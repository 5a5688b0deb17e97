// SPDX-License-Identifier: MIT
// The C API: turns statuses into codes and keeps exceptions inside. No mathematics, no loops.
#include <cstring>
#include <exception>
#include <string>

#include "all_to_all/all_to_all.h"
#include "balance/balance.h"
#include "common/invariance.h"
#include "common/sm.h"
#include "common/status.h"
#include "cpu/features.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "fused_experts/fused_experts.h"
#include "gemm/cpu/block.h"
#include "grouped_gemm/fp8.h"
#include "grouped_gemm/grouped_gemm.h"
#include "kimi_ops.h"
#include "muon_clip/muon_clip.h"
#include "newton_schulz/newton_schulz.h"
#include "permute/permute.h"
#include "qk_clip/qk_clip.h"
#include "topk_gate/gate_plan.h"
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

// The instruction set that serves an op's CPU tensors; of products that of bf16 ones.
struct CpuOp {
  const char* name;
  kimi_isa (*isa)();
};
constexpr CpuOp kCpuOps[] = {
    {"topk_gate", [] { return kimi::gate::kEngines.isa(); }},
    {"balance", [] { return kimi::balance::kEngines.isa(); }},
    {"permute", [] { return kimi::permutation::kEngines.isa(); }},
    {"grouped_gemm", kimi::cpu::block_engine_isa},
    {"fused_experts", kimi::cpu::block_engine_isa},
    {"newton_schulz", kimi::cpu::block_engine_isa},
    {"qk_clip", kimi::cpu::block_engine_isa},
    {"muon_clip", [] { return kimi::muon_clip_cpu::kEngines.isa(); }},
};

template <class Params>
using Op = kimi::Status (*)(const Params&, kimi_device, void*);
template <class Params>
using Needs = size_t (*)(const Params&, kimi_device);

constexpr uintptr_t kWorkspaceAlignment = 64;

// A workspace that is there; each op says itself where it wants one.
template <class Params>
kimi::Status check_workspace(const char* name, Needs<Params> needs, const Params& params,
                             kimi_device device) {
  if (!params.workspace) return kimi::Status::ok();
  const size_t needed = needs(params, device);
  if (params.workspace_bytes < needed)
    return kimi::invalid(name, ": workspace_bytes: expected at least ", needed, ", got ",
                         params.workspace_bytes, "; allocate what kimi_", name,
                         "_workspace_bytes() says, under the same number of threads");
  if (const auto over = reinterpret_cast<uintptr_t>(params.workspace) % kWorkspaceAlignment)
    return kimi::invalid(name, ": workspace: expected ", kWorkspaceAlignment,
                         "-byte aligned memory, got ", over, " bytes past that; align it");
  return kimi::Status::ok();
}

template <class Params>
kimi_status call(const char* name, Op<Params> op, const Params* params, kimi_device device,
                 void* stream, Needs<Params> needs = nullptr) {
  return guard([&] {
    if (!params) return kimi::invalid(name, ": params: expected a pointer, got NULL");
    if (device != KIMI_DEVICE_CPU && device != KIMI_DEVICE_CUDA)
      return kimi::invalid(name, ": device: expected KIMI_DEVICE_CPU or KIMI_DEVICE_CUDA, got ",
                           int(device));
    if constexpr (requires { params->workspace; })
      KIMI_RETURN_IF_ERROR(check_workspace(name, needs, *params, device));
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
void kimi_set_batch_invariant(int wanted) { kimi::set_batch_invariant(wanted != 0); }
int kimi_batch_invariant(void) { return kimi::batch_invariant(); }

const char* kimi_cpu_engine(const char* op) {
  for (const auto& [name, isa] : kCpuOps)
    if (op && std::strcmp(op, name) == 0) return kimi_isa_name(isa());
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

// kimi_<op>(params, device, stream) is kimi::<op>, and the bytes it works in.
#define KIMI_OP_THAT(op, ...)                                                                 \
  kimi_status kimi_##op(const kimi_##op##_params* params, kimi_device device, void* stream) { \
    return call(#op, kimi::op, params, device, stream __VA_OPT__(, ) __VA_ARGS__);            \
  }
#define KIMI_OP(op) KIMI_OP_THAT(op)
#define KIMI_OP_WITH_WORKSPACE(op)                                                           \
  size_t kimi_##op##_workspace_bytes(const kimi_##op##_params* params, kimi_device device) { \
    return params ? kimi::op##_workspace_bytes(*params, device) : 0;                         \
  }                                                                                          \
  KIMI_OP_THAT(op, kimi::op##_workspace_bytes)

KIMI_OP(topk_gate)
KIMI_OP(topk_gate_given)
KIMI_OP(topk_gate_backward)

KIMI_OP(update_expert_bias)
KIMI_OP(sequence_counts)
KIMI_OP_WITH_WORKSPACE(sequence_balance_loss)
KIMI_OP(sequence_balance_loss_backward)
KIMI_OP(quantile_histogram)
KIMI_OP_WITH_WORKSPACE(z_loss)
KIMI_OP(z_loss_backward)

KIMI_OP_WITH_WORKSPACE(permute_plan)
KIMI_OP_WITH_WORKSPACE(gate_plan)
KIMI_OP(permute)
KIMI_OP(unpermute)
KIMI_OP(unpermute_backward)
KIMI_OP(sort_chunks)

KIMI_OP_WITH_WORKSPACE(grouped_gemm)
KIMI_OP_WITH_WORKSPACE(grouped_gemm_wgrad)

KIMI_OP(fp8_rows)
KIMI_OP(grouped_gemm_fp8)
int32_t kimi_grouped_gemm_fp8_served(kimi_device device) {
  return kimi::serves_grouped_gemm_fp8(device) ? 1 : 0;
}

KIMI_OP_WITH_WORKSPACE(fused_experts)
KIMI_OP_WITH_WORKSPACE(fused_experts_backward)

KIMI_OP(all_to_all_dispatch)
KIMI_OP(all_to_all_combine)
size_t kimi_all_to_all_buffer_bytes(const kimi_all_to_all_dispatch_params* dispatch,
                                    const kimi_all_to_all_combine_params* combine) {
  return dispatch && combine ? kimi::all_to_all_buffer_bytes(*dispatch, *combine) : 0;
}

KIMI_OP_WITH_WORKSPACE(matrix_product)
KIMI_OP_WITH_WORKSPACE(newton_schulz)

KIMI_OP_WITH_WORKSPACE(attention_max_logits)
KIMI_OP(clip_rows)

KIMI_OP(muon_momentum)
KIMI_OP(muon_update)
KIMI_OP_WITH_WORKSPACE(adamw)
KIMI_OP_WITH_WORKSPACE(squares)
KIMI_OP_WITH_WORKSPACE(clip_factor)

}  // extern "C"
