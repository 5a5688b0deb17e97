// SPDX-License-Identifier: MIT
//
// The Hopper products, run on the host, against plain loops in fp64 (product_cases.h). Small ones
// take narrow tiles by themselves, so that wide tiles are asked for here.
#include <optional>

#include "common/dtype.h"
#include "gemm/sm90/job.h"
#include "product_cases.h"

namespace {

using namespace product_cases;

constexpr kimi_dtype kTypes[] = {KIMI_BFLOAT16, KIMI_FLOAT16};

std::optional<bool> g_narrow;  // or what the product takes by itself

Status store(const Product& p, const StoreParams& out) {
  return sm90::store(p, out, g_narrow.value_or(sm90::is_narrow(p)), nullptr);
}
Status activate(const Product& p, const ActivateParams& params, Pass pass) {
  return dispatch(p.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 4) return invalid("a type that serves() refuses");
    if constexpr (sizeof(T) == 2) return experts::activate_sm90<T>(p, params, pass, nullptr);
  });
}
bool serves(const Product& p, Epilogue epilogue) {
  if (epilogue == Epilogue::kStore) return sm90::serves(p);
  return experts::serves_sm90(p,
                              epilogue == Epilogue::kActivate ? Pass::kForward : Pass::kBackward);
}

// It serves the case, and right.
void check_product(const Case& c, std::optional<bool> narrow = {}) {
  g_narrow = narrow;
  if (!check_case(c, {store, activate, serves}))
    check::fail(__FILE__, __LINE__, "not served: " + c.text());
}

TEST(rows_store_of_few_rows) {
  uint64_t seed = 0;
  for (kimi_dtype dtype : kTypes)
    for (Contiguous b : {kAlongDepth, kAlongOuter})
      for (int variant = 0; variant < 4; ++variant) {
        Case c{.dtype = dtype, .offsets = {0, 1, 1, 18, 33}, .b = b, .seed = ++seed};
        if (variant % 2 == 1) c.offsets = {70, 70, 72};
        c.num_rows = variant % 2 == 1 ? 75 : 40;  // rows after the last group are zeroed
        c.cols = variant == 2 ? 264 : 72;
        c.depth = variant == 0 ? 600 : 104;
        c.bias = seed % 2 == 1;
        c.out_dtype = seed % 3 == 0 ? KIMI_FLOAT32 : dtype;
        c.gather_a = variant >= 2;
        c.divisor = 3;
        c.poison = static_cast<int>(seed % 3);
        check_product(c, variant == 3 ? std::nullopt : std::optional(variant % 2 == 0));
      }
}

TEST(rows_store) {
  uint64_t seed = 20;
  for (kimi_dtype dtype : kTypes)
    for (Contiguous b : {kAlongDepth, kAlongOuter})
      for (bool narrow : {true, false})
        for (int variant = 0; variant < 2; ++variant) {
          Case c{.dtype = dtype, .offsets = {150, 153}, .b = b, .seed = ++seed};
          c.num_rows = 160;
          c.cols = seed % 3 == 0 ? 200 : 72;
          c.depth = 328;
          c.gather_a = seed % 4 == 1;
          c.divisor = 2;
          c.bias = seed % 4 == 2;  // or TMA stores
          c.out_dtype = seed % 3 == 0 ? KIMI_FLOAT32 : dtype;
          c.poison = 1;
          check_product(c, narrow);
        }
}

// Many tiles of a block one after the other, of any number of stages.
TEST(rows_store_of_many_tiles) {
  uint64_t seed = 60;
  for (bool narrow : {true, false})
    for (int variant = 0; variant < 2; ++variant) {
      Case c{.offsets = {1, 1, 3, 8, 8, 9, 130, 131, 133}, .num_rows = 134, .seed = ++seed};
      c.cols = 520;
      c.depth = 8 << seed % 4;
      c.b = seed % 2 == 0 ? kAlongDepth : kAlongOuter;
      c.gather_a = seed % 3 == 0;
      c.poison = 3;
      check_product(c, narrow);
    }
}

