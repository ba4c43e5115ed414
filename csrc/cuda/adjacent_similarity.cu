// Cosine of tokens along time, or with a centre. A block follows one slot from frame to frame. Each thread keeps to its
// own 16-byte pieces of the rows: it copies them into a ring in shared memory ahead of the arithmetic and reads them
// there twice, as the later and as the earlier row, without a barrier. Rows that do not fit the ring, or are not
// aligned, are read again instead; thread, order and bits of every sum stay the same.
#include "cuda/tile/async.h"
#include "cuda/tile/block.h"
#include "cuda/tile/cosine.h"
#include "cuda/tile/report.h"
#include "cuda/tile/vec.h"

namespace vidtok::cuda {

constexpr int kSimilarThreads = 8 * kWarp;  // the most that a table may ask for

struct SimilarRun {
  int64_t row, slots, frames, before;
};

// Rows that a block holds: two in use and one on its way.
constexpr int kPreviousRing = 3;
constexpr int kWindowRing = 2;

enum class SimilarRows { ring, aligned, any };

// N elements at a piece of a row; zeros past its end.
template <class T, SimilarRows ROWS>
VIDTOK_DEVICE Vec<T, kPerAccess<T>> row_piece(const T* row, int64_t piece, int64_t c) {
  constexpr int N = kPerAccess<T>;
  if constexpr (ROWS != SimilarRows::any) {
    return load<T, N>(row + piece * N);
  } else {
    Vec<T, N> out{};
    VIDTOK_UNROLL
    for (int k = 0; k < N; ++k)
      if (piece * N + k < c) out.v[k] = row[piece * N + k];
    return out;
  }
}

// The sum of products of a piece is closed before it joins the thread's: thousands of channels in one running sum would
// err by more than a step of the grid.
template <class T, int N>
VIDTOK_DEVICE float product(const Vec<T, N>& a, const Vec<T, N>& b) {
  float sum = 0.0f;
  VIDTOK_UNROLL
  for (int k = 0; k < N; ++k) sum = fused(to_float(a.v[k]), to_float(b.v[k]), sum);
  return sum;
}

// Sums over the block by one barrier: `turn` counts the calls, and two scratches alternate. Every thread gets them.
template <int COUNT>
struct Sums {
  float v[COUNT];
};
constexpr int kSimilarSums = 3;
template <int COUNT>
VIDTOK_DEVICE Sums<COUNT> sum_over_block(Sums<COUNT> x, float* scratch, int turn) {
  VIDTOK_UNROLL
  for (int i = 0; i < COUNT; ++i) x.v[i] = warp_sum(x.v[i]);
  if (warps() == 1) return x;
  float* const here = scratch + (turn & 1) * kSimilarSums * kWarp;
  if (lane() == 0) {
    VIDTOK_UNROLL
    for (int i = 0; i < COUNT; ++i) here[warp() * COUNT + i] = x.v[i];
  }
  block_sync();
  VIDTOK_UNROLL
  for (int i = 0; i < COUNT; ++i) {
    x.v[i] = here[i];
    for (int w = 1; w < warps(); ++w) x.v[i] += here[w * COUNT + i];
  }
  return x;
}

// The rows of one slot, frame after frame, as a block sees them.
template <class T, SimilarRows ROWS, int RING>
class SlotRows {
 public:
  static constexpr int kN = kPerAccess<T>;
  VIDTOK_DEVICE SlotRows(const T* first, int64_t stride, int64_t c, T* ring)
      : first_(first), stride_(stride), c_(c), ring_(ring) {}
  VIDTOK_DEVICE int64_t pieces() const { return (c_ + kN - 1) / kN; }
  // Starts the copy of a frame, or of nothing; in the order of the frames.
  VIDTOK_DEVICE void prefetch(int64_t frame, bool exists) {
    if constexpr (ROWS == SimilarRows::ring) {
      if (exists)
        for (int64_t p = thread(); p < pieces(); p += threads())
          copy_async(ring_ + frame % RING * c_ + p * kN, first_ + frame * stride_ + p * kN, true);
      copy_commit();
    }
  }
  // Until all but the newest `PENDING` copies are there.
  template <int PENDING>
  VIDTOK_DEVICE void arrive() {
    if constexpr (ROWS == SimilarRows::ring) copy_wait<PENDING>();
  }
  VIDTOK_DEVICE Vec<T, kN> at(int64_t frame, int64_t piece) const {
    if constexpr (ROWS == SimilarRows::ring)
      return load<T, kN>(ring_ + frame % RING * c_ + piece * kN);
    else
      return row_piece<T, ROWS>(first_ + frame * stride_, piece, c_);
  }

