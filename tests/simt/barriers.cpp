// SPDX-License-Identifier: MIT
//
// Where threads meet: block barriers and warp operations; and the memory that the threads of a
// block share.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "runner.h"

#if defined(__SANITIZE_ADDRESS__)
#define KIMI_SIMT_ASAN 1
#endif
namespace simt {
namespace detail {
namespace {

constexpr size_t kCanaryBytes = 64;
constexpr unsigned char kCanary = 0xc5, kFill = 0xff;
constexpr size_t kMostStatic = 48 * 1024;

}  // namespace

// ASan's own red zone begins at the first byte past the end, so the canary behind is left out for
// it.
SharedMemory::SharedMemory(size_t bytes, size_t alignment)
    : bytes_(bytes), alignment_(alignment), prefix_(std::max(alignment, kCanaryBytes)) {
#if defined(KIMI_SIMT_ASAN)
  const size_t suffix = 0;
#else
  const size_t suffix = kCanaryBytes;
#endif
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), prefix_ + bytes + suffix) != 0)
    throw std::bad_alloc();
  allocation_ = static_cast<char*>(memory);
  data_ = allocation_ + prefix_;
  std::memset(allocation_, kCanary, prefix_);
  std::memset(data_, kFill, bytes);
  std::memset(data_ + bytes, kCanary, suffix);
}

SharedMemory::~SharedMemory() { std::free(allocation_); }

std::string SharedMemory::damage() const {
  const auto bad = [](char c) { return static_cast<unsigned char>(c) != kCanary; };
#if !defined(KIMI_SIMT_ASAN)
  const char* end = data_ + bytes_;
  const char* after = std::find_if(end, end + kCanaryBytes, bad);
  if (after != end + kCanaryBytes)
    return "written " + std::to_string(after - end) + " bytes past the end";
#endif
  const auto before =
      std::find_if(std::reverse_iterator(data_), std::reverse_iterator(allocation_), bad);
  if (before.base() != allocation_)
    return "written " + std::to_string(data_ - before.base() + 1) + " bytes before the start";
  return {};
}

void* dynamic_shared() { return Runner::instance().self("KIMI_SHARED").block->dynamic->data(); }

void* static_of(Block& block, const void* site, size_t bytes, size_t alignment) {
  for (const auto& [key, memory] : block.statics)
    if (key == site) return memory->data();
  size_t all = bytes;
  for (const auto& [key, memory] : block.statics) all += memory->bytes();
  if (all > kMostStatic)
    fail("static shared memory: expected at most " + std::to_string(kMostStatic) +
         " bytes in a kernel, got " + std::to_string(all));
  if (all + block.dynamic->bytes() > kMostShared)
    fail("shared memory: expected at most " + std::to_string(kMostShared) + " bytes, got " +
         std::to_string(all) + " static and " + std::to_string(block.dynamic->bytes()) +
         " dynamic ones");
  block.statics.emplace_back(
      site, std::make_unique<SharedMemory>(bytes, std::max<size_t>(alignment, 16)));
  return block.statics.back().second->data();
}

void* static_shared(const void* site, size_t bytes, size_t alignment) {
  const InsideModel inside;
  return static_of(*Runner::instance().self("KIMI_STATIC_SHARED").block, site, bytes, alignment);
}

namespace {
// The hardware counts a warp that comes as 32 threads, whichever of its lanes do.
void check_whole_warps(const char* name, const Block& block, const Barrier& barrier) {
  std::vector<uint32_t> lanes(block.warps.size());
  for (const Thread* thread : barrier.arrived)
    lanes[static_cast<size_t>(thread->warp())] |= 1u << thread->lane();
  for (size_t w = 0; w < lanes.size(); ++w)
    if (lanes[w] != 0 && lanes[w] != block.warps[w].present)
      fail(std::string(name) + ": expected whole warps, got " + lanes_text(lanes[w]) + " of warp " +
           std::to_string(w));
}
}  // namespace

// A barrier for `expected` threads, or all threads of the block if that is 0. Returns how many came
// with a true predicate.
int block_barrier(const char* name, int id, int expected, bool predicate,
                  std::source_location where) {
  const InsideModel inside;
  Runner& runner = Runner::instance();
  Thread& self = runner.self(name);
  Block& block = *self.block;
  const int all = static_cast<int>(block.threads.size());
  ++runner.statistics.barriers;
  if (id < 0 || id >= Block::kBarriers)
    fail(std::string(name) + ": id: expected 0 to 15, got " + std::to_string(id));
  if (expected < 0 || expected > all || expected % 32 != 0)
    fail(std::string(name) + ": threads: expected a multiple of 32 up to " + std::to_string(all) +
         ", got " + std::to_string(expected));
  if (id == 0 && expected == 0 && block.running != all)
    fail("divergent barrier: " + std::to_string(all - block.running) +
         " threads of the block have exited before this " + name + " " + text_of(where));
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived.empty()) {
    barrier.expected = expected == 0 ? all : expected;
    barrier.satisfied_predicates = 0;
  } else {
    const Thread& first = *barrier.arrived[0];
    if (barrier.expected != (expected == 0 ? all : expected))
      fail("barrier " + std::to_string(id) + ": this thread expects " + std::to_string(expected) +
           " threads, thread " + std::to_string(first.builtins.linear_thread) + " expects " +
           std::to_string(barrier.expected));
    if (id == 0 && (first.wait.where.line() != where.line() ||
                    std::strcmp(first.wait.where.file_name(), where.file_name()) != 0))
      fail("divergent barrier: this thread is at " + std::string(name) + " " + text_of(where) +
           ", thread " + std::to_string(first.builtins.linear_thread) + " waits at " +
           first.wait.name + " " + text_of(first.wait.where));
  }
  barrier.satisfied_predicates += predicate;
  barrier.arrived.push_back(&self);
  const void* meeting = &barrier.meetings[barrier.generation % 2];
  release_as(self, meeting);
  Wait wait;
  wait.kind = Wait::kBlockBarrier;
  wait.name = name;
  wait.barrier_id = id;
  wait.where = where;
  if (static_cast<int>(barrier.arrived.size()) == barrier.expected) {
    check_whole_warps(name, block, barrier);
    for (Thread* thread : barrier.arrived) {
      thread->result = static_cast<uint64_t>(barrier.satisfied_predicates);
      if (thread != &self) runner.make_ready(thread);
    }
    barrier.arrived.clear();
    ++barrier.generation;
    runner.yield();
  } else {
    runner.park(wait);
  }
  acquire_as(self, meeting);
  return static_cast<int>(self.result);
}

