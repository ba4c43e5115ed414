// Products of keys and query rows, a tile after another: copies into shared memory run ahead, sums lie in registers.
// bf16 and fp16 take tensor cores from sm_80 on, the others true fp32 FMA; the sums lie alike. A sum runs over the
// channels in order and is the same wherever its key stands.
#pragma once

#include "cuda/tile/async.h"
#include "cuda/tile/block.h"
#include "cuda/tile/mma.h"
#include "cuda/tile/vec.h"

namespace vidtok::cuda {

constexpr int kKeysPerWarp = 16;

// Query rows of one key head: row r is row r % at_once + first of head r / at_once.
template <class T>
struct QueryRows {
  const T* base;
  int64_t width;  // rows of a head in memory
  int64_t first;
  int at_once;  // rows of a head in use
  int count;    // rows in use, of all heads
};

// 16 keys per warp times 8 · NR rows. Of a warp's sums a lane, with g = lane / 4 and t = lane % 4, holds as
// sum[n][e] key g + 8 · (e / 2) and row 8n + 2t + e % 2.
template <class T, int NR>
class LogitTile {
 public:
  static constexpr int kRows = 8 * NR;
  static constexpr int kPer = 16 / int(sizeof(T)), kWords = 16, kDepth = kWords * kPer;  // channels of a step
  static constexpr int kPitch = 16 * kWords + 16;  // bytes; rows begin in different banks
  static constexpr bool kMma = sizeof(T) == 2 && VIDTOK_SM >= 80;

  VIDTOK_DEVICE LogitTile(unsigned char* shared, int stages, int64_t dim, int64_t key_row, bool aligned)
      : shared_(shared), dim_(dim), key_row_(key_row), stages_(stages), aligned_(aligned) {}

  // use(tile, sum) for tiles 0 .. count − 1, whose keys (`keys` of them from `key` on) and rows (from `row` on)
  // at(tile, key, keys, queries, row) names. All threads call it.
  template <class At, class Use>
  VIDTOK_DEVICE void each(int64_t count, const At& at, const Use& use) {
    const int64_t chunks = dim_ > kDepth ? (dim_ + kDepth - 1) / kDepth : 1;
    const int ahead = stages_ - 1;
    Place next;
    const auto copy = [&] {
      if (next.tile < count) {
        const T* key = nullptr;
        int keys = 0, row = 0;
        QueryRows<T> queries{};
        at(next.tile, key, keys, queries, row);
        copy_keys(slot(next.slot), key, keys, next.chunk * kDepth);
        copy_rows(slot(next.slot) + warps() * (kKeysPerWarp * kPitch), queries, row, next.chunk * kDepth);
        next.step(chunks, stages_);
      }
      copy_commit();
    };
    block_sync();  // shared memory may still be in use
    for (int i = 0; i < ahead; ++i) copy();
    float sum[NR][4];
    for (Place now; now.tile < count; now.step(chunks, stages_)) {
      if (ahead == 0) {
        block_sync();
        copy();
      }
      if (ahead <= 1)
        copy_wait<0>();
      else
        copy_wait<1>();
      block_sync();  // this step is there, and the step before is no longer read
      if (ahead > 0) copy();
      if (now.chunk == 0) {
        VIDTOK_UNROLL
        for (int n = 0; n < NR; ++n) {
          VIDTOK_UNROLL
          for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
        }
      }
      const int words = words_from(now.chunk * kDepth);
      const unsigned char* const keys = slot(now.slot) + warp() * (kKeysPerWarp * kPitch);
      const unsigned char* const rows = slot(now.slot) + warps() * (kKeysPerWarp * kPitch);
      if constexpr (kMma)
        multiply_mma(keys, rows, words, sum);
      else
        multiply_fma(keys, rows, words, sum);
      if (now.chunk == chunks - 1) use(now.tile, sum);
    }
    copy_wait<0>();
    block_sync();
  }

 private:
  struct Place {
    int64_t tile = 0, chunk = 0;
    int slot = 0;
    VIDTOK_DEVICE void step(int64_t chunks, int stages) {
      if (++chunk == chunks) {
        chunk = 0;
        ++tile;
      }
      if (++slot == stages) slot = 0;
    }
  };

  VIDTOK_DEVICE unsigned char* slot(int i) const { return shared_ + i * ((warps() * kKeysPerWarp + kRows) * kPitch); }

