// SPDX-License-Identifier: MIT
// grouped_gemm of FP8 rows and FP8 blocks: the Hopper kernel with scales (gemm/sm90).
//
//   out[r, n] = sum_kb a_scale[r, kb] b_scale[e, n / 128, kb] sum_{k in kb} a[r, k] b[e, n, k]
//
// A cluster of two blocks takes 128 rows of a group x 2 x 192 columns; N that would waste over a
// tenth of them has tiles of 128. Where a group has at most 64 rows, 24 KiB of weights take 384
// cycles, a quarter of what memory needs to bring them, so decoding needs no tile of its own.
//
// Cost: 2 R K N operations; E N K bytes of weights where groups are small. Measured on an H100
// before the loads of row scales began at rows that 4 divides: 1.07 to 1.14 PFLOP/s at 4 groups of
// 8192 rows, K 7168, N 4096, the tensor pipe 71 % busy; 1.2 to 1.4 were expected, as DeepGEMM
// publishes for an H800 with tiles of about this size.
#include "gemm/sm90/kernel.cuh"
#include "grouped_gemm/fp8.h"

namespace kimi {
namespace {

using namespace gemm::sm90;
static_assert(kScaleDepth == fp8::kBlock);

template <int kTileCols>
using Fp8Traits = Traits<e4m3, gemm::Grouping::kM, Major::kDepth, StoreTiles<e4m3>, kTileCols>;

// Columns that are computed where N are wanted.
template <class X>
int64_t computed(int64_t n) {
  constexpr int64_t kCols = X::kCluster * X::kTileCols;
  return round_up(n, kCols);
}

}  // namespace

bool serves_grouped_gemm_fp8_cuda() {
  int sm = 0;
  return device_sm(sm).is_ok() && sm / 10 == 9;
}

Status grouped_gemm_fp8_cuda(const GroupedGemmFp8Params& p, void* stream) {
  if (p.num_rows == 0 || p.n == 0) return Status::ok();
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  if (sm / 10 != 9)
    return error(KIMI_UNSUPPORTED,
                 "grouped_gemm_fp8: device: expected compute capability 9.x, got ", sm / 10, ".",
                 sm % 10, "; dequantise a and b and call grouped_gemm");
  gemm::Product product{};
  product.grouping = gemm::Grouping::kM;
  product.a = {p.a, p.a_row_stride, 1};
  product.b = {p.b, p.k, 1, p.n * p.k};
  product.groups = {p.offsets, p.num_rows, p.num_experts};
  product.depth = p.k;
  product.cols = p.n;
  gemm::StoreParams out{};
  out.out = p.out;
  out.row_stride = p.n;
  out.dtype = p.out_dtype;
  out.bias = p.bias;
  return product_fp8(product, {p.a_scale, p.a_scale_stride, p.b_scale}, out, stream);
}

Status product_fp8(const gemm::Product& p, const gemm::BlockScales& scales,
                   const gemm::StoreParams& out, void* stream) {
  StoreTilesParams params{};
  params.out = out;
  params.out.wide = gemm::divides16(out.out, out.row_stride, size_of(out.dtype));
  const auto run = [&]<class X>() {
    if (trial().store != 0) KIMI_RETURN_IF_ERROR(encode_out<X>(p, 16, &params));
    return run_scaled<X>(p, scales, params, stream);
  };
  // The wide tile is worth up to a tenth of columns that nobody wants.
  if (10 * computed<Fp8Traits<192>>(p.cols) <= 11 * computed<Fp8Traits<128>>(p.cols))
    return run.template operator()<Fp8Traits<192>>();
  return run.template operator()<Fp8Traits<128>>();
}

}  // namespace kimi
