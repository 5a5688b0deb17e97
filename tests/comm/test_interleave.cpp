// SPDX-License-Identifier: MIT
//
// The explorer against what is known of small programs: which outcomes acquire, release and fences
// leave, each found and no other; and a signal between blocks of two GPUs.
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "interleave.h"

namespace {

using interleave::Cell;
using interleave::Fault;
using interleave::Options;
using interleave::Result;
using interleave::Word;

constexpr auto relaxed = std::memory_order_relaxed;
constexpr auto acquire = std::memory_order_acquire;
constexpr auto release = std::memory_order_release;
constexpr auto acq_rel = std::memory_order_acq_rel;
constexpr auto seq_cst = std::memory_order_seq_cst;

struct Small {
  Word x, y;
  Cell cell;
  uint64_t r[interleave::kThreads] = {};  // what the threads say they saw
};
using Thread = std::function<void(Small&, uint64_t&)>;

// All outcomes, as the digits that the threads leave behind.
std::set<std::string> outcomes(const std::vector<Thread>& threads, bool final_values = false) {
  std::set<std::string> found;
  Small* now = nullptr;
  Options options;
  options.at_end = [&] {
    std::string text;
    for (size_t t = 0; t < threads.size(); ++t) text += std::to_string(now->r[t]);
    if (final_values) text = std::to_string(now->x.newest()) + std::to_string(now->y.newest());
    found.insert(text);
  };
  const Result result =
      interleave::explore<Small>(int(threads.size()), options, [&](Small& world, int t) {
        now = &world;
        threads[size_t(t)](world, world.r[t]);
      });
  if (!result.failure.empty()) found.insert(result.failure.substr(0, result.failure.find('\n')));
  return found;
}

using Set = std::set<std::string>;

TEST(store_buffering) {
  const auto thread = [](Word Small::* mine, Word Small::* other, bool fence) -> Thread {
    return [=](Small& s, uint64_t& r) {
      (s.*mine).store(1, release);
      if (fence) interleave::fence(seq_cst);
      r = (s.*other).load(acquire);
    };
  };
  CHECK((outcomes({thread(&Small::x, &Small::y, false), thread(&Small::y, &Small::x, false)}) ==
         Set{"00", "01", "10", "11"}));
  CHECK((outcomes({thread(&Small::x, &Small::y, true), thread(&Small::y, &Small::x, true)}) ==
         Set{"01", "10", "11"}));
}

TEST(loads_come_before_later_stores) {  // as on all machines but a few, and in no compiler's output
  const auto thread = [](Word Small::* first, Word Small::* second) -> Thread {
    return [=](Small& s, uint64_t& r) {
      r = (s.*first).load(relaxed);
      (s.*second).store(1, relaxed);
    };
  };
  CHECK((outcomes({thread(&Small::x, &Small::y), thread(&Small::y, &Small::x)}) ==
         Set{"00", "01", "10"}));
}

TEST(message_passing) {
  const auto run = [](std::memory_order set, std::memory_order get, bool fences) {
    return outcomes({[=](Small& s, uint64_t&) {
                       s.x.store(1, relaxed);
                       if (fences) interleave::fence(release);
                       s.y.store(1, set);
                     },
                     [=](Small& s, uint64_t& r) {
                       r = s.y.load(get) * 2;
                       if (fences) interleave::fence(acquire);
                       r += s.x.load(relaxed);
                     }});
  };
  CHECK((run(release, acquire, false) == Set{"00", "01", "03"}));
  CHECK((run(relaxed, relaxed, true) == Set{"00", "01", "03"}));
  const Set all{"00", "01", "02", "03"};
  CHECK(run(relaxed, acquire, false) == all);
  CHECK(run(release, relaxed, false) == all);
}

TEST(one_word_is_never_seen_backwards) {
  CHECK((outcomes({[](Small& s, uint64_t&) {
                     s.x.store(1, relaxed);
                     s.x.store(2, relaxed);
                   },
                   [](Small& s, uint64_t& r) {
                     r = s.x.load(relaxed) * 3;
                     r += s.x.load(relaxed);
                   }}) == Set{"00", "01", "02", "04", "05", "08"}));
}

TEST(stores_of_two_threads_may_end_in_any_order) {
  const auto thread = [](Word Small::* first, Word Small::* second) -> Thread {
    return [=](Small& s, uint64_t&) {
      (s.*first).store(1, relaxed);
      (s.*second).store(2, relaxed);
    };
  };
  CHECK((outcomes({thread(&Small::x, &Small::y), thread(&Small::y, &Small::x)}, true) ==
         Set{"11", "12", "21", "22"}));
}

TEST(readers_need_not_agree_on_independent_stores) {
  const auto reader = [](Word Small::* first, Word Small::* second) -> Thread {
    return [=](Small& s, uint64_t& r) {
      r = (s.*first).load(acquire) * 2;
      r += (s.*second).load(acquire);
    };
  };
  const Set found = outcomes({[](Small& s, uint64_t&) { s.x.store(1, release); },
                              [](Small& s, uint64_t&) { s.y.store(1, release); },
                              reader(&Small::x, &Small::y), reader(&Small::y, &Small::x)});
  CHECK(found.size() == 16 && found.contains("0022"));
}

TEST(what_happened_before_is_handed_on) {
  CHECK((outcomes({[](Small& s, uint64_t&) {
                     s.cell.write(1);
                     s.x.store(1, release);
                   },
                   [](Small& s, uint64_t&) {
                     s.x.wait_until([](uint64_t x) { return x == 1; }, acquire);
                     s.y.store(1, release);
                   },
                   [](Small& s, uint64_t& r) {
                     s.y.wait_until([](uint64_t y) { return y == 1; }, acquire);
                     r = s.cell.read();
                   }}) == Set{"001"}));
}

TEST(a_read_modify_write_hands_a_release_on_and_a_store_does_not) {
  const auto run = [](const Thread& between) {
    return outcomes({[](Small& s, uint64_t&) {
                       s.cell.write(1);
                       s.x.store(1, release);
                     },
                     between,
                     [](Small& s, uint64_t& r) {
                       if (s.x.load(acquire) > 1) r = s.cell.read();
                     }});
  };
  CHECK((run([](Small& s, uint64_t&) {
           uint64_t one = 1;
           s.x.compare_exchange_strong(one, 2, relaxed);
         }) == Set{"000", "001"}));
  CHECK(run([](Small& s, uint64_t&) {
          s.x.store(2, relaxed);
        }).contains("a race: read, and written by thread 0"));
}

TEST(read_modify_writes_take_turns) {
  const Thread add = [](Small& s, uint64_t& r) { r = s.x.fetch_add(1, relaxed); };
  CHECK((outcomes({add, add, add}) == Set{"012", "021", "102", "120", "201", "210"}));
  const Thread swap = [](Small& s, uint64_t& r) {
    uint64_t zero = 0;
    r = s.x.compare_exchange_strong(zero, 1, relaxed);
  };
  CHECK((outcomes({swap, swap}) == Set{"01", "10"}));
}

TEST(races_are_found_whichever_access_comes_first) {
  const Thread write = [](Small& s, uint64_t&) { s.cell.write(1); };
  const Thread read = [](Small& s, uint64_t&) { s.cell.read(); };
  CHECK(outcomes({write, read}).contains("a race: read, and written by thread 0"));
  CHECK(outcomes({read, write}).contains("a race: written, and read by thread 0"));
  CHECK(outcomes({write, write}).contains("a race: written, and written by thread 0"));
  CHECK((outcomes({read, read}) == Set{"00"}));
}

TEST(a_barrier_orders_all_before_it) {
  struct World {
    interleave::Barrier barrier{3};
    Cell cells[3];
  };
  const Result result = interleave::explore<World>(3, {}, [](World& world, int t) {
    for (uint64_t round = 1; round < 3; ++round) {
      world.cells[t].write(round);
      world.barrier.wait();
      for (Cell& cell : world.cells) interleave::require(cell.read() == round, "an old value");
      world.barrier.wait();
    }
  });
  CHECK(result.failure.empty() && result.complete > 0);
}

TEST(threads_that_wait_for_each_other_are_found) {
  const auto wait = [](Word Small::* word) -> Thread {
    return [=](Small& s, uint64_t&) {
      (s.*word).wait_until([](uint64_t value) { return value != 0; }, acquire);
      s.x.store(1, release);
      s.y.store(1, release);
    };
  };
  const Set waiting{"threads wait for ever"};
  CHECK(outcomes({wait(&Small::x)}) == waiting);
  CHECK(outcomes({wait(&Small::x), wait(&Small::y)}) == waiting);
  CHECK(outcomes({wait(&Small::x), wait(&Small::y), wait(&Small::x)}) == waiting);
}

TEST(a_fault_may_come_before_and_after_each_operation) {
  std::set<uint64_t> seen;
  Small* now = nullptr;
  Options options;
  options.fault = Fault::kEnds;
  options.at_end = [&] { seen.insert(now->x.newest() * 10 + now->y.newest()); };
  const Result result = interleave::explore<Small>(1, options, [&](Small& world, int) {
    now = &world;
    world.x.store(1, relaxed);
    world.y.store(1, relaxed);
  });
  CHECK(result.failure.empty() && seen == (std::set<uint64_t>{0, 10, 11}));
}

// Two GPUs of two blocks each. A block writes its part of the message and arrives at its GPU's
// counter, the last one tells the other GPU, and none goes on before; every block that was told
// reads both parts.
struct Gpus {
  Word arrived[2], told[2];
  Cell part[2][2];
};

std::string signal(std::memory_order arrive, std::memory_order tell, std::memory_order poll) {
  const Result result = interleave::explore<Gpus>(4, {}, [=](Gpus& world, int thread) {
    const int gpu = thread / 2, block = thread % 2;
    for (uint64_t epoch = 1; epoch < 3; ++epoch) {
      if (epoch == 1) world.part[gpu][block].write(uint64_t(thread) + 1);
      if (world.arrived[gpu].fetch_add(1, arrive) + 1 == 2 * epoch)
        world.told[1 - gpu].fetch_add(1, tell);
      world.arrived[gpu].wait_until([=](uint64_t n) { return n >= 2 * epoch; }, relaxed);
      world.told[gpu].wait_until([=](uint64_t told) { return told >= epoch; }, poll);
      for (int b = 0; b < 2; ++b)
        interleave::require(world.part[1 - gpu][b].read() == uint64_t((1 - gpu) * 2 + b + 1),
                            "torn");
    }
  });
  CHECK(result.failure.empty() == (result.complete > 0 && result.runs > 1));
  return result.failure.substr(0, result.failure.find(" by"));
}

TEST(blocks_of_two_gpus_tell_each_other) {
  CHECK(signal(acq_rel, release, acquire).empty());
  CHECK(signal(relaxed, release, acquire) == "a race: read, and written");
  CHECK(signal(release, release, acquire) == "a race: read, and written");
  CHECK(signal(acq_rel, relaxed, acquire) == "a race: read, and written");
  CHECK(signal(acq_rel, release, relaxed) == "a race: read, and written");
}

}  // namespace

TEST_MAIN()
