// adjacent_similarity for one instruction set.
#include "cpu/adjacent_similarity.h"
#include "cpu/simd/rows.inl"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

struct Products {
  float dot, squared;
};

// a·b and a·a in the same order, so that equal rows give equal products. Sums are closed every 64 vectors:
// one running sum over thousands of channels would err by more than a step of the cosine's grid.
template <class T>
VIDTOK_INLINE Products products(const T* a, const T* b, int64_t c) {
  constexpr int64_t kStep = 4 * kWidth, kRun = 16 * kStep;
  Products total{0.0f, 0.0f};
  for (int64_t j = 0; j < c;) {
    vec d0 = zero(), d1 = zero(), d2 = zero(), d3 = zero();
    vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    const int64_t stop = c - j < kRun ? c : j + kRun;
    for (; j + kStep <= stop; j += kStep) {
      const vec a0 = load(a + j), a1 = load(a + j + kWidth);
      const vec a2 = load(a + j + 2 * kWidth), a3 = load(a + j + 3 * kWidth);
      d0 = fma(a0, load(b + j), d0);
      d1 = fma(a1, load(b + j + kWidth), d1);
      d2 = fma(a2, load(b + j + 2 * kWidth), d2);
      d3 = fma(a3, load(b + j + 3 * kWidth), d3);
      s0 = fma(a0, a0, s0);
      s1 = fma(a1, a1, s1);
      s2 = fma(a2, a2, s2);
      s3 = fma(a3, a3, s3);
    }
    for (; j < stop; j += kWidth) {
      const int n = stop - j < kWidth ? int(stop - j) : kWidth;
      const vec a0 = load(a + j, n);
      d0 = fma(a0, load(b + j, n), d0);
      s0 = fma(a0, a0, s0);
    }
    total.dot += sum((d0 + d1) + (d2 + d3));
    total.squared += sum((s0 + s1) + (s2 + s3));
  }
  return total;
}

template <class T>
VIDTOK_INLINE float squared_norm(const T* a, int64_t c) {
  return products(a, a, c).squared;
}

// Where row `l` of frame `f` lies, counted in rows of the block from there on; null past its end.
template <class T>
VIDTOK_INLINE const T* row_of(const T* first, const SlotBlock& block, int64_t f, int64_t l, int64_t stride) {
  if (l >= block.count) l -= block.count, ++f;
  return f < block.frames && l < block.count ? first + (f * block.slots + l) * stride : nullptr;
}

VIDTOK_INLINE float inverse_norm(float squared) {
  if (squared == 0.0f) return 0.0f;
  const uint32_t bits = to_bits(squared);
  return (bits & 0x7f800000) == 0x7f800000 ? from_bits(0x7fc00000) : 1.0f / __builtin_sqrtf(squared);
}

VIDTOK_INLINE float round_cosine(float x, DType dtype) {
  const float steps = dtype == DType::f32 ? 1048576.0f : 65536.0f;
  x = x > 1.0f ? 1.0f : x < -1.0f ? -1.0f : x;  // NaN passes
  return __builtin_nearbyintf(x * steps) / steps;
}

// Rows whose pages are looked up ahead of their data.
constexpr int64_t kPagesAhead = 2;

template <class T>
void similar_previous(const AdjacentSimilarityArgs& a, const SlotBlock& block, float* y) {
  const int64_t frame = block.slots * a.x_stride, bytes = a.c * int64_t(sizeof(T));
  const T* const x = static_cast<const T*>(block.x);
  float before[kSlotBlock];
  for (int64_t l = 0; l < block.count; ++l) before[l] = inverse_norm(squared_norm(x + l * a.x_stride, a.c));
  for (int64_t f = 1; f < block.frames; ++f) {
    y += block.slots;
    for (int64_t l = 0; l < block.count; ++l) {
      const T* row = x + f * frame + l * a.x_stride;
      if (const T* soon = row_of(x, block, f, l + kPagesAhead, a.x_stride)) prefetch_pages(soon, bytes);
      const Products p = products(row, row - frame, a.c);
      const float inverse = inverse_norm(p.squared);
      y[l] = round_cosine(p.dot * inverse * before[l], a.dtype);
      before[l] = inverse;
    }
  }
}

