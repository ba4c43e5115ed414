#include "cuda/host/tiles.h"

#include "cuda/tile/gram.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

template <class T>
void mma_kernel(const T* a, const T* b, const float* c, uint32_t* a_words, uint32_t* b_words, float* d) {
  constexpr int kSide = 16;
  VIDTOK_SMEM(shared);
  T* const rows = shared.take<T>(kSide * kSide);
  T* const cols = shared.take<T>(kSide * kSide);
  for (int i = lane(); i < kSide * kSide; i += kWarp) {
    rows[i] = a[i];
    cols[i] = b[i % (kSide * kSide / 2)];  // the other half of the four matrices
  }
  warp_sync();
  const int l = lane();
  uint32_t x[4], y[4];
  load_matrices(x, rows + l % 16 * kSide + l / 16 * 8);
  load_matrices(y, cols + (l % 8 + l / 16 * 8) * kSide + l / 8 % 2 * 8);
  const uint32_t first[2] = {y[0], y[1]};
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    a_words[4 * l + i] = x[i];
    sum[i] = c[4 * l + i];
  }
  for (int i = 0; i < 2; ++i) b_words[2 * l + i] = y[i];
  mma_16816<T>(sum, x, first);
  for (int i = 0; i < 4; ++i) d[4 * l + i] = sum[i];
}

void wmma_kernel(const f16* a, const f16* b, float* out) {
  constexpr int kSide = 16, kPitch = 24;
  VIDTOK_SMEM(shared);
  float* const memory = shared.take<float>(3 * kSide * kPitch + 8);
  // Fragments begin at a multiple of 32 bytes.
  float* const sums = memory + (32 - reinterpret_cast<uintptr_t>(memory) % 32) % 32 / 4;
  f16* const rows = reinterpret_cast<f16*>(sums + kSide * kPitch);
  f16* const cols = reinterpret_cast<f16*>(sums + 2 * kSide * kPitch);
  for (int i = lane(); i < kSide * kSide; i += kWarp) {
    rows[i / kSide * kPitch + i % kSide] = a[i];
    cols[i / kSide * kPitch + i % kSide] = b[i];
  }
  warp_sync();
  WmmaSum d{};
  wmma_multiply(d, wmma_load_a(rows, kPitch), wmma_load_b(cols, kPitch));
  wmma_store(sums, kPitch, d);
  warp_sync();
  for (int i = lane(); i < kSide * kSide; i += kWarp) out[i] = sums[i / kSide * kPitch + i % kSide];
}

template <class T, int TILE, int WARPS>
void gram_kernel(host::GramSample s, int64_t bytes) {
  using Tile = GramTile<T, TILE, TILE, WARPS>;
  VIDTOK_SMEM(shared);
  unsigned char* const memory = shared.take<unsigned char>(bytes);
  float* const best = shared.take<float>(TILE * Tile::kColWarps);
  Tile tile(memory, s.stages);
  const GramRows<T> a{static_cast<const T*>(s.a), s.a_stride, s.a_rows, s.index};
  tile.multiply(a, s.same ? a : GramRows<T>{static_cast<const T*>(s.b), s.b_stride, s.b_rows}, s.channels, s.same);
  tile.for_each([&](int row, int col, float& sum) { s.out[row * TILE + col] = sum; });
  tile.reduce_rows(
      -infinity<float>(), [](int, int, float sum) { return sum; }, Max(),
      [&](int row, float most) { best[tile.col_warp() * TILE + row] = most; });
  block_sync();
  for (int row = thread(); row < TILE; row += threads()) {
    float most = best[row];
    for (int w = 1; w < Tile::kColWarps; ++w) most = larger(most, best[w * TILE + row]);
    s.row_max[row] = most;
  }
}

template <class T, int TILE, int WARPS>
Status gram(const host::GramSample& s, const Launch& on) {
  const int64_t bytes = gram_shared(TILE, TILE, s.stages, int(sizeof(T)), on.sm);
  return VIDTOK_LAUNCH((gram_kernel<T, TILE, WARPS>), 1, WARPS * kWarp,
                       carved<unsigned char>(bytes) + carved<float>(TILE * WARPS), on, s, bytes);
}

template <class T>
Status gram_of(const host::GramSample& s, const Launch& on) {
  if (s.tile == 32 && s.warps == 4) return gram<T, 32, 4>(s, on);
  if (s.tile == 64 && s.warps == 4) return gram<T, 64, 4>(s, on);
  if (s.tile == 64 && s.warps == 8) return gram<T, 64, 8>(s, on);
  if (s.tile == 128 && s.warps == 8) return gram<T, 128, 8>(s, on);
  return fail(Status::value, "expected a tile that kernels use, got %d tokens and %d warps", s.tile, s.warps);
}

}  // namespace
}  // namespace vidtok::cuda

namespace vidtok::host {

Status run_mma(bool bf16, const void* a, const void* b, const float* c, uint32_t* a_words, uint32_t* b_words, float* d,
               const cuda::Launch& on) {
  const int64_t shared = 2 * cuda::carved<uint16_t>(256);
  if (bf16)
    return VIDTOK_LAUNCH(cuda::mma_kernel<cuda::bf16>, 1, cuda::kWarp, shared, on, static_cast<const cuda::bf16*>(a),
                         static_cast<const cuda::bf16*>(b), c, a_words, b_words, d);
  return VIDTOK_LAUNCH(cuda::mma_kernel<cuda::f16>, 1, cuda::kWarp, shared, on, static_cast<const cuda::f16*>(a),
                       static_cast<const cuda::f16*>(b), c, a_words, b_words, d);
}

Status run_wmma(const void* a, const void* b, float* out, const cuda::Launch& on) {
  return VIDTOK_LAUNCH(cuda::wmma_kernel, 1, cuda::kWarp, cuda::carved<float>(3 * 16 * 24 + 8), on,
                       static_cast<const cuda::f16*>(a), static_cast<const cuda::f16*>(b), out);
}

Status run_gram(const GramSample& s, const cuda::Launch& on) {
  switch (s.dtype) {
    case DType::f32:
      return cuda::gram_of<float>(s, on);
    case DType::bf16:
      return cuda::gram_of<cuda::bf16>(s, on);
    case DType::f16:
      return cuda::gram_of<cuda::f16>(s, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(s.dtype));
}

}  // namespace vidtok::host
