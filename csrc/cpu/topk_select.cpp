#include "vidtok/topk_select.h"

#include <atomic>
#include <memory>
#include <new>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {

Status topk_select(const TopkSelectArgs& args) {
  const auto start = [&](int64_t s) { return args.cu_seqlens ? int64_t(args.cu_seqlens[s]) : s * args.n; };
  if (args.keeps != 1 && args.keeps != args.segments)
    return fail(Status::index, "expected one keep or %lld, got %lld", (long long)args.segments, (long long)args.keeps);
  if (start(0) != 0 || start(args.segments) != args.n)
    return fail(Status::index, "expected cu_seqlens from 0 to %lld, got %lld to %lld", (long long)args.n,
                (long long)start(0), (long long)start(args.segments));
  const std::unique_ptr<int64_t[]> before(new (std::nothrow) int64_t[size_t(args.segments) + 1]);
  if (!before) return fail(Status::memory, "expected memory for %lld segments", (long long)args.segments);
  before[0] = 0;
  int64_t longest = 0;
  for (int64_t s = 0; s < args.segments; ++s) {
    const int64_t n = start(s + 1) - start(s), keep = args.keep[args.keeps == 1 ? 0 : s];
    if (n < 0) return fail(Status::index, "expected cu_seqlens that never falls, got a step of %lld", (long long)n);
    if (keep < 0 || keep > n)
      return fail(Status::value, "expected keep between 0 and the segment's %lld tokens, got %lld", (long long)n,
                  (long long)keep);
    before[s + 1] = before[s] + keep;
    longest = n > longest ? n : longest;
  }
  const auto kernel = kernels().topk_select.segment;
  const int64_t size = size_of(args.dtype);
  std::atomic<bool> starved{false};
  std::atomic<int64_t> next{0};
  int threads = threads_for(args.threads, args.n * 16);
  if (threads > args.segments) threads = int(args.segments > 0 ? args.segments : 1);
  parallel(threads, [&](int, int) {
    const std::unique_ptr<uint32_t[]> work(new (std::nothrow) uint32_t[size_t(2 * longest + kRadixCounters)]);
    if (!work) {
      starved = true;
      return;
    }
    for (int64_t s = next.fetch_add(1); s < args.segments; s = next.fetch_add(1))
      kernel(static_cast<const char*>(args.score) + start(s) * size, args.dtype, start(s + 1) - start(s),
             before[s + 1] - before[s], start(s), args.index + before[s], work.get());
  });
  if (starved) return fail(Status::memory, "expected memory for segments of %lld scores", (long long)longest);
  return Status::ok;
}

}  // namespace vidtok
