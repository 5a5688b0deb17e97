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

// A strip of a block, and where it belongs.
struct Strip {
  int64_t row, rows;     // of S
  int64_t depth, count;  // of the group
  int64_t panel;         // first depth of the panel that it is multiplied with
  int64_t col;           // of the block's sums
};

// The strips of a block in turn: of one panel of depths after the other all rows of S, of these all
// depths.
class Strips {
 public:
  Strips(const cpu::BlockEngine& engine, const Group& g, const Block& block)
      : g_(g), block_(block), depth_block_(engine.depth_block) {
    const int64_t of_block = round_up(block.rows, engine.panel_rows) * depth_block_;
    const int64_t fits = std::max<int64_t>(1, kPanelBytes / (of_block * engine.element_bytes));
    panel_ = std::min(fits, ceil_div(g.depth, depth_block_));
    rows_ = ceil_div(block.cols, cpu::kStripRows);
  }
  int64_t size() const { return g_.parts * rows_ * ceil_div(g_.depth, depth_block_); }
  int64_t panel_depth() const { return panel_ * depth_block_; }
  Strip operator[](int64_t i) const {
    const int64_t of_panel = g_.parts * rows_ * panel_, panel = i / of_panel * panel_depth();
    const int64_t blocks = std::min(panel_, ceil_div(g_.depth - panel, depth_block_));
    const int64_t part = i % of_panel / blocks / rows_,
                  col = i % of_panel / blocks % rows_ * cpu::kStripRows,
                  depth = panel + i % of_panel % blocks * depth_block_;
    return {g_.s_row + part * g_.part_rows + block_.col + col,
            std::min(cpu::kStripRows, block_.cols - col),
            depth,
            std::min(depth_block_, g_.depth - depth),
            panel,
            part * block_.part_stride + col};
  }

 private:
  const Group& g_;
  const Block& block_;
  int64_t depth_block_, panel_, rows_;  // of a panel: depth blocks
};

const char* address(const Group& g, const Strip& strip) {
  const int64_t depth = g.p_depth + strip.depth;
  const int64_t at = strip.row * g.s.row_stride + depth * g.s.depth_stride;
  return static_cast<const char*>(g.s.data) + bytes_of(g.s.storage, at);
}

// What becomes of strip i while the one before is multiplied: packed into `to`, if the engine can, or
// its lines are fetched. Depth contiguous: up to 1 KiB of 32 rows; rows contiguous: one or two
// lines of every depth.
cpu::Upcoming upcoming(const cpu::BlockEngine& engine, const Group& g, const Strips& strips,
                       int64_t i, char* to) {
  if (i >= strips.size() || g.s.row_index || g.s.depth_index) return {};
  const Strip strip = strips[i];
  const char* data = address(g, strip);
  const int64_t row = bytes_of(g.s.storage, g.s.row_stride);
  if (g.s.depth_stride == 1) {
    cpu::Upcoming next = {data, 64, 128, row - 1024, 8};
    if (engine.packs_beside && g.s.storage == cpu::Storage::kBfloat16 &&
        strip.rows == cpu::kStripRows && strip.count % 32 == 0) {
      next.strip = to;
      next.row_bytes = row;
      next.count = strip.count;
      next.after = i + 1 < strips.size() ? address(g, strips[i + 1]) - data : 0;
    }
    return next;
  }
  const int64_t stride = bytes_of(g.s.storage, g.s.depth_stride);
  if (g.s.storage == cpu::Storage::kFloat32) return {data, 64, stride, 0, 0};
  return {data, stride, 2 * stride, 0, 0};
}

