// How a kernel says that an index from outside is bad: it stores what it saw and goes on without the access.
// The words lie in memory the host reads without waiting; they are written only then.
#pragma once

#include "cuda/report.h"
#include "cuda/tile/atomic.h"

namespace vidtok::cuda {

// error: (code, value, low, high); the code is written last.
VIDTOK_DEVICE void report(int32_t* error, Report code, int64_t value, int64_t low, int64_t high) {
  volatile int32_t* const words = error;
  if (words[0] != 0) return;
  const int64_t limit = 0x7fffffff;
  words[1] = int32_t(smaller(larger(value, -limit), limit));
  words[2] = int32_t(smaller(larger(low, -limit), limit));
  words[3] = int32_t(smaller(larger(high, -limit), limit));
  fence_system();
  words[0] = int32_t(code);
}

}  // namespace vidtok::cuda
