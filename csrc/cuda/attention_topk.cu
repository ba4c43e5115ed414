// Attention importance of keys, and the best of each group of spans. The keys are cut into splits of fixed length:
//   sums     the largest logit and Σ exp(logit − it) of every split and query row;
//   combine  those of whole rows, in the order of the splits;
//   scores   of the spans' tokens, over heads and rows in order; then topk_select takes the best, or several blocks
//            do where a group holds many.
// With few query rows the logits are kept between sums and scores: they are fewer bytes than the keys. With many,
// shares computes them again and adds them up into one number per key; rows then pass in parts of fixed size.
#include "cuda/attention_topk_many.h"
#include "cuda/tile/atomic.h"
#include "cuda/tile/logits.h"
#include "cuda/tile/score.h"

namespace vidtok::cuda {

constexpr int kSumsThreads = 256;  // at most
// Blocks of that size that an SM should hold, which bounds their registers; 0 leaves it to the compiler.
template <int NR>
constexpr int kSumsBlocks = NR == 4                     ? 0
                            : NR == 2 && VIDTOK_SM < 80 ? 1
                                                        : 2;

// What the kernels share: a part of the batch, and of each head's query rows.
template <class T>
struct AttentionPart {
  const T* query;
  const T* key;
  const uint8_t* mask;
  const int64_t* position;
  int64_t key_batch, key_head, key_row, width, length, dim;
  int64_t splits;
  float scale;
  int batch0, batches, first_row, at_once;  // batch rows and rows of each head in this part
  int kv_heads, heads_per_key;
  int split, stages;
  bool aligned;

