// SPDX-License-Identifier: MIT
// What forward and backward share on the CPU: the products of one layer as groups, and the weighted
// sum of rows through a bounded buffer.
#pragma once

#include "common/dtype.h"
#include "fused_experts/fused_experts.h"
#include "gemm/cpu/groups.h"
#include "grouped_gemm/grouped_gemm.h"

namespace kimi::experts {

constexpr int64_t kSumBytes = 32 << 20;

const CpuEngine& cpu_engine();

inline int64_t round64(int64_t n) { return (n + 63) / 64 * 64; }

// Columns that are summed at a time: R rows of them in fp32 fit kSumBytes, 128 at least.
inline int64_t sum_columns(int64_t rows, int64_t hidden) {
  const int64_t fits = kSumBytes / 4 / std::max<int64_t>(rows, 1) / 64 * 64;
  return std::min(hidden, std::max<int64_t>(fits, 128));
}

// Matrix e as the strip operand: its rows (transposed: its columns) from `first` on.
inline cpu::Operand weights_of(const kimi_expert_weights& w, int64_t e, int64_t rows,
                               int64_t columns, bool transposed) {
  cpu::Operand s;
  s.storage = cpu::Storage(w.storage);
  s.row_stride = transposed ? w.column_stride : w.row_stride;
  s.depth_stride = transposed ? w.row_stride : w.column_stride;
  if ((transposed ? rows : columns) == 1) s.depth_stride = 1;
  const char* data = static_cast<const char*>(w.data);
  if (w.storage == KIMI_STORAGE_FP8_BLOCK) {
    s.data = data + e * w.expert_stride;
    s.scale_stride = (columns + cpu::kFp8Block - 1) / cpu::kFp8Block;
    s.scale = static_cast<const float*>(w.scale) +
              e * ((rows + cpu::kFp8Block - 1) / cpu::kFp8Block) * s.scale_stride;
  } else if (w.storage == KIMI_STORAGE_INT4_GROUP) {
    s.data = data + e * w.expert_stride / 2;
    s.scale_stride = (columns + cpu::kInt4Group - 1) / cpu::kInt4Group;
    s.scale = static_cast<const bf16*>(w.scale) + e * rows * s.scale_stride;
  } else {
    s.data = data + e * w.expert_stride * size_of(kimi_dtype(w.storage));
  }
  return s;
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
  g.s = weights_of(p.w_gate_up, e, 2 * p.width, p.hidden, false);
  g.cols = p.width;
  g.depth = p.hidden;
  g.parts = 2;
  g.part_rows = p.width;
  return g;
}

// x[t] = sum_k weights[t,k] P[row] S[e]^T for rows P [R, depth]: products of some columns into
// `buffer`, then their sum, columns after columns. group(e) gives the group with all columns.
template <class GroupOf>
void sum_of_products(const cpu::BlockEngine& blocks, const grouped::Workspace& workspace,
                     int32_t num_experts, const GroupOf& group, int64_t rows, int64_t num_tokens,
                     CombineArguments sum, float* buffer) {
  const int64_t columns = sum_columns(rows, sum.hidden);
  const grouped::CpuEngine& store = grouped::cpu_engine();
  const CpuEngine& engine = cpu_engine();
  for (int64_t col = 0; col < sum.hidden; col += columns) {
    sum.col = col;
    sum.cols = std::min(columns, sum.hidden - col);
    sum.rows = buffer;
    const auto part = [&](int32_t e) {
      grouped::Group g = group(e);
      g.s_row = col;
      g.cols = sum.cols;
      return g;
    };
    grouped::run_groups(blocks, workspace, num_experts, part, [&](const grouped::Block& b) {
      const int64_t row = part(b.group).p_row + b.row;
      store.store({b.c, b.stride, b.rows, b.cols, nullptr, KIMI_FLOAT32,
                   buffer + row * sum.cols + b.col, sum.cols, KIMI_FLOAT32, false, false});
    });
    const int64_t grain = std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(sum.cols, 1));
    cpu::parallel_for(num_tokens, grain,
                      [&](int64_t begin, int64_t end) { engine.combine(sum, begin, end); });
  }
}

}  // namespace kimi::experts
