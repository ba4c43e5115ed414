// First half of bipartite matching: the best destination of every source of a strip. Sources are the even tokens of a
// sequence and destinations the odd ones; slot i stands for the pair of tokens 2i and 2i + 1. Scores never leave the
// registers: each warp holds 16 sources against 64 destinations at a time and keeps the best of every source.
#pragma once

#include "cuda/tile/async.h"
#include "cuda/tile/block.h"
#include "cuda/tile/mma.h"
#include "cuda/tile/radix.h"
#include "cuda/tile/vec.h"

namespace vidtok::cuda {

// Sequences of equal length, or with `cu` tokens cu[i] .. cu[i + 1] that become outputs cu_out[i] .. cu_out[i + 1].
struct BipartiteSequences {
  const int32_t* cu;
  const int32_t* cu_out;
  int64_t batch, tokens, outputs, prefix;  // tokens and outputs of one sequence, where all are alike
  const uint8_t* mask;                     // of all tokens, or null
};

struct BipartiteSequence {
  int64_t index, begin, out;
  int tokens, outputs;
  int first_source, sources, first_destination, destinations;  // slots
  const uint8_t* mask;
  bool packed;  // sequences lie one after the other, instead of a stride apart

  VIDTOK_DEVICE BipartiteSequence(const BipartiteSequences& all, int64_t i)
      : index(i), mask(all.mask), packed(all.cu != nullptr) {
    begin = packed ? all.cu[i] : i * all.tokens;
    out = packed ? all.cu_out[i] : i * all.outputs;
    tokens = int(packed ? all.cu[i + 1] - begin : all.tokens);
    outputs = int(packed ? all.cu_out[i + 1] - out : all.outputs);
    const int prefix = int(smaller(all.prefix, int64_t(tokens)));
    first_source = (prefix + 1) / 2;
    first_destination = prefix / 2;
    sources = (tokens + 1) / 2 - first_source;
    destinations = tokens / 2 - first_destination;
    if (mask != nullptr) mask += begin;
  }
  VIDTOK_DEVICE int merges() const { return tokens - outputs; }
  // Tokens of a slot that the prefix leaves free.
  VIDTOK_DEVICE bool is_source(int slot) const { return mask == nullptr || mask[2 * int64_t(slot)] == 0; }
  VIDTOK_DEVICE bool is_destination(int slot) const { return mask == nullptr || mask[2 * int64_t(slot) + 1] == 0; }
  // Where the slots of this sequence begin in a workspace of all tokens / 2 + all sequences.
  VIDTOK_DEVICE int64_t slots() const { return begin / 2 + index; }
};

// Which sequence a block works on, and which part of it. Parts of `per` tokens (outputs) in the list `cu`: sequence i
// has those from cu[i] / per + i on, one too many at times. Without a list all sequences have `parts`.
struct BipartitePart {
  int64_t sequence, part;
  VIDTOK_DEVICE BipartitePart(const int32_t* cu, int64_t batch, int64_t per, int64_t parts, int64_t at) {
    if (cu == nullptr) {
      sequence = at / parts;
      part = at - sequence * parts;
      return;
    }
    int64_t low = 0, high = batch - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (cu[middle] / per + middle <= at)
        low = middle;
      else
        high = middle - 1;
    }
    sequence = low;
    part = at - (cu[low] / per + low);
  }
};

struct BipartiteMetric {
  const void* data;
  int64_t batch, head, row;  // strides in elements
  int heads, dim;
  bool aligned;  // 16-byte pieces may be read whole
  float steps;   // of the grid that a cosine is rounded to
};

// x is null where only the lists are asked for.
struct BipartiteRows {
  const void* x;
  void* y;
  int64_t batch, row;  // strides in elements
  int item, per_row;   // bytes of an element, accesses of a row
  int64_t bytes;       // of a row
  // What is read ahead of its use: by the match, tokens of all before this one; by a block that merges, so many more.
  int64_t ahead;
  int more_ahead;
};

