// SPDX-License-Identifier: MIT
//
// One kernel for each family of csrc/device, built twice from this file: by nvcc for a GPU, and for
// the host runner. test_primitives.py gives both the same input and compares every word of the
// output.
#include <cstring>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "device/atomic.cuh"
#include "device/barrier.cuh"
#include "device/convert.cuh"
#include "device/cp_async.cuh"
#include "device/estimate.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/mma.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "topk_gate/filter.h"
#include "topk_gate/score.cuh"

namespace {

using namespace kimi;

constexpr int kThreads = 128;

struct Io {
  const uint32_t* in;
  uint32_t* out;  // zero at first
  int n;          // inputs; every kernel writes its own number of outputs for each
};

__device__ int thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// 12 outputs for each of n inputs; n is a multiple of the block.
__global__ void warp_kernel(Io io) {
  const uint32_t v = io.in[thread()];
  uint32_t* out = io.out + 12 * thread();
  out[0] = warp_exchange(v, 1);
  out[1] = warp_exchange(v, 16);
  out[2] = warp_exchange(v, 31);
  out[3] = warp_broadcast(v, 0);
  out[4] = warp_broadcast(v, 31);
  out[5] = warp_ballot(v & 1);
  out[6] = warp_match(v % 5);
  out[7] = warp_max(v);
  out[8] = warp_min(v);
  out[9] = static_cast<uint32_t>(warp_max(static_cast<int32_t>(v)));
  out[10] = static_cast<uint32_t>(warp_min(static_cast<int32_t>(v)));
  out[11] = static_cast<uint32_t>(lane_id() + 32 * warp_id());
}

// 8 outputs; an input is a float's bits, its neighbours are the other operands.
__global__ void math_kernel(Io io) {
  if (thread() >= io.n) return;
  const float a = float_of(io.in[thread()]), b = float_of(io.in[(thread() + 1) % io.n]),
              c = float_of(io.in[(thread() + 2) % io.n]);
  const float largest = add_rn(max_nan(a, b), 0.0f);  // which of two zeros is left open
  const float results[8] = {add_rn(a, b), sub_rn(a, b),     mul_rn(a, b), fma_rn(a, b, c),
                            div_rn(a, b), reciprocal_rn(a), sqrt_rn(a),   largest};
  for (int i = 0; i < 8; ++i) io.out[8 * thread() + i] = bits_of(results[i]);
}

// 5 outputs: the gate's scores of every input, and its keys.
__global__ void score_kernel(Io io) {
  if (thread() >= io.n) return;
  const float z = gate::clean<CudaOps>(float_of(io.in[thread()]));
  uint32_t* out = io.out + 5 * thread();
  out[0] = bits_of(math::sigmoid<CudaOps>(z));
  out[1] = bits_of(gate::sqrtsoftplus<CudaOps>(z));
  out[2] = bits_of(math::exp_nonpositive<CudaOps>(-fabsf(z)));
  out[3] = static_cast<uint32_t>(gate::sort_key(float_of(io.in[thread()])));
  out[4] = bits_of(gate::value_of_key(gate::sort_key(z)));
}

// How many d of [1, 2] have another reciprocal than the definition says, and how far the estimate
// is off at most, in ulp of its result. The input is ignored.
__global__ void reciprocal_kernel(Io io) {
  const uint32_t stride = gridDim.x * blockDim.x;
  for (uint32_t i = static_cast<uint32_t>(thread()); i <= 1u << 23; i += stride) {
    const float d = float_of(bits_of(1.0f) + i);
    const float want = math::reciprocal_by_division<CudaOps>(d);
    if (bits_of(math::reciprocal<CudaOps>(d)) != bits_of(want)) atomic_add(&io.out[0], 1u);
    const int32_t error =
        static_cast<int32_t>(bits_of(reciprocal_estimate(d)) - bits_of(div_rn(1.0f, d)));
    atomic_max(reinterpret_cast<int32_t*>(&io.out[1]), error < 0 ? -error : error);
  }
}

// The gate's filter, for all 2^32 logits (on the host for every 4099th) and two biases: how many
// estimates are further from the choice than their bound says, and the largest distance for its
// size in units of 2^-28. The input is ignored.
__global__ void filter_kernel(Io io) {
#if defined(KIMI_HOST_SIMT)
  constexpr uint64_t kStep = 4099;
#else
  constexpr uint64_t kStep = 1;
#endif
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x * kStep;
  uint32_t beyond = 0;
  float largest = 0.0f;
  for (uint64_t bits = static_cast<uint64_t>(thread()) * kStep; bits < uint64_t{1} << 32;
       bits += stride) {
    const float z = float_of(static_cast<uint32_t>(bits));
    if (z != z) continue;
    const float estimate = gate::sigmoid_estimate<EstimateOps>(z), s = math::sigmoid<CudaOps>(z);
    for (const float bias : {0.0f, -3.7f}) {
      const float a = add_rn(estimate, bias), size = fmaxf(fabsf(a), 1.0f);
      const float error = div_rn(fabsf(sub_rn(a, add_rn(s, bias))), size);
      beyond += error <= gate::kSigmoidError ? 0 : 1;  // a NaN is beyond
      largest = fmaxf(largest, error);
    }
  }
  if (beyond != 0) atomic_add(&io.out[0], beyond);
  atomic_max(reinterpret_cast<int32_t*>(&io.out[1]), static_cast<int32_t>(largest * 0x1p28f));
}

// 8 outputs: the low bits of the input as bf16, fp16 and e4m3, and the input rounded to them; it
// and its negative as pairs of bf16 and of fp16.
__global__ void dtype_kernel(Io io) {
  if (thread() >= io.n) return;
  const uint32_t v = io.in[thread()];
  uint32_t* out = io.out + 8 * thread();
  out[0] = bits_of(to_float(bf16{static_cast<uint16_t>(v)}));
  out[1] = bits_of(to_float(fp16{static_cast<uint16_t>(v)}));
  out[2] = from_float<bf16>(float_of(v)).bits;
  out[3] = from_float<fp16>(float_of(v)).bits;
  out[4] = bits_of(to_float(e4m3{static_cast<uint8_t>(v)}));
  out[5] = from_float<e4m3>(float_of(v)).bits;
  out[6] = round_pair<bf16>(float_of(v), float_of(v ^ 0x80000000u));
  out[7] = round_pair<fp16>(float_of(v), float_of(v ^ 0x80000000u));
}

// Sums, a maximum, a hash table by compare-and-swap whose occupied places are counted, and the sum
// of the blocks' minima.
__global__ void atomic_kernel(Io io) {
  const uint32_t v = io.in[thread()];
  atomic_add(&io.out[v % 7], v);
  atomic_add(reinterpret_cast<int32_t*>(&io.out[7]), -static_cast<int32_t>(v % 3));
  atomic_max(reinterpret_cast<int32_t*>(&io.out[8]), static_cast<int32_t>(v));
  KIMI_STATIC_SHARED(uint32_t, places, 256);
  KIMI_STATIC_SHARED(uint32_t, least, 1);
  for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) places[i] = 0;
  if (threadIdx.x == 0) least[0] = ~0u;
  __syncthreads();
  atomic_min(&least[0], v);
  uint32_t place = v % 256;
  while (atomic_cas(&places[place], 0, v | 1) != 0) place = (place + 1) % 256;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x)
    if (places[i] != 0) atomic_add(&io.out[9], 1u);
  if (threadIdx.x == 0) atomic_add(&io.out[10], least[0]);
}

