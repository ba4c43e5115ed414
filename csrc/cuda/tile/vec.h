// Loads and stores of 16 bytes at a time.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

// BYTES of memory in one access; 1, 2, 4, 8 or 16.
template <int BYTES>
struct alignas(BYTES) Bytes {
  uint8_t b[BYTES];
};
template <>
struct alignas(16) Bytes<16> {
  uint32_t w[4];
};
template <>
struct alignas(8) Bytes<8> {
  uint32_t w[2];
};
template <>
struct alignas(4) Bytes<4> {
  uint32_t w[1];
};
template <>
struct alignas(2) Bytes<2> {
  uint16_t w[1];
};

// N elements of T in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "an access is at most 16 bytes");
  T v[N];
};

template <class T>
constexpr int kPerAccess = 16 / int(sizeof(T));

template <class T, int N>
VIDTOK_DEVICE Vec<T, N> load(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}

template <class T, int N>
VIDTOK_DEVICE void store(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}

}  // namespace vidtok::cuda