// total (+)= scale · x
template <class T>
VIDTOK_INLINE void add_scaled(float* total, const T* x, float scale, int64_t c, bool first) {
  const vec w = set1(scale);
  int64_t j = 0;
  for (; j + kWidth <= c; j += kWidth) {
    const vec add = load(x + j) * w;
    store(total + j, first ? add : load(total + j) + add);
  }
  if (j < c) {
    const int n = int(c - j);
    const vec add = load(x + j, n) * w;
    store(total + j, first ? add : load(total + j, n) + add, n);
  }
}

// The sums of the slots' unit rows grow in `work`: each row comes from memory for its norm and again,
// from the nearest cache, for the sum.
template <class T>
void similar_window(const AdjacentSimilarityArgs& a, const SlotBlock& block, float* y, float* work) {
  const int64_t frame = block.slots * a.x_stride, bytes = a.c * int64_t(sizeof(T));
  const T* const x = static_cast<const T*>(block.x);
  int64_t present[kSlotBlock] = {};
  for (int64_t f = 0; f < block.frames; ++f)
    for (int64_t l = 0; l < block.count; ++l) {
      const T* row = x + f * frame + l * a.x_stride;
      if (const T* soon = row_of(x, block, f, l + kPagesAhead, a.x_stride)) prefetch_pages(soon, bytes);
      const float inverse = inverse_norm(squared_norm(row, a.c));
      present[l] += inverse != 0.0f;
      add_scaled(work + l * a.c, row, inverse, a.c, f == 0);
    }
  for (int64_t l = 0; l < block.count; ++l) {
    const float pairs = squared_norm(work + l * a.c, a.c) - float(present[l]);
    y[l] = round_cosine(pairs / (float(block.frames) * float(block.frames - 1)), a.dtype);
  }
}

template <class T>
void similar_center(const AdjacentSimilarityArgs& a, const void* center, int64_t begin, int64_t end) {
  const T* c = static_cast<const T*>(center);
  const float c_inverse = inverse_norm(squared_norm(c, a.c));
  for (int64_t i = begin; i < end; ++i) {
    const T* row = static_cast<const T*>(a.x) + i * a.x_stride;
    if (i + kPagesAhead < end) prefetch_pages(row + kPagesAhead * a.x_stride, a.c * int64_t(sizeof(T)));
    const Products p = products(row, c, a.c);
    a.y[i] = round_cosine(p.dot * inverse_norm(p.squared) * c_inverse, a.dtype);
  }
}

void similar_previous_any(const AdjacentSimilarityArgs& a, const SlotBlock& block, float* y) {
  if (a.dtype == DType::f32) return similar_previous<float>(a, block, y);
  if (a.dtype == DType::bf16) return similar_previous<bf16>(a, block, y);
  return similar_previous<f16>(a, block, y);
}

void similar_window_any(const AdjacentSimilarityArgs& a, const SlotBlock& block, float* y, float* work) {
  if (a.dtype == DType::f32) return similar_window<float>(a, block, y, work);
  if (a.dtype == DType::bf16) return similar_window<bf16>(a, block, y, work);
  return similar_window<f16>(a, block, y, work);
}

void similar_center_any(const AdjacentSimilarityArgs& a, const void* center, int64_t begin, int64_t end) {
  if (a.dtype == DType::f32) return similar_center<float>(a, center, begin, end);
  if (a.dtype == DType::bf16) return similar_center<bf16>(a, center, begin, end);
  return similar_center<f16>(a, center, begin, end);
}

constexpr AdjacentSimilarityKernels adjacent_similarity_kernels{similar_previous_any, similar_window_any,
                                                                similar_center_any};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
