// Vectors of one instruction set. Included once by each unit, which sets VIDTOK_ISA (the namespace)
// and VIDTOK_WIDTH (floats per vector: 1, 8 or 16) first.
//
// Nothing here may be shared between units: the linker keeps one copy of an inline function, and a
// copy compiled for AVX-512 must never serve an older processor. So every name lies in VIDTOK_ISA
// inside an anonymous namespace, and the units use no function templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if VIDTOK_WIDTH > 1
#include <immintrin.h>
#endif

#define VIDTOK_INLINE inline __attribute__((always_inline))

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

constexpr int kWidth = VIDTOK_WIDTH;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

VIDTOK_INLINE float from_bits(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
VIDTOK_INLINE uint32_t to_bits(float x) {
  uint32_t out;
  std::memcpy(&out, &x, 4);
  return out;
}

VIDTOK_INLINE float to_float(float x) { return x; }
VIDTOK_INLINE float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
VIDTOK_INLINE float to_float(f16 x) {
#if VIDTOK_WIDTH > 1
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  if (magnitude >= 0x0400) return from_bits(sign | ((magnitude << 13) + 0x38000000));
  const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2⁻²⁴
  return sign ? -subnormal : subnormal;
#endif
}

VIDTOK_INLINE void from_float(float x, float& out) { out = x; }
VIDTOK_INLINE void from_float(float x, bf16& out) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out.bits = uint16_t((bits >> 16) | 0x40);
    return;
  }
  out.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
VIDTOK_INLINE void from_float(float x, f16& out) {
#if VIDTOK_WIDTH > 1
  out.bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds to infinity
    out.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: the adder rounds half to even
    const float shifted = from_bits(magnitude) + 0.5f;
    out.bits = uint16_t(sign | (to_bits(shifted) - 0x3f000000));
  } else {
    const uint32_t odd = (magnitude >> 13) & 1;
    out.bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
  }
#endif
}

