#pragma once

#include "vidtok/adjacent_similarity.h"
#include "vidtok/cuda.h"

namespace vidtok::cuda {

struct AdjacentSimilarityChoice {
  int warps;  // that share a row: fixes the order of its sums
};

// As vidtok/adjacent_similarity.h, with videos and segments that the caller has laid out and checked.
struct SimilarityArgs {
  const void* x;  // [n, c], rows x_stride elements apart
  float* y;
  DType dtype;
  int64_t n, c, x_stride;
  SimilarTo to;
  // [runs, 4] on the device: first row, rows of a frame, frames, and pieces of work before. `previous`: the frames
  // after the first of a video, `step` at a time; `window`: a segment is one piece per row of a frame.
  const int64_t* runs;
  int64_t num_runs, pieces, step;
  const void* center;         // [sequences, c] contiguous
  const int32_t* cu_seqlens;  // [sequences + 1] on the device
  int64_t sequences;
};

// Channels that `window` can hold the sum of.
constexpr int64_t kSimilarChannels = 24000;

Status adjacent_similarity(const SimilarityArgs& args, const AdjacentSimilarityChoice& choice, const Launch& on);

}  // namespace vidtok::cuda