// Copies 16 bytes a thread by each pair of load and store; 2 outputs for each input.
__global__ void vec_kernel(Io io) {
  if (thread() * 4 >= io.n) return;
  const uint32_t* in = io.in + thread() * 4;
  store16(io.out + thread() * 4, load16_streaming(in));
  uint4 v = load16(in);
  v.x ^= v.w;
  store16_streaming(io.out + io.n + thread() * 4, v);
}

// Reverses each half of the block behind a barrier of its own, then the block in dynamic memory.
__global__ void barrier_kernel(Io io) {
  KIMI_SHARED(uint32_t, tile);
  const int t = static_cast<int>(threadIdx.x), half = kThreads / 2;
  tile[t] = io.in[thread()];
  named_barrier_sync(1 + t / half, half);
  const uint32_t v = tile[t ^ (half - 1)];
  __syncthreads();
  tile[t] = v;
  __syncthreads();
  io.out[thread()] = tile[kThreads - 1 - t];
}

// A ring of two tiles: warp 3 produces, with announced bytes, the others add up what they read.
__global__ void mbarrier_kernel(Io io) {
#if defined(KIMI_HOST_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  KIMI_STATIC_SHARED(uint32_t, tile, 2 * 32);
  KIMI_STATIC_SHARED(MBarrier, full, 2);
  KIMI_STATIC_SHARED(MBarrier, empty, 2);
  if (threadIdx.x == 0)
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(full[s], 32);
      mbarrier_init(empty[s], 96);
    }
  mbarrier_fence_init();
  __syncthreads();
  uint32_t sum = 0;
  for (int i = 0; i < io.n / 32; ++i) {
    const uint32_t parity = static_cast<uint32_t>(i / 2 & 1);
    if (warp_id() == 3) {
      mbarrier_wait(empty[i % 2], parity ^ 1);
      tile[i % 2 * 32 + lane_id()] = io.in[i * 32 + lane_id()];
      if (lane_id() % 2 == 0) {
        mbarrier_arrive_expect_tx(full[i % 2], 16);
      } else {
        mbarrier_expect_tx(full[i % 2], 8);
        mbarrier_arrive(full[i % 2]);
      }
      mbarrier_complete_tx(full[i % 2], lane_id() % 2 == 0 ? 16 : 8);
    } else {
      mbarrier_wait(full[i % 2], parity);
      sum = sum * 31 + tile[i % 2 * 32 + (lane_id() + i) % 32];
      mbarrier_arrive(empty[i % 2]);
    }
  }
  io.out[threadIdx.x] = sum;
