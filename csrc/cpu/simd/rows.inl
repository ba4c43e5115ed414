// Rows of tokens for one instruction set: copies and sums, shared by the operators that move.
#pragma once

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

#define VIDTOK_LAMBDA __attribute__((always_inline))

constexpr int64_t kLine = 64;

VIDTOK_INLINE void prefetch_span(const void* p, int64_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += kLine) prefetch(at + i);
}

// Into the nearest cache only, for data that is read once.
VIDTOK_INLINE void prefetch_once(const void* p, int64_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i, 0, 0);
}

// Starts the address translation of a row that is read soon: on 4 KiB pages it costs as much as the data.
VIDTOK_INLINE void prefetch_pages(const void* p, int64_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += 4096) __builtin_prefetch(at + i, 0, 0);
  if (bytes > 0) __builtin_prefetch(at + bytes - 1, 0, 0);
}

// Past the cache; p aligned to one vector of T.
VIDTOK_INLINE void stream_row(float* p, vec a) { stream(p, a); }
template <class T>
VIDTOK_INLINE void stream_row(T* p, vec a) {
#if VIDTOK_WIDTH == 1 || defined(VIDTOK_PLAIN_STORES)
  store(p, a);
#elif VIDTOK_WIDTH == 16
  T half[16];
  store(half, a);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
#else
  T half[8];
  store(half, a);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
#endif
}

// Copies a row of `left` bytes; the row `next`, unless it is null, is fetched meanwhile.
VIDTOK_INLINE void copy_bytes(char* to, const char* from, int64_t left, bool streaming, const char* next) {
#if VIDTOK_WIDTH > 1
  constexpr int64_t kBytes = kWidth * 4;
  constexpr int64_t kLongest = 16 * 1024;  // half of the smallest L1 holds what is fetched and not yet read
  if (streaming && left >= 8 * kBytes) {
    const int64_t lead = left < kLongest ? left : kLongest;
    int64_t ahead = lead - left;  // of `next`; negative: still in this row
    const int64_t head = (kBytes - (reinterpret_cast<uintptr_t>(to) & (kBytes - 1))) & (kBytes - 1);
    std::memcpy(to, from, size_t(head));
    to += head, from += head, left -= head, ahead += head;
    for (; left >= 4 * kBytes; to += 4 * kBytes, from += 4 * kBytes, left -= 4 * kBytes, ahead += 4 * kBytes) {
      if (ahead < 0)
        prefetch_once(from + lead, 4 * kBytes);
      else if (next)
        prefetch_once(next + ahead, 4 * kBytes);
      const vec a = load(reinterpret_cast<const float*>(from));
      const vec b = load(reinterpret_cast<const float*>(from + kBytes));
      const vec d = load(reinterpret_cast<const float*>(from + 2 * kBytes));
      const vec e = load(reinterpret_cast<const float*>(from + 3 * kBytes));
      stream(reinterpret_cast<float*>(to), a);
      stream(reinterpret_cast<float*>(to + kBytes), b);
      stream(reinterpret_cast<float*>(to + 2 * kBytes), d);
      stream(reinterpret_cast<float*>(to + 3 * kBytes), e);
    }
  } else if (next) {
    prefetch_once(next, left < kLongest ? left : kLongest);
  }
#else
  (void)streaming;
  (void)next;
#endif
  // Rows without channels may have no address.
  if (left > 0) std::memcpy(to, from, size_t(left));
}

// y = the sum of weight · row over the rows that `each` visits, in that order, divided by `divisor`;
// c channels. Four vectors of the output stay in registers while the rows pass by.
template <class T, class Each>
VIDTOK_INLINE void sum_rows(T* y, int64_t c, Each each, float divisor, bool streaming) {
  constexpr int64_t kStep = 4 * kWidth;
  const vec d = set1(divisor);
  const bool divide = divisor != 1.0f;
  const bool past = streaming && (reinterpret_cast<uintptr_t>(y) & (kWidth * sizeof(T) - 1)) == 0;
  int64_t j = 0;
  for (; j + kStep <= c; j += kStep) {
    vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    each([&](const T* row, float weight) VIDTOK_LAMBDA {
      const T* x = row + j;
      const vec w = set1(weight);
      s0 = fma(w, load(x), s0);
      s1 = fma(w, load(x + kWidth), s1);
      s2 = fma(w, load(x + 2 * kWidth), s2);
      s3 = fma(w, load(x + 3 * kWidth), s3);
    });
    if (divide) s0 = s0 / d, s1 = s1 / d, s2 = s2 / d, s3 = s3 / d;
    if (past) {
      stream_row(y + j, s0);
      stream_row(y + j + kWidth, s1);
      stream_row(y + j + 2 * kWidth, s2);
      stream_row(y + j + 3 * kWidth, s3);
    } else {
      store(y + j, s0);
      store(y + j + kWidth, s1);
      store(y + j + 2 * kWidth, s2);
      store(y + j + 3 * kWidth, s3);
    }
  }
  for (; j < c; j += kWidth) {
    const int n = c - j < kWidth ? int(c - j) : kWidth;
    vec s = zero();
    each([&](const T* row, float weight) VIDTOK_LAMBDA { s = fma(set1(weight), load(row + j, n), s); });
    if (divide) s = s / d;
    store(y + j, s, n);
  }
}

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
