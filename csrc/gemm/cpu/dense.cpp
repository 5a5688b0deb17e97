// SPDX-License-Identifier: MIT
#include "gemm/cpu/dense.h"

#include <algorithm>
#include <cstring>

#include "common/workspace.h"

namespace kimi::gemm {
namespace {

using cpu::BlockEngine;
using cpu::kStripRows;

constexpr int64_t kPanelRows = 256, kLeastPanelRows = 64;
constexpr int64_t kTaskStrips = 16;

// How a product is cut, and where its packed operands lie in the scratch.
struct Layout {
  const BlockEngine& engine;
  int64_t panel_rows, panels, strips, blocks;
  int64_t panel_bytes, strip_bytes;  // a panel of all depths, a strip of one depth block
  int64_t sums_bytes;                // of one thread

  Layout(int64_t rows, int64_t cols, int64_t depth, kimi_dtype dtype, int threads)
      : engine(cpu::block_engine(dtype)) {
    // Three panels a thread balance a triangle; fewer rows than 64 pay too much for each strip.
    const int64_t group = engine.panel_rows;
    const int64_t wanted =
        threads == 1 ? kPanelRows : std::max(kLeastPanelRows, rows / (3 * int64_t{threads}));
    panel_rows = std::max<int64_t>(1, std::min(kPanelRows, wanted) / group) * group;
    panel_rows = std::min(panel_rows, round_up(std::max<int64_t>(rows, 1), group));
    panels = ceil_div(rows, panel_rows);
    strips = ceil_div(cols, kStripRows);
    blocks = ceil_div(depth, engine.depth_block);
    panel_bytes = round_up(std::min(engine.panel_bytes(panel_rows, depth), kTooMany / 2), 64);
    strip_bytes = round_up(engine.strip_bytes(), 64);
    sums_bytes = panel_rows * kTaskStrips * kStripRows * 4;
  }
};

struct Memory {  // of the scratch
  char *panels, *strips, *sums;
  int64_t bytes;

  Memory(const Layout& layout, int threads, void* scratch) {
    Pieces pieces(scratch);
    panels = pieces.take(layout.panels, layout.panel_bytes);
    strips = pieces.take(layout.strips, layout.blocks, layout.strip_bytes);
    sums = pieces.take(threads, layout.sums_bytes);
    bytes = pieces.bytes();
  }
};

class Multiplication {
 public:
  Multiplication(const Dense& product, const std::function<void(const DenseBlock&)>& to,
                 void* scratch, int threads)
      : p(product),
        sink(to),
        layout(p.rows, p.cols, p.depth, p.dtype, threads),
        memory(layout, threads, scratch),
        threads_(threads) {}

  void pack() const {
    tasks(layout.panels + layout.strips, threads_, [&](int64_t task, int) {
      const auto& engine = layout.engine;
      if (task < layout.panels) {
        engine.pack_panel(p.a, task * layout.panel_rows, rows_of(task), 0, p.depth,
                          memory.panels + task * layout.panel_bytes);
        return;
      }
      const int64_t s = task - layout.panels, row = s * kStripRows;
      for (int64_t b = 0; b < layout.blocks; ++b)
        engine.pack_strip(p.b, row, cols_of(s), b * engine.depth_block, depth_of(b), strip(s, b));
    });
  }

  void run() const {
    // A lower triangle leaves panel q the strips up to its last row; longest panels go first.
    const auto last_strip = [&](int64_t panel) {
      if (!p.lower) return layout.strips;
      return ceil_div(std::min(p.rows, (panel + 1) * layout.panel_rows), kStripRows);
    };
    int64_t count = 0;
    for (int64_t q = 0; q < layout.panels; ++q) count += ceil_div(last_strip(q), kTaskStrips);
    tasks(count, threads_, [&](int64_t task, int thread) {
      int64_t q = layout.panels - 1;
      for (int64_t in_panel; (in_panel = ceil_div(last_strip(q), kTaskStrips)) <= task; --q)
        task -= in_panel;
      const int64_t first = task * kTaskStrips;
      multiply(q, first, std::min(last_strip(q), first + kTaskStrips),
               reinterpret_cast<float*>(memory.sums + thread * layout.sums_bytes));
    });
  }

 private:
  int64_t rows_of(int64_t panel) const {
    return std::min(layout.panel_rows, p.rows - panel * layout.panel_rows);
  }
  int64_t cols_of(int64_t s) const { return std::min(kStripRows, p.cols - s * kStripRows); }
  int64_t depth_of(int64_t b) const {
    return std::min(layout.engine.depth_block, p.depth - b * layout.engine.depth_block);
  }
  char* strip(int64_t s, int64_t b) const {
    return memory.strips + (s * layout.blocks + b) * layout.strip_bytes;
  }
  // The first row of the panel that the strip needs, a multiple of a group of rows.
  int64_t first_row(int64_t panel, int64_t s) const {
    if (!p.lower) return 0;
    const int64_t group = layout.engine.panel_rows;
    return std::max<int64_t>(0, s * kStripRows - panel * layout.panel_rows) / group * group;
  }

  void multiply(int64_t panel, int64_t first, int64_t last, float* sums) const {
    const auto& engine = layout.engine;
    const int64_t rows = rows_of(panel);
    const int64_t padded = round_up(rows, engine.panel_rows);
    const auto sums_of = [&](int64_t s) {
      return sums + ((s - first) * layout.panel_rows + first_row(panel, s)) * kStripRows;
    };
    if (p.depth == 0) std::memset(sums, 0, size_t(layout.sums_bytes));
    const char* block = memory.panels + panel * layout.panel_bytes;
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const int64_t row_bytes = engine.packed_depth(depth_of(b)) * engine.element_bytes;
      for (int64_t s = first; s < last; ++s) {
        const int64_t start = first_row(panel, s);
        engine.multiply(block + start * row_bytes, rows - start, strip(s, b), depth_of(b), {},
                        sums_of(s), kStripRows, b > 0);
      }
      block += padded * row_bytes;
    }
    for (int64_t s = first; s < last; ++s) {
      const int64_t start = first_row(panel, s);
      if (engine.finish) engine.finish(sums_of(s), rows - start, kStripRows, kStripRows);
      sink({sums_of(s), panel * layout.panel_rows + start, rows - start, s * kStripRows,
            cols_of(s)});
    }
  }

  const Dense& p;
  const std::function<void(const DenseBlock&)>& sink;
  const Layout layout;
  const Memory memory;
  const int threads_;
};

}  // namespace

size_t dense_scratch_bytes(int64_t rows, int64_t cols, int64_t depth, kimi_dtype dtype,
                           int threads) {
  return size_t(Memory(Layout(rows, cols, depth, dtype, threads), threads, nullptr).bytes);
}

void multiply_dense(const Dense& p, const std::function<void(const DenseBlock&)>& sink,
                    void* scratch, int threads) {
  const Multiplication multiplication(p, sink, scratch, threads);
  multiplication.pack();
  multiplication.run();
}

}  // namespace kimi::gemm
