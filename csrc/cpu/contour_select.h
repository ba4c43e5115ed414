// What each instruction set supplies to contour_select.
#pragma once

#include "vidtok/contour_select.h"

namespace vidtok {

// Columns of every matrix in double are padded to this.
inline constexpr int64_t kContourPad = 8;

struct ContourKernels {
  // out[t] = x[t] · basis for `rows` rows of x; out is [rows, cols] and cols a multiple of kContourPad. Each sum
  // runs over the channels in order, whatever else is computed beside it.
  void (*project)(const void* x, DType dtype, int64_t x_stride, int64_t rows, int64_t c, const double* basis,
                  int64_t cols, double* out);
  void (*multiply)(const double* x, int64_t x_stride, int64_t rows, int64_t c, const double* basis, int64_t cols,
                   double* out);
  // x · y and x · x of rows of c.
  void (*moments)(const void* x, const void* y, DType dtype, int64_t c, double* product, double* square);
};

}  // namespace vidtok
