// Frames nearest a contour of equal Mahalanobis distance. Sums run in double: the projection over cuts of the channels
// that are added in order, everything else in the order of the frames or by a block of fixed size.
#include "cuda/tile/block.h"
#include "cuda/tile/radix.h"

namespace vidtok::cuda {

struct ContourSequence {
  int64_t begin, frames, rank, num, out;
  const double* basis;  // [c, rank] with columns padded to a multiple of 8
  int64_t tiles;
};

// What the kernels hand on, in memory of the caller. Rows of z hold the projection, then ‖x‖² and x · query.
struct ContourScratch {
  double* z;         // [cuts, n, pitch]; the first cut becomes the sum
  double* weight;    // [n]; NaN of a frame that is not finite
  double* distance;  // [n]
  double* mean;      // [sequences, rank]
  double* energy;    // [sequences, rank]: Σ w z² of each column
  double* spread;    // [sequences, rank, rank]: covariance, then its Cholesky factor, column after column
  double* inverse;   // [sequences, rank]: 1/diagonal of the factor; the first is 0 where frames are equal
  int32_t* frame;    // [n] candidates of the rule contour+fps
  int32_t* gap;      // [n] their distance in time to the nearest chosen
  int64_t cuts, pitch, rank;
};

constexpr double kTemperature = 0.1, kShrinkage = 0.1;
// Less variance than this share of the mean square is rounding: frames are equal.
constexpr double kLeastSpread = 1.0 / (1ull << 40) / (1ull << 40);

constexpr int kProjectRows = 16, kProjectColumns = 64, kProjectDepth = 32, kProjectThreads = 256;
constexpr int kProjectCut = 256;  // channels of one partial sum
constexpr int kCovarianceTile = 16, kCovarianceDepth = 32;
constexpr int kPlainThreads = 256;

VIDTOK_DEVICE bool is_finite(double x) { return fabs(x) < infinity<double>(); }
VIDTOK_DEVICE double not_a_number() { return bits_as<double>(uint64_t(0x7ff8) << 48); }

VIDTOK_DEVICE double inverse_norm(double square) {
  if (square == 0.0) return 0.0;
  return is_finite(square) ? 1.0 / sqrt(square) : not_a_number();
}

// To 16 significant bits, ties to even; infinities and NaN stay.
VIDTOK_DEVICE double round_bits(double x) {
  constexpr int kDropped = 37;
  if (!is_finite(x)) return x;
  const uint64_t u = bits_as<uint64_t>(x), half = (uint64_t(1) << (kDropped - 1)) - 1;
  return bits_as<double>((u + half + (u >> kDropped & 1)) >> kDropped << kDropped);
}

// The last sequence whose field is at or before `at`; those without frames share it with the next.
template <int64_t ContourSequence::* FIELD>
VIDTOK_DEVICE int64_t sequence_of(const ContourSequence* list, int64_t sequences, int64_t at) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (list[middle].*FIELD <= at ? low : high) = middle;
  }
  return low;
}

