// SPDX-License-Identifier: MIT
// FP8 rows, as DeepSeek-V3 trains and serves.
//
//   x[r, k] = data[r, k] scale[r, k / 128]     scale = max |x| of the 128 columns / 448
//
// Scales of rows lie with the rows side by side, [ceil(K / 128), R]: those of a tile of rows are
// then one TMA box of each block of depth. With a plan (permute/permute.h) a token's row is
// quantised once and written to the rows of all its experts; padding rows are quantised zeros.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace kimi {

using Fp8RowsParams = kimi_fp8_rows_params;

Status fp8_rows(const Fp8RowsParams& p, kimi_device device, void* stream);

// fp8_rows.cu, fp8_rows_sm90.cu. Arguments have been checked.
Status fp8_rows_cuda(const Fp8RowsParams& p, void* stream);
Status fp8_rows_sm90(const Fp8RowsParams& p, void* stream);

namespace fp8 {

inline constexpr int kBlock = 128;                  // values of one scale, along K and N
inline constexpr float kMax = 448.0f;               // largest e4m3 value
inline constexpr float kSmallestScale = 0x1p-126f;  // below it a scale has few bits

inline int64_t blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

}  // namespace fp8
}  // namespace kimi
