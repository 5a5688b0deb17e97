// SPDX-License-Identifier: MIT
//
// csrc/comm/flags.h in every order there is (interleave.h): no torn message, no rank that sleeps for
// ever, and those that live end, and name who does not, wherever a rank ends or stops. Each thing
// that the header does for that is left out once, which must be found.
#include <string>

#include "check.h"
#include "comm/flags.h"
#include "interleave.h"

namespace {

using interleave::Fault;
using interleave::Options;
using interleave::Result;
using kimi::comm::Absent;
using kimi::comm::Flags;
using kimi::comm::RankFlags;
using kimi::comm::RankSet;

// What is different from the header, if anything.
enum class Break {
  kNothing,
  kPlain,           // nothing, and no two ways are taken for one because the header ends up alike
  kPublishRelaxed,  // flags are set without release
  kConsumeRelaxed,
  kArriveRelaxed,  // flags are read without acquire
  kEnterRelaxed,
  kReadThenSet,  // the note is read, then the flag is set
  kNoteIsSet,    // the note is read and set, no read-modify-write
  kNoNote,
  kNoWake,
  kNoCompare,   // the kernel sleeps whatever the word is
  kNoSlice,     // the time wakes nobody
  kNoLastLook,  // after a rank has ended
  kNoEntry,     // no wait before a half is written again
  kEarly,       // a message is published before it is written whole
};

// Where a thread stands in the header: what it awaits, which words are behind that so far. How it
// got there is of no importance, which keeps the number of states small.
struct Place {
  uint64_t call = 0, epoch = 0, behind = 0;
  bool looks = true;
  void mark(int word, uint64_t value) const {
    interleave::mark(call << 40 | behind << 24 | uint64_t(word) << 16 | value);
  }
} places[interleave::kThreads];
Place& place() { return places[interleave::thread()]; }

// Takes kimi::comm::Machine's place.
template <Break kBreak>
struct Modelled {
  struct Word : interleave::Word {
    using Order = std::memory_order;
    bool is_published() const { return number() % 2 == 0; }

    uint64_t load(Order order) {
      if (order != std::memory_order_acquire || kBreak == Break::kPlain)
        return interleave::Word::load(order);
      if (kBreak == (is_published() ? Break::kArriveRelaxed : Break::kEnterRelaxed))
        order = std::memory_order_relaxed;
      Place& here = place();
      const bool come =
          here.looks && is([&](uint64_t value) { return value >> 1 >= here.epoch; }, order);
      here.behind &= ~(uint64_t{1} << number());
      here.behind |= uint64_t(!come) << number();
      return come ? here.epoch << 1 : 0;  // all that the header may ask
    }
    uint64_t exchange(uint64_t value, Order order) {
      if (kBreak == (is_published() ? Break::kPublishRelaxed : Break::kConsumeRelaxed))
        order = std::memory_order_relaxed;
      if (kBreak != Break::kReadThenSet) return interleave::Word::exchange(value, order);
      const uint64_t old = interleave::Word::load(std::memory_order_relaxed);
      interleave::Word::store(value, order);
      return old;
    }
    bool compare_exchange_strong(uint64_t& expected, uint64_t desired, Order order) {
      if (kBreak == Break::kNoNote) return true;
      if (kBreak != Break::kPlain) place().mark(number(), expected);
      if (kBreak != Break::kNoteIsSet)
        return interleave::Word::compare_exchange_strong(expected, desired, order);
      if (interleave::Word::load(order) != expected) return false;
      interleave::Word::store(desired, order);
      return true;
    }
  };
  static constexpr int kSpins = 0, kYields = 0;
  static constexpr int64_t kSlice = 1;

