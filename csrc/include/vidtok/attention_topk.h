#pragma once

#include "vidtok/common.h"

namespace vidtok {

// Softmax of scale·q·k over the visible keys in fp32, reduced over heads and rows, rounded to 16
// significant bits; then the `keep` best of each group of spans, ascending. Strides are in elements;
// the last dimension is contiguous.
struct AttentionTopkArgs {
  const void* query;  // [batch, q_heads, width, dim], contiguous
  const void* key;    // [batch, kv_heads, length, dim]
  DType dtype;
  int64_t batch, q_heads, kv_heads, width, length, dim;
  int64_t key_batch, key_head, key_row;
  float scale;
  const uint8_t* mask;      // [batch, length], zero where a key is hidden, or null
  const int64_t* position;  // [batch, width], the last key that a row sees, or null
  bool use_max;
  const int64_t* span;  // [spans, 3]: row, start, stop
  int64_t spans;
  const int64_t* group;  // [spans] or null: every span its own
  const int64_t* keep;   // [keeps]; one entry serves every group
  int64_t keeps;
  int64_t* index;  // [num_index]
  int64_t num_index;
  float* score;  // [num_score]
  int64_t num_score;
  int threads;
};

Status attention_topk(const AttentionTopkArgs& args);

}  // namespace vidtok
