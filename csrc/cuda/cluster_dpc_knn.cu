// Density peaks per segment. Distances of a segment are products of tiles at or above the diagonal, rounded to whole
// units and kept, both halves, in the workspace; then a warp per token finds its density, its nearest denser token, its
// rank by rho * delta and its centre. Segments are dealt to waves that fill the workspace one after another; a segment
// that no wave has room for is swept: its distances are made anew, strip by strip, for every pass over them.
// No launch depends on offsets or counts: the plan kernel turns them into lists that the others read.
#include "cuda/cluster_dpc_knn_kept.h"
#include "cuda/cluster_dpc_knn_plan.h"
#include "cuda/cluster_dpc_knn_swept.h"

#if !defined(__CUDACC_RTC__)

#include "cuda/cluster_dpc_knn.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

constexpr int kMaxWaves = 8, kRowThreads = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t distances(int64_t n) { return n * ((n + 3) / 4 * 4); }

// What the host can tell without the offsets: how many waves, whether a segment may have to be swept, and bounds.
struct ClusterPlan {
  int waves;
  bool sweep;
  int64_t room;   // distances
  int64_t sides;  // the longest segment's tokens
};

ClusterPlan cluster_plan(const ClusterDpcKnnCall& call) {
  const ClusterDpcKnnArgs& a = call.args;
  const int64_t most = a.workspace / int64_t(sizeof(int32_t));
  if (call.cu_host != nullptr || a.cu_seqlens == nullptr) {
    ClusterPlan plan{1, false, 0, 0};
    int64_t used = 0;
    for (int64_t s = 0; s < a.segments; ++s) {
      const int64_t n = call.cu_host != nullptr ? call.cu_host[s + 1] - call.cu_host[s] : a.n, need = distances(n);
      plan.sides = n > plan.sides ? n : plan.sides;
      if (need > most) {
        plan.sweep = true;
        continue;
      }
      if (used + need > most) ++plan.waves, used = 0;
      used += need;
      plan.room = used > plan.room ? used : plan.room;
    }
    if (plan.waves > kMaxWaves) plan.waves = kMaxWaves, plan.sweep = true;
    if (plan.waves > 1) plan.room = most;
    return plan;
  }
  const int64_t all = distances(a.n);
  if (all <= most) return {1, false, all, a.n};
  // As if all segments were alike, and one wave more: those that find no room are swept.
  const int64_t each = distances(ceil_div(a.n, a.segments)), fitting = each > 0 ? most / each : a.segments;
  int64_t waves = fitting > 0 ? ceil_div(a.segments, fitting) : 1;
  waves += a.segments > 1;
  return {int(waves < kMaxWaves ? waves : kMaxWaves), true, most, a.n};
}

int64_t cluster_memory(const ClusterDpcKnnCall& call, const ClusterPlan& plan, unsigned char* base, ClusterMemory& m) {
  int64_t bytes = 0;
  const auto take = [&](auto*& piece, int64_t count) {
    using Item = std::remove_reference_t<decltype(*piece)>;
    piece = reinterpret_cast<Item*>(base + bytes);
    bytes += carved<Item>(count);
  };
  const int64_t n = call.args.n;
  take(m.unit, plan.room);
  take(m.segment, call.args.segments);
  take(m.wave, plan.waves + 1);
  take(m.score, n);
  take(m.norm, n);
  take(m.owner, n);
  take(m.density, n);
  take(m.rank, n);
  take(m.center, call.num_center);
  return bytes;
}

template <class T>
struct ClusterRun {
  const ClusterDpcKnnArgs& a;
  ClusterPlan plan;
  ClusterShape p;
  ClusterMemory m;
  ClusterDpcKnnChoice choice;
  const Launch& on;
  const T* x;

  int stages_for(int side, int64_t extra) const {
    int stages = choice.stages < 1 ? 1 : choice.stages;
    if (on.sm < 80 && stages > 2) stages = 2;
    if (stages > 4) stages = 4;
    while (stages > 1 && gram_shared(side, side, stages, int(sizeof(T)), on.sm) + extra > shared_limit(on.sm)) --stages;
    return stages;
  }

  Status norms() const {
    if (sizeof(T) == 4)
      return VIDTOK_LAUNCH(cluster_dpc_knn_norm_kernel<T>, ceil_div(a.n, kRowThreads / kWarp), kRowThreads, 0, on, p, m,
                           x, 0, int64_t(0), a.assignment);
    constexpr int kTile = 32;
    const int stages = stages_for(kTile, 1024);
    const int64_t bytes = gram_shared(kTile, kTile, stages, int(sizeof(T)), on.sm);
    return VIDTOK_LAUNCH(cluster_dpc_knn_norm_kernel<T>, ceil_div(a.n, kTile), 4 * kWarp,
                         carved<unsigned char>(bytes) + carved<float>(kTile), on, p, m, x, stages, bytes, a.assignment);
  }

  template <int TILE, int WARPS>
  Status gram(int wave) const {
    const int64_t extra = carved<float>(2 * TILE);
    const int stages = stages_for(TILE, extra + 16);
    const int64_t bytes = gram_shared(TILE, TILE, stages, int(sizeof(T)), on.sm);
    const double sides = double(ceil_div(a.n, TILE) + a.segments), tiles = sides * (sides + 1) / 2;
    const int64_t most = int64_t(on.sms) * 8, blocks = tiles < double(most) ? int64_t(tiles) : most;
    return VIDTOK_LAUNCH((cluster_dpc_knn_gram_kernel<T, TILE, WARPS>), blocks, WARPS * kWarp,
                         carved<unsigned char>(bytes) + extra, on, p, m, x, wave, stages, bytes);
  }

