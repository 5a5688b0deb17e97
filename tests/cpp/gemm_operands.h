// SPDX-License-Identifier: MIT
// Operands of block products for tests: random matrices of every storage, order and gather, in
// memory that ends with their last element.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gemm/cpu/block.h"

namespace kimi::cpu {

struct Random {
  uint64_t state;
  uint32_t operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  float value() { return float(int32_t((*this)())) * 0x1p-31f; }
};

// Memory that ends at a page which nobody may touch: unlike AddressSanitizer that also sees masked
// vectors and tiles. What lies before it is NaN to every float type.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : n_(n) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(n) * sizeof(T);
    const size_t used = (bytes + page - 1) / page * page;
    map_bytes_ = used + page;
    map_ = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED || mprotect(static_cast<char*>(map_) + used, page, PROT_NONE) != 0)
      throw std::runtime_error("no guarded memory");
    std::memset(map_, 0xff, used);
    data_ = reinterpret_cast<T*>(static_cast<char*>(map_) + used - bytes);
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (map_) munmap(map_, map_bytes_);
  }
  T* data() { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + n_; }

 private:
  void swap(Buffer& other) {
    std::swap(map_, other.map_);
    std::swap(map_bytes_, other.map_bytes_);
    std::swap(data_, other.data_);
    std::swap(n_, other.n_);
  }
  void* map_ = nullptr;
  size_t map_bytes_ = 0;
  T* data_ = nullptr;
  int64_t n_ = 0;
};
using Bytes = Buffer<unsigned char>;

enum Order { kAlongDepth, kAlongRows, kStrided };
enum Gather { kNone, kRows, kDepth };
inline constexpr const char* kOrders[] = {"along depth", "along rows", "strided"};
inline constexpr const char* kGathers[] = {"", ", gathered rows", ", gathered depth"};
inline constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBfloat16, Storage::kFloat16,
                                        Storage::kFp8Block, Storage::kInt4Group};
constexpr bool is_quantised(Storage s) { return s > Storage::kFloat16; }

struct Kind {
  Storage storage;
  Order order = kAlongDepth;
  Gather gather = kNone;
  std::string text() const {
    return "storage " + std::to_string(int(storage)) + " " + kOrders[order] + kGathers[gather];
  }
};
inline std::vector<Kind> kinds(bool quantised) {
  std::vector<Kind> all;
  for (Storage storage : kStorages)
    for (Order order : {kAlongDepth, kAlongRows, kStrided})
      for (Gather gather : {kNone, kRows, kDepth})
        if (!is_quantised(storage) || (quantised && order == kAlongDepth && gather == kNone))
          all.push_back({storage, order, gather});
  return all;
}

// An operand whose memory ends with its last element.
struct Matrix {
  Operand x;
  Bytes data, scale;
  Buffer<int32_t> index;

  Matrix(const Kind& kind, int64_t rows, int64_t depth, uint32_t seed) {
    Random random{seed};
    x.storage = kind.storage;
    int64_t source_rows = rows, source_depth = depth;
    if (kind.gather != kNone) {
      int64_t& gathered = kind.gather == kRows ? source_rows : source_depth;
      x.index_divisor = 1 + random() % 3;
      index = Buffer<int32_t>(gathered);
      gathered = gathered / 2 + 1;
      for (int32_t& i : index) i = int32_t(random() % (gathered * x.index_divisor + 1)) - 1;
      (kind.gather == kRows ? x.row_index : x.depth_index) = index.data();
    }
    const int64_t pad = random() % 4;
    bool backwards = false;
    switch (kind.order) {
      case kAlongDepth:
        x.depth_stride = 1, x.row_stride = source_depth + pad;
        if (kind.storage == Storage::kInt4Group) x.row_stride += x.row_stride % 2;
        backwards = random() % 2;
        break;
      case kAlongRows:
        x.row_stride = 1, x.depth_stride = source_rows + pad;
        backwards = random() % 2;
        break;
      case kStrided:
        x.depth_stride = 2, x.row_stride = 2 * source_depth + pad;
    }
    fill((source_rows - 1) * x.row_stride + (source_depth - 1) * x.depth_stride + 1, random);
    scales(source_rows, source_depth, random);
    if (backwards) {
      const bool rows = kind.order == kAlongDepth;
      int64_t& stride = rows ? x.row_stride : x.depth_stride;
      const int64_t last = ((rows ? source_rows : source_depth) - 1) * stride;
      x.data = &data[kind.storage == Storage::kInt4Group  ? last / 2
                     : kind.storage == Storage::kFp8Block ? last
                     : kind.storage == Storage::kFloat32  ? last * 4
                                                          : last * 2];
      stride = -stride;
    }
  }
  Matrix(const Matrix&) = delete;

 private:
  template <class T>
  static void set(Bytes& bytes, int64_t at, T value) {
    std::memcpy(&bytes[at * int64_t(sizeof(T))], &value, sizeof(T));
  }
  void fill(int64_t n, Random& random) {
    const int bits[] = {32, 16, 16, 8, 4};
    data = Bytes((n * bits[int(x.storage)] + 7) / 8);
    if (is_quantised(x.storage)) {
      for (unsigned char& byte : data) {
        byte = static_cast<unsigned char>(random());
        if (x.storage == Storage::kFp8Block && (byte & 0x7f) == 0x7f) byte ^= 1;  // no NaN
      }
    } else {
      for (int64_t i = 0; i < n; ++i)
        dispatch(kimi_dtype(x.storage),
                 [&]<class T>() { set(data, i, from_float<T>(random.value())); });
    }
    x.data = data.data();
  }
  void scales(int64_t rows, int64_t depth, Random& random) {
    const bool fp8 = x.storage == Storage::kFp8Block;
    if (!is_quantised(x.storage)) return;
    const int64_t used = (depth + (fp8 ? 127 : 31)) / (fp8 ? 128 : 32);
    x.scale_stride = used + random() % 3;
    const int64_t n = ((fp8 ? (rows + 127) / 128 : rows) - 1) * x.scale_stride + used;
    scale = Bytes(n * (fp8 ? 4 : 2));
    for (int64_t i = 0; i < n; ++i) {
      const float value = 0.01f * (1.5f + random.value());
      fp8 ? set(scale, i, value) : set(scale, i, from_float<bf16>(value));
    }
    x.scale = scale.data();
  }
};

}  // namespace kimi::cpu
