// SPDX-License-Identifier: MIT
// Block products in plain C++: the definition of the packed forms, [depth][4 or 32 rows] fp32.
#include <algorithm>
#include <cstring>

#include "gemm/cpu/block.h"
#include "gemm/cpu/block_element.h"

namespace kimi::cpu {
namespace {

constexpr int64_t kRows = 4, kDepthBlock = 256;

void pack(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count, int64_t width,
          float* to) {
  for (int64_t d = 0; d < count; ++d)
    for (int64_t r = 0; r < width; ++r)
      to[d * width + r] = r < rows ? read_element(x, row + r, depth + d) : 0.0f;
}

void pack_panel(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                void* panel) {
  float* to = static_cast<float*>(panel);
  for (int64_t done = 0; done < count; done += kDepthBlock) {
    const int64_t block = std::min(kDepthBlock, count - done);
    for (int64_t r = 0; r < rows; r += kRows, to += block * kRows)
      pack(x, row + r, std::min(kRows, rows - r), depth + done, block, kRows, to);
  }
}

void pack_strip(const Operand& x, int64_t row, int64_t rows, int64_t depth, int64_t count,
                void* strip) {
  pack(x, row, rows, depth, count, kStripRows, static_cast<float*>(strip));
}

void multiply(const void* panel, int64_t rows, const void* strip, int64_t count, const Upcoming&,
              float* c, int64_t stride, bool accumulate) {
  const float* p = static_cast<const float*>(panel);
  const float* s = static_cast<const float*>(strip);
  for (int64_t i = 0; i < rows; i += kRows, p += count * kRows)
    for (int64_t r = 0; r < kRows; ++r) {
      float sum[kStripRows] = {};
      for (int64_t d = 0; d < count; ++d)
        for (int64_t j = 0; j < kStripRows; ++j) sum[j] += p[d * kRows + r] * s[d * kStripRows + j];
      float* to = c + (i + r) * stride;
      for (int64_t j = 0; j < kStripRows; ++j) to[j] = accumulate ? to[j] + sum[j] : sum[j];
    }
}

}  // namespace

extern const BlockEngine kPortableBlocks = {kRows,    kDepthBlock, 1, 4, pack_panel, pack_strip,
                                            multiply, nullptr,     0, 0, nullptr,    nullptr};

}  // namespace kimi::cpu
