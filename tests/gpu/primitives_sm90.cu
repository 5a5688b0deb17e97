// SPDX-License-Identifier: MIT
//
// The Hopper primitives of csrc/device, built twice from this file as primitives.cu is: by nvcc for
// sm_90a, and for the host runner. test_primitives.py gives both the same input and compares every
// word.
#include <cstring>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "device/cluster.cuh"
#include "device/convert.cuh"
#include "device/cp_async.cuh"
#include "device/fence.cuh"
#include "device/launch.cuh"
#include "device/overlap.cuh"
#include "device/registers.cuh"
#include "device/stmatrix.cuh"
#include "device/tma.cuh"
#include "device/warp.cuh"
#include "device/wgmma.cuh"

namespace {

using namespace kimi;

struct Io {
  const uint32_t* in;
  uint32_t* out;  // zero at first
  int n;          // inputs
};

/// -4 .. 4: sums of products of them are exact.
template <class T>
__device__ T small_integer(uint32_t word) {
  return from_float<T>(static_cast<float>(static_cast<int>(word % 9) - 4));
}

/// What the launcher makes tensor maps of, over `in` and over `out`.
enum Element { kBytes, kBf16, kFp16, kFloat };
struct Geometry {
  Element element;
  int rank;
  Swizzle swizzle;
  bool turned = false;  // 64 columns x 128 rows x 2, whose planes lie side by side in rows
};
template <class T>
constexpr Element kElement = sizeof(T) == 1 ? kBytes : kFloat;
template <>
constexpr Element kElement<bf16> = kBf16;
template <>
constexpr Element kElement<fp16> = kFp16;

// A tensor of up to 3 planes of 11 rows of 200 bytes, 208 bytes apart, and its box.
constexpr int kRows = 11, kPlanes = 3, kRowBytes = 200, kRowStride = 208;
constexpr int kBoxRows = 10, kBoxPlanes = 2;
constexpr int box_row_bytes(Swizzle swizzle) { return swizzle == Swizzle::k128 ? 128 : 48; }
constexpr int box_bytes(int rank, Swizzle swizzle) {
  return box_row_bytes(swizzle) * kBoxRows * (rank == 3 ? kBoxPlanes : 1);
}

struct Point {
  int x, y, z;
};
constexpr int kPoints = 5;
// x lies on 16 bytes; the fourth box ends within a piece of 16.
template <class T>
__device__ Point point(int i) {
  constexpr Point kAll[kPoints] = {{0, 0, 0}, {1, 2, 1}, {-2, -3, -1}, {10, 9, 2}, {40, 0, 0}};
  const Point at = kAll[i];
  return {at.x * static_cast<int>(16 / sizeof(T)), at.y, at.z};
}

#define KIMI_MAPS const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to

// The box at every point, as it lies in shared memory.
template <class T, int kRank, Swizzle kSwizzle>
__global__ void load_kernel(Io io, KIMI_MAPS) {
  (void)to;
  constexpr int kBytes = box_bytes(kRank, kSwizzle);
  KIMI_SHARED(uint32_t, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  if (threadIdx.x == 0) {
    tma_prefetch(from);
    mbarrier_init(full[0], 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  for (int i = 0; i < kPoints; ++i) {
    const Point at = point<T>(i);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(full[0], kBytes);
      if constexpr (kRank == 2)
        tma_load(tile, from, full[0], at.x, at.y);
      else
        tma_load(tile, from, full[0], at.x, at.y, at.z);
    }
    mbarrier_wait(full[0], static_cast<uint32_t>(i & 1));
    for (int w = static_cast<int>(threadIdx.x); w < kBytes / 4; w += 128)
      io.out[i * kBytes / 4 + w] = tile[w];
    __syncthreads();
  }
}

// Boxes of small integers, other ones for each point, stored or added at every point.
template <class T, int kRank, Swizzle kSwizzle, bool kAdd>
__global__ void store_kernel(Io io, KIMI_MAPS) {
  (void)from;
  constexpr int kElements = box_bytes(kRank, kSwizzle) / sizeof(T);
  KIMI_SHARED(T, tile);
  for (int i = 0; i < kPoints; ++i) {
    for (int k = static_cast<int>(threadIdx.x); k < kElements; k += 128)
      tile[k] = small_integer<T>(io.in[i * kElements + k]);
    fence_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
      const Point at = point<T>(i);
      if constexpr (kRank == 2)
        kAdd ? tma_reduce_add(to, tile, at.x, at.y) : tma_store(to, tile, at.x, at.y);
      else
        kAdd ? tma_reduce_add(to, tile, at.x, at.y, at.z) : tma_store(to, tile, at.x, at.y, at.z);
      tma_store_commit();
      if (i % 2 == 0) tma_store_wait_read<0>();
      tma_store_wait<0>();  // the next box may overlap
    }
    __syncthreads();
  }
}

// out [64, N] = (r + c) % 16 + a [64, 128 bytes] b [N, 128 bytes]^T, or without the first term
// where 16 does not divide N.
template <class T, int kN, Major kA, Major kB>
__global__ void __launch_bounds__(128, 1) wgmma_kernel(Io io, KIMI_MAPS) {
  (void)from, (void)to;
  constexpr int kDepth = 128 / sizeof(T);
  KIMI_SHARED(char, shared);
  const int t = static_cast<int>(threadIdx.x);
  const auto put = [&](char* tile, Major major, int outer, int k, T value) {
    const int row = major == Major::kDepth ? outer : outer / 64 * 64 + k;
    const int byte = static_cast<int>(sizeof(T)) * (major == Major::kDepth ? k : outer % 64);
    *reinterpret_cast<T*>(tile + row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16) = value;
  };
  for (int i = t; i < 64 * kDepth; i += 128)
    put(shared, kA, i / kDepth, i % kDepth, small_integer<T>(io.in[i % io.n]));
  for (int i = t; i < kN * kDepth; i += 128)
    put(shared + 8192, kB, i / kDepth, i % kDepth, small_integer<T>(io.in[(i + 1000) % io.n] / 9));
  fence_async_shared();
  __syncthreads();
  float d[kN / 2];
  const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    d[i] = static_cast<float>((row + i / 2 % 2 * 8 + column + i / 4 * 8 + i % 2) % 16);
  const uint64_t a = wgmma_descriptor<kA>(shared), b = wgmma_descriptor<kB>(shared + 8192);
  wgmma_fence(d);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma<T, kN, kA, kB>(d, wgmma_advance<kA>(a, step), wgmma_advance<kB>(b, step),
                         step > 0 || kN % 16 == 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_fence(d);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    io.out[(row + i / 2 % 2 * 8) * kN + column + i / 4 * 8 + i % 2] = bits_of(d[i]);
}

// Both forms, every warp four matrices: out [form][warp][128].
__global__ void stmatrix_kernel(Io io, KIMI_MAPS) {
  (void)from, (void)to;
  KIMI_SHARED(uint32_t, tiles);
  uint32_t* const tile = tiles + warp_id() * 128;
  for (int form = 0; form < 2; ++form) {
    const uint32_t* in = io.in + form * 512 + static_cast<int>(threadIdx.x) * 4;
    uint32_t* const row = tile + (lane_id() ^ 5) * 4;
    if (form == 0)
      stmatrix_x4(row, in[0], in[1], in[2], in[3]);
    else
      stmatrix_x4_transposed(row, in[0], in[1], in[2], in[3]);
    warp_barrier();
    for (int i = lane_id(); i < 128; i += 32) io.out[form * 512 + warp_id() * 128 + i] = tile[i];
    warp_barrier();
  }
}

// Two warpgroups get the registers of a third one. Each block of a cluster of two loads a box for
// both and stores 16 bytes into the other, whose barrier its last two threads arrive at. out
// [block][both boxes, as they lie, 1024 bytes apart; then rank and blocks; what came from the other].
__global__ void __launch_bounds__(384, 1) cluster_kernel(Io io, KIMI_MAPS) {
  (void)to;
  constexpr int kBytes = box_bytes(2, Swizzle::kNone), kWords = kBytes / 4, kApart = 1024 / 4;
  KIMI_SHARED(uint32_t, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  KIMI_STATIC_SHARED(MBarrier, met, 1);
  KIMI_STATIC_SHARED(uint4, mail, 1);
  const int rank = cluster_rank(), t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    mbarrier_init(full[0], 1);
    mbarrier_init(met[0], 2);
    mbarrier_fence_init();
  }
  cluster_arrive();
  cluster_wait();
  if (t >= 256) {
    registers_decrease<40>();
    if (t >= 382) mbarrier_arrive_in(met[0], rank ^ 1);
  } else {
    registers_increase<232>();
    if (t == 0) {
      store16_in(mail, load16(io.in + 4 * rank), rank ^ 1);
      mbarrier_arrive_expect_tx(full[0], 2 * kBytes);
      tma_load_multicast(tile + rank * kApart, from, full[0], 16 * rank, rank, uint16_t{3});
    }
    mbarrier_wait(full[0], 0);
    mbarrier_wait(met[0], 0);
    uint32_t* const out = io.out + static_cast<int>(blockIdx.x) * (2 * kWords + 6);
    for (int i = t; i < 2 * kWords; i += 256) out[i] = tile[i / kWords * kApart + i % kWords];
    if (t == 0) {
      out[2 * kWords] = static_cast<uint32_t>(rank);
      out[2 * kWords + 1] = static_cast<uint32_t>(cluster_blocks());
    }
  }
  cluster_arrive();
  cluster_wait();
  if (t == 0) {
    uint32_t* const out = io.out + static_cast<int>(blockIdx.x) * (2 * kWords + 6);
    memcpy(out + 2 * kWords + 2, mail, 16);
  }
}

// A box of 64 rows of both planes from row 100 of 128 on, and behind it 16 bytes a thread in turned
// order by cp.async: one barrier counts both.
__global__ void stage_kernel(Io io, KIMI_MAPS) {
  (void)to;
  constexpr int kBox = 2 * 64 * 128, kWords = (kBox + 128 * 16) / 4;
  KIMI_SHARED(char, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    mbarrier_init(full[0], 1 + 128);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (t == 0) {
    tma_prefetch_box(from, 0, 100, 0);
    mbarrier_arrive_expect_tx(full[0], kBox);
    tma_load(tile, from, full[0], 0, 100, 0);
  }
  cp_async16(tile + kBox + 16 * t, io.in + 4 * (127 - t), true);
  cp_async_arrive(full[0]);
  mbarrier_wait(full[0], 0);
  for (int i = t; i < kWords; i += 128) io.out[i] = reinterpret_cast<const uint32_t*>(tile)[i];
}

// Any bits, and numbers from 2^-11 to 2^9 of either sign.
__global__ void convert_kernel(Io io, KIMI_MAPS) {
  (void)from, (void)to;
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 128) {
    const uint32_t v = io.in[i];
    const float any = float_of(v), number = float_of(0x3a000000u + v % 0x0a000000u);
    io.out[i] = round_pair_e4m3(any, v % 2 ? -number : number);
  }
}

// out[i] = 5 out[i] + in[i], 200 times a launch: of several that overlap each needs what the one
// before wrote, and its block may run on another multiprocessor.
__global__ void overlap_kernel(Io io, KIMI_MAPS) {
  (void)from, (void)to;
  const int i = static_cast<int>(threadIdx.x);
  const uint32_t in =
      static_cast<uint32_t>(load_older(reinterpret_cast<const int32_t*>(io.in) + i));
  wait_for_previous();
  let_next_start();
  uint32_t value = io.out[i];
  for (int n = 0; n < 200; ++n) value = 5 * value + in;
  io.out[i] = value;
}

struct Entry {
  const char* name;
  void (*kernel)(Io, TensorMap, TensorMap);
  unsigned threads, cluster;
  Geometry geometry;
  int launches = 1;  // more overlap
};

#define KIMI_TMA(T, rank, swizzle)                                                                \
  {"load " #T " " #rank " " #swizzle,                                                             \
   load_kernel<T, rank, Swizzle::swizzle>,                                                        \
   128,                                                                                           \
   1,                                                                                             \
   {kElement<T>, rank, Swizzle::swizzle}},                                                        \
  {                                                                                               \
    "store " #T " " #rank " " #swizzle, store_kernel<T, rank, Swizzle::swizzle, false>, 128, 1, { \
      kElement<T>, rank, Swizzle::swizzle                                                         \
    }                                                                                             \
  }
#define KIMI_ADD(T, rank, swizzle)                                                             \
  {                                                                                            \
    "add " #T " " #rank " " #swizzle, store_kernel<T, rank, Swizzle::swizzle, true>, 128, 1, { \
      kElement<T>, rank, Swizzle::swizzle                                                      \
    }                                                                                          \
  }
#define KIMI_PRODUCT(T, n, a, b)                                                        \
  {                                                                                     \
    "wgmma " #T " " #n " " #a " " #b, wgmma_kernel<T, n, Major::a, Major::b>, 128, 1, { \
      kBytes, 2, Swizzle::kNone                                                         \
    }                                                                                   \
  }
