// Packed dot products for one instruction set.
#include "cpu/gram.h"
#include "cpu/simd/words.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {
namespace gram {

#if VIDTOK_WIDTH == 16
constexpr int kPanel = 16, kRows = 8;
#else
constexpr int kPanel = 8, kRows = 4;
#endif
// Panels of columns in one register block: kRows × kGroup vectors of sums.
constexpr int kGroup = 3;
constexpr int64_t kPanelWords = kGramBlock * kPanel;

int64_t words(DType dtype, int64_t c) { return pairs(dtype) ? (c + 1) / 2 : c; }

VIDTOK_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---------------------------------------------------------------- packing

#if VIDTOK_WIDTH == 16
VIDTOK_INLINE void transpose(vec (&r)[16]) {
  __m512 t[16], s[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    s[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    s[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    s[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    s[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // s[4b + q] holds, in each 128-bit lane l, column 4l + q of rows 4b to 4b + 3.
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512 low = _mm512_shuffle_f32x4(s[q], s[4 + q], 0x88),
                 high = _mm512_shuffle_f32x4(s[8 + q], s[12 + q], 0x88);
    const __m512 low2 = _mm512_shuffle_f32x4(s[q], s[4 + q], 0xdd),
                 high2 = _mm512_shuffle_f32x4(s[8 + q], s[12 + q], 0xdd);
    r[q].v = _mm512_shuffle_f32x4(low, high, 0x88);
    r[8 + q].v = _mm512_shuffle_f32x4(low, high, 0xdd);
    r[4 + q].v = _mm512_shuffle_f32x4(low2, high2, 0x88);
    r[12 + q].v = _mm512_shuffle_f32x4(low2, high2, 0xdd);
  }
}
#elif VIDTOK_WIDTH == 8
VIDTOK_INLINE void transpose(vec (&r)[8]) {
  __m256 t[8], s[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    s[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    s[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    s[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    s[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    r[q].v = _mm256_permute2f128_ps(s[q], s[4 + q], 0x20);
    r[4 + q].v = _mm256_permute2f128_ps(s[q], s[4 + q], 0x31);
  }
}
#endif

template <class T, bool kPairs>
void pack_panels(const GramPack& a, int64_t panel_begin, int64_t panel_end, int64_t panels) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const T* row[kPanel];
    for (int r = 0; r < kPanel; ++r) {
      const int64_t i = p * kPanel + r;
      row[r] = i < a.count ? x + (a.token ? int64_t(a.token[i]) : i) * a.x_stride : nullptr;
    }
    float* norm = a.norm ? a.norm + p * kPanel : nullptr;
    float* out = a.out + p * kPanelWords;
    for (int64_t block = a.begin; block < a.end; block += kGramBlock, out += panels * kPanelWords) {
      const int64_t stop = block + kGramBlock < a.end ? block + kGramBlock : a.end;
#if VIDTOK_WIDTH > 1
      constexpr int kChannels = kPairs ? 2 : 1;
      vec squares = zero();
      for (int64_t k = block; k < stop; k += kPanel) {
        const int64_t channels = a.c - k * kChannels;
        vec v[kPanel];
#pragma GCC unroll 16
        for (int r = 0; r < kPanel; ++r)
          v[r] = row[r] ? load_words<T, kPairs>(row[r] + k * kChannels, channels) : zero();
        transpose(v);
        float* to = out + (k - block) * kPanel;
#pragma GCC unroll 16
        for (int r = 0; r < kPanel; ++r) {
          store(to + r * kPanel, v[r]);
          squares = dot<kPairs>(v[r], v[r], squares);
        }
      }
      if (norm) store(norm, block == 0 ? squares : load(norm) + squares);
#else
      float squares[kPanel] = {};
      for (int64_t k = block; k < stop; ++k)
        for (int r = 0; r < kPanel; ++r) {
          const float v = row[r] && k < a.c ? to_float(row[r][k]) : 0.0f;
          out[(k - block) * kPanel + r] = v;
          squares[r] += v * v;
        }
      for (int r = 0; norm && r < kPanel; ++r) norm[r] = block == 0 ? squares[r] : norm[r] + squares[r];
#endif
    }
  }
}

void pack(const GramPack& a, int64_t panel_begin, int64_t panel_end, int64_t panels) {
  if (a.dtype == DType::f32) return pack_panels<float, false>(a, panel_begin, panel_end, panels);
  if (a.dtype == DType::f16) return pack_panels<f16, false>(a, panel_begin, panel_end, panels);
  if (pairs(a.dtype)) return pack_panels<bf16, kBf16Dot>(a, panel_begin, panel_end, panels);
  return pack_panels<bf16, false>(a, panel_begin, panel_end, panels);
}

// ---------------------------------------------------------------- dot products

#if VIDTOK_WIDTH > 1
// `next` holds columns that are wanted soon; they and the rows of the next panel are fetched meanwhile.
template <int MR, int NV, bool kPairs>
void block(const float* __restrict a, const float* __restrict b, int64_t words, float* g, int64_t ldg, bool first,
           const float* next) {
  vec acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = zero();
      prefetch(g + i * ldg + j * kPanel);
    }
  for (int64_t k = 0; k < words; k += 8) {
    prefetch_l2(next + k * 2);
#pragma GCC unroll 4
    for (int64_t q = k; q < k + 8; ++q) {
      prefetch_l2(a + q * kPanel + kPanelWords);
      vec col[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) col[j] = load(b + q * kPanel + j * kPanelWords);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const vec row = set1(a[q * kPanel + i]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = dot<kPairs>(row, col[j], acc[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = g + i * ldg + j * kPanel;
      store(to, first ? acc[i][j] : load(to) + acc[i][j]);
    }
}
#else
template <int MR, int NV, bool kPairs>
void block(const float* __restrict a, const float* __restrict b, int64_t words, float* g, int64_t ldg, bool first,
           const float*) {
  for (int j = 0; j < NV; ++j, b += kPanelWords, g += kPanel) {
    float acc[MR][kPanel] = {};
    for (int64_t k = 0; k < words; ++k)
      for (int i = 0; i < MR; ++i)
        for (int r = 0; r < kPanel; ++r) acc[i][r] += a[k * kPanel + i] * b[k * kPanel + r];
    for (int i = 0; i < MR; ++i)
      for (int r = 0; r < kPanel; ++r) g[i * ldg + r] = first ? acc[i][r] : g[i * ldg + r] + acc[i][r];
  }
}
#endif

template <int MR, bool kPairs>
VIDTOK_INLINE void block_of(int nv, const float* a, const float* b, int64_t words, float* g, int64_t ldg, bool first,
                            const float* next) {
  if (nv == 3) return block<MR, 3, kPairs>(a, b, words, g, ldg, first, next);
  if (nv == 2) return block<MR, 2, kPairs>(a, b, words, g, ldg, first, next);
  block<MR, 1, kPairs>(a, b, words, g, ldg, first, next);
}

// The columns of one group stay in L1 while the rows pass by.
template <bool kPairs>
void tile_of(const GramTile& t) {
  const int64_t blocks = (t.words + kGramBlock - 1) / kGramBlock;
  for (int64_t kb = 0; kb < blocks; ++kb) {
    const int64_t left = t.words - kb * kGramBlock, words = left < kGramBlock ? left : kGramBlock;
    const bool first = t.first && kb == 0;
    for (int64_t j = t.panel_begin, group_end; j < t.panel_end; j = group_end) {
      const int64_t left_over = t.panel_end - j;
      // Four make two pairs: a single panel has too few sums to hide their latency.
      group_end = left_over == 4 ? j + 2 : left_over > kGroup ? j + kGroup : t.panel_end;
      for (int64_t r = t.row_begin; r < t.row_end; r += kRows) {
        const int64_t panel = r / kPanel, from = t.symmetric && panel > j ? panel : j;
        if (from >= group_end) break;
        const float* a = t.a + (kb * t.a_panels + panel) * kPanelWords + r % kPanel;
        const float* b = t.b + (kb * t.b_panels + from) * kPanelWords;
        float* g = t.g + r * t.ldg + from * kPanel;
        const int nv = int(group_end - from);
        // Each row block fetches its share of the next group: one line for every eight words.
        const float* next =
            t.b + (kb * t.b_panels + group_end) * kPanelWords + (r - t.row_begin) / kRows * (2 * kGramBlock);
#if VIDTOK_WIDTH == 16
        if (t.row_end - r <= 4) {
          block_of<4, kPairs>(nv, a, b, words, g, t.ldg, first, next);
          continue;
        }
#endif
        block_of<kRows, kPairs>(nv, a, b, words, g, t.ldg, first, next);
      }
    }
  }
}

void tile(const GramTile& t, DType dtype) {
  if (pairs(dtype)) return tile_of<kBf16Dot>(t);
  tile_of<false>(t);
}

// ---------------------------------------------------------------- distance units

VIDTOK_INLINE vec unit(vec g, vec norms, vec factor, vec largest, vec least) {
  return round(max(min(fma(set1(-2.0f), g, norms) * factor, largest), least));
}

void units(const GramUnits& a) {
  const vec factor = set1(a.factor), largest = set1(a.largest), least = set1(a.least);
  for (int64_t row = a.row_begin; row < a.row_end; row += kPanel) {
    const int64_t rows = a.rows - row < kPanel ? a.rows - row : kPanel;
    for (int64_t p = a.panel_begin; p < a.panel_end; ++p) {
      const int64_t col = p * kPanel, cols = a.cols - col < kPanel ? a.cols - col : kPanel;
      if (a.symmetric && col < row && rows == kPanel) continue;
      float* g = a.g + row * a.ldg + col;
      const bool diagonal = a.symmetric && row == col;
#if VIDTOK_WIDTH > 1
      vec v[kPanel];
      const vec norm = load(a.col_norm + col);
#pragma GCC unroll 16
      for (int r = 0; r < kPanel; ++r) {
        if (r >= rows) {
          v[r] = zero();
          continue;
        }
        v[r] = unit(load(g + r * a.ldg), set1(a.row_norm[row + r]) + norm, factor, largest, least);
        store(g + r * a.ldg, v[r]);
      }
      if (cols < kPanel || diagonal) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = cols; c < kPanel; ++c) g[r * a.ldg + c] = 0.0f;
          if (diagonal) g[r * a.ldg + r] = 0.0f;
        }
#pragma GCC unroll 16
        for (int r = 0; r < kPanel; ++r)
          if (r < rows) v[r] = load(g + r * a.ldg);
      }
      if (a.mirror == nullptr || diagonal) continue;
      transpose(v);
#pragma GCC unroll 16
      for (int c = 0; c < kPanel; ++c)
        if (c < cols) store(a.mirror + (col + c) * a.ldm + row, v[c]);
#else
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < kPanel; ++c) {
          const vec n = set1(a.row_norm[row + r]) + set1(a.col_norm[col + c]);
          float u = unit(set1(g[r * a.ldg + c]), n, factor, largest, least).v;
          if (c >= cols || (diagonal && r == c)) u = 0.0f;
          g[r * a.ldg + c] = u;
        }
      if (a.mirror == nullptr || diagonal) continue;
      for (int64_t c = 0; c < cols; ++c)
        for (int64_t r = 0; r < kPanel; ++r) a.mirror[(col + c) * a.ldm + row + r] = r < rows ? g[r * a.ldg + c] : 0.0f;
#endif
    }
  }
}

}  // namespace gram

constexpr GramKernels gram_kernels{gram::kPanel, gram::words, gram::pack, gram::tile, gram::units};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
