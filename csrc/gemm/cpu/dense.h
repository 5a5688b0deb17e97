// SPDX-License-Identifier: MIT
// One matrix product of the iteration on block products (gemm/cpu/block.h).
//
//   pack       A into panels, B into strips of 32 rows, once, by all threads
//   multiply   panel x up to 16 strips at a time, depth block by depth block; sums of a task stay
//              in the L2 cache and go through Tile into D
//
//              strips of B ->                     symmetric: tasks stop at the diagonal, and a
//              strip
//     panels   [##][##][##]..   task              that crosses it starts at its own group of rows;
//     of A     [##][##]  |                        D's upper blocks are copies
//
// Every element of D is a sum over depth in an order of its own: how rows are cut into panels, and
// which thread takes a task, shows in no bit.
#pragma once

#include "cpu/parallel.h"
#include "gemm/cpu/block.h"
#include "newton_schulz/newton_schulz.h"

namespace kimi::newton_schulz_cpu {

// D = alpha A B^T + beta C + delta I. D may lie on A, B or C.
struct Product {
  cpu::Operand a, b;  // [rows, depth], [cols, depth]
  int64_t rows = 0, cols = 0, depth = 0;
  bool symmetric = false;  // D is: rows == cols, of C the lower triangle is read
  float alpha = 1, beta = 0, delta = 0;
  const void* c = nullptr;  // [rows, cols] dtype
  void* d = nullptr;        // [rows, cols] d_dtype, rounded to dtype before `unit`
  int64_t c_stride = 0, d_stride = 0;
  kimi_dtype dtype = KIMI_FLOAT32, d_dtype = KIMI_FLOAT32;
  float unit = 1;
};

size_t product_scratch_bytes(int64_t rows, int64_t cols, int64_t depth, kimi_dtype dtype,
                             int threads);
// `threads`: 1, or all that cpu::parallel_tasks takes. scratch: 64-byte aligned.
void multiply(const Product& p, void* scratch, int threads);

// body(task, thread) for every task, in this thread alone where threads is 1.
template <class Body>
void tasks(int64_t n, int threads, const Body& body) {
  if (threads > 1) return cpu::parallel_tasks(n, body);
  for (int64_t task = 0; task < n; ++task) body(task, 0);
}

}  // namespace kimi::newton_schulz_cpu
