// SPDX-License-Identifier: MIT
// Rows to FP8 on any GPU: the kernel is in fp8_rows.cuh.
#include "fp8_rows/fp8_rows.cuh"

namespace kimi {

Status fp8_rows_cuda(const Fp8RowsParams& p, void* stream) {
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  if (sm / 10 == 9) return fp8_rows_sm90(p, stream);
  return fp8::run_rows(p, stream);
}

}  // namespace kimi
