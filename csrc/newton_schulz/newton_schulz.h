// SPDX-License-Identifier: MIT
// newton_schulz: the singular values of a matrix driven towards 1 by odd polynomials.
//
//   X <- G / ||G||_F      [m, n], m <= n; a tall matrix is read transposed where it lies
//   AOL                   e_i = sqrt(sum_j |X X^T|_ij)      X <- diag(1 / e) X, where asked for
//   for (a, b, c):        A = X X^T          B = b A + c A^2          X <- a X + B X
//
//   standard    every product in full               K (4 m^2 n + 2 m^3) operations
//   symmetric   A and B by their lower blocks       K (3 m^2 n + m^3); the bits of standard
//   gram        R = X X^T once; Z = b R + c R^2, Q <- Q Z + a Q (first Z + a I),
//               R <- Z (R Z + a R) + a (R Z + a R); X <- Q X at the end and before each restart
//               3 (1 + restarts) m^2 n + (4 K - 3 (1 + restarts)) m^3
//
// Every product sums in fp32 in ascending depth (gemm/cpu/block.h) and rounds once to `dtype`, the norm
// is taken in fp32 in a fixed order:
//   e       the exponent that brings the largest |g| into [0.5, 1), within -126..126
//   sums    16 partial sums of (g 2^-e)^2 a row of the m x n form, by column % 16, fma, ascending;
//           a tree of halves over the 16, rows added in fp64 in ascending order
//   x       (g 2^-e) / max(norm, eps 2^-e), and 0 for a norm of 0; so 2^k g gives the bits of g
//   e_i     from A = X X^T in dtype (fp16: 2^14 A, whose entries would be subnormal): 16 sums of
//           |A_ij| by j % 16 in fp32, their tree, the root; at least eps / max(norm, eps), so that
//           eps bounds what a row is divided by; below 2^-60 a row counts as zero
//   x, A    (g 2^-e) / (max(norm, eps 2^-e) e_i) and A_ij / (e_i e_j): no second product
// On CUDA the norm is the root of a sum in fp64, e its exponent; Q begins as Z + a I rounded once, and
// R <- Q (R Q) where it does; standard is symmetric; a product's sums are the tensor cores' (elements.cuh,
// on_chip.cuh, stack.cu).
// fp16 ends at 6e-5 and an entry is about 1 / sqrt(m n): there x is kept 2^s times as large, which
// the first product of each Gram matrix and the output undo exactly.
//
// Cost: 2048 x 7168, 5 steps: 687 GFLOP standard, 494 symmetric, 301 gram with one restart; each
// product reads its operands once to pack them and its blocks from the L2 cache and beyond.
// Threads share one matrix block by block; many small matrices go to one thread each. Neither
// changes a bit. Source: K. Jordan et al., Muon (2024); the Gram form: Dao-AILab (2026); AOL:
// Boissin et al., Turbo-Muon (2025).
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using MatrixProductParams = kimi_matrix_product_params;
using NewtonSchulzParams = kimi_newton_schulz_params;

size_t matrix_product_workspace_bytes(const MatrixProductParams& p, kimi_device device);
Status matrix_product(const MatrixProductParams& p, kimi_device device, void* stream);
Status matrix_product_cuda(const MatrixProductParams& p, void* stream);
size_t newton_schulz_workspace_bytes(const NewtonSchulzParams& p, kimi_device device);
Status newton_schulz(const NewtonSchulzParams& p, kimi_device device, void* stream);

namespace newton_schulz_cuda {

// p has been checked and is not empty.
size_t workspace_bytes(const NewtonSchulzParams& p);
Status run(const NewtonSchulzParams& p, void* stream);

}  // namespace newton_schulz_cuda

namespace newton_schulz_cpu {

// Sums of a block of D = alpha A B^T + beta C + delta I on their way to memory.
struct Tile {
  const float* sums;   // [rows, 32]
  int64_t rows, cols;  // cols <= 32
  int64_t diagonal;    // element (i, i + diagonal) lies on the diagonal of D
  bool lower;          // nothing beyond the diagonal
  const void* c;       // dtype; may be d; NULL: no C
  void* d;             // d_dtype
  int64_t c_stride, d_stride;
  float alpha, beta, delta;
  float unit;  // D is rounded to dtype, then times unit and rounded to d_dtype
  kimi_dtype dtype, d_dtype;
};

// Passes over runs of n consecutive elements, and the way of sums to memory.
struct CpuEngine {
  float (*largest)(const void* x, kimi_dtype dtype, int64_t n);  // max |x|, NaN left out
  // lanes[j % 16] += (x[j] scale)^2
  void (*squares_along)(const void* x, kimi_dtype dtype, int64_t n, float scale, float lanes[16]);
  // lanes[j % 16] += |x[j] scale|
  void (*sizes_along)(const void* x, kimi_dtype dtype, int64_t n, float scale, float lanes[16]);
  // sums[j] += (x[j] scale)^2
  void (*squares_across)(const void* x, kimi_dtype dtype, int64_t n, float scale, float* sums);
  // y[j] = x[j] scale / (divisor each[j]); each NULL: 1
  void (*divide)(const void* x, kimi_dtype dtype, int64_t n, float scale, float divisor,
                 const float* each, void* y, kimi_dtype y_dtype);
  void (*store)(const Tile& tile);
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace newton_schulz_cpu
}  // namespace kimi
