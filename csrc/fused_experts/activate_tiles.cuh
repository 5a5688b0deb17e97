// SPDX-License-Identifier: MIT
// The activation on Hopper, in the registers of the sums: gate and up of one element are those of
// one thread, half of its sums apart. What comes of 16 rows leaves in boxes of 64 columns, by TMA.
//
//   sums --[g, u as they are]--> g := a(g) u --> stmatrix, rounded --> 2 KiB, swizzled --> TMA
//
// SiLU alone: the code of 64 values, written out, is long enough once. The other activations, biases,
// weights that come first, rows where a group ends and outputs that TMA cannot write take the way of
// sm_80's kernels, fused_experts/epilogue.cuh, whose arithmetic is the same: a row has the same bits
// on both.
//
// Cost: about 30 instructions for each of 64 values a thread and tile, as there; the way through a
// scratch of fp32, 16 bytes a value written and read, is saved.
#pragma once

#include "fused_experts/epilogue.cuh"
#include "gemm/sm90/finished.cuh"
#include "gemm/sm90/kernel.cuh"

namespace kimi::experts {

struct ActivateTilesParams {
  ActivateParams activate;
  TensorMap hidden, gate_up;  // [R, F]; [R, 2, F]
  bool by_tma;
};

template <class T>
class ActivateTiles {
  using Tiles = gemm::sm90::StoreTiles<T>;
  using Pieces = gemm::sm90::Finished<Activate<T>>;
  static constexpr int kBoxCols = 64, kBoxBytes = 16 * gemm::sm90::kRowBytes;

 public:
  using Params = ActivateTilesParams;
  static constexpr bool kGated = true, kWritesZeros = false, kTogether = false;
  static constexpr int kScratchBytes = Tiles::kScratchBytes;  // of a warp: two boxes
  static_assert(kScratchBytes >= Pieces::kScratchBytes && kScratchBytes == 2 * kBoxBytes);

  template <class X>
  __device__ static void run(const Params& params, const gemm::Product& p,
                             const gemm::sm90::Work& work, int32_t row, int valid,
                             float (&d)[X::kSums], char* scratch) {
    if (!params.by_tma || valid < 16) {
      if (params.by_tma) {  // the lanes write where TMA may still read
        if (lane_id() == 0) tma_store_wait_read<0>();
        warp_barrier();
      }
      return Pieces::template run<X>(params.activate, p, work, row, valid, d, scratch);
    }
    constexpr int kBoxes = X::kTileCols / kBoxCols, kUp = X::kSums / 2;
    int turn = 0;
    const auto send = [&]<int kBox>(const auto& store) {
      char* const box = scratch + turn * kBoxBytes;
      turn ^= 1;
      if (lane_id() == 0) tma_store_wait_read<1>();
      warp_barrier();
      Tiles::template fill_box<T, kBox>(d, box);
      fence_async_shared();
      warp_barrier();
      if (lane_id() != 0) return;
      store(box);
      tma_store_commit();
    };
    const auto finish_box = [&]<int kBox>() {
      const int32_t col = work.col + kBox * kBoxCols;
      if (col >= p.cols) return;
      if (params.activate.gate_up != nullptr) {
        send.template operator()<kBox>(
            [&](char* box) { tma_store(params.gate_up, box, col, 0, row); });
        send.template operator()<kBox + kBoxes>(
            [&](char* box) { tma_store(params.gate_up, box, col, 1, row); });
      }
      if (params.activate.hidden == nullptr) return;
#pragma unroll
      for (int i = kBox * kBoxCols / 2; i < (kBox + 1) * kBoxCols / 2; ++i)
        d[i] = gated<ActivationOps, KIMI_ACTIVATION_SILU, false>(d[i], d[kUp + i],
                                                                 params.activate.activation)
                   .value;
      send.template operator()<kBox>([&](char* box) { tma_store(params.hidden, box, col, row); });
    };
    [&]<int... kBox>(std::integer_sequence<int, kBox...>) {
      (finish_box.template operator()<kBox>(), ...);
    }(std::make_integer_sequence<int, kBoxes>());
    if (turn != 0 && lane_id() == 0) tma_store_commit();  // an empty group: the boxes alternate
  }
  __device__ static void end(const Params& params) {
    if (params.by_tma && lane_id() == 0) tma_store_wait<0>();
  }
};

template <class T>
Status run_activate(const gemm::Product& p, const ActivateParams& activate, void* stream) {
  using namespace gemm::sm90;
  ActivateTilesParams params{activate, {}, {}, false};
  params.by_tma = activate.activation.kind == KIMI_ACTIVATION_SILU && activate.wide &&
                  activate.bias == nullptr && activate.weights == nullptr;
  if (params.by_tma) {
    const int64_t row = p.cols * int64_t{sizeof(T)}, sizes[] = {p.cols, 2, p.groups.num_rows},
                  strides[] = {row, 2 * row}, flat[] = {p.cols, p.groups.num_rows};
    const int32_t box[] = {64, 1, 16}, flat_box[] = {64, 16};
    if (activate.hidden != nullptr)
      KIMI_RETURN_IF_ERROR(encode_tensor_map<T>(&params.hidden, activate.hidden, 2, flat, strides,
                                                flat_box, Swizzle::k128));
    if (activate.gate_up != nullptr)
      KIMI_RETURN_IF_ERROR(encode_tensor_map<T>(&params.gate_up, activate.gate_up, 3, sizes,
                                                strides, box, Swizzle::k128));
  }
  return run<Traits<T, gemm::Grouping::kM, Major::kDepth, ActivateTiles<T>, 128>>(p, params,
                                                                                  stream);
}

}  // namespace kimi::experts
