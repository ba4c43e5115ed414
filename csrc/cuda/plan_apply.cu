// Weighted gather-reduce of rows. A gather moves bytes; a merge sums members in fp32, in their order.
// The work of all outputs is one line of accesses (16 bytes each where addresses allow), cut into equal blocks, so
// that any number of channels fills the threads.
#include "cuda/tile/block.h"
#include "cuda/tile/line.h"
#include "cuda/tile/report.h"
#include "cuda/tile/vec.h"

namespace vidtok::cuda {

// y[m] = x[anchor[m]], zeros where the anchor is −1; rows of per_row accesses of BYTES.
template <int BYTES, int VECTORS>
__global__ void plan_apply_gather_kernel(const uint8_t* x, uint8_t* y, const int32_t* anchor, int64_t n, int64_t m,
                                         int per_row, int64_t x_pitch, int32_t* error) {
  using Word = Bytes<BYTES>;
  const int64_t start = block() * (int64_t(threads()) * VECTORS), end = m * per_row;
  Word word[VECTORS];
  const LineStart first(start, per_row);
  VIDTOK_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const int step = v * threads() + thread();
    word[v] = Word{};
    if (start + step >= end) continue;
    const LineAt at(first, step);
    const int64_t from = anchor[at.row];
    if (from >= 0 && from < n)
      word[v] = *reinterpret_cast<const Word*>(x + from * x_pitch + at.column * BYTES);
    else if (from != -1)
      report(error, Report::plan_apply_anchor, from, -1, n);
  }
  VIDTOK_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t at = start + v * threads() + thread();
    if (at < end) reinterpret_cast<Word*>(y)[at] = word[v];
  }
}

// y[m] = Σ weight[j] · x[member[j]], N elements at a time; a single member is copied unless weigh_single.
template <class T, int N>
__global__ void plan_apply_merge_kernel(const T* x, T* y, const int32_t* member, const int32_t* offset,
                                        const float* weight, int64_t n, int64_t m, int64_t nnz, int per_row,
                                        int64_t x_stride, bool weigh_single, int32_t* error) {
  const int64_t start = block() * threads();
  if (start + thread() >= m * per_row) return;
  const LineAt at(LineStart(start, per_row), thread());
  int64_t begin = offset[at.row], end = offset[at.row + 1];
  const bool starts = at.row > 0 || begin == 0;
  if (!starts || begin < 0 || end < begin || end > nnz) {
    report(error, Report::plan_apply_offset, starts ? end : begin, starts ? begin : 0, starts ? nnz + 1 : 1);
    begin = end = 0;
  }
  Vec<T, N> out{};
  T* const to = y + at.row * per_row * N + at.column * N;
  const T* const from = x + at.column * N;
  if (end - begin == 1 && !weigh_single) {
    const int64_t j = member[begin];
    if (j >= 0 && j < n)
      out = load<T, N>(from + j * x_stride);
    else
      report(error, Report::plan_apply_member, j, 0, n);
    store(to, out);
    return;
  }
  float sum[N] = {};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t j = member[i];
    if (j < 0 || j >= n) {
      report(error, Report::plan_apply_member, j, 0, n);
      continue;
    }
    const Vec<T, N> row = load<T, N>(from + j * x_stride);
    const float w = weight[i];
    VIDTOK_UNROLL
    for (int k = 0; k < N; ++k) sum[k] = fused(w, to_float(row.v[k]), sum[k]);
  }
  VIDTOK_UNROLL
  for (int k = 0; k < N; ++k) out.v[k] = from_float<T>(sum[k]);
  store(to, out);
}

// The transposed lists of the backward: how many outputs read each input, ...
VIDTOK_DEVICE int64_t source(const int32_t* anchor, const int32_t* member, int64_t i) {
  return member != nullptr ? member[i] : anchor[i];
}

__global__ void plan_apply_count_kernel(const int32_t* anchor, const int32_t* member, int64_t entries, int64_t n,
                                        int32_t* count, int32_t* error) {
  for (int64_t i = block() * threads() + thread(); i < entries; i += blocks() * threads()) {
    const int64_t j = source(anchor, member, i);
    if (j >= 0 && j < n)
      atomic_add(count + j, 1);
    else if (member != nullptr)
      report(error, Report::plan_apply_member, j, 0, n);
    else if (j != -1)
      report(error, Report::plan_apply_anchor, j, -1, n);
  }
}

