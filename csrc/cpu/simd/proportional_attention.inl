// proportional_attention for one instruction set.
//
// Both products run on packed words: fp32 numbers, or pairs of bf16 numbers where the set multiplies those. Keys
// are packed in panels of kColumns keys, channel after channel, values in panels of kColumns channels, key after
// key; rows of queries and of weights are broadcast word by word.
#include "cpu/proportional_attention.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/transpose.h"
#include "cpu/simd/words.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {
namespace proportional {

// kRows × kVectors sums live in registers.
#if VIDTOK_WIDTH == 16
constexpr int kRows = 6, kVectors = 4;
#elif VIDTOK_WIDTH == 8
constexpr int kRows = 4, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 4;
#endif
constexpr int64_t kColumns = kVectors * kWidth;
// Query rows and keys of one block of scores, which stays in cache.
constexpr int64_t kBlockRows = 24, kBlockKeys = 512;

VIDTOK_INLINE int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
VIDTOK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Keys of a block: as few blocks as kBlockKeys allows, of even size.
VIDTOK_INLINE int64_t block_keys(int64_t keys) {
  const int64_t blocks = keys > kBlockKeys ? (keys + kBlockKeys - 1) / kBlockKeys : 1;
  return up(keys > 0 ? (keys + blocks - 1) / blocks : 1, kColumns);
}

template <bool kPairs>
struct Sizes {
  int64_t words;       // of a row of queries
  int64_t channels;    // dim in whole panels
  int64_t block;       // keys of a block, whole panels
  int64_t all;         // keys in whole blocks
  int64_t value_rows;  // words along the keys of a block

