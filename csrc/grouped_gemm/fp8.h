// SPDX-License-Identifier: MIT
// The product of FP8 rows with FP8 blocks of weights, as DeepSeek-V3 trains and serves.
//
//   out[r, n] = sum_kb a_scale[r, kb] b_scale[e, n / 128, kb] partial + bias[e, n]
//   partial   = sum of 128 products of e4m3 values, kept by the tensor core
#pragma once

#include <cstdint>

#include "common/status.h"
#include "fp8_rows/fp8_rows.h"
#include "gemm/product.h"

namespace kimi {

using GroupedGemmFp8Params = kimi_grouped_gemm_fp8_params;

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, kimi_device device, void* stream);

// Whether the current device has the product's kernel.
bool serves_grouped_gemm_fp8(kimi_device device);

// fp8_sm90.cu. Arguments have been checked, offsets have not.
Status grouped_gemm_fp8_cuda(const GroupedGemmFp8Params& p, void* stream);
bool serves_grouped_gemm_fp8_cuda();
// The M-grouped product on a GPU that is served.
Status product_fp8(const gemm::Product& p, const gemm::BlockScales& scales,
                   const gemm::StoreParams& out, void* stream);

}  // namespace kimi
