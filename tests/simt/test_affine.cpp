// SPDX-License-Identifier: MIT
//
// Batches with the affine epilogue, run on the host: every kernel, all majors, dtypes and edges,
// against plain loops. Operands are small multiples of 1/16, so that every sum is exact and D has
// the very bits. Whatever is not to be read is NaN, C above the diagonal of a symmetric D too.
#include <span>

#include "common/sm.h"
#include "gemm/affine.cuh"
#include "gemm/sm90/job.h"
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
  int apart = 0;  // elements between the matrices of D
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

Status on_any(const Product& p, const AffineParams& out, void* stream) {
  return affine_cuda("batch", p, out, stream);
}

// As on a GPU that has no other kernels.
Status on_sm80(const Product& p, const AffineParams& out, void* stream) {
  CHECK(set_max_sm(80).is_ok());
  const Status status = on_any(p, out, stream);
  CHECK(set_max_sm(0).is_ok());
  return status;
}

// The Hopper kernel, which serves the case; small matrices take narrow tiles by themselves.
template <bool kNarrow>
Status on_sm90(const Product& p, const AffineParams& params, void* stream) {
  if (!sm90::serves(p)) return invalid("not served");
  const AffineWork out = work_of(p, params);
  return p.dtype == KIMI_BFLOAT16 ? sm90::affine<bf16>(p, out, kNarrow, stream)
                                  : sm90::affine<fp16>(p, out, kNarrow, stream);
}

constexpr Kernel kNarrow = on_sm90<true>, kWide = on_sm90<false>;

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
  const int64_t stride = b.cols + b.out_pad, of_matrix = b.rows * stride + b.apart;
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

void check_majors(std::initializer_list<Kernel> kernels, int dtypes, int ways, uint64_t seed) {
  for (kimi_dtype dtype : std::span(kTypes, dtypes))
    for (Contiguous a : std::span(kWays, ways))
      for (Contiguous b : std::span(kWays, ways))
        for (bool lower : {false, true}) {
          if (dtypes == 2 && a == kAlongOuter && b == kAlongDepth) continue;  // no Hopper kernel
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
          for (Kernel kernel : kernels) check_batch(x, kernel);
        }
}

TEST(sm80_majors_and_dtypes) { check_majors({on_sm80}, 3, 3, 0); }

TEST(sm90_majors_and_dtypes) { check_majors({kNarrow, kWide}, 2, 2, 300); }

void check_edges(Kernel kernel, std::initializer_list<int64_t> sizes, kimi_dtype dtype,
                 uint64_t seed) {
  for (int64_t n : sizes)
    for (int variant = 0; variant < 4; ++variant) {
      Batch x{.dtype = dtype, .d_dtype = dtype, .rows = n, .cols = n, .seed = ++seed};
      x.lower = variant < 3;
      x.count = n < 64 ? 3 : 1;
      x.depth = variant == 0 ? n : 24;
      x.alpha = 2.0f, x.beta = -1.5f, x.delta = 0.25f;
      x.in_place = variant == 1;
      // Rows of TMA; then a C and a D that it cannot take, then operands too.
      x.pad = static_cast<int>((8 - (variant == 0 ? n : 24) % 8) % 8);
      x.out_pad = variant < 2 ? static_cast<int>((8 - n % 8) % 8) : 3;
      x.out_misalign = variant < 2 ? 0 : 1;
      x.apart = variant == 0 ? 4 : 0;
      if (variant == 3 && (kernel == kNarrow || kernel == kWide)) continue;
      x.misalign = variant == 3 ? 1 : 0;
      check_batch(x, kernel);
    }
}

TEST(sm80_sizes_around_the_tiles_and_odd_strides) {
  check_edges(on_sm80, {1, 2, 7, 16, 63, 64, 65, 129, 136, 257}, KIMI_BFLOAT16, 100);
  check_edges(on_sm80, {5, 66, 128}, KIMI_FLOAT32, 200);
}