TEST(rows_more_groups_than_a_warp_has_lanes) {
  for (bool narrow : {true, false}) {
    Case c{.seed = 121};
    std::mt19937 random(5);
    int32_t end = 0;
    for (int e = 0; e < 70; ++e) {
      if (e > 30 && e < 66) end += random() % 3 == 0;
      if (e == 2 || e == 68) end += 20;
      c.offsets.push_back(end);
    }
    c.num_rows = end + 3;
    c.cols = 72;
    c.depth = 16;
    check_product(c, narrow);
  }
}

TEST(depth_store) {
  uint64_t seed = 160;
  for (kimi_dtype dtype : kTypes)
    for (int variant = 0; variant < 8; ++variant) {
      Case c{.dtype = dtype, .grouping = Grouping::kK, .offsets = {0, 5, 5, 200, 201, 201}};
      c.seed = ++seed;
      c.num_rows = 210;
      c.a = c.b = kAlongOuter;
      c.rows = variant % 4 == 0 ? 136 : 40;
      c.cols = variant == 3 ? 264 : 72;
      c.accumulate = variant % 2 == 1;
      c.gather_a = variant == 0 || variant == 5;
      c.gather_b = variant == 1 || variant == 4;
      c.divisor = 3;
      c.poison = variant == 0 ? 5 : 3;
      c.out_dtype = variant % 3 == 0 ? dtype : KIMI_FLOAT32;
      check_product(c);
    }
}

constexpr kimi_activation kActivations[] = {KIMI_ACTIVATION_SILU, KIMI_ACTIVATION_GELU,
                                            KIMI_ACTIVATION_SITU};

TEST(activate) {
  uint64_t seed = 200;
  for (kimi_dtype dtype : kTypes)
    for (int variant = 0; variant < 2; ++variant)
      for (kimi_activation activation : kActivations) {
        Case c{.dtype = dtype, .epilogue = Epilogue::kActivate, .activation = activation};
        c.seed = ++seed;
        c.offsets = variant == 0 ? std::vector<int32_t>{0, 1, 1, 18, 33}
                                 : std::vector<int32_t>{20, 20, 150};
        c.num_rows = c.offsets.back() + 5;  // rows after the last group are left alone
        c.cols = activation == KIMI_ACTIVATION_GELU   ? 19
                 : activation == KIMI_ACTIVATION_SILU ? 200
                                                      : 64;
        c.depth = variant == 0 ? 400 : 72;
        c.gather_a = seed % 2 == 0;
        c.divisor = 2;
        c.keep_gate_up = seed % 4 != 0;
        c.keep_hidden = seed % 4 != 1;
        c.poison = 2;
        check_product(c);
      }
}

// 16 rows leave by TMA, 15 lane by lane: what a row becomes does not depend on those beside it.
TEST(silu_has_the_same_bits_whole_and_ragged) {
  constexpr int64_t kRows = 16, kDepth = 64, kCols = 72;
  std::mt19937 random(9);
  const auto fill = [&](int64_t size) {
    std::vector<bf16> values(static_cast<size_t>(size));
    for (bf16& v : values) v = from_float<bf16>(std::normal_distribution<float>()(random));
    return values;
  };
  const std::vector<bf16> a = fill(kRows * kDepth), b = fill(2 * kCols * kDepth);
  std::vector<bf16> hidden[2], gate_up[2];
  for (int i = 0; i < 2; ++i) {
    const int32_t offsets[] = {static_cast<int32_t>(kRows - i)};
    hidden[i].assign(kRows * kCols, bf16{0});
    gate_up[i].assign(kRows * 2 * kCols, bf16{0});
    Product p{};
    p.dtype = KIMI_BFLOAT16;
    p.a = {a.data(), kDepth, 1};
    p.b = {b.data(), kDepth, 1, 2 * kCols * kDepth};
    p.groups = {offsets, kRows, 1};
    p.depth = kDepth;
    p.cols = kCols;
    ActivateParams params{};
    params.gate_up = gate_up[i].data();
    params.hidden = hidden[i].data();
    params.wide = true;
    CHECK(experts::activate_sm90<bf16>(p, params, Pass::kForward, nullptr).is_ok());
  }
  for (int64_t at = 0; at < (kRows - 1) * kCols; ++at)
    CHECK(hidden[0][at].bits == hidden[1][at].bits && hidden[0][at].bits != 0);
  for (int64_t at = 0; at < (kRows - 1) * 2 * kCols; ++at)
    CHECK(gate_up[0][at].bits == gate_up[1][at].bits);
  CHECK(hidden[1][(kRows - 1) * kCols].bits == 0);  // after the last group nothing is written
}

