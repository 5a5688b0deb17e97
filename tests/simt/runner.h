// SPDX-License-Identifier: MIT
//
// The inside of the host runner: what simt.cpp (scheduling), barriers.cpp (rendezvous) and
// report.cpp (error texts) share.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt::detail {

struct Block;

inline constexpr size_t kMostShared = 227 * 1024;  // bytes of a block, on a Hopper GPU

/// What a suspended thread waits for.
struct Wait {
  enum Kind { kNothing, kBlockBarrier, kWarp, kSpin } kind = kNothing;
  const char* name = "";
  int barrier_id = 0;
  uint32_t mask = 0;
  std::string (*describe)(const void*) = nullptr;
  const void* context = nullptr;
  std::source_location where;
};

struct Thread {
  explicit Thread(size_t stack_bytes);
  ~Thread();
  Builtins builtins;
  Block* block = nullptr;
  Wait wait;
  uint64_t result = 0;    // of the warp operation or barrier waited for
  uint64_t priority = 0;  // higher runs first
  bool started = false;
  bool exited = false;
  int lane() const { return builtins.linear_thread % 32; }
  int warp() const { return builtins.linear_thread / 32; }
  Fiber fiber;
  GroupedOperations wgmma{"wgmma"}, bulk{"TMA store"};
  uint64_t fenced_at = 0;        // the last fence_async_proxy, by Runner::tick
  int64_t cluster_arrival = -1;  // the generation of the cluster barrier that it waits for, or -1
  size_t warpgroup_operations = 0;
  std::vector<void*> unfenced_barriers;
  void* sanitizer_thread = nullptr;  // ThreadSanitizer's name for what the kernel does here
};

/// One warp operation under way: lanes that have arrived wait for the rest of the mask.
struct Rendezvous {
  const void* meeting;  // what memory is ordered by, if the operation orders memory
  Resolve resolve;
  uint32_t arrived;
  WarpSlots slots;
};

struct Warp {
  int registers = 0;     // of a thread
  uint32_t present = 0;  // lanes that exist
  uint32_t exited = 0;
  std::vector<Rendezvous> pending;
  unsigned char meetings[128];  // addresses for ThreadSanitizer, one after the other
  unsigned next_meeting = 0;
};

struct Barrier {
  int expected = 0;
  int satisfied_predicates = 0;
  std::vector<Thread*> arrived;
  // Addresses for ThreadSanitizer: a fast thread may be at the next barrier before a slow one has
  // left this one, and must not be ordered before it.
  unsigned char meetings[2];
  unsigned generation = 0;
};

/// Memory of exactly the bytes asked for, filled with 0xff (NaN, -1), with a canary on both sides.
class SharedMemory {
 public:
  SharedMemory(size_t bytes, size_t alignment);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  size_t alignment() const { return alignment_; }
  /// What was overwritten around the memory, or an empty text.
  std::string damage() const;

 private:
  size_t bytes_, alignment_, prefix_;
  char* allocation_;
  char* data_;
};

/// Blocks that are live together and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;  // by rank; null once it has ended
  int arrived = 0;             // live threads that have arrived at the barrier
  int64_t generation = 0;
  unsigned char meetings[2];
};

/// A launch, and how far it is.
struct Grid {
  LaunchShape shape;
  std::function<void()> body;
  Grid* before = nullptr;         // of the same overlapped()
  std::vector<uint64_t> waiting;  // first blocks of clusters to be started, last first
  size_t live = 0;                // blocks
  uint64_t holding;               // blocks that keep the next launch from overlapping
  unsigned char launched, ended;  // addresses for ThreadSanitizer

  bool has_ended() const { return waiting.empty() && live == 0; }
  bool overlaps() const { return shape.overlaps && before != nullptr && !before->has_ended(); }
  bool may_begin() const {
    return before == nullptr || before->has_ended() || (shape.overlaps && before->holding == 0);
  }
};

/// The last write of threads to 16 bytes of shared memory; `at` 0 if there is none.
struct GenericWrite {
  const Thread* writer;
  uint64_t at;
};

/// What the first thread of a warpgroup to come so far has executed.
struct WarpgroupOperation {
  const char* what;
  int thread;
  std::vector<Operand> operands;
};

struct Block {
  static constexpr int kBarriers = 16;
  uint3 index{};
  Grid* grid = nullptr;
  bool has_waited = false, lets_next_start = false;  // for the launch before; the next one
  std::shared_ptr<Cluster> cluster;
  int rank = 0;
  std::vector<GenericWrite> generic_writes;  // of the dynamic memory; empty if there were none
  std::vector<Thread*> threads;
  int running = 0;  // threads that have not exited
  std::vector<Warp> warps;
  std::vector<std::vector<WarpgroupOperation>> warpgroups;
  int last_warpgroup = -1;  // that multiplied
  int free_registers = 0;   // of the pool of setmaxnreg
  Barrier barriers[kBarriers];
  std::unique_ptr<SharedMemory> dynamic;
  std::vector<std::pair<const void*, std::unique_ptr<SharedMemory>>> statics;
};

