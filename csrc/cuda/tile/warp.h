// Where a thread stands, what the lanes of a warp exchange, and reductions over a warp.
// Every exchange names the lanes that take part; each of them must reach the same call.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

VIDTOK_DEVICE int thread() { return int(threadIdx.x); }
VIDTOK_DEVICE int threads() { return int(blockDim.x); }
VIDTOK_DEVICE int lane() { return int(threadIdx.x) & (kWarp - 1); }
VIDTOK_DEVICE int warp() { return int(threadIdx.x) / kWarp; }
VIDTOK_DEVICE int warps() { return int(blockDim.x) / kWarp; }
VIDTOK_DEVICE int64_t block() { return int64_t(blockIdx.x); }
VIDTOK_DEVICE int64_t blocks() { return int64_t(gridDim.x); }

#if defined(VIDTOK_HOST)
template <class T>
T shuffle(T x, int from, unsigned mask = kAllLanes, VIDTOK_SITE) {
  return host::shuffle(x, from & (kWarp - 1), mask, site_file, site_line);
}
template <class T>
T shuffle_xor(T x, int with, unsigned mask = kAllLanes, VIDTOK_SITE) {
  return host::shuffle(x, (lane() ^ with) & (kWarp - 1), mask, site_file, site_line);
}
// From the lane `by` below; a lane without one keeps its own.
template <class T>
T shuffle_up(T x, int by, unsigned mask = kAllLanes, VIDTOK_SITE) {
  return host::shuffle(x, lane() < by ? lane() : lane() - by, mask, site_file, site_line);
}
inline unsigned ballot(bool x, unsigned mask = kAllLanes, VIDTOK_SITE) {
  return host::ballot(x, mask, site_file, site_line);
}
inline void warp_sync(unsigned mask = kAllLanes, VIDTOK_SITE) { host::warp_barrier(mask, site_file, site_line); }
VIDTOK_DEVICE int popcount(unsigned x) { return __builtin_popcount(x); }
VIDTOK_DEVICE int lowest_bit(unsigned x) { return __builtin_ffs(int(x)) - 1; }
#else
template <class T>
VIDTOK_DEVICE T shuffle(T x, int from, unsigned mask = kAllLanes) {
  return __shfl_sync(mask, x, from);
}
template <class T>
VIDTOK_DEVICE T shuffle_xor(T x, int with, unsigned mask = kAllLanes) {
  return __shfl_xor_sync(mask, x, with);
}
template <class T>
VIDTOK_DEVICE T shuffle_up(T x, int by, unsigned mask = kAllLanes) {
  return __shfl_up_sync(mask, x, by);
}
VIDTOK_DEVICE unsigned ballot(bool x, unsigned mask = kAllLanes) { return __ballot_sync(mask, x); }
VIDTOK_DEVICE void warp_sync(unsigned mask = kAllLanes) { __syncwarp(mask); }
VIDTOK_DEVICE int popcount(unsigned x) { return __popc(x); }
VIDTOK_DEVICE int lowest_bit(unsigned x) { return __ffs(int(x)) - 1; }
#endif

// Lanes below this one.
VIDTOK_DEVICE unsigned lanes_below() { return (1u << lane()) - 1u; }

struct Sum {
  template <class T>
  VIDTOK_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  VIDTOK_DEVICE T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Min {
  template <class T>
  VIDTOK_DEVICE T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// Over groups of WIDTH neighbouring lanes; every lane gets the result. A butterfly: each lane adds the same
// values in the same tree, so that all lanes hold the same bits.
template <int WIDTH = kWarp, class T, class Op>
VIDTOK_DEVICE T warp_reduce(T x, Op op) {
  VIDTOK_UNROLL
  for (int m = WIDTH / 2; m > 0; m >>= 1) x = op(x, shuffle_xor(x, m));
  return x;
}
template <int WIDTH = kWarp, class T>
VIDTOK_DEVICE T warp_sum(T x) {
  return warp_reduce<WIDTH>(x, Sum());
}
template <int WIDTH = kWarp, class T>
VIDTOK_DEVICE T warp_max(T x) {
  return warp_reduce<WIDTH>(x, Max());
}

// Sum over this lane and those below.
template <class T>
VIDTOK_DEVICE T warp_scan(T x) {
  VIDTOK_UNROLL
  for (int m = 1; m < kWarp; m <<= 1) {
    const T below = shuffle_up(x, m);
    if (lane() >= m) x += below;
  }
  return x;
}

}  // namespace vidtok::cuda
