// SPDX-License-Identifier: MIT
// Rows to FP8 on Hopper, which rounds to e4m3 in hardware: the kernel is in fp8_rows.cuh.
#include "fp8_rows/fp8_rows.cuh"

namespace kimi {

Status fp8_rows_sm90(const Fp8RowsParams& p, void* stream) { return fp8::run_rows(p, stream); }

}  // namespace kimi
