// SPDX-License-Identifier: MIT
#include "cpu/vec_portable.h"
#include "permute/permute_simd.h"

namespace kimi::permutation {
extern const CpuEngine kPortableEngine = kEngine<cpu::Portable>;
}  // namespace kimi::permutation
