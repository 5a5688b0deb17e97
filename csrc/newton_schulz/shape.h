// SPDX-License-Identifier: MIT
// How matrices lie, for every engine.
#pragma once

#include <algorithm>
#include <bit>

#include "common/dtype.h"
#include "newton_schulz/newton_schulz.h"

namespace kimi {

// AOL's first Gram matrix in fp16 is 2^kGramLift times as large: its entries, 1 / m and less, keep
// their bits, and its largest are 2^14.
inline constexpr int kGramLift = 14;
// Of a row that counts: the product of two such roots is in range.
inline constexpr float kLeastRoot = 0x1p-60f;

// What all matrices of a call share. In memory a matrix is `lines` of `length` consecutive
// elements; the m x n form of newton_schulz.h has the lines as its rows, or across its rows.
struct ChainShape {
  int64_t lines, length;
  int64_t g_stride, x_stride;  // from line to line of input and output
  bool across;
  int64_t m, n;
  int shift;  // X is kept 2^shift times as large

  explicit ChainShape(const NewtonSchulzParams& p) {
    const bool rows_are_lines = p.g_col_stride == 1 || p.cols == 1;
    lines = rows_are_lines ? p.rows : p.cols;
    length = rows_are_lines ? p.cols : p.rows;
    g_stride = rows_are_lines ? p.g_row_stride : p.g_col_stride;
    x_stride = rows_are_lines ? p.x_row_stride : p.x_col_stride;
    // A square matrix is its own m x n form, whichever way it lies.
    across = lines > length || (lines == length && !rows_are_lines);
    m = std::min(lines, length);
    n = std::max(lines, length);
    const int bits = std::bit_width(uint64_t(m) * uint64_t(n));
    shift = p.dtype == KIMI_FLOAT16 ? std::min(10, (bits - 1) / 2) : 0;
  }
};

}  // namespace kimi
