#pragma once

#include "vidtok/cuda.h"
#include "vidtok/position_remap.h"

namespace vidtok::cuda {

struct PositionRemapChoice {
  int threads;
};

// Lists lie on the device, `tensors` on the host; `threads` of the arguments is not read.
Status position_remap(const PositionRemapArgs& args, const PositionRemapChoice& choice, const Launch& on);

}  // namespace vidtok::cuda
