// Every kernel with several threads, and called from several threads at once, gives the bits that
// one thread gives. Built with ThreadSanitizer by `make check-tsan`.
#include <new>

#include "check.h"
#include "cpu/parallel.h"
#include "vidtok/adjacent_similarity.h"
#include "vidtok/attention_topk.h"
#include "vidtok/bipartite.h"
#include "vidtok/cluster_dpc_knn.h"
#include "vidtok/plan_apply.h"
#include "vidtok/pool_packed.h"
#include "vidtok/position_remap.h"
#include "vidtok/proportional_attention.h"
#include "vidtok/topk_select.h"

namespace {

using vidtok::DType;
using namespace vidtok_test;

void plan_apply() {
  const int64_t n = 4000, c = 96, m = n / 4;
  const auto x = normal(n * c, 1);
  std::vector<int32_t> anchor(m), member(n), offset(m + 1);
  const std::vector<float> weight(n, 0.25f);
  for (int64_t i = 0; i < n; ++i) member[i] = static_cast<int32_t>((i * 7) % n);
  for (int64_t i = 0; i < m; ++i) anchor[i] = member[4 * i];
  for (int64_t i = 0; i <= m; ++i) offset[i] = static_cast<int32_t>(4 * i);
  vidtok::PlanApplyArgs args{};
  args.dtype = DType::f32;
  args.x = x.data();
  args.n = n, args.m = m, args.c = args.x_stride = c;
  args.anchor = anchor.data();
  const auto forward = [&](int threads) {
    std::vector<float> y(m * c);
    vidtok::PlanApplyArgs a = args;
    a.y = y.data(), a.threads = threads;
    ok(vidtok::plan_apply(a), "plan_apply");
    return bytes(y);
  };
  check("plan_apply, gather", forward);
  args.member = member.data(), args.offset = offset.data(), args.weight = weight.data(), args.nnz = n;
  check("plan_apply, means", forward);
  check("plan_apply backward", [&](int threads) {
    std::vector<float> grad(n * c);
    vidtok::PlanApplyArgs a = args;
    a.y = grad.data(), a.threads = threads;
    ok(vidtok::plan_apply_backward(a), "plan_apply_backward");
    return bytes(grad);
  });
}

void position_remap() {
  const int64_t n = 50000, m = n / 2;
  std::vector<int32_t> anchor(m);
  for (int64_t i = 0; i < m; ++i) anchor[i] = i % 100 == 0 ? -1 : static_cast<int32_t>(2 * i);
  std::vector<int64_t> ids(3 * n);
  std::vector<uint8_t> mask(n);
  for (int64_t i = 0; i < 3 * n; ++i) ids[i] = i * 31;
  for (int64_t i = 0; i < n; ++i) mask[i] = i & 1;
  check("position_remap", [&](int threads) {
    std::vector<int64_t> ids_out(3 * m);
    std::vector<uint8_t> mask_out(m);
    const vidtok::RemapTensor tensors[] = {{ids.data(), ids_out.data(), 3, 8, 8, 7},
                                           {mask.data(), mask_out.data(), 1, 1, 1, 0}};
    vidtok::PositionRemapArgs a{};
    a.anchor = anchor.data(), a.n = n, a.m = m, a.tensors = tensors, a.count = 2, a.threads = threads;
    ok(vidtok::position_remap(a), "position_remap");
    return bytes(ids_out, mask_out);
  });
}

void topk_select() {
  const int64_t n = 60000;
  const auto score = normal(n, 2);
  const std::vector<int32_t> cu = {0, 10, 10, 30000, 60000};
  const std::vector<int64_t> keep = {3, 0, 9000, 200};
  check("topk_select", [&](int threads) {
    std::vector<int64_t> index(3 + 9000 + 200);
    vidtok::TopkSelectArgs a{};
    a.score = score.data(), a.dtype = DType::f32, a.n = n;
    a.keep = keep.data(), a.keeps = 4, a.cu_seqlens = cu.data(), a.segments = 4;
    a.index = index.data(), a.threads = threads;
    ok(vidtok::topk_select(a), "topk_select");
    return bytes(index);
  });
}

void pool_packed() {
  const int64_t c = 64;
  const std::vector<int64_t> grid_in = {3, 24, 18, 2, 15, 31}, grid_out = {3, 12, 9, 2, 4, 8};
  const int64_t num_in = 3 * 24 * 18 + 2 * 15 * 31, num_out = 3 * 12 * 9 + 2 * 4 * 8;
  const auto x = normal(num_in * c, 3);
  vidtok::PoolPackedArgs args{};
  args.dtype = DType::f32;
  args.x = x.data();
  args.num_in = num_in, args.num_out = num_out, args.c = args.x_stride = c;
  args.grid_in = grid_in.data(), args.grid_out = grid_out.data(), args.videos = 2;
  check("pool_packed", [&](int threads) {
    std::vector<float> y(num_out * c);
    vidtok::PoolPackedArgs a = args;
    a.y = y.data(), a.threads = threads;
    ok(vidtok::pool_packed(a), "pool_packed");
    return bytes(y);
  });
  check("pool_packed backward", [&](int threads) {
    std::vector<float> grad(num_in * c);
    vidtok::PoolPackedArgs a = args;
    a.y = grad.data(), a.threads = threads;
    ok(vidtok::pool_packed_backward(a), "pool_packed_backward");
    return bytes(grad);
  });
}

void adjacent_similarity() {
  const int64_t c = 128, slots = 10 * 14, frames = 9, n = frames * slots;
  const auto x = normal(n * c, 4), center = normal(2 * c, 5);
  const std::vector<int64_t> grid = {frames, 10, 14}, window = {4, 1, 4};
  const std::vector<int32_t> cu = {0, 300, static_cast<int32_t>(n)};
  vidtok::AdjacentSimilarityArgs args{};
  args.x = x.data(), args.dtype = DType::f32;
  args.n = n, args.c = args.x_stride = c;
  args.grid = grid.data(), args.videos = 1, args.window = window.data(), args.windows = 3;
  args.center = center.data(), args.cu_seqlens = cu.data(), args.sequences = 2;
  const auto with = [&](vidtok::SimilarTo to, int64_t outputs) {
    return [&, to, outputs](int threads) {
      std::vector<float> y(outputs);
      vidtok::AdjacentSimilarityArgs a = args;
      a.to = to, a.y = y.data(), a.num_out = outputs, a.threads = threads;
      ok(vidtok::adjacent_similarity(a), "adjacent_similarity");
      return bytes(y);
    };
  };
  check("adjacent_similarity, previous", with(vidtok::SimilarTo::previous, n));
  check("adjacent_similarity, window", with(vidtok::SimilarTo::window, 3 * slots));
  check("adjacent_similarity, center", with(vidtok::SimilarTo::center, n));
}

void cluster_dpc_knn(int64_t workspace, const char* name) {
  const int64_t n = 700, c = 64;
  const auto x = normal(n * c, 6);
  const std::vector<int32_t> cu = {0, 1, 260, 700};
  const std::vector<int64_t> clusters = {1, 40, 90};
  check(name, [&](int threads) {
    std::vector<int64_t> assignment(n), center(1 + 40 + 90);
    vidtok::ClusterDpcKnnArgs a{};
    a.x = x.data(), a.dtype = DType::f32, a.n = n, a.c = a.x_stride = c;
    a.cu_seqlens = cu.data(), a.segments = 3, a.num_clusters = clusters.data(), a.num_counts = 3, a.k = 5;
    a.assignment = assignment.data(), a.center = center.data(), a.workspace = workspace, a.threads = threads;
    ok(vidtok::cluster_dpc_knn(a), "cluster_dpc_knn");
    return bytes(assignment, center);
  });
}

void bipartite(bool packed) {
  const int64_t batch = 3, tokens = 400, n = batch * tokens, cm = 48, c = 80;
  const auto metric = normal(n * cm, 7), x = normal(n * c, 8);
  const std::vector<float> size(n, 2.0f);
  const std::vector<int32_t> cu = {0, 350, 360, static_cast<int32_t>(n)};
  vidtok::BipartiteArgs args{};
  args.metric = metric.data(), args.metric_dtype = DType::f32, args.heads = 1, args.cm = cm;
  args.metric_batch = tokens * cm, args.metric_row = cm;
  args.size = size.data(), args.batch = batch, args.tokens = packed ? n : tokens, args.r = 60, args.prefix = 1;
  args.cu = packed ? cu.data() : nullptr;
  args.x = x.data(), args.x_dtype = DType::f32, args.c = c, args.x_batch = tokens * c, args.x_row = c;
  ok(vidtok::bipartite_count(args, &args.m), "bipartite_count");
  check(packed ? "bipartite, packed" : "bipartite, dense", [&](int threads) {
    const int64_t m = args.m;
    std::vector<float> y(m * c), total(m), weight(n);
    std::vector<int32_t> cu_in(batch + 1), cu_out(batch + 1), anchor(m), member(n), offset(m + 1);
    vidtok::BipartiteArgs a = args;
    a.y = y.data(), a.total = total.data(), a.weight = weight.data();
    a.cu_in = cu_in.data(), a.cu_out = cu_out.data();
    a.anchor = anchor.data(), a.member = member.data(), a.offset = offset.data();
    a.threads = threads;
    ok(vidtok::bipartite(a), "bipartite");
    return bytes(y, total, weight, cu_in, cu_out, anchor, member, offset);
  });
}

void attention_topk(bool use_max) {
  const int64_t batch = 2, q_heads = 4, kv_heads = 2, width = 3, length = 1200, dim = 32;
  const auto query = normal(batch * q_heads * width * dim, 9), key = normal(batch * kv_heads * length * dim, 10);
  std::vector<uint8_t> mask(batch * length, 1);
  for (int64_t i = 0; i < 40; ++i) mask[i] = 0;
  const std::vector<int64_t> position = {1199, 1100, -1, 1199, 1198, 1197};
  const std::vector<int64_t> span = {0, 50, 600, 0, 700, 900, 1, 10, 1000}, group = {5, 5, 2}, keep = {300, 99};
  check(use_max ? "attention_topk, max" : "attention_topk, mean", [&](int threads) {
    std::vector<int64_t> index(300 + 99);
    std::vector<float> score(550 + 200 + 990);
    vidtok::AttentionTopkArgs a{};
    a.query = query.data(), a.key = key.data(), a.dtype = DType::f32;
    a.batch = batch, a.q_heads = q_heads, a.kv_heads = kv_heads, a.width = width, a.length = length, a.dim = dim;
    a.key_batch = kv_heads * length * dim, a.key_head = length * dim, a.key_row = dim, a.scale = 0.2f;
    a.mask = mask.data(), a.position = position.data(), a.use_max = use_max;
    a.span = span.data(), a.spans = 3, a.group = group.data(), a.keep = keep.data(), a.keeps = 2;
    a.index = index.data(), a.num_index = 399, a.score = score.data(), a.num_score = 1740;
    a.threads = threads;
    ok(vidtok::attention_topk(a), "attention_topk");
    return bytes(index, score);
  });
}

void proportional_attention(DType dtype, const char* name) {
  const int64_t batch = 2, heads = 3, rows = 250, keys = 600, dim = 48;
  const auto q = normal(batch * heads * rows * dim, 11), k = normal(batch * heads * keys * dim, 12);
  const auto v = normal(batch * heads * keys * dim, 13), bias = normal(batch * keys, 14);
  check(name, [&](int threads) {
    std::vector<float> out(batch * rows * heads * dim);
    vidtok::ProportionalAttentionArgs a{};
    // Of bf16 the same memory holds twice as many numbers; half of them are used.
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.dtype = dtype;
    a.batch = batch, a.heads = heads, a.rows = rows, a.keys = keys, a.dim = dim;
    a.q_stride[0] = heads * rows * dim, a.q_stride[1] = rows * dim, a.q_stride[2] = dim;
    a.k_stride[0] = heads * keys * dim, a.k_stride[1] = keys * dim, a.k_stride[2] = dim;
    a.v_stride[0] = heads * keys * dim, a.v_stride[1] = keys * dim, a.v_stride[2] = dim;
    a.bias = bias.data(), a.bias_stride = keys, a.scale = 0.1f, a.out = out.data(), a.threads = threads;
    ok(vidtok::proportional_attention(a), "proportional_attention");
    return bytes(out);
  });
}

// Memory may run out on any thread; the caller must learn of it.
void exceptions() {
  for (int threads : {1, 2, 4}) {
    bool caught = false;
    try {
      vidtok::parallel(threads, [](int, int) { throw std::bad_alloc(); });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    expect(caught, "an exception on " + std::to_string(threads) + " threads");
  }
}

}  // namespace

int main() {
  exceptions();
  plan_apply();
  position_remap();
  topk_select();
  pool_packed();
  adjacent_similarity();
  cluster_dpc_knn(64 << 20, "cluster_dpc_knn, distances kept");
  cluster_dpc_knn(0, "cluster_dpc_knn, distances computed again");
  bipartite(false);
  bipartite(true);
  attention_topk(false);
  attention_topk(true);
  proportional_attention(DType::f32, "proportional_attention, fp32");
  proportional_attention(DType::bf16, "proportional_attention, bf16");
  std::printf("%d failed\n", failures);
  return failures != 0;
}
