// SPDX-License-Identifier: MIT
//
// What events cannot tell: when the warps of a kernel come to its phases (device/clock.cuh), stores
// of permute that the library does not ship, and whether TMA loads rows one by one. Built twice, by
// nvcc for a GPU and for the host runner, from the library's own kernels.
#define KIMI_CLOCKS
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "device/clock.cuh"
#include "gemm/sm90/job.h"
#include "permute/permute.cuh"
#include "topk_gate/choose.cuh"

// permute with other stores: the kernel of permute.cu, three times.
namespace kimi::permutation {
template <class Unit>
__device__ inline void store_plain(Unit* to, Unit value) {
  if constexpr (sizeof(Unit) == 16)
    store16(to, value);
  else
    *to = value;
}
template <class Unit>
__device__ inline void store_evicted(Unit* to, Unit value) {
  if constexpr (sizeof(Unit) == 16)
    store16_evict_first(to, value);
  else
    *to = value;
}
}  // namespace kimi::permutation
#include "permute/permute.cu"
#define kAhead kAheadPlain
#define permute_kernel permute_kernel_plain
#define permute_cuda permute_plain
#define store_once store_plain
#include "permute/permute.cu"
#undef kAhead
#undef permute_kernel
#undef permute_cuda
#undef store_once
#define kAhead kAheadEvicted
#define permute_kernel permute_kernel_evicted
#define permute_cuda permute_evicted
#define store_once store_evicted
#include "permute/permute.cu"
#undef kAhead
#undef permute_kernel
#undef permute_cuda
#undef store_once

#include "grouped_gemm/fp8_sm90.cu"
#include "permute/permute_plan_sm90.cu"

namespace kimi::gemm::sm90 {
Trial& trial() {
  static Trial value;
  return value;
}
}  // namespace kimi::gemm::sm90

namespace kimi::clocks {  // named: nvcc takes no third one without a name

#if defined(KIMI_HOST_SIMT)
void upload(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void download(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void* memory) { std::free(memory); }
void read_clocks(Clocks& out) { out = g_clocks; }
void clear_clocks() { g_clocks = {}; }
#else
void upload(void* to, const void* from, size_t bytes) {
  cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
}
void download(void* to, const void* from, size_t bytes) {
  cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost);
}
void* allocate(size_t bytes) {
  void* memory = nullptr;
  return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : nullptr;
}
void release(void* memory) { cudaFree(memory); }
void read_clocks(Clocks& out) { cudaMemcpyFromSymbol(&out, g_clocks, sizeof out); }
void clear_clocks() {
  const std::vector<char> zeros(sizeof(Clocks));
  cudaMemcpyToSymbol(g_clocks, zeros.data(), zeros.size());
}
#endif

// Memory of the device.
template <class T>
class Array {
 public:
  explicit Array(int64_t n)
      : count_(static_cast<size_t>(n)), memory_(static_cast<T*>(allocate(count_ * sizeof(T)))) {}
  explicit Array(const std::vector<T>& values) : Array(static_cast<int64_t>(values.size())) {
    upload(memory_, values.data(), count_ * sizeof(T));
  }
  Array(const Array&) = delete;
  ~Array() { release(memory_); }
  T* get() const { return memory_; }
  std::vector<T> values() const {
    std::vector<T> result(count_);
    download(result.data(), memory_, count_ * sizeof(T));
    return result;
  }

 private:
  size_t count_;
  T* memory_;
};

std::mt19937& generator() {
  static std::mt19937 value(7);
  return value;
}
std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = draw(generator());
  return values;
}

// K different experts a token.
std::vector<int32_t> ids_of(int64_t tokens, int experts, int k) {
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < tokens; ++t)
    for (int first = static_cast<int>(generator()() % experts), i = 0; i < k; ++i)
      ids.push_back((first + i * 29) % experts);
  return ids;
}

struct Plan {
  int64_t tokens;
  int experts, k;
  Array<int32_t> ids{ids_of(tokens, experts, k)}, row_map{tokens * k}, source{tokens * k},
      offsets{experts}, counts{experts};

  Status make() {
    PermutePlanParams p{};
    p.indices = ids.get();
    p.row_map = row_map.get();
    p.source = source.get();
    p.offsets = offsets.get();
    p.tokens_per_expert = counts.get();
    p.num_tokens = tokens;
    p.num_experts = experts;
    p.top_k = k;
    p.align = 1;
    return permutation::permute_plan_sm90(p, nullptr);
  }
};

