// SPDX-License-Identifier: MIT
#include "gemm/cpu/groups.h"

#include "common/invariance.h"

namespace kimi::grouped {
namespace {

int64_t bytes_of(cpu::Storage storage, int64_t elements) {
  switch (storage) {
    case cpu::Storage::kFloat32:
      return 4 * elements;
    case cpu::Storage::kFp8Block:
      return elements;
    case cpu::Storage::kInt4Group:
      return elements / 2;
    default:
      return 2 * elements;
  }
}

// The lines that packing strip rows from `row` and depths from `depth` on will read. Depth
// contiguous: up to 1 KiB of 32 rows; rows contiguous: one or two lines of every depth.
cpu::Upcoming upcoming(const cpu::Operand& s, int64_t row, int64_t depth) {
  if (s.row_index || s.depth_index) return {};
  const int64_t at = row * s.row_stride + depth * s.depth_stride;
  const char* data = static_cast<const char*>(s.data) + bytes_of(s.storage, at);
  if (s.depth_stride == 1) return {data, 64, 128, bytes_of(s.storage, s.row_stride) - 1024, 8};
  const int64_t stride = bytes_of(s.storage, s.depth_stride);
  if (s.storage == cpu::Storage::kFloat32) return {data, 64, stride, 0, 0};
  return {data, stride, 2 * stride, 0, 0};
}

// Few rows of P, and rows of S that lie as they are read. Sums over rows (a depth of its own for
// each group, gathered or not) are never few rows of weights.
bool takes_dot(const cpu::BlockEngine& engine, const Group& g, int64_t rows) {
  const bool quantised = g.s.storage > cpu::Storage::kFloat16;
  return !batch_invariant() && !g.over_rows &&
         rows <= (quantised ? engine.dot_pass : engine.dot_tokens) && g.s.depth_stride == 1 &&
         !g.s.row_index && rows * engine.dot_stride(g.depth) * engine.element_bytes <= kDotBytes;
}

}  // namespace

void multiply_block(const cpu::BlockEngine& engine, const Group& g, const Block& block, char* panel,
                    char* strip, float* c) {
  const int64_t p_row = g.p_row + block.row;
  if (g.depth == 0) {
    std::memset(c, 0, size_t(block.rows * block.stride) * 4);
    return;
  }
  const auto s_row = [&](int part) { return g.s_row + part * g.part_rows + block.col; };
  if (takes_dot(engine, g, block.rows)) {
    engine.pack_dot(g.p, p_row, block.rows, g.depth, panel);
    for (int part = 0; part < g.parts; ++part)
      engine.dot(panel, block.rows, g.s, s_row(part), block.cols, g.depth,
                 c + part * block.part_stride, block.stride);
    return;
  }
  const int64_t rows = round_up(block.rows, engine.panel_rows);
  const int64_t fits = kPanelBytes / (rows * engine.element_bytes) / engine.depth_block;
  const int64_t panel_depth = std::max<int64_t>(1, fits) * engine.depth_block;
  for (int64_t d = 0; d < g.depth; d += panel_depth) {
    const int64_t depth = std::min(panel_depth, g.depth - d);
    engine.pack_panel(g.p, p_row, block.rows, g.p_depth + d, depth, panel);
    for (int part = 0; part < g.parts; ++part)
      for (int64_t col = 0; col < block.cols; col += cpu::kStripRows) {
        const int64_t cols = std::min(cpu::kStripRows, block.cols - col);
        for (int64_t b = 0; b < depth; b += engine.depth_block) {
          const int64_t count = std::min(engine.depth_block, depth - b);
          engine.pack_strip(g.s, s_row(part) + col, cols, g.p_depth + d + b, count, strip);
          const bool last = b + count == depth;
          const int64_t next_row = s_row(part) + col + (last ? cpu::kStripRows : 0);
          const bool more = !last || col + cpu::kStripRows < block.cols;
          const cpu::Upcoming next =
              more ? upcoming(g.s, next_row, g.p_depth + d + (last ? 0 : b + count))
                   : cpu::Upcoming{};
          engine.multiply(panel + b * rows * engine.element_bytes, block.rows, strip, count, next,
                          c + part * block.part_stride + col, block.stride, d + b > 0);
        }
      }
  }
  if (engine.finish) engine.finish(c, block.rows, block.stride, block.stride);
}

}  // namespace kimi::grouped
