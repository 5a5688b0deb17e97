// SPDX-License-Identifier: MIT
#include "cpu/vec_avx2.h"
#include "muon_clip/muon_clip_simd.h"

namespace kimi::muon_clip_cpu {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2>;
}  // namespace kimi::muon_clip_cpu
