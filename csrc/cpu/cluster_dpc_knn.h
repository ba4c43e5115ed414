// What each instruction set supplies to cluster_dpc_knn, besides the dot products.
#pragma once

#include "cpu/gram.h"
#include "vidtok/cluster_dpc_knn.h"

namespace vidtok {

// Distance units are kept as floats: integers up to 2²², exact. u is [rows, ld]; columns are padded to
// whole panels. Each function owns a range of columns or of rows.
struct ClusterKernels {
  // list[t][j]: the `slots` smallest units of column j so far, ascending; columns [begin, end).
  void (*nearest)(const float* u, int64_t ld, int64_t rows, int64_t begin, int64_t end, int64_t slots, float* list,
                  int64_t ldl);
  // best[i] = min(best[i], u[i][j] over col_rank[j] < row_rank[i]), largest[i] = max(largest[i], u[i][j]); rows
  // [begin, end) over all `cols` columns.
  void (*higher)(const float* u, int64_t ld, int64_t begin, int64_t end, int64_t cols, const int32_t* row_rank,
                 const int32_t* col_rank, float* best, float* largest);
  // The first row of u[row[t]] with the smallest entry of each column: best and who = base + t.
  void (*assign)(const float* u, int64_t ld, const int32_t* row, int64_t count, int64_t base, int64_t begin,
                 int64_t end, float* best, int32_t* who);
};

}  // namespace vidtok
