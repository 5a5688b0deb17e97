// SPDX-License-Identifier: MIT
//
// Scheduling: which blocks are live, which fiber runs next, when the launch is stuck.
#include "simt.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <utility>

#include "runner.h"

namespace simt {
namespace detail {

thread_local constinit const Builtins* t_builtins = nullptr;

namespace {

enum Order { kAscending, kDescending, kWarpByWarp, kUniform };
Order order_of(uint64_t seed) { return static_cast<Order>(seed % 4); }

struct Cancelled {};  // unwinds the fibers of a launch that is given up

bool less_urgent(const Thread* a, const Thread* b) { return a->priority < b->priority; }

}  // namespace

Runner& Runner::instance() {
  thread_local Runner runner;
  static const char* seed = std::getenv("KIMI_SIMT_SEED");
  thread_local bool read = false;
  static const char* patience = std::getenv("KIMI_SIMT_PATIENCE");
  if (!read && seed != nullptr) runner.settings.seed = std::strtoull(seed, nullptr, 0);
  if (!read && patience != nullptr) runner.settings.patience = std::atoi(patience);
  read = true;
  return runner;
}

Thread::Thread(size_t stack_bytes)
    : fiber(&Runner::thread_main, nullptr, stack_bytes),
      sanitizer_thread(make_sanitizer_thread()) {}
Thread::~Thread() { destroy_sanitizer_thread(sanitizer_thread); }

Thread& Runner::self(const char* what) {
  if (current_ == nullptr) fail_outside_kernel(what);
  return *current_;
}

void Runner::submit(const LaunchShape& shape, std::function<void()> body) {
  if (current_ != nullptr) fail("launch: a kernel cannot launch a kernel here");
  const uint64_t threads = uint64_t{shape.block.x} * shape.block.y * shape.block.z;
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (threads < 1 || threads > 1024 || shape.block.z > 64)
    throw Error("launch: block: expected 1 to 1024 threads, got " + std::to_string(threads));
  if (blocks < 1 || shape.grid.x > 0x7fffffffu || shape.grid.y > 65535 || shape.grid.z > 65535)
    throw Error("launch: grid: expected 1 to 2^31-1, 65535, 65535 blocks, got " +
                std::to_string(shape.grid.x) + ", " + std::to_string(shape.grid.y) + ", " +
                std::to_string(shape.grid.z));
  if (shape.cluster < 1 || shape.cluster > 8 || shape.grid.x % shape.cluster != 0)
    throw Error("launch: cluster: expected 1 to 8 blocks that divide the grid's x of " +
                std::to_string(shape.grid.x) + ", got " + std::to_string(shape.cluster));
  if (shape.dynamic_shared_bytes > kMostShared)
    throw Error("launch: dynamic shared memory: expected at most " + std::to_string(kMostShared) +
                " bytes, got " + std::to_string(shape.dynamic_shared_bytes));
  queued_on(shape.stream);
  auto grid = std::make_unique<Grid>();
  grid->shape = shape;
  grid->body = std::move(body);
  grid->holding = blocks;
  if (!grids_.empty()) grid->before = grids_.back().get();
  release(&grid->launched);
  grids_.push_back(std::move(grid));
  if (!queues_) run_submitted();
}

void Runner::run_submitted() {
  if (grids_.empty()) return;
  random_.seed(settings.seed);
  statistics = {.launches = statistics.launches + grids_.size()};
  progress_ = progress_at_wake_ = 0;
  fruitless_wakes_ = 0;
  giving_up_ = false;
  error_ = nullptr;
  if (!main_) main_ = std::make_unique<Fiber>();

  for (const auto& grid : grids_) {
    for (uint64_t first = grid->holding; first > 0;)
      grid->waiting.push_back(first -= grid->shape.cluster);
    if (order_of(settings.seed) == kDescending)
      std::reverse(grid->waiting.begin(), grid->waiting.end());
    if (order_of(settings.seed) >= kWarpByWarp)
      std::shuffle(grid->waiting.begin(), grid->waiting.end(), random_);
  }
  ignore_accesses(true);
  start_blocks();
  switch_to(next_ready());  // comes back when nothing is left to run
  if (error_) give_up();
  ignore_accesses(false);
  for (const auto& grid : grids_) acquire(&grid->ended);
  grids_.clear();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Runner::start_blocks() {
  const size_t resident = static_cast<size_t>(std::max(1, settings.resident_blocks));
  for (const auto& grid : grids_) {
    const uint64_t together = grid->shape.cluster;
    while (grid->may_begin() && !grid->waiting.empty() &&
           (grid->shape.cooperative || grid->live + together <= resident * together)) {
      const uint64_t first = grid->waiting.back();
      grid->waiting.pop_back();
      const auto cluster = std::make_shared<Cluster>();
      for (uint64_t rank = 0; rank < together; ++rank) start_block(*grid, first + rank, cluster);
    }
  }
}

void Runner::start_block(Grid& of, uint64_t index, const std::shared_ptr<Cluster>& cluster) {
  const dim3 shape = of.shape.block, grid = of.shape.grid;
  const int n = static_cast<int>(shape.x * shape.y * shape.z);
  auto block = std::make_unique<Block>();
  block->index = {static_cast<unsigned>(index % grid.x),
                  static_cast<unsigned>(index / grid.x % grid.y),
                  static_cast<unsigned>(index / grid.x / grid.y)};
  block->grid = &of;
  ++of.live;
  block->cluster = cluster;
  block->rank = static_cast<int>(cluster->blocks.size());
  cluster->blocks.push_back(block.get());
  block->dynamic = std::make_unique<SharedMemory>(of.shape.dynamic_shared_bytes, 1024);
  block->running = n;
  block->warps.resize(static_cast<size_t>(n + 31) / 32);
  block->warpgroups.resize(static_cast<size_t>(n + 127) / 128);
  for (Warp& warp : block->warps) warp.registers = registers_at_launch(n);
  block->threads.reserve(static_cast<size_t>(n));
  warp_priority_.resize(block->warps.size());
  for (uint64_t& priority : warp_priority_) priority = random_() >> 1;
  for (int i = 0; i < n; ++i) {
    if (free_.empty()) {
      threads_.push_back(std::make_unique<Thread>(settings.stack_bytes));
      free_.push_back(threads_.back().get());
    }
    Thread* thread = free_.back();
    free_.pop_back();
    const unsigned u = static_cast<unsigned>(i);
    thread->builtins = {{u % shape.x, u / shape.x % shape.y, u / shape.x / shape.y},
                        block->index,
                        shape,
                        grid,
                        i,
                        ++serial_};
    thread->block = block.get();
    thread->wait = {};
    thread->fenced_at = 0;
    thread->cluster_arrival = -1;
    thread->warpgroup_operations = 0;
    thread->unfenced_barriers.clear();
    thread->exited = thread->started = false;
    switch (order_of(settings.seed)) {
      case kAscending:
        thread->priority = static_cast<uint64_t>(1024 - i);
        break;
      case kDescending:
        thread->priority = u;
        break;
      default:
        thread->priority = (warp_priority_[u / 32] & ~uint64_t{31}) | (random_() & 31);
    }
    if (of.overlaps()) thread->priority |= uint64_t{1} << 63;  // ahead of the launch before
    block->warps[u / 32].present |= 1u << i % 32;
    block->threads.push_back(thread);
    make_ready(thread);
  }
  live_.push_back(std::move(block));
}

void Runner::finish_block(Block& block) {
  land_all_of(block);
  check_warpgroups(block);
  std::string damage = block.dynamic->damage();
  if (!damage.empty())
    damage =
        "dynamic shared memory of " + std::to_string(block.dynamic->bytes()) + " bytes: " + damage;
  for (const auto& [site, memory] : block.statics)
    if (damage.empty() && !memory->damage().empty())
      damage = "static shared memory of " + std::to_string(memory->bytes()) +
               " bytes: " + memory->damage();
  const std::string name = name_of(*block.threads[0]);
  Grid& grid = *block.grid;
  if (damage.empty() && grid.shape.overlaps && !block.has_waited)
    damage = "launched to overlap the kernel before it, but ended without waiting for that";
  block.cluster->blocks[static_cast<size_t>(block.rank)] = nullptr;
  free_.insert(free_.end(), block.threads.begin(), block.threads.end());
  if (!block.lets_next_start) --grid.holding;
  --grid.live;
  std::erase_if(live_, [&](const auto& b) { return b.get() == &block; });
  if (grid.has_ended()) wake_spinners();
  if (!damage.empty()) throw Error(name.substr(0, name.find(" thread")) + ": " + damage);
  start_blocks();
}

void Runner::make_ready(Thread* thread) {
  thread->wait.kind = Wait::kNothing;
  ready_.push_back(thread);
  if (order_of(settings.seed) != kUniform)
    std::push_heap(ready_.begin(), ready_.end(), less_urgent);
}

Thread* Runner::next_ready() {
  while (!in_flight_.empty() && !error_ &&
         (ready_.empty() || (lateness() == kAnyTime && one_in(16))))
    land(random_() % in_flight_.size());
  if (ready_.empty() && !spinning_.empty()) {
    fruitless_wakes_ = progress_ == progress_at_wake_ ? fruitless_wakes_ + 1 : 0;
    progress_at_wake_ = progress_;
    if (fruitless_wakes_ > 64) std::this_thread::sleep_for(std::chrono::microseconds(50));
    if (fruitless_wakes_ < settings.patience)
      for (Thread* thread : std::exchange(spinning_, {})) make_ready(thread);
  }
  if (ready_.empty()) return nullptr;
  if (order_of(settings.seed) == kUniform)
    std::swap(ready_[random_() % ready_.size()], ready_.back());
  else
    std::pop_heap(ready_.begin(), ready_.end(), less_urgent);
  Thread* thread = ready_.back();
  ready_.pop_back();
  return thread;
}

void Runner::wake_spinners() {
  progress();
  for (Thread* thread : spinning_) make_ready(thread);
  spinning_.clear();
}

// From whatever runs now to `next`, or to the launching thread if that is null.
void Runner::switch_to(Thread* next) {
  ++statistics.switches;
  Fiber& from = current_ == nullptr ? *main_ : current_->fiber;
  Thread* const self = current_;
  current_ = next;
  t_builtins = next == nullptr ? nullptr : &next->builtins;
  if (next != self) Fiber::switch_to(from, next == nullptr ? *main_ : next->fiber);
}

void Runner::resume_next() {
  Thread* next = error_ ? nullptr : next_ready();
  if (error_) next = nullptr;
  size_t blocks_to_come = 0;
  for (const auto& grid : grids_) blocks_to_come += grid->waiting.size() * grid->shape.cluster;
  if (next == nullptr && !live_.empty() && !error_)
    error_ = std::make_exception_ptr(Error(deadlock_report(live_, blocks_to_come)));
  switch_to(next);
}

void Runner::park(const Wait& wait) {
  Thread* const self = current_;
  self->wait = wait;
  if (wait.kind == Wait::kSpin)
    spinning_.push_back(self);
  else
    progress();
  resume_next();
  self->wait.kind = Wait::kNothing;
  if (giving_up_) throw Cancelled{};
}

void Runner::yield() {
  make_ready(current_);
  resume_next();
  if (giving_up_) throw Cancelled{};
}

void Runner::let_next_start(Block& block) {
  if (block.grid->shape.overlaps && !block.has_waited)
    fail("let_next_start: expected wait_for_previous first, or the next launch meets older ones");
  if (std::exchange(block.lets_next_start, true)) return;
  if (--block.grid->holding == 0) start_blocks();
}

void Runner::check_exit(Thread& thread) {
  const Block& block = *thread.block;
  const Barrier& barrier = block.barriers[0];
  if (!barrier.arrived.empty()) {
    const Thread& waiting = *barrier.arrived[0];
    throw Error("divergent barrier: " + name_of(thread) + " has exited, but " +
                std::to_string(barrier.arrived.size()) + " threads, among them thread " +
                std::to_string(waiting.builtins.linear_thread) + ", wait at " + waiting.wait.name +
                " " + text_of(waiting.wait.where));
  }
  for (const Rendezvous& pending : block.warps[static_cast<size_t>(thread.warp())].pending)
    if (pending.slots.mask >> thread.lane() & 1) {
      const int first = thread.warp() * 32 + std::countr_zero(pending.arrived);
      const Wait& wait = block.threads[static_cast<size_t>(first)]->wait;
      throw Error(name_of(thread) + " (lane " + std::to_string(thread.lane()) +
                  ") has exited, but " + wait.name + " " + text_of(wait.where) +
                  " waits for it: the mask names an exited lane");
    }
}

void Runner::thread_exits(Thread& thread) {
  thread.exited = true;
  thread.block->warps[static_cast<size_t>(thread.warp())].exited |= 1u << thread.lane();
  progress();
  if (!giving_up_) check_exit(thread);
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrival == cluster.generation) --cluster.arrived;
  --thread.block->running;
  if (giving_up_) return;
  advance_cluster(cluster);
  if (thread.block->running == 0) finish_block(*thread.block);
}

// A pooled fiber: runs one CUDA thread after another, each time it is taken from the free list.
void Runner::thread_main(void*) {
  Runner& runner = instance();
  for (;;) {
    Thread& self = *runner.current_;
    self.started = true;
    switch_sanitizer_thread(self.sanitizer_thread);
    try {
      Grid& grid = *self.block->grid;
      acquire(&grid.launched);
      const Grid* older = grid.before;
      if (older != nullptr && grid.shape.overlaps) older = older->before;
      if (older != nullptr) acquire(&older->ended);
      grid.body();
      self.wgmma.finish();
      self.bulk.finish();
      if (self.cluster_arrival >= 0) fail("cluster_arrive: not waited for when the thread ended");
    } catch (const Cancelled&) {
    } catch (...) {
      if (!runner.error_) runner.error_ = std::current_exception();
    }
    self.wgmma.clear();  // here, since it is this thread's memory to ThreadSanitizer
    self.bulk.clear();
    release(&self.block->grid->ended);
    switch_sanitizer_thread(nullptr);
    try {
      runner.thread_exits(self);
    } catch (...) {
      if (!runner.error_) runner.error_ = std::current_exception();
    }
    if (runner.giving_up_)
      runner.switch_to(nullptr);
    else
      runner.resume_next();
  }
}

// Unwinds every fiber that is in the middle of the kernel, so that the next launch finds them
// fresh.
void Runner::give_up() {
  giving_up_ = true;
  ready_.clear();
  spinning_.clear();
  for (const auto& grid : grids_) grid->waiting.clear();
  in_flight_.clear();
  for (const auto& block : live_)
    for (Thread* thread : block->threads) {
      if (thread->started && !thread->exited) switch_to(thread);
      free_.push_back(thread);
    }
  live_.clear();
}

void submit(const LaunchShape& shape, std::function<void()> body) {
  Runner::instance().submit(shape, std::move(body));
}

void park_spinning(std::string (*describe)(const void*), const void* context,
                   std::source_location where) {
  const InsideModel inside;
  Runner& runner = Runner::instance();
  runner.self("a spin");
  Wait wait;
  wait.kind = Wait::kSpin;
  wait.name = "spin";
  wait.describe = describe;
  wait.context = context;
  wait.where = where;
  runner.park(wait);
}

}  // namespace detail

Settings& settings() { return detail::Runner::instance().settings; }
void count(uint64_t Statistics::* what, uint64_t by) {
  detail::Runner::instance().statistics.*what += by;
}
Statistics last_statistics() { return detail::Runner::instance().statistics; }
uint64_t launches() { return detail::Runner::instance().statistics.launches; }

void queued_on(const void* stream) {
  std::vector<const void*>& all = detail::Runner::instance().streams;
  if (std::find(all.begin(), all.end(), stream) == all.end()) all.push_back(stream);
}
std::vector<const void*> take_streams() {
  return std::exchange(detail::Runner::instance().streams, {});
}

void overlapped(const std::function<void()>& launches) {
  detail::Runner& runner = detail::Runner::instance();
  runner.queue(true);
  try {
    launches();
  } catch (...) {
    runner.queue(false);
    runner.discard();
    throw;
  }
  runner.queue(false);
  runner.run_submitted();
}
void synchronize() { detail::Runner::instance().run_submitted(); }

void wait_for_previous(std::source_location where) {
  detail::Block& block = *detail::Runner::instance().self("wait_for_previous").block;
  const detail::Grid* const before = block.grid->before;
  if (before != nullptr) {
    spin_until([=] { return before->has_ended(); }, [] { return std::string("the launch before"); },
               where);
    acquire(&before->ended);
  }
  block.has_waited = true;
}

void let_next_start() {
  const InsideModel inside;
  detail::Runner& runner = detail::Runner::instance();
  runner.let_next_start(*runner.self("let_next_start").block);
}

void notify_spinners() {
  const InsideModel inside;
  detail::Runner& runner = detail::Runner::instance();
  if (runner.running()) runner.wake_spinners();
}

void preemption_point() {
  const InsideModel inside;
  detail::Runner& runner = detail::Runner::instance();
  if (runner.running() && runner.one_in(4)) runner.yield();
}

}  // namespace simt