  // 16-byte words of a row in use from a channel on: an even number, as tensor cores take 16 channels at once.
  VIDTOK_DEVICE int words_from(int64_t channel) const {
    const int64_t left = (dim_ - channel + 2 * kPer - 1) / (2 * kPer) * 2;
    return int(smaller(left, int64_t(kWords)));
  }

  // One word of a row, zeros where it is none.
  VIDTOK_DEVICE void copy_word(unsigned char* to, const T* from, int64_t channel, const T* some) const {
    if (aligned_) {
      const bool valid = from != nullptr && channel < dim_;
      copy_async(to, valid ? from + channel : some, valid);
      return;
    }
    Vec<T, kPer> v{};
    VIDTOK_UNROLL
    for (int k = 0; k < kPer; ++k)
      if (from != nullptr && channel + k < dim_) v.v[k] = from[channel + k];
    store(reinterpret_cast<T*>(to), v);
  }

  VIDTOK_DEVICE void copy_keys(unsigned char* to, const T* key, int keys, int64_t channel) const {
    const int word = thread() % kWords;
    if (word >= words_from(channel)) return;
    for (int r = thread() / kWords; r < warps() * kKeysPerWarp; r += threads() / kWords)
      copy_word(to + r * kPitch + word * 16, r < keys ? key + r * key_row_ : nullptr, channel + word * kPer, key);
  }

  VIDTOK_DEVICE void copy_rows(unsigned char* to, const QueryRows<T>& q, int row, int64_t channel) const {
    const int word = thread() % kWords;
    if (word >= words_from(channel)) return;
    for (int i = thread() / kWords; i < kRows; i += threads() / kWords) {
      const int r = row + i;
      const T* from = nullptr;
      if (r < q.count) {
        const int head = r / q.at_once;
        from = q.base + (head * q.width + q.first + (r - head * q.at_once)) * dim_;
      }
      copy_word(to + i * kPitch + word * 16, from, channel + word * kPer, q.base);
    }
  }

  VIDTOK_DEVICE static void multiply_mma(const unsigned char* keys, const unsigned char* rows, int words,
                                         float (&sum)[NR][4]) {
    const int l = lane();
    const unsigned char* const a_at = keys + l % 16 * kPitch + l / 16 * 16;
    const unsigned char* const b_at = rows + l / 4 * kPitch + l % 4 * 4;
    for (int word = 0; word < words; word += 2) {
      uint32_t a[4];
      load_matrices(a, a_at + word * 16);
      VIDTOK_UNROLL
      for (int n = 0; n < NR; ++n) {
        const unsigned char* const at = b_at + n * (8 * kPitch) + word * 16;
        const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 16)};
        mma_16816<T>(sum[n], a, b);
      }
    }
  }

  // Those of a step start at zero and are added to the rest, which keeps errors small.
  VIDTOK_DEVICE static void multiply_fma(const unsigned char* keys, const unsigned char* rows, int words,
                                         float (&sum)[NR][4]) {
    using Word = Vec<T, kPer>;
    const unsigned char* const key = keys + lane() / 4 * kPitch;
    const unsigned char* const row = rows + lane() % 4 * (2 * kPitch);
    float part[NR][4] = {};
    VIDTOK_NO_UNROLL  // registers
        for (int word = 0; word < words; ++word) {
      const Word x[2] = {*reinterpret_cast<const Word*>(key + word * 16),
                         *reinterpret_cast<const Word*>(key + 8 * kPitch + word * 16)};
      VIDTOK_UNROLL
      for (int n = 0; n < NR; ++n) {
        const unsigned char* const at = row + n * (8 * kPitch) + word * 16;
        const Word y[2] = {*reinterpret_cast<const Word*>(at), *reinterpret_cast<const Word*>(at + kPitch)};
        VIDTOK_UNROLL
        for (int k = 0; k < kPer; ++k) {
          VIDTOK_UNROLL
          for (int e = 0; e < 4; ++e) part[n][e] = fused(to_float(x[e / 2].v[k]), to_float(y[e % 2].v[k]), part[n][e]);
        }
      }
    }
    VIDTOK_UNROLL
    for (int n = 0; n < NR; ++n) {
      VIDTOK_UNROLL
      for (int e = 0; e < 4; ++e) sum[n][e] += part[n][e];
    }
  }

  unsigned char* shared_;
  int64_t dim_, key_row_;
  int stages_;
  bool aligned_;
};

// Shared memory of a tile, to carve: bytes of one stage.
#if !defined(__CUDACC_RTC__)
inline int64_t logit_stage(int warps, int rows) { return int64_t(warps * kKeysPerWarp + rows) * 272; }
#endif

}  // namespace vidtok::cuda
