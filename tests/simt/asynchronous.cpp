// SPDX-License-Identifier: MIT
//
// What goes on while threads go on: wgmma, TMA; and the proxies of shared memory.
#include <algorithm>
#include <utility>

#include "runner.h"

namespace simt {
namespace detail {
namespace {

enum Lateness { kAnyTime, kAtOnce, kAsLateAsPossible };
Lateness lateness() { return static_cast<Lateness>(Runner::instance().settings.seed / 4 % 3); }

bool now() {
  const InsideModel inside;
  return lateness() == kAtOnce || (lateness() == kAnyTime && Runner::instance().one_in(2));
}

}  // namespace
}  // namespace detail

void complete_later(std::function<void()> action) { action(); }

GroupedOperations& wgmma_group() { return detail::Runner::instance().self("wgmma").wgmma; }
GroupedOperations& bulk_group() { return detail::Runner::instance().self("tma_store").bulk; }

// Operations happen in order: one that happens now takes all before it along.
void GroupedOperations::begin(std::function<void()> first, std::function<void()> second) {
  {
    const InsideModel inside;
    operations_.push_back({std::move(first), std::move(second), group_});
  }
  if (detail::now()) run_first(group_);
  if (detail::now()) run_second(group_);
}

void GroupedOperations::commit() { ++group_; }

void GroupedOperations::wait_first(int pending) { run_first(group_ - 1 - pending); }
void GroupedOperations::wait(int pending) {
  run_second(group_ - 1 - pending);
  fenced_ = false;
}

void GroupedOperations::run_first(int last_group) {
  for (Operation& operation : operations_) {
    if (operation.group > last_group) break;
    if (operation.first) std::exchange(operation.first, {})();
  }
}

void GroupedOperations::run_second(int last_group) {
  run_first(last_group);
  while (!operations_.empty() && operations_.front().group <= last_group) {
    if (operations_.front().second) operations_.front().second();
    operations_.pop_front();
  }
}

void GroupedOperations::finish() {
  for (const Operation& operation : operations_)
    if (operation.first) fail(std::string(name_) + ": the thread ends before it has waited");
  run_second(group_);
}

void GroupedOperations::clear() {
  operations_.clear();
  group_ = 0;
  fenced_ = false;
}

void generic_write(const void*, size_t) {}
void fence_async_proxy() {}
void check_fenced(const void*, size_t, const char*) {}

int cluster_rank() { return 0; }
int cluster_blocks() { return 1; }
void cluster_arrive(std::source_location) {}
void cluster_wait(std::source_location where) {
  detail::block_barrier("cluster_wait", 0, 0, false, where);
}
void* in_peer(const void* address, int rank) {
  if (rank != 0) fail("in_peer: the cluster has one block");
  return const_cast<void*>(address);
}

}  // namespace simt