// Tokens first .. end of a sequence, a warp per row.
VIDTOK_DEVICE void prefetch_rows(const BipartiteSequence& s, const BipartiteRows& rows, int64_t first, int64_t end) {
  const uint8_t* const x =
      static_cast<const uint8_t*>(rows.x) + (s.packed ? s.begin * rows.row : s.index * rows.batch) * rows.item;
  for (int64_t token = first + warp(); token < end; token += warps())
    for (int64_t b = lane() * 32; b < rows.bytes; b += kWarp * 32) prefetch(x + token * rows.row * rows.item + b);
}

// Rounded cosines as keys: 0 is no source, 1 a NaN, then −1 .. 1 in steps of the grid.
struct CosineKey {};
template <>
struct OrderKey<CosineKey> {
  using Key = uint32_t;
  static constexpr int kBits = 22, kDigit = 11;
};

constexpr int kStripRows = 16;      // sources of a warp
constexpr int kStripColumns = 64;   // destinations of a step
constexpr int kPieces = 8;          // accesses of 16 bytes that a row has in a chunk
constexpr int kSumTile = 320;       // floats that a warp needs to read sums of wmma
constexpr int kResidentChunks = 4;  // rows of sources stay in shared memory up to so many chunks

// Chunks of rows in shared memory: 128 bytes and a gap that spreads neighbouring rows over the banks.
template <class E>
constexpr int kChunk = kPieces * kPerAccess<E>;
template <class E>
constexpr int kChunkPitch = kChunk<E> + kPerAccess<E>;

// 16 rows of a warp against 64 columns; a thread holds kRows x kColumns of the dot products, kWidth neighbouring lanes
// share a row. Those of a chunk start at zero and are added to the rest, which keeps errors small.
template <class E>
struct StripProduct {
  static_assert(sizeof(E) == 2, "tensor cores take 16-bit elements here");
  static constexpr bool kWmma = VIDTOK_SM < 80;
  static constexpr int kRows = 2, kColumns = 16, kWidth = 4;
  float sum[kStripColumns / 8][4];
  WmmaSum wmma[kWmma ? kStripColumns / 16 : 1];

  VIDTOK_DEVICE static int row(int i) { return lane() / 4 + 8 * i; }
  VIDTOK_DEVICE static int column(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  VIDTOK_DEVICE float at(int i, int j) const { return sum[j / 2][2 * i + j % 2]; }

  VIDTOK_DEVICE void clear() {
    VIDTOK_UNROLL
    for (int j = 0; j < kStripColumns / 8; ++j) {
      VIDTOK_UNROLL
      for (int e = 0; e < 4; ++e) sum[j][e] = 0.0f;
    }
    VIDTOK_UNROLL
    for (int j = 0; j < (kWmma ? kStripColumns / 16 : 1); ++j) wmma[j] = WmmaSum{};
  }

  VIDTOK_DEVICE void add(const E* a, const E* b) {
    constexpr int kPitch = kChunkPitch<E>;
    if constexpr (kWmma) {
      // fp16 only: the launcher refuses bf16 here.
      const f16 *const left = reinterpret_cast<const f16*>(a), *const right = reinterpret_cast<const f16*>(b);
      VIDTOK_UNROLL
      for (int j = 0; j < kStripColumns / 16; ++j) {
        WmmaSum part{};
        VIDTOK_UNROLL
        for (int k = 0; k < kChunk<E>; k += 16)
          wmma_multiply(part, wmma_load_a(left + k, kPitch), wmma_load_b(right + 16 * j * kPitch + k, kPitch));
        VIDTOK_UNROLL
        for (int e = 0; e < 8; ++e) wmma[j].r[e] += part.r[e];
      }
    } else {
      const int l = lane();
      uint32_t left[kPieces / 2][4];
      VIDTOK_UNROLL
      for (int k = 0; k < kPieces / 2; ++k) load_matrices(left[k], a + l % 16 * kPitch + 16 * k + l / 16 * 8);
      VIDTOK_UNROLL
      for (int j = 0; j < kStripColumns / 8; j += 2) {
        float part[2][4] = {};
        VIDTOK_UNROLL
        for (int k = 0; k < kPieces / 2; ++k) {
          uint32_t y[4];
          load_matrices(y, b + (8 * j + l % 8 + l / 16 * 8) * kPitch + 16 * k + l / 8 % 2 * 8);
          mma_16816<E>(part[0], left[k], {y[0], y[1]});
          mma_16816<E>(part[1], left[k], {y[2], y[3]});
        }
        VIDTOK_UNROLL
        for (int e = 0; e < 8; ++e) sum[j + e / 4][e % 4] += part[e / 4][e % 4];
      }
    }
  }

  // Brings sums of wmma, whose layout is not documented, into the order of the others; tile: kSumTile floats.
  VIDTOK_DEVICE void finish(float* tile) {
    if constexpr (kWmma) {
      constexpr int kStride = 20;
      const float* const mine = tile + lane() / 4 * kStride + lane() % 4 * 2;
      VIDTOK_UNROLL
      for (int j = 0; j < kStripColumns / 16; ++j) {
        wmma_store(tile, kStride, wmma[j]);
        warp_sync();
        VIDTOK_UNROLL
        for (int e = 0; e < 8; ++e) sum[2 * j + e / 4][e % 4] = mine[e % 4 / 2 * 8 * kStride + e / 4 * 8 + e % 2];
        warp_sync();
      }
    } else {
      (void)tile;
    }
  }
};

template <>
struct StripProduct<float> {
  static constexpr int kRows = 4, kColumns = 8, kWidth = 8;
  float sum[kRows][kColumns];

