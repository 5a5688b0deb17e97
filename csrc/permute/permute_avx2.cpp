// SPDX-License-Identifier: MIT
// The permutation on AVX2, FMA and F16C: 8 columns a vector, 32-byte stores around the cache.
#include "cpu/vec_avx2.h"
#include "permute/permute_simd.h"

namespace kimi::permutation {

extern const CpuEngine kAvx2Engine = {permute<cpu::Avx2Vec>, unpermute<cpu::Avx2Vec>,
                                      unpermute_backward<cpu::Avx2Vec>};

}  // namespace kimi::permutation