#endif
}

// Four words a thread by cp.async, in two groups, of which every third copy of the second is zeros;
// each thread then reads what another one has copied. 2 outputs for each input.
__global__ void cp_async_kernel(Io io) {
  KIMI_STATIC_SHARED(uint4, tile, 2 * kThreads);
  const int t = static_cast<int>(threadIdx.x), first = thread() * 4;
  if (blockIdx.x * kThreads * 4 >= static_cast<unsigned>(io.n)) return;
  cp_async16(tile + t, io.in + first, true);
  cp_async_commit();
  cp_async16(tile + kThreads + t, t % 3 == 0 ? nullptr : io.in + first, t % 3 != 0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  store16(io.out + first, tile[kThreads - 1 - t]);
  cp_async_wait<0>();
  __syncthreads();
  store16(io.out + io.n + first, tile[kThreads + (t + 1) % kThreads]);
}

// d += a b of small integers, whose sums are exact in any order. a and b are the block's inputs.
template <class T>
__device__ void small_product(uint4* tile, uint32_t word, uint32_t* out) {
  const int l = lane_id();
  T pair[2];
  for (int i = 0; i < 2; ++i)
    pair[i] = from_float<T>(static_cast<float>(word >> 16 * i & 15) - 8.0f);
  memcpy(reinterpret_cast<char*>(tile) + 4 * threadIdx.x, pair, 4);
  __syncthreads();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, tile + (l % 8 + l / 8 % 2 * 8) * 2 + l / 16);              // [row][depth]
  ldmatrix_x4_transposed(b, tile + (l + 3 * warp_id()) % 16 * 2 + l / 16);  // [depth][col]
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(word >> 8 * i & 63);
  const uint32_t low[2] = {b[0], b[1]};
  mma_m16n8k16<T>(d, a, low);
  for (int i = 0; i < 4; ++i) out[i] = bits_of(d[i]);
}