  VIDTOK_DEVICE static int row(int i) { return lane() / kWidth + 4 * i; }
  VIDTOK_DEVICE static int column(int j) { return lane() % kWidth + kWidth * j; }
  VIDTOK_DEVICE float at(int i, int j) const { return sum[i][j]; }

  VIDTOK_DEVICE void clear() {
    VIDTOK_UNROLL
    for (int i = 0; i < kRows; ++i) {
      VIDTOK_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[i][j] = 0.0f;
    }
  }

  VIDTOK_DEVICE void add(const float* a, const float* b) {
    constexpr int kVec = kPerAccess<float>, kPitch = kChunkPitch<float>, kAtOnce = kColumns / 2;
    VIDTOK_UNROLL
    for (int first = 0; first < kColumns; first += kAtOnce) {
      float part[kRows][kAtOnce] = {};
      for (int p = 0; p < kPieces; ++p) {
        Vec<float, kVec> left[kRows];
        VIDTOK_UNROLL
        for (int i = 0; i < kRows; ++i) left[i] = load<float, kVec>(a + row(i) * kPitch + p * kVec);
        VIDTOK_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
          const Vec<float, kVec> right = load<float, kVec>(b + column(first + j) * kPitch + p * kVec);
          VIDTOK_UNROLL
          for (int i = 0; i < kRows; ++i) {
            VIDTOK_UNROLL
            for (int e = 0; e < kVec; ++e) part[i][j] = fused(left[i].v[e], right.v[e], part[i][j]);
          }
        }
      }
      VIDTOK_UNROLL
      for (int i = 0; i < kRows; ++i) {
        VIDTOK_UNROLL
        for (int j = 0; j < kAtOnce; ++j) sum[i][first + j] += part[i][j];
      }
    }
  }

  VIDTOK_DEVICE void finish(float*) {}
};

// T: the metric's type. MEAN: rows are means over heads, taken in fp32; their products are fp32 as well.
template <class T, bool MEAN>
struct MetricElement {
  using Type = T;
};
template <class T>
struct MetricElement<T, true> {
  using Type = float;
};

