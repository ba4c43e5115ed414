// The product of BM rows of A and BN rows of B over any number of channels, by one block: a pipeline of copies into
// shared memory, sums in registers. Every sum runs over the channels in order, 128 bytes of them at a time, and is the
// same wherever its two rows stand. bf16 and fp16 take tensor cores, fp32 true fp32 FMA.
#pragma once

#include "cuda/tile/async.h"
#include "cuda/tile/block.h"
#include "cuda/tile/mma.h"
#include "cuda/tile/vec.h"

namespace vidtok::cuda {

// Row r lies at base + (index ? index[r] : r) · stride; rows from `count` on are zeros.
template <class T>
struct GramRows {
  const T* base;
  int64_t stride;  // elements
  int64_t count;
  const int32_t* index = nullptr;
};

// Shared memory of a tile, which a launcher adds up: bytes to carve.
#if !defined(__CUDACC_RTC__)
inline int64_t gram_shared(int bm, int bn, int stages, int itemsize, int sm) {
  return int64_t(stages) * (bm + bn) * (sm < 80 && itemsize == 2 ? 144 : 128) + 112;
}
#endif

// Warps lie in a grid; a warp owns TM x TN sums, and of those a lane, with g = lane / 4 and t = lane % 4, rows
// g + 8i and columns 2t + 8j and 2t + 1 + 8j, whatever T and the SM. So four neighbouring lanes share a row.
template <class T, int BM, int BN, int WARPS>
class GramTile {
 public:
  static constexpr int kThreads = WARPS * kWarp;
  static constexpr int kRowWarps = WARPS == 1 ? 1 : WARPS == 2 ? 2 : WARPS == 4 ? 2 : 4;
  static constexpr int kColWarps = WARPS / kRowWarps;
  static constexpr int kRowLanes = 4;  // lanes that share a row: l ^ 1, l ^ 2, l ^ 3
  static constexpr int TM = BM / kRowWarps, TN = BN / kColWarps;
  static constexpr int kDepth = 128 / int(sizeof(T));  // channels of a step
  static_assert(TM % 16 == 0 && TN % 16 == 0, "a warp owns 16 x 16 sums at least");
  static_assert(BM * 8 % kThreads == 0 && BN * 8 % kThreads == 0, "all threads copy alike");

