// SPDX-License-Identifier: MIT
// fused_experts forward: argument checks and the choice of the device; on the CPU the two products.
#include "fused_experts/fused_experts.h"

#include "common/engine.h"
#include "fused_experts/check.h"
#include "fused_experts/layer.h"
#include "grouped_gemm/fp8.h"

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
    hidden = pieces.take(rows, p.width, size_of(p.dtype));
    sums = pieces.take<float>(rows, experts::sum_columns(rows, p.hidden));
    groups = pieces.take(grouped::Workspace::bytes(cpu::block_engine(p.dtype), p.num_experts));
    bytes = pieces.bytes();
  }
};

// FP8 weights on a GPU: what its kernels ask for.
Status check_fp8(const char* op, const FusedExpertsParams& p) {
  if (p.w_gate_up.storage != p.w_down.storage)
    return invalid(op, ": w_gate_up, w_down: expected both in FP8 on a GPU, got storages ",
                   int(p.w_gate_up.storage), " and ", int(p.w_down.storage),
                   "; quantise or dequantise one");
  if (p.width % fp8::kBlock != 0 || p.hidden % 16 != 0)
    return invalid(op, ": w_gate_up, w_down: expected F as a multiple of ", fp8::kBlock,
                   " and H of 16 beside FP8 weights on a GPU, got F = ", p.width,
                   " and H = ", p.hidden, "; dequantise the weights, or pad them before quantize");
  if (p.b_gate_up || p.b_down || p.weights_first)
    return invalid(op,
                   ": b_gate_up, b_down, weights_first: expected none beside FP8 weights on a "
                   "GPU; dequantise the weights");
  if (p.gate_up)
    return invalid(op,
                   ": gate_up: expected NULL beside FP8 weights on a GPU, which keep no [g; u]");
  const auto lies = [](const kimi_expert_weights& w, int64_t rows, int64_t columns) {
    return reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.row_stride == columns &&
           w.expert_stride == rows * columns;
  };
  if (!lies(p.w_gate_up, 2 * p.width, p.hidden) || !lies(p.w_down, p.hidden, p.width))
    return invalid(op,
                   ": w_gate_up, w_down: expected dense FP8 weights at addresses that 16 "
                   "divides on a GPU; copy them");
  return Status::ok();
}

Status check(const FusedExpertsParams& p, kimi_device device) {
  const bool on_cpu = device == KIMI_DEVICE_CPU;
  const char* op = "fused_experts";
  KIMI_RETURN_IF_ERROR(
      experts::check_sizes(op, p, device, fused_experts_workspace_bytes(p, device)));
  const bool fp8 =
      p.w_gate_up.storage == KIMI_STORAGE_FP8_BLOCK || p.w_down.storage == KIMI_STORAGE_FP8_BLOCK;
  const bool quantised = on_cpu || (fp8 && serves_grouped_gemm_fp8(device));
  const bool empty = p.hidden == 0 || p.width == 0;
  KIMI_RETURN_IF_ERROR(
      experts::check_weights(op, "w_gate_up", p.w_gate_up, p.dtype, quantised, empty));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_down", p.w_down, p.dtype, quantised, empty));
  if (fp8 && !on_cpu) KIMI_RETURN_IF_ERROR(check_fp8(op, p));
  if (p.weights_first && p.b_down)
    return invalid(op,
                   ": weights_first: expected no b_down beside it, got one; add the weighted "
                   "biases to y");
  if (p.num_tokens > 0 && p.hidden > 0 && (!p.x || !p.y))
    return invalid(op, ": x, y: expected pointers, got NULL; only empty ones may be NULL");
  return experts::check_layer_strides(op, p);
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