  static void pause() {}
  static void yield() {}
  static int64_t now() {
    place().looks = true;
    return interleave::time();
  }
  static bool sleep(Word& word, uint32_t seen, int64_t) {
    if (kBreak == Break::kNoCompare) seen = uint32_t(word.newest());
    if (kBreak == Break::kNoNote) seen &= ~1u;
    if (kBreak != Break::kPlain) place().mark(word.number(), 0);
    while (!word.sleep(seen))
      if (kBreak != Break::kNoSlice) return false;
    return true;
  }
  static void wake(Word& word) {
    if (kBreak != Break::kNoWake) word.wake();
  }
};

// P ranks, each with two halves of two cells.
template <int P, Break kBreak>
struct World {
  RankFlags<Modelled<kBreak>> flags[P];
  interleave::Cell half[P][2][2];
};

struct Case {
  int messages = 3, buffers = 2;
  bool ahead = false;  // message n + 1 is published before message n is read
  Fault fault = Fault::kNone;
  int spurious = 0;
};

template <int P, Break kBreak>
class Rank {
 public:
  Rank(World<P, kBreak>& world, int rank, const Case& c)
      : world_(world), case_(c), rank_(rank), flags_(world.flags, rank, c.buffers) {}

  // Each gives false where this rank gives up.
  bool write(uint64_t n) {
    const auto enter = [&](int64_t deadline) { return flags_.enter(ranks_, n, deadline, ended); };
    if (kBreak != Break::kNoEntry && n > uint64_t(case_.buffers) &&
        !wait(n, n - uint64_t(case_.buffers), enter))
      return false;
    auto& half = world_.half[rank_][n % uint64_t(case_.buffers)];
    half[0].write(value(n, rank_, 0));
    if (kBreak == Break::kEarly) flags_.publish(n);
    half[1].write(value(n, rank_, 1));
    if (kBreak != Break::kEarly) flags_.publish(n);
    interleave::mark(n << 16 | 1 << 8 | ranks_);
    return true;
  }
  bool read(uint64_t n) {
    const auto arrive = [&](int64_t deadline) { return flags_.arrive(ranks_, n, deadline, ended); };
    if (!wait(n, n, arrive)) return false;
    for (int r = 0; r < P; ++r)
      for (int c = 0; c < 2 && ranks_ >> r & 1; ++c)
        interleave::require(world_.half[r][n % uint64_t(case_.buffers)][c].read() == value(n, r, c),
                            "a torn message");
    flags_.consume(n);
    interleave::mark(n << 16 | 2 << 8 | ranks_);
    return true;
  }

 private:
  static uint64_t value(uint64_t n, int rank, int cell) {
    return n * 100 + uint64_t(rank) * 10 + uint64_t(cell);
  }
  static RankSet ended(RankSet) {
    const RankSet result = interleave::ended();
    place().looks = kBreak != Break::kNoLastLook || result == 0;
    return result;
  }

  // Goes on without ranks that have ended, gives up when some are silent.
  template <class Await>
  bool wait(uint64_t n, uint64_t epoch, const Await& await) {
    for (;;) {
      place() = {n << 16 | epoch << 8 | ranks_, epoch, 0};
      const Absent absent = await(case_.fault == Fault::kStops ? 1 : 100);
      interleave::mark(place().call << 8 | 3);
      if (absent.none()) return true;
      const RankSet faulty = interleave::faulty();
      interleave::require(faulty != 0, "somebody is absent and nothing is wrong");
      interleave::require(((absent.silent | absent.ended) & ~ranks_) == 0, "nobody awaits it");
      if (case_.fault == Fault::kStops) {
        interleave::require(absent.ended == 0, "a rank that has stopped is said to have ended");
        return false;
      }
      interleave::require(absent.ended == faulty, "a rank has ended and is not told");
      for (int r = 0; r < P; ++r)
        interleave::require(!(absent.ended >> r & 1 && epoch == n) ||
                                world_.flags[r].published.word.newest() >> 1 < n,
                            "a rank is said to have ended, and its message is there");
      ranks_ &= ~absent.ended;
    }
  }

