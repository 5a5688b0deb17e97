// SPDX-License-Identifier: MIT
// fused_experts forward: argument checks and the choice of the device; on the CPU the two products.
#include "fused_experts/fused_experts.h"

#include "common/engine.h"
#include "fused_experts/check.h"
#include "fused_experts/layer.h"

namespace kimi {
namespace {

using experts::round64;

struct Layout {  // of the workspace
  int64_t hidden, sums, groups;

  explicit Layout(const FusedExpertsParams& p) {
    const int64_t rows = p.num_tokens * p.top_k;
    hidden = round64(rows * p.width * size_of(p.dtype));
    sums = round64(rows * experts::sum_columns(rows, p.hidden) * 4);
    groups = int64_t(grouped::Workspace::bytes(cpu::block_engine(p.dtype), p.num_experts));
  }
};

Status check(const FusedExpertsParams& p, kimi_device device) {
  const bool on_cpu = device == KIMI_DEVICE_CPU;
  const char* op = "fused_experts";
  KIMI_RETURN_IF_ERROR(experts::check_sizes(op, p, device));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_gate_up", p.w_gate_up, p.dtype, on_cpu));
  KIMI_RETURN_IF_ERROR(experts::check_weights(op, "w_down", p.w_down, p.dtype, on_cpu));
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
  const Layout layout(p);
  return size_t(layout.hidden + layout.sums + layout.groups);
}

Status fused_experts(const FusedExpertsParams& p, kimi_device device,
                     [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p, device));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("fused_experts", fused_experts_cuda(p, stream));
  if (p.num_tokens == 0) return Status::ok();
  const int64_t rows = p.num_tokens * p.top_k, bytes = size_of(p.dtype);
  const Layout layout(p);
  const cpu::BlockEngine& blocks = cpu::block_engine(p.dtype);
  const experts::CpuEngine& engine = experts::kEngines.best();
  char* hidden = static_cast<char*>(p.workspace);
  float* sums = reinterpret_cast<float*>(hidden + layout.hidden);
  const grouped::Workspace workspace(blocks, hidden + layout.hidden + layout.sums, p.num_experts);

  const auto gate_up = [&](int32_t e) { return experts::gate_up_of(p, e); };
  grouped::run_groups(blocks, workspace, p.num_experts, gate_up, [&](const grouped::Block& b) {
    const int64_t row = gate_up(b.group).p_row + b.row;
    char* saved = static_cast<char*>(p.gate_up);
    if (saved) saved += (row * 2 * p.width + b.col) * bytes;
    engine.activate({b.c, b.stride, b.part_stride, b.rows, b.cols, p.activation, p.dtype, saved,
                     hidden + (row * p.width + b.col) * bytes, p.width});
  });

  const auto down = [&](int32_t e) {
    grouped::Group g = experts::rows_of(p.offsets, e);
    g.p = {hidden, p.width, 1, cpu::Storage(p.dtype)};
    g.s = experts::weights_of(p.w_down, e, p.hidden, p.width, false);
    g.depth = p.width;
    return g;
  };
  experts::CombineArguments sum = {};
  sum.row_map = p.row_map;
  sum.weights = p.weights;
  sum.x = p.y;
  sum.dtype = p.dtype;
  sum.hidden = p.hidden;
  sum.top_k = p.top_k;
  experts::sum_of_products(blocks, workspace, p.num_experts, down, rows, p.num_tokens, sum, sums);
  return Status::ok();
}

}  // namespace kimi