// ... where their list begins (one block; count becomes the cursor), ...
__global__ void plan_apply_scan_kernel(int32_t* count, int32_t* offset, int64_t n) {
  VIDTOK_SMEM(shared);
  int32_t* const scratch = shared.take<int32_t>(kWarp);
  int32_t base = 0;
  for (int64_t i = 0; i < n; i += threads()) {
    const int64_t at = i + thread();
    const int32_t mine = at < n ? count[at] : 0;
    int32_t total = 0;
    const int32_t before = base + block_scan(mine, scratch, &total);
    if (at < n) offset[at] = count[at] = before;
    base += total;
  }
  if (thread() == 0) offset[n] = base;
}

// ... which outputs those are, in any order, ...
__global__ void plan_apply_fill_kernel(const int32_t* anchor, const int32_t* member, int64_t entries, int64_t n,
                                       int32_t* cursor, int32_t* owner) {
  for (int64_t i = block() * threads() + thread(); i < entries; i += blocks() * threads()) {
    const int64_t j = source(anchor, member, i);
    if (j >= 0 && j < n) owner[atomic_add(cursor + j, 1)] = int32_t(i);
  }
}

VIDTOK_DEVICE void sift_down(int32_t* heap, int32_t at, int32_t size) {
  for (;;) {
    int32_t child = 2 * at + 1;
    if (child >= size) return;
    if (child + 1 < size && heap[child + 1] > heap[child]) ++child;
    if (heap[at] >= heap[child]) return;
    const int32_t t = heap[at];
    heap[at] = heap[child];
    heap[child] = t;
    at = child;
  }
}

// ... and in ascending order, as outputs with their weights: sums then have one order.
__global__ void plan_apply_order_kernel(const int32_t* offset, const int32_t* list_offset, const float* list_weight,
                                        int64_t n, int64_t m, int32_t* owner, float* weight) {
  for (int64_t j = block() * threads() + thread(); j < n; j += blocks() * threads()) {
    int32_t* const list = owner + offset[j];
    const int32_t size = offset[j + 1] - offset[j];
    for (int32_t i = size / 2 - 1; i >= 0; --i) sift_down(list, i, size);
    for (int32_t last = size - 1; last > 0; --last) {
      const int32_t t = list[0];
      list[0] = list[last];
      list[last] = t;
      sift_down(list, 0, last);
    }
    for (int32_t i = 0; i < size; ++i) {
      const int32_t entry = list[i];
      if (list_offset == nullptr) {  // a gather: the entry is its output
        weight[offset[j] + i] = 1.0f;
        continue;
      }
      int64_t low = 0, high = m - 1;  // the last output whose list begins at or before the entry
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (list_offset[middle] <= entry)
          low = middle;
        else
          high = middle - 1;
      }
      list[i] = int32_t(low);
      weight[offset[j] + i] = list_offset[low + 1] - list_offset[low] == 1 ? 1.0f : list_weight[entry];
    }
  }
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include "cuda/plan_apply.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

constexpr int64_t kListBlocks = 256;

bool aligned(const PlanApplyArgs& a, int64_t bytes) {
  const int64_t size = size_of(a.dtype);
  return reinterpret_cast<uintptr_t>(a.x) % bytes == 0 && reinterpret_cast<uintptr_t>(a.y) % bytes == 0 &&
         a.c * size % bytes == 0 && a.x_stride * size % bytes == 0;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int BYTES, int VECTORS>
Status gather(const PlanApplyArgs& a, int threads, const Launch& on) {
  const int64_t size = size_of(a.dtype), per_row = a.c * size / BYTES;
  return VIDTOK_LAUNCH((plan_apply_gather_kernel<BYTES, VECTORS>), ceil_div(a.m * per_row, int64_t(threads) * VECTORS),
                       threads, 0, on, static_cast<const uint8_t*>(a.x), static_cast<uint8_t*>(a.y), a.anchor, a.n, a.m,
                       int(per_row), a.x_stride * size, on.error);
}

template <class T, int N>
Status merge(const PlanApplyArgs& a, int threads, const Launch& on) {
  const int64_t per_row = a.c / N;
  return VIDTOK_LAUNCH((plan_apply_merge_kernel<T, N>), ceil_div(a.m * per_row, threads), threads, 0, on,
                       static_cast<const T*>(a.x), static_cast<T*>(a.y), a.member, a.offset, a.weight, a.n, a.m, a.nnz,
                       int(per_row), a.x_stride, a.weigh_single, on.error);
}

template <class T>
Status merge_of(const PlanApplyArgs& a, int threads, const Launch& on) {
  return aligned(a, 16) ? merge<T, kPerAccess<T>>(a, threads, on) : merge<T, 1>(a, threads, on);
}

}  // namespace

