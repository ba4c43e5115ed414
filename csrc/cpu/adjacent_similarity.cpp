#include "vidtok/adjacent_similarity.h"

#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/chunks.h"
#include "cpu/isa.h"

namespace vidtok {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// A long video of few slots is also cut along time; the frame before a cut is read twice.
constexpr int64_t kFrames = 64;

// Floats of a cache line: sums that straddle two lines cost twice.
constexpr size_t kAlign = 16;

struct Piece {
  SlotBlock block;
  float* y;
};

const char* row_at(const AdjacentSimilarityArgs& a, int64_t row) {
  return static_cast<const char*>(a.x) + row * a.x_stride * size_of(a.dtype);
}

void cut_slots(const AdjacentSimilarityArgs& a, int64_t row, int64_t frames, int64_t slots, float* y,
               std::vector<Piece>& pieces) {
  for (int64_t l = 0; l < slots; l += kSlotBlock)
    pieces.push_back({{row_at(a, row + l), frames, slots, slots - l < kSlotBlock ? slots - l : kSlotBlock}, y + l});
}

Status misfit(const AdjacentSimilarityArgs& a) {
  return fail(Status::index, "expected grids and windows that cover %lld tokens and give %lld scores, got others",
              (long long)a.n, (long long)a.num_out);
}

// Pieces of every video; first frames and segments of one frame are filled here.
Status cut(const AdjacentSimilarityArgs& a, std::vector<Piece>& pieces) {
  int64_t row = 0, out = 0, segment = 0;
  for (int64_t v = 0; v < a.videos; ++v) {
    const int64_t t = a.grid[3 * v], h = a.grid[3 * v + 1], w = a.grid[3 * v + 2];
    int64_t slots = 0, held = 0;
    if (t < 0 || h < 0 || w < 0 || __builtin_mul_overflow(h, w, &slots) || __builtin_mul_overflow(slots, t, &held) ||
        held > a.n - row)
      return misfit(a);
    if (a.to == SimilarTo::previous) {
      if (slots > 0 && t > 0) {
        for (int64_t l = 0; l < slots; ++l) a.y[row + l] = kNone;
        for (int64_t f = 0; f + 1 < t; f += kFrames)
          cut_slots(a, row + f * slots, (t - f < kFrames + 1 ? t - f : kFrames + 1), slots, a.y + row + f * slots,
                    pieces);
      }
    } else {
      for (int64_t f = 0; f < t;) {
        if (segment >= a.windows || a.window[segment] < 1 || a.window[segment] > t - f || slots > a.num_out - out)
          return misfit(a);
        const int64_t frames = a.window[segment++];
        if (frames == 1)
          for (int64_t l = 0; l < slots; ++l) a.y[out + l] = kNone;
        else
          cut_slots(a, row + f * slots, frames, slots, a.y + out, pieces);
        f += frames, out += slots;
      }
    }
    row += held;
  }
  const bool windows_fit = a.to == SimilarTo::previous || (segment == a.windows && out == a.num_out);
  return row == a.n && windows_fit ? Status::ok : misfit(a);
}

Status similar_in_time(const AdjacentSimilarityArgs& a) {
  std::vector<Piece> pieces;
  const Status status = cut(a, pieces);
  if (status != Status::ok) return status;
  const auto& run = kernels().adjacent_similarity;
  int threads = threads_for(a.threads, a.n * a.c * size_of(a.dtype));
  const int64_t count = int64_t(pieces.size());
  if (threads > count) threads = int(count > 0 ? count : 1);
  std::atomic<int64_t> next{0};
  std::atomic<bool> starved{false};
  parallel(threads, [&](int, int) {
    std::unique_ptr<float[]> held;
    float* work = nullptr;
    if (a.to == SimilarTo::window) {
      held.reset(new (std::nothrow) float[size_t(kSlotBlock * a.c) + kAlign]);
      if (!held) {
        starved = true;
        return;
      }
      const uintptr_t past = reinterpret_cast<uintptr_t>(held.get()) / sizeof(float) % kAlign;
      work = held.get() + (kAlign - past) % kAlign;
    }
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      const Piece& piece = pieces[size_t(i)];
      if (a.to == SimilarTo::previous)
        run.previous(a, piece.block, piece.y);
      else
        run.window(a, piece.block, piece.y, work);
    }
  });
  if (starved) return fail(Status::memory, "expected memory for %lld channels", (long long)a.c);
  return Status::ok;
}

Status similar_to_center(const AdjacentSimilarityArgs& a) {
  const int32_t* cu = a.cu_seqlens;
  bool fits = cu[0] == 0 && cu[a.sequences] == a.n;
  for (int64_t s = 0; s < a.sequences; ++s) fits = fits && cu[s] <= cu[s + 1];
  if (!fits)
    return fail(Status::index, "expected cu_seqlens that start at 0, never fall and end at %lld, got others",
                (long long)a.n);
  const auto run = kernels().adjacent_similarity.center;
  const int64_t row = a.c * size_of(a.dtype);
  parallel_chunks(threads_for(a.threads, a.n * row), a.n, row, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = a.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (cu[middle] <= begin ? low : high) = middle;
    }
    for (int64_t s = low; begin < end; ++s) {
      const int64_t stop = end < cu[s + 1] ? end : cu[s + 1];
      if (begin < stop) run(a, static_cast<const char*>(a.center) + s * row, begin, stop);
      begin = begin > stop ? begin : stop;
    }
  });
  return Status::ok;
}

}  // namespace

Status adjacent_similarity(const AdjacentSimilarityArgs& args) {
  return args.to == SimilarTo::center ? similar_to_center(args) : similar_in_time(args);
}

}  // namespace vidtok