// The product of few rows of P with S read straight from memory, or nullptr. Sums over rows (a depth
// of its own for each group, gathered or not) are never few rows of weights; nor is anything where
// the order of sums may not depend on the number of rows.
auto product_of_few(const cpu::BlockEngine& engine, const Group& g, int64_t rows) {
  const bool along = g.s.depth_stride == 1, quantised = g.s.storage > cpu::Storage::kFloat16;
  const bool beside = g.s.row_stride == 1 && g.s.storage == g.p.storage;
  const int64_t most = along    ? quantised ? engine.dot_quantised : engine.dot_tokens
                       : beside ? engine.spread_tokens
                                : 0;
  const bool few = !batch_invariant() && !g.over_rows && rows <= most && !g.s.row_index &&
                   volume(rows, engine.dot_stride(g.depth), engine.element_bytes) <= kDotBytes;
  return few ? (along ? engine.dot : engine.spread) : nullptr;
}

}  // namespace

void multiply_block(const cpu::BlockEngine& engine, const Group& g, const Block& block, char* panel,
                    char* strip, float* c) {
  const int64_t p_row = g.p_row + block.row;
  if (g.depth == 0) {
    std::memset(c, 0, size_t(block.rows * block.stride) * 4);
    return;
  }
  if (const auto few = product_of_few(engine, g, block.rows)) {
    engine.pack_dot(g.p, p_row, block.rows, g.depth, panel);
    for (int part = 0; part < g.parts; ++part)
      few(panel, block.rows, g.s, g.s_row + part * g.part_rows + block.col, block.cols, g.depth,
          c + part * block.part_stride, block.stride);
    return;
  }
  const Strips strips(engine, g, block);
  const int64_t rows = round_up(block.rows, engine.panel_rows);
  bool packed = false;
  for (int64_t i = 0; i < strips.size(); ++i) {
    const Strip s = strips[i];
    if (i == 0 || s.panel != strips[i - 1].panel)
      engine.pack_panel(g.p, p_row, block.rows, g.p_depth + s.panel,
                        std::min(strips.panel_depth(), g.depth - s.panel), panel);
    char* const to = strip + i % 2 * engine.strip_bytes();
    if (!packed) engine.pack_strip(g.s, s.row, s.rows, g.p_depth + s.depth, s.count, to);
    const cpu::Upcoming next =
        upcoming(engine, g, strips, i + 1, strip + (i + 1) % 2 * engine.strip_bytes());
    engine.multiply(panel + (s.depth - s.panel) * rows * engine.element_bytes, block.rows, to,
                    s.count, next, c + s.col, block.stride, s.depth > 0);
    packed = next.strip != nullptr;
  }
  if (engine.finish) engine.finish(c, block.rows, block.stride, block.stride);
}

void add_block(const cpu::BlockEngine& engine, const Group& g, const Block& block,
               const ThreadMemory& memory, float* out, int64_t stride) {
  for (int64_t depth = 0; depth < g.depth; depth += engine.depth_block) {
    const int64_t count = std::min(engine.depth_block, g.depth - depth), at = g.p_depth + depth;
    const int64_t strip_bytes = engine.packed_depth(count) * cpu::kStripRows * engine.element_bytes;
    char* strip = memory.panel;
    for (int64_t j = 0; j < block.cols; j += cpu::kStripRows, strip += strip_bytes)
      engine.pack_strip(g.s, g.s_row + block.col + j, std::min(cpu::kStripRows, block.cols - j), at,
                        count, strip);
    for (int64_t i = 0; i < block.rows; i += engine.panel_rows) {
      const int64_t row = block.row + i, rows = std::min(engine.panel_rows, block.rows - i);
      char* const panel = memory.strip;
      engine.pack_panel(g.p, g.p_row + row, rows, at, count, panel);
      float* to = out + row * stride + block.col;
      strip = memory.panel;
      for (int64_t left = block.cols; left > 0; left -= cpu::kStripRows) {
        if (left >= cpu::kStripRows) {
          engine.multiply(panel, rows, strip, count, {}, to, stride, true);
        } else {
          engine.multiply(panel, rows, strip, count, {}, memory.c, cpu::kStripRows, false);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < left; ++j)
              to[r * stride + j] += memory.c[r * cpu::kStripRows + j];
        }
        to += cpu::kStripRows;
        strip += strip_bytes;
      }
    }
  }
}

}  // namespace kimi::grouped
