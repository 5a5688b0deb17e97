// SPDX-License-Identifier: MIT
// The permutation on AVX-512 (F, BW, VL): 16 columns a vector, 64-byte stores around the cache.
#include "cpu/vec_avx512.h"
#include "permute/permute_simd.h"

namespace kimi::permutation {

extern const CpuEngine kAvx512Engine = {permute<cpu::Avx512Vec>, unpermute<cpu::Avx512Vec>,
                                        unpermute_backward<cpu::Avx512Vec>};

}  // namespace kimi::permutation
