// SPDX-License-Identifier: MIT
// What the host decides about a product for Hopper, from shapes and addresses alone.
#pragma once

#include "device/major.h"
#include "gemm/product.h"

namespace kimi::gemm {
struct AffineWork;
}

namespace kimi::gemm::sm90 {

// What measurements may change, by KIMI_OPS_TRIAL=name=value,...: every value but epilogue=0 and
// promote=0 gives the same bits.
// Where it is set at the first launch it is read again at each one, so that variants take turns.
struct Trial {
  int32_t swizzle = 16;   // 1..256 row tiles share a column tile before the next one comes
  int32_t turn = 1;       // each column and group begins with another row tile
  int32_t lead = 0;       // stages that consumer 0 is ahead of consumer 1 at the start of a tile
  int32_t boxes = 1;      // K-grouped: a stage of an operand by one load
  int32_t prefetch = 1;   // fp32 that is added to comes into the L2 a tile ahead
  int32_t order = 2;      // FP8: promote.cuh
  int32_t permute = 425;  // fused_experts.cu: width from which on tokens are permuted first,
  int32_t gather = 1024;  // where there are more rows than these
  int32_t noinc = 1;      // the barrier of a stage counts gathered copies; 0: threads wait for them
  int32_t store = 0;      // FP8: C by TMA, store.cuh
  int32_t epilogue = 1;   // 0: sums are dropped and nothing is written, to see what that costs
  int32_t promote = 1;    // FP8; 0: a thread adds one partial sum a block, which is wrong: its cost
};
Trial& trial();
// Of its text. A wrong name or value is said and not obeyed.
Trial trial_of(const char* text);

// Whether the 16-bit kernels can take the product's operands. What they make of C is not asked.
bool serves(const Product& p);

// How A of a batch, and B, lie in memory; their tiles lie the same way.
Major a_major(const Product& p);
Major b_major(const Product& p);

// Tiles of 128 columns in place of 256, for a product that is stored as it is, where the wide ones
// are so few that it ends earlier. No sum has another order for it.
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