// Partial sums of x · basis, ‖x‖² and x · query over one cut of the channels: 16 frames by 64 columns.
template <class T>
__global__ void __launch_bounds__(kProjectThreads)
    contour_project_kernel(const T* x, const T* query, const ContourSequence* list, int64_t sequences, int64_t n,
                           int64_t c, int64_t x_stride, int64_t column_tiles, ContourScratch to) {
  constexpr int kSide = 16, kEach = kProjectColumns / kSide, kPitch = kProjectDepth + 1;
  VIDTOK_SMEM(shared);
  double* const rows = shared.take<double>(kProjectRows * kPitch);
  double* const columns = shared.take<double>(kProjectDepth * kProjectColumns);
  const int64_t column_tile = block() % column_tiles, cut = block() / column_tiles % to.cuts;
  const int64_t tile = block() / column_tiles / to.cuts;
  const int64_t s = sequence_of<&ContourSequence::tiles>(list, sequences, tile);
  const ContourSequence own = list[s];
  const int64_t skipped = (tile - own.tiles) * kProjectRows, first = own.begin + skipped;
  const int64_t held = smaller<int64_t>(kProjectRows, own.frames - skipped);
  const int64_t column = column_tile * kProjectColumns, wide = own.rank - column;
  const int64_t padded = (own.rank + 7) / 8 * 8, stop = smaller(c, (cut + 1) * kProjectCut);
  const int row = thread() / kSide, lane_of_row = thread() % kSide;
  const bool moments = column_tile == 0;
  if (!moments && wide <= 0) return;  // the whole block
  double sum[kEach] = {}, square = 0.0, dot = 0.0;
  for (int64_t k = cut * kProjectCut; k < stop; k += kProjectDepth) {
    block_sync();
    VIDTOK_UNROLL
    for (int i = 0; i < kProjectDepth / kSide; ++i) {
      const int64_t at = k + i * kSide + lane_of_row;
      const bool valid = row < held && at < stop;
      const double value = valid ? double(to_float(x[(first + row) * x_stride + at])) : 0.0;
      rows[row * kPitch + i * kSide + lane_of_row] = value;
      square = fused(value, value, square);
      if (query != nullptr && valid) dot = fused(value, double(to_float(query[s * c + at])), dot);
    }
    VIDTOK_UNROLL
    for (int i = 0; i < kProjectDepth * kProjectColumns / kProjectThreads; ++i) {
      const int place = i * kProjectThreads + thread(), depth = place / kProjectColumns, j = place % kProjectColumns;
      columns[place] = k + depth < stop && j < wide ? own.basis[(k + depth) * padded + column + j] : 0.0;
    }
    block_sync();
    for (int d = 0; d < kProjectDepth; ++d) {
      const double value = rows[row * kPitch + d];
      VIDTOK_UNROLL
      for (int q = 0; q < kEach; ++q)
        sum[q] = fused(value, columns[d * kProjectColumns + lane_of_row * kEach + q], sum[q]);
    }
  }
  square = warp_sum<kSide>(square);
  dot = warp_sum<kSide>(dot);
  if (row >= held) return;
  double* const z = to.z + (cut * n + first + row) * to.pitch;
  VIDTOK_UNROLL
  for (int q = 0; q < kEach; ++q)
    if (lane_of_row * kEach + q < wide) z[column + lane_of_row * kEach + q] = sum[q];
  if (moments && lane_of_row == 0) {
    z[to.rank] = square;
    z[to.rank + 1] = dot;
  }
}

// Adds the cuts, in order.
__global__ void contour_combine_kernel(int64_t n, ContourScratch to) {
  const int64_t size = n * to.pitch, i = block() * threads() + thread();
  if (i >= size) return;
  double sum = to.z[i];
  for (int64_t cut = 1; cut < to.cuts; ++cut) sum += to.z[cut * size + i];
  to.z[i] = sum;
}

// softmax(cos(x, query)/0.1), or uniform, over the finite frames of one sequence.
template <class T>
__global__ void contour_weigh_kernel(const T* query, const ContourSequence* list, int64_t c, ContourScratch to) {
  VIDTOK_SMEM(shared);
  double* const scratch = shared.take<double>(kWarp);
  const ContourSequence own = list[block()];
  const double* const z = to.z + own.begin * to.pitch + to.rank;
  double* const weight = to.weight + own.begin;
  double scale = 0.0;
  if (query != nullptr) {
    double square = 0.0;
    for (int64_t k = thread(); k < c; k += threads()) {
      const double q = double(to_float(query[block() * c + k]));
      square = fused(q, q, square);
    }
    scale = inverse_norm(block_sum(square, scratch));
  }
  double largest = -infinity<double>();
  for (int64_t t = thread(); t < own.frames; t += threads()) {
    const double square = z[t * to.pitch];
    if (!is_finite(square)) continue;
    const double logit = query != nullptr ? z[t * to.pitch + 1] * inverse_norm(square) * scale / kTemperature : 0.0;
    weight[t] = logit;
    largest = larger(largest, logit);
  }
  largest = block_max(largest, scratch);
  double sum = 0.0;
  for (int64_t t = thread(); t < own.frames; t += threads()) {
    if (!is_finite(z[t * to.pitch])) continue;
    weight[t] = exp(weight[t] - largest);
    sum += weight[t];
  }
  sum = block_sum(sum, scratch);
  for (int64_t t = thread(); t < own.frames; t += threads()) {
    const double w = is_finite(z[t * to.pitch]) ? weight[t] : 0.0;
    weight[t] = w != 0.0 ? w / sum : 0.0;
  }
}

