// Density peaks per segment. Distances of a segment are products of tiles at or above the diagonal, rounded to whole
// units and kept, both halves, in the workspace; then a warp per token finds its density, its nearest denser token, its
// rank by rho * delta and its centre. Segments are dealt to waves that fill the workspace one after another; a segment
// that no wave has room for is swept: its distances are made anew, strip by strip, for every pass over them.
// No launch depends on offsets or counts: the plan kernel turns them into lists that the others read.
#include "cuda/tile/gram.h"
#include "cuda/tile/nearest.h"
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
    tile.multiply(GramRows<T>{x + first * p.x_stride, p.x_stride, p.n - first}, p.c);
    tile.for_each([&](int row, int col, float& sum) {
      if (row == col) diagonal[row] = sum;
    });
    block_sync();
    if (thread() < kTile && first + thread() < p.n)
      cluster_note(p, m, first + thread(), diagonal[thread()], assignment);
  }
}

// Distances of a wave's segments; blocks walk over the tiles of all of them.
template <class T, int TILE, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp, TILE == 32    ? 5
                                                : TILE == 128 ? 1
                                                : WARPS == 4  ? 3
                                                              : 2)
    cluster_dpc_knn_gram_kernel(ClusterShape p, ClusterMemory m, const T* x, int wave, int stages, int64_t tile_bytes) {
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
    const GramRows<T> a{rows + i0 * p.x_stride, p.x_stride, s.n - i0}, b{rows + j0 * p.x_stride, p.x_stride, s.n - j0};
    GramTile<T, TILE, TILE, WARPS> tile(memory, stages);
    if (i0 == j0)
      tile.multiply(a, p.c);
    else
      tile.multiply(a, b, p.c);
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

// A strip of a swept segment: kStrip tokens against all others, a square of units in shared memory at a time. A warp
// owns every fourth row.
template <class T>
class ClusterStrip {
 public:
  VIDTOK_DEVICE ClusterStrip(const ClusterShape& p, const ClusterMemory& m, const T* x, Carver& shared, int stages,
                             int64_t tile_bytes)
      : p_(p), m_(m), x_(x), stages_(stages) {
    memory_ = shared.take<unsigned char>(tile_bytes);
    unit_ = shared.take<int32_t>(kStrip * kStripPitch);
  }
  VIDTOK_DEVICE void move_to(int64_t strip) {
    segment = m_.segment + cluster_find(0, p_.segments, strip, [&](int64_t i) { return m_.segment[i].strips; });
    first = (strip - segment->strips) * kStrip;
    rows = int(smaller(int64_t(kStrip), segment->n - first));
  }
  // row(r, j, units, units of j + 32): for this warp's rows, every lane's columns; kFarthest beyond the last. Against
  // the tokens of the list, or against all.
  template <class Row>
  VIDTOK_DEVICE void sweep(const int32_t* list, int64_t count, const Row& row) {
    const ClusterSegment s = *segment;
    const ClusterScale scale(s.norm, p_.c);
    const T* const x = x_ + int64_t(s.begin) * p_.x_stride;
    const float* const norm = m_.norm + s.begin;
    for (int64_t j0 = 0; j0 < count; j0 += kStrip) {
      GramTile<T, kStrip, kStrip, kStripWarps> tile(memory_, stages_);
      tile.multiply(GramRows<T>{x + first * p_.x_stride, p_.x_stride, rows},
                    GramRows<T>{list != nullptr ? x : x + j0 * p_.x_stride, p_.x_stride, count - j0,
                                list != nullptr ? list + j0 : nullptr},
                    p_.c);
      tile.for_each([&](int r, int col, float& product) {
        const int64_t i = first + r;
        int32_t units = kFarthest;
        if (r < rows && j0 + col < count) {
          const int64_t j = list != nullptr ? list[j0 + col] : j0 + col;
          units = i == j ? 0 : scale.units(norm[i], norm[j], product);
        }
        unit_[r * kStripPitch + col] = units;
      });
      block_sync();
      for (int r = warp(); r < rows; r += kStripWarps) {
        const int32_t* const mine = unit_ + r * kStripPitch + lane();
        row(r, j0 + lane(), mine[0], mine[kWarp]);
      }
    }
    block_sync();
  }

  ClusterSegment* segment = nullptr;
  int64_t first = 0;
  int rows = 0;

 private:
  const ClusterShape& p_;
  const ClusterMemory& m_;
  const T* x_;
  unsigned char* memory_;
  int32_t* unit_;
  int stages_;
};

constexpr int kClusterBins = 64;

// Up to 32 neighbours come from lists; more from counting digits of 6, 6, 6 and 5 bits, a sweep for each.
template <class T>
__global__ void __launch_bounds__(kStripWarps* kWarp, 2)
    cluster_dpc_knn_density_swept_kernel(ClusterShape p, ClusterMemory m, const T* x, int waves, int stages,
                                         int64_t tile_bytes) {
  VIDTOK_SMEM(shared);
  ClusterStrip<T> strip(p, m, x, shared, stages, tile_bytes);
  int32_t* const table = shared.take<int32_t>(kStrip * kClusterBins);
  int32_t* const prefix = shared.take<int32_t>(kStrip);
  int32_t* const left = shared.take<int32_t>(kStrip);
  int64_t* const sum = shared.take<int64_t>(kStrip);
  for (int64_t t = block(); t < m.wave[waves].tiles; t += blocks()) {
    strip.move_to(t);
    const ClusterSegment s = *strip.segment;
    const int32_t k = int32_t(smaller(p.k, int64_t(s.n)));
    const double unit = ClusterScale(s.norm, p.c).unit;
    const auto each_row = [&](const auto& f) {
      for (int r = warp(); r < strip.rows; r += kStripWarps) f(r);
    };
    const auto finish = [&](int r, int64_t total) {
      if (lane() == 0) m.density[s.begin + strip.first + r] = cluster_density(total, k, unit);
    };
    if (k <= kWarp) {
      each_row([&](int r) { table[r * kWarp + lane()] = kFarthest; });
      strip.sweep(nullptr, s.n, [&](int r, int64_t, int32_t a, int32_t b) {
        SmallestList list(table[r * kWarp + lane()]);
        list.offer(a, k);
        list.offer(b, k);
        table[r * kWarp + lane()] = list.held();
      });
      each_row([&](int r) { finish(r, SmallestList(table[r * kWarp + lane()]).sum(k)); });
      continue;
    }
    each_row([&](int r) {
      if (lane() == 0) prefix[r] = 0, left[r] = k, sum[r] = 0;
    });
    for (int shift = 17, bits = 6; bits > 0; bits = smaller(6, shift), shift -= bits) {
      each_row([&](int r) {
        table[r * kClusterBins + lane()] = table[r * kClusterBins + kWarp + lane()] = 0;
        warp_sync();
      });
      strip.sweep(nullptr, s.n, [&](int r, int64_t, int32_t a, int32_t b) {
        const int32_t mine = prefix[r];
        int64_t below = 0;
        for (int side = 0; side < 2; ++side) {
          const int32_t u = side == 0 ? a : b;
          if (u == kFarthest) continue;
          const int32_t digit = u >> shift;
          if (digit >> bits == mine) atomic_add(table + r * kClusterBins + (digit & ((1 << bits) - 1)), 1);
          if (shift == 0 && digit >> bits < mine) below += u;
        }
        if (shift == 0) {
          below = warp_sum(below);
          if (lane() == 0) sum[r] += below;
        }
      });
      each_row([&](int r) {
        warp_sync();
        if (lane() == 0) {
          int32_t* const count = table + r * kClusterBins;
          int32_t digit = 0;
          for (; count[digit] < left[r]; ++digit) {
            left[r] -= count[digit];
            if (shift == 0) sum[r] += int64_t(count[digit]) * (prefix[r] << bits | digit);
          }
          prefix[r] = prefix[r] << bits | digit;
        }
        warp_sync();
      });
    }
    each_row([&](int r) { finish(r, sum[r] + int64_t(left[r]) * prefix[r]); });
    block_sync();
  }
}

template <class T>
__global__ void __launch_bounds__(kStripWarps* kWarp, 2)
    cluster_dpc_knn_higher_swept_kernel(ClusterShape p, ClusterMemory m, const T* x, int waves, int stages,
                                        int64_t tile_bytes) {
  VIDTOK_SMEM(shared);
  ClusterStrip<T> strip(p, m, x, shared, stages, tile_bytes);
  ClusterHigher* const table = shared.take<ClusterHigher>(kStrip * kWarp);
  for (int64_t t = block(); t < m.wave[waves].tiles; t += blocks()) {
    strip.move_to(t);
    ClusterSegment* const s = strip.segment;
    const int32_t* const density = m.density + s->begin;
    for (int r = warp(); r < strip.rows; r += kStripWarps) table[r * kWarp + lane()] = ClusterHigher();
    strip.sweep(nullptr, s->n, [&](int r, int64_t j, int32_t a, int32_t b) {
      const int64_t i = strip.first + r;
      ClusterHigher higher = table[r * kWarp + lane()];
      if (a != kFarthest) higher.see(a, density[i], density[j], j < i);
      if (b != kFarthest) higher.see(b, density[i], density[j + kWarp], j + kWarp < i);
      table[r * kWarp + lane()] = higher;
    });
    for (int r = warp(); r < strip.rows; r += kStripWarps)
      table[r * kWarp + lane()].note(p, m, *s, s->begin + strip.first + r);
  }
}

template <class T>
__global__ void __launch_bounds__(kStripWarps* kWarp, 2)
    cluster_dpc_knn_assign_swept_kernel(ClusterShape p, ClusterMemory m, const T* x, int waves, int stages,
                                        int64_t tile_bytes, int64_t* assignment) {
  VIDTOK_SMEM(shared);
  ClusterStrip<T> strip(p, m, x, shared, stages, tile_bytes);
  uint64_t* const table = shared.take<uint64_t>(kStrip * kWarp);
  for (int64_t t = block(); t < m.wave[waves].tiles; t += blocks()) {
    strip.move_to(t);
    const ClusterSegment s = *strip.segment;
    const int32_t* const list = m.center + s.center;
    for (int r = warp(); r < strip.rows; r += kStripWarps) table[r * kWarp + lane()] = ~uint64_t(0);
    const int64_t count = larger(smaller(int64_t(s.clusters), p.num_center - s.center), int64_t(0));
    strip.sweep(list, count, [&](int r, int64_t j, int32_t a, int32_t b) {
      uint64_t& best = table[r * kWarp + lane()];
      if (a != kFarthest) best = smaller(best, cluster_nearness(a, list[j]));
      if (b != kFarthest) best = smaller(best, cluster_nearness(b, list[j + kWarp]));
    });
    for (int r = warp(); r < strip.rows; r += kStripWarps) {
      const uint64_t best = warp_reduce(table[r * kWarp + lane()], Min());
      const int64_t i = s.begin + strip.first + r;
      const int32_t own = m.rank[i];
      if (lane() == 0 && count > 0) assignment[i] = own < s.clusters ? own : m.rank[s.begin + int64_t(uint32_t(best))];
    }
  }
}

}  // namespace vidtok::cuda

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
  int tile() const { return choice.tile <= 32 ? 32 : choice.tile >= 128 ? 128 : 64; }

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
