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

// What tiles do beside their products, a step for each of theirs: nothing;
struct Alone {
  void step() {}
};

// the lines of the next strip come from memory, two a step of the first tile: a full block has 256
// steps, a strip 512 lines;
struct Fetch {
  Upcoming next;
  int steps = 0;

  void step() {
    __builtin_prefetch(next.data, 0, 2);  // the L2 cache
    __builtin_prefetch(next.data + next.second, 0, 2);
    next.data += next.advance;
    if (++steps == next.period) {
      steps = 0;
      next.data += next.jump;
    }
  }
};

// or the next strip is packed, a line a step of the first two tiles: 32 depths of a row become words
// of 16 rows of pairs. Only the vector units are busy with products: moving words costs nothing there.
struct PackPairs {
  const char* from;
  uint32_t* to;
  int64_t row_bytes, after, lines;
  int64_t left = kStripRows;  // rows of these depths
  const char* written;        // lines that the next 32 depths will lie in

  explicit PackPairs(const Upcoming& next)
      : from(next.data),
        to(static_cast<uint32_t*>(next.strip)),
        row_bytes(next.row_bytes),
        after(next.after),
        lines(next.strip ? next.count : 0),
        written(lines ? reinterpret_cast<const char*>(to + 16 * kStripRows) : nullptr) {}

  void step() {
    if (lines == 0) return;
    --lines;
    __builtin_prefetch(from + after, 0, 2);
    __builtin_prefetch(written, 1);  // stores that miss wait for each other
    written += 64;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      uint64_t two;
      __builtin_memcpy(&two, from + 8 * i, sizeof two);
      to[2 * i * kStripRows] = uint32_t(two);
      to[(2 * i + 1) * kStripRows] = uint32_t(two >> 32);
    }
    from += row_bytes;
    ++to;
    if (--left == 0) {
      left = kStripRows;
      from += 64 - kStripRows * row_bytes;
      to += 15 * kStripRows;
    }
  }
};

template <class O, int M, class Beside>
void tile(const typename O::Pack* p, const typename O::Pack* s, int64_t depth, Beside& beside,
          float* c, int64_t stride, bool accumulate) {
  typename O::F sum[M][2];
  Beside work = beside;  // in registers
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = O::set(0.0f);
  for (int64_t d = 0; d < depth; ++d, p += O::kRows, s += kStripRows) {
    const auto s0 = O::load_pack(s), s1 = O::load_pack(s + O::kLanes);
    work.step();
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto x = O::broadcast(p + i);
      sum[i][0] = O::multiply_add(x, s0, sum[i][0]);
      sum[i][1] = O::multiply_add(x, s1, sum[i][1]);
    }
  }
  beside = work;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i, c += stride) {
    O::store(c, accumulate ? O::add(O::load(c), sum[i][0]) : sum[i][0]);
    float* right = c + O::kLanes;
    O::store(right, accumulate ? O::add(O::load(right), sum[i][1]) : sum[i][1]);
  }
}

// The tile for `rows` <= O::kRows: no work for the zero rows of a packed group.
template <class O, class Beside, int M = O::kRows>
void tile_of(int64_t rows, const typename O::Pack* p, const typename O::Pack* s, int64_t depth,
             Beside beside, float* c, int64_t stride, bool accumulate) {
  if constexpr (M > 1)
    if (rows < M)
      return tile_of<O, Beside, M - 1>(rows, p, s, depth, beside, c, stride, accumulate);
  tile<O, M>(p, s, depth, beside, c, stride, accumulate);
}

template <class O>
void multiply(const void* panel, int64_t rows, const void* strip, int64_t count,
              const Upcoming& next, float* c, int64_t stride, bool accumulate) {
  using Pack = typename O::Pack;
  const Pack* p = static_cast<const Pack*>(panel);
  const Pack* s = static_cast<const Pack*>(strip);
  const int64_t depth = (count + O::kPair - 1) / O::kPair;
  [[maybe_unused]] PackPairs packing(next);
  bool fetch = next.data && !next.strip;
  for (int64_t i = 0; i < rows; i += O::kRows, p += depth * O::kRows)
    for (int64_t j = 0; j < kStripRows; j += 2 * O::kLanes, fetch = false) {
      float* to = c + i * stride + j;
      if constexpr (O::kPair == 2)
        if (packing.lines > 0 && rows - i >= O::kRows) {
          tile<O, O::kRows>(p, s, depth, packing, to, stride, accumulate);
          continue;
        }
      if (fetch)
        tile_of<O>(rows - i, p, s, depth, Fetch{next}, to, stride, accumulate);
      else
        tile_of<O>(rows - i, p, s + j, depth, Alone{}, to, stride, accumulate);
    }
  if constexpr (O::kPair == 2)
    while (packing.lines > 0) packing.step();
}

}  // namespace
}  // namespace kimi::cpu
