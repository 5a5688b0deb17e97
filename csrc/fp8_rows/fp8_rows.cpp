// SPDX-License-Identifier: MIT
// FP8 rows: argument checks, the choice of the device, rows on the CPU.
#include "fp8_rows/fp8_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dtype.h"
#include "common/engine.h"
#include "cpu/parallel.h"

namespace kimi {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

Status check(const Fp8RowsParams& p) {
  const char* op = "fp8_rows";
  if (p.num_rows < 0 || p.k < 0)
    return invalid(op, ": R, K: expected 0 or more, got ", p.num_rows, ", ", p.k);
  if (p.num_rows > kMaxRows)
    return invalid(op, ": R: expected below 2^31 rows, got ", p.num_rows, "; split the rows");
  if (!is_dtype(p.dtype))
    return invalid(op, ": dtype: expected a kimi_dtype (0..2), got ", int(p.dtype));
  if (p.scale_stride < p.num_rows)
    return invalid(op, ": scale_stride: expected R = ", p.num_rows, " or more, got ",
                   p.scale_stride);
  if (p.num_rows > 0 && p.k > 0 && (!p.x || !p.data || !p.scale))
    return invalid(op, ": x, data, scale: expected pointers, got NULL");
  return Status::ok();
}

template <class T>
void quantize_block(const T* x, int64_t count, e4m3* data, float& scale) {
  float most = 0.0f;
  bool nan = false;
  for (int64_t k = 0; k < count; ++k) {
    const float size = std::fabs(to_float(x[k]));
    most = std::max(most, size);
    nan |= size != size;
  }
  scale = std::max(most / fp8::kMax, fp8::kSmallestScale);
  if (nan) scale = std::numeric_limits<float>::quiet_NaN();
  for (int64_t k = 0; k < count; ++k) data[k] = from_float<e4m3>(to_float(x[k]) / scale);
}

void quantize_rows(const Fp8RowsParams& p) {
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(p.k, 1));
  cpu::parallel_for(p.num_rows, grain, [&](int64_t first, int64_t last) {
    dispatch(p.dtype, [&]<class T>() {
      for (int64_t r = first; r < last; ++r)
        for (int64_t k = 0; k < p.k; k += fp8::kBlock)
          quantize_block(static_cast<const T*>(p.x) + r * p.x_row_stride + k,
                         std::min<int64_t>(fp8::kBlock, p.k - k),
                         static_cast<e4m3*>(p.data) + r * p.k + k,
                         p.scale[k / fp8::kBlock * p.scale_stride + r]);
    });
  });
}

}  // namespace

Status fp8_rows(const Fp8RowsParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("fp8_rows", fp8_rows_cuda(p, stream));
  quantize_rows(p);
  return Status::ok();
}

}  // namespace kimi
