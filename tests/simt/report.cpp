// SPDX-License-Identifier: MIT
//
// Error texts: who is running, what everybody waits for.
#include <map>

#include "runner.h"

namespace simt {
namespace detail {
namespace {

std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

// "0-31, 40" of ascending numbers.
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (j > i) text += "-" + std::to_string(numbers[j]);
    i = j + 1;
  }
  return text;
}

std::string text_of_wait(const Thread& thread) {
  const Wait& wait = thread.wait;
  switch (wait.kind) {
    case Wait::kBlockBarrier: {
      const Barrier& barrier = thread.block->barriers[wait.barrier_id];
      return std::string(wait.name) + " " + text_of(wait.where) + " (barrier " +
             std::to_string(wait.barrier_id) + ": " + std::to_string(barrier.arrived.size()) +
             " of " + std::to_string(barrier.expected) + " threads are there)";
    }
    case Wait::kWarp: {
      std::string text =
          std::string(wait.name) + " " + text_of(wait.where) + " with " + lanes_text(wait.mask);
      for (const Rendezvous& r : thread.block->warps[static_cast<size_t>(thread.warp())].pending)
        if (r.slots.mask == wait.mask && r.arrived >> thread.lane() & 1)
          text += "; " + lanes_text(r.slots.mask & ~r.arrived) + " are missing";
      return text;
    }
    case Wait::kSpin:
      return wait.describe(wait.context) + " " + text_of(wait.where);
    case Wait::kNothing:
      break;
  }
  return "nothing";
}

}  // namespace

std::string text_of(std::source_location where) {
  const std::string file = where.file_name();
  return "at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string lanes_text(uint32_t mask) {
  std::vector<int> lanes;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) lanes.push_back(lane);
  return (lanes.size() == 1 ? "lane " : "lanes ") + ranges(lanes);
}

std::string name_of(const Thread& thread) {
  return "block " + triple(thread.builtins.block_index) + " thread " +
         std::to_string(thread.builtins.linear_thread);
}

std::string deadlock_report(const std::vector<std::unique_ptr<Block>>& live,
                            size_t blocks_not_started) {
  std::string text = "deadlock: no thread can run";
  if (blocks_not_started > 0)
    text += " (" + std::to_string(blocks_not_started) +
            " blocks have not started: a kernel that waits for other blocks needs a cooperative "
            "launch)";
  for (const auto& block : live) {
    std::map<std::string, std::vector<int>> groups;
    for (const Thread* thread : block->threads)
      groups[thread->exited ? "exited" : "wait for " + text_of_wait(*thread)].push_back(
          thread->builtins.linear_thread);
    for (const auto& [what, who] : groups)
      text += "\n  block " + triple(block->index) + (who.size() == 1 ? " thread " : " threads ") +
              ranges(who) + ": " + what;
  }
  return text;
}

std::string shared_address(const void* address) {
  const Block& block = Runner::instance().block();
  const SharedMemory* const memory = memory_of(block, address);
  if (memory == nullptr) return "no shared memory";
  return std::string(memory == block.dynamic.get() ? "dynamic" : "static") + " shared + " +
         std::to_string(static_cast<const char*>(address) - memory->data());
}

void check_shared(const void* address, size_t bytes, const char* what) {
  const SharedMemory* const memory = memory_of(Runner::instance().block(), address);
  if (memory == nullptr ||
      static_cast<const char*>(address) + bytes > memory->data() + memory->bytes())
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes from " +
         shared_address(address) + " on are not all in the block's shared memory");
}

void check_global16(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    fail(std::string(what) + ": the address must be a multiple of 16 bytes");
  if (memory_of(*Runner::instance().self(what).block, address) != nullptr)
    fail(std::string(what) + ": expected global memory, got " + shared_address(address));
}

void fail_outside_kernel(const char* what) {
  throw Error(std::string(what) + ": used outside of a kernel");
}

}  // namespace detail

void fail(const std::string& message) {
  detail::Runner& runner = detail::Runner::instance();
  if (!runner.running()) throw Error(message);
  throw Error(detail::name_of(runner.self("fail")) + ": " + message);
}

}  // namespace simt
