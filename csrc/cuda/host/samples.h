// Small kernels, legal and broken, that show what the host machine lets pass and what it reports.
#pragma once

#include "vidtok/cuda.h"

namespace vidtok::host {

// out[i] = x[n − 1 − i], or a variant of that named by `sample`, in one block of n threads.
Status run_sample(const char* sample, const float* x, float* out, int n, const cuda::Launch& on);

// Switches between two fibers, for measuring what one costs.
Status switch_fibers(int64_t rounds, const cuda::Launch& on);

}  // namespace vidtok::host
