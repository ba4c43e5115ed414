#pragma once

#include "vidtok/common.h"
#include "vidtok/cuda.h"

namespace vidtok::cuda {

struct AttentionTopkChoice {
  int split;  // keys whose sums are one partial
  int warps;
};

// Numbers that say where a span lies: row, start, stop, its place among the scores, its place among the groups.
constexpr int kSpanNumbers = 5;

// All pointers are the device's; strides are in elements, the last dimension is contiguous.
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
  const int64_t* span;  // [spans, kSpanNumbers]
  int64_t spans;
  int64_t tokens;        // of all spans
  bool ordered;          // whether the groups lie in the order of the spans
  const int32_t* group;  // [groups + 1]: tokens before each group
  int64_t groups;
  int64_t keep;               // of every group, where keep_start is null
  const int64_t* keep_start;  // [groups + 1]: sums of the groups' numbers before each
  int64_t* index;             // [sum of the numbers]
  float* score;               // [tokens]
};

// workspace: attention_topk_workspace(args, choice) bytes.
int64_t attention_topk_workspace(const AttentionTopkArgs& args, const AttentionTopkChoice& choice);
// select_threads: of the selection at the end.
Status attention_topk(const AttentionTopkArgs& args, void* workspace, int select_threads,
                      const AttentionTopkChoice& choice, const Launch& on);

}  // namespace vidtok::cuda
