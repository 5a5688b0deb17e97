// SPDX-License-Identifier: MIT
#include "cpu/vec_portable.h"
#include "qk_clip/qk_clip_simd.h"

namespace kimi::qk_clip_cpu {
extern const CpuEngine kPortableEngine = kEngine<cpu::Portable>;
}  // namespace kimi::qk_clip_cpu
