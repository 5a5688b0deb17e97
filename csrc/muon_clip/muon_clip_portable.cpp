// SPDX-License-Identifier: MIT
#include "cpu/vec_portable.h"
#include "muon_clip/muon_clip_simd.h"

namespace kimi::muon_clip_cpu {
extern const CpuEngine kPortableEngine = kEngine<cpu::Portable>;
}  // namespace kimi::muon_clip_cpu