  Sizes(int64_t keys, int64_t dim) {
    words = kPairs ? (dim + 1) / 2 : dim;
    channels = up(dim, kColumns);
    block = block_keys(keys);
    all = up(keys, block);
    value_rows = kPairs ? (block + 1) / 2 : block;
  }
  int64_t keys_floats() const { return up(all * words, 16); }
  int64_t values_floats() const { return up(all / block * value_rows * channels, 16); }
  int64_t bias_floats() const { return up(all, 16); }
  int64_t query_floats() const { return up(kBlockRows * words, 16); }
  int64_t score_floats() const { return kBlockRows * up(block, 16); }
  int64_t sum_floats() const { return up(kBlockRows * channels, 16); }
  int64_t total() const {
    return keys_floats() + values_floats() + bias_floats() + query_floats() + score_floats() + sum_floats();
  }
};

// c = (c +) a·b for kRows rows of `words` words and NV vectors of columns.
template <int NV, bool kPairs>
void product(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t words, float* __restrict c,
             int64_t ldc, bool add) {
  vec acc[kRows][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = add ? load(c + i * ldc + j * kWidth) : zero();
#pragma GCC unroll 2
  for (int64_t w = 0; w < words; ++w) {
    vec column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = load(b + w * kColumns + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const vec row = set1(a[i * lda + w]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = dot<kPairs>(row, column[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * kWidth, acc[i][j]);
}

// All rows of a block and `columns` columns. The panel of columns stays in L1 while the rows pass by.
template <bool kPairs>
void products(const float* a, int64_t lda, int64_t rows, const float* b, int64_t words, int64_t columns, float* c,
              int64_t ldc, bool add) {
  for (int64_t j = 0; j < columns; j += kColumns, b += words * kColumns) {
    const int vectors = int((least(columns - j, kColumns) + kWidth - 1) / kWidth);
    for (int64_t i = 0; i < rows; i += kRows) {
      const float* row = a + i * lda;
      float* to = c + i * ldc + j;
      if (vectors == 4)
        product<kVectors, kPairs>(row, lda, b, words, to, ldc, add);
      else if (vectors == 3)
        product<3, kPairs>(row, lda, b, words, to, ldc, add);
      else if (vectors == 2)
        product<2, kPairs>(row, lda, b, words, to, ldc, add);
      else
        product<1, kPairs>(row, lda, b, words, to, ldc, add);
    }
  }
}

// ---------------------------------------------------------------- packing

template <class T, bool kPairs>
void pack_queries(const T* q, int64_t stride, int64_t rows, int64_t dim, int64_t words, float* out) {
  constexpr int kChannels = kPairs ? 2 : 1;
  const int64_t whole = up(rows, kRows);
  for (int64_t i = 0; i < whole; ++i, out += words)
    for (int64_t w = 0; w < words; w += kWidth) {
      const int64_t n = least(words - w, kWidth);
      const vec held = i < rows ? load_words<T, kPairs>(q + i * stride + w * kChannels, dim - w * kChannels) : zero();
      if (n == kWidth)
        store(out + w, held);
      else
        store(out + w, held, int(n));
    }
}

template <class T, bool kPairs>
void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t all, int64_t dim, int64_t words, float* out) {
  constexpr int kChannels = kPairs ? 2 : 1;
  for (int64_t panel = 0; panel < all; panel += kColumns, out += words * kColumns)
    for (int64_t j = 0; j < kColumns; j += kWidth)
      for (int64_t w = 0; w < words; w += kWidth) {
        const int n = int(least(words - w, kWidth));
        vec r[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          const int64_t key = panel + j + i;
          r[i] = key < keys ? load_words<T, kPairs>(k + key * stride + w * kChannels, dim - w * kChannels) : zero();
        }
        transpose_square(r);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          if (i < n) store(out + (w + i) * kColumns + j, r[i]);
      }
}

// Words [w, w + 1) of kWidth channels: one key's, or two keys' numbers side by side.
template <class T, bool kPairs>
VIDTOK_INLINE vec value_words(const T* v, int64_t stride, int64_t w, int64_t keys, int64_t c, int64_t dim) {
  const int n = int(least(dim - c, kWidth));
  const int64_t key = kPairs ? 2 * w : w;
  if (key >= keys || n <= 0) return zero();
  const vec even = n == kWidth ? load(v + key * stride + c) : load(v + key * stride + c, n);
#ifdef VIDTOK_BF16_DOT
  if (kPairs) {
    const vec odd = key + 1 >= keys ? zero()
                    : n == kWidth   ? load(v + (key + 1) * stride + c)
                                    : load(v + (key + 1) * stride + c, n);
    // bf16 numbers lie in the upper halves of the lanes.
    return {_mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even.v), 16), _mm512_castps_si512(odd.v)))};
  }
#endif
  return even;
}

template <class T, bool kPairs>
void pack_values(const T* v, int64_t stride, int64_t keys, int64_t dim, const Sizes<kPairs>& s, float* out) {
  for (int64_t block = 0; block < s.all; block += s.block, v += s.block * stride)
    for (int64_t panel = 0; panel < s.channels; panel += kColumns)
      for (int64_t w = 0; w < s.value_rows; ++w, out += kColumns)
#pragma GCC unroll 4
        for (int64_t j = 0; j < kColumns; j += kWidth)
          store(out + j, value_words<T, kPairs>(v, stride, w, keys - block, panel + j, dim));
}

// ---------------------------------------------------------------- softmax

// Scores become weights, exp(score·scale + bias − the row's maximum), in place; of pairs, as bf16. Returns their sum.
template <bool kPairs>
VIDTOK_INLINE float weigh(float* s, const float* bias, int64_t keys, float scale, float& maximum) {
  const vec factor = set1(scale);
  vec most = set1(maximum);
  for (int64_t j = 0; j < keys; j += kWidth) {
    const vec score = fma(load(s + j), factor, load(bias + j));
    store(s + j, score);
    most = max(most, score);
  }
  float lanes[kWidth], top = maximum;
  store(lanes, most);
  for (int i = 0; i < kWidth; ++i) top = lanes[i] > top ? lanes[i] : top;
  maximum = top;
  // A row that has seen no key yet: every weight is 0.
  const vec shift = set1(top == -__builtin_inff() ? 0.0f : top);
  vec total = zero();
#ifdef VIDTOK_BF16_DOT
  if (kPairs) {
    for (int64_t j = 0; j < keys; j += 2 * kWidth) {
      const vec low = exp_nonpositive(load(s + j) - shift);
      const vec high = j + kWidth < keys ? exp_nonpositive(load(s + j + kWidth) - shift) : zero();
      total = total + low + high;
      _mm512_storeu_si512(s + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
    }
    return sum(total);
  }
#endif
  for (int64_t j = 0; j < keys; j += kWidth) {
    const vec weight = exp_nonpositive(load(s + j) - shift);
    total = total + weight;
    store(s + j, weight);
  }
  return sum(total);
}

VIDTOK_INLINE float exp_of(float x) {
  float lanes[kWidth];
  store(lanes, exp_nonpositive(set1(x)));
  return lanes[0];
}

template <class T, bool kPairs>
void head_of(const ProportionalAttentionArgs& a, int64_t batch, int64_t head, int64_t begin, int64_t end,
             float* workspace) {
  const Sizes<kPairs> s(a.keys, a.dim);
  const T* q = static_cast<const T*>(a.q) + batch * a.q_stride[0] + head * a.q_stride[1];
  const T* k = static_cast<const T*>(a.k) + batch * a.k_stride[0] + head * a.k_stride[1];
  const T* v = static_cast<const T*>(a.v) + batch * a.v_stride[0] + head * a.v_stride[1];
  float* keys = workspace;
  float* values = keys + s.keys_floats();
  float* bias = values + s.values_floats();
  float* query = bias + s.bias_floats();
  float* score = query + s.query_floats();
  float* sums = score + s.score_floats();
  pack_keys<T, kPairs>(k, a.k_stride[2], a.keys, s.all, a.dim, s.words, keys);
  pack_values<T, kPairs>(v, a.v_stride[2], a.keys, a.dim, s, values);
  const float* given = a.bias == nullptr ? nullptr : a.bias + batch * a.bias_stride;
  for (int64_t j = 0; j < s.all; ++j) bias[j] = j >= a.keys ? -__builtin_inff() : given == nullptr ? 0.0f : given[j];

  const int64_t lds = up(s.block, 16);
  for (int64_t r = begin; r < end; r += kBlockRows) {
    const int64_t rows = least(end - r, kBlockRows), whole = up(rows, kRows);
    float maximum[kBlockRows], total[kBlockRows];
    pack_queries<T, kPairs>(q + r * a.q_stride[2], a.q_stride[2], rows, a.dim, s.words, query);
    for (int64_t i = 0; i < whole; ++i) maximum[i] = -__builtin_inff(), total[i] = 0.0f;
    for (int64_t first = 0; first < a.keys; first += s.block) {
      const int64_t count = up(least(a.keys - first, s.block), kWidth);
      products<kPairs>(query, s.words, whole, keys + first * s.words, s.words, count, score, lds, false);
      for (int64_t i = 0; i < whole; ++i) {
        const float before = maximum[i];
        const float weights = weigh<kPairs>(score + i * lds, bias + first, count, a.scale, maximum[i]);
        if (first == 0) {
          total[i] = weights;
          continue;
        }
        const float share = maximum[i] == before ? 1.0f : exp_of(before - maximum[i]);
        total[i] = total[i] * share + weights;
        if (share != 1.0f)
          for (int64_t c = 0; c < a.dim; c += kWidth)
            store(sums + i * s.channels + c, load(sums + i * s.channels + c) * set1(share));
      }
      const float* packed = values + first / s.block * s.value_rows * s.channels;
      const int64_t words = kPairs ? (count + 1) / 2 : count;
      for (int64_t c = 0; c < s.channels; c += kColumns)
        products<kPairs>(score, lds, whole, packed + c * s.value_rows, words, least(a.dim - c, kColumns), sums + c,
                         s.channels, first > 0);
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* out = static_cast<T*>(a.out) + ((batch * a.rows + r + i) * a.heads + head) * a.dim;
      const vec inverse = set1(total[i] == 0.0f ? 0.0f : 1.0f / total[i]);
      for (int64_t c = 0; c < a.dim; c += kWidth) {
        const vec held = a.keys > 0 ? load(sums + i * s.channels + c) * inverse : zero();
        const int64_t n = a.dim - c;
        if (n >= kWidth)
          store(out + c, held);
        else
          store(out + c, held, int(n));
      }
    }
  }
}

int64_t workspace(DType dtype, int64_t keys, int64_t dim) {
  return pairs(dtype) ? Sizes<kBf16Dot>(keys, dim).total() : Sizes<false>(keys, dim).total();
}

void head(const ProportionalAttentionArgs& a, int64_t batch, int64_t h, int64_t begin, int64_t end, float* room) {
  if (a.dtype == DType::f32) return head_of<float, false>(a, batch, h, begin, end, room);
  if (a.dtype == DType::f16) return head_of<f16, false>(a, batch, h, begin, end, room);
  if (pairs(a.dtype)) return head_of<bf16, kBf16Dot>(a, batch, h, begin, end, room);
  head_of<bf16, false>(a, batch, h, begin, end, room);
}

}  // namespace proportional

constexpr ProportionalAttentionKernels proportional_attention_kernels{proportional::workspace, proportional::head};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
