// cluster_dpc_knn on distances that lie in the workspace.
#pragma once

#include "cuda/cluster_dpc_knn_plan.h"
#include "cuda/tile/nearest.h"

namespace vidtok::cuda {

// Blocks of an SM that the registers are shared among.
template <int TILE, int WARPS>
constexpr int kClusterResident = TILE == 128      ? 1
                                 : TILE == 32     ? (VIDTOK_SM < 80 ? 4 : 5)
                                 : VIDTOK_SM < 80 ? 8 / WARPS
                                                  : (WARPS == 8 ? 2 : 3);

// Distances of a wave's segments; blocks walk over the tiles of all of them.
template <class T, int TILE, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp, (kClusterResident<TILE, WARPS>))
    cluster_dpc_knn_gram_kernel(ClusterShape p, ClusterMemory m, const T* x, int wave, int stages, int64_t tile_bytes) {
  // Registers of sm_70 do not hold the halves of such a tile; its launcher takes smaller ones.
  if constexpr (VIDTOK_SM > 0 && VIDTOK_SM < 80 && sizeof(T) == 2 && TILE == 128) {
    trap();
  } else {
    VIDTOK_SMEM(shared);
    unsigned char* const memory = shared.take<unsigned char>(tile_bytes);
    float* const norm = shared.take<float>(2 * TILE);
    const int64_t tiles = m.wave[wave].tiles, first = m.wave[wave].first;
    const int64_t end = larger(m.wave[wave + 1].first, first + 1);
    for (int64_t t = block(); t < tiles; t += blocks()) {
      const int64_t at = cluster_find(first, end, t, [&](int64_t i) { return m.segment[i].tiles; });
      const ClusterSegment s = m.segment[at];
      const int64_t within = t - s.tiles;
      int64_t right = int64_t((sqrt(8.0 * double(within) + 1.0) - 1.0) * 0.5);
      while (right * (right + 1) / 2 > within) --right;
      while ((right + 1) * (right + 2) / 2 <= within) ++right;
      const int64_t i0 = (within - right * (right + 1) / 2) * TILE, j0 = right * TILE;
      for (int i = thread(); i < 2 * TILE; i += threads()) {
        const int64_t token = i < TILE ? i0 + i : j0 + i - TILE;
        norm[i] = token < s.n ? m.norm[s.begin + token] : 0.0f;
      }
      const T* const rows = x + int64_t(s.begin) * p.x_stride;
      const GramRows<T> a{rows + i0 * p.x_stride, p.x_stride, s.n - i0},
          b{rows + j0 * p.x_stride, p.x_stride, s.n - j0};
      GramTile<T, TILE, TILE, WARPS> tile(memory, stages);
      tile.multiply(a, b, p.c, i0 == j0);
      const ClusterScale scale(s.norm, p.c);
      // Distances of a segment that is kept are fewer than 2^31.
      const uint32_t pitch = uint32_t(cluster_pitch(s.n)), i_first = uint32_t(i0), j_first = uint32_t(j0);
      int32_t* const unit = m.unit + s.distance;
      tile.for_each([&](int row, int col, float& product) {
        const uint32_t i = i_first + uint32_t(row), j = j_first + uint32_t(col);
        if (i > j || j >= uint32_t(s.n)) return;
        const int32_t u = i == j ? 0 : scale.units(norm[row], norm[TILE + col], product);
        unit[i * pitch + j] = u;
        unit[j * pitch + i] = u;
      });
      block_sync();
    }
  }
}

// The token of this warp, if it lies in a segment of the wave.
VIDTOK_DEVICE ClusterSegment* cluster_row(const ClusterShape& p, const ClusterMemory& m, int wave, int64_t* i) {
  *i = block() * warps() + warp();
  if (*i >= p.n || m.owner[*i] < 0) return nullptr;
  ClusterSegment* const s = m.segment + m.owner[*i];
  return s->wave == wave && s->clusters > 0 ? s : nullptr;
}

VIDTOK_DEVICE int32_t cluster_density(int64_t sum, int32_t k, double unit) {
  return int32_t(rint(exp(-(double(sum) * unit / double(k))) * 1048576.0));
}

VIDTOK_DEVICE double cluster_score(int32_t density, int32_t units, double unit) {
  return double(density) / 1048576.0 * sqrt(double(units) * unit);
}