// Mean and mean square of 32 columns of a sequence; a frame that is not finite becomes 0. One warp takes every
// warps()-th frame.
__global__ void __launch_bounds__(1024)
    contour_mean_kernel(const ContourSequence* list, int64_t column_tiles, ContourScratch to) {
  VIDTOK_SMEM(shared);
  double* const sums = shared.take<double>(2 * threads());
  const int64_t s = block() / column_tiles, column = block() % column_tiles * kWarp + lane();
  const ContourSequence own = list[s];
  double sum = 0.0, square = 0.0;
  if (column < own.rank) {
    for (int64_t t = warp(); t < own.frames; t += warps()) {
      double* const z = to.z + (own.begin + t) * to.pitch;
      const double value = is_finite(z[to.rank]) ? z[column] : 0.0, weighted = to.weight[own.begin + t] * value;
      z[column] = value;
      sum += weighted;
      square = fused(weighted, value, square);
    }
  }
  sums[thread()] = sum;
  sums[threads() + thread()] = square;
  block_sync();
  if (warp() == 0 && column < own.rank) {
    for (int w = 1; w < warps(); ++w) {
      sum += sums[w * kWarp + lane()];
      square += sums[threads() + w * kWarp + lane()];
    }
    to.mean[s * to.rank + column] = sum;
    to.energy[s * to.rank + column] = square;
  }
}

// 16 by 16 of the weighted covariance, on and below the diagonal; one thread per entry, frame after frame.
__global__ void __launch_bounds__(kCovarianceTile* kCovarianceTile)
    contour_covariance_kernel(const ContourSequence* list, int64_t side, ContourScratch to) {
  constexpr int kTile = kCovarianceTile, kDepth = kCovarianceDepth;
  VIDTOK_SMEM(shared);
  double* const left = shared.take<double>(kDepth * kTile);
  double* const right = shared.take<double>(kDepth * kTile);
  const int64_t s = block() / (side * side), i0 = block() / side % side * kTile, j0 = block() % side * kTile;
  const ContourSequence own = list[s];
  if (j0 > i0 || i0 >= own.rank) return;  // the whole block
  const double* const mean = to.mean + s * to.rank;
  const int row = thread() / kTile, place = thread() % kTile;
  const int64_t i = i0 + place, j = j0 + place;
  double sum = 0.0;
  for (int64_t first = 0; first < own.frames; first += kDepth) {
    block_sync();
    VIDTOK_UNROLL
    for (int half = 0; half < kDepth / kTile; ++half) {
      const int64_t t = first + half * kTile + row;
      const double* const z = to.z + (own.begin + t) * to.pitch;
      const bool valid = t < own.frames;
      const int at = (half * kTile + row) * kTile + place;
      left[at] = valid && i < own.rank ? (z[i] - mean[i]) * to.weight[own.begin + t] : 0.0;
      right[at] = valid && j < own.rank ? z[j] - mean[j] : 0.0;
    }
    block_sync();
    for (int t = 0; t < kDepth; ++t) sum = fused(left[t * kTile + row], right[t * kTile + place], sum);
  }
  // Column j0 + place, row i0 + row.
  if (i0 + row < own.rank && j < own.rank) to.spread[(s * to.rank + j) * to.rank + i0 + row] = sum;
}

