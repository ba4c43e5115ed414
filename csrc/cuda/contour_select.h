#pragma once

#include "vidtok/contour_select.h"
#include "vidtok/cuda.h"

namespace vidtok::cuda {

struct ContourSelectChoice {
  int threads;  // of the blocks that serve a whole sequence: they cut the sums over its frames
};

// As vidtok/contour_select.h, with sequences that the caller has laid out and checked.
struct ContourArgs {
  const void* x;  // [n, c], rows x_stride elements apart
  DType dtype;
  int64_t n, c, x_stride;
  // [sequences, 7] on the device: first frame, frames, rank, frames to choose, place of the first of these, address of
  // the basis, and row tiles (kContourRows) before.
  const int64_t* list;
  int64_t sequences, rank, tiles;  // the largest rank, all row tiles
  const void* query;               // [sequences, c] of the same dtype, or null
  ContourRule rule;
  int64_t* index;
  float* distance;  // [n]
};

// Frames of one block of the projection.
constexpr int64_t kContourRows = 16;

// workspace: contour_select_workspace(args) bytes.
int64_t contour_select_workspace(const ContourArgs& args);
Status contour_select(const ContourArgs& args, void* workspace, const ContourSelectChoice& choice, const Launch& on);

}  // namespace vidtok::cuda
