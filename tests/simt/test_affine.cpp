// SPDX-License-Identifier: MIT
//
// Batches with the affine epilogue, run on the host: every kernel, all majors, dtypes and edges,
// against plain loops. Operands are small multiples of 1/16, so that every sum is exact and D has
// the very bits. Whatever is not to be read is NaN, C above the diagonal of a symmetric D too.
#include "common/sm.h"
#include "gemm/affine.cuh"
#include "product_cases.h"

namespace {

using namespace product_cases;

struct Batch {
  kimi_dtype dtype = KIMI_BFLOAT16, d_dtype = KIMI_BFLOAT16;
  int count = 2;
  int64_t rows = 0, cols = 0, depth = 0;
  Contiguous a = kAlongDepth, b = kAlongDepth;
  bool lower = false;
  float alpha = 1.0f, beta = 0.0f, delta = 0.0f, unit = 1.0f;
  bool in_place = false;  // C is D
  int pad = 8, misalign = 0, out_pad = 8, out_misalign = 0;
  uint64_t seed = 3;

  std::string text() const {
    std::string t = "seed " + std::to_string(seed);
    for (int64_t n : {int64_t{dtype}, int64_t{d_dtype}, int64_t{count}, rows, cols, depth,
                      int64_t{a}, int64_t{b}, int64_t{lower}, int64_t{in_place}, int64_t{pad},
                      int64_t{misalign}, int64_t{out_pad}, int64_t{out_misalign}})
      t += " " + std::to_string(n);
    for (float f : {alpha, beta, delta, unit}) t += " " + std::to_string(f);
    return t;
  }
};

using Kernel = Status (*)(const Product&, const AffineParams&, void*);

// As on a GPU that has no other kernels.
Status on_sm80(const Product& p, const AffineParams& out, void* stream) {
  CHECK(set_max_sm(80).is_ok());
  const Status status = affine_cuda(p, out, stream);
  CHECK(set_max_sm(0).is_ok());
  return status;
}

template <class T, class D>
void check_as(const Batch& b, Kernel kernel) {
  simt::settings().seed = b.seed;
  std::mt19937 random(static_cast<unsigned>(b.seed * 7919 + 13));
  const auto value = [&] {
    return from_float<T>(static_cast<float>(static_cast<int>(random() % 9) - 4) / 16.0f);
  };
  const auto fill = [&](Operand<T>& m, int64_t outer, int64_t depth) {
    for (int64_t e = 0; e < b.count; ++e)
      for (int64_t i = 0; i < outer; ++i)
        for (int64_t d = 0; d < depth; ++d) m.at(e, i, d) = value();
  };
  Operand<T> a(b.count, b.rows, b.depth, b.a, b.pad, b.misalign),
      bb(b.count, b.cols, b.depth, b.b, b.pad, b.misalign);
  fill(a, b.rows, b.depth);
  fill(bb, b.cols, b.depth);
  const int64_t stride = b.cols + b.out_pad, of_matrix = b.rows * stride;
  Output<D> d(b.count * of_matrix, b.out_misalign);
  Operand<T> c(b.count, b.rows, b.cols, kAlongDepth, b.out_pad, b.out_misalign);
  Product p{};
  p.grouping = Grouping::kBatch;
  p.dtype = b.dtype;
  p.a = a.matrix({}, 1);
  p.b = bb.matrix({}, 1);
  p.groups = {nullptr, 0, b.count};
  p.rows = b.rows;
  p.depth = b.depth;
  p.cols = b.cols;
  p.lower = b.lower;
  for (int64_t e = 0; e < b.count; ++e)
    for (int64_t i = 0; i < b.rows; ++i)
      for (int64_t j = 0; j < (b.lower ? i + 1 : b.cols); ++j) {
        float sum = 0.0f;
        for (int64_t k = 0; k < b.depth; ++k)
          sum += to_float(a.at(e, i, k)) * to_float(bb.at(e, j, k));
        float v = b.alpha * sum;
        if (b.beta != 0.0f) {
          const T old = value();
          c.at(e, i, j) = old;
          if (b.in_place) d.data()[e * of_matrix + i * stride + j] = from_float<D>(to_float(old));
          v = std::fma(b.beta, to_float(old), v);
        }
        if (i == j && b.delta != 0.0f) v += b.delta;
        v = b.unit * to_float(from_float<T>(v));
        d.expect(e * of_matrix + i * stride + j, v);
        if (b.lower) d.expect(e * of_matrix + j * stride + i, v);
      }
  AffineParams out{d.data(), stride, of_matrix, b.d_dtype};
  const Matrix old = c.matrix({}, 1);
  out.c = b.in_place ? d.data() : old.data;
  out.c_row_stride = b.in_place ? stride : old.outer_stride;
  out.c_group_stride = b.in_place ? of_matrix : old.group_stride;
  out.alpha = b.alpha, out.beta = b.beta, out.delta = b.delta, out.unit = b.unit;
  const Status status = kernel(p, out, nullptr);
  if (!status.is_ok()) check::fail(__FILE__, __LINE__, status.message + ": " + b.text());
  d.check("d", b.text());
}

void check_batch(const Batch& b, Kernel kernel) {
  dispatch(b.dtype,
           [&]<class T>() { dispatch(b.d_dtype, [&]<class D>() { check_as<T, D>(b, kernel); }); });
}

constexpr kimi_dtype kTypes[] = {KIMI_BFLOAT16, KIMI_FLOAT16, KIMI_FLOAT32};
constexpr Contiguous kWays[] = {kAlongDepth, kAlongOuter, kNeither};

TEST(sm80_majors_and_dtypes) {
  uint64_t seed = 0;
  for (kimi_dtype dtype : kTypes)
    for (Contiguous a : kWays)
      for (Contiguous b : kWays)
        for (bool lower : {false, true}) {
          Batch x{.dtype = dtype, .a = a, .b = b, .lower = lower, .seed = ++seed};
          x.d_dtype = seed % 5 == 0 ? kTypes[seed / 5 % 3] : dtype;
          x.count = seed % 3 == 0 ? 3 : 2;
          x.cols = seed % 2 == 0 ? 72 : 136;
          x.rows = lower || a == kNeither ? x.cols : 200;
          x.depth = seed % 4 == 0 ? 40 : 72;
          x.alpha = seed % 3 == 1 ? -0.5f : 1.0f;
          x.beta = seed % 2 == 0 ? 0.75f : 0.0f;
          x.delta = seed % 3 == 0 ? 3.5f : 0.0f;
          x.unit = seed % 4 == 1 ? 0.125f : 1.0f;
          x.in_place = x.d_dtype == dtype && seed % 4 == 2;
          check_batch(x, on_sm80);
        }
}

void check_edges(Kernel kernel, std::initializer_list<int64_t> sizes, kimi_dtype dtype,
                 uint64_t seed) {
  for (int64_t n : sizes)
    for (int variant = 0; variant < 3; ++variant) {
      Batch x{.dtype = dtype, .d_dtype = dtype, .rows = n, .cols = n, .seed = ++seed};
      x.lower = variant != 2;
      x.count = n < 64 ? 3 : 1;
      x.depth = variant == 0 ? n : 24;
      x.alpha = 2.0f, x.beta = -1.5f, x.delta = 0.25f;
      x.in_place = variant == 1;
      x.pad = x.out_pad = static_cast<int>(variant == 2 ? 3 : (8 - n % 8) % 8);
      x.misalign = x.out_misalign = variant == 2 ? 1 : 0;
      check_batch(x, kernel);
    }
}

TEST(sm80_sizes_around_the_tiles_and_odd_strides) {
  check_edges(on_sm80, {1, 2, 7, 16, 63, 64, 65, 129, 136, 257}, KIMI_BFLOAT16, 100);
  check_edges(on_sm80, {5, 66, 128}, KIMI_FLOAT32, 200);
}

TEST(without_depth_or_matrices) {
  for (int64_t n : {0, 9}) {
    Batch x{.count = 2, .rows = n, .cols = n, .depth = 0, .lower = true, .beta = 2.0f};
    x.delta = 1.0f;
    check_batch(x, on_sm80);
    x.count = 0;
    check_batch(x, on_sm80);
  }
}

}  // namespace

TEST_MAIN()
