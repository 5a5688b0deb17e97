// SPDX-License-Identifier: MIT
// One matrix of a stack of weights, whatever its storage, as an operand of products.
#pragma once

#include "common/integer.h"
#include "gemm/cpu/block.h"

namespace kimi::grouped {

// Matrix e [rows, columns] as the strip operand: its rows, or transposed its columns.
inline cpu::Operand matrix_of(const kimi_expert_weights& w, int64_t e, int64_t rows,
                              int64_t columns, bool transposed) {
  cpu::Operand s;
  s.storage = cpu::Storage(w.storage);
  s.row_stride = transposed ? w.column_stride : w.row_stride;
  s.depth_stride = transposed ? w.row_stride : w.column_stride;
  if ((transposed ? rows : columns) == 1) s.depth_stride = 1;
  const char* data = static_cast<const char*>(w.data);
  const int64_t at = data ? e * w.expert_stride : 0;  // empty weights may have no memory
  if (w.storage == KIMI_STORAGE_FP8_BLOCK) {
    s.data = data + at;
    s.scale_stride = ceil_div(columns, kFp8Block);
    s.scale = static_cast<const float*>(w.scale) + e * ceil_div(rows, kFp8Block) * s.scale_stride;
  } else if (w.storage == KIMI_STORAGE_INT4_GROUP) {
    s.data = data + at / 2;
    s.scale_stride = ceil_div(columns, kInt4Group);
    s.scale = static_cast<const bf16*>(w.scale) + e * rows * s.scale_stride;
  } else {
    s.data = data + at * size_of(kimi_dtype(w.storage));
  }
  return s;
}

}  // namespace kimi::grouped