#define KIMI_MAJORS(T, n)                                                 \
  KIMI_PRODUCT(T, n, kDepth, kDepth), KIMI_PRODUCT(T, n, kDepth, kOuter), \
      KIMI_PRODUCT(T, n, kOuter, kDepth), KIMI_PRODUCT(T, n, kOuter, kOuter)
#define KIMI_WIDTH(n) KIMI_PRODUCT(bf16, n, kDepth, kDepth), KIMI_PRODUCT(e4m3, n, kDepth, kDepth)

const Entry kEntries[] = {
    KIMI_TMA(bf16, 2, kNone),
    KIMI_TMA(bf16, 3, kNone),
    KIMI_TMA(bf16, 2, k128),
    KIMI_TMA(bf16, 3, k128),
    KIMI_TMA(fp16, 2, k128),
    KIMI_TMA(float, 2, k128),
    KIMI_TMA(float, 3, kNone),
    KIMI_TMA(e4m3, 2, k128),
    KIMI_TMA(e4m3, 3, kNone),
    KIMI_ADD(float, 2, kNone),
    KIMI_ADD(float, 3, k128),
    KIMI_ADD(bf16, 2, k128),
    KIMI_ADD(fp16, 2, kNone),
    KIMI_MAJORS(bf16, 8),
    KIMI_MAJORS(bf16, 64),
    KIMI_MAJORS(bf16, 128),
    KIMI_MAJORS(bf16, 256),
    KIMI_MAJORS(fp16, 16),
    KIMI_MAJORS(fp16, 32),
    KIMI_MAJORS(fp16, 192),
    KIMI_WIDTH(16),
    KIMI_WIDTH(24),
    KIMI_WIDTH(32),
    KIMI_WIDTH(40),
    KIMI_WIDTH(48),
    KIMI_WIDTH(56),
    KIMI_WIDTH(80),
    KIMI_WIDTH(96),
    KIMI_WIDTH(112),
    KIMI_WIDTH(160),
    KIMI_WIDTH(192),
    KIMI_WIDTH(224),
    KIMI_PRODUCT(e4m3, 8, kDepth, kDepth),
    KIMI_PRODUCT(e4m3, 64, kDepth, kDepth),
    KIMI_PRODUCT(e4m3, 128, kDepth, kDepth),
    KIMI_PRODUCT(e4m3, 256, kDepth, kDepth),
    {"stmatrix", stmatrix_kernel, 128, 1, {kBytes, 2, Swizzle::kNone}},
    {"stage", stage_kernel, 128, 1, {kBf16, 3, Swizzle::k128, true}},
    {"convert", convert_kernel, 128, 1, {kBytes, 2, Swizzle::kNone}},
    {"cluster", cluster_kernel, 384, 2, {kBytes, 2, Swizzle::kNone}},
    {"overlap", overlap_kernel, 256, 1, {kBytes, 2, Swizzle::kNone}, 40},
};

