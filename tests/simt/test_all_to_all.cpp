// SPDX-License-Identifier: MIT
//
// Dispatch and combine on the host, several ranks as blocks of one launch over slices of one
// allocation, bit for bit against the definition in loops; what happens when a rank does not come or
// does something else; and that broken flags are noticed.
#include "all_to_all_runs.h"
#include "races.h"

namespace {

using namespace a2a;
using namespace kimi::exchange;

TEST(ranks_layouts_types) {
  uint64_t seed = 0;
  for (int ranks : {1, 2, 4})
    for (bool direct : {false, true})
      for (kimi_dtype dtype : {KIMI_BFLOAT16, KIMI_FLOAT16, KIMI_FLOAT32})
        for (kimi_dtype wire : {KIMI_BFLOAT16, KIMI_FLOAT32}) {
          Shape s;
          s.ranks = ranks;
          s.experts = ranks + static_cast<int>(seed % 9);
          s.top_k = 1 + static_cast<int>(seed % 5);
          s.hidden = 8 * (1 + static_cast<int>(seed % 4));
          s.direct = direct;
          s.dtype = dtype;
          s.wire = seed % 3 == 0 ? dtype : wire;
          s.weighted = seed % 4 != 1;
          there_and_back(s, static_cast<Way>(seed % 3), 2, seed);
          ++seed;
        }
}

TEST(many_ranks_and_more_than_the_slots_of_a_token) {
  for (uint64_t seed : {0, 1, 2, 3}) {
    Shape s;
    s.ranks = 8;
    s.experts = 19;
    s.top_k = seed % 2 == 0 ? 3 : 9;
    s.tokens = 3;
    s.direct = seed == 2;
    there_and_back(s, kGrid, 2, seed);
  }
}

TEST(padding_and_capacity) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    Shape s;
    s.ranks = seed % 2 == 0 ? 2 : 3;
    s.experts = 7;
    s.top_k = 3;
    s.tokens = 6;
    s.align = seed % 3 == 0 ? 1 : 4;
    s.capacity = seed % 4 * 12;  // 0: everything is dropped
    s.direct = seed % 5 == 0;
    there_and_back(s, static_cast<Way>(seed % 3), 2, seed);
  }
}

// FP8 values with their scales beside them are bytes to dispatch; rows need not be multiples of 16.
TEST(bytes_beside_and_odd_rows) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    Shape s;
    s.ranks = 2 + static_cast<int>(seed % 2);
    s.hidden = seed % 2 == 0 ? 16 : 1 + static_cast<int>(seed * 3);
    s.dtype = s.wire = seed % 4 < 2 ? KIMI_FLOAT16 : KIMI_FLOAT32;
    s.beside = seed % 3 == 0 ? 16 : 4 * static_cast<int>(seed % 3);
    s.align = 2;
    there_and_back(s, static_cast<Way>(seed % 3), 2, seed);
  }
}

TEST(wide_rows_and_many_experts) {
  for (uint64_t seed : {0, 3}) {
    Shape s;
    s.ranks = 2;
    s.experts = seed == 0 ? 5 : 700;
    s.top_k = 8;
    s.tokens = 2;
    s.hidden = seed == 0 ? 9000 : 24;
    s.dtype = seed == 0 ? KIMI_BFLOAT16 : KIMI_FLOAT32;
    s.wire = s.dtype;
    there_and_back(s, kGrid, 1, seed);
  }
}

TEST(most_slots) {
  Shape s;
  s.experts = 40;
  s.top_k = 32;
  s.tokens = 2;
  for (bool direct : {false, true}) {
    s.direct = direct;
    there_and_back(s, kGrid, 1, 3);
  }
}

TEST(masked_ranks_are_left_out) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    Shape s;
    s.ranks = 4;
    s.experts = 9;
    s.top_k = 3;
    s.masked = seed % 2 == 0 ? 2 : 9;
    s.direct = seed > 1;
    start(s, kGrid, seed);
    World w(s, seed);
    w.draw(0, 0.1);
    const Expected e = w.expected();
    std::vector<DispatchParams> p;
    std::vector<CombineParams> c;
    const std::vector<Bytes> outs = results_of(w, e);
    for (int r = 0; r < s.ranks; ++r)
      p.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size())));
    run_grid(p, 2, ~static_cast<uint32_t>(s.masked));  // they do not even run
    for (int r = 0; r < s.ranks; ++r) c.push_back(w.combine_params(r, outs[r]));
    run_grid(c, 2, ~static_cast<uint32_t>(s.masked));
    for (int r = 0; r < s.ranks; ++r) {
      if (w.masked(r)) continue;
      w.check_dispatch(e, r);
      w.check_combine(e, outs, r);
    }
  }
}

