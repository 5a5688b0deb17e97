// SPDX-License-Identifier: MIT
#include "cpu/vec_avx512.h"
#include "permute/permute_simd.h"

namespace kimi::permutation {
extern const CpuEngine kAvx512Engine = kEngine<cpu::Avx512>;
}  // namespace kimi::permutation
