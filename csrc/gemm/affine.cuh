// SPDX-License-Identifier: MIT
// AffineParams as a policy of epilogue.cuh: D = alpha sum + beta C + delta [i = j] in fp32, rounded
// to T, then times `unit` and rounded to D's dtype.
//
// Of a symmetric D an element (i, j) is written iff j <= i, and its mirror image iff j < i, from
// the same value: D is bitwise symmetric, and C above the diagonal is never read. C may be D: a lane
// reads where it then writes, and mirror images lie where nobody reads.
#pragma once

#include "device/math.cuh"
#include "gemm/epilogue.cuh"

namespace kimi::gemm {

struct AffineWork : AffineParams {
  bool wide_c, wide_d;  // 16 bytes divide every address
};

inline AffineWork work_of(const Product& p, const AffineParams& params) {
  const auto is_wide = [&](const void* data, int64_t row, int64_t group, kimi_dtype dtype) {
    const int64_t size = size_of(dtype);
    return divides16(data, row, size) && (p.groups.count == 1 || divides16(data, group, size));
  };
  AffineWork out{params, false, false};
  if (out.beta == 0.0f) out.c = nullptr;
  out.wide_c = is_wide(out.c, out.c_row_stride, out.c_group_stride, p.dtype);
  out.wide_d = is_wide(out.d, out.d_row_stride, out.d_group_stride, out.d_dtype);
  return out;
}

template <class T>
struct Affine {
  using Params = AffineWork;
  static constexpr bool kGated = false, kWritesZeros = false;
  static constexpr int kRun = 8;

  // v becomes what is stored.
  __device__ static void write(const Params& s, const Product& p, const Place& at, float (&v)[8],
                               int count) {
    const int64_t diagonal = at.row - at.col;  // the element that lies on it
    if (p.lower && diagonal + 1 < count) count = static_cast<int>(diagonal + 1);
    if (count <= 0) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = mul_rn(s.alpha, v[i]);
    if (s.c != nullptr) {
      float c[8];
      load8(static_cast<const T*>(s.c) + at.group * s.c_group_stride + at.row * s.c_row_stride +
                at.col,
            c, count, s.wide_c);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = fma_rn(s.beta, c[i], v[i]);
    }
    if (s.delta != 0.0f)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i == diagonal) v[i] = add_rn(v[i], s.delta);
#pragma unroll
    for (int i = 0; i < 8; i += 2) round(s, v[i], v[i + 1]);
    store(s, at, v, 0, count);
  }

  __device__ static void mirror(const Params& s, const Place& at, const float (&v)[8], int first,
                                int end) {
    if (first < end) store(s, at, v, first, end);
  }

  // To T, and times unit.
  __device__ static void round(const Params& s, float& low, float& high) {
    if constexpr (sizeof(T) == 2) widen_pair<T>(round_pair<T>(low, high), low, high);
    low = mul_rn(s.unit, low);
    high = mul_rn(s.unit, high);
  }

 private:
  __device__ static void store(const Params& s, const Place& at, const float (&v)[8], int first,
                               int end) {
    if (s.d_dtype == KIMI_FLOAT32)
      store_as<float>(s, at, v, first, end);
    else if (s.d_dtype == KIMI_BFLOAT16)
      store_as<bf16>(s, at, v, first, end);
    else
      store_as<fp16>(s, at, v, first, end);
  }
  template <class D>
  __device__ static void store_as(const Params& s, const Place& at, const float (&v)[8], int first,
                                  int end) {
    D* const to =
        static_cast<D*>(s.d) + at.group * s.d_group_stride + at.row * s.d_row_stride + at.col;
    if (first == 0) return store8(to, v, end, s.wide_d);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i >= first && i < end) to[i] = from_float<D>(v[i]);
  }
};

}  // namespace kimi::gemm