// ---- a whole program in one launch: ranks run ahead of each other ------------------------------

struct Program {
  bool dispatches_alone = false;
  std::vector<std::vector<DispatchParams>> dispatches;  // [step][rank]
  std::vector<std::vector<CombineParams>> combines;
  // Now and then two dispatches in a row.
  bool combined(size_t step) const { return !dispatches_alone && step % 3 != 2; }
};

// Experts that do nothing: combine's results are dispatch's rows.
template <class F>
void program_ranks(const Program* program) {
  for (size_t step = 0; step < program->dispatches.size(); ++step) {
    dispatch_rank<F>(program->dispatches[step][blockIdx.y]);
    __syncthreads();
    if (!program->combined(step)) continue;
    combine_rank<F>(program->combines[step][blockIdx.y]);
    __syncthreads();
  }
}

// One World a step, since each has its own tensors; the buffers and the states are the first one's.
template <class F>
void run_program(int halves, uint64_t seed, int steps = 6, bool dispatches_alone = false) {
  Shape s;
  s.ranks = 3;
  s.halves = halves;
  s.dtype = s.wire = KIMI_FLOAT32;
  start(s, kGrid, seed);
  std::vector<std::unique_ptr<World>> worlds;
  std::vector<Expected> expected;
  Program program{dispatches_alone, {}, {}};
  for (int step = 0; step < steps; ++step) {
    World& w =
        *worlds.emplace_back(std::make_unique<World>(s, seed * 100 + static_cast<uint64_t>(step)));
    w.draw(0, 0.1);
    const Expected& e = expected.emplace_back(w.expected());
    auto& d = program.dispatches.emplace_back();
    auto& c = program.combines.emplace_back();
    for (int r = 0; r < s.ranks; ++r) {
      d.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size())));
      d.back().peers = worlds[0]->peers(r);
    }
    for (int r = 0; r < s.ranks; ++r) {
      c.push_back(w.combine_params(r, w.rank[r].y));
      c.back().peers = worlds[0]->peers(r);
    }
  }
  worlds[0]->fill(0);  // what comes too early is then empty, not nonsense
  simt::launch(program_ranks<F>,
               {{1, ranks_of(*worlds[0])}, kThreads, table_bytes(s.ranks, s.experts), true},
               static_cast<const Program*>(&program));
  for (int step = 0; step < steps; ++step)
    for (int r = 0; r < s.ranks; ++r) {
      const World& w = *worlds[step];
      std::vector<Bytes> outs;
      for (const Rank& k : w.rank) outs.push_back(k.y);
      w.check_dispatch(expected[step], r);
      if (program.combined(static_cast<size_t>(step))) w.check_combine(expected[step], outs, r);
    }
}

struct NoWait : Flags {
  static uint64_t acquire(const uint64_t* flag) { return *flag | ~0ull << 16; }
};
struct FirstBlockSignals : Flags {
  static bool last_to_come(uint32_t*, uint32_t) { return true; }
};

/// Seeds of `count` for which `action` goes wrong.
template <class Action>
int wrong_seeds(int count, Action action) {
  int wrong = 0;
  for (int seed = 0; seed < count; ++seed) {
    try {
      action(static_cast<uint64_t>(seed));
    } catch (const check::Failure&) {
      ++wrong;
    } catch (const simt::Error&) {
      ++wrong;
    }
  }
  return wrong;
}

#if defined(__SANITIZE_THREAD__)

struct RelaxedRelease : Flags {
  static void release(uint64_t* flag, uint64_t value) { store_relaxed_sys(flag, value); }
};
struct RelaxedCounter : Flags {
  static bool last_to_come(uint32_t* arrivals, uint32_t blocks) {
    return atomicAdd(arrivals, 1u) == blocks - 1;
  }
};
template <class F>
void run_blocks(uint64_t seed) {
  Shape s;
  start(s, kGrid, seed);
  World w(s, seed);
  w.draw(0, 0.0);
  const Expected e = w.expected();
  std::vector<DispatchParams> p;
  for (int r = 0; r < s.ranks; ++r)
    p.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size())));
  run_grid<F>(p, 3);
}

