#include "vidtok/bipartite.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

// Above this an output leaves L2 before anybody reads it, and streaming saves its read.
constexpr int64_t kStreamBytes = int64_t(4) << 20;
// Of x four fifths are read ahead during the match, and the rest while it is merged; never more than
// this, which would push itself out of the cache.
constexpr int64_t kAheadBytes = int64_t(4) << 20;

struct Sequence {
  int64_t begin, tokens, out, merges;
};

struct Population {
  int64_t sources, destinations, kept;
};

Population population(const BipartiteArgs& a, int64_t begin, int64_t tokens) {
  int64_t even = 0, odd = 0;
  if (a.mask == nullptr) {
    const int64_t prefix = a.prefix < tokens ? a.prefix : tokens;
    even = (prefix + 1) / 2, odd = prefix / 2;
  } else {
    const uint8_t* mask = a.mask + begin;
    for (int64_t i = 0; i + 1 < tokens; i += 2) even += mask[i] != 0, odd += mask[i + 1] != 0;
    if (tokens % 2 == 1) even += mask[tokens - 1] != 0;
  }
  return {(tokens + 1) / 2 - even, tokens / 2 - odd, even + odd};
}

int64_t merges_of(const BipartiteArgs& a, int64_t begin, int64_t tokens) {
  const Population p = population(a, begin, tokens);
  if (p.destinations == 0) return 0;
  int64_t out = (tokens - p.kept) / 2;
  if (a.r < out) out = a.r;
  if (p.sources < out) out = p.sources;
  return out > 0 ? out : 0;
}

Status sequences(const BipartiteArgs& a, std::vector<Sequence>& out, int64_t* m) {
  const int64_t all = a.cu == nullptr ? a.batch * a.tokens : a.tokens;
  if (all > std::numeric_limits<int32_t>::max())
    return fail(Status::value, "expected fewer than 2^31 tokens, got %lld", (long long)all);
  out.resize(size_t(a.batch));
  int64_t total = 0;
  if (a.cu == nullptr) {
    int64_t merges = a.batch > 0 ? merges_of(a, 0, a.tokens) : 0;
    if (a.mask != nullptr)
      for (int64_t b = 1; b < a.batch; ++b) {
        const int64_t here = merges_of(a, b * a.tokens, a.tokens);
        if (here < merges) merges = here;
      }
    for (int64_t b = 0; b < a.batch; ++b, total += a.tokens - merges) out[b] = {b * a.tokens, a.tokens, total, merges};
  } else {
    if (a.cu[0] != 0 || a.cu[a.batch] != a.tokens)
      return fail(Status::index, "expected cu_seqlens from 0 to %lld, got %d to %d", (long long)a.tokens, a.cu[0],
                  a.cu[a.batch]);
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t begin = a.cu[b], tokens = int64_t(a.cu[b + 1]) - begin;
      if (tokens < 0)
        return fail(Status::index, "expected cu_seqlens that never fall, got %d after %d", a.cu[b + 1], a.cu[b]);
      // A falling entry further on may not make this one read past the mask.
      if (begin + tokens > a.tokens)
        return fail(Status::index, "expected cu_seqlens up to %lld, got %d", (long long)a.tokens, a.cu[b + 1]);
      out[b] = {begin, tokens, total, merges_of(a, begin, tokens)};
      total += tokens - out[b].merges;
    }
  }
  *m = total;
  return Status::ok;
}

// What one sequence needs while it is worked on.
class Worker {
 public:
  explicit Worker(const BipartiteArgs& args)
      : a_(args), kernels_(kernels().bipartite), direct_(args.metric_dtype == DType::f32 && args.heads == 1) {}

  // Room for sequences up to `longest`; false when there is none.
  bool reserve(int64_t longest) {
    const size_t n = size_t(longest) + 2;
    integers_.reset(new (std::nothrow) int32_t[4 * n]);
    floats_.reset(new (std::nothrow) float[3 * n]);
    panel_ = panel();
    if (!direct_) rows_.reset(new (std::nothrow) float[size_t(longest * a_.cm + 1)]);
    if (!integers_ || !floats_ || !panel_ || !(direct_ || rows_)) return false;
    place_ = integers_.get(), output_ = place_ + n, target_ = output_ + n, offset_ = target_ + n;
    best_ = floats_.get(), inverse_ = best_ + n, ordered_ = inverse_ + n;
    return true;
  }