  VIDTOK_DEVICE int rows() const { return heads_per_key * at_once; }
  VIDTOK_DEVICE const T* keys_of(int b, int head) const { return key + (batch0 + b) * key_batch + head * key_head; }
  VIDTOK_DEVICE QueryRows<T> queries_of(int b, int head) const {
    const int64_t first = (int64_t(batch0 + b) * kv_heads + head) * heads_per_key * width * dim;
    return {query + first, width, first_row, at_once, rows()};
  }
  // The last key that row r of a head sees; none for rows beyond the last.
  VIDTOK_DEVICE int last_key(int b, int r) const {
    if (r >= rows()) return -1;
    if (position == nullptr) return int(length - 1);
    return int(larger(smaller(position[(batch0 + b) * width + first_row + r % at_once], length - 1), int64_t(-1)));
  }
  VIDTOK_DEVICE bool shown(int b, int at) const {
    return at < length && (mask == nullptr || mask[(batch0 + b) * length + at] != 0);
  }
};

// Of a split and row; sum is −1 where the row sees none of the split's keys.
struct alignas(8) SplitSum {
  float top, sum;
};
// Of a row: share = exp(logit − top) · inverse. inverse is 0 for a row that sees nothing, NaN for one without a
// softmax.
struct alignas(8) RowShare {
  float top, inverse;
};

template <class T, int NR>
__global__ void __launch_bounds__(kSumsThreads, kSumsBlocks<NR>)
    attention_topk_sums_kernel(AttentionPart<T> part, SplitSum* sums, float* logits, int32_t* counts, int64_t zeros) {
  using Tile = LogitTile<T, NR>;
  // What the kernels after this one count in.
  for (int64_t i = block() * threads() + thread(); i < zeros; i += blocks() * threads()) counts[i] = 0;
  VIDTOK_SMEM(shared);
  const int tile_keys = warps() * kKeysPerWarp;
  unsigned char* const stages = shared.take<unsigned char>(part.stages * ((tile_keys + Tile::kRows) * Tile::kPitch));
  float* const scratch = shared.take<float>(2 * warps() * Tile::kRows);
  const int row_tiles = (part.rows() + Tile::kRows - 1) / Tile::kRows;
  const int64_t rest = block() / row_tiles, head_at = rest / part.splits, split = rest - head_at * part.splits;
  const int row0 = int(block() - rest * row_tiles) * Tile::kRows;
  const int b = int(head_at / part.kv_heads), head = int(head_at % part.kv_heads);
  const int start = int(split * part.split), stop = int(smaller(int64_t(start) + part.split, part.length));
  const int g = lane() / 4, t = lane() % 4;
  int last[NR][2];
  float top[NR][2], total[NR][2];
  unsigned seen = 0;
  VIDTOK_UNROLL
  for (int n = 0; n < NR; ++n) {
    VIDTOK_UNROLL
    for (int e = 0; e < 2; ++e) {
      last[n][e] = part.last_key(b, row0 + 8 * n + 2 * t + e);
      top[n][e] = -infinity<float>();
      total[n][e] = 0.0f;
    }
  }
  const T* const keys = part.keys_of(b, head);
  const QueryRows<T> queries = part.queries_of(b, head);
  float* const kept = logits == nullptr ? nullptr : logits + head_at * part.rows() * part.length;
  Tile tile(stages, part.stages, part.dim, part.key_row, part.aligned);
  tile.each((stop - start + tile_keys - 1) / tile_keys,
            [&](int64_t i, const T*& key, int& count, QueryRows<T>& q, int& row) {
              const int at = start + int(i) * tile_keys;
              key = keys + at * part.key_row;
              count = smaller(stop - at, tile_keys);
              q = queries;
              row = row0;
            },
            [&](int64_t i, const float (&sum)[NR][4]) {
              const int at = start + int(i) * tile_keys + warp() * kKeysPerWarp + g;
              const bool shown[2] = {at < stop && part.shown(b, at), at + 8 < stop && part.shown(b, at + 8)};
              VIDTOK_UNROLL
              for (int n = 0; n < NR; ++n) {
                VIDTOK_UNROLL
                for (int e = 0; e < 2; ++e) {
                  const int row = row0 + 8 * n + 2 * t + e;
                  float x[2];
                  VIDTOK_UNROLL
                  for (int k = 0; k < 2; ++k) {
                    const bool sees = shown[k] && at + 8 * k <= last[n][e];
                    x[k] = sees ? sum[n][2 * k + e] * part.scale : -infinity<float>();
                    if (sees) seen |= 1u << (2 * n + e);
                    if (kept != nullptr && row < part.rows() && at + 8 * k < stop)
                      kept[row * part.length + at + 8 * k] = x[k];
                  }
                  const float higher = larger(larger(top[n][e], x[0]), x[1]);
                  const float base = higher == -infinity<float>() ? 0.0f : higher;
                  total[n][e] = total[n][e] * exp_not_above_0(top[n][e] - base) +
                                (exp_not_above_0(x[0] - base) + exp_not_above_0(x[1] - base));
                  top[n][e] = higher;
                }
              }
            });
  // Over the lanes that share a row, then over the warps in order; sums are brought to the common largest first.
  VIDTOK_UNROLL
  for (int n = 0; n < NR; ++n) {
    VIDTOK_UNROLL
    for (int e = 0; e < 2; ++e) {
      float highest = top[n][e];
      VIDTOK_UNROLL
      for (int m = 4; m < kWarp; m <<= 1) highest = larger(highest, shuffle_xor(highest, m));
      const float base = highest == -infinity<float>() ? 0.0f : highest;
      float sum = total[n][e] * exp_not_above_0(top[n][e] - base);
      VIDTOK_UNROLL
      for (int m = 4; m < kWarp; m <<= 1) sum += shuffle_xor(sum, m);
      unsigned any = seen >> (2 * n + e) & 1u;
      VIDTOK_UNROLL
      for (int m = 4; m < kWarp; m <<= 1) any |= shuffle_xor(any, m);
      if (g == 0) {
        float* const to = scratch + 2 * (warp() * Tile::kRows + 8 * n + 2 * t + e);
        to[0] = highest;
        to[1] = any != 0 ? sum : -1.0f;
      }
    }
  }
  block_sync();
  for (int r = thread(); r < Tile::kRows && row0 + r < part.rows(); r += threads()) {
    float highest = -infinity<float>(), sum = 0.0f;
    bool any = false;
    for (int w = 0; w < warps(); ++w) highest = larger(highest, scratch[2 * (w * Tile::kRows + r)]);
    const float base = highest == -infinity<float>() ? 0.0f : highest;
    for (int w = 0; w < warps(); ++w) {
      const float* const from = scratch + 2 * (w * Tile::kRows + r);
      if (from[1] < 0.0f) continue;
      any = true;
      sum += from[1] * exp_not_above_0(from[0] - base);
    }
    sums[(head_at * part.rows() + row0 + r) * part.splits + split] = {highest, any ? sum : -1.0f};
  }
}

// One warp per query row. used: rows that see a key, per batch row; broken: whether one has no softmax.
__global__ void attention_topk_combine_kernel(const SplitSum* sums, RowShare* shares, int64_t rows, int64_t splits,
                                              int64_t rows_of_batch, int32_t* used, int32_t* broken) {
  const int64_t row = block() * warps() + warp();
  if (row >= rows) return;
  const SplitSum* const from = sums + row * splits;
  float top = -infinity<float>();
  for (int64_t s = lane(); s < splits; s += kWarp)
    if (!(from[s].sum < 0.0f)) top = larger(top, from[s].top);
  top = warp_max(top);
  const float base = top == -infinity<float>() ? 0.0f : top;
  float total = 0.0f;
  unsigned any = 0;
  for (int64_t s = 0; s < splits; s += kWarp) {
    const SplitSum one = s + lane() < splits ? from[s + lane()] : SplitSum{0.0f, -1.0f};
    const bool counts = !(one.sum < 0.0f);
    any |= ballot(counts);
    const float mine = counts ? one.sum * exp_not_above_0(one.top - base) : 0.0f;
    VIDTOK_UNROLL
    for (int l = 0; l < kWarp; ++l) total += shuffle(mine, l);
  }
  if (lane() != 0) return;
  RowShare out{base, 0.0f};
  if (any != 0) {
    out.inverse = 1.0f / total;
    atomic_add(used + row / rows_of_batch, 1);
    if (!(out.inverse < infinity<float>())) {
      out.inverse = bits_as<float>(0x7fc00000u);
      atomic_max(broken + row / rows_of_batch, 1);
    }
  }
  shares[row] = out;
}

// Adds the shares of this part's rows to table[batch row][key]; rows in tiles, tiles and heads in order.
template <class T, int NR>
__global__ void __launch_bounds__(kSumsThreads)
    attention_topk_shares_kernel(AttentionPart<T> part, const RowShare* shares, const int64_t* span, int64_t spans,
                                 bool use_max, bool fresh, float* table) {
  using Tile = LogitTile<T, NR>;
  VIDTOK_SMEM(shared);
  const int tile_keys = warps() * kKeysPerWarp;
  unsigned char* const stages = shared.take<unsigned char>(part.stages * ((tile_keys + Tile::kRows) * Tile::kPitch));
  int32_t* const scratch = shared.take<int32_t>(kWarp);
  const int64_t key_tiles = (part.length + tile_keys - 1) / tile_keys;
  const int b = int(block() / key_tiles);
  const int start = int(block() % key_tiles) * tile_keys;
  // Tiles outside all spans are left alone.
  int32_t wanted = 0;
  for (int64_t s = thread(); s < spans; s += threads()) {
    const int64_t* const one = span + s * 5;
    if (one[0] == part.batch0 + b && one[1] < start + tile_keys && one[2] > start) wanted = 1;
  }
  if (block_max(wanted, scratch) == 0) return;
  const int g = lane() / 4, t = lane() % 4;
  const int at = start + warp() * kKeysPerWarp + g;
  const bool shown[2] = {part.shown(b, at), part.shown(b, at + 8)};
  const int row_tiles = (part.rows() + Tile::kRows - 1) / Tile::kRows;
  float out[2] = {0.0f, 0.0f};
  Tile tile(stages, part.stages, part.dim, part.key_row, part.aligned);
  tile.each(
      int64_t(part.kv_heads) * row_tiles,
      [&](int64_t i, const T*& key, int& count, QueryRows<T>& q, int& row) {
        const int head = int(i / row_tiles);
        key = part.keys_of(b, head) + start * part.key_row;
        count = int(smaller(part.length - start, int64_t(tile_keys)));
        q = part.queries_of(b, head);
        row = int(i % row_tiles) * Tile::kRows;
      },
      [&](int64_t i, const float (&sum)[NR][4]) {
        const int row0 = int(i % row_tiles) * Tile::kRows;
        const RowShare* const of_head = shares + (int64_t(b) * part.kv_heads + i / row_tiles) * part.rows();
        VIDTOK_UNROLL
        for (int n = 0; n < NR; ++n) {
          VIDTOK_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int row = row0 + 8 * n + 2 * t + e;
            if (row >= part.rows()) continue;
            const int last = part.last_key(b, row);
            const RowShare of = of_head[row];
            VIDTOK_UNROLL
            for (int k = 0; k < 2; ++k) {
              const bool sees = shown[k] && at + 8 * k <= last;
              const float x = sees ? sum[n][2 * k + e] * part.scale : -infinity<float>();
              const float share = exp_not_above_0(x - of.top) * of.inverse;
              out[k] = use_max ? larger(out[k], share) : out[k] + share;
            }
          }
        }
      });
  VIDTOK_UNROLL
  for (int k = 0; k < 2; ++k) {
    VIDTOK_UNROLL
    for (int m = 1; m < 4; m <<= 1) {
      const float other = shuffle_xor(out[k], m);
      out[k] = use_max ? larger(out[k], other) : out[k] + other;
    }
    if (t != 0 || at + 8 * k >= part.length) continue;
    float* const to = table + (part.batch0 + b) * part.length + at + 8 * k;
    const float before = fresh ? 0.0f : *to;
    *to = use_max ? larger(before, out[k]) : before + out[k];
  }
}

