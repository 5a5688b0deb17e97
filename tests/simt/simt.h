// SPDX-License-Identifier: MIT
//
// Runs CUDA kernels on the host, for tests: one fiber for every CUDA thread, switched at barriers,
// warp operations and spins.
//
//   grid  -> blocks, `resident_blocks` of them live at a time, started in random order
//   block -> warps of 32 fibers; shared memory of exactly the bytes asked for, between canaries
//            (and the red zones of AddressSanitizer)
//   fiber -> runs until it must wait; then the next ready one, in an order drawn from the seed
//
// The seed chooses the order: seed % 4 is 0 ascending, 1 descending, 2 warp by warp (each as far
// ahead of the others as the barriers allow), 3 uniformly random. Set it with
// simt::settings().seed or KIMI_SIMT_SEED. One OS thread runs it all: a failing seed fails again.
//
// What a kernel does wrong becomes a simt::Error thrown by launch(): a deadlock (with what each
// thread waits for), a barrier that some threads of the block do not reach, a warp operation whose
// mask names an exited lane, a shuffle from a lane outside the mask, writes beyond shared memory,
// misuse of an mbarrier. The rules are stricter than the hardware's where its behaviour is
// undefined or depends on the architecture. Under ThreadSanitizer every CUDA thread is a thread of
// its own, ordered by barriers alone: a race on shared or global memory is reported even if the
// result came out right. docs/testing_without_a_gpu.md says what all this cannot see.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

struct Error : std::logic_error {
  using std::logic_error::logic_error;
};

struct Settings {
  uint64_t seed = 3;                // KIMI_SIMT_SEED, read when the program starts
  int resident_blocks = 2;          // live at once in a launch that is not cooperative
  size_t stack_bytes = 256 * 1024;  // of each fiber; touched pages only take memory
  // Spinning threads look again this often without anything else having happened before it counts as
  // a deadlock: a spin loop may do a few steps of its own between two looks. KIMI_SIMT_PATIENCE, where
  // another process may be what they wait for: after the first few it gets the processor.
  int patience = 64;
};
/// Of the calling OS thread.
Settings& settings();

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
  bool cooperative = false;  // every block is live at once, as cudaLaunchCooperativeKernel promises
  unsigned cluster = 1;      // blocks along x that are live at once and reach each other
  bool overlaps = false;     // begins while the launch before it ends: see overlapped()
  const void* stream = nullptr;
};

/// Counts of the calling OS thread's last launch, or launches of overlapped().
struct Statistics {
  uint64_t switches = 0;
  uint64_t barriers = 0;
  uint64_t warp_operations = 0;
  uint64_t warpgroup_operations = 0;
  uint64_t turns = 0;       // wgmma of a block came from another warpgroup than the one before
  int first_warpgroup = 0;  // at the first of them
  uint64_t loads = 0, loaded_bytes = 0;  // by TMA
  uint64_t prefetched_bytes = 0;         // into the L2
  uint64_t stored_bytes = 0;             // of boxes by TMA
  uint64_t launches = 0;                 // the thread's so far
};
Statistics last_statistics();

/// Launches of the calling OS thread so far.
uint64_t launches();

/// The calling OS thread works on `stream`, as every launch does.
void queued_on(const void* stream);
/// The streams that it has worked on since this was called last, each once.
std::vector<const void*> take_streams();

namespace detail {

/// Per-lane inputs of one warp operation, and what it does with them: the value that `lane` gets.
struct WarpSlots {
  uint32_t mask;
  uint64_t value[32];
  uint32_t argument[32];
};
using Resolve = uint64_t (*)(const WarpSlots& slots, int lane);

/// The indices of the running thread, at a fixed place for the builtin names.
struct Builtins {
  uint3 thread_index, block_index;
  dim3 block_shape, grid_shape;
  int linear_thread;
  uint64_t serial;  // no other thread of any launch has it
};
extern thread_local constinit const Builtins* t_builtins;
[[noreturn]] void fail_outside_kernel(const char* what);
inline const Builtins& builtins(const char* what) {
  if (t_builtins == nullptr) fail_outside_kernel(what);
  return *t_builtins;
}

void submit(const LaunchShape& shape, std::function<void()> body);
void* dynamic_shared();
void* static_shared(const void* site, size_t bytes, size_t alignment);
int block_barrier(const char* name, int id, int expected_threads, bool predicate,
                  std::source_location where);
uint64_t warp_operation(const char* name, Resolve resolve, uint32_t mask, uint64_t value,
                        uint32_t argument, std::source_location where,
                        bool orders_memory = false);  // only __syncwarp does
/// All lanes of the warp that there are: an instruction that is `.aligned`.
void whole_warp(const char* name, std::source_location where);
void park_spinning(std::string (*describe)(const void*), const void* context,
                   std::source_location where);
std::string shared_address(const void* address);
/// Fails unless all of it is shared memory of the running thread's block.
void check_shared(const void* address, size_t bytes, const char* what);
/// Fails if it is; and if 16 does not divide it.
void check_global16(const void* address, const char* what);

}  // namespace detail

/// For primitives: the launch counts `by` more of `what`. The model's own memory, whichever thread it is.
void count(uint64_t Statistics::* what, uint64_t by);