TEST(activate_backward) {
  uint64_t seed = 240;
  for (kimi_dtype dtype : kTypes)
    for (int variant = 0; variant < 2; ++variant)
      for (kimi_activation activation : kActivations) {
        Case c{.dtype = dtype, .epilogue = Epilogue::kActivateBackward, .activation = activation};
        c.seed = ++seed;
        c.offsets = {20, 20, 150};
        c.num_rows = 155;
        c.cols = activation == KIMI_ACTIVATION_GELU   ? 40
                 : activation == KIMI_ACTIVATION_SILU ? 160
                                                      : 264;
        c.b = kAlongOuter;
        c.depth = 72;
        c.gather_a = seed % 2 == 0;
        c.divisor = 2;
        c.out_misalign = seed % 3 == 0 ? 1 : 0;
        c.poison = 2;
        check_product(c);
      }
}

// Of 384 columns the second tile is half of one: 16 of its 32 KB of B are loaded.
TEST(a_last_tile_of_few_columns_is_half) {
  Case c{.offsets = {64}, .num_rows = 64, .seed = 140};
  c.depth = 128;
  for (Contiguous b : {kAlongDepth, kAlongOuter})
    for (int64_t cols : {384, 392, 264}) {
      c.b = b;
      c.cols = cols;
      check_product(c, false);
      const uint64_t halves = cols == 392 ? 4 : 3;
      CHECK(simt::last_statistics().loaded_bytes == 2 * (halves * 16 + 2 * 8) * 1024);
    }
}

struct WithTrial {
  explicit WithTrial(const char* text) { sm90::trial() = sm90::trial_of(text); }
  ~WithTrial() { sm90::trial() = {}; }
};

Case wgrad(uint64_t seed) {
  Case c{.grouping = Grouping::kK, .offsets = {0, 5, 5, 75, 76}, .num_rows = 80, .seed = seed};
  c.a = c.b = kAlongOuter;
  c.rows = 128;
  c.cols = 256;
  return c;
}

// A stage of each operand by one load, where 64 divides its columns.
TEST(depth_loads_a_stage_at_once) {
  constexpr uint64_t kStages = 1 + 2 + 1;
  for (int64_t rows : {64, 128, 40})
    for (int64_t cols : {256, 64, 320, 72}) {
      Case c = wgrad(static_cast<uint64_t>(rows + cols));
      c.rows = rows;
      c.cols = cols;
      c.accumulate = cols == 64;
      const uint64_t boxes_a = rows == 128 ? 2 : 1, boxes_b = cols == 64 || cols == 72 ? 2 : 4;
      const uint64_t tiles = cols == 320 ? 2 : 1, all_b = cols == 320 ? 6 : boxes_b;
      check_product(c);
      CHECK(simt::last_statistics().loads ==
            kStages * ((rows % 64 == 0 ? 1 : boxes_a) * tiles + (cols % 64 == 0 ? tiles : all_b)));
      const WithTrial trial("boxes=0");
      check_product(c);
      CHECK(simt::last_statistics().loads == kStages * (boxes_a * tiles + all_b));
    }
}

