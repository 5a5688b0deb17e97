// SPDX-License-Identifier: MIT
// What forward and backward share on the CPU: the products of one layer as groups, and the weighted
// sum of rows through a bounded buffer.
#pragma once

#include "common/dtype.h"
#include "common/workspace.h"
#include "fused_experts/fused_experts.h"
#include "gemm/cpu/groups.h"
#include "gemm/cpu/weights.h"
#include "grouped_gemm/grouped_gemm.h"

namespace kimi::experts {

constexpr int64_t kSumBytes = 32 << 20;

// Columns that are summed at a time: R rows of them in fp32 fit kSumBytes, 128 at least.
inline int64_t sum_columns(int64_t rows, int64_t hidden) {
  const int64_t fits = kSumBytes / 4 / std::max<int64_t>(rows, 1) / 64 * 64;
  return std::min(hidden, std::max<int64_t>(fits, 128));
}

// Tokens as rows, gathered by pair.
inline cpu::Operand tokens_of(const void* x, int64_t stride, kimi_dtype dtype,
                              const int32_t* source, int32_t top_k) {
  cpu::Operand p = {x, stride, 1, cpu::Storage(dtype)};
  p.row_index = source;
  p.index_divisor = top_k;
  return p;
}

// Group e with its rows, everything else unset.
inline grouped::Group rows_of(const int32_t* offsets, int32_t e) {
  grouped::Group g;
  g.p_row = e ? offsets[e - 1] : 0;
  g.rows = offsets[e] - g.p_row;
  return g;
}

// Group e of [g; u] = w_gate_up[e] x[t]: two parts of F columns.
template <class Params>
grouped::Group gate_up_of(const Params& p, int32_t e) {
  grouped::Group g = rows_of(p.offsets, e);
  g.p = tokens_of(p.x, p.x_stride, p.dtype, p.source, p.top_k);
  g.s = grouped::matrix_of(p.w_gate_up, e, 2 * p.width, p.hidden, false);
  g.cols = p.width;
  g.depth = p.hidden;
  g.parts = 2;
  g.part_rows = p.width;
  return g;
}

// [g; u] of all rows to gate_up [R, 2F] and a(g, u), times `weights` unless those are nullptr, to
// hidden [R, F]; either may be nullptr.
template <class Params>
void compute_gate_up(const Params& p, const cpu::BlockEngine& blocks,
                     const grouped::Workspace& workspace, void* gate_up, void* hidden,
                     const float* weights) {
  const CpuEngine& engine = kEngines.best();
  const int64_t bytes = size_of(p.dtype);
  const auto group = [&](int32_t e) { return gate_up_of(p, e); };
  const auto at = [&]<class Void>(Void* x, int64_t i) {
    using Char = std::conditional_t<std::is_const_v<Void>, const char, char>;
    return x ? static_cast<Char*>(x) + i * bytes : nullptr;
  };
  const Activation activation = Activation::of(p);
  grouped::run_groups(blocks, workspace, p.num_experts, group, [&](const grouped::Block& b) {
    const int64_t row = group(b.group).p_row + b.row;
    engine.activate({b.c, b.stride, b.part_stride, b.rows, b.cols, activation, p.dtype,
                     at(gate_up, row * 2 * p.width + b.col), at(hidden, row * p.width + b.col),
                     p.width, at(p.b_gate_up, b.group * 2 * p.width + b.col), p.source + row,
                     weights});
  });
}

// x[t] = sum_k weights[t,k] (P[row] S[e]^T + bias[e]) for rows P [R, depth], or without weights, or
// bias [E, H]: products of some columns into `buffer`, then their sum, columns after columns.
// group(e) gives the group with all columns.
template <class Params, class GroupOf>
void sum_of_products(const Params& p, const cpu::BlockEngine& blocks,
                     const grouped::Workspace& workspace, const GroupOf& group,
                     const float* weights, const void* bias, void* x, float* buffer) {
  const int64_t columns = sum_columns(p.num_tokens * p.top_k, p.hidden);
  const grouped::CpuEngine& store = grouped::kEngines.best();
  const CpuEngine& engine = kEngines.best();
  CombineArguments sum = {};
  sum.rows = buffer;
  sum.row_map = p.row_map;
  sum.weights = weights;
  sum.x = x;
  sum.dtype = p.dtype;
  sum.hidden = p.hidden;
  sum.top_k = p.top_k;
  for (; sum.col < p.hidden; sum.col += columns) {
    sum.cols = std::min(columns, p.hidden - sum.col);
    const auto part = [&](int32_t e) {
      grouped::Group g = group(e);
      g.s_row = sum.col;
      g.cols = sum.cols;
      return g;
    };
    grouped::run_groups(blocks, workspace, p.num_experts, part, [&](const grouped::Block& b) {
      const int64_t row = part(b.group).p_row + b.row;
      const int64_t bias_at = (b.group * p.hidden + sum.col + b.col) * size_of(p.dtype);
      store.store({b.c, b.stride, b.rows, b.cols,
                   bias ? static_cast<const char*>(bias) + bias_at : nullptr, p.dtype,
                   buffer + row * sum.cols + b.col, sum.cols, KIMI_FLOAT32, false, false});
    });
    const int64_t grain = std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(sum.cols, 1));
    cpu::parallel_for(p.num_tokens, grain,
                      [&](int64_t begin, int64_t end) { engine.combine(sum, begin, end); });
  }
}

}  // namespace kimi::experts
