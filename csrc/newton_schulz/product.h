// SPDX-License-Identifier: MIT
// One matrix product of the iteration: a dense product (gemm/cpu/dense.h) and what becomes of its
// sums. Of a symmetric result the upper blocks are copies of the lower ones.
#pragma once

#include "gemm/cpu/dense.h"
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

// scratch: gemm::dense_scratch_bytes, 64-byte aligned.
void multiply(const Product& p, void* scratch, int threads);

}  // namespace kimi::newton_schulz_cpu
