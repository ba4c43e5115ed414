// What each instruction set supplies to peak_flops and stream_copy.
#pragma once

#include "vidtok/peak.h"

namespace vidtok {

struct PeakKernels {
  int64_t flops_per_round;
  float (*flops)(int64_t rounds, float factor, float addend);
  void (*copy)(const char* x, char* y, int64_t bytes);
};

}  // namespace vidtok