  // shared: gram_shared bytes; stages: steps under way, 1 to 4.
  VIDTOK_DEVICE GramTile(unsigned char* shared, int stages)
      : shared_(reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared) + 112) / 128 * 128)),
        stages_(stages),
        row0_(warp() / kColWarps * TM + lane() / 4),
        col0_(warp() % kColWarps * TN + lane() % 4 * 2) {}

  // All threads call it; when it returns, shared memory is free for the caller (after the barrier inside). With `same`
  // the rows are multiplied by themselves: b equals a and is not read.
  VIDTOK_DEVICE void multiply(const GramRows<T>& a, const GramRows<T>& b, int64_t channels, bool same = false) {
    const auto bits = [](const GramRows<T>& rows) {
      return reinterpret_cast<uintptr_t>(rows.base) | uintptr_t(rows.stride * int64_t(sizeof(T)));
    };
    const bool aligned = (bits(a) | bits(b) | uintptr_t(channels * int64_t(sizeof(T)))) % 16 == 0;
    const int64_t steps = (channels + kDepth - 1) / kDepth;
    const int ahead = stages_ - 1;
    int read = 0, write = 0;  // stages
    const auto copy = [&](int64_t step) {
      if (step < steps) {
        unsigned char* const to = stage(write);
        copy_side<kCopiesA>(to, a, step * kDepth, channels, aligned);
        if (!same) copy_side<kCopiesB>(to + BM * kPitch, b, step * kDepth, channels, aligned);
      }
      copy_commit();
      write = write + 1 == stages_ ? 0 : write + 1;
    };
    WmmaSum wmma[kWmma ? kMi : 1][kWmma ? kNi / 2 : 1] = {};
    VIDTOK_UNROLL
    for (int i = 0; i < kMi; ++i) {
      VIDTOK_UNROLL
      for (int j = 0; j < kNi; ++j) {
        VIDTOK_UNROLL
        for (int e = 0; e < 4; ++e) sum_[i][j][e] = 0;
      }
    }
    // The first steps only copy ahead.
    for (int64_t step = -ahead; step < steps; ++step) {
      if (ahead == 1) copy_wait<0>();
      if (ahead == 2) copy_wait<1>();
      if (ahead >= 3) copy_wait<2>();
      block_sync();  // this step is there, and what is overwritten next is no longer read
      copy(step + ahead);
      if (step < 0) continue;
      if (ahead == 0) {
        copy_wait<0>();
        block_sync();
      }
      const unsigned char* const at = stage(read);
      read = read + 1 == stages_ ? 0 : read + 1;
      const unsigned char* const other = same ? at : at + BM * kPitch;
      if constexpr (sizeof(T) == 4)
        step_fma(at, other);
      else if constexpr (kWmma)
        step_wmma(at, other, wmma);
      else
        step_mma(at, other);
    }
    copy_wait<0>();
    block_sync();
    if constexpr (kWmma) reorder(wmma);
  }

  // f(row, column, sum&) for the sums of this thread, row by row.
  template <class F>
  VIDTOK_DEVICE void for_each(F f) {
    VIDTOK_UNROLL
    for (int i = 0; i < TM / 8; ++i) {
      VIDTOK_UNROLL
      for (int j = 0; j < TN / 8; ++j) {
        VIDTOK_UNROLL
        for (int e = 0; e < 2; ++e) f(row0_ + 8 * i, col0_ + 8 * j + e, sum_[i / 2][j][i % 2 * 2 + e]);
      }
    }
  }

  // Reduces map(row, column, sum) over this warp's columns of each of its rows: out(row, result) runs on one lane of
  // four; warps with other columns (col_warp()) hold the rest. The op must not depend on the order of its arguments.
  template <class U, class Map, class Op, class Out>
  VIDTOK_DEVICE void reduce_rows(U none, Map map, Op op, Out out) {
    VIDTOK_UNROLL
    for (int i = 0; i < TM / 8; ++i) {
      U best = none;
      VIDTOK_UNROLL
      for (int j = 0; j < TN / 8; ++j) {
        VIDTOK_UNROLL
        for (int e = 0; e < 2; ++e)
          best = op(best, map(row0_ + 8 * i, col0_ + 8 * j + e, sum_[i / 2][j][i % 2 * 2 + e]));
      }
      best = op(best, shuffle_xor(best, 1));
      best = op(best, shuffle_xor(best, 2));
      if (lane() % kRowLanes == 0) out(row0_ + 8 * i, best);
    }
  }
  VIDTOK_DEVICE static int col_warp() { return warp() % kColWarps; }

 private:
  static constexpr int kPer = 16 / int(sizeof(T));
  static constexpr int kCopiesA = BM * 8 / kThreads, kCopiesB = BN * 8 / kThreads;
  static constexpr bool kAsync = VIDTOK_SM >= 80;
  static constexpr bool kWmma = sizeof(T) == 2 && VIDTOK_SM < 80;
  // wmma reads plain rows, 16 bytes further apart; the others a line per row with its 16-byte words permuted, so that
  // words of eight neighbouring rows lie in different banks.
  static constexpr int kPitch = kWmma ? 144 : 128;
  static constexpr int kMi = TM / 16, kNi = TN / 8;

  VIDTOK_DEVICE static int place(int row, int word) { return row * kPitch + (kWmma ? word : word ^ (row & 7)) * 16; }
  VIDTOK_DEVICE unsigned char* stage(int i) const { return shared_ + i * (BM + BN) * kPitch; }

  template <int COPIES>
  VIDTOK_DEVICE static void copy_side(unsigned char* to, const GramRows<T>& rows, int64_t begin, int64_t channels,
                                      bool aligned) {
    constexpr int kApart =
        kThreads / 8;  // rows of a thread's copies; a multiple of 8, so that words are permuted alike
    static_assert(kApart % 8 == 0, "whole groups of eight rows");
    const int word = thread() % 8, first = thread() / 8;
    const int64_t at = begin + word * kPer;
    unsigned char* slot = to + place(first, word);
    const T* from = rows.base + first * rows.stride + at;
    if (aligned && rows.index == nullptr) {
      Vec<T, kPer> held[COPIES];  // without cp.async all loads come before the stores, so that they overlap
      VIDTOK_UNROLL
      for (int i = 0; i < COPIES; ++i) {
        const bool inside = first + i * kApart < rows.count && at < channels;
        if constexpr (kAsync)
          copy_async(slot + i * kApart * kPitch, inside ? from : rows.base, inside);
        else
          held[i] = inside ? load<T, kPer>(from) : Vec<T, kPer>{};
        from += kApart * rows.stride;
      }
      VIDTOK_UNROLL
      for (int i = 0; i < COPIES && !kAsync; ++i) store(reinterpret_cast<T*>(slot + i * kApart * kPitch), held[i]);
      return;
    }
    VIDTOK_NO_UNROLL
    for (int i = 0; i < COPIES; ++i) {
      const int row = first + i * kApart;
      if (rows.index != nullptr) from = rows.base + (row < rows.count ? rows.index[row] : 0) * rows.stride + at;
      if (aligned) {
        const bool inside = row < rows.count && at < channels;
        copy_async(slot, inside ? from : rows.base, inside);
      } else {
        Vec<T, kPer> v{};
        VIDTOK_UNROLL
        for (int k = 0; k < kPer; ++k)
          if (row < rows.count && at + k < channels) v.v[k] = from[k];
        store(reinterpret_cast<T*>(slot), v);
      }
      slot += kApart * kPitch;
      from += kApart * rows.stride;
    }
  }

  // One step of all sums. Those of a step start at zero and are added to the rest, which keeps errors small.
  VIDTOK_DEVICE void step_fma(const unsigned char* a, const unsigned char* b) {
    using Four = Vec<float, 4>;
    float part[kMi][kNi][4] = {};
    // place(row0_ + 8i, word) and place(col0_ + 8j + e, word), apart from what the loop need not count anew.
    const unsigned char* const rows = a + row0_ * kPitch;
    const unsigned char* const cols = b + col0_ * kPitch;
    VIDTOK_NO_UNROLL  // registers
        for (int word = 0; word < 8; ++word) {
      const int at_row = (word ^ (row0_ & 7)) * 16, at_col = (word ^ (col0_ & 7)) * 16;
      Four x[kMi * 2];
      VIDTOK_UNROLL
      for (int i = 0; i < kMi * 2; ++i) x[i] = *reinterpret_cast<const Four*>(rows + at_row + i * 8 * kPitch);
      VIDTOK_UNROLL
      for (int j = 0; j < kNi * 2; ++j) {
        const Four y = *reinterpret_cast<const Four*>(cols + (at_col ^ (j % 2 * 16)) + (j / 2 * 8 + j % 2) * kPitch);
        VIDTOK_UNROLL
        for (int i = 0; i < kMi * 2; ++i) {
          float& p = part[i / 2][j / 2][i % 2 * 2 + j % 2];
          VIDTOK_UNROLL
          for (int k = 0; k < 4; ++k) p = fused(x[i].v[k], y.v[k], p);
        }
      }
    }
    add(part);
  }

  VIDTOK_DEVICE void step_mma(const unsigned char* a, const unsigned char* b) {
    const int l = lane();
    const int row = warp() / kColWarps * TM + l % 16, col = warp() % kColWarps * TN + l % 8 + l / 16 * 8;
    const unsigned char* const rows = a + row * kPitch;
    const unsigned char* const cols = b + col * kPitch;
    const int at_row = place(0, l / 16 ^ (row & 7)), at_col = place(0, l / 8 % 2 ^ (col & 7));  // of the first words
    uint32_t x[kMi][4][4];
    VIDTOK_UNROLL
    for (int i = 0; i < kMi; ++i) {
      VIDTOK_UNROLL
      for (int k = 0; k < 4; ++k) load_matrices(x[i][k], rows + i * 16 * kPitch + (at_row ^ (32 * k)));
    }
    VIDTOK_UNROLL
    for (int j = 0; j < kNi; j += 2) {
      float part[kMi][2][4] = {};
      VIDTOK_UNROLL
      for (int k = 0; k < 4; ++k) {
        uint32_t y[4];
        load_matrices(y, cols + j * 8 * kPitch + (at_col ^ (32 * k)));
        const uint32_t left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]};
        VIDTOK_UNROLL
        for (int i = 0; i < kMi; ++i) {
          mma_16816<T>(part[i][0], x[i][k], left);
          mma_16816<T>(part[i][1], x[i][k], right);
        }
      }
      VIDTOK_UNROLL
      for (int i = 0; i < kMi; ++i) {
        VIDTOK_UNROLL
        for (int e = 0; e < 8; ++e) sum_[i][j + e / 4][e % 4] += part[i][e / 4][e % 4];
      }
    }
  }

  VIDTOK_DEVICE void step_wmma(const unsigned char* a, const unsigned char* b, WmmaSum (&sum)[kMi][kNi / 2]) {
    constexpr int kStride = kPitch / 2;
    if (!Same<T, f16>::value) trap();
    const f16* const rows = reinterpret_cast<const f16*>(a + warp() / kColWarps * TM * kPitch);
    const f16* const cols = reinterpret_cast<const f16*>(b + warp() % kColWarps * TN * kPitch);
    VIDTOK_UNROLL
    for (int i = 0; i < kMi; ++i) {
      WmmaInput x[4];
      VIDTOK_UNROLL
      for (int k = 0; k < 4; ++k) x[k] = wmma_load_a(rows + 16 * i * kStride + 16 * k, kStride);
      VIDTOK_UNROLL
      for (int j = 0; j < kNi / 2; ++j) {
        WmmaSum part{};
        VIDTOK_UNROLL
        for (int k = 0; k < 4; ++k) wmma_multiply(part, x[k], wmma_load_b(cols + 16 * j * kStride + 16 * k, kStride));
        VIDTOK_UNROLL
        for (int e = 0; e < 8; ++e) sum[i][j].r[e] += part.r[e];
      }
    }
  }

  // Through shared memory into the order of the other sums.
  VIDTOK_DEVICE void reorder(const WmmaSum (&sum)[kMi][kNi / 2]) {
    constexpr int kStride = 20;
    static_assert(WARPS * 16 * kStride * 4 <= (BM + BN) * 128, "the sums pass through the memory of one step");
    float* const tile = reinterpret_cast<float*>(shared_) + warp() * 16 * kStride;
    const float* const mine = tile + lane() / 4 * kStride + lane() % 4 * 2;
    VIDTOK_UNROLL
    for (int i = 0; i < kMi; ++i) {
      VIDTOK_UNROLL
      for (int j = 0; j < kNi / 2; ++j) {
        wmma_store(tile, kStride, sum[i][j]);
        warp_sync();
        VIDTOK_UNROLL
        for (int e = 0; e < 8; ++e) sum_[i][2 * j + e / 4][e % 4] = mine[e % 4 / 2 * 8 * kStride + e / 4 * 8 + e % 2];
        warp_sync();
      }
    }
    block_sync();
  }

  VIDTOK_DEVICE void add(const float (&part)[kMi][kNi][4]) {
    VIDTOK_UNROLL
    for (int i = 0; i < kMi; ++i) {
      VIDTOK_UNROLL
      for (int j = 0; j < kNi; ++j) {
        VIDTOK_UNROLL
        for (int e = 0; e < 4; ++e) sum_[i][j][e] += part[i][j][e];
      }
    }
  }

  unsigned char* shared_;
  int stages_;
  int row0_, col0_;
  float sum_[kMi][kNi][4];
};

}  // namespace vidtok::cuda
