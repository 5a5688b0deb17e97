// SPDX-License-Identifier: MIT
// What the host decides about a product for sm_80 before it chooses an instantiation, from shapes
// and addresses alone.
#pragma once

#include "gemm/product.h"

namespace kimi::grouped {

enum class Major { kDepth, kOuter };  // the direction in which a tile is contiguous

struct Sm80Job {
  Product product;
  Major q_major;  // of Q's tiles, for kStore with kRows
  bool few_rows;  // tiles of 16 rows
  // Memory is contiguous in the direction of the tiles, and 16 bytes divide every address, stride
  // and extent there.
  bool wide_p, wide_q;
};

// One for each dtype, in files of their own that compile side by side.
Status product_bf16(const Sm80Job& job, void* stream);
Status product_fp16(const Sm80Job& job, void* stream);
Status product_fp32(const Sm80Job& job, void* stream);

}  // namespace kimi::grouped