// Scores of the spans' tokens in the batch rows from batch0 on: from the logits of `rows` query rows, or, without
// logits, from the table. place: the key of each token, and packed its score, in the order of the groups. With
// many.count the high digits of the scores are counted.
__global__ void attention_topk_scores_kernel(const float* logits, const RowShare* shares, const float* table,
                                             const int32_t* used, const int32_t* broken, const int64_t* span,
                                             int64_t spans, int64_t tokens, int64_t length, int64_t rows, int batch0,
                                             int batches, bool use_max, float* score, float* packed, int32_t* place,
                                             ManyGroups many) {
  const int64_t at = smaller(block() * threads() + thread(), tokens - 1);
  int64_t low = 0, high = spans - 1;  // the last span that begins at or before the token
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (span[middle * 5 + 3] <= at)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t* const one = span + low * 5;
  const int64_t row = one[0], key = one[1] + (at - one[3]), behind = one[4] + (at - one[3]);
  const bool mine = block() * threads() + thread() < tokens && row >= batch0 && row < batch0 + batches;
  float out = 0.0f;
  if (mine) {
    if (logits == nullptr) {
      out = table[row * length + key];
    } else {
      constexpr int kAtOnce = 8;
      const RowShare* const of = shares + (row - batch0) * rows;
      const float* const from = logits + (row - batch0) * rows * length + key;
      for (int64_t r = 0; r < rows; r += kAtOnce) {
        float x[kAtOnce];
        VIDTOK_UNROLL
        for (int i = 0; i < kAtOnce; ++i) x[i] = r + i < rows ? from[(r + i) * length] : 0.0f;
        VIDTOK_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (r + i >= rows) continue;
          const float share = exp_not_above_0(x[i] - of[r + i].top) * of[r + i].inverse;
          out = use_max ? larger(out, share) : out + share;
        }
      }
    }
    if (!use_max) out /= float(larger(used[row], 1));
    if (broken[row] != 0) out = bits_as<float>(0x7fc00000u);
    out = round_16_bits(out);
    score[at] = out;
    place[behind] = int32_t(key);
    if (packed != nullptr) packed[behind] = out;
  }
  if (many.count == nullptr) return;
  const int64_t group = many.of(behind);
  count_digit(many.count, mine, group * (2 * kDigitBins) + (score_key(out) >> kLowBits));
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include <type_traits>

