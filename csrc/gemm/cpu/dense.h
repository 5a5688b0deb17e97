// SPDX-License-Identifier: MIT
// One large product C = A B^T on block products (block.h), by all threads.
//
//   pack       A into panels, B into strips of 32 rows, once, by all threads
//   multiply   panel x up to 16 strips at a time, depth block by depth block; sums of a task stay
//              in the L2 cache until they go to the caller
//
//              strips of B ->                     lower: tasks stop at the diagonal, and a strip
//     panels   [##][##][##]..   task              that crosses it starts at its own group of rows
//     of A     [##][##]  |
//
// Every element of C is a sum over depth in an order of its own: how rows are cut into panels, and
// which thread takes a task, shows in no bit.
#pragma once

#include <functional>

#include "cpu/parallel.h"
#include "gemm/cpu/block.h"

namespace kimi::gemm {

struct Dense {
  cpu::Operand a, b;  // [rows, depth], [cols, depth]
  int64_t rows = 0, cols = 0, depth = 0;
  bool lower = false;               // rows == cols: what lies wholly above the diagonal is left out
  kimi_dtype dtype = KIMI_FLOAT32;  // of the operands
};

// Finished sums of rows [row, row + rows) and columns [col, col + cols) of C.
struct DenseBlock {
  const float* sums;  // [rows, cpu::kStripRows]
  int64_t row, rows, col, cols;
};

size_t dense_scratch_bytes(int64_t rows, int64_t cols, int64_t depth, kimi_dtype dtype,
                           int threads);
// Calls sink(block) for all blocks, from the threads that made them. `threads`: 1, or all that
// cpu::parallel_tasks takes. scratch: 64-byte aligned.
void multiply_dense(const Dense& p, const std::function<void(const DenseBlock&)>& sink,
                    void* scratch, int threads);

// body(task, thread) for every task, in this thread alone where threads is 1.
template <class Body>
void tasks(int64_t n, int threads, const Body& body) {
  if (threads > 1) return cpu::parallel_tasks(n, body);
  for (int64_t task = 0; task < n; ++task) body(task, 0);
}

}  // namespace kimi::gemm
