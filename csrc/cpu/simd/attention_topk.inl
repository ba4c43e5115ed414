// attention_topk for one instruction set.
#include "cpu/attention_topk.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/rows.inl"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

// A tile is this many query rows × four keys; a block of rows passes over a split's keys.
constexpr int kQueryRows = VIDTOK_WIDTH == 8 ? 2 : 4;
constexpr int kTileKeys = 4;
constexpr int64_t kBlockRows = 8;
constexpr int64_t kKeysAhead = 24;

void convert_any(const void* x, DType dtype, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = dtype == DType::f32    ? static_cast<const float*>(x)[i]
             : dtype == DType::bf16 ? to_float(static_cast<const bf16*>(x)[i])
                                    : to_float(static_cast<const f16*>(x)[i]);
}

#if VIDTOK_WIDTH == 16
VIDTOK_INLINE __m512 add_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
#endif

// Sums of the lanes of each accumulator, every one in the same order, times scale.
template <int NR>
VIDTOK_INLINE void reduce_tile(const vec (&acc)[NR][kTileKeys], float scale, float (&out)[NR][kTileKeys]) {
#if VIDTOK_WIDTH == 16
  __m512 row[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    if (r >= NR) {
      row[r] = _mm512_setzero_ps();
      continue;
    }
    const vec* a = acc[r < NR ? r : 0];
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
    row[r] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))));
  }
  const __m512 sums = add_lanes(add_lanes(row[0], row[1]), add_lanes(row[2], row[3]));
  float all[16];
  _mm512_storeu_ps(all, _mm512_mul_ps(sums, _mm512_set1_ps(scale)));
  std::memcpy(out, all, sizeof(out));
#elif VIDTOK_WIDTH == 8
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
    const vec* a = acc[r];
    const __m256 x = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
    const __m256 y = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
    const __m256 s = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    _mm_storeu_ps(out[r], _mm_mul_ps(sums, _mm_set1_ps(scale)));
  }
#else
  for (int r = 0; r < NR; ++r)
    for (int i = 0; i < kTileKeys; ++i) out[r][i] = acc[r][i].v * scale;
#endif
}

template <int NR, class T>
VIDTOK_INLINE void dot_tile(const float* query, int64_t query_row, const T* const* key, int64_t dim, float scale,
                            float* logits, int live) {
  vec acc[NR][kTileKeys];
  for (int r = 0; r < NR; ++r)
    for (int i = 0; i < kTileKeys; ++i) acc[r][i] = zero();
  int64_t j = 0;
  for (; j + kWidth <= dim; j += kWidth) {
    vec k[kTileKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kTileKeys; ++i) k[i] = load(key[i] + j);
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
      const vec q = load(query + r * query_row + j);
#pragma GCC unroll 4
      for (int i = 0; i < kTileKeys; ++i) acc[r][i] = fma(q, k[i], acc[r][i]);
    }
  }
  if (j < dim)
    for (int r = 0; r < NR; ++r)
      for (int i = 0; i < kTileKeys; ++i)
        acc[r][i] = fma(load(query + r * query_row + j), load(key[i] + j, int(dim - j)), acc[r][i]);
  float out[NR][kTileKeys];
  reduce_tile<NR>(acc, scale, out);
  for (int r = 0; r < NR; ++r) {
    if (live == kTileKeys)
      std::memcpy(logits + r * kSplitKeys, out[r], sizeof(out[r]));
    else
      for (int i = 0; i < live; ++i) logits[r * kSplitKeys + i] = out[r][i];
  }
}

template <class T>
void logits_of(const AttentionLogits& a, int64_t begin, int64_t end) {
  const T* keys = static_cast<const T*>(a.key);
  const int64_t query_row = padded(a.dim), bytes = a.dim * int64_t(sizeof(T));
  for (int64_t r0 = 0; r0 < a.rows; r0 += kBlockRows) {
    const int64_t r1 = r0 + kBlockRows < a.rows ? r0 + kBlockRows : a.rows;
    for (int64_t l = begin; l < end; l += kTileKeys) {
      const int live = end - l < kTileKeys ? int(end - l) : kTileKeys;
      const T* key[kTileKeys];
      for (int i = 0; i < kTileKeys; ++i) key[i] = keys + (i < live ? l + i : end - 1) * a.key_row;
      if (r0 == 0)
        for (int64_t i = l + kKeysAhead; i < l + kKeysAhead + kTileKeys && i < a.length; ++i)
          prefetch_span(keys + i * a.key_row, bytes);
      for (int64_t r = r0; r < r1; r += kQueryRows) {
        const float* q = a.query + r * query_row;
        float* out = a.logits + r * kSplitKeys + l - begin;
        const int64_t left = r1 - r;
        if (left == 1)
          dot_tile<1>(q, query_row, key, a.dim, a.scale, out, live);
        else if (kQueryRows == 2 || left == 2)
          dot_tile<2>(q, query_row, key, a.dim, a.scale, out, live);
        else if (left == 3)
          dot_tile<3>(q, query_row, key, a.dim, a.scale, out, live);
        else
          dot_tile<4>(q, query_row, key, a.dim, a.scale, out, live);
      }
    }
  }
}

