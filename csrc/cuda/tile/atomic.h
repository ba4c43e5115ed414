// Integer atomics only: their result does not depend on the order. Sums of floats have one owner instead.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

#if defined(VIDTOK_HOST)
inline int32_t atomic_add(int32_t* p, int32_t x) {
  const int32_t before = *p;
  *p += x;
  return before;
}
inline void atomic_max(int32_t* p, int32_t x) { *p = *p < x ? x : *p; }
inline void atomic_max(unsigned long long* p, unsigned long long x) { *p = *p < x ? x : *p; }
inline void fence_system() {}
#else
VIDTOK_DEVICE int32_t atomic_add(int32_t* p, int32_t x) { return atomicAdd(p, x); }
VIDTOK_DEVICE void atomic_max(int32_t* p, int32_t x) { atomicMax(p, x); }
VIDTOK_DEVICE void atomic_max(unsigned long long* p, unsigned long long x) { atomicMax(p, x); }
VIDTOK_DEVICE void fence_system() { __threadfence_system(); }
#endif

}  // namespace vidtok::cuda
