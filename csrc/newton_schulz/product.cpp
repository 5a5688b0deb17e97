// SPDX-License-Identifier: MIT
#include "newton_schulz/product.h"

#include <algorithm>
#include <cstring>

namespace kimi::newton_schulz_cpu {
namespace {

using cpu::kStripRows;

// Copies D's elements of a tile below the diagonal to their places above it.
template <class T>
void mirror(T* d, int64_t stride, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  T block[kStripRows][kStripRows];
  const int64_t end = row + rows;
  for (int64_t i0 = std::max(row, col); i0 < end; i0 += kStripRows) {
    const int64_t n = std::min(kStripRows, end - i0);
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(block[i], d + (i0 + i) * stride + col,
                  size_t(std::min(cols, i0 + i - col + 1)) * sizeof(T));
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = std::max<int64_t>(0, col + j + 1 - i0); i < n; ++i)
        d[(col + j) * stride + i0 + i] = block[i][j];
  }
}

void store(const Product& p, const gemm::DenseBlock& b) {
  const int64_t size = size_of(p.dtype), d_size = size_of(p.d_dtype);
  const char* c = static_cast<const char*>(p.c);
  char* d = static_cast<char*>(p.d);
  Tile t = {};
  t.sums = b.sums;
  t.rows = b.rows;
  t.cols = b.cols;
  t.diagonal = b.row - b.col;
  t.lower = p.symmetric;
  t.c = c ? c + (b.row * p.c_stride + b.col) * size : nullptr;
  t.d = d + (b.row * p.d_stride + b.col) * d_size;
  t.c_stride = p.c_stride;
  t.d_stride = p.d_stride;
  t.alpha = p.alpha;
  t.beta = p.beta;
  t.delta = p.delta;
  t.unit = p.unit;
  t.dtype = p.dtype;
  t.d_dtype = p.d_dtype;
  kEngines.best().store(t);
  if (!p.symmetric) return;
  if (d_size == 2)
    mirror(static_cast<uint16_t*>(p.d), p.d_stride, b.row, b.rows, b.col, b.cols);
  else
    mirror(static_cast<uint32_t*>(p.d), p.d_stride, b.row, b.rows, b.col, b.cols);
}

}  // namespace

void multiply(const Product& p, void* scratch, int threads) {
  gemm::multiply_dense(
      {p.a, p.b, p.rows, p.cols, p.depth, p.symmetric, p.dtype},
      [&](const gemm::DenseBlock& block) { store(p, block); }, scratch, threads);
}

}  // namespace kimi::newton_schulz_cpu
