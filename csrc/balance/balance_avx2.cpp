// SPDX-License-Identifier: MIT
// The losses on AVX2.
#include "balance/balance_z_loss_simd.h"
#include "topk_gate/ops_avx2.h"

namespace kimi::balance {

extern const CpuEngine kAvx2Engine = {sum_shares<Avx2>, balance_gradient<Avx2>, sum_squares<Avx2>,
                                      z_gradient<Avx2>};

}  // namespace kimi::balance
