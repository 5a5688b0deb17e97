// SPDX-License-Identifier: MIT
// The Hopper products with kRows and kStore, bf16: forward and dgrad.
#include "gemm/sm90/store_rows.cuh"

namespace kimi::grouped::sm90 {
template Status store_rows<bf16>(const Job&, void*);
}