 private:
  const T* first_;
  int64_t stride_, c_;
  T* ring_;
};

VIDTOK_DEVICE SimilarRun run_of(const SimilarRun* runs, int64_t count, int64_t piece) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (runs[middle].before <= piece ? low : high) = middle;
  }
  return runs[low];
}

// A piece: up to `step` frames of a slot against the frame before each; a video's first piece also holds its first
// frame.
template <class T, SimilarRows ROWS>
__global__ void __launch_bounds__(kSimilarThreads)
    similar_previous_kernel(const T* x, float* y, const SimilarRun* runs, int64_t num_runs, int64_t c, int64_t x_stride,
                            int64_t step) {
  VIDTOK_SMEM(shared);
  float* const scratch = shared.take<float>(2 * kSimilarSums * kWarp);
  T* const ring = shared.take<T>(ROWS == SimilarRows::ring ? kPreviousRing * c : 0);
  const SimilarRun run = run_of(runs, num_runs, block());
  const int64_t cut = (block() - run.before) / run.slots, slot = block() - run.before - cut * run.slots;
  const int64_t begin = cut * step, end = smaller(begin + step + 1, run.frames);
  SlotRows<T, ROWS, kPreviousRing> rows(x + (run.row + slot) * x_stride, run.slots * x_stride, c, ring);
  float* const out = y + run.row + slot;
  if (cut == 0 && thread() == 0) out[0] = -infinity<float>();
  float before = 0.0f;
  rows.prefetch(begin, true);
  for (int64_t f = begin; f < end; ++f) {
    rows.prefetch(f + 1, f + 1 < end);
    rows.template arrive<1>();
    Sums<2> sums{};  // with the frame before, with itself
    for (int64_t p = thread(); p < rows.pieces(); p += threads()) {
      const auto here = rows.at(f, p);
      sums.v[1] += product(here, here);
      if (f > begin) sums.v[0] += product(here, rows.at(f - 1, p));
    }
    sums = sum_over_block(sums, scratch, int(f & 1));
    const float inverse = inverse_norm(sums.v[1]);
    if (f > begin && thread() == 0) out[f * run.slots] = round_cosine<T>(sums.v[0] * inverse * before);
    before = inverse;
  }
}

