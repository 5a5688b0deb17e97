// SPDX-License-Identifier: MIT
//
// The host models of the Hopper primitives against plain loops: TMA, wgmma, stmatrix, clusters,
// FP8.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "device/fence.cuh"
#include "device/launch.cuh"
#include "device/stmatrix.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

namespace {

using namespace kimi;

constexpr uint64_t kSeeds = 12;  // every order of threads with every lateness

template <class Body>
void for_each_seed(Body body) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    simt::settings().seed = seed;
    body();
  }
}

template <class T>
T small_integer(std::mt19937& random) {
  return from_float<T>(static_cast<float>(static_cast<int>(random() % 9) - 4));
}

// ---- FP8 ----------------------------------------------------------------------------------------

TEST(e4m3_values_and_rounding) {
  float previous = -1;
  for (uint8_t code = 0; code < 0x7f; ++code) {
    const int exponent = code >> 3, significand = code & 7;
    const float value = exponent == 0
                            ? static_cast<float>(significand) * 0x1p-9f
                            : std::ldexp(1.0f + static_cast<float>(significand) / 8, exponent - 7);
    CHECK(to_float(e4m3{code}) == value && to_float(e4m3{uint8_t(code | 0x80)}) == -value);
    CHECK(std::signbit(to_float(e4m3{uint8_t(code | 0x80)})));
    CHECK(from_float<e4m3>(value).bits == code && from_float<e4m3>(-value).bits == (code | 0x80));
    if (code > 0) {  // the middle goes to the even code, its neighbours to the nearer one
      const float middle = (previous + value) / 2;
      const uint8_t even = code % 2 == 0 ? code : uint8_t(code - 1);
      CHECK(from_float<e4m3>(middle).bits == even);
      CHECK(from_float<e4m3>(std::nextafter(middle, 0.0f)).bits == code - 1);
      CHECK(from_float<e4m3>(std::nextafter(middle, 1e9f)).bits == code);
    }
    previous = value;
  }
  CHECK(previous == 448);
  for (float large : {449.0f, 463.9f, 464.0f, 465.0f, 1e30f, INFINITY}) {
    CHECK(from_float<e4m3>(large).bits == 0x7e && from_float<e4m3>(-large).bits == 0xfe);
  }
  CHECK(from_float<e4m3>(NAN).bits == 0x7f && from_float<e4m3>(-NAN).bits == 0x7f);
  CHECK(std::isnan(to_float(e4m3{0x7f})) && std::isnan(to_float(e4m3{0xff})));
  CHECK(from_float<e4m3>(1e-30f).bits == 0 && from_float<e4m3>(-1e-30f).bits == 0x80);
}

// ---- TMA ----------------------------------------------------------------------------------------

struct Point {
  int32_t x, y, z;
};

__global__ void load_kernel(const __grid_constant__ TensorMap map, int rank, int bytes, Point at,
                            unsigned char* out) {
  KIMI_SHARED(unsigned char, tile);
  KIMI_STATIC_SHARED(MBarrier, full, 1);
  if (threadIdx.x == 0) {
    tma_prefetch(map);
    mbarrier_init(full[0], 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect_tx(full[0], static_cast<uint32_t>(bytes));
    if (rank == 2)
      tma_load(tile, map, full[0], at.x, at.y);
    else
      tma_load(tile, map, full[0], at.x, at.y, at.z);
  }
  __syncthreads();
  mbarrier_wait(full[0], 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 32) out[i] = tile[i];
}

// Stores the tile that it fills with `in`, or adds it.
__global__ void store_kernel(const __grid_constant__ TensorMap map, int rank, int bytes, Point at,
                             bool add, const unsigned char* in) {
  KIMI_SHARED(unsigned char, tile);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 32) tile[i] = in[i];
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (rank == 2)
    add ? tma_reduce_add(map, tile, at.x, at.y) : tma_store(map, tile, at.x, at.y);
  else
    add ? tma_reduce_add(map, tile, at.x, at.y, at.z) : tma_store(map, tile, at.x, at.y, at.z);
  tma_store_commit();
  tma_store_wait_read<0>();
}

// A tensor of small integers with its map. Rows are padded to 16 bytes and more.
template <class T>
struct Tensor {
  int rank;
  int64_t size[3], stride[3];  // of elements, in bytes
  int32_t box[3];
  Swizzle swizzle;
  std::vector<uint4> memory;
  TensorMap map;

