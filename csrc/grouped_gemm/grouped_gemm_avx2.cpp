// SPDX-License-Identifier: MIT
#include "cpu/vec_avx2.h"
#include "grouped_gemm/store_simd.h"

namespace kimi::grouped {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2>;
}  // namespace kimi::grouped