// A piece: a slot of a segment, (‖Σ unit rows‖² − frames) / (w(w − 1)).
template <class T, SimilarRows ROWS>
__global__ void __launch_bounds__(kSimilarThreads)
    similar_window_kernel(const T* x, float* y, const SimilarRun* runs, int64_t num_runs, int64_t c, int64_t x_stride) {
  constexpr int N = kPerAccess<T>;
  VIDTOK_SMEM(shared);
  float* const scratch = shared.take<float>(2 * kSimilarSums * kWarp);
  float* const total = shared.take<float>((c + N - 1) / N * N);  // each thread its own pieces
  T* const ring = shared.take<T>(ROWS == SimilarRows::ring ? kWindowRing * c : 0);
  const SimilarRun run = run_of(runs, num_runs, block());
  const int64_t slot = block() - run.before, frames = run.frames;
  SlotRows<T, ROWS, kWindowRing> rows(x + (run.row + slot) * x_stride, run.slots * x_stride, c, ring);
  int64_t present = 0;
  rows.prefetch(0, true);
  for (int64_t f = 0; f < frames; ++f) {
    rows.prefetch(f + 1, f + 1 < frames);
    rows.template arrive<1>();
    Sums<1> square{};
    for (int64_t p = thread(); p < rows.pieces(); p += threads()) {
      const auto here = rows.at(f, p);
      square.v[0] += product(here, here);
    }
    square = sum_over_block(square, scratch, int(f & 1));
    const float inverse = inverse_norm(square.v[0]);
    present += inverse != 0.0f;
    for (int64_t p = thread(); p < rows.pieces(); p += threads()) {
      const auto here = rows.at(f, p);
      VIDTOK_UNROLL
      for (int k = 0; k < N; ++k) {
        const float unit = to_float(here.v[k]) * inverse;
        total[p * N + k] = f == 0 ? unit : total[p * N + k] + unit;
      }
    }
  }
  Sums<1> pairs{};
  for (int64_t p = thread(); p < rows.pieces(); p += threads()) {
    Vec<float, 4> part{};
    VIDTOK_UNROLL
    for (int k = 0; k < N; ++k) part.v[k % 4] = fused(total[p * N + k], total[p * N + k], part.v[k % 4]);
    pairs.v[0] += (part.v[0] + part.v[1]) + (part.v[2] + part.v[3]);
  }
  pairs = sum_over_block(pairs, scratch, int(frames & 1));
  const float mean = (pairs.v[0] - float(present)) / (float(frames) * float(frames - 1));
  if (thread() == 0) y[block()] = frames == 1 ? -infinity<float>() : round_cosine<T>(mean);
}

// `step` tokens of a block against the centre of their sequence.
template <class T, SimilarRows ROWS>
__global__ void __launch_bounds__(kSimilarThreads)
    similar_center_kernel(const T* x, float* y, const T* center, const int32_t* cu_seqlens, int64_t sequences,
                          int64_t n, int64_t c, int64_t x_stride, int64_t step, int32_t* error) {
  VIDTOK_SMEM(shared);
  float* const scratch = shared.take<float>(2 * kSimilarSums * kWarp);
  const int64_t begin = block() * step, end = smaller(begin + step, n);
  const int64_t pieces = (c + kPerAccess<T> - 1) / kPerAccess<T>;
  for (int64_t i = begin; i < end; ++i) {
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (cu_seqlens[middle] <= i ? low : high) = middle;
    }
    const bool held = sequences > 0 && cu_seqlens[low] <= i && i < cu_seqlens[low + 1];
    Sums<3> sums{};  // with the centre, with itself, the centre with itself
    if (held) {
      for (int64_t p = thread(); p < pieces; p += threads()) {
        const auto here = row_piece<T, ROWS>(x + i * x_stride, p, c),
                   there = row_piece<T, ROWS>(center + low * c, p, c);
        sums.v[0] += product(here, there);
        sums.v[1] += product(here, here);
        sums.v[2] += product(there, there);
      }
    }
    sums = sum_over_block(sums, scratch, int(i & 1));
    if (thread() == 0) {
      if (!held) report(error, Report::adjacent_similarity_cu_seqlens, i, 0, sequences > 0 ? cu_seqlens[sequences] : 0);
      y[i] = held ? round_cosine<T>(sums.v[0] * inverse_norm(sums.v[1]) * inverse_norm(sums.v[2])) : 0.0f;
    }
  }
  // Offsets that are right for every token may still be wrong: they start at 0, never fall and end at n.
  for (int64_t s = block() * threads() + thread(); s <= sequences; s += blocks() * threads()) {
    const int64_t here = cu_seqlens[s], least = s == 0 ? 0 : cu_seqlens[s - 1];
    const bool fits = here >= least && here <= n && (s > 0 || here == 0) && (s < sequences || here == n);
    if (!fits) report(error, Report::adjacent_similarity_cu_seqlens, here, s == sequences ? n : least, n + 1);
  }
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include "cuda/adjacent_similarity.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

