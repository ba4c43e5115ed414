// Bipartite matching and merging: one launch where a sequence is one block's work, else one that finds every source's
// best destination and one that selects and merges.
#include "cuda/bipartite_merge.h"

namespace vidtok::cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeResident = 3;  // blocks of an SM

template <class T, bool MEAN, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp, 1)
    bipartite_match_kernel(BipartiteMetric metric, BipartiteSequences all, int64_t parts, uint32_t* key,
                           int32_t* target, BipartiteRows rows) {
  using E = typename MetricElement<T, MEAN>::Type;
  constexpr int kTile = kStripRows * WARPS;
  VIDTOK_SMEM(shared);
  const StripMemory<E, WARPS> memory(shared, larger(1, (metric.dim + kChunk<E> - 1) / kChunk<E>));
  const BipartitePart at(all.cu, all.batch, 2 * kTile, parts, block());
  const BipartiteSequence s(all, at.sequence);
  const int64_t first = s.first_source + at.part * kTile;
  if (s.merges() > 0 && first < s.first_source + s.sources) {
    if (s.begin < rows.ahead) {
      const int64_t shares = (s.sources + kTile - 1) / kTile;
      prefetch_rows(s, rows, at.part * s.tokens / shares, (at.part + 1) * s.tokens / shares);
    }
    match_strip<T, MEAN, WARPS>(metric, s, int(first), memory, key + s.slots(), target + s.slots());
  }
}

// T: the type of x.
template <class T, int N>
__global__ void __launch_bounds__(kMergeThreads, VIDTOK_SM < 80 ? 2 : kMergeResident)
    bipartite_merge_kernel(BipartiteSequences all, int64_t parts, int per, const uint32_t* key, const int32_t* target,
                           BipartiteLists lists, BipartiteRows rows) {
  VIDTOK_SMEM(shared);
  const MergeMemory memory(shared, per, kMetMost);
  const BipartitePart at(all.cu_out, all.batch, per, parts, block());
  const BipartiteSequence s(all, at.sequence);
  const int64_t first = at.part * per;
  if (block() == 0 && thread() == 0) {
    lists.cu_in[all.batch] = lists.offset[lists.m] = int32_t(lists.n);
    if (lists.cu_out != nullptr) lists.cu_out[all.batch] = int32_t(lists.m);
  }
  if (first < s.outputs) {
    const int count = int(smaller(int64_t(per), s.outputs - first));
    if (s.begin >= rows.ahead && rows.more_ahead > 0) {
      const int64_t shares = (s.outputs + per - 1) / per, share = at.part * s.tokens / shares;
      prefetch_rows(s, rows, share, smaller(share + rows.more_ahead, (at.part + 1) * s.tokens / shares));
    }
    merge_lists(s, int(first), count, key + s.slots(), target + s.slots(), lists, memory);
    if (rows.x != nullptr) merge_rows<T, N>(s, int(first), count, lists, rows, memory);
  } else if (first == 0 && thread() == 0) {
    lists.cu_in[s.index] = int32_t(s.begin);
  }
}

