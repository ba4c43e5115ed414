// Gather of the anchors' entries of many tensors in one launch: their descriptions are the kernel's argument, so that
// nothing is uploaded. Each tensor is a line of its widest accesses; blocks are dealt to the tensors in turn.
#include "cuda/tile/line.h"
#include "cuda/tile/report.h"
#include "cuda/tile/vec.h"
#include "cuda/tile/warp.h"

namespace vidtok::cuda {

constexpr int kRemapPieces = 16;

// A tensor [outer, n, inner] whose rows of inner bytes are `per_row` accesses of `width` bytes.
struct RemapPiece {
  const uint8_t* x;
  uint8_t* y;
  int64_t outer;
  int64_t first_block;
  uint64_t fill;  // an element's bits, repeated
  int32_t per_row;
  int32_t width;
};

struct RemapPieces {
  RemapPiece piece[kRemapPieces];
  int32_t count;
};

template <int BYTES>
VIDTOK_DEVICE Bytes<BYTES> filled(uint64_t fill, int64_t column) {
  Bytes<BYTES> word;
  if constexpr (BYTES >= 8) {
    VIDTOK_UNROLL
    for (int i = 0; i < BYTES / 4; ++i) word.w[i] = uint32_t(fill >> (32 * (i % 2)));
  } else {
    const uint64_t here = fill >> (8 * (column * BYTES % 8));
    if constexpr (BYTES == 1)
      word.b[0] = uint8_t(here);
    else if constexpr (BYTES == 2)
      word.w[0] = uint16_t(here);
    else
      word.w[0] = uint32_t(here);
  }
  return word;
}

template <int BYTES>
VIDTOK_DEVICE void remap(const RemapPiece& p, const int32_t* anchor, int64_t n, int64_t m, int32_t* error) {
  using Word = Bytes<BYTES>;
  const int64_t start = (block() - p.first_block) * threads(), place = start + thread();
  if (place >= p.outer * m * p.per_row) return;
  const LineAt at(LineStart(start, p.per_row), thread());
  const int64_t outer = p.outer == 1 ? 0 : at.row / m;
  const int64_t from = anchor[at.row - outer * m];
  Word word{};
  if (from >= 0 && from < n)
    word = reinterpret_cast<const Word*>(p.x)[(outer * n + from) * p.per_row + at.column];
  else if (from == -1)
    word = filled<BYTES>(p.fill, at.column);
  else
    report(error, Report::position_remap_anchor, from, -1, n);
  reinterpret_cast<Word*>(p.y)[place] = word;
}

__global__ void position_remap_kernel(RemapPieces pieces, const int32_t* anchor, int64_t n, int64_t m, int32_t* error) {
  int mine = 0;
  while (mine + 1 < pieces.count && block() >= pieces.piece[mine + 1].first_block) ++mine;
  const RemapPiece p = pieces.piece[mine];
  switch (p.width) {
    case 16:
      return remap<16>(p, anchor, n, m, error);
    case 8:
      return remap<8>(p, anchor, n, m, error);
    case 4:
      return remap<4>(p, anchor, n, m, error);
    case 2:
      return remap<2>(p, anchor, n, m, error);
    default:
      return remap<1>(p, anchor, n, m, error);
  }
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include "cuda/position_remap.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

int widest(const RemapTensor& t) {
  const uint64_t together = reinterpret_cast<uintptr_t>(t.x) | reinterpret_cast<uintptr_t>(t.y) | uint64_t(t.inner);
  int width = 16;
  while (together % uint64_t(width) != 0) width /= 2;
  return width;
}

uint64_t repeated(uint64_t fill, int64_t element) {
  uint64_t out = 0;
  for (int64_t at = 0; at < 8; ++at) out |= (fill >> (8 * (at % element)) & 0xff) << (8 * at);
  return out;
}

}  // namespace

Status position_remap(const PositionRemapArgs& args, const PositionRemapChoice& choice, const Launch& on) {
  int64_t i = 0;
  while (i < args.count) {
    RemapPieces pieces{};
    int64_t blocks = 0;
    for (; i < args.count && pieces.count < kRemapPieces; ++i) {
      const RemapTensor& t = args.tensors[i];
      if (t.outer == 0 || t.inner == 0 || args.m == 0) continue;
      const int width = widest(t);
      const int64_t per_row = t.inner / width;
      if (per_row > 0x7fffffff)
        return fail(Status::value, "expected rows below 2 GiB, got %lld bytes", (long long)t.inner);
      pieces.piece[pieces.count++] = {static_cast<const uint8_t*>(t.x), static_cast<uint8_t*>(t.y), t.outer, blocks,
                                      repeated(t.fill, t.element),      int32_t(per_row),           width};
      blocks += (t.outer * args.m * per_row + choice.threads - 1) / choice.threads;
    }
    const Status status = VIDTOK_LAUNCH(position_remap_kernel, blocks, choice.threads, 0, on, pieces, args.anchor,
                                        args.n, args.m, on.error);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace vidtok::cuda

#endif
