#include "cpu/contour_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

constexpr double kTemperature = 0.1, kShrinkage = 0.1;
constexpr int kScoreBits = 16;
// Less variance than this share of the mean square is rounding: frames are equal.
constexpr double kLeastSpread = 0x1p-80;
// Frames projected by one task; a fixed number of rows, as every sum is its row's own.
constexpr int64_t kFrames = 24;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Sequence {
  const char* x;
  DType dtype;
  int64_t x_stride, frames, c, rank, num;
  const void* query;
  const double* basis;
  ContourRule rule;
  int64_t first;
  int64_t* index;
  float* distance;
  int threads;
  const char* frame(int64_t t) const { return x + t * x_stride * size_of(dtype); }
};

int64_t padded(int64_t r) { return (r + kContourPad - 1) / kContourPad * kContourPad; }

template <class Body>
void over_frames(int threads, int64_t frames, Body&& body) {
  parallel_tasks(threads, (frames + kFrames - 1) / kFrames,
                 [&](int64_t i) { body(i * kFrames, std::min((i + 1) * kFrames, frames)); });
}

double inverse_norm(double square) {
  return square == 0 ? 0.0 : std::isfinite(square) ? 1.0 / std::sqrt(square) : kNan;
}

double round_bits(double x) {
  if (!std::isfinite(x)) return x;
  int exponent = 0;
  const double mantissa = std::frexp(x, &exponent), steps = double(1 << kScoreBits);
  return std::ldexp(std::nearbyint(mantissa * steps) / steps, exponent);
}

// Whether each frame is finite, and softmax(cos(x, query)/0.1), or uniform, over those that are.
void weigh(const Sequence& s, std::vector<char>& finite, std::vector<double>& weight) {
  const auto moments = kernels().contour.moments;
  double product, query_square = 0;
  if (s.query) moments(s.query, s.query, s.dtype, s.c, &product, &query_square);
  over_frames(s.threads, s.frames, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      double dot, norm;
      moments(s.frame(t), s.query ? s.query : s.frame(t), s.dtype, s.c, &dot, &norm);
      finite[size_t(t)] = std::isfinite(norm);
      weight[size_t(t)] = s.query ? dot * inverse_norm(norm) * inverse_norm(query_square) / kTemperature : 0.0;
    }
  });
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t t = 0; t < s.frames; ++t)
    if (finite[size_t(t)]) largest = std::max(largest, weight[size_t(t)]);
  for (int64_t t = 0; t < s.frames; ++t) {
    double& w = weight[size_t(t)];
    w = finite[size_t(t)] ? std::exp(w - largest) : 0.0;
    sum += w;
  }
  for (double& w : weight)
    if (w != 0) w /= sum;
}

// Inverse of the lower Cholesky factor of a [r, cols], transposed, padding zero.
std::vector<double> inverse_factor(std::vector<double>& a, int64_t r, int64_t cols) {
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t i = j; i < r; ++i) {
      double sum = a[size_t(i * cols + j)];
      for (int64_t k = 0; k < j; ++k) sum -= a[size_t(i * cols + k)] * a[size_t(j * cols + k)];
      a[size_t(i * cols + j)] = i == j ? std::sqrt(sum) : sum / a[size_t(j * cols + j)];
    }
  }
  std::vector<double> inverse(size_t(r * cols), 0.0);
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = j; i < r; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (int64_t k = j; k < i; ++k) sum -= a[size_t(i * cols + k)] * inverse[size_t(j * cols + k)];
      inverse[size_t(j * cols + i)] = sum / a[size_t(i * cols + i)];
    }
  return inverse;
}

void measure(const Sequence& s, std::vector<double>& distance) {
  const ContourKernels& kernel = kernels().contour;
  const int64_t r = s.rank, cols = padded(r), frames = s.frames;
  std::vector<char> finite(static_cast<size_t>(frames));
  std::vector<double> weight(static_cast<size_t>(frames));
  weigh(s, finite, weight);
  if (r > 0) {
    std::vector<double> z(size_t(frames * cols));
    over_frames(s.threads, frames, [&](int64_t begin, int64_t end) {
      kernel.project(s.frame(begin), s.dtype, s.x_stride, end - begin, s.c, s.basis, cols, &z[size_t(begin * cols)]);
      for (int64_t t = begin; t < end; ++t)
        if (!finite[size_t(t)]) std::fill(&z[size_t(t * cols)], &z[size_t(t * cols)] + cols, 0.0);
    });
    std::vector<double> mean(static_cast<size_t>(cols));
    kernel.multiply(weight.data(), frames, 1, frames, z.data(), cols, mean.data());
    std::vector<double> weighted(size_t(r * frames)), covariance(size_t(r * cols));
    double energy = 0;
    for (int64_t t = 0; t < frames; ++t)
      for (int64_t j = 0; j < r; ++j) {
        double& centred = z[size_t(t * cols + j)];
        energy += weight[size_t(t)] * centred * centred;
        centred -= mean[size_t(j)];
        weighted[size_t(j * frames + t)] = centred * weight[size_t(t)];
      }
    over_frames(s.threads, r, [&](int64_t begin, int64_t end) {
      kernel.multiply(&weighted[size_t(begin * frames)], frames, end - begin, frames, z.data(), cols,
                      &covariance[size_t(begin * cols)]);
    });
    double trace = 0;
    for (int64_t j = 0; j < r; ++j) trace += covariance[size_t(j * cols + j)];
    if (trace > kLeastSpread * energy) {
      for (double& v : covariance) v *= 1 - kShrinkage;
      for (int64_t j = 0; j < r; ++j) covariance[size_t(j * cols + j)] += kShrinkage * trace / double(r);
      const std::vector<double> inverse = inverse_factor(covariance, r, cols);
      over_frames(s.threads, frames, [&](int64_t begin, int64_t end) {
        std::vector<double> y(size_t((end - begin) * cols));
        kernel.multiply(&z[size_t(begin * cols)], cols, end - begin, r, inverse.data(), cols, y.data());
        for (int64_t t = begin; t < end; ++t) {
          double sum = 0;
          for (int64_t j = 0; j < r; ++j) sum += y[size_t((t - begin) * cols + j)] * y[size_t((t - begin) * cols + j)];
          distance[size_t(t)] = sum;
        }
      });
    }
  }
  for (int64_t t = 0; t < frames; ++t) distance[size_t(t)] = finite[size_t(t)] ? round_bits(distance[size_t(t)]) : kNan;
}