constexpr int64_t kScratch = carved<float>(2 * kSimilarSums * kWarp);

bool aligned(const SimilarityArgs& a) {
  const int64_t size = size_of(a.dtype);
  return reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && reinterpret_cast<uintptr_t>(a.center) % 16 == 0 &&
         a.c * size % 16 == 0 && a.x_stride * size % 16 == 0;
}

template <class T, SimilarRows ROWS>
Status similar_previous(const SimilarityArgs& a, int threads, int64_t shared, const Launch& on) {
  return VIDTOK_LAUNCH((similar_previous_kernel<T, ROWS>), a.pieces, threads, shared, on, static_cast<const T*>(a.x),
                       a.y, reinterpret_cast<const SimilarRun*>(a.runs), a.num_runs, a.c, a.x_stride, a.step);
}

template <class T, SimilarRows ROWS>
Status similar_window(const SimilarityArgs& a, int threads, int64_t shared, const Launch& on) {
  return VIDTOK_LAUNCH((similar_window_kernel<T, ROWS>), a.pieces, threads, shared, on, static_cast<const T*>(a.x), a.y,
                       reinterpret_cast<const SimilarRun*>(a.runs), a.num_runs, a.c, a.x_stride);
}

template <class T, SimilarRows ROWS>
Status similar_center(const SimilarityArgs& a, int threads, const Launch& on) {
  return VIDTOK_LAUNCH((similar_center_kernel<T, ROWS>), (a.n + a.step - 1) / a.step, threads, kScratch, on,
                       static_cast<const T*>(a.x), a.y, static_cast<const T*>(a.center), a.cu_seqlens, a.sequences, a.n,
                       a.c, a.x_stride, a.step, on.error);
}

template <class T>
Status similar(const SimilarityArgs& a, int threads, const Launch& on) {
  const int64_t limit = shared_limit(on.sm);
  if (a.to == SimilarTo::center)
    return aligned(a) ? similar_center<T, SimilarRows::aligned>(a, threads, on)
                      : similar_center<T, SimilarRows::any>(a, threads, on);
  if (a.to == SimilarTo::previous) {
    const int64_t ring = kScratch + carved<T>(kPreviousRing * a.c);
    if (!aligned(a)) return similar_previous<T, SimilarRows::any>(a, threads, kScratch, on);
    return ring <= limit ? similar_previous<T, SimilarRows::ring>(a, threads, ring, on)
                         : similar_previous<T, SimilarRows::aligned>(a, threads, kScratch, on);
  }
  const int64_t held = kScratch + carved<float>((a.c + kPerAccess<T> - 1) / kPerAccess<T> * kPerAccess<T>);
  const int64_t ring = held + carved<T>(kWindowRing * a.c);
  if (!aligned(a)) return similar_window<T, SimilarRows::any>(a, threads, held, on);
  return ring <= limit ? similar_window<T, SimilarRows::ring>(a, threads, ring, on)
                       : similar_window<T, SimilarRows::aligned>(a, threads, held, on);
}

}  // namespace

Status adjacent_similarity(const SimilarityArgs& a, const AdjacentSimilarityChoice& choice, const Launch& on) {
  const int threads = choice.warps * kWarp;
  if (threads > kSimilarThreads)
    return fail(Status::value, "expected at most %d warps, got %d", kSimilarThreads / kWarp, choice.warps);
  switch (a.dtype) {
    case DType::f32:
      return similar<float>(a, threads, on);
    case DType::bf16:
      return similar<bf16>(a, threads, on);
    case DType::f16:
      return similar<f16>(a, threads, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(a.dtype));
}

}  // namespace vidtok::cuda

#endif