// Chunk at channel k of `rows` rows: slots first .. below `end`, even or odd tokens.
template <class T, bool MEAN, class E>
VIDTOK_DEVICE void load_chunk(const BipartiteMetric& metric, const T* sequence, int odd, int first, int end, int rows,
                              int k, E* to) {
  constexpr int kVec = kPerAccess<E>;
  for (int i = thread(); i < rows * kPieces; i += threads()) {
    const int row = i / kPieces, slot = first + row, column = k + i % kPieces * kVec;
    E* const at = to + row * kChunkPitch<E> + i % kPieces * kVec;
    const int valid = slot < end ? smaller(kVec, metric.dim - column) : 0;
    const T* const from = sequence + (2 * int64_t(slot) + odd) * metric.row + column;
    if constexpr (MEAN) {
      float sum[kVec] = {};
      for (int h = 0; h < metric.heads && valid > 0; ++h) {
        const T* const head = from + h * metric.head;
        Vec<T, kVec> piece{};
        if (metric.aligned) {
          piece = load<T, kVec>(head);
        } else {
          VIDTOK_UNROLL
          for (int v = 0; v < kVec; ++v)
            if (v < valid) piece.v[v] = head[v];
        }
        VIDTOK_UNROLL
        for (int v = 0; v < kVec; ++v) sum[v] += to_float(piece.v[v]);
      }
      Vec<float, kVec> mean;
      VIDTOK_UNROLL
      for (int v = 0; v < kVec; ++v) mean.v[v] = sum[v] / float(metric.heads);
      store(at, mean);
    } else if (metric.aligned) {
      copy_async(at, valid > 0 ? from : sequence, valid > 0);
    } else {
      VIDTOK_UNROLL
      for (int v = 0; v < kVec; ++v) at[v] = v < valid ? from[v] : T{};
    }
  }
}

// 1/‖row‖, 0 for a zero row, NaN where the square is not finite.
VIDTOK_DEVICE float inverse_norm(float square) {
  if (square == 0.0f) return 0.0f;
  return square < infinity<float>() ? 1.0f / sqrtf(square) : infinity<float>() - infinity<float>();
}

// Adds the squares of a chunk to norm[row]; the last chunk makes it the inverse norm. Four lanes per row, whatever the
// block.
template <class E>
VIDTOK_DEVICE void add_squares(const E* chunk, int rows, bool begins, bool ends, float* norm) {
  constexpr int kVec = kPerAccess<E>;
  for (int i = thread(); i < rows * 4; i += threads()) {
    const E* const at = chunk + i / 4 * kChunkPitch<E> + i % 4 * kVec;
    float sum = 0.0f;
    VIDTOK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Vec<E, kVec> piece = load<E, kVec>(at + half * 4 * kVec);
      VIDTOK_UNROLL
      for (int v = 0; v < kVec; ++v) sum = fused(to_float(piece.v[v]), to_float(piece.v[v]), sum);
    }
    sum = warp_sum<4>(sum);
    if (i % 4 != 0) continue;
    if (!begins) sum += norm[i / 4];
    norm[i / 4] = ends ? inverse_norm(sum) : sum;
  }
}

// Shared memory of a strip.
template <class E, int WARPS>
struct StripMemory {
  static constexpr int kTile = kStripRows * WARPS;
  E *sources, *destinations;
  float *sums, *source_norm, *destination_norm;
  VIDTOK_DEVICE StripMemory(Carver& shared, int chunks)
      : sources(even_line(shared.take<unsigned char>(int64_t(held(chunks)) * kTile * kChunkPitch<E> * sizeof(E) + 16))),
        destinations(even_line(shared.take<unsigned char>(2 * kStripColumns * kChunkPitch<E> * sizeof(E) + 16))),
        sums(VIDTOK_SM < 80 && sizeof(E) == 2
                 ? reinterpret_cast<float*>(even_line(shared.take<unsigned char>(WARPS * kSumTile * 4 + 16)))
                 : nullptr),
        source_norm(shared.take<float>(kTile)),
        destination_norm(shared.take<float>(2 * kStripColumns)) {}
  VIDTOK_DEVICE static int held(int chunks) { return chunks <= kResidentChunks ? chunks : 2; }
  // wmma reads from multiples of 32 bytes.
  VIDTOK_DEVICE static E* even_line(unsigned char* p) {
    return reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(p) + 16) / 32 * 32);
  }
};