// Each element of those matrices that get something, once.
TEST(depth_added_to_fp32_is_asked_for_ahead) {
  for (uint64_t seed = 0; seed < 12; seed += 3) {
    Case c = wgrad(seed);
    c.rows = 200;
    c.cols = 264;
    for (bool accumulate : {true, false}) {
      c.accumulate = accumulate;
      check_product(c);
      CHECK(simt::last_statistics().prefetched_bytes == (accumulate ? 3 * 200 * 264 * 4 : 0));
    }
    const WithTrial trial("prefetch=0");
    c.accumulate = true;
    check_product(c);
    CHECK(simt::last_statistics().prefetched_bytes == 0);
  }
}

// Consumer 0 multiplies first in any order of threads; without a lead consumer 1 may.
TEST(consumers_apart) {
  bool other_first = false;
  for (uint64_t seed : {0, 1, 3, 5, 8, 10}) {
    Case c{.offsets = {100}, .num_rows = 100, .b = kAlongOuter, .seed = seed};
    c.cols = 72;
    c.depth = 192;
    check_product(c, true);
    other_first |= simt::last_statistics().first_warpgroup == 2;
    const WithTrial trial(seed % 2 == 0 ? "lead=2,turn=0" : "lead=3,swizzle=1");
    check_product(c, true);
    CHECK(simt::last_statistics().first_warpgroup == 1);
    c.offsets = {1, 1, 3, 129, 130, 200};  // tiles of one consumer, zero rows
    c.num_rows = 210;
    c.depth = 8 << seed % 6;
    check_product(c, false);
    c = wgrad(seed);
    check_product(c);
  }
  CHECK(other_first);
}

// Threads that wait for their copies, in place of barriers that count them.
TEST(gathers_that_are_waited_for) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const WithTrial trial("noinc=0");
    Case c{.offsets = {1, 1, 140, 150}, .num_rows = 160, .gather_a = true, .seed = seed};
    c.cols = 72;
    c.depth = 64 * (1 + int64_t(seed) % 7);
    c.divisor = 2;
    check_product(c);
    c = wgrad(seed);
    (seed % 2 == 0 ? c.gather_a : c.gather_b) = true;
    check_product(c);
  }
}

TEST(nothing_is_written_without_an_epilogue) {
  const WithTrial trial("epilogue=0");
  const int32_t offsets[] = {70};
  std::vector<uint4> a(70 * 64 / 8), b(64 * 64 / 8), out(70 * 64 / 8, uint4{1, 2, 3, 4});
  Product p{};
  p.grouping = Grouping::kM;
  p.dtype = KIMI_BFLOAT16;
  p.a = {a.data(), 64, 1};
  p.b = {b.data(), 64, 1, 64 * 64};
  p.groups = {offsets, 70, 1};
  p.depth = p.cols = 64;
  CHECK(sm90::store(p, {out.data(), 64, 0, KIMI_BFLOAT16}, false, nullptr).is_ok());
  for (const uint4& value : out) CHECK(value.x == 1 && value.w == 4);
}

TEST(trials_are_read_from_their_text) {
  const sm90::Trial usual;
  CHECK(sm90::trial_of("").lead == usual.lead);
  const sm90::Trial t = sm90::trial_of("lead=2,swizzle=0,order=x,prefetch=,nothing=1,turn=0,boxes");
  CHECK(t.lead == 2 && t.turn == 0);
  CHECK(t.swizzle == 1);  // there is a row tile at least
  CHECK(t.order == usual.order && t.prefetch == usual.prefetch && t.boxes == usual.boxes);
}

kimi_status g_code;

bool serves_or_says_why(const Product& p, Epilogue) {
  if (!sm90::serves(p)) g_code = sm90::store(p, {}, false, nullptr).code;
  return sm90::serves(p);
}

