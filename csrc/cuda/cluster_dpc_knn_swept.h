// cluster_dpc_knn on segments whose distances the workspace has no room for.
#pragma once

#include "cuda/cluster_dpc_knn_kept.h"

namespace vidtok::cuda {

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
  template <class F>
  VIDTOK_DEVICE void each_row(const F& f) const {
    for (int r = warp(); r < rows; r += kStripWarps) f(r);
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
      each_row([&](int r) {
        const int32_t* const mine = unit_ + r * kStripPitch + lane();
        row(r, j0 + lane(), mine[0], mine[kWarp]);
      });
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
    const auto finish = [&](int r, int64_t total) {
      if (lane() == 0) m.density[s.begin + strip.first + r] = cluster_density(total, k, unit);
    };
    if (k <= kWarp) {
      strip.each_row([&](int r) { table[r * kWarp + lane()] = kFarthest; });
      strip.sweep(nullptr, s.n, [&](int r, int64_t, int32_t a, int32_t b) {
        SmallestList list(table[r * kWarp + lane()]);
        list.offer(a, k);
        list.offer(b, k);
        table[r * kWarp + lane()] = list.held();
      });
      strip.each_row([&](int r) { finish(r, SmallestList(table[r * kWarp + lane()]).sum(k)); });
      continue;
    }
    strip.each_row([&](int r) {
      if (lane() == 0) prefix[r] = 0, left[r] = k, sum[r] = 0;
    });
    for (int shift = 17, bits = 6; bits > 0; bits = smaller(6, shift), shift -= bits) {
      strip.each_row([&](int r) {
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
      strip.each_row([&](int r) {
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
    strip.each_row([&](int r) { finish(r, sum[r] + int64_t(left[r]) * prefix[r]); });
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
    strip.each_row([&](int r) { table[r * kWarp + lane()] = ClusterHigher(); });
    strip.sweep(nullptr, s->n, [&](int r, int64_t j, int32_t a, int32_t b) {
      const int64_t i = strip.first + r;
      ClusterHigher higher = table[r * kWarp + lane()];
      if (a != kFarthest) higher.see(a, density[i], density[j], j < i);
      if (b != kFarthest) higher.see(b, density[i], density[j + kWarp], j + kWarp < i);
      table[r * kWarp + lane()] = higher;
    });
    strip.each_row([&](int r) { table[r * kWarp + lane()].note(p, m, *s, s->begin + strip.first + r); });
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
    strip.each_row([&](int r) { table[r * kWarp + lane()] = ~uint64_t(0); });
    const int64_t count = larger(smaller(int64_t(s.clusters), p.num_center - s.center), int64_t(0));
    strip.sweep(list, count, [&](int r, int64_t j, int32_t a, int32_t b) {
      uint64_t& best = table[r * kWarp + lane()];
      if (a != kFarthest) best = smaller(best, cluster_nearness(a, list[j]));
      if (b != kFarthest) best = smaller(best, cluster_nearness(b, list[j + kWarp]));
    });
    strip.each_row([&](int r) {
      const uint64_t best = warp_reduce(table[r * kWarp + lane()], Min());
      const int64_t i = s.begin + strip.first + r;
      const int32_t own = m.rank[i];
      if (lane() == 0 && count > 0) assignment[i] = own < s.clusters ? own : m.rank[s.begin + int64_t(uint32_t(best))];
    });
  }
}

}  // namespace vidtok::cuda