// The rows of topk_gate_kernel, whose marks are those of choose.
__global__ void __launch_bounds__(gate::kWarps* kWarpSize, 4)
    gate_kernel(const __grid_constant__ TopkGateParams p) {
  KIMI_SHARED(int32_t, memory);
  KIMI_STATIC_SHARED(gate::Board, boards, gate::kWarps);
  constexpr int kValues = 12;
  const gate::Layout layout = gate::layout_of<float>(p);
  float bias[kValues];
  gate::load_bias_row(p, layout, bias);
  const auto load_bias = [&](float (&b)[kValues]) {
    for (int j = 0; j < kValues; ++j) b[j] = bias[j];
  };
  for (int64_t t = int64_t{blockIdx.x} * gate::kWarps + warp_id(); t < p.num_tokens;
       t += int64_t{gridDim.x} * gate::kWarps) {
    const float* const row = static_cast<const float*>(p.logits) + t * p.logits_stride;
    const gate::Choice mine =
        gate::choose<float, kValues>(p, row, layout, load_bias, boards[warp_id()],
                                     memory + warp_id() * (p.num_experts + p.num_groups));
    if (lane_id() >= p.top_k) continue;
    p.weights[t * p.top_k + lane_id()] = mine.weight;
    p.indices[t * p.top_k + lane_id()] = mine.expert;
  }
}

Status run_gate(int64_t tokens, int experts, int k) {
  const Array<float> logits(normal(tokens * experts)), bias(normal(experts)), weights(tokens * k);
  const Array<int32_t> ids(tokens * k);
  TopkGateParams p{};
  p.logits = logits.get();
  p.expert_bias = bias.get();
  p.weights = weights.get();
  p.indices = ids.get();
  p.num_tokens = tokens;
  p.logits_stride = p.num_experts = experts;
  p.top_k = k;
  p.num_groups = p.topk_groups = p.group_score_topk = 1;
  p.scaling_factor = 1.0f;
  p.renormalize = 1;
  p.score_function = KIMI_SCORE_SIGMOID;
  const size_t keys = sizeof(int32_t) * gate::kWarps * static_cast<size_t>(experts + 1);
  return gate::launch_warp_per_token(gate_kernel, p, keys, nullptr);
}

// Random bits, of which none is NaN, and scales of 1.
Status run_fp8(int64_t groups, int64_t rows, int64_t k, int64_t n) {
  const auto bytes = [](int64_t count) {
    std::vector<uint32_t> values(static_cast<size_t>(count / 4));
    for (uint32_t& v : values) v = generator()() & 0xbfbfbfbfu;
    return values;
  };
  const auto ones = [](int64_t count) {
    return std::vector<float>(static_cast<size_t>(count), 1.0f);
  };
  const int64_t depth = fp8::blocks(k), all = groups * rows;
  const Array<uint32_t> a(bytes(all * k)), b(bytes(groups * n * k));
  const Array<float> a_scale(ones(depth * all)), b_scale(ones(groups * fp8::blocks(n) * depth));
  std::vector<int32_t> ends;
  for (int64_t e = 1; e <= groups; ++e) ends.push_back(static_cast<int32_t>(e * rows));
  const Array<int32_t> offsets(ends);
  const Array<bf16> out(all * n);
  return grouped_gemm_fp8_cuda(
      {a.get(), a_scale.get(), b.get(), b_scale.get(), offsets.get(), nullptr, out.get(), all, k, n,
       k, all, static_cast<int32_t>(groups), KIMI_BFLOAT16},
      nullptr);
}

Status run(const std::string& name, int64_t scale) {
  if (name == "plan 4096 x 8 of 384") return Plan{4096 / scale, 384, 8}.make();
  if (name == "plan 8192 x 16 of 896") return Plan{8192 / scale, 896, 16}.make();
  if (name == "gate 32768 x 384") return run_gate(32768 / scale, 384, 8);
  if (name == "fp8 4 x 8192")  // two marks at least
    return run_fp8(4, std::max<int64_t>(8192 / scale, 128),
                   std::max<int64_t>(7168 / scale / 16 * 16, 1152), 4096 / scale);
  return invalid("clocks: no kernel ", name);
}

// ---- a row of 128 bytes by a TMA load of its own --------------------------------------------------

constexpr int kRows = 128;

struct OneRow {
  TensorMap map;      // [kRows, 64] of 16 bits, a box a row
  uint32_t* tile;     // [kRows][32] as it lies in shared memory
  long long* clocks;  // issued, landed
};

