// Exact top-k per segment, one block each: see tile/radix.h. A thread meets the same items in every pass, so that it
// keeps their order keys in shared memory where they fit.
#include "cuda/tile/radix.h"
#include "cuda/tile/report.h"

namespace vidtok::cuda {

// capacity: order keys that fit the shared memory.
template <class T>
__global__ void __launch_bounds__(1024)
    topk_select_kernel(const T* score, const int32_t* cu_seqlens, const int64_t* keep_start, const int32_t* position,
                       int64_t n, int64_t segments, int64_t keep, int64_t capacity, int64_t* index, int32_t* error) {
  VIDTOK_SMEM(shared);
  int32_t* const scratch = shared.take<int32_t>(kRadixScratch<T>);
  uint32_t* const kept = shared.take<uint32_t>(capacity);
  const int64_t s = block();
  int64_t start = 0, stop = n;
  if (cu_seqlens != nullptr) {
    start = cu_seqlens[s];
    stop = cu_seqlens[s + 1];
    const int64_t low = s == 0 ? 0 : smaller(larger(start, int64_t(0)), n), high = s + 1 == segments ? n : stop;
    if (start != low || stop != high || stop < start || stop > n) {
      if (thread() == 0) report(error, Report::topk_select_cu_seqlens, start != low ? start : stop, low, n + 1);
      start = stop = 0;
    }
  }
  const int64_t base = keep_start == nullptr ? s * keep : keep_start[s];
  int64_t k = keep_start == nullptr ? keep : keep_start[s + 1] - base;
  const int64_t length = stop - start;
  if (k < 0 || k > length) {
    if (thread() == 0) report(error, Report::topk_select_keep, k, 0, length + 1);
    for (int64_t i = thread(); i < k; i += threads()) index[base + i] = 0;
    k = 0;
  }
  if (k == 0) return;
  const T* const from = score + start;
  const auto emit = [&](int64_t rank, int64_t item, int) {
    const int64_t at = start + item;
    index[base + rank] = position == nullptr ? at : position[at];
  };
  if (length <= capacity) {
    each_dealt<0>(length, [&](int64_t item, int) {
      if (item < length) kept[item] = order_key(from[item]);
    });
    radix_select<T>([&](int64_t item, int) { return kept[item]; }, length, k, scratch, emit);
  } else {
    radix_select<T>([&](int64_t item, int) { return order_key(from[item]); }, length, k, scratch, emit);
  }
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include "cuda/tile/launch.h"
#include "cuda/topk_select.h"

namespace vidtok::cuda {
namespace {

// Order keys that many segments may keep in shared memory; one segment may take all there is.
constexpr int64_t kKeptOfMany = 8192;

template <class T>
Status select_of(const TopkSelectArgs& a, int threads, const Launch& on) {
  const int64_t scratch = carved<int32_t>(kRadixScratch<T>);
  const int64_t room = (shared_limit(on.sm) - scratch) / 4;
  const int64_t most = a.segments == 1 || room < kKeptOfMany ? room : kKeptOfMany;
  const int64_t capacity = a.n <= most ? a.n : a.segments == 1 ? 0 : most;
  return VIDTOK_LAUNCH((topk_select_kernel<T>), a.segments, threads, scratch + carved<uint32_t>(capacity), on,
                       static_cast<const T*>(a.score), a.cu_seqlens, a.keep_start, a.position, a.n, a.segments, a.keep,
                       capacity, a.index, on.error);
}

}  // namespace

Status topk_select(const TopkSelectArgs& a, const TopkSelectChoice& choice, const Launch& on) {
  switch (a.dtype) {
    case DType::f32:
      return select_of<float>(a, choice.threads, on);
    case DType::bf16:
      return select_of<bf16>(a, choice.threads, on);
    case DType::f16:
      return select_of<f16>(a, choice.threads, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(a.dtype));
}

}  // namespace vidtok::cuda

#endif
