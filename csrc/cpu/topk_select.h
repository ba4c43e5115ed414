// What each instruction set supplies to topk_select.
#pragma once

#include "vidtok/topk_select.h"

namespace vidtok {

// Counters of one radix digit, four copies so that equal neighbours do not wait for each other.
constexpr int kRadixBits = 11;
constexpr int64_t kRadixCounters = 4 * (int64_t(1) << kRadixBits);

struct TopkSelectKernels {
  // index[0 … keep) = base + the indices of the `keep` best of score[0 … n), ascending; 0 <= keep <= n.
  // work: 2·n + kRadixCounters entries.
  void (*segment)(const void* score, DType dtype, int64_t n, int64_t keep, int64_t base, int64_t* index,
                  uint32_t* work);
};

}  // namespace vidtok
