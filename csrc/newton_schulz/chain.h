// SPDX-License-Identifier: MIT
// The iteration on one matrix, whatever its orientation in memory.
#pragma once

#include "newton_schulz/newton_schulz.h"

namespace kimi::newton_schulz_cpu {

// What all matrices of a call share. In memory a matrix is `lines` of `length` consecutive
// elements; the m x n form of newton_schulz.h has the lines as its rows, or across its rows.
struct ChainShape {
  int64_t lines, length;
  int64_t g_stride, x_stride;  // from line to line of input and output
  bool across;
  int64_t m, n;
  int shift;  // X is kept 2^shift times as large

  explicit ChainShape(const NewtonSchulzParams& p);
  size_t bytes(const NewtonSchulzParams& p, int threads) const;
};

// x = the image of g; workspace: ChainShape::bytes(p, threads), 64-byte aligned.
void chain(const NewtonSchulzParams& p, const ChainShape& shape, const void* g, void* x,
           char* workspace, int threads);

}  // namespace kimi::newton_schulz_cpu