void pick(const Sequence& s, const std::vector<double>& distance) {
  if (s.num == 0) return;
  std::vector<double> known;
  for (const double d : distance)
    if (!std::isnan(d)) known.push_back(d);
  double contour = 0;
  if (!known.empty()) {
    const auto middle = known.begin() + int64_t(known.size() - 1) / 2;
    std::nth_element(known.begin(), middle, known.end());
    contour = *middle;
  }
  std::vector<double> off(distance.size());
  for (size_t t = 0; t < off.size(); ++t) off[t] = std::abs(distance[t] - contour);
  const auto before = [&](int64_t a, int64_t b) {
    const double x = off[size_t(a)], y = off[size_t(b)];
    if (std::isnan(x) != std::isnan(y)) return std::isnan(y);
    return x < y || (!(y < x) && a < b);
  };
  std::vector<int64_t> chosen;
  if (s.rule == ContourRule::stratified) {
    for (int64_t i = 0; i < s.num; ++i) {
      const int64_t end = (i + 1) * s.frames / s.num;
      int64_t best = i * s.frames / s.num;
      for (int64_t t = best + 1; t < end; ++t)
        if (before(t, best)) best = t;
      chosen.push_back(best);
    }
  } else {
    std::vector<int64_t> order(off.size());
    std::iota(order.begin(), order.end(), int64_t(0));
    std::sort(order.begin(), order.end(), before);
    if (s.rule == ContourRule::contour) {
      chosen.assign(order.begin(), order.begin() + s.num);
    } else {
      std::vector<int64_t> rest(order.begin(), order.begin() + std::min(2 * s.num, s.frames));
      chosen.push_back(rest[0]);
      rest.erase(rest.begin());
      std::sort(rest.begin(), rest.end());
      std::vector<int64_t> gap(rest.size(), std::numeric_limits<int64_t>::max());
      while (int64_t(chosen.size()) < s.num) {
        size_t best = 0;
        for (size_t i = 0; i < rest.size(); ++i) {
          gap[i] = std::min(gap[i], std::abs(rest[i] - chosen.back()));
          if (gap[i] > gap[best]) best = i;
        }
        chosen.push_back(rest[best]);
        rest.erase(rest.begin() + int64_t(best));
        gap.erase(gap.begin() + int64_t(best));
      }
    }
    std::sort(chosen.begin(), chosen.end());
  }
  for (int64_t i = 0; i < s.num; ++i) s.index[i] = s.first + chosen[size_t(i)];
}

void select(const Sequence& s) {
  std::vector<double> distance(size_t(s.frames), 0.0);
  measure(s, distance);
  pick(s, distance);
  for (int64_t t = 0; t < s.frames; ++t) s.distance[t] = float(distance[size_t(t)]);
}

}  // namespace

Status contour_select(const ContourSelectArgs& a) {
  if (a.num_counts != 1 && a.num_counts != a.sequences)
    return fail(Status::value, "expected num as one number or one for each of %lld sequences, got %lld",
                (long long)a.sequences, (long long)a.num_counts);
  if (a.cu_seqlens && a.cu_seqlens[a.sequences] != a.n)
    return fail(Status::index, "expected cu_seqlens that end at %lld, got %d", (long long)a.n,
                a.cu_seqlens[a.sequences]);
  std::vector<Sequence> list;
  int64_t* index = a.index;
  int64_t before = 0;
  for (int64_t i = 0; i < a.sequences; ++i) {
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[i + 1] : a.n;
    if ((i == 0 && a.cu_seqlens && a.cu_seqlens[0] != 0) || end < before || end > a.n ||
        (i + 1 == a.sequences && end != a.n))
      return fail(Status::index, "expected cu_seqlens that start at 0, never fall and end at %lld, got %lld at %lld",
                  (long long)a.n, (long long)end, (long long)i + 1);
    const int64_t frames = end - before, num = a.num[a.num_counts == 1 ? 0 : i];
    if (num < 0 || num > frames)
      return fail(Status::value, "expected num between 0 and the sequence's %lld frames, got %lld", (long long)frames,
                  (long long)num);
    const char* query = static_cast<const char*>(a.query);
    const int64_t width = size_of(a.dtype);
    list.push_back({static_cast<const char*>(a.x) + before * a.x_stride * width, a.dtype, a.x_stride, frames, a.c,
                    std::min(std::min(a.max_rank, frames / 4), a.c), num, query ? query + i * a.c * width : nullptr,
                    a.basis[i], a.rule, before, index, a.distance + before, 1});
    index += num;
    before = end;
  }
  const bool apart = a.sequences >= 2 * a.threads;
  if (apart) {
    parallel_tasks(a.threads, a.sequences, [&](int64_t i) { select(list[size_t(i)]); });
  } else {
    for (Sequence& s : list) {
      s.threads = threads_for(a.threads, s.frames * s.c * 8);
      select(s);
    }
  }
  return Status::ok;
}

}  // namespace vidtok
