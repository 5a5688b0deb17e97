// SPDX-License-Identifier: MIT
#include "cpu/vec_avx2.h"
#include "qk_clip/qk_clip_simd.h"

namespace kimi::qk_clip_cpu {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2>;
}  // namespace kimi::qk_clip_cpu