__global__ void cluster_dpc_knn_density_kernel(ClusterShape p, ClusterMemory m, int wave) {
  int64_t i = 0;
  const ClusterSegment* const s = cluster_row(p, m, wave, &i);
  if (s == nullptr) return;
  const int32_t* const row = m.unit + s->distance + (i - s->begin) * cluster_pitch(s->n);
  const int32_t k = int32_t(smaller(p.k, int64_t(s->n)));
  const int64_t sum = smallest_sum([&](int32_t j) { return row[j]; }, s->n, k, kClusterMost);
  if (lane() == 0) m.density[i] = cluster_density(sum, k, ClusterScale(s->norm, p.c).unit);
}

// What one lane knows of a token's nearest denser token; all of a segment's largest distance.
struct ClusterHigher {
  int32_t nearest = kFarthest, largest = 0;
  VIDTOK_DEVICE void see(int32_t units, int32_t mine, int32_t other, bool earlier) {
    if (other > mine || (other == mine && earlier)) nearest = smaller(nearest, units);
    largest = larger(largest, units);
  }
  // All lanes of a warp.
  VIDTOK_DEVICE void note(const ClusterShape& p, const ClusterMemory& m, ClusterSegment& s, int64_t i) {
    nearest = warp_reduce(nearest, Min());
    largest = warp_max(largest);
    if (lane() != 0) return;
    atomic_max(&s.largest, largest);
    if (nearest == kFarthest) s.peak = m.density[i];
    m.score[i] = nearest == kFarthest ? -1.0 : cluster_score(m.density[i], nearest, ClusterScale(s.norm, p.c).unit);
  }
};

__global__ void cluster_dpc_knn_higher_kernel(ClusterShape p, ClusterMemory m, int wave) {
  int64_t i = 0;
  ClusterSegment* const s = cluster_row(p, m, wave, &i);
  if (s == nullptr) return;
  const int64_t local = i - s->begin;
  const int32_t* const row = m.unit + s->distance + local * cluster_pitch(s->n);
  const int32_t* const density = m.density + s->begin;
  const int32_t mine = density[local];
  ClusterHigher higher;
  for (int32_t j = lane(); j < s->n; j += kWarp) higher.see(row[j], mine, density[j], j < local);
  higher.note(p, m, *s, i);
}

// Places by score descending, then index; the first are centres.
__global__ void cluster_dpc_knn_rank_kernel(ClusterShape p, ClusterMemory m, int wave, int64_t* center) {
  int64_t i = 0;
  const ClusterSegment* const s = cluster_row(p, m, wave, &i);
  if (s == nullptr) return;
  const double* const score = m.score + s->begin;
  const double peak = cluster_score(s->peak, s->largest, ClusterScale(s->norm, p.c).unit);
  const int64_t local = i - s->begin;
  const double mine = score[local] < 0 ? peak : score[local];
  int32_t rank = 0;
  for (int32_t j = 0; j < s->n && rank < s->clusters; j += kWarp) {
    const int32_t at = j + lane();
    bool before = false;
    if (at < s->n) {
      const double other = score[at] < 0 ? peak : score[at];
      before = other > mine || (other == mine && at < local);
    }
    rank += popcount(ballot(before));
  }
  if (lane() != 0) return;
  m.rank[i] = rank;
  if (rank >= s->clusters || s->center + rank >= p.num_center) return;
  center[s->center + rank] = i;
  m.center[s->center + rank] = int32_t(local);
}

// Nearest first, then lowest index.
VIDTOK_DEVICE uint64_t cluster_nearness(int32_t units, int32_t center) {
  return uint64_t(uint32_t(units)) << 32 | uint32_t(center);
}

__global__ void cluster_dpc_knn_assign_kernel(ClusterShape p, ClusterMemory m, int wave, int64_t* assignment) {
  int64_t i = 0;
  const ClusterSegment* const s = cluster_row(p, m, wave, &i);
  if (s == nullptr) return;
  int32_t rank = m.rank[i];
  if (rank >= s->clusters) {
    const int32_t* const row = m.unit + s->distance + (i - s->begin) * cluster_pitch(s->n);
    uint64_t best = ~uint64_t(0);
    for (int32_t r = lane(); r < s->clusters; r += kWarp) {
      const int32_t c = s->center + r < p.num_center ? m.center[s->center + r] : 0;
      best = smaller(best, cluster_nearness(row[c], c));
    }
    best = warp_reduce(best, Min());
    rank = m.rank[s->begin + int64_t(uint32_t(best))];
  }
  if (lane() == 0) assignment[i] = rank;
}

}  // namespace vidtok::cuda