/// Throws simt::Error naming the running thread.
[[noreturn]] void fail(const std::string& message);

/// For primitives: between construction and destruction the thread's memory accesses belong to the
/// model and not to the kernel, so that ThreadSanitizer does not see them.
class InsideModel {
 public:
  InsideModel();
  ~InsideModel();
  InsideModel(const InsideModel&) = delete;
  InsideModel& operator=(const InsideModel&) = delete;

 private:
  void* kernel_thread_;
};

/// For primitives: something that a spinning thread may wait for has changed.
void notify_spinners();

/// For primitives: lets other threads run first, now and then.
void preemption_point();

/// For primitives: waits until `ready()`; `describe()` says in a deadlock report what is waited
/// for.
template <class Ready, class Describe>
void spin_until(Ready ready, Describe describe,
                std::source_location where = std::source_location::current()) {
  while (!ready())
    detail::park_spinning([](const void* d) { return (*static_cast<const Describe*>(d))(); },
                          &describe, where);
}

/// For primitives, under ThreadSanitizer and outside of InsideModel: what this thread did before
/// becomes visible to whoever acquires `object` later.
void release(const void* object);
void acquire(const void* object);
/// The same: this thread writes memory, which the model then does inside of InsideModel.
void sees_write(const void* address, size_t bytes);

/// For primitives that go on by themselves: does `action`, which writes the shared memory of block
/// `rank` of the cluster, now or while the running thread goes on, at the latest when no thread can
/// run. What it does counts as this thread's; it must not wait. The seed says when: seed / 4 % 3 is
/// 0 any time, 1 at once, 2 as late as possible.
void complete_later(int rank, std::function<void()> action);

/// Operations of one thread that are waited for in groups, in order: wgmma, TMA stores. The seed
/// says when they happen, as above; at the latest when they are waited for.
class GroupedOperations {
 public:
  explicit GroupedOperations(const char* name) : name_(name) {}
  /// An operation of one or two steps. The group it belongs to is closed by commit().
  void begin(std::function<void()> first, std::function<void()> second = {});
  void commit() { ++open_group_; }
  /// All but the latest `pending` groups have done both steps, or the first one.
  void wait(int pending) { wait_for(pending, true); }
  void wait_first(int pending) { wait_for(pending, false); }
  /// The thread ends: fails if it has not waited for a first step; does the second steps.
  void finish();
  void clear();
  bool fenced = false;  // for wgmma: since the last wait

 private:
  struct Operation {
    std::function<void()> first, second;
    int group;
    bool waited;  // for the first step
  };
  void run(int last_group, bool both);
  void wait_for(int pending, bool both);
  const char* name_;
  std::deque<Operation> operations_;
  int open_group_ = 0;
};
GroupedOperations& wgmma_group();
GroupedOperations& bulk_group();

/// For primitives, the proxies of dynamic shared memory: threads wrote it; the running thread
/// fences what it wrote or has seen written; wgmma or TMA reads or overwrites it, which fails if
/// neither the writer nor the running thread has fenced since it was written.
void generic_write(const void* address, size_t bytes);
void fence_async_proxy();
void check_fenced(const void* address, size_t bytes, const char* what);
void async_write(const void* address, size_t bytes);

/// For primitives, the mbarriers that the running thread has initialised since its last fence.
std::vector<void*>& unfenced_barriers();

/// For primitives that all threads of a warpgroup execute in the same order with the same operands:
/// fails if another thread of it gave other ones, or, when the block ends, if one executed fewer.
struct Operand {
  const char* name;
  uint64_t value;
};
void warpgroup_operation(const char* what, std::initializer_list<Operand> operands);
/// setmaxnreg: the running warp gives registers to its block's pool, or waits for some from there.
void set_registers(const char* what, int count, bool increase, std::source_location where);

/// For primitives: the blocks of the running thread's cluster. Whole warps arrive and wait.
int cluster_rank();
int cluster_blocks();
void cluster_arrive(std::source_location where);
void cluster_wait(std::source_location where);
/// The same place in the shared memory of block `rank`.
void* in_peer(const void* address, int rank);

/// Runs `kernel(arguments...)` once for every thread of `shape`; every thread gets its own copies.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(static_cast<Parameters>(arguments)...);
  detail::submit(shape, [=] { std::apply(kernel, copies); });
}

/// Runs what `launches` launches as a stream does, after it has returned: one kernel after the
/// other, but one that `overlaps` begins once every block of the one before has called
/// let_next_start() or ended, and goes as far as it can without it. So it meets what the one before
/// has not written yet, and may overwrite what that one has not read. Elsewhere a launch has run
/// when it returns.
void overlapped(const std::function<void()>& launches);
/// What has been launched so far has run: before the host itself goes to its memory.
void synchronize();

/// For primitives: waits until the launch before has ended. In a launch that `overlaps` a thread of
/// each block has to, and before any let_next_start(): so what is older than the launch before has
/// always ended.
void wait_for_previous(std::source_location where);
/// For primitives: as far as this block is concerned the next launch may begin.
void let_next_start();

}  // namespace simt

#include "cuda_builtins.h"
