// SPDX-License-Identifier: MIT
#include "balance/balance_z_loss_simd.h"
#include "cpu/vec_avx512.h"

namespace kimi::balance {
extern const CpuEngine kAvx512Engine = kEngine<cpu::Avx512>;
}  // namespace kimi::balance
