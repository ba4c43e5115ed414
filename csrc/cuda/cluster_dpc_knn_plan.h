// What the kernels of cluster_dpc_knn share: the lists of segments, waves and tokens, and the kernels that make them.
#pragma once

#include "cuda/tile/gram.h"
#include "cuda/tile/report.h"

namespace vidtok::cuda {

constexpr int32_t kClusterMost = 1 << 22;
constexpr int kStrip = 64, kStripPitch = kStrip + 1, kStripWarps = 4;
constexpr int kSwept = -1;

struct ClusterSegment {
  int32_t begin, n, clusters;
  int32_t wave;      // in which its distances are kept, or kSwept
  int64_t distance;  // where they begin
  int64_t center;    // its first place in the list of centres
  int64_t tiles;     // of its wave before it
  int64_t strips;    // of swept segments before it
  int32_t norm;      // bits of the largest finite squared norm
  int32_t largest;   // distance
  int32_t peak;      // density of the token that none surpasses
  int32_t spare;
};

struct ClusterWave {
  int64_t first;  // segment
  int64_t tiles;
};

struct ClusterMemory {
  ClusterSegment* segment;
  ClusterWave* wave;  // the entry after the last wave counts strips of swept segments
  float* norm;        // of each token: squared norm, ...
  int32_t* owner;     // ... segment, or -1, ...
  int32_t* density;   // ... times 2^20, ...
  double* score;      // ... rho * delta, or -1 for the peak, ...
  int32_t* rank;      // ... place by score
  int32_t* center;    // centres within their segments
  int32_t* unit;      // distances
};

struct ClusterShape {
  int64_t n, segments, c, x_stride, k, num_center;
};

// ‖x_i − x_j‖² / C = units · unit.
struct ClusterScale {
  float factor;
  double unit;
  VIDTOK_DEVICE ClusterScale(int32_t norm, int64_t c) : factor(0), unit(0) {
    const double channels = double(c > 0 ? c : 1), mean = double(bits_as<float>(norm)) / channels;
    if (!(mean > 0)) return;
    // The power of two at or above the mean.
    const uint64_t bits = bits_as<uint64_t>(mean), exponent = bits >> 52;
    const double scale = bits_as<double>((exponent + uint64_t((bits << 12) != 0)) << 52);
    factor = float(1048576.0 / (channels * scale));
    unit = scale / 1048576.0;
  }
  VIDTOK_DEVICE int32_t units(float row_norm, float col_norm, float product) const {
    const float raw = (row_norm + col_norm - 2.0f * product) * factor;
    if (!(fabsf(raw) < infinity<float>())) return kClusterMost;
    return int32_t(smaller(larger(rintf(raw), 0.0f), float(kClusterMost)));
  }
};

VIDTOK_DEVICE int64_t cluster_pitch(int64_t n) { return (n + 3) / 4 * 4; }

// The last of [first, end) whose key is at most x; keys ascend.
template <class Key>
VIDTOK_DEVICE int64_t cluster_find(int64_t first, int64_t end, int64_t x, const Key& key) {
  while (end - first > 1) {
    const int64_t middle = (first + end) / 2;
    if (key(middle) <= x)
      first = middle;
    else
      end = middle;
  }
  return first;
}

// One warp: segments, waves, tiles. Where a list is bad nothing is clustered and the results are zeros.
__global__ void cluster_dpc_knn_plan_kernel(ClusterShape p, ClusterMemory m, const int32_t* cu, const int64_t* counts,
                                            int64_t num_counts, int64_t room, int waves, int tile, int64_t* center,
                                            int32_t* error) {
  bool bad = false;
  for (int64_t s = lane(); s < p.segments; s += kWarp) {
    const int64_t low = cu != nullptr ? cu[s] : 0, high = cu != nullptr ? cu[s + 1] : p.n;
    const int64_t count = counts[num_counts == 1 ? 0 : s];
    if (low < 0 || high < low || high > p.n || (s == 0 && low != 0) || (s == p.segments - 1 && high != p.n)) {
      report(error, Report::cluster_dpc_knn_cu_seqlens, high, low, p.n + 1);
      bad = true;
    } else if (count < 0 || count > high - low) {
      report(error, Report::cluster_dpc_knn_num_clusters, count, 0, high - low + 1);
      bad = true;
    }
  }
  bad = ballot(bad) != 0;
  if (lane() == 0)
    for (int w = 0; w <= waves; ++w) m.wave[w] = {w == 0 ? 0 : p.segments, 0};
  int wave = 0;
  int64_t distance = 0, tiles = 0, strips = 0, centers = 0;
  for (int64_t first = 0; first < p.segments; first += kWarp) {
    const int64_t s = first + lane();
    const bool here = s < p.segments && !bad;
    ClusterSegment mine{};
    if (here) {
      mine.begin = cu != nullptr ? cu[s] : 0;
      mine.n = int32_t(cu != nullptr ? cu[s + 1] - cu[s] : p.n);
      mine.clusters = int32_t(counts[num_counts == 1 ? 0 : s]);
    }
    // Without centres there is nothing to find.
    const int64_t n = mine.clusters > 0 ? mine.n : 0, side = (n + tile - 1) / tile;
    const int64_t need = n * cluster_pitch(n), my_tiles = side * (side + 1) / 2;
    const int64_t my_strips = (n + kStrip - 1) / kStrip;
    const int64_t upto = warp_scan(int64_t(mine.clusters));
    mine.center = centers + upto - mine.clusters;
    centers += shuffle(upto, kWarp - 1);
    const int64_t need_upto = warp_scan(need), tiles_upto = warp_scan(my_tiles);
    const int64_t all = shuffle(need_upto, kWarp - 1);
    if (wave < waves && distance + all <= room) {
      mine.wave = wave;
      mine.distance = distance + need_upto - need;
      mine.tiles = tiles + tiles_upto - my_tiles;
      mine.strips = strips;
      distance += all;
      tiles += shuffle(tiles_upto, kWarp - 1);
    } else {
      for (int j = 0; j < kWarp; ++j) {
        const int64_t its_need = shuffle(need, j), its_tiles = shuffle(my_tiles, j), its_strips = shuffle(my_strips, j);
        bool kept = wave < waves && its_need <= room;
        if (kept && distance + its_need > room) {
          if (lane() == 0) {
            m.wave[wave].tiles = tiles;
            m.wave[wave + 1].first = smaller(first + j, p.segments);
          }
          ++wave;
          distance = tiles = 0;
          kept = wave < waves;
        }
        if (lane() == j) {
          mine.wave = kept ? wave : kSwept;
          mine.distance = distance;
          mine.tiles = tiles;
          mine.strips = strips;
        }
        if (kept) {
          distance += its_need;
          tiles += its_tiles;
        } else {
          strips += its_strips;
        }
      }
    }
    if (s < p.segments) m.segment[s] = mine;
  }
  if (lane() == 0) {
    if (wave < waves) m.wave[wave].tiles = tiles;
    m.wave[waves].tiles = strips;
    if (!bad && centers != p.num_center)
      report(error, Report::cluster_dpc_knn_num_clusters, centers, p.num_center, p.num_center + 1);
  }
  for (int64_t i = (bad ? 0 : centers) + lane(); i < p.num_center; i += kWarp) center[i] = 0;
}

// A token's segment is found once; one lane calls this.
VIDTOK_DEVICE void cluster_note(const ClusterShape& p, const ClusterMemory& m, int64_t i, float norm,
                                int64_t* assignment) {
  const int64_t s = cluster_find(0, p.segments, i, [&](int64_t at) { return int64_t(m.segment[at].begin); });
  ClusterSegment& segment = m.segment[s];
  const bool inside = i - segment.begin < segment.n;
  m.norm[i] = norm;
  m.owner[i] = inside ? int32_t(s) : -1;
  if (!inside) assignment[i] = 0;
  if (inside && segment.clusters == 0) assignment[i] = -1;
  if (inside && norm < infinity<float>()) atomic_max(&segment.norm, bits_as<int32_t>(norm));
}

// Squared norms have the bits of a product of the row with itself, so that equal rows lie at distance 0.
template <class T>
__global__ void cluster_dpc_knn_norm_kernel(ClusterShape p, ClusterMemory m, const T* x, int stages, int64_t tile_bytes,
                                            int64_t* assignment) {
  VIDTOK_SMEM(shared);
  if constexpr (sizeof(T) == 4) {  // a warp per row, a step of the product per lane
    (void)shared, (void)stages, (void)tile_bytes;
    constexpr int kDepth = 32;
    const int64_t i = block() * warps() + warp();
    if (i >= p.n) return;
    float sum = 0;
    for (int64_t first = 0; first < p.c; first += kWarp * kDepth) {
      const int64_t begin = first + lane() * kDepth;
      const T* const row = x + i * p.x_stride + begin;
      float part = 0;
      for (int k = 0; k < kDepth; ++k)
        if (begin + k < p.c) part = fused(row[k], row[k], part);
      for (int l = 0; l < kWarp; ++l) sum += shuffle(part, l);
    }
    if (lane() == 0) cluster_note(p, m, i, sum, assignment);
  } else {
    constexpr int kTile = 32;
    unsigned char* const memory = shared.take<unsigned char>(tile_bytes);
    float* const diagonal = shared.take<float>(kTile);
    GramTile<T, kTile, kTile, 4> tile(memory, stages);
    const int64_t first = block() * kTile;
    const GramRows<T> rows{x + first * p.x_stride, p.x_stride, p.n - first};
    tile.multiply(rows, rows, p.c, true);
    tile.for_each([&](int row, int col, float& sum) {
      if (row == col) diagonal[row] = sum;
    });
    block_sync();
    if (thread() < kTile && first + thread() < p.n)
      cluster_note(p, m, first + thread(), diagonal[thread()], assignment);
  }
}

}  // namespace vidtok::cuda