  Tensor(int rank_, Swizzle swizzle_, std::mt19937& random) : rank(rank_), swizzle(swizzle_) {
    const int size_of = sizeof(T);
    const int64_t sizes[3] = {swizzle == Swizzle::k128 ? 200 / size_of + 1 : 37, 11, 3};
    const int32_t boxes[3] = {swizzle == Swizzle::k128 ? 128 / size_of : 48 / size_of, 10, 2};
    int64_t total = size_of;
    for (int d = 0; d < 3; ++d) {
      size[d] = d < rank ? sizes[d] : 1;
      box[d] = d < rank ? boxes[d] : 1;
      stride[d] = total;
      total = d == 0 ? (total * size[d] + 15) / 16 * 16 + 16 : total * size[d];
    }
    memory.resize(static_cast<size_t>(total) / 16);
    for (int64_t i = 0; i < total / size_of; ++i)
      reinterpret_cast<T*>(memory.data())[i] = small_integer<T>(random);
    CHECK(encode_tensor_map<T>(&map, memory.data(), rank, size, stride + 1, box, swizzle).is_ok());
  }
  int bytes() const { return static_cast<int>(sizeof(T)) * box[0] * box[1] * box[2]; }

  // visit(byte of the tile, element of the tensor or nullptr), from the documented layout.
  template <class Visitor>
  void for_each(Point at, Visitor visit) {
    for (int z = 0; z < box[2]; ++z)
      for (int y = 0; y < box[1]; ++y)
        for (int x = 0; x < box[0]; ++x) {
          const int row = z * box[1] + y, byte = x * static_cast<int>(sizeof(T));
          const int placed = swizzle == Swizzle::k128
                                 ? row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16
                                 : row * box[0] * static_cast<int>(sizeof(T)) + byte;
          const int64_t g[3] = {at.x + x, at.y + y, at.z + z};
          bool inside = true;
          for (int d = 0; d < 3; ++d) inside &= g[d] >= 0 && g[d] < size[d];
          char* const base = reinterpret_cast<char*>(memory.data());
          visit(placed, inside ? reinterpret_cast<T*>(base + g[0] * stride[0] + g[1] * stride[1] +
                                                      g[2] * stride[2])
                               : nullptr);
        }
  }
};

// x counts 16 bytes. No size is a multiple of that, so that a tail is cut within a piece.
constexpr Point kCorners[] = {{0, 0, 0}, {1, 2, 1}, {-2, -3, -1},
                              {3, 1, 0}, {7, 9, 2}, {100, 0, 0}};

template <class T>
void check_tma(int rank, Swizzle swizzle) {
  std::mt19937 random(7);
  Tensor<T> tensor(rank, swizzle, random);
  const int bytes = tensor.bytes();
  const LaunchConfig config{1, 32, static_cast<size_t>(bytes)};
  for (Point at : kCorners) {
    at.x *= 16 / static_cast<int>(sizeof(T));
    if (rank == 2) at.z = 0;
    std::vector<unsigned char> tile(static_cast<size_t>(bytes)), want(tile.size());
    CHECK(launch(load_kernel, config, tensor.map, rank, bytes, at, tile.data()).is_ok());
    tensor.for_each(at, [&](int byte, const T* element) {
      if (element != nullptr) std::memcpy(&want[static_cast<size_t>(byte)], element, sizeof(T));
    });
    CHECK(tile == want);

    for (const bool add : {false, true}) {
      if (add && sizeof(T) == 1) continue;
      for (size_t i = 0; i < tile.size(); i += sizeof(T)) {
        const T value = small_integer<T>(random);
        std::memcpy(&tile[i], &value, sizeof(T));
      }
      const std::vector<uint4> before = tensor.memory;
      tensor.for_each(at, [&](int byte, T* element) {
        if (element == nullptr) return;
        T value;
        std::memcpy(&value, &tile[static_cast<size_t>(byte)], sizeof(T));
        *element = add ? from_float<T>(to_float(*element) + to_float(value)) : value;
      });
      const std::vector<uint4> expected = tensor.memory;
      std::copy(before.begin(), before.end(), tensor.memory.begin());
      CHECK(launch(store_kernel, config, tensor.map, rank, bytes, at, add, tile.data()).is_ok());
      CHECK(std::memcmp(tensor.memory.data(), expected.data(), expected.size() * 16) == 0);
    }
  }
}

TEST(tma_moves_and_adds_boxes_with_zeros_out_of_bounds) {
  for_each_seed([] {
    for (int rank : {2, 3})
      for (Swizzle swizzle : {Swizzle::kNone, Swizzle::k128}) {
        check_tma<bf16>(rank, swizzle);
        check_tma<fp16>(rank, swizzle);
        check_tma<float>(rank, swizzle);
        check_tma<e4m3>(rank, swizzle);
      }
  });
}

