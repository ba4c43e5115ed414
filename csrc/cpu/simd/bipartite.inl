// bipartite_match and bipartite_merge for one instruction set.
#include "cpu/bipartite.h"
#include "cpu/simd/rows.inl"
#include "cpu/simd/transpose.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

// A tile holds kTileRows destinations × kPanelVectors vectors of sources in registers.
#if VIDTOK_WIDTH == 16
constexpr int kPanelVectors = 4, kTileRows = 6;
#elif VIDTOK_WIDTH == 8
constexpr int kPanelVectors = 2, kTileRows = 5;
#else
constexpr int kPanelVectors = 4, kTileRows = 4;
#endif
// Partial dot products are added up every so many channels: keeps the error of long rows small.
constexpr int64_t kDotChannels = 512;
// Cache lines of x fetched per channel of a tile, while there are any left.
constexpr int kAheadLines = 4;

template <class T>
void metric_rows(const BipartiteArgs& a, const T* metric, int64_t begin, int64_t end, float* out) {
  const vec heads = set1(float(a.heads));
  for (int64_t t = begin; t < end; ++t) {
    const T* row = metric + t * a.metric_row;
    float* to = out + t * a.cm;
    for (int64_t j = 0; j < a.cm; j += kWidth) {
      const int n = a.cm - j < kWidth ? int(a.cm - j) : kWidth;
      vec s = n == kWidth ? load(row + j) : load(row + j, n);
      if (a.heads > 1) {
        for (int64_t h = 1; h < a.heads; ++h) {
          const T* at = row + h * a.metric_head + j;
          s = s + (n == kWidth ? load(at) : load(at, n));
        }
        s = s / heads;
      }
      if (n == kWidth)
        store(to + j, s);
      else
        store(to + j, s, n);
    }
  }
}

void metric_rows_any(const BipartiteArgs& a, const void* metric, int64_t begin, int64_t end, float* out) {
  if (a.metric_dtype == DType::f32) return metric_rows(a, static_cast<const float*>(metric), begin, end, out);
  if (a.metric_dtype == DType::bf16) return metric_rows(a, static_cast<const bf16*>(metric), begin, end, out);
  return metric_rows(a, static_cast<const f16*>(metric), begin, end, out);
}

void inverse_norms(const float* rows, int64_t stride, int64_t cm, int64_t begin, int64_t end, float* out) {
  for (int64_t t = begin; t < end; ++t) {
    const float* row = rows + t * stride;
    vec s0 = zero(), s1 = zero();
    int64_t j = 0;
    for (; j + 2 * kWidth <= cm; j += 2 * kWidth) {
      const vec a = load(row + j), b = load(row + j + kWidth);
      s0 = fma(a, a, s0), s1 = fma(b, b, s1);
    }
    for (; j < cm; j += kWidth) {
      const vec a = load(row + j, cm - j < kWidth ? int(cm - j) : kWidth);
      s0 = fma(a, a, s0);
    }
    const float squared = sum(s0 + s1);
    out[t] = squared == 0.0f ? 0.0f : 1.0f / __builtin_sqrtf(squared);
    if (!(squared <= 3.4028234663852886e38f)) out[t] = __builtin_nanf("");
  }
}

VIDTOK_INLINE void keep_greater(vec score, vec place, vec& best, vec& index) {
#if VIDTOK_WIDTH == 16
  const __mmask16 more = _mm512_cmp_ps_mask(score.v, best.v, _CMP_GT_OQ);
  best.v = _mm512_mask_mov_ps(best.v, more, score.v);
  index.v = _mm512_mask_mov_ps(index.v, more, place.v);
#elif VIDTOK_WIDTH == 8
  const __m256 more = _mm256_cmp_ps(score.v, best.v, _CMP_GT_OQ);
  best.v = _mm256_blendv_ps(best.v, score.v, more);
  index.v = _mm256_blendv_ps(index.v, place.v, more);
#else
  if (score.v > best.v) best = score, index = place;
#endif
}