// 16 outputs: what ldmatrix reads of the block's words, both ways, and two products.
__global__ void matrix_kernel(Io io) {
  KIMI_STATIC_SHARED(uint4, raw, 32);
  KIMI_STATIC_SHARED(uint4, of_bf16, 32);
  KIMI_STATIC_SHARED(uint4, of_fp16, 32);
  const uint32_t word = io.in[thread()];
  uint32_t r[4], *out = io.out + 16 * thread();
  memcpy(reinterpret_cast<char*>(raw) + 4 * threadIdx.x, &word, 4);
  __syncthreads();
  ldmatrix_x4(r, raw + (lane_id() + 5 * warp_id()) % 32);
  for (int i = 0; i < 4; ++i) out[i] = r[i];
  ldmatrix_x4_transposed(r, raw + (lane_id() + 5 * warp_id()) % 32);
  for (int i = 0; i < 4; ++i) out[4 + i] = r[i];
  small_product<bf16>(of_bf16, word, out + 8);
  small_product<fp16>(of_fp16, word, out + 12);
}

struct Entry {
  const char* name;
  void (*kernel)(Io);
  int blocks;  // 0: as many as make one thread an input
};
constexpr Entry kEntries[] = {
    {"warp", warp_kernel, 0},         {"math", math_kernel, 0},
    {"score", score_kernel, 0},       {"reciprocal", reciprocal_kernel, 64},
    {"filter", filter_kernel, 64},    {"dtype", dtype_kernel, 0},
    {"atomic", atomic_kernel, 0},     {"vec", vec_kernel, 0},
    {"barrier", barrier_kernel, 0},   {"mbarrier", mbarrier_kernel, 1},
    {"cp_async", cp_async_kernel, 0}, {"matrix", matrix_kernel, 0}};

#if defined(KIMI_HOST_SIMT)
Status run(const Entry& entry, const LaunchConfig& config, Io io, int /*outputs*/) {
  return launch(entry.kernel, config, io);
}
#else
struct DeviceMemory {
  void* data = nullptr;
  ~DeviceMemory() { cudaFree(data); }
};

Status run(const Entry& entry, const LaunchConfig& config, Io io, int outputs) {
  const size_t in_bytes = sizeof(uint32_t) * static_cast<size_t>(io.n);
  const size_t out_bytes = sizeof(uint32_t) * static_cast<size_t>(outputs);
  DeviceMemory in, out;
  KIMI_RETURN_IF_ERROR(cuda_status("malloc", cudaMalloc(&in.data, in_bytes)));
  KIMI_RETURN_IF_ERROR(cuda_status("malloc", cudaMalloc(&out.data, out_bytes)));
  KIMI_RETURN_IF_ERROR(
      cuda_status("copy", cudaMemcpy(in.data, io.in, in_bytes, cudaMemcpyHostToDevice)));
  KIMI_RETURN_IF_ERROR(memset_async(out.data, 0, out_bytes, nullptr));
  const Io device{static_cast<uint32_t*>(in.data), static_cast<uint32_t*>(out.data), io.n};
  KIMI_RETURN_IF_ERROR(launch(entry.kernel, config, device));
  return cuda_status("copy", cudaMemcpy(io.out, out.data, out_bytes, cudaMemcpyDeviceToHost));
}
#endif

}  // namespace

/// Runs the kernel `name` on n inputs; an empty text, or what went wrong. `out` is zero at first.
extern "C" __attribute__((visibility("default"))) const char* kimi_run_primitive(
    const char* name, const uint32_t* in, int n, uint32_t* out, int n_out) {
  static thread_local std::string message;
  for (const Entry& entry : kEntries)
    if (std::strcmp(entry.name, name) == 0) {
      const int blocks = entry.blocks > 0 ? entry.blocks : (n + kThreads - 1) / kThreads;
      const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                kThreads * sizeof(uint32_t)};
      message = run(entry, config, Io{in, out, n}, n_out).message;
      return message.c_str();
    }
  return "no such kernel";
}