TEST(sm90_sizes_around_the_tiles_and_odd_strides) {
  check_edges(kNarrow, {1, 7, 64, 65, 129, 200}, KIMI_FLOAT16, 400);
  check_edges(kWide, {127, 257, 392}, KIMI_BFLOAT16, 500);
  check_edges(on_any, {9, 72}, KIMI_BFLOAT16, 600);
}

// Every order in which the runner may switch threads, and both ways of asynchronous copies.
TEST(twenty_seeds) {
  for (uint64_t seed = 1000; seed < 1020; ++seed)
    for (Kernel kernel : {on_sm80, kNarrow, kWide}) {
      Batch x{.dtype = KIMI_FLOAT16, .d_dtype = KIMI_FLOAT16, .rows = 136, .cols = 136};
      x.depth = 64;
      x.lower = true;
      x.beta = 0.5f;
      x.in_place = true;
      x.seed = seed;
      check_batch(x, kernel);
    }
}

// The symmetric products X X^T + C / 2 of some of the matrices of x, c, as the bits of D.
std::vector<std::vector<uint16_t>> products(Kernel kernel, const std::vector<int>& which) {
  constexpr int64_t kRows = 200, kDepth = 136;
  std::vector<bf16> x, c, d(which.size() * kRows * kRows);
  for (int matrix : which) {
    std::mt19937 random(static_cast<unsigned>(matrix));
    std::normal_distribution<float> normal;
    for (int i = 0; i < kRows * kDepth; ++i) x.push_back(from_float<bf16>(normal(random)));
    for (int i = 0; i < kRows * kRows; ++i) c.push_back(from_float<bf16>(normal(random)));
  }
  Product p{};
  p.grouping = Grouping::kBatch;
  p.dtype = KIMI_BFLOAT16;
  p.a = p.b = {x.data(), kDepth, 1, kRows * kDepth};
  p.groups = {nullptr, 0, static_cast<int32_t>(which.size())};
  p.rows = p.cols = kRows;
  p.depth = kDepth;
  p.lower = true;
  AffineParams out{d.data(), kRows, kRows * kRows, KIMI_BFLOAT16};
  out.c = c.data(), out.c_row_stride = kRows, out.c_group_stride = kRows * kRows;
  out.beta = 0.5f;
  CHECK(kernel(p, out, nullptr).is_ok());
  std::vector<std::vector<uint16_t>> result(which.size());
  for (size_t i = 0; i < d.size(); ++i) result[i / (kRows * kRows)].push_back(d[i].bits);
  return result;
}

TEST(a_matrix_keeps_its_bits_in_any_company) {
  for (Kernel kernel : {on_sm80, kNarrow, kWide}) {
    const auto batch = products(kernel, {5, 6, 7}), other = products(kernel, {7, 1, 2, 5});
    CHECK(batch[2] == other[0]);
    CHECK(batch[0] == other[3]);
    CHECK(batch[1] == products(kernel, {6})[0]);
    CHECK(batch[0] != batch[1]);
  }
  CHECK(products(kNarrow, {5}) == products(kWide, {5}));  // the width of tiles depends on the batch
}

// Of a symmetric D tiles above the diagonal are not multiplied.
TEST(a_lower_triangle_is_less_work) {
  const auto work = [](Kernel kernel, bool lower) {
    Batch x{.count = 1, .rows = 384, .cols = 384, .depth = 256, .lower = lower};
    check_batch(x, kernel);
    const simt::Statistics s = simt::last_statistics();
    return static_cast<double>(kernel == on_sm80 ? s.warp_operations : s.warpgroup_operations);
  };
  for (Kernel kernel : {on_sm80, kNarrow}) CHECK(work(kernel, true) < 0.8 * work(kernel, false));
}

TEST(a_refusal_names_the_op) {
  Product p{};
  p.grouping = Grouping::kBatch;
  p.groups.count = 1;
  p.rows = p.cols = 1;
  p.depth = int64_t{1} << 31;
  const std::string expected = "batch: sizes: expected depth and columns below 2^31";
  CHECK(on_sm80(p, {}, nullptr).message.starts_with(expected));
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
