// SPDX-License-Identifier: MIT
// What the host decides about a product for Hopper, from shapes and addresses alone.
#pragma once

#include "gemm/product.h"

namespace kimi::grouped::sm90 {

enum class Shape { kWide, kNarrow, kFew };  // of a tile: traits_sm90.cuh

struct Job {
  Product product;
  bool q_outer;  // Q is contiguous along outer
  Shape shape;
  bool paired;  // clusters of two blocks
};

// What product_sm90 makes of a product that serves_sm90 says yes to; and the kernel of a job. Tests
// change the job in between: small products take the narrow shapes only.
Job make_job(const Product& p);
Status run_job(const Job& job, void* stream);

// A file each, which compile side by side: by dtype and family.
template <class T>
Status store_rows(const Job& job, void* stream);  // kRows, kStore
template <class T>
Status store_depth(const Job& job, void* stream);  // kDepth
template <class T>
Status activate(const Job& job, void* stream);  // kActivate and kActivateBackward

}  // namespace kimi::grouped::sm90
