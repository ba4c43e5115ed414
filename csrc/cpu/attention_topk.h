// What each instruction set supplies to attention_topk.
#pragma once

#include "vidtok/attention_topk.h"

namespace vidtok {

// Sums over keys are cut here, whatever the number of threads.
constexpr int64_t kSplitKeys = 256;
// Rows of partial sums are padded to whole vectors of every instruction set.
constexpr int64_t kPadding = 16;

inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// The query rows that share one key head, over one split of the keys.
struct AttentionLogits {
  const float* query;  // [rows, padded(dim)], zeros behind dim
  int64_t rows, dim;
  const void* key;
  DType dtype;
  int64_t key_row, length;
  float scale;
  const uint8_t* mask;      // [length] or null
  const int64_t* position;  // [width] or null; row r is w = r % width
  int64_t width;
  float* logits;         // [rows, kSplitKeys], of this split
  float *maximum, *sum;  // [rows, splits_stride]: of each split its largest logit and Σ exp(logit − it)
  int64_t splits_stride;
};

struct AttentionShares {
  const float* logits;  // [rows, kSplitKeys], of one split
  int64_t rows;
  const float *maximum, *inverse;  // [rows]; inverse 0 marks a row that sees nothing
  float* table;                    // [kSplitKeys]
  bool use_max;
};

struct AttentionTopkKernels {
  void (*convert)(const void* x, DType dtype, int64_t n, float* out);
  // Keys [begin, end), one split.
  void (*logits)(const AttentionLogits& a, int64_t begin, int64_t end);
  // Largest logit and 1/Σ exp over all splits of one row, combined in their order.
  void (*combine)(const float* maximum, const float* sum, int64_t splits, float* whole_maximum, float* inverse);
  // Adds (or takes the maximum of) the rows' shares of the first `keys` keys of the split.
  void (*shares)(const AttentionShares& a, int64_t keys);
  // table = table / divisor, to 16 significant bits.
  void (*finish)(float* table, int64_t begin, int64_t end, float divisor);
};

}  // namespace vidtok
