// SPDX-License-Identifier: MIT
// Products of many groups as one parallel run of blocks: the schedule and the cache blocking that
// grouped_gemm and fused_experts share.
//
// A task is a block of up to kBlockRows rows and kBlockSums sums of one group's result, all of its
// depth. Its panel (rows of P) is packed for as much depth as fits kPanelBytes, its strips (rows of
// S) one after the other; the sums stay in C. A thread, with AVX-512-BF16 and many rows:
//   panel 280 x 512 x 2 B = 280 KiB    2 strips 32 x 512 x 2 B = 64 KiB    C 280 x 256 x 4 B = 280 KiB
// together 0.6 of a 1 MiB L2. Few rows get a longer panel and more columns instead, so that each
// row of S is read in one go: its stream from memory is the limit then.
//
// Where sums are added to fp32 in memory, that memory is the limit: it is read and written as a
// stream, tiles along its rows, against all strips of the block, which are packed before.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/workspace.h"
#include "cpu/parallel.h"
#include "gemm/cpu/block.h"

namespace kimi::grouped {

constexpr int64_t kBlockRows = 280, kBlockSums = kBlockRows * 256, kPanelBytes = 280 << 10;
constexpr int64_t kDotBytes = 512 << 10;     // of the rows of P on the path of few rows
constexpr int64_t kStripsBytes = 512 << 10;  // of the strips of sums that are added
// Products of fewer multiplications stay in one thread: waking another costs as much, and on a busy
// machine a wait for it costs a slice of its time.
constexpr double kAlone = 1 << 18;

// One group: rows x depth of P by (parts x cols) x depth of S. With two parts a block holds the
// same columns of both: part 1 of S begins part_rows rows after part 0.
struct Group {
  cpu::Operand p, s;
  int64_t p_row = 0;  // of the group's first row in P
  int64_t s_row = 0;  // of its first column, a row of S
  int64_t rows = 0, cols = 0, depth = 0;
  int64_t p_depth = 0;     // first depth in P and S
  bool over_rows = false;  // depth counts rows of the group, as in wgrad
  int parts = 1;
  int64_t part_rows = 0;
};

// Finished sums of rows [row, row + rows) (counted in the group) and columns [col, col + cols) of
// each part; part q begins at c + q * part_stride.
struct Block {
  int32_t group;
  int64_t row, rows, col, cols;
  const float* c;
  int64_t stride, part_stride;
  int thread;
};

struct ThreadMemory {
  char *panel, *strip;
  float* c;
  int64_t bytes;

  ThreadMemory(const cpu::BlockEngine& engine, void* memory) {
    Pieces pieces(memory);
    panel = pieces.take(std::max({kPanelBytes, kDotBytes, kStripsBytes,
                                  engine.panel_bytes(kBlockRows, engine.depth_block)}));
    strip = pieces.take(2, engine.strip_bytes());
    c = pieces.take<float>(kBlockSums);
    bytes = pieces.bytes();
  }
};

class Workspace {
 public:
  static size_t bytes(const cpu::BlockEngine& engine, int32_t groups) {
    return size_t(Workspace(engine, nullptr, groups).pieces_.bytes());
  }

  Workspace(const cpu::BlockEngine& engine, void* memory, int32_t groups)
      : engine_(engine),
        pieces_(memory),
        order_(pieces_.take<int32_t>(groups)),
        first_task_(pieces_.take<int64_t>(int64_t{groups} + 1)),
        thread_bytes_(ThreadMemory(engine, nullptr).bytes),
        threads_(pieces_.take(cpu::num_threads(), thread_bytes_)) {}

  int32_t* order() const { return order_; }
  int64_t* first_task() const { return first_task_; }  // [groups + 1]
  ThreadMemory of(int thread) const { return {engine_, threads_ + thread * thread_bytes_}; }

 private:
  const cpu::BlockEngine& engine_;
  Pieces pieces_;
  int32_t* order_;
  int64_t* first_task_;
  int64_t thread_bytes_;
  char* threads_;
};

// The sums of one block into c; the next strip is fetched or packed meanwhile. `strip`: room for two.
void multiply_block(const cpu::BlockEngine& engine, const Group& g, const Block& block, char* panel,
                    char* strip, float* c);

// Adds the sums of one block to out[row * stride + col], for engines without `finish`.
void add_block(const cpu::BlockEngine& engine, const Group& g, const Block& block,
               const ThreadMemory& memory, float* out, int64_t stride);

// How a group is cut: blocks of equal rows, as wide as kBlockSums allows, or as kStripsBytes where
// sums are added; `smaller` times less columns, or rows.
struct Cut {
  int64_t rows, cols, row_blocks, tasks;

