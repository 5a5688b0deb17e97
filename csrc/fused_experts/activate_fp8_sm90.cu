// SPDX-License-Identifier: MIT
// The FP8 product of gate and up on Hopper that ends in FP8: gate and up of one element are those
// of one thread, half of its sums apart, and the 128 columns of a scale those of four lanes.
//
//   sums --[g, u]--> a(g) u in place of g --> max of 4 lanes --> scale --> / scale, rounded
//        --> 2 KiB of 16 rows x 128, swizzled --> TMA
//
// A tile is 128 rows x 128 columns of h, for that is a block of the rows' scales: the two products
// of a stage take turns with one set of partial sums (gemm/sm90/promote.cuh). SiLU is written out;
// the others go round a loop of 2 values a thread, for their code is long.
//
// Cost: R F (1 + 4 / 128) bytes, where h in bf16 and a pass that quantises it move R F (2 + 2 + 1).
// *Predicted* epilogue: 1550 instructions a warp for SiLU and 850 to quantise, by SASS, so 2400
// cycles of a consumer, hidden as far as the other one multiplies meanwhile.
#include <algorithm>

#include "fp8_rows/quantize.cuh"
#include "fused_experts/activate_fp8.h"
#include "fused_experts/epilogue.cuh"
#include "gemm/sm90/kernel.cuh"

namespace kimi::experts {
namespace {

using gemm::sm90::kRowBytes;

struct Fp8TilesParams {
  ActivateFp8Params out;
  TensorMap map;  // of out.data, boxes of 128 x 16
};

class ActivateFp8 {
 public:
  using Params = Fp8TilesParams;
  static constexpr bool kGated = true, kWritesZeros = false, kTogether = false;
  static constexpr int kScratchBytes = 16 * kRowBytes;  // of a warp: its rows

  template <class X>
  __device__ static void run(const Params& params, const gemm::Product& p,
                             const gemm::sm90::Work& work, int32_t row, int valid,
                             float (&d)[X::kSums], char* box) {
    static_assert(X::kTileCols == fp8::kBlock && X::kSums == fp8::kBlock);
    if (work.col >= p.cols) return;
    activate(params.out.activation, d);
    const bool by_tma = valid >= 16;
    if (lane_id() == 0) tma_store_wait_read<0>();  // of the tile before
    warp_barrier();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t most = 0;
#pragma unroll
      for (int i = 2 * half; i < kValues; i += 4)
        most = std::max({most, fp8::size_bits(d[i]), fp8::size_bits(d[i + 1])});
      most = std::max(most, warp_exchange(most, 1));
      most = std::max(most, warp_exchange(most, 2));
      const float scale = fp8::scale_of(float_of(most));
      const fp8::Divide divide(scale);
      const int r = lane_id() / 4 + 8 * half;
      if (lane_id() % 4 == 0 && r < valid)
        params.out.scale[work.col / fp8::kBlock * params.out.scale_stride + row + r] = scale;
#pragma unroll
      for (int j = 0; j < kValues / 4; ++j) {
        const float* const at = d + 4 * j + 2 * half;
        const int byte = 8 * j + lane_id() % 4 * 2;
        *reinterpret_cast<uint16_t*>(box + r * kRowBytes + (byte ^ ((r % 8) << 4))) =
            static_cast<uint16_t>(round_pair_e4m3(divide(at[0]), divide(at[1])));
      }
    }
    if (by_tma) fence_async_shared();
    warp_barrier();
    if (!by_tma) return copy(params, work.col, p.cols, row, valid, box);
    if (lane_id() != 0) return;
    tma_store(params.map, box, work.col, row);
    tma_store_commit();
  }
  __device__ static void end(const Params&) {
    if (lane_id() == 0) tma_store_wait<0>();
  }

 private:
  static constexpr int kValues = 64, kStep = 2;  // of h a thread, a turn of the loop

  // h in place of g.
  __device__ static void activate(const Activation& activation, float (&d)[2 * kValues]) {
    if (activation.kind == KIMI_ACTIVATION_SILU) {
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        d[i] = gated<ActivationOps, KIMI_ACTIVATION_SILU, false>(d[i], d[kValues + i], activation)
                   .value;
      return;
    }
#pragma unroll 1
    for (int first = 0; first < kValues; first += kStep) {
      float g[kStep], u[kStep];
      visit_step(first, [&]<int kFirst>() {
#pragma unroll
        for (int i = 0; i < kStep; ++i) g[i] = d[kFirst + i], u[i] = d[kValues + kFirst + i];
      });
      with_activation(activation.kind, [&]<kimi_activation kActivation>() {
#pragma unroll
        for (int i = 0; i < kStep; ++i)
          g[i] = gated<ActivationOps, kActivation, false>(g[i], u[i], activation).value;
      });
      visit_step(first, [&]<int kFirst>() {
#pragma unroll
        for (int i = 0; i < kStep; ++i) d[kFirst + i] = g[i];
      });
    }
  }
  // The numbers of registers are fixed: visit<first>().
  template <class Visitor>
  __device__ static void visit_step(int first, const Visitor& visit) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
      ((first == kIndex * kStep ? visit.template operator()<kIndex * kStep>() : void()), ...);
    }(std::make_integer_sequence<int, kValues / kStep>());
  }

  // Rows where a group ends: a lane's 16 bytes of every fourth row.
  __device__ static void copy(const Params& params, int32_t col, int64_t cols, int32_t row,
                              int valid, const char* box) {
    const int piece = lane_id() % 8;
    uint8_t* const to = static_cast<uint8_t*>(params.out.data) + col + 16 * piece;
#pragma unroll 1
    for (int r = lane_id() / 8; r < valid; r += 4)
      store16(to + (int64_t{row} + r) * cols,
              load16(box + r * kRowBytes + ((piece ^ (r % 8)) << 4)));
    warp_barrier();
  }
};

using Fp8Traits = gemm::sm90::Traits<e4m3, gemm::Grouping::kM, Major::kDepth, ActivateFp8, 128>;

}  // namespace

Status activate_fp8(const gemm::Product& p, const gemm::BlockScales& scales,
                    const ActivateFp8Params& out, void* stream) {
  if (gemm::is_empty(p)) return Status::ok();
  Fp8TilesParams params{out, {}};
  const int64_t sizes[] = {p.cols, p.groups.num_rows};
  const int32_t box[] = {kRowBytes, 16};
  KIMI_RETURN_IF_ERROR(
      encode_tensor_map<e4m3>(&params.map, out.data, 2, sizes, &p.cols, box, Swizzle::k128));
  return gemm::sm90::run_scaled<Fp8Traits>(p, scales, params, stream);
}

}  // namespace kimi::experts