// Shrinks the covariance of a sequence and factors it, column after column.
__global__ void __launch_bounds__(1024)
    contour_factor_kernel(const ContourSequence* list, bool in_shared, ContourScratch to) {
  VIDTOK_SMEM(shared);
  double* const scratch = shared.take<double>(kWarp);
  double* const own_copy = shared.take<double>(in_shared ? to.rank * to.rank : 0);
  const int64_t s = block(), r = list[s].rank, pitch = to.rank;
  double* const spread = to.spread + s * pitch * pitch;
  double* const inverse = to.inverse + s * pitch;
  double* const a = in_shared ? own_copy : spread;
  double trace = 0.0, energy = 0.0;
  for (int64_t j = thread(); j < r; j += threads()) {
    trace += spread[j * pitch + j];
    energy += to.energy[s * pitch + j];
  }
  trace = block_sum(trace, scratch);
  energy = block_sum(energy, scratch);
  const bool spreads = trace > kLeastSpread * energy;
  const double ridge = kShrinkage * trace / double(r);
  block_sync();
  for (int64_t j = warp(); j < r; j += warps())
    for (int64_t i = j + lane(); i < r; i += kWarp)
      a[j * pitch + i] = (1.0 - kShrinkage) * spread[j * pitch + i] + (i == j ? ridge : 0.0);
  if (!spreads) {
    if (thread() == 0 && r > 0) inverse[0] = 0.0;
    return;  // the whole block
  }
  for (int64_t j = 0; j < r; ++j) {
    block_sync();
    const double diagonal = sqrt(a[j * pitch + j]);
    for (int64_t i = j + 1 + thread(); i < r; i += threads()) a[j * pitch + i] = a[j * pitch + i] / diagonal;
    if (thread() == 0) inverse[j] = 1.0 / diagonal;
    block_sync();
    for (int64_t k = j + 1 + warp(); k < r; k += warps()) {
      const double factor = a[j * pitch + k];
      for (int64_t i = k + lane(); i < r; i += kWarp)
        a[k * pitch + i] = fused(-factor, a[j * pitch + i], a[k * pitch + i]);
    }
  }
  block_sync();
  if (in_shared)
    for (int64_t j = warp(); j < r; j += warps())
      for (int64_t i = j + 1 + lane(); i < r; i += kWarp) spread[j * pitch + i] = a[j * pitch + i];
}

// Squared Mahalanobis distance of a frame per warp: ‖L⁻¹(z − mean)‖² by substitution, rounded to 16 bits.
__global__ void contour_distance_kernel(const ContourSequence* list, int64_t sequences, int64_t n, float* distance,
                                        ContourScratch to) {
  VIDTOK_SMEM(shared);
  double* const rest = shared.take<double>(warps() * to.rank) + warp() * to.rank;
  const int64_t t = block() * warps() + warp();
  if (t >= n) return;  // the whole warp
  const int64_t s = sequence_of<&ContourSequence::begin>(list, sequences, t), r = list[s].rank;
  const double* const z = to.z + t * to.pitch;
  const double* const mean = to.mean + s * to.rank;
  const double* const inverse = to.inverse + s * to.rank;
  const double* const factor = to.spread + s * to.rank * to.rank;
  double sum = 0.0;
  if (r > 0 && inverse[0] != 0.0) {
    for (int64_t i = lane(); i < r; i += kWarp) rest[i] = z[i] - mean[i];
    for (int64_t j = 0; j < r; ++j) {
      warp_sync();
      const double y = rest[j] * inverse[j];
      sum = fused(y, y, sum);
      for (int64_t i = j + 1 + lane(); i < r; i += kWarp) rest[i] = fused(-factor[j * to.rank + i], y, rest[i]);
    }
  }
  if (lane() == 0) {
    const double rounded = is_finite(z[to.rank]) ? round_bits(sum) : not_a_number();
    to.distance[t] = rounded;
    distance[t] = float(rounded);
  }
}

// The value at place (known − 1)/2 of the ascending distances, 0 without any.
VIDTOK_DEVICE double lower_median(const double* distance, int64_t frames, int32_t* radix, uint64_t* scratch) {
  uint64_t known = 0;
  for (int64_t t = thread(); t < frames; t += threads()) known += distance[t] == distance[t];
  known = block_sum(known, scratch);
  if (known == 0) return 0.0;
  const auto keys = [&](int64_t t, int) { return order_key(distance[t]); };
  const auto cut = radix_cut<double>(keys, frames, int64_t(known - (known - 1) / 2), radix);
  uint64_t least = ~uint64_t(0);
  for (int64_t t = thread(); t < frames; t += threads()) {
    const uint64_t key = order_key(distance[t]);
    if (key >> cut.shift >= cut.prefix) least = smaller(least, key);
  }
  least = block_reduce(least, Min(), scratch);
  return bits_as<double>(least & ~(uint64_t(1) << 63));  // distances are not negative
}

