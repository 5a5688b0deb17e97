// SPDX-License-Identifier: MIT
// grouped_gemm of FP8 rows and FP8 blocks on Hopper: TMA, wgmma, a cluster of two blocks.
//
//   out[r, n] = sum_kb a_scale[r, kb] b_scale[e, n / 128, kb] sum_{k in kb} a[r, k] b[e, n, k]
//
//   cluster    128 rows of a group x 2 x kCols columns: each block has columns of its own; each
//              loads 64 rows of A into both
//   block      warpgroup 0: one thread loads stages of 128 of depth and hands tiles on
//              warpgroups 1, 2: 64 rows each; m64nNk32 into partial sums, then
//              total += a_scale b_scale partial by fma
//
//   consumer 1   | wgmma kb | promote | wgmma kb+1 | promote |        the tensor cores have one
//   consumer 2        | wgmma kb | promote | wgmma kb+1 | ...         while the other promotes
//
// Consumer 2 begins when the first partial of 1 is done: while both have work they keep that
// distance. Two partials a thread would overlap as well, but their registers are better spent on
// 192 columns instead of 128: the L2 is asked for a byte every 256 C / (64 + C) operations, 192 of
// them instead of 171, and wgmma for 2 + C / 32 KiB of shared memory in C / 2 cycles, 85 bytes a
// cycle of 128 instead of 96. N that would waste over a tenth of them has tiles of 128.
//
// Where a group has at most 64 rows, consumer 2 is idle and the upper half of A unread: 24 KiB of
// weights then take 384 cycles, a quarter of what memory needs to bring them, so decoding needs no
// tile of its own.
//
// Cost: 2 R K N operations; E N K bytes of weights where groups are small. Measured on an
// H100: 1.07 to 1.14 PFLOP/s at 4 groups of 8192 rows, K 7168, N 4096, the tensor pipe 71 %
// busy; 1.2 to 1.4 were expected, as DeepGEMM publishes for an H800 with tiles of about this size.
#include <algorithm>

#include "device/cluster.cuh"
#include "device/launch.cuh"
#include "device/registers.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90/produce_scaled.cuh"
#include "gemm/sm90/promote.cuh"

