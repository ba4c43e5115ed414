// Small kernels that show the matrix tiles of tile/mma.h and tile/gram.h to tests.
#pragma once

#include "vidtok/cuda.h"

namespace vidtok::host {

// One warp multiplies a [16, 16] by b [8, 16] (rows of 16-bit elements): the registers that ldmatrix fills (a: 4 words
// per lane; b: 2), then the sums of mma.m16n8k16 (4 per lane) added to c (4 per lane).
Status run_mma(bool bf16, const void* a, const void* b, const float* c, uint32_t* a_words, uint32_t* b_words, float* d,
               const cuda::Launch& on);

// One warp multiplies a [16, 16] by b [16, 16] in fp16 with wmma: out [16, 16].
Status run_wmma(const void* a, const void* b, float* out, const cuda::Launch& on);

struct GramSample {
  DType dtype;
  const void *a, *b;  // rows, `stride` elements apart; b is not read where `same`
  int64_t a_stride, b_stride, a_rows, b_rows, channels;
  const int32_t* index;  // rows of a, or null
  bool same;
  int tile, warps, stages;
  float *out, *row_max;  // [tile, tile], [tile]
};
Status run_gram(const GramSample& sample, const cuda::Launch& on);

}  // namespace vidtok::host
