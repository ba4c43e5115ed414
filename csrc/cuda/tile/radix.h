// Exact selection of the best of a list by a block: the threshold by counting digits of order keys, then a stable
// compaction. Order: key descending, then index ascending. Counters are integers in shared memory, so the order of
// the additions does not matter.
#pragma once

#include "cuda/tile/atomic.h"
#include "cuda/tile/block.h"

namespace vidtok::cuda {

// Unsigned keys that ascend with the score: NaN is 0, then −inf, …, −0 == 0, …, +inf.
template <class Bits>
VIDTOK_DEVICE Bits order_bits(Bits u, Bits sign, Bits infinite) {
  const Bits size = u & Bits(sign - 1);
  if (size > infinite) return 0;
  if (size == 0) return sign;
  return (u & sign) != 0 ? Bits(~u & Bits(sign | Bits(sign - 1))) : Bits(u | sign);
}
VIDTOK_DEVICE uint32_t order_key(float x) { return order_bits(bits_as<uint32_t>(x), 0x80000000u, 0x7f800000u); }
VIDTOK_DEVICE uint32_t order_key(bf16 x) { return order_bits(uint32_t(x.bits), 0x8000u, 0x7f80u); }
VIDTOK_DEVICE uint32_t order_key(f16 x) { return order_bits(uint32_t(x.bits), 0x8000u, 0x7c00u); }
VIDTOK_DEVICE uint64_t order_key(double x) {
  return order_bits(bits_as<uint64_t>(x), uint64_t(1) << 63, uint64_t(0x7ff) << 52);
}

// Key and index as one number: the largest is the best of all, so that a maximum is an argmax with ties by index.
VIDTOK_DEVICE uint64_t order_pair(uint32_t key, uint32_t index) { return uint64_t(key) << 32 | uint32_t(~index); }
VIDTOK_DEVICE uint32_t pair_index(uint64_t pair) { return ~uint32_t(pair); }
VIDTOK_DEVICE uint32_t pair_key(uint64_t pair) { return uint32_t(pair >> 32); }

// Of a score's type: its key, the bits of the key in use, and the bits of a digit.
template <class T>
struct OrderKey {
  using Key = uint32_t;
  static constexpr int kBits = 8 * int(sizeof(T)), kDigit = sizeof(T) == 2 ? 8 : 11;
};
template <>
struct OrderKey<double> {
  using Key = uint64_t;
  static constexpr int kBits = 64, kDigit = 11;
};
template <>
struct OrderKey<uint64_t> {
  using Key = uint64_t;
  static constexpr int kBits = 64, kDigit = 11;
};

// int32 that a selection among scores of T needs in shared memory.
template <class T>
constexpr int kRadixScratch = (1 << OrderKey<T>::kDigit) + 2 * kWarp + 4;

// Items are dealt to warps in runs of `steps` times 32: item `dealt_first(steps) + 32·step` is this lane's, if it is
// below n. With STEPS > 0 (at least n / threads) steps is STEPS, and a source may keep item `step` in a register.
template <int STEPS>
VIDTOK_DEVICE int64_t dealt_steps(int64_t n) {
  return STEPS > 0 ? STEPS : (n + threads() - 1) / threads();
}
VIDTOK_DEVICE int64_t dealt_first(int64_t steps) { return warp() * steps * kWarp + lane(); }

// f(item, step) for this lane's places; all lanes of a warp step together, items reach beyond n.
template <int STEPS, class F>
VIDTOK_DEVICE void each_dealt(int64_t n, F f) {
  const int64_t steps = dealt_steps<STEPS>(n), first = dealt_first(steps);
  if (STEPS > 0) {
    VIDTOK_UNROLL
    for (int j = 0; j < STEPS; ++j) f(first + j * kWarp, j);
  } else {
    for (int64_t j = 0; j < steps; ++j) f(first + j * kWarp, int(j));
  }
}

// Chosen are the items with key >> shift above `prefix`, and the first `ties` of those with key >> shift == prefix.
template <class Key>
struct Cut {
  Key prefix;
  int shift;
  int64_t ties;
};

// Where to cut for the k best of n, 0 <= k <= n; the same answer in every thread. keys(item, step) gives the order key
// of an item below n. Begins and ends with barriers, so that scratch (kRadixScratch<T>) may be shared with others.
template <class T, int STEPS = 0, class Keys>
VIDTOK_DEVICE Cut<typename OrderKey<T>::Key> radix_cut(const Keys& keys, int64_t n, int64_t k, int32_t* scratch) {
  using Key = typename OrderKey<T>::Key;
  constexpr int kBins = 1 << OrderKey<T>::kDigit;
  int32_t *const count = scratch, *const part = count + kBins, *const found = part + 2 * kWarp;
  if (k <= 0) return {Key(~Key(0)), 0, 0};
  if (k >= n) return {0, 0, n};
  Cut<Key> cut{0, OrderKey<T>::kBits, k};
  while (cut.shift > 0) {
    const int bits = smaller(OrderKey<T>::kDigit, cut.shift), shift = cut.shift - bits;
    block_sync();  // an earlier pass may still read
    for (int b = thread(); b < kBins; b += threads()) count[b] = 0;
    block_sync();
    each_dealt<STEPS>(n, [&](int64_t item, int step) {
      bool counts = item < n;
      int digit = 0;
      if (counts) {
        const Key rest = keys(item, step) >> shift;
        counts = rest >> bits == cut.prefix;
        digit = int(rest & ((Key(1) << bits) - 1));
      }
      // Scores crowd in few digits: those that agree with the first lane's are added at once.
      const unsigned all = ballot(counts);
      if (all == 0) return;
      const int leader = lowest_bit(all);
      const int common = shuffle(digit, leader);
      const unsigned same = ballot(counts && digit == common);
      if (lane() == leader)
        atomic_add(count + common, popcount(same));
      else if (counts && digit != common)
        atomic_add(count + digit, 1);
    });
    block_sync();
    // From the highest digit down, a run of digits per thread.
    const int run = (kBins + threads() - 1) / threads();
    int32_t mine = 0, total = 0;
    for (int r = 0; r < run; ++r) {
      const int down = thread() * run + r;
      if (down < kBins) mine += count[kBins - 1 - down];
    }
    int32_t above = block_scan(mine, part, &total);
    if (above < cut.ties && cut.ties <= above + mine) {
      int digit = kBins - 1 - thread() * run;
      while (above + count[digit] < cut.ties) above += count[digit--];
      found[0] = digit;
      found[1] = above;
      found[2] = count[digit];
    }
    block_sync();
    cut.prefix = cut.prefix << bits | Key(found[0]);
    cut.shift = shift;
    cut.ties -= found[1];
    if (cut.ties == found[2]) break;  // the whole digit is chosen
  }
  block_sync();
  return cut;
}

// emit(rank, item, step) for the chosen items; ranks ascend with the item.
template <class T, int STEPS = 0, class Keys, class Emit>
VIDTOK_DEVICE void radix_emit(const Keys& keys, int64_t n, const Cut<typename OrderKey<T>::Key>& cut, int32_t* scratch,
                              const Emit& emit) {
  using Key = typename OrderKey<T>::Key;
  int32_t* const part = scratch + (1 << OrderKey<T>::kDigit);
  int32_t above = 0, equal = 0;
  each_dealt<STEPS>(n, [&](int64_t item, int step) {
    const Key rest = item < n ? keys(item, step) >> cut.shift : 0;
    above += popcount(ballot(item < n && rest > cut.prefix));
    equal += popcount(ballot(item < n && rest == cut.prefix));
  });
  block_sync();
  if (lane() == 0) {
    part[2 * warp()] = above;
    part[2 * warp() + 1] = equal;
  }
  block_sync();
  int64_t above_before = 0, equal_before = 0;
  for (int w = 0; w < warp(); ++w) {
    above_before += part[2 * w];
    equal_before += part[2 * w + 1];
  }
  each_dealt<STEPS>(n, [&](int64_t item, int step) {
    const Key rest = item < n ? keys(item, step) >> cut.shift : 0;
    const bool better = item < n && rest > cut.prefix, tied = item < n && rest == cut.prefix;
    const unsigned betters = ballot(better), ties = ballot(tied);
    const int64_t tie = equal_before + popcount(ties & lanes_below());
    if (better || (tied && tie < cut.ties))
      emit(above_before + popcount(betters & lanes_below()) + smaller(tie, cut.ties), item, step);
    above_before += popcount(betters);
    equal_before += popcount(ties);
  });
  block_sync();
}

// The k best of n, in ascending order of their index.
template <class T, int STEPS = 0, class Keys, class Emit>
VIDTOK_DEVICE void radix_select(const Keys& keys, int64_t n, int64_t k, int32_t* scratch, const Emit& emit) {
  radix_emit<T, STEPS>(keys, n, radix_cut<T, STEPS>(keys, n, k, scratch), scratch, emit);
}

}  // namespace vidtok::cuda
