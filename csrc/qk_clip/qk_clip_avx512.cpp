// SPDX-License-Identifier: MIT
#include "cpu/vec_avx512.h"
#include "qk_clip/qk_clip_simd.h"

namespace kimi::qk_clip_cpu {
extern const CpuEngine kAvx512Engine = kEngine<cpu::Avx512>;
}  // namespace kimi::qk_clip_cpu
