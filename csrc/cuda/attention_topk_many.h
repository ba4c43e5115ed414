// The best of groups of many scores, of which one block would take its time: the kernel that makes the scores counts
// the high digits of their keys, a launch counts the low digits, and a launch writes.
#pragma once

#include "cuda/tile/radix.h"

namespace vidtok::cuda {

constexpr int64_t kManyTokens = 8192;     // of a group, on average, from which several blocks select
constexpr int64_t kMostTokens = 1 << 20;  // of all groups: every block reads what its group holds before it
constexpr int kManyThreads = 1024, kManyEach = 4, kManyPart = kManyThreads * kManyEach;
constexpr int kKeyBits = 23, kLowBits = 11, kDigitBins = 1 << (kKeyBits - kLowBits);

// Scores of at least 0 with 16 significant bits as ascending keys; NaN is 0. Subnormal numbers are brought up by 2^24.
VIDTOK_DEVICE uint32_t score_key(float x) {
  if (!(x == x)) return 0;
  const bool small = x < 1.1754943508222875e-38f;
  const uint32_t bits = small ? bits_as<uint32_t>(x * 16777216.0f) : bits_as<uint32_t>(x) + (24u << 23);
  return smaller(1u + (bits >> 8), (1u << kKeyBits) - 1u);
}

// Groups of scores and the number to take of each, as topk_select has them. count: high, then low digits of each group.
struct ManyGroups {
  const int32_t* start;
  int64_t groups, keep;
  const int64_t* keep_start;
  int32_t* count;
  // The last group that begins at or before a token.
  VIDTOK_DEVICE int64_t of(int64_t token) const {
    int64_t low = 0, high = groups - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (start[middle] <= token)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
  VIDTOK_DEVICE int32_t* counts(int64_t group) const { return count + group * (2 * kDigitBins); }
};

// Adds 1 to count[digit] for the lanes that count; all lanes call it. Digits that agree with the first are added at
// once.
VIDTOK_DEVICE void count_digit(int32_t* count, bool counts, int64_t digit) {
  const unsigned all = ballot(counts);
  if (all == 0) return;
  const int leader = lowest_bit(all);
  const int64_t common = shuffle(digit, leader);
  const unsigned same = ballot(counts && digit == common);
  if (lane() == leader)
    atomic_add(count + common, popcount(same));
  else if (counts && digit != common)
    atomic_add(count + digit, 1);
}

// What a block selects from: part `part` of a group, kManyPart scores from `first` on, `before` of the group before it.
struct ManyPart {
  int64_t group, before, first, n, base, k;
  int count;
  VIDTOK_DEVICE ManyPart(const ManyGroups& all, int64_t block) {
    int64_t low = 0, high = all.groups - 1;  // group g has the parts from start[g] / kManyPart + g on
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (all.start[middle] / kManyPart + middle <= block)
        low = middle;
      else
        high = middle - 1;
    }
    group = low;
    before = (block - (all.start[low] / kManyPart + low)) * kManyPart;
    first = all.start[low] + before;
    n = all.start[low + 1] - all.start[low];
    count = int(smaller(larger(n - before, int64_t(0)), int64_t(kManyPart)));
    base = all.keep_start == nullptr ? low * all.keep : all.keep_start[low];
    k = all.keep_start == nullptr ? all.keep : all.keep_start[low + 1] - base;
  }
};

// The digit of the k-th best, and how many have a higher one; 1 <= k <= all that are counted. scratch: kWarp + 2.
struct KthDigit {
  int32_t digit, above;
};
VIDTOK_DEVICE KthDigit kth_digit(const int32_t* count, int32_t k, int32_t* scratch) {
  const int run = (kDigitBins + threads() - 1) / threads();
  int32_t mine = 0, total = 0;
  for (int r = 0; r < run; ++r) {
    const int down = thread() * run + r;
    if (down < kDigitBins) mine += count[kDigitBins - 1 - down];
  }
  int32_t above = block_scan(mine, scratch, &total);
  if (above < k && k <= above + mine) {
    int digit = kDigitBins - 1 - thread() * run;
    while (above + count[digit] < k) above += count[digit--];
    scratch[kWarp] = digit;
    scratch[kWarp + 1] = above;
  }
  block_sync();
  return {scratch[kWarp], scratch[kWarp + 1]};
}

// Counts the low digits of the scores whose high digit is that of the k-th best.
__global__ void __launch_bounds__(kManyThreads) attention_topk_low_kernel(ManyGroups all, const float* score) {
  VIDTOK_SMEM(shared);
  int32_t* const scratch = shared.take<int32_t>(kWarp + 2);
  const ManyPart part(all, block());
  if (part.count == 0 || part.k <= 0 || part.k >= part.n) return;  // the whole block
  int32_t* const count = all.counts(part.group);
  const int32_t high = kth_digit(count, int32_t(part.k), scratch).digit;
  VIDTOK_UNROLL
  for (int e = 0; e < kManyEach; ++e) {
    const int i = e * threads() + thread();
    const uint32_t key = i < part.count ? score_key(score[part.first + i]) : 0;
    count_digit(count + kDigitBins, i < part.count && int32_t(key >> kLowBits) == high, key & ((1u << kLowBits) - 1u));
  }
}

// Writes the best of a part, in order; better ones in the low half of a count, equal ones in the high half.
__global__ void __launch_bounds__(kManyThreads)
    attention_topk_write_kernel(ManyGroups all, const float* score, const int32_t* place, int64_t* index) {
  VIDTOK_SMEM(shared);
  int32_t* const scratch = shared.take<int32_t>(kWarp + 2);
  int64_t* const sums = shared.take<int64_t>(kWarp);
  const ManyPart part(all, block());
  if (part.count == 0 || part.k <= 0) return;  // the whole block
  uint32_t cut = 0;                            // all are at or above it
  int64_t ties = part.n;
  if (part.k < part.n) {
    const int32_t* const count = all.counts(part.group);
    const KthDigit high = kth_digit(count, int32_t(part.k), scratch);
    const KthDigit low = kth_digit(count + kDigitBins, int32_t(part.k) - high.above, scratch);
    cut = uint32_t(high.digit) << kLowBits | uint32_t(low.digit);
    ties = part.k - high.above - low.above;
  }
  const auto compared = [&](uint32_t key) { return int64_t(key > cut) | int64_t(key == cut) << 32; };
  int64_t before = 0;
  const float* const group = score + (part.first - part.before);
  for (int64_t i = thread(); i < part.before; i += threads()) before += compared(score_key(group[i]));
  before = block_sum(before, sums);
  uint32_t key[kManyEach];
  int64_t mine = 0, total = 0;
  const int begin = thread() * kManyEach;
  VIDTOK_UNROLL
  for (int e = 0; e < kManyEach; ++e) {
    key[e] = begin + e < part.count ? score_key(score[part.first + begin + e]) : 0;
    if (begin + e < part.count) mine += compared(key[e]);
  }
  before += block_scan(mine, sums, &total);
  int64_t better = before & 0xffffffff, equal = before >> 32;
  VIDTOK_UNROLL
  for (int e = 0; e < kManyEach; ++e) {
    if (begin + e >= part.count) continue;
    if (key[e] > cut || (key[e] == cut && equal < ties))
      index[part.base + better + smaller(equal, ties)] = place[part.first + begin + e];
    better += key[e] > cut;
    equal += key[e] == cut;
  }
}

}  // namespace vidtok::cuda
