// SPDX-License-Identifier: MIT
#include "cpu/vec_avx2.h"
#include "permute/permute_simd.h"

namespace kimi::permutation {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2>;
}  // namespace kimi::permutation