// The frames of one sequence by a rule; keys(t) ascend with the closeness to the contour.
__global__ void __launch_bounds__(1024)
    contour_pick_kernel(const ContourSequence* list, int rule, int64_t* index, ContourScratch to) {
  VIDTOK_SMEM(shared);
  int32_t* const radix = shared.take<int32_t>(kRadixScratch<double>);
  uint64_t* const scratch = shared.take<uint64_t>(kWarp);
  const ContourSequence own = list[block()];
  const double* const distance = to.distance + own.begin;
  const int64_t frames = own.frames, num = own.num;
  int64_t* const out = index + own.out;
  const double contour = lower_median(distance, frames, radix, scratch);
  const auto keys = [&](int64_t t, int) { return order_key(-fabs(distance[t] - contour)); };
  if (num == 0) return;  // the whole block
  if (rule == 0) {       // stratified: a warp per segment of time
    for (int64_t part = warp(); part < num; part += warps()) {
      const int64_t begin = part * frames / num, end = (part + 1) * frames / num;
      uint64_t best = 0;
      int64_t at = begin + lane() < end ? begin + lane() : begin;
      for (int64_t t = begin + lane(); t < end; t += kWarp) {
        const uint64_t key = keys(t, 0);
        if (key > best) best = key, at = t;
      }
      VIDTOK_UNROLL
      for (int with = kWarp / 2; with > 0; with /= 2) {
        const uint64_t other = shuffle_xor(best, with);
        const int64_t other_at = shuffle_xor(at, with);
        if (other > best || (other == best && other_at < at)) best = other, at = other_at;
      }
      if (lane() == 0) out[part] = own.begin + at;
    }
    return;
  }
  if (rule == 1) {  // contour: the nearest
    radix_select<double>(keys, frames, num, radix, [&](int64_t place, int64_t t, int) { out[place] = own.begin + t; });
    return;
  }
  // contour+fps: from the nearest on, spread in time among twice as many.
  int32_t *const frame = to.frame + own.begin, *const gap = to.gap + own.begin;
  const int64_t candidates = smaller(2 * num, frames);
  radix_select<double>(keys, frames, candidates, radix,
                       [&](int64_t place, int64_t t, int) { frame[place] = int32_t(t); });
  uint64_t nearest = 0;
  for (int64_t i = thread(); i < candidates; i += threads()) nearest = larger(nearest, keys(frame[i], 0));
  nearest = block_max(nearest, scratch);
  int64_t first = candidates;
  for (int64_t i = thread(); i < candidates; i += threads()) {
    gap[i] = 0x7fffffff;
    if (i < first && keys(frame[i], 0) == nearest) first = i;
  }
  first = int64_t(block_reduce(uint64_t(first), Min(), scratch));
  for (int64_t chosen = 0;; ++chosen) {
    const int32_t last = frame[first];
    uint64_t best = 0;
    for (int64_t i = thread(); i < candidates; i += threads()) {
      const int32_t away = frame[i] < last ? last - frame[i] : frame[i] - last;
      gap[i] = smaller(gap[i], away);
      best = larger(best, order_pair(uint32_t(gap[i]), uint32_t(i)));
    }
    if (chosen + 1 == num) break;
    first = pair_index(block_max(best, scratch));
  }
  // The chosen have no gap to themselves.
  int64_t before = 0;
  for (int64_t i0 = 0; i0 < candidates; i0 += threads()) {
    const int64_t i = i0 + thread();
    const int32_t mine = i < candidates && gap[i] == 0;
    int32_t total = 0;
    const int32_t place = block_scan(mine, radix, &total);
    if (mine != 0) out[before + place] = own.begin + frame[i];
    before += total;
  }
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include "cuda/contour_select.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

static_assert(kContourRows == kProjectRows, "callers count the row tiles");
static_assert(sizeof(ContourSequence) == 7 * sizeof(int64_t), "callers lay the list out");

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces of a that hold at most b, at least one.
int64_t pieces_of(int64_t a, int64_t b) { return a > b ? ceil_div(a, b) : 1; }

ContourScratch scratch_of(const ContourArgs& a, unsigned char* base, int64_t* bytes) {
  ContourScratch to{};
  *bytes = 0;
  const auto take = [&](int64_t count) {
    unsigned char* const at = base + *bytes;
    *bytes += carved<double>(count);
    return reinterpret_cast<double*>(at);
  };
  to.rank = a.rank;
  to.pitch = a.rank + 2;
  to.cuts = pieces_of(a.c, kProjectCut);
  to.z = take(to.cuts * a.n * to.pitch);
  to.weight = take(a.n);
  to.distance = take(a.n);
  to.mean = take(a.sequences * a.rank);
  to.energy = take(a.sequences * a.rank);
  to.spread = take(a.sequences * a.rank * a.rank);
  to.inverse = take(a.sequences * a.rank);
  to.frame = reinterpret_cast<int32_t*>(take(ceil_div(a.n, 2)));
  to.gap = reinterpret_cast<int32_t*>(take(ceil_div(a.n, 2)));
  return to;
}

template <class T>
Status project(const ContourArgs& a, const ContourSequence* list, const ContourScratch& to, int threads,
               const Launch& on) {
  const int64_t column_tiles = pieces_of(a.rank, kProjectColumns);
  const int64_t shared =
      carved<double>(kProjectRows * (kProjectDepth + 1)) + carved<double>(kProjectDepth * kProjectColumns);
  const T* const query = static_cast<const T*>(a.query);
  Status status =
      VIDTOK_LAUNCH(contour_project_kernel<T>, a.tiles * to.cuts * column_tiles, kProjectThreads, shared, on,
                    static_cast<const T*>(a.x), query, list, a.sequences, a.n, a.c, a.x_stride, column_tiles, to);
  if (status == Status::ok && to.cuts > 1)
    status =
        VIDTOK_LAUNCH(contour_combine_kernel, ceil_div(a.n * to.pitch, kPlainThreads), kPlainThreads, 0, on, a.n, to);
  if (status == Status::ok && a.rank > 0)
    status =
        VIDTOK_LAUNCH(contour_weigh_kernel<T>, a.sequences, threads, carved<double>(kWarp), on, query, list, a.c, to);
  return status;
}

}  // namespace

