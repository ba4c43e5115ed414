// What each instruction set supplies to bipartite_match and bipartite_merge.
#pragma once

#include "vidtok/bipartite.h"

namespace vidtok {

// One sequence while it is matched.
struct Matching {
  const float* rows;  // [T, cm], row_stride apart
  int64_t row_stride, cm;
  const int32_t *source, *destination;  // positions
  int64_t sources, destinations;
  const float* inverse_source;       // 1/norm
  const float* inverse_destination;  // steps/norm
  float steps;                       // grid points per unit of cosine
  float* best;                       // [sources] rounded cosine in grid points, -inf when all are NaN
  int32_t* target;                   // [sources] its first destination, by rank
  const char* ahead;                 // bytes that the caller reads next, or null
  int64_t ahead_bytes;
};

// One sequence while it is merged.
struct Merging {
  const void* x;          // its first row
  int64_t begin, out;     // its first token and first output
  const int32_t* offset;  // of its outputs into the member list, and the end
};

struct BipartiteKernels {
  // Sources that one panel holds, and floats of workspace it needs per channel.
  int64_t panel;
  // fp32 rows [begin, end) of a sequence (its metric at `metric`), mean over heads; into out [*, cm].
  void (*rows)(const BipartiteArgs& args, const void* metric, int64_t begin, int64_t end, float* out);
  // 1/norm of rows [begin, end); 0 for a zero row, NaN where the norm is not finite.
  void (*inverse)(const float* rows, int64_t stride, int64_t cm, int64_t begin, int64_t end, float* out);
  // Matches panel `index` of `count`.
  void (*match)(const Matching& m, int64_t index, int64_t count, float* workspace);
  // Outputs [begin, end) of one sequence.
  void (*merge)(const BipartiteArgs& args, const Merging& s, int64_t begin, int64_t end, bool streaming);
};

}  // namespace vidtok
