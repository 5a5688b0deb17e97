// SPDX-License-Identifier: MIT
// One product of groups on CUDA: what grouped_gemm and fused_experts ask of the matrix kernels.
//
//   C[i, j] = sum_d P[i, d] Q[j, d] for each group e, with what the epilogue makes of it
//
//   kRows   offsets divide the rows of P and C     forward, dgrad     Q is one matrix a group
//   kDepth  offsets divide the depth of P and Q    wgrad              C is one matrix a group
//
// Two kernels do it: wgmma and TMA on Hopper (16-bit operands whose addresses and strides 16 bytes
// divide), mma.sync and cp.async everywhere else (any strides; fp32 by plain fma).
#pragma once

#include <cstdint>

#include "common/status.h"

namespace kimi::grouped {

enum class Ragged { kRows, kDepth };
enum class Epilogue {
  kStore,             // out = round(C + bias) or out += C
  kActivate,          // [g; u] = C, two columns F apart: h = a(g) u
  kActivateBackward,  // C = dh before its weight: d[g; u], weight times h, partial <C, h>
};

// <C, h> of a row is summed by this many columns at first: column c in partial[row, c / 32].
inline constexpr int64_t kPartialColumns = 32;

// P or Q. `outer` is the dimension of C's rows (P) or columns (Q). Row r of what offsets divide is
// row (index ? index[r] / divisor : r) of the data; index counts as checked.
struct Matrix {
  const void* data;
  int64_t outer_stride, depth_stride;  // elements
  int64_t group_stride;                // of Q with kRows, elements
  const int32_t* index;                // [R] or nullptr
  int32_t divisor;
};

struct Product {
  Ragged ragged;
  Epilogue epilogue;
  kimi_dtype dtype;
  Matrix p, q;
  const int32_t* offsets;  // [E] inclusive ends, on the device
  int64_t num_rows;        // R; kRows zeroes out from row offsets[E-1] on
  int64_t rows;            // of C for each group, with kDepth
  int64_t depth;           // with kRows
  int64_t cols;            // of C; of h for the other epilogues, F: Q has 2 F rows for kActivate
  int32_t num_groups;
  bool wide_out;  // 16 bytes divide every address that the epilogue touches; product_cuda says

  // kStore
  void* out;  // kRows [R, cols], kDepth [E, rows, cols]; columns contiguous
  int64_t out_row_stride, out_group_stride;
  kimi_dtype out_dtype;  // dtype or fp32
  const void* bias;      // [E, cols] dtype or nullptr
  bool accumulate;       // kDepth: a group without rows is left alone

  // kActivate, kActivateBackward: dense, dtype. Rows from offsets[E-1] on are not written.
  kimi_activation activation;
  void* gate_up;          // [R, 2F]; kActivate: out or nullptr; kActivateBackward: in
  void* grad_gate_up;     // [R, 2F] out
  void* hidden;           // [R, F] out, nullptr where it is not wanted
  const int32_t* source;  // [R] pair of a row: weights[source[r]]
  const float* weights;
  float* partial;  // [R, ceil(F / kPartialColumns)] out
};

// Tiles at most, whatever the offsets are: those that are not full are one in each group.
inline int64_t most_tiles(const Product& p, int64_t tile_rows, int64_t tile_cols) {
  const bool of_rows = p.ragged == Ragged::kRows;
  const int64_t rows = of_rows ? p.num_rows : p.rows, full = rows / tile_rows;
  const int64_t ragged = full + p.num_groups + 1;  // the zero rows are a group too
  const int64_t row_tiles =
      of_rows ? (rows < ragged ? rows : ragged) : (full + (rows % tile_rows != 0)) * p.num_groups;
  return row_tiles * ((p.cols + tile_cols - 1) / tile_cols);
}

// Queues the product. Groups, rows and columns may be 0.
Status product_cuda(const Product& p, void* stream);

// The kernels behind it. A kernel is asked whether it can serve a product before it gets it.
Status product_sm80(const Product& p, void* stream);  // serves all
bool serves_sm90(const Product& p);
Status product_sm90(const Product& p, void* stream);

}  // namespace kimi::grouped