template <class T>
Status encode(TensorMap* map, const void* base, const Geometry& g) {
  constexpr int kSize = sizeof(T);
  if (g.turned) {
    const int64_t sizes[3] = {128 / kSize, 128, 2}, strides[2] = {256, 128};
    const int32_t box[3] = {128 / kSize, 64, 2};
    return encode_tensor_map<T>(map, base, 3, sizes, strides, box, g.swizzle);
  }
  const int64_t sizes[3] = {kRowBytes / kSize, kRows, kPlanes};
  const int64_t strides[2] = {kRowStride, kRowStride * kRows};
  const int32_t box[3] = {box_row_bytes(g.swizzle) / kSize, kBoxRows, kBoxPlanes};
  return encode_tensor_map<T>(map, base, g.rank, sizes, strides, box, g.swizzle);
}
Status encode(TensorMap* map, const void* base, const Geometry& g) {
  switch (g.element) {
    case kBf16:
      return encode<bf16>(map, base, g);
    case kFp16:
      return encode<fp16>(map, base, g);
    case kFloat:
      return encode<float>(map, base, g);
    default:
      return encode<e4m3>(map, base, g);
  }
}

Status run(const Entry& entry, const Io& io) {
  TensorMap from, to;
  KIMI_RETURN_IF_ERROR(encode(&from, io.in, entry.geometry));
  KIMI_RETURN_IF_ERROR(encode(&to, io.out, entry.geometry));
  LaunchConfig config{entry.cluster, entry.threads, 8192 + 256 * 128};
  config.cluster = entry.cluster;
  config.overlaps = entry.launches > 1;
  for (int i = 0; i < entry.launches; ++i)
    KIMI_RETURN_IF_ERROR(launch(entry.kernel, config, io, from, to));
  return Status::ok();
}