// What TMA and wgmma cannot take is refused, by store too.
TEST(what_it_does_not_serve) {
  constexpr Kernel kKernel{store, activate, serves_or_says_why};
  Case served{.offsets = {3, 5}, .num_rows = 5, .cols = 16, .depth = 16};
  CHECK(check_case(served, kKernel));
  std::vector<Case> refused(7, served);
  refused[0].misalign = 1;
  refused[1].pad = 1;
  refused[2].a = kAlongOuter;
  refused[3].b = kNeither;
  refused[4].depth = 12;  // gathered rows are copied by 16 bytes
  refused[4].pad = 4;
  refused[4].gather_a = true;
  refused[5].dtype = KIMI_FLOAT32;
  refused[6].offsets.clear();
  for (const Case& c : refused) {
    g_code = KIMI_OK;
    CHECK(!check_case(c, kKernel));
    CHECK(g_code == KIMI_INVALID_ARGUMENT);
  }
}

TEST(tiles_are_narrow_where_wide_ones_are_few) {
  const auto is_narrow = [](int32_t groups, int64_t rows, int64_t cols) {
    Product p{};
    p.groups = {nullptr, rows, groups};
    p.cols = cols;
    p.depth = 2048;
    return sm90::is_narrow(p);
  };
  CHECK(is_narrow(4, 512, 4096));  // 4 x 16 wide tiles
  CHECK(!is_narrow(4, 4 * 8192, 4096));
  CHECK(!is_narrow(48, 48 * 4, 4096));    // 48 x 16, few rows each
  CHECK(is_narrow(384, 4, 4096));         // 4 groups at most have rows
  CHECK(!is_narrow(16, 128 * 16, 2304));  // 144 wide ones take two turns, 288 narrow ones three
  Product depth{};
  depth.grouping = Grouping::kK;
  depth.cols = 64;
  CHECK(!sm90::is_narrow(depth));
}

// Also that it serves what it should, and nothing else wrongly.
TEST(products_drawn_at_random) {
  int served = 0;
  for (uint64_t seed = 300; seed < 360; ++seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    Case c{.dtype = kTypes[below(2)], .grouping = below(3) == 0 ? Grouping::kK : Grouping::kM};
    c.seed = seed;
    if (c.grouping == Grouping::kM) c.epilogue = static_cast<Epilogue>(below(3));
    int32_t end = 0;
    for (int e = below(6); e >= 0; --e) c.offsets.push_back(end += below(3) * below(90));
    c.num_rows = end + below(2) * below(20);
    c.rows = 8 * (1 + below(17));
    c.cols = below(4) ? 8 * (1 + below(17)) : 1 + below(140);
    c.depth = below(4) ? 8 * below(40) : below(100);
    c.a = c.grouping == Grouping::kM ? kAlongDepth : kAlongOuter;
    c.b = c.grouping == Grouping::kK || below(2) ? kAlongOuter : kAlongDepth;
    c.pad = below(8) ? 8 : below(9);
    c.misalign = below(8) ? 0 : 4;
    c.gather_a = below(2);
    c.gather_b = c.grouping == Grouping::kK && !c.gather_a && below(2);
    c.divisor = 1 + below(3);
    c.poison = below(8);
    c.out_dtype = below(2) ? KIMI_FLOAT32 : c.dtype;
    c.bias = c.grouping == Grouping::kM && below(2);
    c.accumulate = c.grouping == Grouping::kK && below(2);
    c.out_pad = below(2) ? 0 : below(9);
    c.out_misalign = below(2) ? 0 : below(9);
    c.activation = kActivations[below(3)];
    c.keep_gate_up = below(2);
    c.keep_hidden = below(3);
    g_narrow = below(2) != 0;
    served += check_case(c, {store, activate, serves});
  }
  CHECK(served >= 25);
}

}  // namespace

TEST_MAIN()
