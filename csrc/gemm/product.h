// SPDX-License-Identifier: MIT
// One product of groups, or of a batch, on CUDA: what ops ask of the matrix kernels.
//
//   C[i, j] = sum_d A[i, d] B[j, d] for each group e; what becomes of C is up to an epilogue
//
//   M-grouped  offsets divide the rows of A and C     forward, dgrad    B is one matrix a group
//   K-grouped  offsets divide the depth of A and B    wgrad             C is one matrix a group
//   batch      A, B and C are one matrix a group, all of one size; of C perhaps its lower triangle
//
// Two kernels do it: wgmma and TMA on Hopper (operands whose addresses and strides 16 bytes
// divide), mma.sync and cp.async everywhere else (any strides; fp32 by plain fma).
#pragma once

#include <cstdint>

#include "common/integer.h"
#include "common/status.h"

namespace kimi::gemm {

enum class Grouping { kM, kK, kBatch };

// A or B. `outer` is the dimension of C's rows (A) or columns (B). Row r of what offsets divide is
// row (index ? index[r] / divisor : r) of the data; index counts as checked.
struct Matrix {
  const void* data;
  int64_t outer_stride, depth_stride;  // elements
  int64_t group_stride = 0;            // of one matrix a group, elements
  const int32_t* index = nullptr;      // [R]
  int32_t divisor = 1;
};

struct Groups {
  const int32_t* offsets;  // [count] inclusive ends, on the device; a batch has none
  int64_t num_rows;        // R, of what they divide; M-grouped: rows from offsets[count-1] on are 0
  int32_t count;
  // Offsets and B are older than the kernel before this one on the stream, which does not write
  // them: they may be read before it has ended (device/overlap.cuh).
  bool older = false;
  // [count] first rows, where groups do not follow each other; else nullptr. M-grouped: only with an
  // epilogue that writes zeros, between the groups too.
  const int32_t* starts = nullptr;
};

struct Product {
  Grouping grouping;
  kimi_dtype dtype;  // of A and B; means nothing for FP8
  Matrix a, b;
  Groups groups;
  int64_t rows;           // of C for each group, unless M-grouped
  int64_t depth;          // unless K-grouped
  int64_t cols;           // that the epilogue writes: half the rows of B if it takes gate and up
  bool lower = false;     // a batch's tiles wholly above the diagonal are left out; rows == cols
  bool overlaps = false;  // on Hopper the kernel begins while the one before it ends
};

// Of FP8 operands, beside the product: A[r, k] of_rows[k / 128, r] and B[e, n, k] of_columns[e, n /
// 128, k / 128].
struct BlockScales {
  const float* of_rows;  // [ceil(K / 128), R], 16 bytes divide its rows
  int64_t row_stride;
  const float* of_columns;  // [E, ceil(N / 128), ceil(K / 128)], dense
};

// The epilogue of products that stand for themselves: out = round(C + bias), or out += C + bias.
struct StoreParams {
  void* out;  // M-grouped [R, cols], else [count, rows, cols]; columns contiguous
  int64_t row_stride, group_stride;
  kimi_dtype dtype;            // that of the product, or fp32; any for FP8
  const void* bias = nullptr;  // [count, cols], of the product's dtype (FP8: of out's)
  bool accumulate = false;     // zero rows, and groups without depth, are left alone
  bool wide = false;           // 16 bytes divide every address; product_cuda says
};

// The epilogue of a batch: D = alpha A B^T + beta C + delta I, rounded to the product's dtype, then
// times `unit` and rounded to d_dtype.
struct AffineParams {
  void* d;  // [count, rows, cols], columns contiguous
  int64_t d_row_stride, d_group_stride;
  kimi_dtype d_dtype;
  const void* c = nullptr;  // the same of the product's dtype; may be d; NULL: beta means nothing
  int64_t c_row_stride = 0, c_group_stride = 0;
  float alpha = 1, beta = 0, delta = 0, unit = 1;
};

// 16 bytes divide the address and the distance of rows, in elements of `size` bytes.
inline bool divides16(const void* address, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * size % 16 == 0;
}

// Tiles of C's lower triangle: row tile r has r / ratio + 1, of which `ratio` are as high as a tile
// is wide.
constexpr int64_t lower_tiles(int64_t row_tiles, int64_t ratio) {
  const int64_t whole = row_tiles / ratio;
  return ratio * (whole * (whole + 1) / 2) + row_tiles % ratio * (whole + 1);
}

// Tiles at most, whatever the offsets are: those that are not full are one in each group.
inline int64_t most_tiles(const Product& p, int64_t tile_rows, int64_t tile_cols) {
  if (p.grouping != Grouping::kM) {
    const int64_t row_tiles = ceil_div(p.rows, tile_rows);
    if (p.lower) return lower_tiles(row_tiles, tile_cols / tile_rows) * p.groups.count;
    return row_tiles * ceil_div(p.cols, tile_cols) * p.groups.count;
  }
  const int64_t rows = p.groups.num_rows;
  // The zero rows are groups too: those at the end, and those before each group.
  const int64_t groups = int64_t{p.groups.count} * (p.groups.starts != nullptr ? 2 : 1) + 1;
  const int64_t ragged = rows / tile_rows + groups;
  return (rows < ragged ? rows : ragged) * ceil_div(p.cols, tile_cols);
}

inline bool is_empty(const Product& p) {
  const int64_t rows = p.grouping == Grouping::kM ? p.groups.num_rows : p.rows;
  // M-grouped without groups: all rows are zero.
  return rows == 0 || p.cols == 0 || (p.groups.count == 0 && p.grouping != Grouping::kM);
}

// Whether the current device runs the Hopper kernels; an error where it runs none. Errors, here and
// below, are those of `op`.
Status is_hopper(const char* op, bool* hopper);

// Queues the product. Groups, rows and columns may be 0.
Status product_cuda(const char* op, const Product& p, const StoreParams& out, void* stream);

// Queues a batch. p.lower: D is symmetric, of C the lower triangle is read; the lower tiles are
// multiplied and their mirror image is stored with them. D may be C, but lies on neither A nor B.
// A matrix gives the same bits alone, in a batch and at any place of it.
Status affine_cuda(const char* op, const Product& p, const AffineParams& out, void* stream);

}  // namespace kimi::gemm
