// SPDX-License-Identifier: MIT
// Flags in memory that the ranks of one host share: who has written its message, who has read all.
//
// Messages are numbered 1, 2, ... alike on every rank. Message n lies in half n % buffers of its
// writer's region, and each rank has two flags, each on a cache line of its own, that only grow:
//
//   published = n   my messages up to n are in my region
//   consumed  = n   I have read everybody's messages up to n, and need them no more
//
//   rank a   enter(n)  write a's half  publish(n)   arrive(n)  read all halves  consume(n)
//               ^                           \           ^                             \.
//   rank b       \__ consumed(n - buffers)   \__________/ published(n)                 \__> enter(n + buffers)
//
// Order. A flag is set by one exchange with release and read by loads with acquire, and nothing
// else in the region is atomic:
//   publish  releases what its rank wrote into the half;   arrive acquires it: no torn rows
//   consume  releases the reads of the peers' halves;      enter  acquires it: no half is
//                                                          overwritten while one still reads it
// Release covers what the calling thread did or has seen through a barrier of its own threads, not
// what they did with stores around the cache: those fence for themselves (Vec::fence of cpu/).
// Between the two stands at most another rank's compare-and-swap that notes a sleeper: being a
// read-modify-write it carries the release on to whoever acquires its value.
//
// Sleep. A flag is one word, epoch * 2 + 1 while somebody sleeps. A sleeper notes itself with a
// compare-and-swap and lets the kernel check that the word is still that; the exchange takes the
// note off together with the new epoch, and only who took one off makes the system call. The note
// is in the word that is exchanged, so all of it happens in one order: a note before the exchange
// is found by it, one after it fails. No wake-up is lost, and none is made when nobody sleeps. The
// note of a rank that died asleep costs one call and is gone.
//   The kernel compares the lower 32 bits: the note and 31 bits of the epoch. They could look the
// same with another epoch only 2^31 messages later, and writers stop after `buffers`, until the
// sleeper has consumed too.
//
// A rank that ends or falls silent is named, never waited for beyond the deadline; what it had
// published before it ended counts. Ranks not in the set are not waited for: what one left out
// still reads may be overwritten, so it must not come back with the same flags.
//
// Shared memory starts as zeros: no message, no sleeper. One thread of a rank at a time sets its
// flags, in ascending order.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>

namespace kimi::comm {

using RankSet = uint64_t;  // bit r: rank r
constexpr int kMaxRanks = 64;

// Those of the ranks waited for that did not come: until the deadline, or because they have ended.
struct Absent {
  RankSet silent = 0, ended = 0;
  bool none() const { return (silent | ended) == 0; }
};

// The processor and the kernel (flags.cpp). A model of both takes their place in tests.
struct Machine {
  using Word = std::atomic<uint64_t>;
  static_assert(Word::is_always_lock_free, "a lock would not lie in the shared memory");
  static constexpr int kSpins = 64;             // looks with a pause between
  static constexpr int kYields = 2;             // then looks that let other ranks run first; few,
                                                // as strangers take the core for a whole slice
  static constexpr int64_t kSlice = 5'000'000;  // then sleeps, of so many ns at most

  static void pause();
  static void yield();
  static int64_t now();  // ns, CLOCK_MONOTONIC: of all processes of the host
  // Sleeps until woken, unless the lower half of the word is not `seen`. False: woken by the time.
  static bool sleep(const Word& word, uint32_t seen, int64_t ns);
  static void wake(const Word& word);  // all, in any process
};

template <class Atomics>
struct Flag {
  alignas(128) typename Atomics::Word word{};  // epoch * 2 + (somebody sleeps)
};

template <class Atomics = Machine>
struct RankFlags {
  Flag<Atomics> published, consumed;
};
static_assert(sizeof(RankFlags<>) == 256,
              "each flag has lines of its own: they are fetched in pairs");

// The flags as rank `me` uses them. `Ended` is called now and then with the ranks waited for and
// gives the set of those whose process has ended (or more: only those asked for count).
template <class Atomics = Machine>
class Flags {
 public:
  Flags(RankFlags<Atomics>* flags /* [P] */, int me, int buffers)
      : flags_(flags), me_(me), buffers_(uint64_t(buffers)) {}

  // Before message n is written into its half. Returns at once where its last use is over.
  template <class Ended>
  Absent enter(RankSet ranks, uint64_t n, int64_t deadline, const Ended& ended) {
    if (n <= buffers_) return {};
    return await(&RankFlags<Atomics>::consumed, ranks, n - buffers_, deadline, ended);
  }
  void publish(uint64_t n) { set(flags_[me_].published, n); }

  // Before the messages n of `ranks` are read.
  template <class Ended>
  Absent arrive(RankSet ranks, uint64_t n, int64_t deadline, const Ended& ended) {
    return await(&RankFlags<Atomics>::published, ranks, n, deadline, ended);
  }
  void consume(uint64_t n) { set(flags_[me_].consumed, n); }

 private:
  using Which = Flag<Atomics> RankFlags<Atomics>::*;
  static constexpr uint64_t kAsleep = 1;

  static void set(Flag<Atomics>& flag, uint64_t epoch) {
    if (flag.word.exchange(epoch << 1, std::memory_order_release) & kAsleep)
      Atomics::wake(flag.word);
  }

  RankSet behind(Which which, RankSet ranks, uint64_t epoch) const {
    RankSet result = 0;
    for (; ranks != 0; ranks &= ranks - 1) {
      const int r = std::countr_zero(ranks);
      if ((flags_[r].*which).word.load(std::memory_order_acquire) >> 1 < epoch)
        result |= RankSet{1} << r;
    }
    return result;
  }

  template <class Ended>
  Absent await(Which which, RankSet ranks, uint64_t epoch, int64_t deadline, const Ended& ended) {
    for (int round = 0;; ++round) {
      // The time first: a flag that was set in time is seen however late this rank looks.
      const int64_t left = round < Atomics::kSpins ? 1 : deadline - Atomics::now();
      ranks = behind(which, ranks, epoch);
      if (ranks == 0) return {};
      if (left <= 0) return {ranks, 0};
      if (round < Atomics::kSpins) {
        Atomics::pause();
      } else if (round < Atomics::kSpins + Atomics::kYields) {
        Atomics::yield();
      } else if (!sleep((flags_[std::countr_zero(ranks)].*which).word, epoch, left)) {
        if (const RankSet gone = ended(ranks) & ranks) {
          ranks = behind(which, ranks, epoch);  // a last look: it may have come before it ended
          if (gone & ranks) return {ranks & ~gone, ranks & gone};
        }
      }
    }
  }

  // False: the time is over and nobody woke this rank.
  static bool sleep(typename Atomics::Word& word, uint64_t epoch, int64_t ns) {
    uint64_t seen = word.load(std::memory_order_relaxed);
    if (seen >> 1 >= epoch) return true;
    if (!(seen & kAsleep) &&
        !word.compare_exchange_strong(seen, seen | kAsleep, std::memory_order_relaxed))
      return true;  // published meanwhile, or another rank's note: look again
    return Atomics::sleep(word, uint32_t(seen | kAsleep), std::min(ns, Atomics::kSlice));
  }

  RankFlags<Atomics>* flags_;
  int me_;
  uint64_t buffers_;
};

}  // namespace kimi::comm