#if defined(KIMI_HOST_SIMT)
Status run_on_device(const Entry& entry, const Io& io, int /*outputs*/) {
  Status status;
  simt::overlapped([&] { status = run(entry, io); });
  return status;
}
#else
struct DeviceMemory {
  void* data = nullptr;
  ~DeviceMemory() { cudaFree(data); }
};

Status run_on_device(const Entry& entry, const Io& io, int outputs) {
  const size_t in_bytes = sizeof(uint32_t) * static_cast<size_t>(io.n);
  const size_t out_bytes = sizeof(uint32_t) * static_cast<size_t>(outputs);
  DeviceMemory in, out;
  KIMI_RETURN_IF_ERROR(cuda_status("malloc", cudaMalloc(&in.data, in_bytes)));
  KIMI_RETURN_IF_ERROR(cuda_status("malloc", cudaMalloc(&out.data, out_bytes)));
  KIMI_RETURN_IF_ERROR(
      cuda_status("copy", cudaMemcpy(in.data, io.in, in_bytes, cudaMemcpyHostToDevice)));
  KIMI_RETURN_IF_ERROR(memset_async(out.data, 0, out_bytes, nullptr));
  KIMI_RETURN_IF_ERROR(
      run(entry, Io{static_cast<uint32_t*>(in.data), static_cast<uint32_t*>(out.data), io.n}));
  return cuda_status("copy", cudaMemcpy(io.out, out.data, out_bytes, cudaMemcpyDeviceToHost));
}
#endif

}  // namespace

/// The names of the kernels, one a line.
extern "C" __attribute__((visibility("default"))) const char* kimi_primitives() {
  static std::string names;
  if (names.empty())
    for (const Entry& entry : kEntries) names += std::string(entry.name) + "\n";
  return names.c_str();
}

/// Runs the kernel `name` on n inputs; an empty text, or what went wrong. `out` is zero at first;
/// 16 divides both addresses.
extern "C" __attribute__((visibility("default"))) const char* kimi_run_primitive(
    const char* name, const uint32_t* in, int n, uint32_t* out, int n_out) {
  static thread_local std::string message;
  for (const Entry& entry : kEntries)
    if (std::strcmp(entry.name, name) == 0) {
      message = run_on_device(entry, Io{in, out, n}, n_out).message;
      return message.c_str();
    }
  return "no such kernel";
}