int64_t contour_select_workspace(const ContourArgs& a) {
  int64_t bytes = 0;
  scratch_of(a, nullptr, &bytes);
  return bytes;
}

Status contour_select(const ContourArgs& a, void* workspace, const ContourSelectChoice& choice, const Launch& on) {
  if (a.n == 0) return Status::ok;
  int64_t bytes = 0;
  const ContourScratch to = scratch_of(a, static_cast<unsigned char*>(workspace), &bytes);
  const ContourSequence* const list = reinterpret_cast<const ContourSequence*>(a.list);
  const int threads = choice.threads;
  Status status = Status::ok;
  switch (a.dtype) {
    case DType::f32:
      status = project<float>(a, list, to, threads, on);
      break;
    case DType::bf16:
      status = project<bf16>(a, list, to, threads, on);
      break;
    case DType::f16:
      status = project<f16>(a, list, to, threads, on);
      break;
  }
  if (a.rank > 0) {
    const int64_t tiles = ceil_div(a.rank, kWarp), side = ceil_div(a.rank, kCovarianceTile);
    if (status == Status::ok)
      status = VIDTOK_LAUNCH(contour_mean_kernel, a.sequences * tiles, threads, carved<double>(2 * threads), on, list,
                             tiles, to);
    if (status == Status::ok)
      status = VIDTOK_LAUNCH(contour_covariance_kernel, a.sequences * side * side, kCovarianceTile * kCovarianceTile,
                             2 * carved<double>(kCovarianceDepth * kCovarianceTile), on, list, side, to);
    const int64_t vectors = carved<double>(kWarp), matrix = carved<double>(a.rank * a.rank);
    const bool in_shared = vectors + matrix <= shared_limit(on.sm);
    if (status == Status::ok)
      status = VIDTOK_LAUNCH(contour_factor_kernel, a.sequences, threads, vectors + (in_shared ? matrix : 0), on, list,
                             in_shared, to);
  }
  int warps = kPlainThreads / kWarp;
  while (warps > 1 && carved<double>(warps * a.rank) > shared_limit(on.sm)) warps /= 2;
  if (status == Status::ok)
    status = VIDTOK_LAUNCH(contour_distance_kernel, ceil_div(a.n, warps), warps * kWarp, carved<double>(warps * a.rank),
                           on, list, a.sequences, a.n, a.distance, to);
  if (status == Status::ok)
    status = VIDTOK_LAUNCH(contour_pick_kernel, a.sequences, threads,
                           carved<int32_t>(kRadixScratch<double>) + carved<uint64_t>(kWarp), on, list, int(a.rule),
                           a.index, to);
  return status;
}

}  // namespace vidtok::cuda

#endif