  Status gram_of(int wave) const {
    if (tile() == 32) return gram<32, 4>(wave);
    if (tile() == 128) return gram<128, 8>(wave);
    return choice.warps >= 8 ? gram<64, 8>(wave) : gram<64, 4>(wave);
  }
  // No tile of 128 halves on sm_70.
  int tile() const { return choice.tile <= 32 ? 32 : choice.tile >= 128 && (sizeof(T) == 4 || on.sm >= 80) ? 128 : 64; }

  // Kernels of a warp per row; they return their status.
  template <class... A>
  Status rows(const char* name, void (*kernel)(ClusterShape, ClusterMemory, int, A...), int wave, A... more) const {
    return launch_kernel(name, kernel, ceil_div(a.n, kRowThreads / kWarp), kRowThreads, 0, on, p, m, wave, more...);
  }

  template <class... A>
  Status strips(const char* name, void (*kernel)(ClusterShape, ClusterMemory, const T*, int, int, int64_t, A...),
                int64_t table, A... more) const {
    const int64_t extra = carved<int32_t>(kStrip * kStripPitch) + table;
    const int stages = stages_for(kStrip, extra + 16);
    const int64_t bytes = gram_shared(kStrip, kStrip, stages, int(sizeof(T)), on.sm);
    const int64_t most = int64_t(on.sms) * 4, blocks = ceil_div(a.n, kStrip) + a.segments;
    return launch_kernel(name, kernel, blocks < most ? blocks : most, kStripWarps * kWarp,
                         carved<unsigned char>(bytes) + extra, on, p, m, x, plan.waves, stages, bytes, more...);
  }

  Status run() const {
    Status status = VIDTOK_LAUNCH(cluster_dpc_knn_plan_kernel, 1, kWarp, 0, on, p, m, a.cu_seqlens, a.num_clusters,
                                  a.num_counts, plan.room, plan.waves, tile(), a.center, on.error);
    const auto then = [&](auto&& next) {
      if (status == Status::ok) status = next();
    };
    if (a.n == 0) return status;
    then([&] { return norms(); });
    for (int wave = 0; wave < plan.waves && plan.room > 0; ++wave) {
      then([&] { return gram_of(wave); });
      then([&] { return rows("cluster_dpc_knn_density_kernel", &cluster_dpc_knn_density_kernel, wave); });
      then([&] { return rows("cluster_dpc_knn_higher_kernel", &cluster_dpc_knn_higher_kernel, wave); });
      then([&] { return rows("cluster_dpc_knn_rank_kernel", &cluster_dpc_knn_rank_kernel, wave, a.center); });
      then([&] { return rows("cluster_dpc_knn_assign_kernel", &cluster_dpc_knn_assign_kernel, wave, a.assignment); });
    }
    if (!plan.sweep) return status;
    const int64_t lists =
        carved<int32_t>(kStrip * kClusterBins) + 2 * carved<int32_t>(kStrip) + carved<int64_t>(kStrip);
    const int64_t table = carved<uint64_t>(kStrip * kWarp);
    then([&] {
      return strips("cluster_dpc_knn_density_swept_kernel", &cluster_dpc_knn_density_swept_kernel<T>, lists);
    });
    then([&] { return strips("cluster_dpc_knn_higher_swept_kernel", &cluster_dpc_knn_higher_swept_kernel<T>, table); });
    then([&] { return rows("cluster_dpc_knn_rank_kernel", &cluster_dpc_knn_rank_kernel, kSwept, a.center); });
    then([&] {
      return strips("cluster_dpc_knn_assign_swept_kernel", &cluster_dpc_knn_assign_swept_kernel<T>, table,
                    a.assignment);
    });
    return status;
  }
};

template <class T>
Status run_clusters(const ClusterDpcKnnCall& call, void* workspace, const ClusterDpcKnnChoice& choice,
                    const Launch& on) {
  const ClusterDpcKnnArgs& a = call.args;
  ClusterRun<T> run{a,  cluster_plan(call),        {a.n, a.segments, a.c, a.x_stride, a.k, call.num_center}, {}, choice,
                    on, static_cast<const T*>(a.x)};
  cluster_memory(call, run.plan, static_cast<unsigned char*>(workspace), run.m);
  return run.run();
}

}  // namespace

int64_t cluster_dpc_knn_workspace(const ClusterDpcKnnCall& call) {
  ClusterMemory m{};
  return cluster_memory(call, cluster_plan(call), nullptr, m);
}

Status cluster_dpc_knn(const ClusterDpcKnnCall& call, void* workspace, const ClusterDpcKnnChoice& choice,
                       const Launch& on) {
  if (call.args.workspace / int64_t(sizeof(int32_t)) > 0x7fffffff)
    return fail(Status::value, "expected fewer than 2^31 distances, got %lld bytes", (long long)call.args.workspace);
  switch (call.args.dtype) {
    case DType::f32:
      return run_clusters<float>(call, workspace, choice, on);
    case DType::bf16:
      if (on.sm < 80) return fail(Status::value, "bf16 needs sm_80 or newer, got sm_%d", on.sm);
      return run_clusters<bf16>(call, workspace, choice, on);
    case DType::f16:
      return run_clusters<f16>(call, workspace, choice, on);
  }
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(call.args.dtype));
}

}  // namespace vidtok::cuda

#endif
