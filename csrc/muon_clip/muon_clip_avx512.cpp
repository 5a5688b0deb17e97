// SPDX-License-Identifier: MIT
#include "cpu/vec_avx512.h"
#include "muon_clip/muon_clip_simd.h"

namespace kimi::muon_clip_cpu {
extern const CpuEngine kAvx512Engine = kEngine<cpu::Avx512>;
}  // namespace kimi::muon_clip_cpu