TEST(tensor_maps_are_checked) {
  alignas(16) static float data[64];
  const int64_t sizes[3] = {8, 4, 2}, strides[2] = {32, 128};
  const int32_t box[3] = {8, 2, 1};
  struct Change {
    const char* text;
    void (*apply)(const void*& base, int& rank, int64_t* sizes, int64_t* strides, int32_t* box,
                  Swizzle& swizzle);
  };
#define CHANGE(text, statement)                                                            \
  {                                                                                        \
    text, [](const void*& base, int& rank, int64_t* sizes, int64_t* strides, int32_t* box, \
             Swizzle& swizzle) {                                                           \
      (void)base, (void)rank, (void)sizes, (void)strides, (void)box, (void)swizzle;        \
      statement;                                                                           \
    }                                                                                      \
  }
  const Change changes[] = {
      CHANGE("rank: expected 2 or 3, got 1", rank = 1),
      CHANGE("base: expected an address that 16 divides", base = data + 1),
      CHANGE("base:", base = nullptr),
      CHANGE("sizes[1]: expected 1 to 2^32, got 0", sizes[1] = 0),
      CHANGE("sizes[0]: expected", sizes[0] = (int64_t{1} << 32) + 1),
      CHANGE("strides_bytes[1]: expected a multiple of 16 below 2^40, got 136", strides[1] = 136),
      CHANGE("strides_bytes[0]:", strides[0] = int64_t{1} << 40),
      CHANGE("box[1]: expected 1 to 256, got 257", box[1] = 257),
      CHANGE("box[2]: expected 1 to 256, got 0", box[2] = 0),
      CHANGE("box[0]: expected a multiple of 16 bytes, got 20 bytes", box[0] = 5),
      CHANGE("box[0]: expected 128 bytes", swizzle = Swizzle::k128),
  };
#undef CHANGE
  for (const Change& change : changes) {
    const void* base = data;
    int rank = 3;
    int64_t n[3], s[2];
    int32_t b[3];
    std::copy(sizes, sizes + 3, n);
    std::copy(strides, strides + 2, s);
    std::copy(box, box + 3, b);
    Swizzle swizzle = Swizzle::kNone;
    TensorMap map;
    CHECK(encode_tensor_map<float>(&map, base, rank, n, s, b, swizzle).is_ok());
    change.apply(base, rank, n, s, b, swizzle);
    const Status status = encode_tensor_map<float>(&map, base, rank, n, s, b, swizzle);
    CHECK(status.code == KIMI_INVALID_ARGUMENT);
    CHECK(status.message.find(change.text) != std::string::npos);
  }
}

// ---- wgmma --------------------------------------------------------------------------------------

constexpr int kTileDepthBytes = 128;

/// Where value `k` of depth of row `outer` lies in a tile with 128-byte swizzle.
template <class T>
int place(Major major, int outer, int k) {
  const int row = major == Major::kDepth ? outer : outer / 64 * 64 + k;
  const int byte = static_cast<int>(sizeof(T)) * (major == Major::kDepth ? k : outer % 64);
  return row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16;
}

// out [64, N] = keep * start [64, N] + a [64, 128 bytes] b [N, 128 bytes]^T, four steps.
template <class T, int kN, Major kA, Major kB>
__global__ void wgmma_kernel(const T* a, const T* b, const float* start, float* out) {
  KIMI_SHARED(char, shared);
  constexpr int kDepth = kTileDepthBytes / sizeof(T);
  constexpr int kOfA = 64 * 128;
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < 64 * kDepth; i += 128)
    *reinterpret_cast<T*>(shared + place<T>(kA, i / kDepth, i % kDepth)) = a[i];
  for (int i = t; i < kN * kDepth; i += 128)
    *reinterpret_cast<T*>(shared + kOfA + place<T>(kB, i / kDepth, i % kDepth)) = b[i];
  fence_async_shared();
  __syncthreads();
  float d[kN / 2];
  const auto at = [&](int i) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
    return row * kN + i / 4 * 8 + t % 4 * 2 + i % 2;
  };
  for (int i = 0; i < kN / 2; ++i) d[i] = start == nullptr ? NAN : start[at(i)];
  const uint64_t of_a = wgmma_descriptor<kA>(shared), of_b = wgmma_descriptor<kB>(shared + kOfA);
  wgmma_fence(d);
  wgmma_fence();
  for (int step = 0; step < 4; ++step)
    wgmma<T, kN, kA, kB>(d, wgmma_advance<kA>(of_a, step), wgmma_advance<kB>(of_b, step),
                         step > 0 || start != nullptr);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_fence(d);
  for (int i = 0; i < kN / 2; ++i) out[at(i)] = d[i];
}

