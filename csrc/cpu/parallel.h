// The only threading interface: OpenMP normally, std::thread in ThreadSanitizer builds, where
// libgomp makes correct code look racy.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <exception>
#ifdef VIDTOK_USE_STD_THREAD
#include <system_error>
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace vidtok {

// A forked child must not enter libgomp's pool, whose threads did not survive the fork. torch uses the
// same libgomp and may have started the pool before any kernel here ran, so being loaded counts.
inline const pid_t kLoadedBy = getpid();
inline bool forked() { return getpid() != kLoadedBy; }

// Runs body(thread, threads) once on each of `threads` threads; one thread never enters OpenMP.
// An exception may not leave a thread, so the first one is thrown again after all have ended.
template <class Body>
void parallel(int threads, Body&& body) {
  if (threads <= 1 || forked()) {
    body(0, 1);
    return;
  }
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  const auto guarded = [&](int t, int n) {
    try {
      body(t, n);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
#ifdef VIDTOK_USE_STD_THREAD
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  int started = 1;
  try {
    for (; started < threads; ++started)
      others.emplace_back([&guarded, started, threads] { guarded(started, threads); });
  } catch (const std::system_error&) {
    // No more threads to be had: the rest is done here.
  }
  guarded(0, threads);
  for (int t = started; t < threads; ++t) guarded(t, threads);
  for (auto& thread : others) thread.join();
#else
#pragma omp parallel num_threads(threads)
  guarded(omp_get_thread_num(), omp_get_num_threads());
#endif
  if (error) std::rethrow_exception(error);
}

// Runs body(begin, end) over an even partition of [0, count).
template <class Body>
void parallel_ranges(int threads, int64_t count, Body&& body) {
  if (count <= 0) return;
  if (threads > count) threads = static_cast<int>(count);
  parallel(threads, [&](int t, int n) {
    const int64_t begin = count * t / n, end = count * (t + 1) / n;
    if (begin < end) body(begin, end);
  });
}

// Runs body(task) for every task in [0, count), handed out as threads come free. For tasks of
// unequal cost whose results do not depend on who runs them.
template <class Body>
void parallel_tasks(int threads, int64_t count, Body&& body) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int, int) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  });
}

// Threads worth waking for this many bytes of work: below some 128 KiB one core is done before
// another has woken.
inline int threads_for(int threads, int64_t bytes) {
  const int64_t useful = bytes / (128 * 1024) + 1;
  return useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace vidtok
