// SPDX-License-Identifier: MIT
// What the host decides about a product for Hopper, from shapes and addresses alone.
#pragma once

#include "device/major.h"
#include "gemm/product.h"

namespace kimi::gemm {
struct AffineWork;
}

namespace kimi::gemm::sm90 {

// Whether the 16-bit kernels can take the product's operands. What they make of C is not asked.
bool serves(const Product& p);

// How A of a batch, and B, lie in memory; their tiles lie the same way.
Major a_major(const Product& p);
Major b_major(const Product& p);

// Tiles of 128 columns in place of 256, for a product that is stored as it is: where the wide ones
// would be half empty, or too few for all multiprocessors. No sum has another order for it.
bool is_narrow(const Product& p);

// Queues a product that serves() says yes to.
Status store(const Product& p, const StoreParams& out, bool narrow, void* stream);

// Queues a batch that serves() says yes to.
template <class T>
Status affine(const Product& p, const AffineWork& out, bool narrow, void* stream);

// A file each, which compile side by side: by type and grouping.
template <class T>
Status store_m(const Product& p, const StoreParams& out, bool narrow, void* stream);
template <class T>
Status store_k(const Product& p, const StoreParams& out, void* stream);

}  // namespace kimi::gemm::sm90
