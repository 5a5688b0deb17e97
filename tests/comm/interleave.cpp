// SPDX-License-Identifier: MIT
#include "interleave.h"

#include <algorithm>
#include <sstream>

#include "model.h"

namespace interleave {

Model* model = nullptr;

size_t Model::choose(size_t count) {
  if (count < 2) return 0;
  if (position_ == trail_.size()) trail_.push_back({0, count});
  return trail_[position_++].chosen;
}

void Model::step(int wrote) {
  Thread& self = running();
  self.wrote = wrote;
  simt::Fiber::switch_to(*self.fiber, main_);
  if (abandoning_) throw Abandon{};
}

void Model::wait(const std::function<bool()>& ready) {
  if (ready()) return;
  running().ready = &ready;
  step(running().wrote);
  running().ready = nullptr;
}

void Model::resume(Thread& thread) {
  running_ = thread.index;
  thread.started = true;
  simt::Fiber::switch_to(main_, *thread.fiber);
}

void Model::run_thread(void*) {
  for (;;) {
    Thread& self = model->running();
    try {
      model->body_(self.index);
    } catch (const Abandon&) {
    } catch (const Failure& failure) {
      if (model->failure_.empty()) model->failure_ = failure.text;
    } catch (const std::exception& error) {
      if (model->failure_.empty()) model->failure_ = error.what();
    }
    self.state = Thread::kDone;
    simt::Fiber::switch_to(*self.fiber, model->main_);
  }
}

// All that the rest of the run depends on. What every thread knows orders nothing any more: stores
// older than that are gone, and knowing less is as good.
uint64_t Model::state_key() {
  Known common;
  common.clock.fill(UINT16_MAX), common.seen.fill(UINT32_MAX);
  for (const Thread& t : threads_) {
    for (size_t i = 0; i < kThreads && t.live(); ++i)
      common.clock[i] = std::min(common.clock[i], t.now.clock[i]);
    for (size_t w = 0; w < kWords && t.live(); ++w)
      common.seen[w] = std::min(common.seen[w], t.now.seen[w]);
  }
  uint64_t key = 0;
  const auto add_clock = [&](size_t thread, uint16_t clock) {
    mix(key, clock <= common.clock[thread] ? 0 : clock);
  };
  const auto add_place = [&](size_t word, uint32_t seen) {
    const auto& stores = locations_[word].stores;
    uint64_t place = 0;
    for (size_t i = stores.size(); i-- > 0 && stores[i].place > seen;) ++place;
    mix(key, seen <= common.seen[word] ? ~uint64_t{0} : place);
  };
  const auto add = [&](const Known& known) {
    for (size_t t = 0; t < threads_.size(); ++t) add_clock(t, known.clock[t]);
    for (size_t w = 0; w < locations_.size(); ++w) add_place(w, known.seen[w]);
  };
  for (Thread& t : threads_) {
    t.heard.join(t.now);  // which a fence would add to it anyway
    mix(key, uint64_t(t.state) * 4 + t.woken * 2 + (t.ready != nullptr));
    mix(key, uint64_t(t.wrote));
    mix(key, t.history);
    mix(key, uint64_t(t.bed) << 32 | t.asleep_on);
    if (t.state == Thread::kDone) continue;
    add(t.now), add(t.heard), add(t.told);
  }
  for (size_t w = 0; w < locations_.size(); ++w) {
    const Location& location = locations_[w];
    for (size_t i = location.stores.size(); i-- > 0;) {
      const Store& store = location.stores[i];
      mix(key, store.value * 2 + store.follows);
      add(store.released);
      if (store.place <= common.seen[w]) break;
    }
    add_place(w, location.kernel);
  }
  for (const Cell* cell : cells_) {
    mix(key, cell->value_);
    mix(key, uint64_t(cell->writer_));
    if (cell->writer_ >= 0) add_clock(size_t(cell->writer_), cell->written_);
    for (size_t t = 0; t < threads_.size(); ++t) add_clock(t, cell->read_[t]);
  }
  add(total_order_);
  mix(key, uint64_t(time_) << 32 | uint64_t(faults_) << 16 | uint64_t(spurious_));
  return key;
}

bool Model::met_before(uint64_t within) {
  if (position_ < trail_.size()) return false;  // on the way that was gone before
  uint64_t key = state_key();
  mix(key, within);
  if (!visited_.insert(key).second) return true;
  if (visited_.size() > options_.most_states) failure_ = "more states than expected";
  return false;
}

void Model::mark(uint64_t mark) {
  running().history = mark;
  if (met_before(uint64_t(running_) + 1)) {
    cut_ = true;
    throw Abandon{};
  }
}

void Model::run() {
  enum What { kGoes, kFails, kWoken, kTimedOut };
  constexpr const char* kNames[] = {"goes on", "has a fault", "stirs", "stirs by the time"};
  struct Way {
    Thread* thread;
    What what;
  };
  std::vector<Way> ways;
  locations_.clear(), cells_.clear(), events_.clear();
  cut_ = false, position_ = 0, time_ = 0, faults_ = 0, spurious_ = 0, total_order_ = {};
  for (Thread& t : threads_) {
    simt::Fiber* fiber = t.fiber;
    t = {};
    t.fiber = fiber;
    t.index = int(&t - threads_.data());
    t.now.clock[size_t(t.index)] = 1;
  }
  make_world_();
  while (failure_.empty()) {
    ways.clear();
    for (Thread& t : threads_)
      if (running_ = t.index; runs(t)) ways.push_back({&t, kGoes});
    if (ways.empty()) {
      if (!time_passes()) break;
      continue;
    }
    for (Thread& t : threads_) {
      if (options_.fault != Fault::kNone && faults_ == 0 && t.live()) ways.push_back({&t, kFails});
      if (spurious_ < options_.spurious && t.state == Thread::kAsleep)
        ways.push_back({&t, kWoken}), ways.push_back({&t, kTimedOut});
    }
    if (ways.size() > 1 && met_before(0)) return;
    const Way way = ways[choose(ways.size())];
    Thread& thread = *way.thread;
    if (way.what == kGoes) {
      resume(thread);
      if (cut_) return;
      continue;
    }
    events_.push_back({thread.index, kNames[way.what], -1, 0});
    if (way.what == kFails) {
      thread.state = Thread::kFaulty;
      ++faults_, ++result_.faults;
    } else {
      thread.state = Thread::kReady;
      thread.woken = way.what == kWoken;
      ++spurious_;
    }
  }
  if (!failure_.empty()) return;
  ++result_.complete;
  options_.at_end();
}

Result Model::explore() {
  model = this;
  for (;;) {
    run();
    ++result_.runs;
    abandoning_ = true;
    for (Thread& t : threads_)
      if (t.started && t.state != Thread::kDone) resume(t);
    abandoning_ = false;
    if (!failure_.empty()) {
      result_.failure = failure_ + story();
      break;
    }
    while (!trail_.empty() && trail_.back().chosen + 1 == trail_.back().count) trail_.pop_back();
    if (trail_.empty()) break;
    ++trail_.back().chosen;
  }
  result_.states = visited_.size();
  model = nullptr;
  return result_;
}

std::string Model::story() const {
  std::ostringstream text;
  for (const Event& e : events_) {
    text << "\n  thread " << e.thread;
    if (e.word >= 0) text << "  word " << e.word;
    text << "  " << e.what;
    if (e.word >= 0) text << ' ' << e.value;
  }
  return text.str();
}

Result explore(int threads, const Options& options, const std::function<void()>& make_world,
               const std::function<void(int)>& body) {
  return Model(threads, options, make_world, body).explore();
}

}  // namespace interleave
