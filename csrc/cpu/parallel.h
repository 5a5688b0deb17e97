// SPDX-License-Identifier: MIT
// Threads of the CPU engines. Work is cut into one run of consecutive items a thread; engines keep
// their results independent of the cut.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace kimi::cpu {

// Threads that ops called from this thread use: kimi_set_num_threads, else OpenMP's own number.
int num_threads();
void set_num_threads(int n);

namespace detail {

bool is_forked();  // whether the calling thread is the one that goes on after a fork
void on_new_thread(void (*body)(const void*), const void* of);  // until it has ended

// Whether the caller is on one of on_threads' threads, which calls body(rank, count) once on each of
// `threads` or fewer.
#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not know the barriers of an OpenMP that was not built for it: threads that it
// sees begin and end take its place.
inline thread_local bool t_inside = false;
inline bool inside_parallel() { return t_inside; }

template <class Body>
void on_threads(int threads, const Body& body) {
  std::vector<std::thread> all;
  for (int rank = 0; rank < threads; ++rank)
    all.emplace_back([&, rank] {
      t_inside = true;
      body(rank, threads);
    });
  for (std::thread& thread : all) thread.join();
}

#else

inline bool inside_parallel() { return omp_in_parallel(); }

template <class Body>
void on_threads(int threads, const Body& body) {
  const auto run = [&] {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
  };
  // A thread that was forked has the list of its OpenMP threads but not the threads, and would wait
  // for them for ever. A new one begins without any.
  if (!is_forked()) return run();
  on_new_thread([](const void* of) { (*static_cast<const decltype(run)*>(of))(); }, &run);
}

#endif

}  // namespace detail

// Calls body(begin, end) on runs that cover [0, n), none shorter than `grain` items if avoidable.
// `body` must not throw.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const int64_t threads = std::min<int64_t>(num_threads(), n / std::max<int64_t>(grain, 1));
  if (threads <= 1 || detail::inside_parallel()) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  detail::on_threads(int(threads), [&](int64_t rank, int64_t count) {
    const int64_t begin = n * rank / count, end = n * (rank + 1) / count;
    if (begin < end) body(begin, end);
  });
}

// Calls body(task, thread) for every task in [0, n): whichever thread is free takes the next one,
// in ascending order. thread < num_threads() tells apart what runs at the same time.
template <class Body>
void parallel_tasks(int64_t n, int most_threads, const Body& body) {
  const int64_t threads = std::min<int64_t>(most_threads, n);
  if (threads <= 1 || detail::inside_parallel()) {
    for (int64_t task = 0; task < n; ++task) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  detail::on_threads(int(threads), [&](int thread, int) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;)
      body(task, thread);
  });
}

template <class Body>
void parallel_tasks(int64_t n, const Body& body) {
  parallel_tasks(n, num_threads(), body);
}

}  // namespace kimi::cpu
