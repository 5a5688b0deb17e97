// SPDX-License-Identifier: MIT
#include "cpu/vec_portable.h"
#include "grouped_gemm/store_simd.h"

namespace kimi::grouped {
extern const CpuEngine kPortableEngine = kEngine<cpu::Portable>;
}  // namespace kimi::grouped
