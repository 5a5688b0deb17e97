// SPDX-License-Identifier: MIT
// What the host decides about a product for sm_80 before it chooses an instantiation, from shapes
// and addresses alone.
#pragma once

#include <optional>

#include "device/major.h"
#include "gemm/product.h"

namespace kimi::gemm {
struct AffineWork;
}

namespace kimi::gemm::sm80 {

struct Job {
  Product product;
  Major a_major, b_major;  // of A's and B's tiles
  bool few_rows;           // tiles of 16 rows
  // Memory is contiguous in the direction of the tiles, and 16 bytes divide every address, stride
  // and extent there.
  bool wide_a, wide_b;
};

// `b_major`: what the epilogue's kernels want of B's tiles; nothing: either, as in a batch.
Status make_job(const char* op, const Product& p, std::optional<Major> b_major, Job* job);

// One for each type, in files of their own that compile side by side.
template <class T>
Status store(const Job& job, const StoreParams& out, void* stream);
template <class T>
Status affine(const Job& job, const AffineWork& out, void* stream);

}  // namespace kimi::gemm::sm80