TEST(weak_flags_are_races) {
  for (uint64_t seed : {0, 1, 2, 3}) {
    CHECK(!races([=] { run_program<Flags>(2, seed, 3); }));
    CHECK(!races([=] { run_blocks<Flags>(seed); }));
  }
  CHECK(races([] { run_program<RelaxedRelease>(2, 3, 3); }));
  CHECK(races([] { run_blocks<RelaxedCounter>(3); }));
}

#else

TEST(ranks_run_ahead_in_one_launch) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    run_program<Flags>(2, seed);
    run_program<Flags>(4, seed);
  }
}

TEST(broken_flags_are_noticed) {
  CHECK(wrong_seeds(8, [](uint64_t seed) { run_program<NoWait>(2, seed, 6, true); }) > 0);
  // With one half the next tokens overwrite those that are read.
  CHECK(wrong_seeds(16, [](uint64_t seed) { run_program<Flags>(1, seed, 6, true); }) > 0);
  CHECK(wrong_seeds(8, [](uint64_t seed) {
          Shape s;
          s.tokens = 9;
          start(s, kGrid, seed);
          World w(s, seed);
          w.draw(0, 0.0);
          const Expected e = w.expected();
          w.fill(0);
          std::vector<DispatchParams> p;
          for (int r = 0; r < s.ranks; ++r)
            p.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size())));
          run_grid<FirstBlockSignals>(p, 3);
          for (int r = 0; r < s.ranks; ++r) w.check_dispatch(e, r);
        }) > 0);
}

#endif

// ---- faults ------------------------------------------------------------------------------------

/// No row is laid out; y and the weights do not matter then.
void check_empty(const Rank& k) {
  const auto all = [](const auto& values, auto value) {
    return std::all_of(values.begin(), values.end(), [=](auto v) { return v == value; });
  };
  CHECK(all(k.y_row_map, -1) && all(k.y_source, -1) && all(k.y_slots, 0u));
  CHECK(all(k.y_offsets, 0) && all(k.y_counts, 0) && all(k.loads, 0) && all(k.report, 0));
}

TEST(a_rank_that_does_not_come_is_named) {
  for (uint64_t seed : {0, 1, 2, 3}) {
    Shape s;
    s.ranks = 3;
    s.timeout = 150'000;
    start(s, kGrid, seed);
    World w(s, seed);
    w.draw(0, 0.0);
    const Expected e = w.expected();
    std::vector<DispatchParams> p;
    for (int r = 0; r < s.ranks; ++r)
      p.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size())));
    run_grid(p, 2, ~2u);
    const uint64_t epoch = w.state[0].epoch;
    for (int r : {0, 2}) {
      CHECK(w.state[r].silent == 2 && w.state[r].strange == 0);
      const Bytes& y = w.rank[r].y;
      CHECK(std::count(y.begin(), y.end(), 0xa5) == static_cast<int64_t>(y.size()));
      check_empty(w.rank[r]);
    }
    for (DispatchParams& each : p) each.num_local = s.ranks;
    for (DispatchParams& each : p) each.num_blocks = 1;
    w.state[1].silent = 1;
    check_ok(call(p[0]));  // returns at once, without waiting
    CHECK(w.state[0].epoch == epoch);
  }
}

TEST(rows_of_a_repeated_dispatch_that_fails_are_zeros) {
  Shape s;
  s.ranks = 3;
  for (Way way : {kOneLaunch, kGrid, kPhases}) {
    start(s, way, 1);
    World w(s, 1);
    w.draw(0, 0.0);
    const Expected e = w.expected();
    dispatch_once(w, e, way, 2, false);
    for (auto& state : w.state) state.silent = 2;
    std::vector<DispatchParams> again;
    for (int r = 0; r < s.ranks; ++r)
      again.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size()), true));
    run(again, way, 2);
    for (const Rank& k : w.rank)
      for (const Bytes* bytes : {&k.y, &k.y_beside})
        CHECK(std::ranges::all_of(*bytes, [](auto byte) { return byte == 0; }));
  }
}

