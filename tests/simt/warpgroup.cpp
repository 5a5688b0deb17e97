// SPDX-License-Identifier: MIT
//
// What four warps do together: wgmma and setmaxnreg; and the registers that setmaxnreg moves.
#include <algorithm>
#include <utility>

#include "runner.h"

namespace simt {
namespace detail {
namespace {

constexpr size_t kThreads = 128;
constexpr int kRegisters = 64 * 1024;  // of a multiprocessor, and so of a block

}  // namespace

int registers_at_launch(int threads) {
  const int warps = (threads + 31) / 32;
  return std::min(256, kRegisters / (32 * warps) / 8 * 8);
}

void whole_warp(const char* name, std::source_location where) {
  const Resolve nothing = [](const WarpSlots&, int) { return uint64_t{0}; };
  const Thread& self = Runner::instance().self(name);
  const uint32_t present = self.block->warps[static_cast<size_t>(self.warp())].present;
  warp_operation(name, nothing, present, 0, 0, where);
}

void check_warpgroups(const Block& block) {
  for (const Thread* thread : block.threads) {
    const auto& all =
        block.warpgroups[static_cast<size_t>(thread->builtins.linear_thread) / kThreads];
    const size_t done = thread->warpgroup_operations;
    if (done == all.size()) continue;
    throw Error(name_of(*thread) + ": " + all[done].what + ": thread " +
                std::to_string(all[done].thread) + " of its warpgroup has executed " +
                std::to_string(all.size()) + " operations that all threads of a warpgroup must, " +
                "this one " + std::to_string(done));
  }
}

}  // namespace detail

void warpgroup_operation(const char* what, std::initializer_list<Operand> operands) {
  const InsideModel inside;
  detail::Thread& self = detail::Runner::instance().self(what);
  const int thread = self.builtins.linear_thread;
  auto& all = self.block->warpgroups[static_cast<size_t>(thread) / detail::kThreads];
  const size_t index = self.warpgroup_operations++;
  ++detail::Runner::instance().statistics.warpgroup_operations;
  if (index == all.size()) {
    Statistics& counts = detail::Runner::instance().statistics;
    const int group = thread / static_cast<int>(detail::kThreads);
    int& last = self.block->last_warpgroup;
    if (what == std::string_view("wgmma") && std::exchange(last, group) != group) {
      if (counts.turns++ == 0) counts.first_warpgroup = group;
    }
    all.push_back({what, thread, operands});
    return;
  }
  const detail::WarpgroupOperation& first = all[index];
  const std::string who = "thread " + std::to_string(first.thread) + " of the warpgroup";
  if (first.what != std::string_view(what))
    fail(std::string(what) + ": " + who + " has executed " + first.what + " here");
  for (size_t i = 0; i < operands.size(); ++i)
    if (const Operand& own = operands.begin()[i]; own.value != first.operands[i].value)
      fail(std::string(what) + ": " + own.name + ": expected " +
           std::to_string(first.operands[i].value) + " as " + who + " gave it, got " +
           std::to_string(own.value));
}

void set_registers(const char* what, int count, bool increase, std::source_location where) {
  detail::whole_warp(what, where);
  warpgroup_operation(what, {{"registers", static_cast<uint64_t>(count)}});
  detail::Thread& self = detail::Runner::instance().self(what);
  detail::Block& block = *self.block;
  detail::Warp& warp = block.warps[static_cast<size_t>(self.warp())];
  if (self.lane() == 0) {
    if (increase ? count < warp.registers : count > warp.registers)
      fail(std::string(what) + ": expected " + std::to_string(warp.registers) +
           " registers a thread, which the warp has, or " + (increase ? "more" : "fewer") +
           ", got " + std::to_string(count));
    const int more = 32 * (count - warp.registers);
    spin_until([&] { return more <= block.free_registers; },
               [&] {
                 return std::string(what) + ": " + std::to_string(more) +
                        " registers more for the warp (the block's pool has " +
                        std::to_string(block.free_registers) + ")";
               },
               where);
    block.free_registers -= more;
    warp.registers = count;
    notify_spinners();
  }
  detail::whole_warp(what, where);
}

}  // namespace simt
