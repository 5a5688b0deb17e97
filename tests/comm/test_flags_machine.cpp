// SPDX-License-Identifier: MIT
//
// csrc/comm/flags.h on the machine: ranks as threads, whose races ThreadSanitizer finds, and as
// processes that have mapped the same memory each at a place of its own, some of which are killed.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "comm/flags.h"

namespace {

using kimi::comm::Absent;
using kimi::comm::Flags;
using kimi::comm::Machine;
using kimi::comm::RankFlags;
using kimi::comm::RankSet;

constexpr int64_t kMillisecond = 1'000'000;
constexpr RankSet all(int ranks) { return (RankSet{1} << ranks) - 1; }
RankSet none_ended(RankSet) { return 0; }
int64_t in_ms(int64_t ms) { return Machine::now() + ms * kMillisecond; }

// A machine on which a lost wake-up shows: who waits sleeps at once, and till the end of time.
struct Sleepy : Machine {
  static constexpr int kSpins = 0, kYields = 0;
  static constexpr int64_t kSlice = 3'600'000 * kMillisecond;
};

constexpr int kWords = 64, kMostBuffers = 3;

template <class Atomics>
struct Shared {
  RankFlags<Atomics> flags[8];
  uint64_t half[8][kMostBuffers][kWords];  // plain memory
};

struct Plan {
  int ranks, messages, buffers;
  bool ahead = false;           // message n + 1 is published before message n is read
  RankSet among = ~RankSet{0};  // the ranks that take part
};

uint64_t content(uint64_t n, int rank, size_t word) {
  return (n * 1000 + uint64_t(rank) * 100 + word) * 0x9e3779b97f4a7c15;
}
size_t length(uint64_t n, int rank) { return content(n, rank, 0) >> 40 & (kWords - 1); }

// Sends and checks all messages; gives how many of them came, all whole.
template <class Atomics>
int take_part(Shared<Atomics>& shared, const Plan& plan, int rank) {
  std::minstd_rand random(unsigned(rank) + 1);
  const auto dawdle = [&] {
    const unsigned kind = unsigned(random()) % 64;
    if (kind == 0) usleep(useconds_t(random() % 200));
    if (kind < 8) Machine::yield();
    for (unsigned i = unsigned(random()) % 64; kind < 32 && i > 0; --i) Machine::pause();
  };
  Flags<Atomics> flags(shared.flags, rank, plan.buffers);
  const RankSet ranks = plan.among & all(plan.ranks);
  const int64_t deadline = in_ms(60'000);
  const auto at = [&](uint64_t n) { return n % uint64_t(plan.buffers); };
  for (int step = 1; step <= plan.messages + plan.ahead; ++step) {
    const auto n = uint64_t(step);
    if (step <= plan.messages) {
      if (!flags.enter(ranks, n, deadline, none_ended).none()) return step - 1;
      dawdle();
      for (size_t i = 0; i < length(n, rank); ++i)
        shared.half[rank][at(n)][i] = content(n, rank, i);
      flags.publish(n);
    }
    if (step <= plan.ahead) continue;
    const uint64_t read = n - plan.ahead;
    dawdle();
    if (!flags.arrive(ranks, read, deadline, none_ended).none()) return int(read) - 1;
    for (int r = 0; r < plan.ranks; ++r)
      for (size_t i = 0; ranks >> r & 1 && i < length(read, r); ++i)
        if (shared.half[r][at(read)][i] != content(read, r, i)) return -1;
    flags.consume(read);
  }
  return plan.messages;
}

template <class Atomics>
void on_threads(const Plan& plan) {
  const auto shared = std::make_unique<Shared<Atomics>>();
  std::vector<int> came(size_t(plan.ranks), plan.messages);
  std::vector<std::thread> threads;
  for (int r = 0; r < plan.ranks; ++r)
    if (plan.among >> r & 1)
      threads.emplace_back([&, r] { came[size_t(r)] = take_part(*shared, plan, r); });
  for (std::thread& thread : threads) thread.join();
  for (const int n : came) CHECK(n == plan.messages);
}

// Memory without a name, mapped anew by whoever asks.
class Segment {
 public:
  Segment() : file_(memfd_create("kimi_ops test", MFD_CLOEXEC)) {
    if (file_ < 0 || ftruncate(file_, sizeof(Shared<Sleepy>)) != 0) std::abort();
  }
  ~Segment() { close(file_); }
  Segment(const Segment&) = delete;

  template <class Atomics>
  Shared<Atomics>& map() const {
    void* memory =
        mmap(nullptr, sizeof(Shared<Atomics>), PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (memory == MAP_FAILED) std::abort();
    return *static_cast<Shared<Atomics>*>(memory);
  }

 private:
  int file_;
};

template <class Work>
pid_t in_a_process(const Work& work) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) _exit(work());
  return child;
}
int status_of(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// Processes first: their parent has no other threads yet.
TEST(processes_share_the_flags) {
  const Segment segment;
  const auto& here = segment.map<Sleepy>();
  const Plan plan{4, 2000, 2};
  std::vector<pid_t> children;
  for (int r = 0; r < plan.ranks; ++r)
    children.push_back(in_a_process([&] {
      auto& mine = segment.map<Sleepy>();
      return &mine != &here && take_part(mine, plan, r) == plan.messages ? 0 : 1;
    }));
  for (const pid_t child : children) CHECK(status_of(child) == 0);
}

TEST(a_killed_process_is_named_and_the_others_go_on) {
  const Segment segment;
  auto& shared = segment.map<Machine>();
  // Rank 1 publishes message 1, waits for message 2 of rank 0, and is killed asleep.
  const pid_t killed = in_a_process([&] {
    Flags<Machine> flags(segment.map<Machine>().flags, 1, 2);
    flags.publish(1);
    flags.arrive(1, 2, in_ms(60'000), none_ended);
    return 0;
  });
  Flags<Machine> flags(shared.flags, 0, 2);
  flags.publish(1);
  while ((shared.flags[0].published.word.load(std::memory_order_relaxed) & 1) == 0)
    usleep(100);  // until it has noted itself
  kill(killed, SIGKILL);
  CHECK(status_of(killed) == -SIGKILL);
  const auto ended = [](RankSet) { return RankSet{2}; };
  const int64_t began = Machine::now();
  CHECK(flags.arrive(3, 1, in_ms(60'000), ended).none());  // what came before its end counts
  const Absent absent = flags.arrive(3, 2, in_ms(60'000), ended);
  CHECK(absent.ended == 2 && absent.silent == 1);
  CHECK(Machine::now() - began < 10'000 * kMillisecond);
  flags.publish(2);  // its note is still there
  CHECK(shared.flags[0].published.word.load(std::memory_order_relaxed) == 4);
  CHECK(flags.arrive(1, 2, in_ms(0), ended).none());
}

TEST(silent_ranks_are_named_when_the_time_is_over) {
  const auto shared = std::make_unique<Shared<Machine>>();
  Flags<Machine> flags(shared->flags, 0, 2);
  flags.publish(1);
  for (const int64_t ms : {-5, 0, 1, 30}) {
    const int64_t began = Machine::now();
    const Absent absent = flags.arrive(0b1101, 1, in_ms(ms), none_ended);
    CHECK(absent.silent == 0b1100 && absent.ended == 0);
    CHECK(Machine::now() - began >= ms * kMillisecond);
  }
  CHECK(flags.enter(all(8), 2, in_ms(0), none_ended).none());
  CHECK(flags.enter(all(8), 3, in_ms(1), none_ended).silent == all(8));
  CHECK(flags.arrive(0, 1, in_ms(0), none_ended).none());
}

TEST(who_comes_while_others_sleep_wakes_them) {
  on_threads<Sleepy>({2, 3000, 2});
  on_threads<Sleepy>({4, 1000, 1});
  on_threads<Sleepy>({4, 1000, 3, true});
}

TEST(messages_come_whole) {
  on_threads<Machine>({2, 2000, 1});
  on_threads<Machine>({4, 1000, 2});
  on_threads<Machine>({4, 1000, 2, true});
  on_threads<Machine>({8, 300, 3, true});
}

TEST(ranks_that_are_left_out_are_not_waited_for) {
  on_threads<Machine>({5, 500, 2, false, 0b10110});
  on_threads<Sleepy>({5, 500, 2, true, 0b01011});
}

}  // namespace

TEST_MAIN()