  std::unique_ptr<float[]> panel() const {
    return std::unique_ptr<float[]>(new (std::nothrow) float[size_t(kernels_.panel * a_.cm + 1)]);
  }

  // All of one sequence on the calling thread.
  void whole(const Sequence& s, int64_t index, bool streaming) {
    open(s, index);
    if (s.merges > 0) {
      norms(0, s.tokens);
      ready();
      const int64_t count = panels();
      for (int64_t p = 0; p < count; ++p) kernels_.match(m_, p, count, panel_.get());
    }
    close(s);
    if (a_.x != nullptr) merge(s, 0, s.tokens - s.merges, streaming);
  }

  // One sequence by all threads.
  void split(const Sequence& s, int64_t index, bool streaming) {
    open(s, index);
    if (s.merges > 0) {
      parallel_ranges(threads_for(a_.threads, s.tokens * a_.cm * 4), s.tokens,
                      [&](int64_t begin, int64_t end) { norms(begin, end); });
      ready();
      m_.ahead = nullptr;
      const int64_t count = panels();
      parallel_ranges(threads_for(a_.threads, s.tokens * s.tokens * a_.cm / 16), count,
                      [&](int64_t begin, int64_t end) {
                        const std::unique_ptr<float[]> own = begin == 0 ? nullptr : panel();
                        float* room = begin == 0 ? panel_.get() : own.get();
                        for (int64_t p = begin; p < end && room != nullptr; ++p) kernels_.match(m_, p, count, room);
                        if (room == nullptr) short_of_memory_ = true;
                      });
    }
    close(s);
    if (a_.x == nullptr) return;
    const int64_t row = a_.c * size_of(a_.x_dtype);
    parallel_ranges(threads_for(a_.threads, s.tokens * row * 2), s.tokens - s.merges,
                    [&](int64_t begin, int64_t end) { merge(s, begin, end, streaming); });
  }

  bool short_of_memory() const { return short_of_memory_; }

 private:
  const char* at(const void* p, DType dtype, const Sequence& s, int64_t index, int64_t batch, int64_t row) const {
    const int64_t element = a_.cu == nullptr ? index * batch : s.begin * row;
    return static_cast<const char*>(p) + element * size_of(dtype);
  }

  void open(const Sequence& s, int64_t index) {
    tokens_ = s.tokens;
    metric_ = at(a_.metric, a_.metric_dtype, s, index, a_.metric_batch, a_.metric_row);
    x_ = a_.x == nullptr ? nullptr : at(a_.x, a_.x_dtype, s, index, a_.x_batch, a_.x_row);
    mask_ = a_.mask == nullptr ? nullptr : a_.mask + s.begin;
    // Positions: sources, then destinations.
    sources_ = destinations_ = 0;
    for (int64_t i = 0; i < s.tokens; i += 2)
      if (!kept(i)) place_[sources_++] = int32_t(i);
    for (int64_t i = 1; i < s.tokens; i += 2)
      if (!kept(i)) place_[sources_ + destinations_++] = int32_t(i);
  }

  bool kept(int64_t i) const { return mask_ == nullptr ? i < a_.prefix : mask_[i] != 0; }

  void norms(int64_t begin, int64_t end) {
    if (!direct_) kernels_.rows(a_, metric_, begin, end, rows_.get());
    kernels_.inverse(rows(), stride(), a_.cm, begin, end, inverse_);
  }

  const float* rows() const { return direct_ ? reinterpret_cast<const float*>(metric_) : rows_.get(); }
  int64_t stride() const { return direct_ ? a_.metric_row : a_.cm; }

  int64_t panels() const { return (sources_ + kernels_.panel - 1) / kernels_.panel; }