template <class T, int kN, Major kA = Major::kDepth, Major kB = Major::kDepth>
void check_wgmma() {
  constexpr int kDepth = kTileDepthBytes / sizeof(T);
  constexpr int kOuterBlocks = kB == Major::kDepth ? kN : (kN + 63) / 64 * 64;
  std::mt19937 random(kN);
  std::vector<T> a(64 * kDepth), b(size_t{kN} * kDepth);
  for (T& v : a) v = small_integer<T>(random);
  for (T& v : b) v = small_integer<T>(random);
  std::vector<float> start(64 * kN), out(start.size());
  for (float& v : start) v = static_cast<float>(random() % 100);
  for (const bool keep : {false, true}) {
    const LaunchConfig config{1, 128, 128 * (64 + kOuterBlocks)};
    CHECK(launch(wgmma_kernel<T, kN, kA, kB>, config, a.data(), b.data(),
                 keep ? start.data() : nullptr, out.data())
              .is_ok());
    for (int r = 0; r < 64; ++r)
      for (int c = 0; c < kN; ++c) {
        float sum = keep ? start[static_cast<size_t>(r * kN + c)] : 0;
        for (int k = 0; k < kDepth; ++k)
          sum += to_float(a[static_cast<size_t>(r * kDepth + k)]) *
                 to_float(b[static_cast<size_t>(c * kDepth + k)]);
        CHECK(out[static_cast<size_t>(r * kN + c)] == sum);
      }
  }
}

template <class T, int kN>
void check_majors() {
  check_wgmma<T, kN, Major::kDepth, Major::kDepth>();
  check_wgmma<T, kN, Major::kDepth, Major::kOuter>();
  check_wgmma<T, kN, Major::kOuter, Major::kDepth>();
  check_wgmma<T, kN, Major::kOuter, Major::kOuter>();
}

TEST(wgmma_of_every_shape) {
  check_wgmma<bf16, 8>();
  check_wgmma<bf16, 16>();
  check_wgmma<bf16, 24>();
  check_wgmma<bf16, 32>();
  check_wgmma<bf16, 40>();
  check_wgmma<bf16, 48>();
  check_wgmma<bf16, 56>();
  check_wgmma<bf16, 64>();
  check_wgmma<bf16, 80>();
  check_wgmma<bf16, 96>();
  check_wgmma<bf16, 112>();
  check_wgmma<bf16, 128>();
  check_wgmma<bf16, 160>();
  check_wgmma<bf16, 192>();
  check_wgmma<bf16, 224>();
  check_wgmma<bf16, 256>();
}

TEST(wgmma_of_every_type_and_major_dimension) {
  for_each_seed([] {
    check_majors<bf16, 8>();
    check_majors<bf16, 128>();
    check_majors<fp16, 32>();
    check_wgmma<e4m3, 8>();
    check_wgmma<e4m3, 64>();
  });
  check_majors<fp16, 256>();
  check_wgmma<e4m3, 256>();
}

// ---- stmatrix -----------------------------------------------------------------------------------

// Lane l holds, of matrix m, the values (m, l / 4, 2 (l % 4)) and its right neighbour.
__global__ void stmatrix_kernel(bool transposed, int offset, uint16_t* out) {
  KIMI_SHARED(uint16_t, tile);
  const uint32_t lane = threadIdx.x;
  uint32_t r[4];
  for (uint32_t m = 0; m < 4; ++m) {
    const uint32_t first = m * 64 + lane / 4 * 8 + lane % 4 * 2;
    r[m] = first | (first + 1) << 16;
  }
  uint16_t* const row = tile + (31 - lane) * 8 + offset;  // rows in another order
  if (transposed)
    stmatrix_x4_transposed(row, r[0], r[1], r[2], r[3]);
  else
    stmatrix_x4(row, r[0], r[1], r[2], r[3]);
  __syncwarp();
  for (uint32_t i = lane; i < 256; i += 32) out[i] = tile[i];
}

TEST(stmatrix_stores_rows_or_columns) {
  for_each_seed([] {
    for (const bool transposed : {false, true}) {
      std::vector<uint16_t> out(256);
      CHECK(launch(stmatrix_kernel, LaunchConfig{1, 32, 512}, transposed, 0, out.data()).is_ok());
      for (int m = 0; m < 4; ++m)
        for (int row = 0; row < 8; ++row)
          for (int column = 0; column < 8; ++column) {
            const int value = m * 64 + (transposed ? column * 8 + row : row * 8 + column);
            CHECK(out[static_cast<size_t>((31 - m * 8 - row) * 8 + column)] == value);
          }
      EXPECT_ERROR(
          simt::Error, "stmatrix_x4: the address of a row must be a multiple of 16",
          (void)launch(stmatrix_kernel, LaunchConfig{1, 32, 1024}, transposed, 1, out.data()));
    }
  });
}

}  // namespace

TEST_MAIN()
