// SPDX-License-Identifier: MIT
// The register tile of the vector engines: M rows of the panel by two vectors of the strip, with
// one broadcast of a panel element for each row and depth. Included by the ISA files only.
//
//            strip  s[d][0..kCols)          O::F        a vector of O::kLanes sums
//   panel    [ v0 ][ v1 ]                   O::kRows    rows of a packed panel group, M at most
//   p[d][0]  c00    c01    2 M sums in      O::Pack     a packed element: one depth (fp32) or two
//   p[d][1]  c10    c11    registers
#pragma once

#include <stdint.h>

#include "gemm/cpu/block.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

// Walks the lines of the next strip, two for each step of the first tile, so that they come from
// memory while this strip is multiplied: a full block has 256 steps, a strip 512 lines.
struct Ahead {
  Upcoming next;
  int steps = 0;

  void fetch() {
    __builtin_prefetch(next.data, 0, 2);  // the L2 cache
    __builtin_prefetch(next.data + next.second, 0, 2);
    next.data += next.advance;
    if (++steps == next.period) {
      steps = 0;
      next.data += next.jump;
    }
  }
};

template <class O, int M, bool kAhead>
void tile(const typename O::Pack* p, const typename O::Pack* s, int64_t depth, const Upcoming& next,
          float* c, int64_t stride, bool accumulate) {
  typename O::F sum[M][2];
  Ahead ahead{next};
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = O::set(0.0f);
  for (int64_t d = 0; d < depth; ++d, p += O::kRows, s += kStripRows) {
    const auto s0 = O::load_pack(s), s1 = O::load_pack(s + O::kLanes);
    if constexpr (kAhead) ahead.fetch();
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto x = O::broadcast(p + i);
      sum[i][0] = O::multiply_add(x, s0, sum[i][0]);
      sum[i][1] = O::multiply_add(x, s1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i, c += stride) {
    O::store(c, accumulate ? O::add(O::load(c), sum[i][0]) : sum[i][0]);
    float* right = c + O::kLanes;
    O::store(right, accumulate ? O::add(O::load(right), sum[i][1]) : sum[i][1]);
  }
}

// The tile for `rows` <= O::kRows: no work for the zero rows of a packed group.
template <class O, bool kAhead, int M = O::kRows>
void tile_of(int64_t rows, const typename O::Pack* p, const typename O::Pack* s, int64_t depth,
             const Upcoming& next, float* c, int64_t stride, bool accumulate) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<O, kAhead, M - 1>(rows, p, s, depth, next, c, stride, accumulate);
  tile<O, M, kAhead>(p, s, depth, next, c, stride, accumulate);
}

template <class O>
void multiply(const void* panel, int64_t rows, const void* strip, int64_t count,
              const Upcoming& next, float* c, int64_t stride, bool accumulate) {
  using Pack = typename O::Pack;
  const Pack* p = static_cast<const Pack*>(panel);
  const Pack* s = static_cast<const Pack*>(strip);
  const int64_t depth = (count + O::kPair - 1) / O::kPair;
  for (int64_t i = 0; i < rows; i += O::kRows, p += depth * O::kRows)
    for (int64_t j = 0; j < kStripRows; j += 2 * O::kLanes) {
      float* to = c + i * stride + j;
      if (next.data && i == 0 && j == 0)
        tile_of<O, true>(rows, p, s, depth, next, to, stride, accumulate);
      else
        tile_of<O, false>(rows - i, p, s + j, depth, next, to, stride, accumulate);
    }
}

}  // namespace
}  // namespace kimi::cpu
