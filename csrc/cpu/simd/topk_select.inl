// topk_select for one instruction set: a radix select finds the last score that is kept, one ordered
// pass writes what lies above it and the first of its equals.
#include "cpu/topk_select.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

// Ascending with the score, NaN lowest, −0 as 0.
VIDTOK_INLINE uint32_t order_key(float x) {
  const uint32_t bits = to_bits(x + 0.0f);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0;
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

template <class T>
void order_keys(const T* score, int64_t n, uint32_t* key) {
  int64_t i = 0;
#if VIDTOK_WIDTH == 16
  for (; i + 16 <= n; i += 16) {
    const __m512 x = _mm512_add_ps(load(score + i).v, _mm512_setzero_ps());
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(int(0x80000000)));
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    _mm512_storeu_si512(key + i, _mm512_maskz_xor_epi32(number, bits, flip));
  }
#elif VIDTOK_WIDTH == 8
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_add_ps(load(score + i).v, _mm256_setzero_ps());
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i flip = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(int(0x80000000)));
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(key + i), _mm256_and_si256(_mm256_xor_si256(bits, flip), number));
  }
#endif
  for (; i < n; ++i) key[i] = order_key(to_float(score[i]));
}

// The keys whose bits above `shift` equal `prefix`, appended to `out`; returns how many.
VIDTOK_INLINE int64_t matching(const uint32_t* key, int64_t n, uint32_t prefix, int shift, uint32_t* out) {
  int64_t found = 0, i = 0;
#if VIDTOK_WIDTH == 16
  // A whole vector is stored; at most i entries are in `out` before, so it never passes n.
  for (; i + 16 <= n; i += 16) {
    const __m512i k = _mm512_loadu_si512(key + i);
    const __mmask16 hit =
        _mm512_cmpeq_epi32_mask(_mm512_srl_epi32(k, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(int(prefix)));
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(hit, k));
    found += __builtin_popcount(hit);
  }
#endif
  for (; i < n; ++i) {
    out[found] = key[i];
    found += key[i] >> shift == prefix;
  }
  return found;
}

// The key of rank `keep` from the top (1 <= keep <= n); *equals is how many of its equals are kept.
uint32_t radix_select(const uint32_t* key, int64_t n, int64_t keep, uint32_t* spare, uint32_t* count, int64_t* equals) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr int kBits[3] = {11, 11, 10};
  uint32_t prefix = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = kShift[digit], bins = 1 << kBits[digit];
    const uint32_t mask = uint32_t(bins - 1);
    uint32_t *c0 = count, *c1 = c0 + bins, *c2 = c1 + bins, *c3 = c2 + bins;
    std::memset(count, 0, size_t(bins) * 16);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      ++c0[key[i] >> shift & mask];
      ++c1[key[i + 1] >> shift & mask];
      ++c2[key[i + 2] >> shift & mask];
      ++c3[key[i + 3] >> shift & mask];
    }
    for (; i < n; ++i) ++c0[key[i] >> shift & mask];
    int bin = bins - 1;
    int64_t here = 0;
    for (;; --bin) {
      here = int64_t(c0[bin]) + c1[bin] + c2[bin] + c3[bin];
      if (here >= keep) break;
      keep -= here;
    }
    prefix = (digit == 0 ? 0 : prefix << kBits[digit]) | uint32_t(bin);
    if (here == keep || digit == 2) {
      // Every key with this prefix is kept, or the key is complete.
      if (digit < 2) {
        *equals = 0;
        return prefix << shift;
      }
      break;
    }
    if (here < n) {
      n = matching(key, n, prefix, shift, spare);
      key = spare;
    }
  }
  *equals = keep;
  return prefix;
}

#if VIDTOK_WIDTH == 16
VIDTOK_INLINE int64_t* append(int64_t* out, __m512i first, __mmask16 take) {
  const __m512i low = _mm512_maskz_compress_epi64(__mmask8(take), first);
  const __m512i high = _mm512_maskz_compress_epi64(__mmask8(take >> 8), _mm512_add_epi64(first, _mm512_set1_epi64(8)));
  const int lows = __builtin_popcount(take & 0xff), highs = __builtin_popcount(take >> 8);
  _mm512_mask_storeu_epi64(out, __mmask8((1u << lows) - 1), low);
  _mm512_mask_storeu_epi64(out + lows, __mmask8((1u << highs) - 1), high);
  return out + lows + highs;
}
#endif

// Writes the indices of keys above `least` and of the first `equals` keys equal to it; `keep` in all.
// With equals = 0 a key equal to `least` counts as above it.
void write_selected(const uint32_t* key, int64_t n, uint32_t least, int64_t equals, int64_t keep, int64_t base,
                    int64_t* out) {
  const bool inclusive = equals == 0;
  int64_t* const stop = out + keep;
  int64_t i = 0;
#if VIDTOK_WIDTH == 16
  const __m512i bound = _mm512_set1_epi32(int(least));
  const __m512i lanes = _mm512_add_epi64(_mm512_set1_epi64(base), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  for (; i + 16 <= n && out < stop; i += 16) {
    const __m512i k = _mm512_loadu_si512(key + i);
    __mmask16 take = _mm512_cmpgt_epu32_mask(k, bound);
    __mmask16 tie = _mm512_cmpeq_epi32_mask(k, bound);
    if (inclusive) {
      take |= tie;
    } else if (tie != 0 && equals > 0) {
      int ties = __builtin_popcount(tie);
      for (; ties > equals; --ties) tie &= __mmask16(~(0x8000u >> (__builtin_clz(uint32_t(tie)) - 16)));
      equals -= ties;
      take |= tie;
    }
    out = append(out, _mm512_add_epi64(lanes, _mm512_set1_epi64(i)), take);
  }
#endif
  for (; i < n && out < stop; ++i) {
    const bool tie = key[i] == least && (inclusive || equals > 0);
    equals -= tie && !inclusive;
    *out = base + i;
    out += key[i] > least || tie;
  }
}

void select_segment(const void* score, DType dtype, int64_t n, int64_t keep, int64_t base, int64_t* index,
                    uint32_t* work) {
  if (keep == 0) return;
  if (keep == n) {
    for (int64_t i = 0; i < n; ++i) index[i] = base + i;
    return;
  }
  uint32_t *count = work, *key = work + kRadixCounters, *spare = key + n;
  if (dtype == DType::f32)
    order_keys(static_cast<const float*>(score), n, key);
  else if (dtype == DType::bf16)
    order_keys(static_cast<const bf16*>(score), n, key);
  else
    order_keys(static_cast<const f16*>(score), n, key);
  int64_t equals = 0;
  const uint32_t least = radix_select(key, n, keep, spare, count, &equals);
  write_selected(key, n, least, equals, keep, base, index);
}

constexpr TopkSelectKernels topk_select_kernels{select_segment};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
