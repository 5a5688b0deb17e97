// SPDX-License-Identifier: MIT
// The explorer's inside: memory.cpp says what operations do, interleave.cpp in which order.
#pragma once

#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "fiber.h"
#include "interleave.h"

namespace interleave {

struct Abandon {};  // unwinds a thread whose run is over
struct Failure {
  std::string text;
};

struct Store {
  uint64_t value;
  uint32_t place;    // in the order of the word's stores: they grow, with room between
  bool follows;      // a read-modify-write: nothing comes between it and what it has read
  Known released{};  // what an acquiring load of it gets
};
constexpr uint32_t kRoom = 1 << 16;  // places between two stores

struct Location {
  std::vector<Store> stores;  // by place
  uint32_t kernel = 0;        // the newest that those had seen who woke sleepers here
};

struct Event {
  int thread;
  const char* what;
  int word;
  uint64_t value;
};

struct Thread {
  enum State { kReady, kAsleep, kDone, kFaulty };
  simt::Fiber* fiber = nullptr;
  int index = 0;
  State state = kReady;
  const std::function<bool()>* ready = nullptr;  // what it waits for, if anything
  int wrote = -1;                                // the word, if that was its last operation
  int bed = -1;  // the word that it sleeps on, while this is `asleep_on`
  uint32_t asleep_on = 0;
  bool woken = false, started = false;
  Known now, heard, told;  // it knows; acquire fence will add; was known at its release fence
  uint64_t history = 0;    // of all that its operations have given since its mark
  bool live() const { return state == kReady || state == kAsleep; }
};

inline void mix(uint64_t& hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15;
  hash ^= hash >> 29;
}

class Model {
 public:
  Model(int threads, const Options& options, const std::function<void()>& make_world,
        const std::function<void(int)>& body)
      : options_(options), make_world_(make_world), body_(body), threads_(size_t(threads)) {
    for (int t = 0; t < threads; ++t) {
      fibers_.push_back(std::make_unique<simt::Fiber>(&Model::run_thread, nullptr, 64 << 10));
      threads_[size_t(t)].fiber = fibers_.back().get();
    }
  }

  Result explore();

  Thread& running() { return threads_[size_t(running_)]; }
  int add_location(uint64_t value) {
    if (locations_.size() == kWords) throw std::logic_error("interleave: more words than kWords");
    locations_.push_back({{{value, kRoom, false}}});
    return int(locations_.size()) - 1;
  }
  void add_cell(Cell* cell) { cells_.push_back(cell); }
  Location& location(int word) { return locations_[size_t(word)]; }

  // The running thread has done an operation: others may go on.
  void step(int wrote = -1);
  void wait(const std::function<bool()>& ready);
  size_t choose(size_t count);
  void record(const char* what, int word, uint64_t value) {
    events_.push_back({running_, what, word, value});
  }
  // What the running thread has been given is part of its state.
  template <class T>
  T given(T result) {
    mix(running().history, uint64_t(result));
    return result;
  }

  // Which stores the running thread may read: those from the newest that it has seen on.
  template <class Wanted>
  std::vector<size_t>& readable(int word, const Wanted& wanted);
  // Of these the oldest that fulfils a condition and the oldest that does not, where nothing else
  // is asked of the value: who has read a newer one can do no more than who knows less.
  std::vector<size_t>& oldest(std::vector<size_t>& found, int word, const Condition& condition);
  bool open(int word, size_t store) const {  // for a store right behind it
    const auto& stores = locations_[size_t(word)].stores;
    return store + 1 == stores.size() || !stores[store + 1].follows;
  }
  size_t any_open(int word) {
    const auto& found = readable(word, [&](size_t i, uint64_t) { return open(word, i); });
    return found[choose(found.size())];
  }
  uint64_t read(int word, size_t store, std::memory_order order);
  void write(int word, size_t after, uint64_t value, std::memory_order order, bool follows);
  void fence(std::memory_order order);
  void mark(uint64_t mark);
  bool sleep(int word, uint32_t seen);
  void wake(int word);
  void check_read(Cell& cell);
  void check_write(Cell& cell);

  uint64_t faulty() const {
    uint64_t result = 0;
    for (const Thread& t : threads_) result |= uint64_t(t.state == Thread::kFaulty) << t.index;
    return result;
  }
  uint64_t told_ended();
  int64_t time_ = 0;
  Options options_;
  Result result_;

 private:
  static void run_thread(void*);
  void run();
  void resume(Thread& thread);
  bool runs(const Thread& t) const {
    return t.state == Thread::kReady && (!t.ready || (*t.ready)());
  }
  bool time_passes();
  bool met_before(uint64_t within);
  uint64_t state_key();
  std::string story() const;

  struct Choice {
    size_t chosen, count;
  };
  const std::function<void()>& make_world_;
  const std::function<void(int)>& body_;
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<simt::Fiber>> fibers_;
  simt::Fiber main_;
  std::vector<Location> locations_;
  std::vector<Cell*> cells_;
  std::vector<Event> events_;
  std::vector<size_t> candidates_;
  std::vector<Choice> trail_;
  size_t position_ = 0;
  std::unordered_set<uint64_t> visited_;
  Known total_order_;  // of the seq_cst fences
  std::string failure_;
  int running_ = 0, faults_ = 0, spurious_ = 0;
  bool abandoning_ = false, cut_ = false;  // the run is over: its state was met before
};

extern Model* model;  // whose run is on

template <class Wanted>
std::vector<size_t>& Model::readable(int word, const Wanted& wanted) {
  const auto& stores = location(word).stores;
  candidates_.clear();
  for (size_t i = stores.size(); i-- > 0 && stores[i].place >= running().now.seen[size_t(word)];)
    if (wanted(i, stores[i].value)) candidates_.push_back(i);
  return candidates_;
}

}  // namespace interleave