  World<P, kBreak>& world_;
  const Case& case_;
  int rank_;
  Flags<Modelled<kBreak>> flags_;
  // Of itself a rank knows: the plain model alone looks at that flag too.
  RankSet ranks_ = ((RankSet{1} << P) - 1) & ~(kBreak == Break::kPlain ? 0 : RankSet{1} << rank_);
};

template <int P, Break kBreak = Break::kNothing>
Result run(const Case& c) {
  Options options;
  options.fault = c.fault;
  options.spurious = c.spurious;
  return interleave::explore<World<P, kBreak>>(P, options, [&](World<P, kBreak>& world, int me) {
    Rank<P, kBreak> rank(world, me, c);
    for (int n = 1; n <= c.messages + c.ahead; ++n)
      if ((n <= c.messages && !rank.write(uint64_t(n))) ||
          (n > c.ahead && !rank.read(uint64_t(n - c.ahead))))
        return;
  });
}

template <int P, Break kBreak = Break::kNothing>
void holds(const Case& c) {
  const Result result = run<P, kBreak>(c);
  std::printf("      %d ranks, %d messages: %llu states, %llu runs\n", P, c.messages,
              (unsigned long long)result.states, (unsigned long long)result.runs);
  if (!result.failure.empty()) check::fail(__FILE__, __LINE__, result.failure);
  CHECK(result.complete > 0 && result.sleeps > 0 && result.wakes > 0);
  CHECK((result.faults > 0 && result.timeouts > 0) == (c.fault != Fault::kNone));
}

TEST(messages_come_whole_and_nobody_sleeps_for_ever) {
  for (const bool ahead : {false, true}) {
    holds<2>({.messages = 5, .ahead = ahead});
    holds<2, Break::kPlain>({.messages = 4, .ahead = ahead});
    holds<2>({.messages = 4, .ahead = ahead, .spurious = 2});
  }
  holds<2>({.buffers = 1});
  holds<3>({.messages = 2});
  holds<3>({.buffers = 1});
}

// What needs no wait: each message is read before the next but one is written.
TEST(two_halves_in_turn_need_no_wait_at_the_entry) { holds<2, Break::kNoEntry>({.messages = 5}); }

TEST(who_lives_goes_on_wherever_another_ends) {
  holds<2>({.fault = Fault::kEnds});
  holds<2, Break::kPlain>({.fault = Fault::kEnds});
  holds<2>({.ahead = true, .fault = Fault::kEnds, .spurious = 1});
  holds<3>({.messages = 2, .buffers = 1, .fault = Fault::kEnds});
}

TEST(who_lives_gives_up_wherever_another_stops) {
  holds<2>({.fault = Fault::kStops});
  holds<2>({.ahead = true, .fault = Fault::kStops, .spurious = 1});
  holds<3>({.messages = 1, .fault = Fault::kStops});
}

template <Break kBreak>
void found(const Case& c, const std::string& failure) {
  const std::string told = run<2, kBreak>(c).failure;
  if (told.find(failure) != 0)
    check::fail(__FILE__, __LINE__, "expected \"" + failure + "\", got: " + told);
}

TEST(what_is_left_out_is_found) {
  found<Break::kPublishRelaxed>({}, "a race: read, and written by thread 1");
  found<Break::kArriveRelaxed>({}, "a race: read, and written by thread 1");
  found<Break::kConsumeRelaxed>({.buffers = 1}, "a race: written, and read by thread");
  found<Break::kEnterRelaxed>({.buffers = 1}, "a race: written, and read by thread");
  found<Break::kNoEntry>({.buffers = 1}, "a race: ");
  found<Break::kNoEntry>({.messages = 4, .ahead = true}, "a race: ");
  found<Break::kEarly>({}, "a torn message");
  found<Break::kReadThenSet>({}, "a lost wake-up");
  found<Break::kNoteIsSet>({}, "threads sleep for ever");
  found<Break::kNoNote>({}, "a lost wake-up");
  found<Break::kNoWake>({}, "a lost wake-up");
  found<Break::kNoCompare>({}, "threads sleep for ever");
  found<Break::kNoSlice>({.fault = Fault::kEnds}, "threads sleep on and on");
  found<Break::kNoLastLook>({.fault = Fault::kEnds}, "a rank is said to have ended, and");
}

TEST(writing_ahead_into_one_half_is_found) {
  found<Break::kNothing>({.buffers = 1, .ahead = true}, "threads sleep for ever");
}

}  // namespace

TEST_MAIN()