__global__ void __launch_bounds__(kRows) one_row_kernel(const __grid_constant__ OneRow p) {
  KIMI_SHARED(uint32_t, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_init(full[0], 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect_tx(full[0], kRows * 128);
  }
  __syncthreads();
  const long long start = clock_now();
  tma_load(tile + thread * 32, p.map, full[0], 0, thread);
  const long long issued = clock_now();
  mbarrier_wait(full[0], 0);
  const long long landed = clock_now();
  for (int i = 0; i < 32; ++i) p.tile[thread * 32 + i] = tile[thread * 32 + i];
  if (thread == kRows - 1) {
    p.clocks[0] = issued - start;
    p.clocks[1] = landed - start;
  }
}

Status one_row(bool swizzled, const Array<uint32_t>& from, const Array<uint32_t>& tile,
               const Array<long long>& clocks) {
  OneRow p{{}, tile.get(), clocks.get()};
  const int64_t sizes[] = {64, kRows}, stride = 128;
  const int32_t box[] = {64, 1};
  KIMI_RETURN_IF_ERROR(encode_tensor_map<bf16>(&p.map, from.get(), 2, sizes, &stride, box,
                                               swizzled ? Swizzle::k128 : Swizzle::kNone));
  const auto load = [&] {
    return launch(one_row_kernel, {dim3(1), dim3(kRows), kRows * 128, nullptr}, p);
  };
#if defined(KIMI_HOST_SIMT)
  try {  // the model asks for swizzled tiles on 1024 bytes
    return load();
  } catch (const simt::Error& error) {
    return invalid(error.what());
  }
#else
  return load();
#endif
}

// ---- stores of permute ---------------------------------------------------------------------------

// Microseconds of a call.
template <class Call>
Status timed(const Call& call, std::vector<double>& taken) {
#if defined(KIMI_HOST_SIMT)
  taken.push_back(0);
  return call();
#else
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  cudaEventRecord(begin);
  KIMI_RETURN_IF_ERROR(call());
  cudaEventRecord(end);
  cudaEventSynchronize(end);
  float ms = 0;
  cudaEventElapsedTime(&ms, begin, end);
  taken.push_back(1e3 * ms);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return Status::ok();
#endif
}

Status permute_stores(int64_t scale, double* out) {
  const int64_t tokens = 4096 / scale, bytes = 7168 * 2 / (scale > 1 ? 8 : 1);
  Plan plan{tokens, 384, 8};
  KIMI_RETURN_IF_ERROR(plan.make());
  std::vector<uint16_t> values(static_cast<size_t>(tokens * bytes / 2)), first;
  for (uint16_t& v : values) v = static_cast<uint16_t>(generator()());
  const Array<uint16_t> x(values), y(tokens * 8 * bytes / 2);
  PermuteParams p{};
  p.x = x.get();
  p.row_map = plan.row_map.get();
  p.source = plan.source.get();
  p.y = y.get();
  p.num_tokens = tokens;
  p.num_rows = tokens * 8;
  p.row_bytes = p.x_stride_bytes = bytes;
  p.top_k = 8;
  Status (*const ways[])(const PermuteParams&, void*) = {permute_cuda, permute_plain,
                                                         permute_evicted};
  std::vector<double> taken[3];
  for (int round = 0; round < (scale > 1 ? 1 : 9); ++round)
    for (int way = 0; way < 3; ++way) {
      KIMI_RETURN_IF_ERROR(timed([&] { return ways[way](p, nullptr); }, taken[way]));
      if (round > 0) continue;
      if (way == 0) first = y.values();
      if (y.values() != first) return invalid("permute: other bytes than as shipped");
    }
  for (int way = 0; way < 3; ++way) {
    std::sort(taken[way].begin(), taken[way].end());
    out[way] = taken[way][taken[way].size() / 2];
  }
  return Status::ok();
}

Status twice(const char* name, int scale) {
  KIMI_RETURN_IF_ERROR(run(name, scale));  // to have been there
  clear_clocks();
  return run(name, scale);
}

thread_local std::string message;
const char* said(const Status& status) {
  message = status.message;
  return message.c_str();
}

#define KIMI_EXPORT extern "C" __attribute__((visibility("default")))

// "", and when the warps of the first blocks came to their points: Clocks. Sizes divided by `scale`.
KIMI_EXPORT const char* kimi_clocks(const char* name, int scale, long long* out) {
  const Status status = twice(name, scale);
  Clocks found;
  read_clocks(found);
  std::memcpy(out, &found, sizeof found);
  return said(status);
}

// Words of 128 rows that lie elsewhere than a whole box would put them; cycles to issue, to land.
KIMI_EXPORT const char* kimi_one_row(int swizzled, long long* out) {
  std::vector<uint32_t> rows(kRows * 32);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint32_t>(i);
  const Array<uint32_t> from(rows), tile(kRows * 32);
  const Array<long long> clocks(2);
  const Status status = one_row(swizzled != 0, from, tile, clocks);
  const std::vector<uint32_t> is = tile.values();
  out[0] = 0;
  for (uint32_t i = 0; i < kRows * 32; ++i) {
    const uint32_t row = i / 32, piece = i / 4 % 8, place = swizzled ? piece ^ (row % 8) : piece;
    out[0] += is[row * 32 + place * 4 + i % 4] != i;
  }
  const std::vector<long long> taken = clocks.values();
  out[1] = taken[0];
  out[2] = taken[1];
  return said(status);
}

// Microseconds of permute, T x 8 rows of 7168 of 16 bits, with stores as shipped (.cs), plain, and
// evicted first, in turns: medians. Their bytes must be the same.
KIMI_EXPORT const char* kimi_permute_stores(int scale, double* out) {
  return said(permute_stores(scale, out));
}

}  // namespace kimi::clocks
