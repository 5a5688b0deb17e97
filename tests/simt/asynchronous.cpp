// SPDX-License-Identifier: MIT
//
// What goes on while the threads do: TMA loads in flight, groups of wgmma and TMA stores; and which
// writes of threads to shared memory these may see.
#include <utility>

#include "runner.h"

namespace simt {
namespace detail {

// On whatever fiber runs now, but as the thread that began it.
void Runner::land(size_t index) {
  std::swap(in_flight_[index], in_flight_.back());
  // Not on this fiber's stack, which is no memory of the issuer's to ThreadSanitizer.
  const auto landing = std::make_unique<Flight>(std::move(in_flight_.back()));
  Flight& flight = *landing;
  in_flight_.pop_back();
  Thread* const running = std::exchange(current_, flight.issuer);
  const Builtins* const builtins = std::exchange(t_builtins, &flight.issuer->builtins);
  void* const before = switch_sanitizer_thread(flight.issuer->sanitizer_thread);
  try {
    flight.action();
  } catch (...) {
    if (!error_) error_ = std::current_exception();
  }
  flight.action = {};
  switch_sanitizer_thread(before);
  t_builtins = builtins;
  current_ = running;
}

// The block ends: what it sent to others lands first; what still comes in has lost its target.
void Runner::land_all_of(const Block& block) {
  for (size_t i = in_flight_.size(); i-- > 0;)
    if (in_flight_[i].issuer->block == &block && in_flight_[i].target != &block) land(i);
  for (const Flight& flight : in_flight_)
    if (flight.target == &block)
      throw Error(name_of(*flight.issuer) +
                  ": a TMA load was not waited for when the block that it writes to ended");
}

}  // namespace detail

void complete_later(int rank, std::function<void()> action) {
  {
    const InsideModel inside;
    detail::Runner& runner = detail::Runner::instance();
    detail::Thread& self = runner.self("complete_later");
    if (!runner.at_once()) {
      const detail::Block* target = self.block->cluster->blocks[static_cast<size_t>(rank)];
      runner.take_off({std::move(action), &self, target});
      return;
    }
  }
  action();
}

GroupedOperations& wgmma_group() { return detail::Runner::instance().self("wgmma").wgmma; }
GroupedOperations& bulk_group() { return detail::Runner::instance().self("TMA store").bulk; }
std::vector<void*>& unfenced_barriers() {
  return detail::Runner::instance().self("mbarrier_init").unfenced_barriers;
}

void GroupedOperations::begin(std::function<void()> first, std::function<void()> second) {
  detail::Runner& runner = detail::Runner::instance();
  operations_.push_back({std::move(first), std::move(second), open_group_, false});
  // One that happens takes all before it along: they happen in order.
  if (runner.at_once()) run(open_group_, runner.at_once());
}

void GroupedOperations::wait_for(int pending, bool both) {
  const int last_group = open_group_ - 1 - pending;
  for (Operation& operation : operations_) operation.waited |= operation.group <= last_group;
  run(last_group, both);
  fenced = false;
}

// Steps are taken out of the queue before they are done: they may fail.
void GroupedOperations::run(int last_group, bool both) {
  for (Operation& operation : operations_)
    if (operation.first && operation.group <= last_group) std::exchange(operation.first, {})();
  for (Operation& operation : operations_)
    if (both && operation.second && operation.group <= last_group)
      std::exchange(operation.second, {})();
  const auto done = [](const Operation& o) { return o.waited && !o.first && !o.second; };
  while (!operations_.empty() && done(operations_.front())) operations_.pop_front();
}

void GroupedOperations::finish() {
  for (const Operation& operation : operations_)
    if (!operation.waited) fail(std::string(name_) + ": not waited for when the thread ended");
  run(open_group_, true);
}

void GroupedOperations::clear() {
  operations_.clear();
  open_group_ = 0;
  fenced = false;
}

// ---- proxies, in pieces of 16 bytes of dynamic shared memory ------------------------------------

namespace {
template <class Visitor>
void for_each_piece(const void* address, size_t bytes, bool make, Visitor visit) {
  for (detail::Block* block : detail::Runner::instance().block().cluster->blocks) {
    if (block == nullptr) continue;
    const char* const base = block->dynamic->data();
    const ptrdiff_t offset = static_cast<const char*>(address) - base;
    if (offset < 0 || static_cast<size_t>(offset) >= block->dynamic->bytes()) continue;
    std::vector<detail::GenericWrite>& pieces = block->generic_writes;
    if (pieces.empty() && make) pieces.resize((block->dynamic->bytes() + 15) / 16);
    const size_t end = (static_cast<size_t>(offset) + bytes + 15) / 16;
    for (size_t i = static_cast<size_t>(offset) / 16; i < end && i < pieces.size(); ++i)
      visit(pieces[i], base + 16 * i);
  }
}
}  // namespace

void generic_write(const void* address, size_t bytes) {
  const InsideModel inside;
  detail::Runner& runner = detail::Runner::instance();
  const detail::GenericWrite write{&runner.self("a write"), runner.tick()};
  for_each_piece(address, bytes, true,
                 [&](detail::GenericWrite& piece, const char*) { piece = write; });
}

void async_write(const void* address, size_t bytes) {
  const InsideModel inside;
  for_each_piece(address, bytes, false,
                 [](detail::GenericWrite& piece, const char*) { piece = {}; });
}

void fence_async_proxy() {
  const InsideModel inside;
  detail::Runner& runner = detail::Runner::instance();
  runner.self("fence_async_shared").fenced_at = runner.tick();
}

void check_fenced(const void* address, size_t bytes, const char* what) {
  const InsideModel inside;
  const detail::Thread& self = detail::Runner::instance().self(what);
  for_each_piece(address, bytes, false, [&](const detail::GenericWrite& piece, const char* at) {
    if (piece.at == 0 || self.fenced_at > piece.at || piece.writer->fenced_at > piece.at) return;
    fail(std::string(what) + ": thread " + std::to_string(piece.writer->builtins.linear_thread) +
         " has written " + detail::shared_address(at) +
         ", and there was no fence_async_shared since, neither by it nor by this thread");
  });
}

}  // namespace simt
