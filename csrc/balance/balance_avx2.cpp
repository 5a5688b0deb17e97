// SPDX-License-Identifier: MIT
#include "balance/balance_z_loss_simd.h"
#include "cpu/vec_avx2.h"

namespace kimi::balance {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2>;
}  // namespace kimi::balance
