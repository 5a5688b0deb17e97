// SPDX-License-Identifier: MIT
// The portable engine: the passes one element at a time.
#include "cpu/vec_portable.h"
#include "newton_schulz/newton_schulz_simd.h"

namespace kimi::newton_schulz_cpu {
extern const CpuEngine kPortableEngine = kEngine<cpu::Portable>;
}  // namespace kimi::newton_schulz_cpu
