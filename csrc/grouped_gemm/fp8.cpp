// SPDX-License-Identifier: MIT
// The FP8 product: argument checks and the choice of the device.
#include "grouped_gemm/fp8.h"

#include <limits>

#include "common/dtype.h"
#include "common/engine.h"

namespace kimi {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

bool divides16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

Status check(const GroupedGemmFp8Params& p) {
  const char* op = "grouped_gemm_fp8";
  if (p.num_rows < 0 || p.k < 0 || p.n < 0)
    return invalid(op, ": R, K, N: expected 0 or more, got ", p.num_rows, ", ", p.k, ", ", p.n);
  if (p.num_rows > kMaxRows || p.k > kMaxRows - 128 || p.n > kMaxRows - 1024)
    return invalid(op, ": R, K, N: expected below 2^31, got ", p.num_rows, ", ", p.k, ", ", p.n,
                   "; split the product");
  if (p.num_experts < 1)
    return invalid(op, ": num_experts: expected 1 or more, got ", p.num_experts,
                   "; pass the number of offsets");
  if (!is_dtype(p.out_dtype))
    return invalid(op, ": out_dtype: expected a kimi_dtype (0..2), got ", int(p.out_dtype),
                   "; choose one of these");
  if (!p.offsets)
    return invalid(op, ": offsets: expected a pointer, got NULL; pass one end for each expert");
  if (p.num_rows == 0 || p.n == 0) return Status::ok();
  if (!p.out || (p.k > 0 && (!p.a || !p.a_scale || !p.b || !p.b_scale)))
    return invalid(
        op,
        ": a, a_scale, b, b_scale, out: expected pointers, got NULL; only empty ones may be "
        "NULL");
  if (p.k == 0) return Status::ok();
  if (p.a_scale_stride < p.num_rows || p.a_scale_stride % 4 != 0)
    return invalid(op, ": a_scale_stride: expected a multiple of 4, R = ", p.num_rows,
                   " or more, got ", p.a_scale_stride, "; pad the rows of a_scale");
  if (p.k % 16 != 0 || p.a_row_stride % 16 != 0 || (p.num_rows > 1 && p.a_row_stride < p.k))
    return invalid(op, ": K: expected K and a's row stride, K or more, to be multiples of 16, got ",
                   p.k, " and ", p.a_row_stride, "; pad both operands with zeros");
  if (!divides16(p.a) || !divides16(p.a_scale) || !divides16(p.b))
    return invalid(op, ": a, a_scale, b: expected addresses that 16 divides; copy them");
  return Status::ok();
}

}  // namespace

Status grouped_gemm_fp8(const GroupedGemmFp8Params& p, kimi_device device,
                        [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("grouped_gemm_fp8", grouped_gemm_fp8_cuda(p, stream));
  return error(KIMI_UNSUPPORTED,
               "grouped_gemm_fp8: device: expected cuda, got cpu; dequantise a and call "
               "grouped_gemm, which reads b as it is");
}

bool serves_grouped_gemm_fp8(kimi_device device) {
  if (device != KIMI_DEVICE_CUDA) return false;
#if defined(KIMI_OPS_CUDA)
  return serves_grouped_gemm_fp8_cuda();
#else
  return false;
#endif
}

}  // namespace kimi