// A sequence per block, x of the metric's type in whole accesses; `most` is the tokens of the longest.
template <class T, bool MEAN, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp, 1)
    bipartite_block_kernel(BipartiteMetric metric, BipartiteSequences all, int most, BipartiteLists lists,
                           BipartiteRows rows) {
  using E = typename MetricElement<T, MEAN>::Type;
  constexpr int kTile = kStripRows * WARPS;
  VIDTOK_SMEM(shared);
  const StripMemory<E, WARPS> strip(shared, larger(1, (metric.dim + kChunk<E> - 1) / kChunk<E>));
  const MergeMemory memory(shared, most, (most + 1) / 2);
  uint32_t* const key = shared.take<uint32_t>((most + 1) / 2);
  int32_t* const target = shared.take<int32_t>((most + 1) / 2);
  const BipartiteSequence s(all, block());
  if (block() == 0 && thread() == 0) {
    lists.cu_in[all.batch] = lists.offset[lists.m] = int32_t(lists.n);
    if (lists.cu_out != nullptr) lists.cu_out[all.batch] = int32_t(lists.m);
  }
  if (s.outputs > 0) {
    prefetch_rows(s, rows, 0, smaller(rows.more_ahead, s.tokens));
    if (s.merges() > 0)
      for (int first = s.first_source; first < s.first_source + s.sources; first += kTile)
        match_strip<T, MEAN, WARPS>(metric, s, first, strip, key, target);
    block_sync();
    merge_lists(s, 0, s.outputs, key, target, lists, memory);
    if (rows.x != nullptr) merge_rows<T, kPerAccess<T>>(s, 0, s.outputs, lists, rows, memory);
  } else if (thread() == 0) {
    lists.cu_in[s.index] = int32_t(s.begin);
  }
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include <algorithm>
#include <initializer_list>

#include "cuda/bipartite.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

constexpr int kBlockWarps = 8;

// Everything a launch needs, made from the arguments.
struct Call {
  BipartiteMetric metric;
  BipartiteSequences all;
  BipartiteLists lists;
  BipartiteRows rows;
  DType dtype, x_dtype;
  int64_t longest, merges;  // merges of the sequences that are alike, else 1
  int accesses;             // elements of x in an access
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pairs of tokens of all sequences, odd ones included.
int64_t workspace_slots(int64_t tokens, int64_t batch) { return tokens / 2 + batch; }

bool whole(const void* p, int64_t bytes, int64_t size, std::initializer_list<int64_t> elements) {
  if (reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) != 0) return false;
  for (const int64_t e : elements)
    if (e * size % bytes != 0) return false;
  return true;
}

Call call_of(const BipartiteArgs& a, int64_t longest) {
  Call c{};
  const int64_t size = size_of(a.metric_dtype), x_size = size_of(a.x_dtype);
  const int64_t piece = a.heads > 1 ? 4 * size : 16;  // means are made four elements at a time
  c.dtype = a.metric_dtype;
  c.x_dtype = a.x == nullptr ? DType::f32 : a.x_dtype;
  c.longest = longest;
  const bool ragged = a.cu != nullptr;
  c.metric = {
      a.metric,
      ragged ? 0 : a.metric_batch,
      a.metric_head,
      a.metric_row,
      int(a.heads),
      int(a.cm),
      whole(a.metric, piece, size, {a.cm, a.metric_row, a.heads > 1 ? a.metric_head : 0, ragged ? 0 : a.metric_batch}),
      a.metric_dtype == DType::f32 ? 1048576.0f : 65536.0f};
  const int64_t outputs = ragged || a.batch == 0 ? 0 : a.m / a.batch;
  c.merges = ragged ? 1 : a.tokens - outputs;
  c.all = {a.cu, ragged ? a.cu_out : nullptr, a.batch, ragged ? 0 : a.tokens, outputs, a.prefix, a.mask};
  c.lists = {a.cu_in,
             ragged ? nullptr : a.cu_out,
             a.anchor,
             a.member,
             a.offset,
             a.weight,
             a.total,
             a.size,
             ragged ? a.tokens : a.batch * a.tokens,
             a.m};
  const bool vectors =
      a.x != nullptr && whole(a.x, 16, x_size, {a.c, a.x_row, ragged ? 0 : a.x_batch}) && whole(a.y, 16, x_size, {});
  c.accesses = vectors ? int(16 / x_size) : 1;
  c.rows = {a.x, a.y, ragged ? 0 : a.x_batch, a.x_row, int(x_size), int(a.c / c.accesses), a.c * x_size, 0, 0};
  return c;
}

// Rows that may be read ahead without pushing one another out of the second-level cache: about half of a small one
// of the SM's family, in rows of x.
int64_t rows_ahead(const Call& c, const Launch& on) {
  if (c.rows.x == nullptr || c.rows.bytes == 0) return 0;
  return (int64_t(on.sm >= 90 ? 24 : on.sm == 89 ? 12 : on.sm == 80 ? 16 : 2) << 20) / c.rows.bytes;
}

template <class E>
int64_t strip_bytes(int64_t dim, int warps, int sm) {
  const int64_t chunks = dim > kChunk<E> ? ceil_div(dim, kChunk<E>) : 1, held = chunks <= kResidentChunks ? chunks : 2;
  const int64_t tile = kStripRows * warps, row = kChunkPitch<E> * int64_t(sizeof(E));
  return carved<char>(held * tile * row + 16) + carved<char>(2 * kStripColumns * row + 16) +
         (sm < 80 && sizeof(E) == 2 ? carved<char>(warps * kSumTile * 4 + 16) : 0) + carved<float>(tile) +
         carved<float>(2 * kStripColumns);
}

int64_t merge_bytes(int64_t outputs, int64_t met) {
  return carved<int32_t>(kRadixScratch<CosineKey>) + 4 * carved<int32_t>(outputs) + 2 * carved<int32_t>(met) +
         carved<int32_t>(1) + carved<float>(outputs);
}

template <class T, bool MEAN>
Status in_one_block(Call c, const Launch& on, bool* fits) {
  using E = typename MetricElement<T, MEAN>::Type;
  const int64_t slots = (c.longest + 1) / 2;
  const int64_t shared =
      strip_bytes<E>(c.metric.dim, kBlockWarps, on.sm) + merge_bytes(c.longest, slots) + 2 * carved<int32_t>(slots);
  *fits = shared <= shared_limit(on.sm);
  if (!*fits) return Status::ok;
  c.rows.more_ahead = int(std::min(rows_ahead(c, on) / std::min<int64_t>(c.all.batch, on.sms), c.longest));
  return VIDTOK_LAUNCH((bipartite_block_kernel<T, MEAN, kBlockWarps>), c.all.batch, kBlockWarps * kWarp, shared, on,
                       c.metric, c.all, int(c.longest), c.lists, c.rows);
}

template <class T, bool MEAN, int WARPS>
Status match(const Call& c, uint32_t* key, int32_t* target, const Launch& on) {
  using E = typename MetricElement<T, MEAN>::Type;
  constexpr int64_t kTile = kStripRows * WARPS;
  const int64_t shared = strip_bytes<E>(c.metric.dim, WARPS, on.sm);
  if constexpr (WARPS > 2)
    if (shared > shared_limit(on.sm)) return match<T, MEAN, WARPS / 2>(c, key, target, on);
  const int64_t parts = ceil_div((c.longest + 1) / 2, kTile);
  const int64_t blocks = c.all.cu == nullptr ? c.all.batch * parts : c.lists.n / (2 * kTile) + c.all.batch;
  return VIDTOK_LAUNCH((bipartite_match_kernel<T, MEAN, WARPS>), blocks, WARPS * kWarp, shared, on, c.metric, c.all,
                       parts, key, target, c.rows);
}

template <class T, bool MEAN>
Status match_by(int tile, const Call& c, uint32_t* key, int32_t* target, const Launch& on) {
  if (tile >= 128) return match<T, MEAN, 8>(c, key, target, on);
  return tile >= 64 ? match<T, MEAN, 4>(c, key, target, on) : match<T, MEAN, 2>(c, key, target, on);
}

template <class T, int N>
Status merge(Call c, const uint32_t* key, const int32_t* target, const Launch& on) {
  // Small parts where they would not fill the GPU, larger ones where each has many sources to select from.
  const int64_t small = c.lists.m < int64_t(on.sms) * 256 ? 32 : 64;
  const int64_t per = c.longest > 8192 ? 128 : small;
  const int64_t parts = c.all.cu_out == nullptr ? ceil_div(c.all.outputs, per) : 0;
  const int64_t blocks = c.all.cu_out == nullptr ? c.all.batch * parts : c.lists.m / per + c.all.batch;
  c.rows.more_ahead = int(std::min(rows_ahead(c, on) / (int64_t(on.sms) * kMergeResident), c.longest));
  return VIDTOK_LAUNCH((bipartite_merge_kernel<T, N>), blocks, kMergeThreads, merge_bytes(per, kMetMost), on, c.all,
                       parts, int(per), key, target, c.lists, c.rows);
}

Status merge_by(const Call& c, const uint32_t* key, const int32_t* target, const Launch& on) {
  const bool vectors = c.accesses > 1;
  switch (c.x_dtype) {
    case DType::f32:
      return vectors ? merge<float, 4>(c, key, target, on) : merge<float, 1>(c, key, target, on);
    case DType::bf16:
      return vectors ? merge<bf16, 8>(c, key, target, on) : merge<bf16, 1>(c, key, target, on);
    case DType::f16:
      return vectors ? merge<f16, 8>(c, key, target, on) : merge<f16, 1>(c, key, target, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(c.x_dtype));
}

template <class T>
Status run(Call c, void* workspace, const BipartiteChoice& choice, const Launch& on) {
  const bool mean = c.metric.heads > 1;
  if (choice.one_block && (c.rows.x == nullptr || (c.x_dtype == c.dtype && c.accesses > 1))) {
    bool fits = false;
    const Status status = mean ? in_one_block<T, true>(c, on, &fits) : in_one_block<T, false>(c, on, &fits);
    if (status != Status::ok || fits) return status;
  }
  uint32_t* const key = static_cast<uint32_t*>(workspace);
  int32_t* const target = static_cast<int32_t*>(workspace) + workspace_slots(c.lists.n, c.all.batch);
  if (c.merges > 0) {
    c.rows.ahead = rows_ahead(c, on);
    const Status status =
        mean ? match_by<T, true>(choice.tile, c, key, target, on) : match_by<T, false>(choice.tile, c, key, target, on);
    if (status != Status::ok) return status;
  }
  return merge_by(c, key, target, on);
}

}  // namespace

int64_t bipartite_workspace(int64_t tokens, int64_t batch) { return 8 * workspace_slots(tokens, batch); }

Status bipartite(const BipartiteArgs& a, int64_t longest, void* workspace, const BipartiteChoice& choice,
                 const Launch& on) {
  if (a.m == 0) return Status::ok;
  const Call c = call_of(a, longest);
  if (on.sm < 80 && (c.dtype == DType::bf16 || (a.x != nullptr && c.x_dtype == DType::bf16)))
    return fail(Status::value, "bf16 needs sm_80 or newer, got sm_%d", on.sm);
  switch (c.dtype) {
    case DType::f32:
      return run<float>(c, workspace, choice, on);
    case DType::bf16:
      return run<bf16>(c, workspace, choice, on);
    case DType::f16:
      return run<f16>(c, workspace, choice, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(c.dtype));
}

}  // namespace vidtok::cuda

#endif
