// SPDX-License-Identifier: MIT
// fused_experts forward: argument checks and the choice of the device; on the CPU the two products.
#include "fused_experts/fused_experts.h"

#include "common/engine.h"
#include "fused_experts/check.h"
#include "fused_experts/layer.h"

namespace kimi {
namespace {

struct Memory {  // of the workspace
  char* hidden;  // [R, F] dtype
  float* sums;   // buffer of sum_of_products
  void* groups;
  int64_t bytes;

  Memory(const FusedExpertsParams& p, void* workspace) {
    Pieces pieces(workspace);
    const int64_t rows = p.num_tokens * p.top_k;
    hidden = pieces.take(rows * p.width * size_of(p.dtype));
    sums = pieces.take<float>(rows * experts::sum_columns(rows, p.hidden));
    groups =
        pieces.take(int64_t(grouped::Workspace::bytes(cpu::block_engine(p.dtype), p.num_experts)));
    bytes = pieces.bytes();
  }
};

Status check(const FusedExpertsParams& p, kimi_device device) {
  const bool on_cpu = device == KIMI_DEVICE_CPU;
  const char* op = "fused_experts";
  KIMI_RETURN_IF_ERROR(experts::check_sizes(op, p, device));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_gate_up", p.w_gate_up, p.dtype, on_cpu));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_down", p.w_down, p.dtype, on_cpu));
  if (p.weights_first && p.b_down)
    return invalid(op,
                   ": weights_first: expected no b_down beside it, got one; add the weighted "
                   "biases to y");
  if (p.num_tokens * p.hidden > 0 && (!p.x || !p.y))
    return invalid(op, ": x, y: expected pointers, got NULL; only empty ones may be NULL");
  return Status::ok();
}

}  // namespace

size_t fused_experts_workspace_bytes(const FusedExpertsParams& p,
                                     [[maybe_unused]] kimi_device device) {
  if (!experts::sizes_are_good(p)) return 0;
#if defined(KIMI_OPS_CUDA)
  if (device == KIMI_DEVICE_CUDA) return fused_experts_workspace_bytes_cuda(p);
#endif
  return size_t(Memory(p, nullptr).bytes);
}

Status fused_experts(const FusedExpertsParams& p, kimi_device device,
                     [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("fused_experts", fused_experts_cuda(p, stream));
  if (p.num_tokens == 0) return Status::ok();
  const Memory memory(p, p.workspace);
  const cpu::BlockEngine& blocks = cpu::block_engine(p.dtype);
  const grouped::Workspace workspace(blocks, memory.groups, p.num_experts);
  experts::compute_gate_up(p, blocks, workspace, p.gate_up, memory.hidden,
                           p.weights_first ? p.weights : nullptr);
  const auto down = [&](int32_t e) {
    grouped::Group g = experts::rows_of(p.offsets, e);
    g.p = {memory.hidden, p.width, 1, cpu::Storage(p.dtype)};
    g.s = grouped::matrix_of(p.w_down, e, p.hidden, p.width, false);
    g.depth = p.width;
    return g;
  };
  experts::sum_of_products(p, blocks, workspace, down, p.weights_first ? nullptr : p.weights,
                           p.b_down, p.y, memory.sums);
  return Status::ok();
}

}  // namespace kimi
