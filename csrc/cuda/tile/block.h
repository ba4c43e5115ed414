// Barriers, shared memory, and reductions and scans over a block.
#pragma once

#include "cuda/tile/warp.h"

namespace vidtok::cuda {

#if defined(VIDTOK_HOST)
inline void block_sync(VIDTOK_SITE) { host::block_barrier(site_file, site_line); }
#else
VIDTOK_DEVICE void block_sync() { __syncthreads(); }
#endif

// Bytes that `Carver::take` uses for n elements; a launcher adds these up.
template <class T>
#if !defined(VIDTOK_HOST)
__host__ __device__
#endif
    constexpr int64_t carved(int64_t n) {
  return (n * int64_t(sizeof(T)) + 15) / 16 * 16;
}

// Hands out pieces of dynamic shared memory, 16-byte aligned; all threads take the same pieces in the same order.
class Carver {
 public:
  VIDTOK_DEVICE explicit Carver(unsigned char* base) : at_(base) {}
  template <class T>
  VIDTOK_DEVICE T* take(int64_t n) {
#if defined(VIDTOK_HOST)
    return reinterpret_cast<T*>(host::carve(&used_, &pieces_, carved<T>(n), n * int64_t(sizeof(T))));
#else
    T* const piece = reinterpret_cast<T*>(at_);
    at_ += carved<T>(n);
    return piece;
#endif
  }

 private:
  unsigned char* at_;
#if defined(VIDTOK_HOST)
  int64_t used_ = 0, pieces_ = 0;
#endif
};

#if defined(VIDTOK_HOST)
#define VIDTOK_SMEM(name) ::vidtok::cuda::Carver name(nullptr)
#else
#define VIDTOK_SMEM(name)                          \
  extern __shared__ uint4 vidtok_dynamic_shared[]; \
  ::vidtok::cuda::Carver name(reinterpret_cast<unsigned char*>(vidtok_dynamic_shared))
#endif

// Over the block; every thread gets the result. scratch holds one T per warp. Warps' results are combined in order.
template <class T, class Op>
VIDTOK_DEVICE T block_reduce(T x, Op op, T* scratch) {
  x = warp_reduce(x, op);
  block_sync();  // the scratch of an earlier call may still be read
  if (lane() == 0) scratch[warp()] = x;
  block_sync();
  T out = scratch[0];
  for (int w = 1; w < warps(); ++w) out = op(out, scratch[w]);
  return out;
}
template <class T>
VIDTOK_DEVICE T block_sum(T x, T* scratch) {
  return block_reduce(x, Sum(), scratch);
}
template <class T>
VIDTOK_DEVICE T block_max(T x, T* scratch) {
  return block_reduce(x, Max(), scratch);
}

// Sum over the threads below this one; *total is the sum over all. scratch holds one T per warp.
template <class T>
VIDTOK_DEVICE T block_scan(T x, T* scratch, T* total) {
  const T upto = warp_scan(x);
  block_sync();
  if (lane() == kWarp - 1) scratch[warp()] = upto;
  block_sync();
  T before = 0, all = 0;
  for (int w = 0; w < warps(); ++w) {
    if (w == warp()) before = all;
    all += scratch[w];
  }
  *total = all;
  return before + upto - x;
}

}  // namespace vidtok::cuda
