// Sorts small lists in shared memory.
#pragma once

#include "cuda/tile/block.h"

namespace vidtok::cuda {

// Sorts items[0 .. n) by the block, for any n: a bitonic network whose places beyond n hold nothing that could move.
// before(a, b) is a strict total order (ties by index), so that the result does not depend on the network. Begins and
// ends with a barrier.
template <class T, class Before>
VIDTOK_DEVICE void block_sort(T* items, int n, Before before) {
  block_sync();
  for (int width = 2; width < 2 * n; width *= 2) {
    for (int half = width / 2; half > 0; half /= 2) {
      for (int p = thread(); p < n; p += threads()) {
        // The first step of a width mirrors, the others shift; the lower place gets the earlier item.
        const int q = half == width / 2 ? p ^ (width - 1) : p ^ half;
        if (q > p && q < n && before(items[q], items[p])) {
          const T t = items[p];
          items[p] = items[q];
          items[q] = t;
        }
      }
      block_sync();
    }
  }
}

struct Descending {
  template <class T>
  VIDTOK_DEVICE bool operator()(T a, T b) const {
    return b < a;
  }
};
struct Ascending {
  template <class T>
  VIDTOK_DEVICE bool operator()(T a, T b) const {
    return a < b;
  }
};

}  // namespace vidtok::cuda
