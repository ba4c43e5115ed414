// What each instruction set supplies to adjacent_similarity.
#pragma once

#include "vidtok/adjacent_similarity.h"

namespace vidtok {

// `count` slots of `frames` frames that lie `slots` rows apart; x points at the first slot of the first frame.
struct SlotBlock {
  const void* x;
  int64_t frames, slots, count;
};

// Rows that follow each other in memory; two frames of them stay in L2.
constexpr int64_t kSlotBlock = 14;

struct AdjacentSimilarityKernels {
  // y[f·slots + l] for frames 1 … frames − 1; at most kSlotBlock slots.
  void (*previous)(const AdjacentSimilarityArgs& args, const SlotBlock& block, float* y);
  // y[l] for every slot; work holds kSlotBlock · c floats.
  void (*window)(const AdjacentSimilarityArgs& args, const SlotBlock& block, float* y, float* work);
  // y[i] for rows [begin, end) against one centre.
  void (*center)(const AdjacentSimilarityArgs& args, const void* center, int64_t begin, int64_t end);
};

}  // namespace vidtok