  void ready() {
    m_.steps = a_.metric_dtype == DType::f32 ? 1048576.0f : 65536.0f;
    const int64_t all = sources_ + destinations_;
    for (int64_t i = 0; i < all; ++i) ordered_[i] = inverse_[place_[i]] * (i < sources_ ? 1.0f : m_.steps);
    m_.rows = rows(), m_.row_stride = stride(), m_.cm = a_.cm;
    m_.source = place_, m_.destination = place_ + sources_;
    m_.sources = sources_, m_.destinations = destinations_;
    m_.inverse_source = ordered_, m_.inverse_destination = ordered_ + sources_;
    m_.best = best_, m_.target = target_;
    const bool dense = x_ != nullptr && a_.x_row == a_.c;
    const int64_t bytes = tokens_ * a_.c * size_of(a_.x_dtype);
    m_.ahead = dense ? x_ : nullptr;
    m_.ahead_bytes = bytes * 4 / 5 < kAheadBytes ? bytes * 4 / 5 : kAheadBytes;
  }

  // Marks the `count` best sources: score descending, then position.
  void select(int64_t count) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const float lowest = -m_.steps;
    int32_t first = 0;
    while (first + 1 < destinations_ && std::isnan(m_.inverse_destination[first])) ++first;
    for (int64_t i = 0; i < sources_; ++i)
      if (best_[i] <= lowest && best_[i] != kNone) best_[i] = lowest, target_[i] = first;
    // The count-th best score, by halving the grid: at least `count` lie at `low` or above.
    float low = kNone, high = m_.steps + 1.0f;
    if (at_least(lowest) >= count) {
      low = lowest;
      while (high - low > 1.0f) {
        const float middle = std::floor((low + high) * 0.5f);
        (at_least(middle) >= count ? low : high) = middle;
      }
    }
    int64_t ties = count;
    for (int64_t i = 0; i < sources_; ++i) ties -= best_[i] > low;
    for (int64_t i = 0; i < sources_; ++i) {
      const bool merged = best_[i] > low || (best_[i] == low && ties-- > 0);
      if (!merged) target_[i] = -1;
    }
  }

  int64_t at_least(float score) const {
    int32_t out = 0;
    const float* best = best_;
    for (int64_t i = 0; i < sources_; ++i) out += best[i] >= score;
    return out;
  }

  // Decides, and writes the lists of the sequence.
  void close(const Sequence& s) {
    if (s.merges > 0) select(s.merges);
    int32_t* anchor = a_.anchor + s.out;
    const int32_t base = int32_t(s.begin);
    int32_t m = 0;
    const auto add = [&](int64_t place) {
      output_[place] = m;
      offset_[m] = 1;
      anchor[m++] = base + int32_t(place);
    };
    if (mask_ != nullptr || a_.prefix > 0)
      for (int64_t i = 0; i < s.tokens; ++i)
        if (kept(i)) add(i);
    for (int64_t i = 0; i < sources_; ++i)
      if (s.merges == 0 || target_[i] < 0) add(place_[i]);
    const int32_t after = m;
    for (int64_t i = 0; i < destinations_; ++i) add(place_[sources_ + i]);
    if (s.merges > 0)
      for (int64_t i = 0; i < sources_; ++i)
        if (target_[i] >= 0) output_[place_[i]] = after + target_[i], ++offset_[after + target_[i]];
    int32_t next = base;
    for (int32_t i = 0; i < m; ++i) {
      const int32_t count = offset_[i];
      offset_[i] = next;
      next += count;
    }
    // Members in order of tokens move each start to its end, which is the start of the one after.
    for (int64_t i = 0; i < s.tokens; ++i) a_.member[offset_[output_[i]]++] = base + int32_t(i);
    for (int32_t i = m; i > 0; --i) offset_[i] = offset_[i - 1];
    offset_[0] = base;
    if (m > 0) std::memcpy(a_.offset + s.out, offset_, size_t(m) * 4);
    for (int32_t i = 0; i < m; ++i) {
      const int32_t lo = offset_[i], hi = offset_[i + 1];
      float total = 0.0f;
      for (int32_t j = lo; j < hi; ++j) total += mass(a_.member[j]);
      for (int32_t j = lo; j < hi; ++j) a_.weight[j] = mass(a_.member[j]) / total;
      if (a_.total != nullptr) a_.total[s.out + i] = total;
    }
  }

  float mass(int32_t token) const { return a_.size == nullptr ? 1.0f : a_.size[token]; }

  // Outputs [begin, end) of the sequence.
  void merge(const Sequence& s, int64_t begin, int64_t end, bool streaming) const {
    kernels_.merge(a_, {x_, s.begin, s.out, offset_}, begin, end, streaming);
  }

  const BipartiteArgs& a_;
  const BipartiteKernels& kernels_;
  const bool direct_;
  std::unique_ptr<int32_t[]> integers_;
  std::unique_ptr<float[]> floats_, rows_, panel_;
  int32_t *place_ = nullptr, *output_ = nullptr, *target_ = nullptr, *offset_ = nullptr;
  float *best_ = nullptr, *inverse_ = nullptr, *ordered_ = nullptr;
  Matching m_{};
  const char *metric_ = nullptr, *x_ = nullptr;
  const uint8_t* mask_ = nullptr;
  int64_t sources_ = 0, destinations_ = 0, tokens_ = 0;
  std::atomic<bool> short_of_memory_{false};
};