// key[slot], target[slot] for the slots first_slot .. + kTile of one sequence.
template <class T, bool MEAN, int WARPS, class E>
VIDTOK_DEVICE void match_strip(const BipartiteMetric& metric, const BipartiteSequence& s, int first_slot,
                               const StripMemory<E, WARPS>& memory, uint32_t* key, int32_t* target) {
  constexpr int kTile = kStripRows * WARPS, kSourceChunk = kTile * kChunkPitch<E>,
                kDestinationChunk = kStripColumns * kChunkPitch<E>;
  using Product = StripProduct<E>;
  const T* const rows = static_cast<const T*>(metric.data) + (s.packed ? s.begin * metric.row : s.index * metric.batch);
  const int source_end = s.first_source + s.sources, destination_end = s.first_destination + s.destinations;
  const int chunks = larger(1, (metric.dim + kChunk<E> - 1) / kChunk<E>);
  const bool resident = chunks <= kResidentChunks;
  const int steps = (s.destinations + kStripColumns - 1) / kStripColumns * chunks;
  const auto source_chunk = [&](int step) {
    return memory.sources + (resident ? step % chunks : step & 1) * kSourceChunk;
  };
  const auto issue = [&](int step) {
    const int tile = step / chunks, k = step % chunks * kChunk<E>;
    load_chunk<T, MEAN>(metric, rows, 1, s.first_destination + tile * kStripColumns, destination_end, kStripColumns, k,
                        memory.destinations + (step & 1) * kDestinationChunk);
    if (tile == 0 || !resident)
      load_chunk<T, MEAN>(metric, rows, 0, first_slot, source_end, kTile, k, source_chunk(step));
    copy_commit();
  };
  Product product;
  float best[Product::kRows];
  int at[Product::kRows];
  VIDTOK_UNROLL
  for (int i = 0; i < Product::kRows; ++i) {
    best[i] = -infinity<float>();
    at[i] = 0;
  }
  block_sync();  // an earlier strip may still be read
  issue(0);
  for (int step = 0; step < steps; ++step) {
    const int tile = step / chunks, chunk = step - tile * chunks;
    if (step + 1 < steps) {
      issue(step + 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    block_sync();
    const E* const left = source_chunk(step);
    const E* const right = memory.destinations + (step & 1) * kDestinationChunk;
    const bool begins = chunk == 0, ends = chunk + 1 == chunks;
    float* const destination_norm = memory.destination_norm + (tile & 1) * kStripColumns;
    add_squares(right, kStripColumns, begins, ends, destination_norm);
    if (tile == 0) add_squares(left, kTile, begins, ends, memory.source_norm);
    if (begins) product.clear();
    product.add(left + warp() * kStripRows * kChunkPitch<E>, right);
    block_sync();
    if (!ends) continue;
    product.finish(memory.sums + warp() * kSumTile);
    const int first = s.first_destination + tile * kStripColumns;
    VIDTOK_UNROLL
    for (int i = 0; i < Product::kRows; ++i) {
      const float of_source = memory.source_norm[warp() * kStripRows + Product::row(i)];
      VIDTOK_UNROLL
      for (int j = 0; j < Product::kColumns; ++j) {
        const int slot = first + Product::column(j);
        const float cosine = product.at(i, j) * of_source * destination_norm[Product::column(j)];
        float score = rintf(smaller(larger(cosine, -1.0f), 1.0f) * metric.steps);
        if (!(score == score)) score = -metric.steps - 1.0f;
        if (score > best[i] && slot < destination_end && s.is_destination(slot)) {
          best[i] = score;
          at[i] = slot;
        }
      }
    }
  }
  VIDTOK_UNROLL
  for (int i = 0; i < Product::kRows; ++i) {
    const bool any = best[i] > -infinity<float>();
    const uint64_t pair = warp_reduce<Product::kWidth>(
        any ? order_pair(uint32_t(int(best[i] + metric.steps) + 2), uint32_t(at[i])) : uint64_t(0), Max());
    const int slot = first_slot + warp() * kStripRows + Product::row(i);
    if (lane() % Product::kWidth == 0 && slot < source_end) {
      key[slot] = s.is_source(slot) ? pair_key(pair) : 0;
      target[slot] = int32_t(pair_index(pair));
    }
  }
}

}  // namespace vidtok::cuda
