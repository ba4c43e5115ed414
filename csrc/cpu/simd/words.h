// Words of packed tokens: fp32 numbers, or pairs of bf16 numbers where the instruction set multiplies those.
#pragma once

#include "cpu/simd/vec.h"
#include "vidtok/common.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

#ifdef VIDTOK_BF16_DOT
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

VIDTOK_INLINE bool pairs(DType dtype) { return kBf16Dot && dtype == DType::bf16; }

// acc + a·b; of pairs, both products.
template <bool kPairs>
VIDTOK_INLINE vec dot(vec a, vec b, vec acc) {
#ifdef VIDTOK_BF16_DOT
  if (kPairs) return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
#endif
  return fma(a, b, acc);
}

// kWidth words from p, of which `channels` numbers are there.
template <class T, bool kPairs>
VIDTOK_INLINE vec load_words(const T* p, int64_t channels) {
#ifdef VIDTOK_BF16_DOT
  if (kPairs) {
    if (channels >= 32) return {_mm512_loadu_ps(reinterpret_cast<const float*>(p))};
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << channels) - 1), p))};
  }
#endif
  return channels >= kWidth ? load(p) : load(p, int(channels));
}

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