/// An action of complete_later.
struct Flight {
  std::function<void()> action;
  Thread* issuer;
  const Block* target;
};

/// When what goes on by itself happens.
enum Lateness { kAnyTime, kAtOnce, kAsLateAsPossible };

class Runner {
 public:
  static Runner& instance();
  void submit(const LaunchShape& shape, std::function<void()> body);
  void queue(bool wanted) { queues_ = wanted; }
  void run_submitted();
  void discard() { grids_.clear(); }

  Thread& self(const char* what);
  Block& block() { return *current_->block; }
  bool running() const { return current_ != nullptr; }
  void make_ready(Thread* thread);
  /// Suspends the running thread until another makes it ready. Throws when the launch is given up.
  void park(const Wait& wait);
  void yield();
  bool one_in(unsigned n) { return random_() % n == 0; }
  void wake_spinners();
  void let_next_start(Block& block);
  Lateness lateness() const { return static_cast<Lateness>(settings.seed / 4 % 3); }
  /// Whether what may happen later happens now.
  bool at_once() { return lateness() == kAtOnce || (lateness() == kAnyTime && one_in(2)); }
  void take_off(Flight flight) { in_flight_.push_back(std::move(flight)); }
  uint64_t tick() { return ++ticks_; }

  Settings settings;
  Statistics statistics;
  std::vector<const void*> streams;

 private:
  friend struct Thread;
  void progress() { ++progress_; }
  void start_blocks();
  void start_block(Grid& grid, uint64_t index, const std::shared_ptr<Cluster>& cluster);
  void land(size_t flight);
  void land_all_of(const Block& block);
  void finish_block(Block& block);
  Thread* next_ready();
  void resume_next();
  void thread_exits(Thread& thread);
  void check_exit(Thread& thread);
  void give_up();
  void switch_to(Thread* next);
  [[noreturn]] static void thread_main(void* thread);

  std::vector<std::unique_ptr<Grid>> grids_;  // in the order of the stream
  bool queues_ = false;
  std::vector<std::unique_ptr<Thread>> threads_;  // all that were ever made, on this OS thread
  std::vector<Thread*> free_;
  std::vector<std::unique_ptr<Block>> live_;
  std::vector<Flight> in_flight_;
  uint64_t ticks_ = 0;
  std::vector<Thread*> ready_;  // a heap by priority, or unordered if the order is random
  std::vector<Thread*> spinning_;
  uint64_t serial_ = 0;
  uint64_t progress_ = 0, progress_at_wake_ = 0;
  int fruitless_wakes_ = 0;
  std::mt19937_64 random_;
  std::vector<uint64_t> warp_priority_;
  Thread* current_ = nullptr;
  std::unique_ptr<Fiber> main_;
  std::exception_ptr error_;
  bool giving_up_ = false;
};

/// ThreadSanitizer keeps books by thread. The runner's own work goes to the launching thread, with
/// memory accesses ignored; a kernel's goes to `Thread::sanitizer_thread`. Null in other builds.
void* make_sanitizer_thread();
void destroy_sanitizer_thread(void* thread);
void* switch_sanitizer_thread(void* to);  // the one before; null means the launching thread
void ignore_accesses(bool ignore);        // of the launching thread
void release_as(const Thread& thread, const void* object);
void acquire_as(const Thread& thread, const void* object);

/// Registers that a thread of a block starts with where nothing but the block's size limits them.
int registers_at_launch(int threads);
/// A live thread of the cluster has arrived at its barrier or exited: whether all are there now.
void advance_cluster(Cluster& cluster);
/// Fails if a thread of the block has executed less than its warpgroup.
void check_warpgroups(const Block& block);
/// The block's memory that holds the address, or null.
const SharedMemory* memory_of(const Block& block, const void* address);
/// The block's static array that belongs to `site`, made when it is first asked for.
void* static_of(Block& block, const void* site, size_t bytes, size_t alignment);

/// Who runs, for error texts: "block (1,0,0) thread 37".
std::string name_of(const Thread& thread);
std::string deadlock_report(const std::vector<std::unique_ptr<Block>>& live,
                            size_t blocks_not_started);
/// "lanes 0-3, 7" of a mask.
std::string lanes_text(uint32_t mask);
std::string text_of(std::source_location where);

}  // namespace simt::detail
