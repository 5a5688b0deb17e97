// SPDX-License-Identifier: MIT
// The Hopper products with kRows and kStore, fp16: forward and dgrad.
#include "grouped_gemm/store_rows_sm90.cuh"

namespace kimi::grouped::sm90 {
template Status store_rows<fp16>(const Job&, void*);
}