// acc[i][v] += row i's entry × the panel's vector v, for channels [from, to). With kAhead four cache
// lines from `ahead` on are fetched per channel.
template <int NV, bool kAhead>
VIDTOK_INLINE void tile_part(const float* panel, const float* const* row, int64_t from, int64_t to,
                             vec (&acc)[kTileRows][NV], const char* ahead) {
  for (int64_t k = from; k < to; ++k) {
    vec s[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) s[v] = load(panel + (k * NV + v) * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const vec d = set1(row[i][k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(d, s[v], acc[i][v]);
    }
    if (kAhead) {
#pragma GCC unroll 8
      for (int i = 0; i < kAheadLines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);  // into L2: L1 holds the panel
      ahead += kAheadLines * 64;
    }
  }
}

template <int NV>
VIDTOK_INLINE void tile(const float* panel, const float* const* row, int64_t from, int64_t to,
                        vec (&acc)[kTileRows][NV], const char* ahead, int64_t lines) {
  const int64_t wanted = from + lines / kAheadLines, middle = wanted < to ? wanted : to;
  tile_part<NV, true>(panel, row, from, middle, acc, ahead);
  tile_part<NV, false>(panel, row, middle, to, acc, nullptr);
}

template <int NV>
void match_panel(const Matching& m, int64_t first, float* panel, const char* ahead, int64_t ahead_lines) {
  const int64_t lanes = NV * kWidth;
  const int64_t live = m.sources - first < lanes ? m.sources - first : lanes;
  for (int v = 0; v < NV; ++v) {
    const float* row[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t s = first + v * kWidth + i;
      row[i] = s < m.sources ? m.rows + int64_t(m.source[s]) * m.row_stride : nullptr;
    }
    transpose(row, m.cm, panel + v * kWidth, lanes);
  }
  float inverse[NV * kWidth], best[NV * kWidth], index[NV * kWidth];
  for (int64_t i = 0; i < lanes; ++i) {
    inverse[i] = i < live ? m.inverse_source[first + i] : 0.0f;
    best[i] = -__builtin_inff();
    index[i] = 0.0f;
  }
  const int64_t tiles = (m.destinations + kTileRows - 1) / kTileRows;
  const vec top = set1(m.steps);
  for (int64_t t = 0; t < tiles; ++t) {
    // The last tile repeats rows; a score that comes again is not greater.
    const int64_t d0 = t * kTileRows;
    const float* row[kTileRows];
    int64_t place[kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      place[i] = d0 + i < m.destinations ? d0 + i : m.destinations - 1;
      row[i] = m.rows + int64_t(m.destination[place[i]]) * m.row_stride;
    }
    const int64_t l0 = ahead_lines * t / tiles, l1 = ahead_lines * (t + 1) / tiles;
    vec acc[kTileRows][NV];
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < NV; ++v) acc[i][v] = zero();
    if (m.cm <= kDotChannels) {
      tile<NV>(panel, row, 0, m.cm, acc, ahead + l0 * 64, l1 - l0);
    } else {
      vec whole[kTileRows][NV];
      for (int i = 0; i < kTileRows; ++i)
        for (int v = 0; v < NV; ++v) whole[i][v] = zero();
      for (int64_t k = 0; k < m.cm; k += kDotChannels) {
        for (int i = 0; i < kTileRows; ++i)
          for (int v = 0; v < NV; ++v) acc[i][v] = zero();
        tile<NV>(panel, row, k, k + kDotChannels < m.cm ? k + kDotChannels : m.cm, acc, ahead + l0 * 64,
                 k == 0 ? l1 - l0 : 0);
        for (int i = 0; i < kTileRows; ++i)
          for (int v = 0; v < NV; ++v) whole[i][v] = whole[i][v] + acc[i][v];
      }
      for (int i = 0; i < kTileRows; ++i)
        for (int v = 0; v < NV; ++v) acc[i][v] = whole[i][v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vec b = load(best + v * kWidth), at = load(index + v * kWidth);
      const vec s = load(inverse + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const vec cosine = acc[i][v] * s * set1(m.inverse_destination[place[i]]);
        // min passes a NaN on only when it stands second; a NaN is never greater.
        keep_greater(round(min(top, cosine)), set1(float(place[i])), b, at);
      }
      store(best + v * kWidth, b);
      store(index + v * kWidth, at);
    }
  }
  for (int64_t i = 0; i < live; ++i) {
    m.best[first + i] = best[i];
    m.target[first + i] = int32_t(index[i]);
  }
}

void match_any(const Matching& m, int64_t index, int64_t count, float* panel) {
  const int64_t vectors = (m.sources + kWidth - 1) / kWidth;
  const int64_t begin = vectors * index / count, end = vectors * (index + 1) / count;
  const int64_t lines = m.ahead == nullptr ? 0 : m.ahead_bytes / 64;
  const int64_t l0 = lines * index / count, l1 = lines * (index + 1) / count;
  const char* ahead = m.ahead + l0 * 64;
  const int64_t first = begin * kWidth;
  if (end - begin == 1) return match_panel<1>(m, first, panel, ahead, l1 - l0);
  if (end - begin == 2) return match_panel<2>(m, first, panel, ahead, l1 - l0);
  if constexpr (kPanelVectors == 4) {
    if (end - begin == 3) return match_panel<3>(m, first, panel, ahead, l1 - l0);
    return match_panel<4>(m, first, panel, ahead, l1 - l0);
  }
}

// Members in the order of outputs are the order of reading: each line read fetches the same line of
// the member so many further on.
constexpr int32_t kMembersAhead = 4;

// y = Σ weight·row / total, rows in their order; the same columns of `next` are fetched meanwhile.
template <int N, class T>
VIDTOK_INLINE void merge_few(T* y, const T* const* row, const T* const* next, const float* weight, int64_t c,
                             float total, bool streaming) {
  // The reciprocal of a power of two, as most totals are, is exact: it gives the quotient's bits.
  const bool exact = (to_bits(total) & 0x7fffff) == 0 && total > 1e-30f && total < 1e30f;
  const vec whole = set1(exact ? 1.0f / total : total);
  vec w[N];
  for (int i = 0; i < N; ++i) w[i] = set1(weight[i]);
  const bool past = streaming && sizeof(T) == 4 && (reinterpret_cast<uintptr_t>(y) & (kWidth * 4 - 1)) == 0;
  constexpr int kVectors = 2;
  int64_t j = 0;
  for (; j + kVectors * kWidth <= c; j += kVectors * kWidth) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) prefetch_span(next[i] + j, kVectors * kWidth * int64_t(sizeof(T)));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kWidth;
      vec sum = w[0] * load(row[0] + at);
#pragma GCC unroll 4
      for (int i = 1; i < N; ++i) sum = sum + w[i] * load(row[i] + at);
      sum = exact ? sum * whole : sum / whole;
      if (past)
        stream(reinterpret_cast<float*>(y + at), sum);
      else
        store(y + at, sum);
    }
  }
  for (; j < c; j += kWidth) {
    const int n = c - j < kWidth ? int(c - j) : kWidth;
    vec sum = w[0] * load(row[0] + j, n);
    for (int i = 1; i < N; ++i) sum = sum + w[i] * load(row[i] + j, n);
    store(y + j, exact ? sum * whole : sum / whole, n);
  }
}

