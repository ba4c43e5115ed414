// What every kernel file is written in. It compiles three ways: by nvcc, by NVRTC (which has no standard
// headers; sm_70 is checked so) and, with VIDTOK_HOST, by a C++ compiler for the host, where host/host.h
// plays the GPU. All PTX and every CUDA built-in stays in tile/, each with its host twin beside it.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long;
#else
#include <cmath>
#include <cstddef>
#include <cstdint>
#endif

#if defined(VIDTOK_HOST)
#include "cuda/host/host.h"
#define VIDTOK_SM VIDTOK_HOST  // the SM whose code paths the host runs
#elif defined(__CUDA_ARCH__)
#define VIDTOK_SM (__CUDA_ARCH__ / 10)
#else
#define VIDTOK_SM 0  // nvcc's pass over host code: device functions are parsed, not compiled
#endif

#define VIDTOK_DEVICE __device__ __forceinline__

#if defined(VIDTOK_HOST)
#define VIDTOK_UNROLL
#define VIDTOK_NO_UNROLL
#else
#define VIDTOK_UNROLL _Pragma("unroll")
#define VIDTOK_NO_UNROLL _Pragma("unroll 1")
#endif

namespace vidtok::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <class To, class From>
VIDTOK_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  union {
    From from;
    To to;
  } both = {from};
  return both.to;
}

template <class T>
VIDTOK_DEVICE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
VIDTOK_DEVICE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

// For what an SM does not have and the launcher has refused.
VIDTOK_DEVICE void trap() {
#if defined(VIDTOK_HOST)
  host::fault("this code path does not exist on sm_%d", VIDTOK_SM);
#else
  asm volatile("trap;");
#endif
}

// a·b + c rounded once. The build fuses nothing by itself (-fmad=false), so that every place says which it wants.
VIDTOK_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
VIDTOK_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

template <class T>
VIDTOK_DEVICE T infinity();
template <>
VIDTOK_DEVICE float infinity<float>() {
  return bits_as<float>(0x7f800000u);
}
template <>
VIDTOK_DEVICE double infinity<double>() {
  return bits_as<double>(uint64_t(0x7ff) << 52);
}

VIDTOK_DEVICE float to_float(float x) { return x; }
VIDTOK_DEVICE float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
VIDTOK_DEVICE float to_float(f16 x) {
#if defined(VIDTOK_HOST)
  return float(bits_as<_Float16>(x.bits));
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// Rounds to nearest, ties to even.
template <class T>
VIDTOK_DEVICE T from_float(float x);
template <>
VIDTOK_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
VIDTOK_DEVICE bf16 from_float<bf16>(float x) {
#if !defined(VIDTOK_HOST) && VIDTOK_SM >= 80
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t u = bits_as<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}
template <>
VIDTOK_DEVICE f16 from_float<f16>(float x) {
#if defined(VIDTOK_HOST)
  return f16{bits_as<uint16_t>(_Float16(x))};
#else
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

}  // namespace vidtok::cuda