  Cut(const cpu::BlockEngine& engine, const Group& g, bool adds, int64_t smaller) {
    const int64_t group = engine.panel_rows;
    const int64_t most = std::max<int64_t>(1, kBlockRows / group / (adds ? smaller : 1)) * group;
    rows = round_up(ceil_div(g.rows, ceil_div(g.rows, most)), group);
    row_blocks = ceil_div(g.rows, rows);
    const int64_t depth = engine.packed_depth(std::min(g.depth, engine.depth_block));
    const int64_t strip = cpu::kStripRows * std::max<int64_t>(1, depth) * engine.element_bytes;
    const int64_t fit =
        adds ? kStripsBytes / strip : kBlockSums / rows / g.parts / smaller / cpu::kStripRows;
    cols = std::max<int64_t>(1, fit) * cpu::kStripRows;
    tasks = row_blocks * ceil_div(g.cols, cols);
  }
};

// Calls body(group, block, memory of the thread) for all blocks of all groups; group(i) describes
// group i. Groups without rows or columns have no blocks.
template <class GroupOf, class Body>
void run_blocks(const cpu::BlockEngine& engine, const Workspace& workspace, int32_t num_groups,
                const GroupOf& group, bool adds, const Body& body) {
  int32_t* order = workspace.order();
  int64_t* first = workspace.first_task();
  int32_t used = 0;
  int64_t* work = first;  // of group i, until the tasks are counted
  double total = 0;
  for (int32_t i = 0; i < num_groups; ++i) {
    const Group g = group(i);
    if (g.rows > 0 && g.cols > 0) order[used++] = i;
    work[i] = volume(g.rows, g.cols, std::max<int64_t>(g.depth, 1));
    total += double(work[i]) * g.parts;
  }
  std::sort(order, order + used,
            [&](int32_t a, int32_t b) { return work[a] != work[b] ? work[a] > work[b] : a < b; });
  const int threads = total < kAlone ? 1 : cpu::num_threads();
  // Blocks are as large as they can be unless that leaves threads idle; size changes no sum.
  int64_t smaller = 1;
  for (;; smaller *= 2) {
    first[0] = 0;
    for (int32_t i = 0; i < used; ++i)
      first[i + 1] = first[i] + Cut(engine, group(order[i]), adds, smaller).tasks;
    if (threads == 1 || first[used] >= 8 * threads || smaller >= 64) break;
  }
  cpu::parallel_tasks(first[used], threads, [&](int64_t task, int thread) {
    const int32_t at = int32_t(std::upper_bound(first, first + used + 1, task) - first) - 1;
    const Group g = group(order[at]);
    const Cut cut(engine, g, adds, smaller);
    const int64_t index = task - first[at];
    Block block;
    block.group = order[at];
    block.row = index % cut.row_blocks * cut.rows;
    block.rows = std::min(cut.rows, g.rows - block.row);
    block.col = index / cut.row_blocks * cut.cols;
    block.cols = std::min(cut.cols, g.cols - block.col);
    block.part_stride = round_up(block.cols, cpu::kStripRows);
    block.stride = block.part_stride * g.parts;
    block.thread = thread;
    const ThreadMemory memory = workspace.of(thread);
    block.c = memory.c;
    body(g, block, memory);
  });
}

// Calls sink(block) for all blocks of all groups; a group without depth has blocks of zeros.
template <class GroupOf, class Sink>
void run_groups(const cpu::BlockEngine& engine, const Workspace& workspace, int32_t num_groups,
                const GroupOf& group, const Sink& sink) {
  run_blocks(engine, workspace, num_groups, group, false,
             [&](const Group& g, const Block& block, const ThreadMemory& memory) {
               multiply_block(engine, g, block, memory.panel, memory.strip, memory.c);
               sink(block);
             });
}

// Adds the sums of group i to out + i * group_stride, rows `stride` apart; engines without `finish`.
template <class GroupOf>
void add_groups(const cpu::BlockEngine& engine, const Workspace& workspace, int32_t num_groups,
                const GroupOf& group, float* out, int64_t group_stride, int64_t stride) {
  run_blocks(engine, workspace, num_groups, group, true,
             [&](const Group& g, const Block& block, const ThreadMemory& memory) {
               add_block(engine, g, block, memory, out + block.group * group_stride, stride);
             });
}

}  // namespace kimi::grouped