// ---------------------------------------------------------------- a vector of kWidth floats
#if VIDTOK_WIDTH == 16
struct vec {
  __m512 v;
};
VIDTOK_INLINE vec zero() { return {_mm512_setzero_ps()}; }
VIDTOK_INLINE vec set1(float x) { return {_mm512_set1_ps(x)}; }
VIDTOK_INLINE vec operator+(vec a, vec b) { return {_mm512_add_ps(a.v, b.v)}; }
VIDTOK_INLINE vec operator-(vec a, vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
VIDTOK_INLINE vec operator*(vec a, vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
VIDTOK_INLINE vec operator/(vec a, vec b) { return {_mm512_div_ps(a.v, b.v)}; }
VIDTOK_INLINE vec fma(vec a, vec b, vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Like the instructions: the second operand when either is NaN.
VIDTOK_INLINE vec max(vec a, vec b) { return {_mm512_max_ps(a.v, b.v)}; }
VIDTOK_INLINE vec min(vec a, vec b) { return {_mm512_min_ps(a.v, b.v)}; }
VIDTOK_INLINE vec round(vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
VIDTOK_INLINE vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
VIDTOK_INLINE vec load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
VIDTOK_INLINE vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
VIDTOK_INLINE __mmask16 mask_of(int n) { return __mmask16((1u << n) - 1u); }
VIDTOK_INLINE vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask_of(n), p)}; }
VIDTOK_INLINE vec load(const bf16* p, int n) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask_of(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
VIDTOK_INLINE vec load(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(n), p))}; }
VIDTOK_INLINE __m256i to_bf16_bits(vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
}
VIDTOK_INLINE void store(float* p, vec a) { _mm512_storeu_ps(p, a.v); }
VIDTOK_INLINE void store(bf16* p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(a)); }
VIDTOK_INLINE void store(f16* p, vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
VIDTOK_INLINE void store(float* p, vec a, int n) { _mm512_mask_storeu_ps(p, mask_of(n), a.v); }
VIDTOK_INLINE void store(bf16* p, vec a, int n) { _mm256_mask_storeu_epi16(p, mask_of(n), to_bf16_bits(a)); }
VIDTOK_INLINE void store(f16* p, vec a, int n) {
  _mm256_mask_storeu_epi16(p, mask_of(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Past the cache; p aligned to 64 bytes.
VIDTOK_INLINE void stream(float* p, vec a) {
#ifdef VIDTOK_PLAIN_STORES
  store(p, a);
#else
  _mm512_stream_ps(p, a.v);
#endif
}
#elif VIDTOK_WIDTH == 8
struct vec {
  __m256 v;
};
VIDTOK_INLINE vec zero() { return {_mm256_setzero_ps()}; }
VIDTOK_INLINE vec set1(float x) { return {_mm256_set1_ps(x)}; }
VIDTOK_INLINE vec operator+(vec a, vec b) { return {_mm256_add_ps(a.v, b.v)}; }
VIDTOK_INLINE vec operator-(vec a, vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
VIDTOK_INLINE vec operator*(vec a, vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
VIDTOK_INLINE vec operator/(vec a, vec b) { return {_mm256_div_ps(a.v, b.v)}; }
VIDTOK_INLINE vec fma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
VIDTOK_INLINE vec max(vec a, vec b) { return {_mm256_max_ps(a.v, b.v)}; }
VIDTOK_INLINE vec min(vec a, vec b) { return {_mm256_min_ps(a.v, b.v)}; }
VIDTOK_INLINE vec round(vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
VIDTOK_INLINE vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
VIDTOK_INLINE vec load(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
VIDTOK_INLINE vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
VIDTOK_INLINE __m256i mask_of(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
VIDTOK_INLINE vec load(const float* p, int n) { return {_mm256_maskload_ps(p, mask_of(n))}; }
VIDTOK_INLINE vec load(const bf16* p, int n) {
  bf16 buffer[8] = {};
  std::memcpy(buffer, p, size_t(n) * 2);
  return load(buffer);
}
VIDTOK_INLINE vec load(const f16* p, int n) {
  f16 buffer[8] = {};
  std::memcpy(buffer, p, size_t(n) * 2);
  return load(buffer);
}
VIDTOK_INLINE __m128i to_bf16_bits(vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
VIDTOK_INLINE void store(float* p, vec a) { _mm256_storeu_ps(p, a.v); }
VIDTOK_INLINE void store(bf16* p, vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16_bits(a)); }
VIDTOK_INLINE void store(f16* p, vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
VIDTOK_INLINE void store(float* p, vec a, int n) { _mm256_maskstore_ps(p, mask_of(n), a.v); }
VIDTOK_INLINE void store(bf16* p, vec a, int n) {
  bf16 buffer[8];
  store(buffer, a);
  std::memcpy(p, buffer, size_t(n) * 2);
}
VIDTOK_INLINE void store(f16* p, vec a, int n) {
  f16 buffer[8];
  store(buffer, a);
  std::memcpy(p, buffer, size_t(n) * 2);
}
// Past the cache; p aligned to 32 bytes.
VIDTOK_INLINE void stream(float* p, vec a) {
#ifdef VIDTOK_PLAIN_STORES
  store(p, a);
#else
  _mm256_stream_ps(p, a.v);
#endif
}
#else
struct vec {
  float v;
};
VIDTOK_INLINE vec zero() { return {0.0f}; }
VIDTOK_INLINE vec set1(float x) { return {x}; }
VIDTOK_INLINE vec operator+(vec a, vec b) { return {a.v + b.v}; }
VIDTOK_INLINE vec operator-(vec a, vec b) { return {a.v - b.v}; }
VIDTOK_INLINE vec operator*(vec a, vec b) { return {a.v * b.v}; }
VIDTOK_INLINE vec operator/(vec a, vec b) { return {a.v / b.v}; }
VIDTOK_INLINE vec fma(vec a, vec b, vec c) { return {a.v * b.v + c.v}; }
VIDTOK_INLINE vec max(vec a, vec b) { return {a.v > b.v ? a.v : b.v}; }
VIDTOK_INLINE vec min(vec a, vec b) { return {a.v < b.v ? a.v : b.v}; }
VIDTOK_INLINE vec round(vec a) { return {__builtin_nearbyintf(a.v)}; }
template <class T>
VIDTOK_INLINE vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
VIDTOK_INLINE vec load(const T* p, int n) {
  return n > 0 ? load(p) : zero();
}
template <class T>
VIDTOK_INLINE void store(T* p, vec a) {
  from_float(a.v, *p);
}
template <class T>
VIDTOK_INLINE void store(T* p, vec a, int n) {
  if (n > 0) store(p, a);
}
VIDTOK_INLINE void stream(float* p, vec a) { *p = a.v; }
#endif

// Makes streamed stores visible to other threads before they are told of them.
VIDTOK_INLINE void stream_fence() {
#if VIDTOK_WIDTH > 1 && !defined(VIDTOK_PLAIN_STORES)
  _mm_sfence();
#endif
}

// Sum of the lanes in a fixed order.
VIDTOK_INLINE float sum(vec a) {
#if VIDTOK_WIDTH == 16
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#elif VIDTOK_WIDTH == 8
  const __m256 half = a.v;
#endif
#if VIDTOK_WIDTH > 1
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 eighth = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(eighth, _mm_shuffle_ps(eighth, eighth, 1)));
#else
  return a.v;
#endif
}

VIDTOK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