// Multiply-adds of a match, and what moving its tokens weighs against them.
double cost(const BipartiteArgs& a, const Sequence& s) {
  const double t = double(s.tokens);
  return t * (s.merges > 0 ? t * 0.25 * double(a.cm) : 0.0) + t * double(a.cm + 2 * a.c) * 4;
}

}  // namespace

Status bipartite_count(const BipartiteArgs& args, int64_t* m) {
  std::vector<Sequence> all;
  return sequences(args, all, m);
}

Status bipartite(const BipartiteArgs& args) {
  std::vector<Sequence> all;
  int64_t m = 0;
  const Status status = sequences(args, all, &m);
  if (status != Status::ok) return status;
  if (m != args.m)
    return fail(Status::index, "expected room for %lld outputs, got %lld", (long long)m, (long long)args.m);
  int64_t longest = 0, n = 0;
  double work = 0;
  for (const Sequence& s : all) {
    args.cu_in[n] = int32_t(s.begin), args.cu_out[n++] = int32_t(s.out);
    if (s.tokens > longest) longest = s.tokens;
    work += cost(args, s);
  }
  const int64_t tokens = args.cu == nullptr ? args.batch * args.tokens : args.tokens;
  args.cu_in[n] = args.offset[m] = int32_t(tokens), args.cu_out[n] = int32_t(m);
  const bool streaming = args.x != nullptr && m * args.c * size_of(args.x_dtype) >= kStreamBytes;
  const int threads = threads_for(args.threads, int64_t(work));

  // All threads share a sequence that outweighs the share of one, and those left over by an even
  // division of few.
  const int64_t even = args.batch < 4 * threads ? args.batch / threads * threads : args.batch;
  const auto shared = [&](int64_t b) {
    return threads > 1 && (b >= even || cost(args, all[b]) * threads > work * 1.01);
  };
  std::atomic<int64_t> next{0};
  std::atomic<bool> short_of_memory{false};
  if (even > 0)
    parallel(threads < even ? threads : int(even), [&](int, int) {
      Worker worker(args);
      if (!worker.reserve(longest)) {
        short_of_memory = true;
        return;
      }
      for (int64_t b = next.fetch_add(1); b < even; b = next.fetch_add(1))
        if (!shared(b)) worker.whole(all[b], b, streaming);
    });
  bool any = false;
  for (int64_t b = 0; b < args.batch; ++b) any = any || shared(b);
  if (any) {
    Worker worker(args);
    if (!worker.reserve(longest)) short_of_memory = true;
    for (int64_t b = 0; b < args.batch && !short_of_memory; ++b)
      if (shared(b)) worker.split(all[b], b, streaming);
    if (worker.short_of_memory()) short_of_memory = true;
  }
  if (short_of_memory)
    return fail(Status::memory, "expected memory to match %lld tokens of %lld channels", (long long)longest,
                (long long)args.cm);
  return Status::ok;
}

}  // namespace vidtok