VIDTOK_INLINE float largest(vec a) {
  float lane[kWidth];
  store(lane, a);
  float out = lane[0];
  for (int i = 1; i < kWidth; ++i) out = lane[i] > out ? lane[i] : out;
  return out;
}

// Hides what a row may not see, then its largest logit and the sum of exp beside it.
void summarise(const AttentionLogits& a, int64_t r, int64_t begin, int64_t end) {
  constexpr float kNone = -__builtin_inff();
  float* x = a.logits + r * kSplitKeys;
  const int64_t keys = end - begin;
  int64_t seen = keys;
  if (a.position != nullptr) {
    const int64_t last = a.position[r % a.width];
    seen = last < begin ? 0 : last < end ? last - begin + 1 : keys;
  }
  for (int64_t l = seen; l < padded(keys); ++l) x[l] = kNone;
  if (a.mask != nullptr)
    for (int64_t l = 0; l < seen; ++l) x[l] = a.mask[begin + l] ? x[l] : kNone;
  vec m = set1(kNone);
  for (int64_t l = 0; l < keys; l += kWidth) m = max(load(x + l), m);
  const float maximum = largest(m);
  // With no finite logit 0 in its place lets NaN through and makes −inf 0.
  const vec from = set1(maximum == kNone ? 0.0f : maximum);
  vec s = zero();
  for (int64_t l = 0; l < keys; l += kWidth) s = s + exp_nonpositive(load(x + l) - from);
  const int64_t at = r * a.splits_stride + begin / kSplitKeys;
  a.maximum[at] = maximum;
  a.sum[at] = sum(s);
}

void logits_any(const AttentionLogits& a, int64_t begin, int64_t end) {
  bool seen = a.position == nullptr;
  for (int64_t w = 0; w < a.width && !seen; ++w) seen = a.position[w] >= begin;
  if (seen) {
    if (a.dtype == DType::f32)
      logits_of<float>(a, begin, end);
    else if (a.dtype == DType::bf16)
      logits_of<bf16>(a, begin, end);
    else
      logits_of<f16>(a, begin, end);
  }
  for (int64_t r = 0; r < a.rows; ++r) summarise(a, r, begin, end);
}

void combine_splits(const float* maximum, const float* sums, int64_t splits, float* whole_maximum, float* inverse) {
  vec m = load(maximum);
  for (int64_t s = 0; s < splits; s += kWidth) m = max(load(maximum + s), m);
  *whole_maximum = largest(m);
  const vec from = set1(*whole_maximum);
  vec total = zero();
  for (int64_t s = 0; s < splits; s += kWidth)
    total = total + load(sums + s) * exp_nonpositive(load(maximum + s) - from);
  *inverse = 1.0f / sum(total);
}

void shares_of(const AttentionShares& a, int64_t keys) {
  for (int64_t r = 0; r < a.rows; ++r) {
    if (a.inverse[r] == 0.0f) continue;
    const float* x = a.logits + r * kSplitKeys;
    const vec from = set1(a.maximum[r]), part = set1(a.inverse[r]);
    for (int64_t l = 0; l < keys; l += kWidth) {
      const vec e = exp_nonpositive(load(x + l) - from), before = load(a.table + l);
      store(a.table + l, a.use_max ? max(e * part, before) : fma(e, part, before));
    }
  }
}

void finish_scores(float* table, int64_t begin, int64_t end, float divisor) {
  for (int64_t l = begin; l < end; ++l) {
    const float x = table[l] / divisor;
    const uint32_t bits = to_bits(x), rounded = (bits + 0x7f + ((bits >> 8) & 1)) & ~uint32_t(0xff);
    table[l] = x == x ? from_bits(rounded) : x;
  }
}

constexpr AttentionTopkKernels attention_topk_kernels{convert_any, logits_any, combine_splits, shares_of,
                                                      finish_scores};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
