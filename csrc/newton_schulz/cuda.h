// SPDX-License-Identifier: MIT
// newton_schulz on CUDA: what the host decides about a call, and what its kernels are told.
//
//   on chip    m up to 128 (fp32: 64): one launch, everything but X in shared memory   on_chip.cuh
//   on chips   m up to 256 (fp32: 128), Hopper: the same by clusters of blocks   on_chip_sm90.cu
//   stack      AOL and the rest: X in a stack [E, lines, length]; products over it   stack.cu
//
// Which one a matrix takes depends on its shape, the dtype, the number of steps and the device, so
// that its bits do not depend on its company.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/integer.h"
#include "newton_schulz/shape.h"

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
#error "newton_schulz: kernel parameters of more than 4 KB need CUDA 12.1"
#endif

namespace kimi::newton_schulz_cuda {

inline constexpr int kTileRows = 16, kTileCols = 32;     // of an elementwise pass, by a warp
inline constexpr int kMostMatrices = 512;                // of a launch: pointers are parameters
inline constexpr int kMostSteps = 128;                   // of the kernels on chip
inline constexpr int64_t kWorkspace = int64_t{1} << 30;  // bytes, or those of one matrix

inline constexpr int64_t tiles_of(int64_t rows, int64_t cols) {
  return ceil_div(rows, kTileRows) * ceil_div(cols, kTileCols);
}

// How the m x n form of a matrix lies: element (i, j) at i stride + j, or at i + j stride.
struct Lines {
  int64_t stride;
  int32_t across;
  int32_t wide;  // 16 bytes divide the address and the stride
  kimi_dtype dtype;
};

struct Matrices {
  const void* g[kMostMatrices];
  void* x[kMostMatrices];
};

// X <- (Q + beta I) X with Q a polynomial of the Gram matrix, which is formed anew where `fresh`.
// standard, symmetric: every step is fresh, and a is kept out of Q.
struct Step {
  float a, b, c;
  int32_t fresh;
};

Step step_of(const NewtonSchulzParams& p, int32_t k);
inline bool keeps_a_out(const NewtonSchulzParams& p) { return p.method != KIMI_NEWTON_SCHULZ_GRAM; }

// How g and x lie, for the matrices first ... first + count - 1.
Lines lines_of_g(const NewtonSchulzParams& p, const ChainShape& s, int64_t first, int64_t count);
Lines lines_of_x(const NewtonSchulzParams& p, const ChainShape& s, int64_t first, int64_t count);

// m, at most.
inline constexpr int most_side_of_block(kimi_dtype dtype) {
  return dtype == KIMI_FLOAT32 ? 64 : 128;
}
inline constexpr int most_side_of_cluster(kimi_dtype dtype) {
  return 2 * most_side_of_block(dtype);
}
size_t on_chip_bytes(const NewtonSchulzParams& p, const ChainShape& s);
Status on_chip(const NewtonSchulzParams& p, const ChainShape& s, void* stream);
Status on_chips(const NewtonSchulzParams& p, const ChainShape& s, void* stream);

// `at_once` matrices go through together; the workspace is theirs.
int64_t matrices_at_once(const NewtonSchulzParams& p, const ChainShape& s);
size_t stack_bytes(const NewtonSchulzParams& p, const ChainShape& s, int64_t at_once);
Status stack(const NewtonSchulzParams& p, const ChainShape& s, int64_t at_once, void* stream);

}  // namespace kimi::newton_schulz_cuda