uint64_t warp_operation(const char* name, Resolve resolve, uint32_t mask, uint64_t value,
                        uint32_t argument, std::source_location where, bool orders_memory) {
  const InsideModel inside;
  Runner& runner = Runner::instance();
  Thread& self = runner.self(name);
  Warp& warp = self.block->warps[static_cast<size_t>(self.warp())];
  const int lane = self.lane();
  ++runner.statistics.warp_operations;
  if (!(mask >> lane & 1))
    fail(std::string(name) + " " + text_of(where) + ": the mask names " + lanes_text(mask) +
         " and not the calling lane " + std::to_string(lane));
  if (mask & ~warp.present)
    fail(std::string(name) + " " + text_of(where) + ": the mask names " +
         lanes_text(mask & ~warp.present) + ", which this warp of " +
         std::to_string(std::popcount(warp.present)) + " threads does not have");
  if (mask & warp.exited)
    fail(std::string(name) + " " + text_of(where) + ": the mask names an exited lane (" +
         lanes_text(mask & warp.exited) + ")");
  const auto same = [&](const Rendezvous& r) {
    return r.resolve == resolve && r.slots.mask == mask && !(r.arrived >> lane & 1);
  };
  auto pending = std::find_if(warp.pending.begin(), warp.pending.end(), same);
  if (pending == warp.pending.end()) {
    const void* meeting = &warp.meetings[warp.next_meeting++ % sizeof warp.meetings];
    warp.pending.push_back({meeting, resolve, 0, {mask, {}, {}}});
    pending = warp.pending.end() - 1;
  }
  const void* meeting = pending->meeting;
  if (orders_memory) release_as(self, meeting);
  pending->arrived |= 1u << lane;
  pending->slots.value[lane] = value;
  pending->slots.argument[lane] = argument;
  if (pending->arrived == mask) {
    const size_t base = static_cast<size_t>(self.warp()) * 32;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const int other = std::countr_zero(rest);
      Thread& thread = *self.block->threads[base + static_cast<size_t>(other)];
      thread.result = resolve(pending->slots, other);
      if (&thread != &self) runner.make_ready(&thread);
    }
    *pending = warp.pending.back();
    warp.pending.pop_back();
    runner.yield();
  } else {
    Wait wait;
    wait.kind = Wait::kWarp;
    wait.name = name;
    wait.mask = mask;
    wait.where = where;
    runner.park(wait);
  }
  if (orders_memory) acquire_as(self, meeting);
  return self.result;
}

uint64_t shuffled(const WarpSlots& slots, int lane, int source) {
  if (!(slots.mask >> source & 1))
    fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
         ", which the mask does not name (" + lanes_text(slots.mask) + ")");
  return slots.value[source];
}

}  // namespace detail
}  // namespace simt

void __syncwarp(uint32_t mask, std::source_location where) {
  const simt::detail::Resolve nothing = [](const simt::detail::WarpSlots&, int) {
    return uint64_t{0};
  };
  simt::detail::warp_operation("__syncwarp", nothing, mask, 0, 0, where, true);
}

void __threadfence() {
  const void* fences = &simt::detail::Runner::instance();
  simt::release(fences);
  simt::acquire(fences);
}

namespace {
uint64_t ballot(const simt::detail::WarpSlots& slots, int) {
  uint64_t bits = 0;
  for (int i = 0; i < 32; ++i)
    if (slots.mask >> i & 1) bits |= slots.value[i] << i;
  return bits;
}
}  // namespace

uint32_t __ballot_sync(uint32_t mask, int predicate, std::source_location where) {
  return static_cast<uint32_t>(simt::detail::warp_operation("__ballot_sync", ballot, mask,
                                                            uint64_t{predicate != 0}, 0, where));
}
int __any_sync(uint32_t mask, int predicate, std::source_location where) {
  const simt::detail::Resolve any = [](const simt::detail::WarpSlots& slots, int lane) {
    return uint64_t{ballot(slots, lane) != 0};
  };
  return static_cast<int>(
      simt::detail::warp_operation("__any_sync", any, mask, uint64_t{predicate != 0}, 0, where));
}
int __all_sync(uint32_t mask, int predicate, std::source_location where) {
  const simt::detail::Resolve all = [](const simt::detail::WarpSlots& slots, int lane) {
    return uint64_t{ballot(slots, lane) == slots.mask};
  };
  return static_cast<int>(
      simt::detail::warp_operation("__all_sync", all, mask, uint64_t{predicate != 0}, 0, where));
}
