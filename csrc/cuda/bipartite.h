#pragma once

#include "vidtok/bipartite.h"
#include "vidtok/cuda.h"

namespace vidtok::cuda {

struct BipartiteChoice {
  bool one_block;  // a sequence is one block's work, where it fits
  int tile;        // sources of a block: 32, 64 or 128
};

// Lists lie on the device. With `cu` in the arguments, cu_out is given; sequences without it give m / batch outputs
// each. `longest` is the most tokens of a sequence; `threads` of the arguments is not read. workspace:
// bipartite_workspace(all tokens, batch) bytes.
int64_t bipartite_workspace(int64_t tokens, int64_t batch);
Status bipartite(const BipartiteArgs& args, int64_t longest, void* workspace, const BipartiteChoice& choice,
                 const Launch& on);

}  // namespace vidtok::cuda
