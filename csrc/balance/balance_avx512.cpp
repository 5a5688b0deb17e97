// SPDX-License-Identifier: MIT
// The losses on AVX-512.
#include "balance/balance_z_loss_simd.h"
#include "topk_gate/ops_avx512.h"

namespace kimi::balance {

extern const CpuEngine kAvx512Engine = {sum_shares<Avx512>, balance_gradient<Avx512>,
                                        sum_squares<Avx512>, z_gradient<Avx512>};

}  // namespace kimi::balance
