#pragma once

#include "vidtok/common.h"

namespace vidtok {

// Fused multiply-adds on registers only, `rounds` times on every thread: the rate of arithmetic that
// no kernel can exceed. flops is what was done in all; sum depends on every result.
struct PeakFlopsArgs {
  int64_t rounds;
  double* flops;
  float* sum;
  int threads;
};

Status peak_flops(const PeakFlopsArgs& args);

// y = x past the cache; both aligned to 64 bytes: the rate of data that no kernel can exceed.
struct StreamCopyArgs {
  const void* x;
  void* y;
  int64_t bytes;
  int threads;
};

Status stream_copy(const StreamCopyArgs& args);

}  // namespace vidtok