TEST(a_rank_with_another_call_is_named) {
  Shape s;
  s.timeout = 150'000;
  start(s, kGrid, 3);
  World w(s, 3), other(s, 3);
  w.draw(0, 0.0);
  const Expected e = w.expected();
  std::vector<DispatchParams> p;
  for (int r = 0; r < s.ranks; ++r)
    p.push_back(w.dispatch_params(r, static_cast<int64_t>(e.rows[r].size())));
  p[1].align = 2;
  run_grid(p, 1);
  CHECK(w.state[0].strange == 2 && w.state[0].silent == 0 && w.state[1].strange == 1);

  World room(s, 3);  // where too little of it fails, they have the same
  room.draw(0, 0.0);
  p.clear();
  for (int r = 0; r < s.ranks; ++r) {
    p.push_back(room.dispatch_params(r, 40 + r));
    p.back().strict = 1;
  }
  run_grid(p, 1);
  CHECK(room.state[0].strange == 2 && room.state[1].strange == 1 && room.state[0].overfull == 0);
}

TEST(too_little_room_fails_on_all_ranks) {
  Shape s;
  s.ranks = 3;
  s.strict = true;
  for (uint64_t seed : {0, 1, 2, 3}) {
    const Way way = static_cast<Way>(seed % 3);
    start(s, way, seed);
    World w(s, seed);
    w.draw(2, 0.0);
    const std::vector<int64_t> wanted = w.expected().wanted;
    w.s.capacity = *std::max_element(wanted.begin(), wanted.end()) - 1;
    const Expected e = w.expected();
    uint64_t overfull = 0;
    for (int r = 0; r < s.ranks; ++r)
      if (e.wanted[r] > w.s.capacity) overfull |= uint64_t{1} << r;
    for (int call : {0, 1}) {
      std::vector<DispatchParams> p;
      for (int r = 0; r < s.ranks; ++r) {
        w.clear(w.rank[r], r);
        p.push_back(w.dispatch_params(r, w.s.capacity));
      }
      run(p, way, 2);  // the second one returns at once, without waiting
      for (int r = 0; r < s.ranks; ++r) {
        const kimi_all_to_all_state& state = w.state[r];
        CHECK(state.overfull == overfull && state.silent == 0 && state.epoch == 1);
        CHECK(state.most == static_cast<uint64_t>(w.s.capacity + 1));
        if (call == 1) check_empty(w.rank[r]);
        const auto zero = [](auto v) { return v == 0; };
        CHECK(std::ranges::all_of(w.rank[r].y_offsets, zero));
        CHECK(std::ranges::all_of(w.rank[r].y_counts, zero));
      }
    }
  }
  s.capacity = 24;  // what fits is no fault
  there_and_back(s, kPhases, 4, 5);
}

TEST(bad_arguments_are_refused) {
  Shape s;
  World w(s, 1);
  w.draw(0, 0.0);
  const auto refused = [&](const char* text, auto change) {
    DispatchParams p = w.dispatch_params(0, 8);
    change(p);
    const Status status = call(p);
    require(status.code == KIMI_INVALID_ARGUMENT && status.message.find(text) != std::string::npos,
            std::string(text) + ", got " + status.message);
  };
  refused("peers.world: expected 1..64, got 65", [](auto& p) { p.peers.world = 65; });
  refused("peers.rank: expected 0..1, got 2", [](auto& p) { p.peers.rank = 2; });
  refused("peers.halves: expected 2 or more", [](auto& p) { p.peers.halves = 1; });
  refused("peers.buffer_bytes: expected 2 halves", [](auto& p) { p.max_tokens = 4000; });
  refused("top_k: expected 1..32, got 33", [](auto& p) {
    p.top_k = 33;
    p.max_tokens = p.num_tokens = 1;
    p.peers.buffer_bytes *= 2;
  });
  refused("num_tokens: expected 0..max_tokens=4", [](auto& p) { p.num_tokens = 5; });
  refused("num_experts: expected world=2..1024, got 1", [](auto& p) { p.num_experts = 1; });
  refused("phases: expected some of SEND",
          [](auto& p) { p.phases = static_cast<kimi_all_to_all_phase>(8); });
  refused("expected pointers", [](auto& p) { p.report = nullptr; });
  refused("num_local: expected at most 8", [](auto& p) { p.num_local = 9; });
  refused("num_blocks: expected at most the 5 blocks", [](auto& p) { p.num_blocks = 6; });
}

}  // namespace

TEST_MAIN()