namespace kimi {
namespace {

using namespace fp8;

// The stage may be loaded anew, here and in the other block.
__device__ inline void release(MBarrier& empty) {
  warp_barrier();
  if (lane_id() < kCluster) mbarrier_arrive_in(empty, lane_id());
}

// Sums of the consumer's 64 rows. `first`: the consumers take their distance.
template <class Tr>
__device__ void multiply(typename Tr::Shared& s, const Work& work, int consumer, Place& stage,
                         bool first, float (&total)[Tr::kSums]) {
  constexpr Major kMajor = Major::kDepth;
  const int row = (work.row & 3) + warp_id() % 4 * 16 + lane_id() / 4;  // of the loaded scales
  if (first && consumer == 1) mbarrier_wait(s.turn, 0);
  float partial[Tr::kSums];
  for (int kb = 0; kb < work.k_blocks; ++kb, stage.next(Tr::kStages)) {
    mbarrier_wait(s.full[stage.at], stage.parity);
    const uint64_t a =
        wgmma_descriptor<kMajor>(s.a[stage.at] + consumer * kConsumerRows * kRowBytes);
    const uint64_t b = wgmma_descriptor<kMajor>(s.b[stage.at]);
    wgmma_fence(partial);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma<e4m3, Tr::kCols, kMajor, kMajor>(partial, wgmma_advance<kMajor>(a, step),
                                             wgmma_advance<kMajor>(b, step), step > 0);
    wgmma_commit();
    float factor[Tr::kChunks][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float of_row = s.a_scale[stage.at][consumer][row + 8 * half];
#pragma unroll
      for (int c = 0; c < Tr::kChunks; ++c)
        factor[c][half] = mul_rn(of_row, s.b_scale[stage.at][c]);
    }
    wgmma_wait<0>();
    wgmma_fence(partial);
    release(s.empty[stage.at]);
    if (first && kb == 0 && consumer == 0 && lane_id() == 0) mbarrier_arrive(s.turn);
    promote(total, partial, factor);
  }
}

template <class Tr>
__device__ void store(const Arguments& p, const Work& work, int first_row,
                      float (&total)[Tr::kSums], unsigned char* scratch) {
  if (p.out_dtype == KIMI_BFLOAT16)
    Store<Tr, bf16>::run(p, work, first_row, total, scratch);
  else if (p.out_dtype == KIMI_FLOAT16)
    Store<Tr, fp16>::run(p, work, first_row, total, scratch);
  else
    Store<Tr, float>::run(p, work, first_row, total, scratch);
}

template <class Tr>
__device__ void consume(const Arguments& p, typename Tr::Shared& s, int consumer) {
  const int warp = warp_id() % 4, first_row = consumer * kConsumerRows + warp * 16;
  Place stage;
  for (uint32_t tile = 0;; ++tile) {
    const uint32_t slot = tile % kTileSlots;
    mbarrier_wait(s.tile_full[slot], tile / kTileSlots % 2);
    const Work& work = s.tiles[slot];  // read anew where registers are free
    if (work.group < 0) return;
    float total[Tr::kSums] = {};
    if (work.rows > consumer * kConsumerRows && work.k_blocks > 0) {
      multiply<Tr>(s, work, consumer, stage, tile == 0, total);
    } else {
      for (int kb = 0; kb < work.k_blocks; ++kb, stage.next(Tr::kStages)) {
        mbarrier_wait(s.full[stage.at], stage.parity);
        release(s.empty[stage.at]);
      }
    }
    if (work.rows > first_row) store<Tr>(p, work, first_row, total, s.scratch[consumer * 4 + warp]);
    warp_barrier();
    if (lane_id() == 0) mbarrier_arrive(s.tile_empty[slot]);
  }
}

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_fp8_kernel(const __grid_constant__ Arguments p,
                            const __grid_constant__ Maps maps) {
  KIMI_SHARED(typename Tr::Shared, shared);
  typename Tr::Shared& s = *shared;
  if (threadIdx.x == 0) {
    if (p.k_blocks > 0) {
      tma_prefetch(maps.a);
      tma_prefetch(maps.a_scale);
      tma_prefetch(maps.b);
    }
    for (int i = 0; i < Tr::kStages; ++i) {
      mbarrier_init(s.full[i], 1);
      mbarrier_init(s.empty[i], kCluster * kConsumerWarps);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      mbarrier_init(s.tile_full[i], 1);
      mbarrier_init(s.tile_empty[i], kConsumerWarps);
    }
    mbarrier_init(s.turn, 4);
    mbarrier_fence_init();
  }
  cluster_arrive();
  cluster_wait();
  const int warpgroup = warp_id() / 4;
  if (warpgroup == 0) {
    registers_decrease<40>();
    if (warp_id() == 0) produce<Tr>(p, s, maps);
  } else {
    registers_increase<232>();
    consume<Tr>(p, s, warpgroup - 1);
  }
  // The other block still loads into this one and arrives at its barriers.
  cluster_arrive();
  cluster_wait();
}

template <class Tr>
Status run(const GroupedGemmFp8Params& p, Arguments arguments, void* stream) {
  Maps maps{};
  if (p.k > 0) {
    const int64_t a_sizes[2] = {p.k, p.num_rows}, scale_sizes[2] = {p.num_rows, blocks(p.k)};
    const int64_t b_sizes[3] = {p.k, p.n, p.num_experts}, b_strides[2] = {p.k, p.n * p.k};
    const int64_t scale_stride = p.a_scale_stride * static_cast<int64_t>(sizeof(float));
    const int32_t a_box[2] = {kBlock, kConsumerRows}, scale_box[2] = {kScaleRows, 1};
    const int32_t b_box[3] = {kBlock, Tr::kCols, 1};
    KIMI_RETURN_IF_ERROR(
        encode_tensor_map<e4m3>(&maps.a, p.a, 2, a_sizes, &p.a_row_stride, a_box, Swizzle::k128));
    KIMI_RETURN_IF_ERROR(encode_tensor_map<float>(&maps.a_scale, p.a_scale, 2, scale_sizes,
                                                  &scale_stride, scale_box, Swizzle::kNone));
    KIMI_RETURN_IF_ERROR(
        encode_tensor_map<e4m3>(&maps.b, p.b, 3, b_sizes, b_strides, b_box, Swizzle::k128));
  }
  const auto kernel = grouped_gemm_fp8_kernel<Tr>;
  constexpr size_t kShared = sizeof(typename Tr::Shared);
  const int64_t pairs = (p.n + kCluster * Tr::kCols - 1) / (kCluster * Tr::kCols);
  const int64_t most = kCluster * pairs * (p.num_rows / kTileRows + p.num_experts + 1);
  const int64_t grid =
      std::min<int64_t>(most, resident_blocks(kernel, kThreads, kShared, kCluster));
  LaunchConfig config{dim3(static_cast<unsigned>(grid)), dim3(kThreads), kShared, stream};
  config.cluster = kCluster;
  return launch(kernel, config, arguments, maps);
}

// Columns that are computed where N are wanted.
template <class Tr>
int64_t computed(int64_t n) {
  constexpr int64_t kPair = kCluster * Tr::kCols;
  return (n + kPair - 1) / kPair * kPair;
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
  Arguments arguments{};
  arguments.offsets = p.offsets;
  arguments.b_scale = p.b_scale;
  arguments.bias = p.bias;
  arguments.out = p.out;
  arguments.num_rows = p.num_rows;
  arguments.cols = static_cast<int32_t>(p.n);
  arguments.k_blocks = static_cast<int32_t>(blocks(p.k));
  arguments.num_groups = p.num_experts;
  arguments.out_dtype = p.out_dtype;
  const int64_t size = size_of(p.out_dtype);
  arguments.wide_out = reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.n * size % 16 == 0;
  // The wide tile is worth up to a tenth of columns that nobody wants.
  if (10 * computed<Traits<192>>(p.n) <= 11 * computed<Traits<128>>(p.n))
    return run<Traits<192>>(p, arguments, stream);
  return run<Traits<128>>(p, arguments, stream);
}

}  // namespace kimi
