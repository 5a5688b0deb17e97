// SPDX-License-Identifier: MIT
//
// The order of csrc/all_to_all in every interleaving: one flag a rank and operation is enough for two
// halves, whether tokens are put into the own buffer (dispatch) or sums into the others' (combine),
// and one counter for the blocks of a rank. What is weakened or left out is found.
#include <algorithm>
#include <string>

#include "check.h"
#include "interleave.h"

namespace {

using interleave::Cell;
using interleave::Result;
using interleave::Word;

constexpr auto relaxed = std::memory_order_relaxed;

struct Protocol {
  std::memory_order release = std::memory_order_release, acquire = std::memory_order_acquire;
  std::memory_order arrive = std::memory_order_acq_rel;
  uint64_t halves = 2;
  bool waits = true;
};
enum Kind { kDispatch, kCombine };
constexpr Kind kProgram[] = {kDispatch, kCombine, kDispatch, kDispatch};

// The memory of kRanks ranks; no rank waits for itself.
template <int kRanks>
struct Buffers {
  Word flags[2][kRanks][kRanks - 1];  // [half][owner][from]
  Cell tokens[2][kRanks];
  Cell sums[2][kRanks][kRanks];
  Word& flag(uint64_t half, int owner, int from) {
    return flags[half][owner][from < owner ? from : std::max(from - 1, 0)];  // from != owner
  }
};

template <int kRanks>
Result run_ranks(const Protocol& protocol) {
  return interleave::explore<Buffers<kRanks>>(kRanks, {}, [=](Buffers<kRanks>& b, int me) {
    for (uint64_t n = 1; n <= std::size(kProgram); ++n) {
      const Kind kind = kProgram[n - 1];
      const uint64_t half = n % protocol.halves;
      if (kind == kDispatch) b.tokens[half][me].write(n);
      for (int r = 0; r < kRanks && kind == kCombine; ++r) b.sums[half][r][me].write(n);
      for (int r = 0; r < kRanks; ++r)
        if (r != me) b.flag(half, r, me).store(n, protocol.release);
      for (int r = 0; r < kRanks && protocol.waits; ++r)
        if (r != me)
          b.flag(half, me, r)
              .wait_until([=](uint64_t seen) { return seen >= n; }, protocol.acquire);
      for (int r = 0; r < kRanks; ++r)
        interleave::require(
            (kind == kDispatch ? b.tokens[half][r] : b.sums[half][me][r]).read() == n,
            "rows of another operation");
      interleave::mark(n);
    }
  });
}

// Two ranks of two blocks each, in one launch an operation: the blocks meet where kernels end.
struct Grids {
  Word flags[2][2];  // [half][owner]
  Word arrivals[2];
  interleave::Barrier ends[2]{interleave::Barrier(2), interleave::Barrier(2)};
  Cell tokens[2][2][2];  // [half][rank][block]
};

Result run_blocks(const Protocol& protocol) {
  return interleave::explore<Grids>(4, {}, [=](Grids& g, int thread) {
    const int me = thread / 2, block = thread % 2;
    for (uint64_t n = 1; n <= 3; ++n) {
      const uint64_t half = n % protocol.halves;
      g.tokens[half][me][block].write(n);
      if (g.arrivals[me].fetch_add(1, protocol.arrive) == 1) {
        g.arrivals[me].store(0, relaxed);
        g.flags[half][1 - me].store(n, protocol.release);
      }
      g.flags[half][me].wait_until([=](uint64_t seen) { return seen >= n; }, protocol.acquire);
      for (int other = 0; other < 2; ++other)
        interleave::require(g.tokens[half][1 - me][other].read() == n, "rows of another operation");
      g.ends[me].wait();
      interleave::mark(n);
    }
  });
}

void holds(const char* name, const Result& result) {
  std::printf("      %s: %llu states, %llu runs\n", name,
              static_cast<unsigned long long>(result.states),
              static_cast<unsigned long long>(result.runs));
  if (!result.failure.empty()) check::fail(__FILE__, __LINE__, result.failure);
  CHECK(result.complete > 0);
}
void breaks(const char* name, const Result& result) {
  if (result.failure.empty()) check::fail(__FILE__, __LINE__, std::string(name) + " was not found");
}

TEST(one_flag_is_enough) {
  holds("2 ranks", run_ranks<2>({}));
  holds("3 ranks", run_ranks<3>({}));
}

TEST(blocks_of_a_rank_signal_as_one) { holds("2 ranks of 2 blocks", run_blocks({})); }

TEST(what_is_weak_or_left_out_is_found) {
  breaks("a relaxed release", run_ranks<2>({.release = relaxed}));
  breaks("a relaxed acquire", run_ranks<2>({.acquire = relaxed}));
  breaks("one half", run_ranks<2>({.halves = 1}));
  breaks("no wait", run_ranks<2>({.waits = false}));
  breaks("a relaxed counter", run_blocks({.arrive = relaxed}));
}

}  // namespace

TEST_MAIN()
