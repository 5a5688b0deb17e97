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

template <class X>
Status run(const gemm::Product& product, const GroupedGemmFp8Params& p,
           const StoreTilesParams& params, void* stream) {
  ScaledInputs in{};
  KIMI_RETURN_IF_ERROR(encode_inputs<X>(product, &in));
  in.column_scales = p.b_scale;
  if (p.k > 0) {
    const int64_t sizes[] = {p.num_rows, fp8::blocks(p.k)};
    const int64_t stride = p.a_scale_stride * static_cast<int64_t>(sizeof(float));
    const int32_t box[] = {kScaleRows, 1};
    KIMI_RETURN_IF_ERROR(encode_tensor_map<float>(&in.row_scales, p.a_scale, 2, sizes, &stride, box,
                                                  Swizzle::kNone));
  }
  return launch_product<X>(product, in, params, stream);
}

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
  StoreTilesParams params{};
  params.out.out = p.out;
  params.out.row_stride = p.n;
  params.out.dtype = p.out_dtype;
  params.out.bias = p.bias;
  params.out.wide = gemm::divides16(p.out, p.n, size_of(p.out_dtype));
  // The wide tile is worth up to a tenth of columns that nobody wants.
  if (10 * computed<Fp8Traits<192>>(p.n) <= 11 * computed<Fp8Traits<128>>(p.n))
    return run<Fp8Traits<192>>(product, p, params, stream);
  return run<Fp8Traits<128>>(product, p, params, stream);
}

}  // namespace kimi