// The same for any number of rows.
template <class T, class Row, class Weight>
VIDTOK_INLINE void merge_many(T* y, Row row, Weight weight, int32_t count, int64_t c, float total) {
  for (int64_t j = 0; j < c; j += 2 * kWidth) {
    const int n0 = c - j < kWidth ? int(c - j) : kWidth;
    const int n1 = c - j - kWidth < 0 ? 0 : c - j - kWidth < kWidth ? int(c - j - kWidth) : kWidth;
    vec s0 = zero(), s1 = zero();
    for (int32_t i = 0; i < count; ++i) {
      const T* from = row(i) + j;
      const vec w = set1(weight(i)), p0 = w * load(from, n0), p1 = n1 > 0 ? w * load(from + kWidth, n1) : zero();
      s0 = i == 0 ? p0 : s0 + p0, s1 = i == 0 ? p1 : s1 + p1;
    }
    store(y + j, s0 / set1(total), n0);
    if (n1 > 0) store(y + j + kWidth, s1 / set1(total), n1);
  }
}

template <class T>
void merge_rows(const BipartiteArgs& a, const Merging& s, int64_t begin, int64_t end, bool streaming) {
  T* y = static_cast<T*>(a.y) + s.out * a.c;
  const T* x = static_cast<const T*>(s.x);
  const int32_t last = s.offset[end];
  const auto row = [&](int32_t i) { return x + (a.member[i] - s.begin) * a.x_row; };
  const auto weight = [&](int32_t i) { return a.size == nullptr ? 1.0f : a.size[a.member[i]]; };
  for (int64_t m = begin; m < end; ++m) {
    const int32_t lo = s.offset[m], count = s.offset[m + 1] - lo;
    T* out = y + m * a.c;
    const float total = a.total[s.out + m];
    const T *from[4], *next[4];
    float weights[4];
    for (int32_t i = 0; i < 4 && i < count; ++i) {
      from[i] = row(lo + i), weights[i] = weight(lo + i);
      const int32_t ahead = lo + i + kMembersAhead;
      next[i] = ahead < last ? row(ahead) : from[i];
    }
    if (count == 1)
      copy_bytes(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(from[0]), a.c * int64_t(sizeof(T)),
                 streaming, reinterpret_cast<const char*>(next[0]));
    else if (count == 2)
      merge_few<2>(out, from, next, weights, a.c, total, streaming);
    else if (count == 3)
      merge_few<3>(out, from, next, weights, a.c, total, streaming);
    else if (count == 4)
      merge_few<4>(out, from, next, weights, a.c, total, streaming);
    else
      merge_many(
          out, [&](int32_t i) { return row(lo + i); }, [&](int32_t i) { return weight(lo + i); }, count, a.c, total);
  }
  if (streaming) stream_fence();
}

void merge_any(const BipartiteArgs& a, const Merging& s, int64_t begin, int64_t end, bool streaming) {
  if (a.x_dtype == DType::f32) return merge_rows<float>(a, s, begin, end, streaming);
  if (a.x_dtype == DType::bf16) return merge_rows<bf16>(a, s, begin, end, streaming);
  return merge_rows<f16>(a, s, begin, end, streaming);
}

constexpr BipartiteKernels bipartite_kernels{kPanelVectors * kWidth, metric_rows_any, inverse_norms, match_any,
                                             merge_any};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
