// The k smallest of a row of counts, by a warp.
#pragma once

#include "cuda/tile/warp.h"

namespace vidtok::cuda {

constexpr int32_t kFarthest = 0x7fffffff;

// Up to 32 smallest of what was offered, ascending over the lanes.
class SmallestList {
 public:
  VIDTOK_DEVICE explicit SmallestList(int32_t held = kFarthest) : held_(held) {}

  // One value per lane; the first k places matter.
  VIDTOK_DEVICE void offer(int32_t x, int k) {
    unsigned better = ballot(x < shuffle(held_, k - 1));
    if (popcount(better) > 8) {
      merge(x);
      return;
    }
    for (; better != 0; better &= better - 1) {
      const int32_t one = shuffle(x, lowest_bit(better));
      const int before = popcount(ballot(held_ <= one));
      const int32_t below = shuffle_up(held_, 1);
      held_ = lane() < before ? held_ : lane() == before ? one : below;
    }
  }
  VIDTOK_DEVICE int32_t held() const { return held_; }
  VIDTOK_DEVICE int64_t sum(int k) const { return warp_sum(lane() < k ? int64_t(held_) : int64_t(0)); }

 private:
  VIDTOK_DEVICE static int32_t order(int32_t x, int with, bool smaller_here) {
    const int32_t other = shuffle_xor(x, with);
    return smaller_here ? smaller(x, other) : larger(x, other);
  }
  // The smaller halves of two sorted lists, one of them turned round, are a bitonic sequence.
  VIDTOK_DEVICE void merge(int32_t x) {
    VIDTOK_UNROLL
    for (int width = 2; width <= kWarp; width *= 2) {
      VIDTOK_UNROLL
      for (int step = width / 2; step > 0; step /= 2)
        x = order(x, step, ((lane() & step) == 0) == ((lane() & width) == 0));
    }
    held_ = smaller(held_, shuffle(x, kWarp - 1 - lane()));
    VIDTOK_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) held_ = order(held_, step, (lane() & step) == 0);
  }

  int32_t held_;
};

// Sum of the k smallest of n counts within [0, most], 1 <= k <= n.
template <class Read>
VIDTOK_DEVICE int64_t smallest_sum(const Read& read, int32_t n, int32_t k, int32_t most) {
  if (k <= kWarp) {
    SmallestList list;
    for (int32_t j = 0; j < n; j += kWarp) list.offer(n - j > lane() ? read(j + lane()) : kFarthest, k);
    return list.sum(k);
  }
  int32_t low = 0, high = most;  // the k-th smallest
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    int32_t count = 0;
    for (int32_t j = lane(); j < n; j += kWarp) count += read(j) <= middle;
    if (warp_sum(count) >= k)
      high = middle;
    else
      low = middle + 1;
  }
  int64_t sum = 0;
  int32_t below = 0;
  for (int32_t j = lane(); j < n; j += kWarp) {
    const int32_t x = read(j);
    below += x < low;
    sum += x < low ? x : 0;
  }
  return warp_sum(sum) + int64_t(k - warp_sum(below)) * low;
}

}  // namespace vidtok::cuda
