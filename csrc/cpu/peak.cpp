#include "vidtok/peak.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {

Status peak_flops(const PeakFlopsArgs& args) {
  const PeakKernels& kernel = kernels().peak;
  constexpr int kMost = 256;
  float sums[kMost] = {};
  int ran = 1;
  parallel(args.threads < kMost ? args.threads : kMost, [&](int t, int n) {
    sums[t] = kernel.flops(args.rounds, 0.999f, 0.001f);
    if (t == 0) ran = n;
  });
  float total = 0;
  for (int t = 0; t < ran; ++t) total += sums[t];
  *args.sum = total;
  *args.flops = double(args.rounds) * double(kernel.flops_per_round) * ran;
  return Status::ok;
}

Status stream_copy(const StreamCopyArgs& args) {
  const auto copy = kernels().peak.copy;
  constexpr int64_t kPage = 4096;
  const int64_t pages = (args.bytes + kPage - 1) / kPage;
  parallel_ranges(args.threads, pages, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kPage, to = end * kPage < args.bytes ? end * kPage : args.bytes;
    copy(static_cast<const char*>(args.x) + from, static_cast<char*>(args.y) + from, to - from);
  });
  return Status::ok;
}

}  // namespace vidtok
