// SPDX-License-Identifier: MIT
//
// Runs a few threads of a protocol in every order there is, for tests: each operation on a Word may
// come before or after those of the other threads, and each load may give every value that the
// memory model allows, not the newest alone.
//
//   thread -> a fiber that goes on step by step
//   step   -> up to its next operation that others notice: a store, a read-modify-write, a sleep, a
//             wake-up. Loads are part of the step: as they may give old values, what one gives early
//             it gives late as well, so that it may be as late as that.
//   run    -> one order and one choice of values; the next run repeats it up to the last choice that
//             has another way left and takes that one, until there is none (depth first)
//   state  -> what the rest of a run depends on, a hash of 64 bits; from one that was met before no
//             run goes on
//
// Memory. Stores to a word have an order; a thread sees them never backwards, and none older than
// what happened before. A load with acquire of a store with release, or of a read-modify-write
// that followed it at once, orders all before the store before all after the load; so do fences
// with relaxed accesses. (C++20 without cycles through values out of thin air, which is RC11
// without load buffering; acquire and release at system scope of PTX are the same. seq_cst only as
// a fence; there are no narrower scopes.) Accesses to a Cell, which is plain memory, must be
// ordered like that, one way or the other: what orders them does not depend on which came first, so
// they need no step, and a thread that ends between two steps ends anywhere between them.
//
// A failure (a race, a requirement, threads that sleep or wait for ever) ends the exploration and
// tells the whole run.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace interleave {

constexpr int kThreads = 4;
constexpr int kWords = 12;

// The threads' own clocks as far as one knows them, and by word the newest store that one has seen.
struct Known {
  std::array<uint16_t, kThreads> clock{};
  std::array<uint32_t, kWords> seen{};
  void join(const Known& other);
};

using Condition = std::function<bool(uint64_t)>;

/// An atomic word. Words and cells are made by the constructor of the world that threads share.
class Word {
 public:
  explicit Word(uint64_t value);
  Word() : Word(0) {}
  Word(const Word&) = delete;

  uint64_t load(std::memory_order order);
  void store(uint64_t value, std::memory_order order);
  uint64_t exchange(uint64_t value, std::memory_order order);
  uint64_t fetch_add(uint64_t value, std::memory_order order);
  bool compare_exchange_strong(uint64_t& expected, uint64_t desired, std::memory_order order);

  /// Whether a load gives such a value, where that is all that is asked of it: fewer ways.
  bool is(const Condition& condition, std::memory_order order);
  /// A loop of such loads.
  void wait_until(const Condition& condition, std::memory_order order);
  /// A futex: sleeps while the word's lower half is `seen`; false if woken by the time.
  bool sleep(uint32_t seen);
  void wake();
  /// The newest value, for requirements: no operation of the protocol.
  uint64_t newest() const;
  int number() const { return index_; }  // in the order they were made in

 private:
  template <class Change>
  uint64_t change(const char* what, const Change& changed, std::memory_order order);
  int index_;
};

/// Plain memory.
class Cell {
 public:
  Cell();
  Cell(const Cell&) = delete;
  uint64_t read();
  void write(uint64_t value);

 private:
  friend class Model;
  uint64_t value_ = 0;
  int writer_ = -1;
  uint16_t written_ = 0;                   // the writer's clock then
  std::array<uint16_t, kThreads> read_{};  // the readers' clocks at their last read
};

/// A barrier of `threads` threads, __syncthreads(): all before it happens before all after it.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(uint64_t(threads)) {}
  void wait();

 private:
  Word arrived_;
  uint64_t threads_;
};

void fence(std::memory_order order);
/// What the thread does from here on depends on `mark` and memory alone: different ways that have
/// led here are one.
void mark(uint64_t mark);
int thread();  // that runs
void require(bool condition, const char* text);

/// How often all threads slept and only the time went on, which it does after a fault alone.
int64_t time();
/// The threads that have had a fault (bits): no operation of the protocol.
uint64_t faulty();
/// Those of them that have ended. Who has been told sees all that they did.
uint64_t ended();

enum class Fault {
  kNone,
  kEnds,
  kStops
};  // a thread at any point; ended() does not tell of kStops

struct Options {
  Fault fault = Fault::kNone;
  int spurious = 0;  // sleeps that end for no reason, woken or by the time
  uint64_t most_states = 2'000'000;
  std::function<void()> at_end = [] {};  // of each run that came to an end of its own
};

struct Result {
  std::string failure;  // empty: there is none
  uint64_t states = 0, runs = 0, complete = 0, sleeps = 0, wakes = 0, faults = 0, timeouts = 0;
};

Result explore(int threads, const Options& options, const std::function<void()>& make_world,
               const std::function<void(int)>& body);

/// Runs body(world, thread) on a new World each time.
template <class World, class Body>
Result explore(int threads, const Options& options, const Body& body) {
  std::unique_ptr<World> world;
  return explore(
      threads, options, [&] { world.reset(), world = std::make_unique<World>(); },
      [&](int thread) { body(*world, thread); });
}

}  // namespace interleave
