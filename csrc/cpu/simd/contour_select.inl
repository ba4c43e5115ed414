// Matrix products in double of contour_select for one instruction set.
#include "cpu/contour_select.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {
namespace contour {

#if VIDTOK_WIDTH == 16
constexpr int kDoubles = 8;
struct dvec {
  __m512d v;
};
VIDTOK_INLINE dvec load_d(const double* p) { return {_mm512_loadu_pd(p)}; }
VIDTOK_INLINE void store_d(double* p, dvec a) { _mm512_storeu_pd(p, a.v); }
VIDTOK_INLINE dvec set1_d(double x) { return {_mm512_set1_pd(x)}; }
VIDTOK_INLINE dvec fma_d(dvec a, dvec b, dvec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
#elif VIDTOK_WIDTH == 8
constexpr int kDoubles = 4;
struct dvec {
  __m256d v;
};
VIDTOK_INLINE dvec load_d(const double* p) { return {_mm256_loadu_pd(p)}; }
VIDTOK_INLINE void store_d(double* p, dvec a) { _mm256_storeu_pd(p, a.v); }
VIDTOK_INLINE dvec set1_d(double x) { return {_mm256_set1_pd(x)}; }
VIDTOK_INLINE dvec fma_d(dvec a, dvec b, dvec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
#else
constexpr int kDoubles = 2;
struct dvec {
  double v[2];
};
VIDTOK_INLINE dvec load_d(const double* p) { return {{p[0], p[1]}}; }
VIDTOK_INLINE void store_d(double* p, dvec a) { p[0] = a.v[0], p[1] = a.v[1]; }
VIDTOK_INLINE dvec set1_d(double x) { return {{x, x}}; }
VIDTOK_INLINE dvec fma_d(dvec a, dvec b, dvec c) { return {{a.v[0] * b.v[0] + c.v[0], a.v[1] * b.v[1] + c.v[1]}}; }
#endif

VIDTOK_INLINE double to_double(double x) { return x; }
template <class T>
VIDTOK_INLINE double to_double(T x) {
  return double(to_float(x));
}

// Channels of the basis that stay in the cache while the rows pass by.
constexpr int64_t kChannels = 256;

template <int R, int V, class T>
VIDTOK_INLINE void product_block(const T* x, int64_t stride, int64_t begin, int64_t end, const double* basis,
                                 int64_t cols, double* out) {
  dvec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = begin == 0 ? set1_d(0.0) : load_d(out + r * cols + v * kDoubles);
  for (int64_t k = begin; k < end; ++k) {
    dvec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load_d(basis + k * cols + v * kDoubles);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const dvec a = set1_d(to_double(x[r * stride + k]));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma_d(a, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_d(out + r * cols + v * kDoubles, acc[r][v]);
}

template <int R, class T>
VIDTOK_INLINE void product_rows(const T* x, int64_t stride, int64_t begin, int64_t end, const double* basis,
                                int64_t cols, double* out) {
  int64_t j = 0;
  for (; j + 4 * kDoubles <= cols; j += 4 * kDoubles)
    product_block<R, 4>(x, stride, begin, end, basis + j, cols, out + j);
  for (; j < cols; j += kDoubles) product_block<R, 1>(x, stride, begin, end, basis + j, cols, out + j);
}

template <class T>
void product(const T* x, int64_t stride, int64_t rows, int64_t c, const double* basis, int64_t cols, double* out) {
  if (c == 0)
    for (int64_t i = 0; i < rows * cols; ++i) out[i] = 0.0;
  for (int64_t begin = 0; begin < c; begin += kChannels) {
    const int64_t end = begin + kChannels < c ? begin + kChannels : c;
    int64_t t = 0;
    for (; t + 6 <= rows; t += 6) product_rows<6>(x + t * stride, stride, begin, end, basis, cols, out + t * cols);
    for (; t < rows; ++t) product_rows<1>(x + t * stride, stride, begin, end, basis, cols, out + t * cols);
  }
}

void project(const void* x, DType dtype, int64_t stride, int64_t rows, int64_t c, const double* basis, int64_t cols,
             double* out) {
  if (dtype == DType::f32) return product(static_cast<const float*>(x), stride, rows, c, basis, cols, out);
  if (dtype == DType::bf16) return product(static_cast<const bf16*>(x), stride, rows, c, basis, cols, out);
  product(static_cast<const f16*>(x), stride, rows, c, basis, cols, out);
}

void multiply(const double* x, int64_t stride, int64_t rows, int64_t c, const double* basis, int64_t cols,
              double* out) {
  product(x, stride, rows, c, basis, cols, out);
}

template <class T>
void moments_of(const T* x, const T* y, int64_t c, double* product, double* square) {
  constexpr int kSums = 8;
  double xy[kSums] = {}, xx[kSums] = {};
  for (int64_t k = 0; k < c; ++k) {
    const double a = to_double(x[k]);
    xy[k % kSums] += a * to_double(y[k]);
    xx[k % kSums] += a * a;
  }
  *product = *square = 0.0;
  for (int i = 0; i < kSums; ++i) *product += xy[i], *square += xx[i];
}

void moments(const void* x, const void* y, DType dtype, int64_t c, double* product, double* square) {
  if (dtype == DType::f32)
    return moments_of(static_cast<const float*>(x), static_cast<const float*>(y), c, product, square);
  if (dtype == DType::bf16)
    return moments_of(static_cast<const bf16*>(x), static_cast<const bf16*>(y), c, product, square);
  moments_of(static_cast<const f16*>(x), static_cast<const f16*>(y), c, product, square);
}

}  // namespace contour

constexpr ContourKernels contour_kernels{contour::project, contour::multiply, contour::moments};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