#include "cuda/attention_topk.h"
#include "cuda/tile/launch.h"
#include "cuda/topk_select.h"

namespace vidtok::cuda {
namespace {

// Bytes of partial sums of one batch row that are there together, and of all of them with the logits.
constexpr int64_t kSumsBytes = int64_t(64) << 20, kPartBytes = int64_t(256) << 20;
constexpr int kThreads = 256;

// Whether several blocks select from a group.
bool many_tokens(const AttentionTopkArgs& a) {
  return a.tokens >= kManyTokens * a.groups && a.tokens <= kMostTokens && a.groups > 0;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Workspace {
  SplitSum* sums;
  RowShare* shares;
  float *logits, *table, *packed;
  int32_t *used, *digits, *place;
  int64_t bytes;
  int64_t splits, at_once, batches;  // splits; query rows of a head and batch rows that are there together
  bool kept;
};

// How the work is cut follows from the extents and the table alone. `base` may be null when only the size is asked for.
Workspace divided(const AttentionTopkArgs& a, const AttentionTopkChoice& choice, unsigned char* base) {
  Workspace w{};
  const int64_t rows = a.q_heads / a.kv_heads * a.width;
  w.kept = 8 * rows <= a.dim * size_of(a.dtype);
  w.splits = ceil_div(a.length, choice.split);
  const int64_t of_row = a.q_heads * w.splits * int64_t(sizeof(SplitSum));  // of a query row of each head
  w.at_once = a.width;
  if (!w.kept && of_row * w.at_once > kSumsBytes) w.at_once = kSumsBytes / of_row > 0 ? kSumsBytes / of_row : 1;
  const int64_t of_batch = of_row * w.at_once + (w.kept ? a.q_heads * a.width * a.length * 4 : 0);
  w.batches = of_batch * a.batch <= kPartBytes ? a.batch : kPartBytes / of_batch > 0 ? kPartBytes / of_batch : 1;
  const auto take = [&](auto*& piece, int64_t count) {
    using Item = std::remove_reference_t<decltype(*piece)>;
    piece = reinterpret_cast<Item*>(base + w.bytes);
    if (count == 0 || base == nullptr) piece = nullptr;
    w.bytes += carved<Item>(count);
  };
  const int64_t together = w.batches * a.q_heads * w.at_once;
  take(w.sums, together * w.splits);
  take(w.shares, together);
  take(w.logits, w.kept ? together * a.length : 0);
  take(w.table, w.kept ? 0 : a.batch * a.length);
  take(w.used, 2 * a.batch);
  take(w.digits, a.tokens <= kMostTokens ? a.tokens / kManyTokens * (2 * kDigitBins) : 0);
  take(w.place, a.tokens);
  take(w.packed, a.ordered ? 0 : a.tokens);
  return w;
}

// Stages that fit: three tiles under way on large SMs, two on small ones, one where copies do not overlap.
int stages_of(int warps, int rows, const Launch& on) {
  int stages = on.sm < 80 ? 1 : on.sm == 86 || on.sm == 89 ? 2 : 3;
  while (stages > 1 && stages * logit_stage(warps, rows) + 4096 > shared_limit(on.sm)) --stages;
  return stages;
}

template <class T, int NR>
Status sums_of(const AttentionTopkArgs& a, const Workspace& w, AttentionPart<T> part, int warps, int64_t zeros,
               const Launch& on) {
  part.stages = stages_of(warps, 8 * NR, on);
  const int64_t row_tiles = ceil_div(a.q_heads / a.kv_heads * part.at_once, 8 * NR);
  const int64_t shared =
      carved<unsigned char>(part.stages * logit_stage(warps, 8 * NR)) + carved<float>(2 * warps * 8 * NR);
  return VIDTOK_LAUNCH((attention_topk_sums_kernel<T, NR>), part.batches * a.kv_heads * w.splits * row_tiles,
                       warps * kWarp, shared, on, part, w.sums, w.logits, w.used, zeros);
}

template <class T>
Status part_of(const AttentionTopkArgs& a, const Workspace& w, const AttentionTopkChoice& choice, AttentionPart<T> part,
               int64_t zeros, const Launch& on) {
  const int64_t of_key = a.q_heads / a.kv_heads * part.at_once, of_batch = a.q_heads * part.at_once;
  Status status = of_key <= 8    ? sums_of<T, 1>(a, w, part, choice.warps, zeros, on)
                  : of_key <= 16 ? sums_of<T, 2>(a, w, part, choice.warps, zeros, on)
                                 : sums_of<T, 4>(a, w, part, choice.warps, zeros, on);
  if (status != Status::ok) return status;
  constexpr int kCombineThreads = 128;
  const int64_t rows = part.batches * of_batch;
  status =
      VIDTOK_LAUNCH(attention_topk_combine_kernel, ceil_div(rows, kCombineThreads / kWarp), kCombineThreads, 0, on,
                    w.sums, w.shares, rows, w.splits, of_batch, w.used + part.batch0, w.used + a.batch + part.batch0);
  if (status != Status::ok || w.kept) return status;
  constexpr int NR = 4;
  part.stages = stages_of(choice.warps, 8 * NR, on);
  const int64_t shared =
      carved<unsigned char>(part.stages * logit_stage(choice.warps, 8 * NR)) + carved<int32_t>(kWarp);
  return VIDTOK_LAUNCH((attention_topk_shares_kernel<T, NR>),
                       part.batches * ceil_div(a.length, choice.warps * kKeysPerWarp), choice.warps * kWarp, shared, on,
                       part, w.shares, a.span, a.spans, a.use_max, part.first_row == 0, w.table);
}

template <class T>
Status scores_of(const AttentionTopkArgs& a, const Workspace& w, int select_threads, const AttentionTopkChoice& choice,
                 const Launch& on) {
  const ManyGroups many{a.group, a.groups, a.keep, a.keep_start, many_tokens(a) ? w.digits : nullptr};
  Status status = Status::ok;
  const auto bits = reinterpret_cast<uintptr_t>(a.query) | reinterpret_cast<uintptr_t>(a.key) |
                    uintptr_t((a.dim | a.key_row | a.key_head | a.key_batch) * size_of(a.dtype));
  AttentionPart<T> part{};
  part.query = static_cast<const T*>(a.query), part.key = static_cast<const T*>(a.key);
  part.mask = a.mask, part.position = a.position;
  part.key_batch = a.key_batch, part.key_head = a.key_head, part.key_row = a.key_row;
  part.width = a.width, part.length = a.length, part.dim = a.dim;
  part.splits = w.splits, part.split = choice.split, part.scale = a.scale;
  part.kv_heads = int(a.kv_heads), part.heads_per_key = int(a.q_heads / a.kv_heads);
  part.aligned = bits % 16 == 0;
  for (int64_t b = 0; b < a.batch; b += w.batches) {
    part.batch0 = int(b), part.batches = int(a.batch - b < w.batches ? a.batch - b : w.batches);
    for (int64_t row = 0; row < a.width && status == Status::ok; row += w.at_once) {
      part.first_row = int(row), part.at_once = int(a.width - row < w.at_once ? a.width - row : w.at_once);
      // The first part clears the counts; those of digits lie behind those of rows.
      const int32_t* const end =
          many.count != nullptr ? many.count + a.groups * (2 * kDigitBins) : w.used + 2 * a.batch;
      status = part_of<T>(a, w, choice, part, b == 0 && row == 0 ? end - w.used : 0, on);
    }
    if (status != Status::ok) return status;
    status = VIDTOK_LAUNCH(attention_topk_scores_kernel, ceil_div(a.tokens, kThreads), kThreads, 0, on, w.logits,
                           w.shares, w.table, w.used, w.used + a.batch, a.span, a.spans, a.tokens, a.length,
                           a.q_heads * a.width, part.batch0, part.batches, a.use_max, a.score, w.packed, w.place, many);
    if (status != Status::ok) return status;
  }
  const float* const score = w.packed != nullptr ? w.packed : a.score;
  if (many.count == nullptr)
    return topk_select({score, DType::f32, a.tokens, a.group, a.groups, a.keep, a.keep_start, w.place, a.index},
                       {select_threads}, on);
  const int64_t parts = a.tokens / kManyPart + a.groups, shared = carved<int32_t>(kWarp + 2);
  status = VIDTOK_LAUNCH(attention_topk_low_kernel, parts, kManyThreads, shared, on, many, score);
  if (status != Status::ok) return status;
  return VIDTOK_LAUNCH(attention_topk_write_kernel, parts, kManyThreads, shared + carved<int64_t>(kWarp), on, many,
                       score, w.place, a.index);
}

}  // namespace

int64_t attention_topk_workspace(const AttentionTopkArgs& a, const AttentionTopkChoice& choice) {
  return divided(a, choice, nullptr).bytes;
}

Status attention_topk(const AttentionTopkArgs& a, void* workspace, int select_threads,
                      const AttentionTopkChoice& choice, const Launch& on) {
  const Workspace w = divided(a, choice, static_cast<unsigned char*>(workspace));
  switch (a.dtype) {
    case DType::f32:
      return scores_of<float>(a, w, select_threads, choice, on);
    case DType::bf16:
      if (on.sm < 80) return fail(Status::value, "bf16 needs sm_80 or newer, got sm_%d", on.sm);
      return scores_of<bf16>(a, w, select_threads, choice, on);
    case DType::f16:
      return scores_of<f16>(a, w, select_threads, choice, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(a.dtype));
}

}  // namespace vidtok::cuda

#endif
