// Where a call of a CUDA kernel runs.
#pragma once

#include "vidtok/common.h"

namespace vidtok::cuda {

struct Launch {
  void* stream;
  int32_t* error;  // four words that a kernel writes when an index is bad (tile/report.h)
  int sm;          // of the device, 90 for 9.0; its tables and limits hold
  int sms;
};

}  // namespace vidtok::cuda
