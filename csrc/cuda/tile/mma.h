// Products of small matrices by a warp: tensor cores for bf16 and fp16 with fp32 sums.
// Fragments of mma.m16n8k16 lie as PTX defines them: with g = lane / 4 and t = lane % 4, a lane holds of the sums
// (16 x 8) the elements [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1]. Sums of wmma, whose layout is not
// documented, are brought into the same order through shared memory.
#pragma once

#include "cuda/tile/warp.h"

namespace vidtok::cuda {

// Four 8 x 8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8 (16 bytes, aligned); it gets
// elements [g][2t] and [g][2t + 1] of matrix i in r[i].
VIDTOK_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(VIDTOK_HOST)
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) host::fault("ldmatrix expects rows at a multiple of 16");
  const unsigned char* const slots = host::exchange(&row, sizeof row, kAllLanes, __FILE__, __LINE__);
  for (int i = 0; i < 4; ++i) {
    const unsigned char* at = nullptr;
    __builtin_memcpy(&at, slots + (i * 8 + lane() / 4) * host::kSlotBytes, sizeof at);
    __builtin_memcpy(&r[i], at + 4 * (lane() % 4), 4);
  }
#elif VIDTOK_SM >= 75
  const unsigned at = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
#else
  (void)row;
  r[0] = r[1] = r[2] = r[3] = 0;
  trap();
#endif
}

#if defined(VIDTOK_HOST)
template <class T>
float half_of(uint32_t pair, int i) {
  return to_float(T{uint16_t(pair >> (16 * i))});
}
#endif

// d += a (16 x 16) times b (16 x 8), T is bf16 or f16.
template <class T>
VIDTOK_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2, "tensor cores take 16-bit elements here");
#if defined(VIDTOK_HOST)
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* const slots = host::exchange(mine, sizeof mine, kAllLanes, __FILE__, __LINE__);
  const auto word = [&](int of_lane, int i) {
    uint32_t w = 0;
    __builtin_memcpy(&w, slots + of_lane * host::kSlotBytes + 4 * i, 4);
    return w;
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = e / 2, col = 2 * t + e % 2;
    double sum = double(d[e]);
    for (int k = 0; k < 16; ++k) {
      const float x = half_of<T>(word(4 * g + k % 8 / 2, row + 2 * (k / 8)), k % 2);
      const float y = half_of<T>(word(4 * col + k % 8 / 2, 4 + k / 8), k % 2);
      sum += double(x) * double(y);
    }
    d[e] = float(sum);
  }
#elif VIDTOK_SM >= 80
  if constexpr (Same<T, bf16>::value)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  (void)a, (void)b;
  d[0] = d[1] = d[2] = d[3] = 0;
  trap();
#endif
}

// fp16 on sm_70. A fragment of 16 x 16 inputs; rows lie `stride` elements apart in shared memory, at a multiple of 8
// elements, and the first at a multiple of 32 bytes. Both sides are read row by row: row of b, column of the product.
struct WmmaInput {
  uint32_t r[8];
};
struct WmmaSum {
  float r[8];
};

#if defined(VIDTOK_HOST)
inline WmmaInput wmma_load(const f16* from, int stride) {
  if (reinterpret_cast<uintptr_t>(from) % 32 != 0 || stride % 8 != 0) host::fault("wmma.load expects aligned rows");
  warp_sync();
  WmmaInput x;
  __builtin_memcpy(x.r, from + (lane() % 16) * stride, 32);
  return x;
}
#endif

VIDTOK_DEVICE WmmaInput wmma_load_a(const f16* from, int stride) {
#if defined(VIDTOK_HOST)
  return wmma_load(from, stride);
#elif VIDTOK_SM >= 70
  WmmaInput x;
  const unsigned at = unsigned(__cvta_generic_to_shared(from));
  asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(x.r[0]), "=r"(x.r[1]), "=r"(x.r[2]), "=r"(x.r[3]), "=r"(x.r[4]), "=r"(x.r[5]), "=r"(x.r[6]),
                 "=r"(x.r[7])
               : "r"(at), "r"(stride)
               : "memory");
  return x;
#else
  (void)from, (void)stride;
  trap();
  return WmmaInput{};
#endif
}

VIDTOK_DEVICE WmmaInput wmma_load_b(const f16* from, int stride) {
#if defined(VIDTOK_HOST)
  return wmma_load(from, stride);
#elif VIDTOK_SM >= 70
  WmmaInput x;
  const unsigned at = unsigned(__cvta_generic_to_shared(from));
  asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
               : "=r"(x.r[0]), "=r"(x.r[1]), "=r"(x.r[2]), "=r"(x.r[3]), "=r"(x.r[4]), "=r"(x.r[5]), "=r"(x.r[6]),
                 "=r"(x.r[7])
               : "r"(at), "r"(stride)
               : "memory");
  return x;
#else
  (void)from, (void)stride;
  trap();
  return WmmaInput{};
#endif
}

// d += a · bᵀ. The host holds row lane / 2 of the sums, columns from 8 · (lane % 2) on.
VIDTOK_DEVICE void wmma_multiply(WmmaSum& d, const WmmaInput& a, const WmmaInput& b) {
#if defined(VIDTOK_HOST)
  WmmaInput mine[2] = {a, b};
  const unsigned char* const slots = host::exchange(mine, sizeof mine, kAllLanes, __FILE__, __LINE__);
  for (int e = 0; e < 8; ++e) {
    const int row = lane() / 2, col = 8 * (lane() % 2) + e;
    f16 x[16], y[16];
    __builtin_memcpy(x, slots + row * host::kSlotBytes, 32);
    __builtin_memcpy(y, slots + col * host::kSlotBytes + 32, 32);
    double sum = double(d.r[e]);
    for (int k = 0; k < 16; ++k) sum += double(to_float(x[k])) * double(to_float(y[k]));
    d.r[e] = float(sum);
  }
#elif VIDTOK_SM >= 70
  asm volatile(
      "wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "
      "{%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(d.r[0]), "+f"(d.r[1]), "+f"(d.r[2]), "+f"(d.r[3]), "+f"(d.r[4]), "+f"(d.r[5]), "+f"(d.r[6]), "+f"(d.r[7])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(a.r[4]), "r"(a.r[5]), "r"(a.r[6]), "r"(a.r[7]),
        "r"(b.r[0]), "r"(b.r[1]), "r"(b.r[2]), "r"(b.r[3]), "r"(b.r[4]), "r"(b.r[5]), "r"(b.r[6]), "r"(b.r[7]));
#else
  (void)a, (void)b;
  d = WmmaSum{};
  trap();
#endif
}

// 16 x 16 sums to shared memory, rows `stride` floats apart (a multiple of 4; the first at a multiple of 32 bytes).
VIDTOK_DEVICE void wmma_store(float* to, int stride, const WmmaSum& d) {
#if defined(VIDTOK_HOST)
  if (reinterpret_cast<uintptr_t>(to) % 32 != 0 || stride % 4 != 0) host::fault("wmma.store expects aligned rows");
  __builtin_memcpy(to + lane() / 2 * stride + 8 * (lane() % 2), d.r, 32);
#elif VIDTOK_SM >= 70
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile(
      "wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(at),
      "f"(d.r[0]), "f"(d.r[1]), "f"(d.r[2]), "f"(d.r[3]), "f"(d.r[4]), "f"(d.r[5]), "f"(d.r[6]), "f"(d.r[7]),
      "r"(stride)
      : "memory");
#else
  (void)to, (void)stride, (void)d;
  trap();
#endif
}

}  // namespace vidtok::cuda
