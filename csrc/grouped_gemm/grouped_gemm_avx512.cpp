// SPDX-License-Identifier: MIT
#include "cpu/vec_avx512.h"
#include "grouped_gemm/store_simd.h"

namespace kimi::grouped {
extern const CpuEngine kAvx512Engine = kEngine<cpu::Avx512>;
}  // namespace kimi::grouped
