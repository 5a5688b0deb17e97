// SPDX-License-Identifier: MIT
#include <algorithm>
#include <utility>

#include "model.h"

namespace interleave {

namespace {

constexpr auto any = [](size_t, uint64_t) { return true; };

bool acquires(std::memory_order order) {
  return order == std::memory_order_acquire || order == std::memory_order_acq_rel;
}
bool releases(std::memory_order order) {
  return order == std::memory_order_release || order == std::memory_order_acq_rel;
}

}  // namespace

void Known::join(const Known& other) {
  for (int t = 0; t < kThreads; ++t) clock[t] = std::max(clock[t], other.clock[t]);
  for (int w = 0; w < kWords; ++w) seen[w] = std::max(seen[w], other.seen[w]);
}

std::vector<size_t>& Model::oldest(std::vector<size_t>& found, int word,
                                   const Condition& condition) {
  std::array<size_t, 2> last;
  std::array<bool, 2> there{};
  for (const size_t i : found) {
    const bool fits = condition(location(word).stores[i].value);
    last[fits] = i, there[fits] = true;
  }
  found.clear();
  for (const bool fits : {true, false})
    if (there[fits]) found.push_back(last[fits]);
  return found;
}

uint64_t Model::read(int word, size_t store, std::memory_order order) {
  if (order == std::memory_order_seq_cst) throw Failure{"seq_cst is known of fences only"};
  const Store& from = location(word).stores[store];
  Thread& self = running();
  (acquires(order) ? self.now : self.heard).join(from.released);
  self.now.seen[size_t(word)] = std::max(self.now.seen[size_t(word)], from.place);
  return from.value;
}

void Model::write(int word, size_t after, uint64_t value, std::memory_order order, bool follows) {
  if (order == std::memory_order_seq_cst) throw Failure{"seq_cst is known of fences only"};
  Thread& self = running();
  auto& stores = location(word).stores;
  const uint32_t low = stores[after].place;
  const uint32_t high = after + 1 < stores.size() ? stores[after + 1].place : low + 2 * kRoom;
  if (high - low < 2) throw Failure{"the model has no room for another store between two"};
  Store store{value, low + (high - low) / 2, follows};
  self.now.seen[size_t(word)] = store.place;
  store.released = releases(order) ? self.now : self.told;
  store.released.seen[size_t(word)] = store.place;
  if (follows) store.released.join(stores[after].released);
  stores.insert(stores.begin() + long(after) + 1, store);
  if (releases(order)) ++self.now.clock[size_t(running_)];
}

void Model::fence(std::memory_order order) {
  Thread& self = running();
  const bool both = order == std::memory_order_seq_cst || order == std::memory_order_acq_rel;
  if (both || order == std::memory_order_acquire) self.now.join(self.heard);
  if (order == std::memory_order_seq_cst) {
    for (size_t w = 0; w < kWords; ++w)
      total_order_.seen[w] = self.now.seen[w] = std::max(total_order_.seen[w], self.now.seen[w]);
  }
  if (both || order == std::memory_order_release) {
    self.told = self.now;
    ++self.now.clock[size_t(running_)];
  }
}

void Model::check_read(Cell& cell) {
  Thread& self = running();
  if (cell.writer_ >= 0 && self.now.clock[size_t(cell.writer_)] < cell.written_)
    throw Failure{"a race: read, and written by thread " + std::to_string(cell.writer_)};
  cell.read_[size_t(running_)] = self.now.clock[size_t(running_)];
}

void Model::check_write(Cell& cell) {
  Thread& self = running();
  if (cell.writer_ >= 0 && self.now.clock[size_t(cell.writer_)] < cell.written_)
    throw Failure{"a race: written, and written by thread " + std::to_string(cell.writer_)};
  for (size_t t = 0; t < kThreads; ++t)
    if (self.now.clock[t] < cell.read_[t])
      throw Failure{"a race: written, and read by thread " + std::to_string(t)};
  cell.writer_ = running_;
  cell.written_ = self.now.clock[size_t(running_)];
}

// ---- sleep -------------------------------------------------------------------------------------

bool Model::sleep(int word, uint32_t seen) {
  Thread& self = running();
  // The kernel compares under the lock that wake() takes too: what was seen there is not unseen.
  auto& known = self.now.seen[size_t(word)];
  known = std::max(known, location(word).kernel);
  const auto& found =
      oldest(readable(word, any), word, [=](uint64_t value) { return uint32_t(value) == seen; });
  const Store& store = location(word).stores[found[choose(found.size())]];
  known = std::max(known, store.place);
  const bool asleep = given(uint32_t(store.value) == seen);
  record(asleep ? "sleeps while" : "lets nobody sleep, being", word, store.value);
  if (!asleep) return true;
  ++result_.sleeps;
  self.state = Thread::kAsleep;
  self.bed = word;
  self.asleep_on = seen;
  step();
  const bool woken = std::exchange(self.woken, false);
  self.bed = -1;
  self.asleep_on = 0;
  record(woken ? "wakes it from" : "lets the time wake it from", word, seen);
  return given(woken);
}

void Model::wake(int word) {
  auto& known = location(word).kernel;
  known = std::max(known, running().now.seen[size_t(word)]);
  for (Thread& t : threads_) {
    if (t.state != Thread::kAsleep || t.bed != word) continue;
    t.state = Thread::kReady;
    t.woken = true;
    ++result_.wakes;
  }
  record("wakes sleepers, at", word, location(word).stores.back().value);
}

// Nothing can run. After a fault, and for those asleep, that may be: the time wakes them.
bool Model::time_passes() {
  bool asleep = false;
  uint64_t excused = 0;  // words whose sleepers nobody lives to wake
  for (const Thread& t : threads_)
    if (t.state == Thread::kFaulty && t.wrote >= 0) excused |= uint64_t{1} << t.wrote;
  for (const Thread& t : threads_) {
    if (t.state == Thread::kReady) failure_ = "threads wait for ever";
    if (t.state != Thread::kAsleep) continue;
    asleep = true;
    if (uint32_t(location(t.bed).stores.back().value) != t.asleep_on && !(excused >> t.bed & 1))
      failure_ = "a lost wake-up: the word has another value, and thread " +
                 std::to_string(t.index) + " sleeps";
  }
  if (failure_.empty() && !asleep) return false;
  if (failure_.empty() && faults_ == 0) failure_ = "threads sleep for ever";
  if (failure_.empty() && ++time_ > 4) failure_ = "threads sleep on and on";
  if (!failure_.empty()) return false;
  ++result_.timeouts;
  for (Thread& t : threads_)
    if (t.state == Thread::kAsleep) t.state = Thread::kReady, t.woken = false;
  return true;
}

uint64_t Model::told_ended() {
  const uint64_t result = options_.fault == Fault::kEnds ? faulty() : 0;
  for (const Thread& t : threads_)
    if (result >> t.index & 1) running().now.join(t.now);
  return given(result);
}

// ---- what tests use ----------------------------------------------------------------------------

Word::Word(uint64_t value) : index_(model->add_location(value)) {}

uint64_t Word::load(std::memory_order order) {
  const auto& found = model->readable(index_, any);
  const uint64_t value = model->read(index_, found[model->choose(found.size())], order);
  model->record("gives", index_, value);
  return model->given(value);
}

bool Word::is(const Condition& condition, std::memory_order order) {
  const auto& found = model->oldest(model->readable(index_, any), index_, condition);
  const uint64_t value = model->read(index_, found[model->choose(found.size())], order);
  const bool result = condition(value);
  model->record(result ? "is, as wanted," : "is not as wanted, but", index_, value);
  return model->given(result);
}

void Word::wait_until(const Condition& condition, std::memory_order order) {
  const auto fits = [&](size_t, uint64_t value) { return condition(value); };
  model->wait([&] { return !model->readable(index_, fits).empty(); });
  model->read(index_, model->readable(index_, fits).back(), order);
  model->record("is at last", index_, 0);
}

void Word::store(uint64_t value, std::memory_order order) {
  const size_t after = model->any_open(index_);
  model->write(index_, after, value, order, false);
  model->record("is set", index_, value);
  model->step(index_);
}

template <class Change>
uint64_t Word::change(const char* what, const Change& changed, std::memory_order order) {
  const size_t from = model->any_open(index_);
  const uint64_t old = model->read(index_, from, order);
  model->write(index_, from, changed(old), order, true);
  model->record(what, index_, changed(old));
  model->given(old);
  model->step(index_);
  return old;
}

uint64_t Word::exchange(uint64_t value, std::memory_order order) {
  return change("exchanges", [=](uint64_t) { return value; }, order);
}

uint64_t Word::fetch_add(uint64_t value, std::memory_order order) {
  return change("becomes", [=](uint64_t old) { return old + value; }, order);
}

bool Word::compare_exchange_strong(uint64_t& expected, uint64_t desired, std::memory_order order) {
  const auto& found = model->readable(index_, [&](size_t i, uint64_t value) {
    return value != expected || model->open(index_, i);
  });
  const size_t from = found[model->choose(found.size())];
  const uint64_t old = model->read(index_, from, order);
  const bool same = old == expected;
  if (same) model->write(index_, from, desired, order, true);
  model->record(same ? "swaps" : "does not swap", index_, same ? desired : old);
  expected = model->given(old);
  if (same) model->step(index_);
  return same;
}

bool Word::sleep(uint32_t seen) { return model->sleep(index_, seen); }

void Word::wake() {
  model->wake(index_);
  model->step();
}

uint64_t Word::newest() const { return model->location(index_).stores.back().value; }

Cell::Cell() { model->add_cell(this); }

uint64_t Cell::read() {
  model->check_read(*this);
  return model->given(value_);
}

void Cell::write(uint64_t value) {
  model->check_write(*this);
  value_ = value;
}

void Barrier::wait() {
  const uint64_t before = arrived_.fetch_add(1, std::memory_order_acq_rel);
  const uint64_t all = (before / threads_ + 1) * threads_;
  arrived_.wait_until([=](uint64_t arrived) { return arrived >= all; }, std::memory_order_acquire);
}

void fence(std::memory_order order) {
  model->fence(order);
  model->step();
}

void mark(uint64_t mark) { model->mark(mark); }

int thread() { return model->running().index; }

void require(bool condition, const char* text) {
  if (!condition) throw Failure{text};
}

int64_t time() { return model->time_; }

uint64_t ended() {
  const uint64_t result = model->told_ended();
  model->step();
  return result;
}

uint64_t faulty() { return model->faulty(); }

}  // namespace interleave
