// Passes over the distances of cluster_dpc_knn for one instruction set.
#include "cpu/cluster_dpc_knn.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {
namespace cluster {

#if VIDTOK_WIDTH == 16
using mask = __mmask16;
struct ivec {
  __m512i v;
};
VIDTOK_INLINE ivec load_i(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
VIDTOK_INLINE void store_i(int32_t* p, ivec a) { _mm512_storeu_si512(p, a.v); }
VIDTOK_INLINE ivec set1_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
VIDTOK_INLINE mask less(vec a, vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
VIDTOK_INLINE mask less(ivec a, ivec b) { return _mm512_cmplt_epi32_mask(a.v, b.v); }
VIDTOK_INLINE bool any(mask m) { return m != 0; }
// The first where the mask is set, else the second.
VIDTOK_INLINE vec select(mask m, vec a, vec b) { return {_mm512_mask_mov_ps(b.v, m, a.v)}; }
VIDTOK_INLINE ivec select(mask m, ivec a, ivec b) { return {_mm512_mask_mov_epi32(b.v, m, a.v)}; }
#elif VIDTOK_WIDTH == 8
struct mask {
  __m256 v;
};
struct ivec {
  __m256i v;
};
VIDTOK_INLINE ivec load_i(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
VIDTOK_INLINE void store_i(int32_t* p, ivec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
VIDTOK_INLINE ivec set1_i(int32_t x) { return {_mm256_set1_epi32(x)}; }
VIDTOK_INLINE mask less(vec a, vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
VIDTOK_INLINE mask less(ivec a, ivec b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
VIDTOK_INLINE bool any(mask m) { return _mm256_movemask_ps(m.v) != 0; }
VIDTOK_INLINE vec select(mask m, vec a, vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
VIDTOK_INLINE ivec select(mask m, ivec a, ivec b) {
  return {_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(b.v), _mm256_castsi256_ps(a.v), m.v))};
}
#else
using mask = bool;
struct ivec {
  int32_t v;
};
VIDTOK_INLINE ivec load_i(const int32_t* p) { return {*p}; }
VIDTOK_INLINE void store_i(int32_t* p, ivec a) { *p = a.v; }
VIDTOK_INLINE ivec set1_i(int32_t x) { return {x}; }
VIDTOK_INLINE mask less(vec a, vec b) { return a.v < b.v; }
VIDTOK_INLINE mask less(ivec a, ivec b) { return a.v < b.v; }
VIDTOK_INLINE bool any(mask m) { return m; }
VIDTOK_INLINE vec select(mask m, vec a, vec b) { return m ? a : b; }
VIDTOK_INLINE ivec select(mask m, ivec a, ivec b) { return m ? a : b; }
#endif

VIDTOK_INLINE void order(vec& a, vec& b) {
  const vec low = min(a, b);
  b = max(a, b);
  a = low;
}

// Batcher's network: eight vectors, each lane ascending.
VIDTOK_INLINE void sort_8(vec (&v)[8]) {
  order(v[0], v[1]), order(v[2], v[3]), order(v[4], v[5]), order(v[6], v[7]);
  order(v[0], v[2]), order(v[1], v[3]), order(v[4], v[6]), order(v[5], v[7]);
  order(v[1], v[2]), order(v[5], v[6]);
  order(v[0], v[4]), order(v[1], v[5]), order(v[2], v[6]), order(v[3], v[7]);
  order(v[2], v[4]), order(v[3], v[5]);
  order(v[1], v[2]), order(v[3], v[4]), order(v[5], v[6]);
}

// The eight smallest of two ascending eights, ascending: their smaller halves form a bitonic sequence.
VIDTOK_INLINE void merge_8(vec (&held)[8], const vec (&v)[8]) {
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) held[t] = min(held[t], v[7 - t]);
  order(held[0], held[4]), order(held[1], held[5]), order(held[2], held[6]), order(held[3], held[7]);
  order(held[0], held[2]), order(held[1], held[3]), order(held[4], held[6]), order(held[5], held[7]);
  order(held[0], held[1]), order(held[2], held[3]), order(held[4], held[5]), order(held[6], held[7]);
}

// Lanes are columns; eight rows at a time, without branches, as most rows reach some lane's list.
void nearest_8(const float* u, int64_t ld, int64_t rows, int64_t begin, int64_t end, float* list, int64_t ldl) {
  const vec none = set1(__builtin_inff());
  for (int64_t i = 0; i < rows; i += 8) {
    const float* row = u + i * ld;
    const int64_t left = rows - i;
    for (int64_t j = begin; j < end; j += kWidth) {
      vec v[8], held[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) v[r] = r < left ? load(row + r * ld + j) : none;
      sort_8(v);
#pragma GCC unroll 8
      for (int t = 0; t < 8; ++t) held[t] = load(list + t * ldl + j);
      merge_8(held, v);
#pragma GCC unroll 8
      for (int t = 0; t < 8; ++t) store(list + t * ldl + j, held[t]);
    }
  }
}

// An entry below the largest of its column's list sinks into the list.
void nearest_any(const float* u, int64_t ld, int64_t rows, int64_t begin, int64_t end, int64_t slots, float* list,
                 int64_t ldl) {
  const float* last = list + (slots - 1) * ldl;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = u + i * ld;
    for (int64_t j = begin; j < end; j += kWidth) {
      vec v = load(row + j);
      if (!any(less(v, load(last + j)))) continue;
      for (int64_t t = 0; t < slots; ++t) {
        float* slot = list + t * ldl + j;
        const vec held = load(slot);
        store(slot, min(v, held));
        v = max(v, held);
      }
    }
  }
}

void nearest(const float* u, int64_t ld, int64_t rows, int64_t begin, int64_t end, int64_t slots, float* list,
             int64_t ldl) {
  if (slots == 8) return nearest_8(u, ld, rows, begin, end, list, ldl);
  nearest_any(u, ld, rows, begin, end, slots, list, ldl);
}

VIDTOK_INLINE float lane_min(vec a) {
  float lane[kWidth], out;
  store(lane, a);
  out = lane[0];
  for (int i = 1; i < kWidth; ++i) out = lane[i] < out ? lane[i] : out;
  return out;
}
VIDTOK_INLINE float lane_max(vec a) {
  float lane[kWidth], out;
  store(lane, a);
  out = lane[0];
  for (int i = 1; i < kWidth; ++i) out = lane[i] > out ? lane[i] : out;
  return out;
}

template <int R>
VIDTOK_INLINE void higher_rows(const float* u, int64_t ld, int64_t cols, const int32_t* row_rank,
                               const int32_t* col_rank, float* best, float* largest) {
  vec low[R], high[R];
  ivec own[R];
  const vec none = set1(__builtin_inff());
  for (int r = 0; r < R; ++r) low[r] = none, high[r] = zero(), own[r] = set1_i(row_rank[r]);
  for (int64_t j = 0; j < cols; j += kWidth) {
    const ivec rank = load_i(col_rank + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vec v = load(u + r * ld + j);
      low[r] = select(less(rank, own[r]), min(v, low[r]), low[r]);
      high[r] = max(v, high[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const float a = lane_min(low[r]), b = lane_max(high[r]);
    best[r] = a < best[r] ? a : best[r];
    largest[r] = b > largest[r] ? b : largest[r];
  }
}

void higher(const float* u, int64_t ld, int64_t begin, int64_t end, int64_t cols, const int32_t* row_rank,
            const int32_t* col_rank, float* best, float* largest) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) higher_rows<4>(u + i * ld, ld, cols, row_rank + i, col_rank, best + i, largest + i);
  for (; i < end; ++i) higher_rows<1>(u + i * ld, ld, cols, row_rank + i, col_rank, best + i, largest + i);
}

template <int R>
VIDTOK_INLINE void assign_rows(const float* u, int64_t ld, const int32_t* row, int64_t base, int64_t begin, int64_t end,
                               float* best, int32_t* who) {
  const float* p[R];
  for (int r = 0; r < R; ++r) p[r] = u + int64_t(row[r]) * ld;
  for (int64_t j = begin; j < end; j += kWidth) {
    vec low = load(best + j);
    ivec at = load_i(who + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vec v = load(p[r] + j);
      const mask nearer = less(v, low);
      low = select(nearer, v, low);
      at = select(nearer, set1_i(int32_t(base + r)), at);
    }
    store(best + j, low);
    store_i(who + j, at);
  }
}

void assign(const float* u, int64_t ld, const int32_t* row, int64_t count, int64_t base, int64_t begin, int64_t end,
            float* best, int32_t* who) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) assign_rows<4>(u, ld, row + t, base + t, begin, end, best, who);
  for (; t < count; ++t) assign_rows<1>(u, ld, row + t, base + t, begin, end, best, who);
}

}  // namespace cluster

constexpr ClusterKernels cluster_kernels{cluster::nearest, cluster::higher, cluster::assign};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