Status plan_apply(const PlanApplyArgs& a, const PlanApplyChoice& choice, const Launch& on) {
  if (a.m == 0 || a.c == 0) return Status::ok;
  if (a.member == nullptr) {
    if (!aligned(a, 16)) {
      return a.dtype == DType::f32 ? gather<4, 1>(a, choice.threads, on) : gather<2, 1>(a, choice.threads, on);
    }
    if (choice.vectors >= 4) return gather<16, 4>(a, choice.threads, on);
    return choice.vectors == 2 ? gather<16, 2>(a, choice.threads, on) : gather<16, 1>(a, choice.threads, on);
  }
  switch (a.dtype) {
    case DType::f32:
      return merge_of<float>(a, choice.threads, on);
    case DType::bf16:
      return merge_of<bf16>(a, choice.threads, on);
    case DType::f16:
      return merge_of<f16>(a, choice.threads, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(a.dtype));
}

namespace {

struct Transposed {
  int32_t *cursor, *offset, *owner;
  float* weight;
  int64_t entries, bytes;
};

// n inputs of the forward pass; `base` may be null when only the size is asked for.
Transposed transposed(const PlanApplyArgs& a, unsigned char* base) {
  Transposed t{};
  t.entries = a.member != nullptr ? a.nnz : a.m;
  const auto take = [&](int64_t count) {
    unsigned char* const at = base + t.bytes;
    t.bytes += carved<int32_t>(count);
    return at;
  };
  t.cursor = reinterpret_cast<int32_t*>(take(a.n));
  t.offset = reinterpret_cast<int32_t*>(take(a.n + 1));
  t.owner = reinterpret_cast<int32_t*>(take(t.entries));
  t.weight = reinterpret_cast<float*>(take(t.entries));
  return t;
}

}  // namespace

int64_t plan_apply_backward_workspace(const PlanApplyArgs& a) { return transposed(a, nullptr).bytes; }

Status plan_apply_backward(const PlanApplyArgs& a, void* workspace, const PlanApplyChoice& choice, const Launch& on) {
  if (a.n == 0 || a.c == 0) return Status::ok;
  const Transposed t = transposed(a, static_cast<unsigned char*>(workspace));
  constexpr int kThreads = 256, kScanThreads = 1024;
  const auto list_blocks = [&](int64_t items) {
    const int64_t wanted = ceil_div(items, kThreads);
    return wanted < kListBlocks ? wanted : kListBlocks;
  };
  Status status = clear(t.cursor, 0, a.n * 4, on);
  if (status == Status::ok)
    status = VIDTOK_LAUNCH(plan_apply_count_kernel, list_blocks(t.entries), kThreads, 0, on, a.anchor, a.member,
                           t.entries, a.n, t.cursor, on.error);
  if (status == Status::ok)
    status =
        VIDTOK_LAUNCH(plan_apply_scan_kernel, 1, kScanThreads, carved<int32_t>(kWarp), on, t.cursor, t.offset, a.n);
  if (status == Status::ok)
    status = VIDTOK_LAUNCH(plan_apply_fill_kernel, list_blocks(t.entries), kThreads, 0, on, a.anchor, a.member,
                           t.entries, a.n, t.cursor, t.owner);
  if (status == Status::ok)
    status = VIDTOK_LAUNCH(plan_apply_order_kernel, list_blocks(a.n), kThreads, 0, on, t.offset,
                           a.member != nullptr ? a.offset : nullptr, a.weight, a.n, a.m, t.owner, t.weight);
  if (status != Status::ok) return status;
  PlanApplyArgs back = a;
  back.n = a.m;
  back.m = a.n;
  back.anchor = nullptr;
  back.member = t.owner;
  back.offset = t.offset;
  back.weight = t.weight;
  back.nnz = t.entries;
  back.weigh_single = true;
  return plan_apply(back, choice, on);
}

}  // namespace vidtok::cuda

#endif
