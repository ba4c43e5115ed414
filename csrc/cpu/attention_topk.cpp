#include "vidtok/attention_topk.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

// Logits held at once; wider queries and larger batches pass in tiles.
constexpr int64_t kLogits = int64_t(8) << 20;

struct Group {
  int64_t row, tokens, keep;
  std::vector<int64_t> spans;
};

struct Selection {
  std::vector<Group> groups;
  std::vector<int64_t> before;  // [spans] scores before each span
  int64_t scores = 0, indices = 0;
};

Status selection(const AttentionTopkArgs& a, Selection& out) {
  out.before.resize(size_t(a.spans));
  for (int64_t s = 0; s < a.spans; ++s) {
    const int64_t* span = a.span + 3 * s;
    if (span[0] < 0 || span[0] >= a.batch || span[1] < 0 || span[2] < span[1] || span[2] > a.length)
      return fail(Status::index, "expected spans (row, start, stop) inside [%lld, %lld], got (%lld, %lld, %lld)",
                  (long long)a.batch, (long long)a.length, (long long)span[0], (long long)span[1], (long long)span[2]);
    const int64_t tokens = span[2] - span[1];
    out.before[s] = out.scores;
    out.scores += tokens;
    size_t g = out.groups.size();
    if (a.group != nullptr)
      for (g = 0; g < out.groups.size() && a.group[out.groups[g].spans[0]] != a.group[s];) ++g;
    if (g == out.groups.size()) out.groups.push_back({span[0], 0, 0, {}});
    Group& group = out.groups[g];
    if (group.row != span[0])
      return fail(Status::value, "expected a group's spans ascending in one row, got rows %lld and %lld",
                  (long long)group.row, (long long)span[0]);
    if (tokens > 0)
      for (size_t i = group.spans.size(); i-- > 0;) {
        const int64_t* last = a.span + 3 * group.spans[i];
        if (last[1] == last[2]) continue;
        if (last[2] > span[1])
          return fail(Status::value, "expected a group's spans ascending in one row, got %lld to %lld before %lld",
                      (long long)last[1], (long long)last[2], (long long)span[1]);
        break;
      }
    group.spans.push_back(s);
    group.tokens += tokens;
  }
  const int64_t groups = int64_t(out.groups.size());
  if (a.keeps != 1 && a.keeps != groups)
    return fail(Status::value, "expected one keep or one for each of %lld groups, got %lld", (long long)groups,
                (long long)a.keeps);
  for (int64_t g = 0; g < groups; ++g) {
    Group& group = out.groups[g];
    group.keep = a.keep[a.keeps == 1 ? 0 : g];
    if (group.keep < 0 || group.keep > group.tokens)
      return fail(Status::value, "expected keep between 0 and the group's %lld tokens, got %lld",
                  (long long)group.tokens, (long long)group.keep);
    out.indices += group.keep;
  }
  if (out.scores != a.num_score || out.indices != a.num_index)
    return fail(Status::value, "expected room for %lld indices and %lld scores, got %lld and %lld",
                (long long)out.indices, (long long)out.scores, (long long)a.num_index, (long long)a.num_score);
  return Status::ok;
}

class Importance {
 public:
  explicit Importance(const AttentionTopkArgs& args)
      : a_(args),
        kernels_(kernels().attention_topk),
        shared_(args.kv_heads > 0 ? args.q_heads / args.kv_heads : 0),
        splits_((args.length + kSplitKeys - 1) / kSplitKeys),
        stride_(splits_ * kSplitKeys),
        splits_stride_(padded(splits_)) {
    const int64_t row = args.q_heads * stride_;  // logits of one row of each head
    width_ = row * args.width <= kLogits ? args.width : kLogits / row > 0 ? kLogits / row : 1;
    rows_at_once_ = width_ < args.width || row * width_ == 0 ? 1 : kLogits / (row * width_);
    if (rows_at_once_ > args.batch) rows_at_once_ = args.batch;
  }

  // Scores [batch, stride]; false when memory is short.
  bool run() {
    const int64_t rows = rows_at_once_ * a_.q_heads * width_;
    query_.reset(new (std::nothrow) float[size_t(rows * padded(a_.dim)) + 1]);
    logits_.reset(new (std::nothrow) float[size_t(rows * splits_ * kSplitKeys) + 1]);
    partial_.reset(new (std::nothrow) float[size_t(2 * rows * splits_stride_) + 1]);
    whole_.reset(new (std::nothrow) float[size_t(2 * rows) + 1]);
    table_.reset(new (std::nothrow) float[size_t(a_.batch * stride_) + 1]);
    state_.reset(new (std::nothrow) State[size_t(a_.batch) + 1]);
    if (!query_ || !logits_ || !partial_ || !whole_ || !table_ || !state_) return false;
    if (a_.length == 0) return true;
    for (int64_t b = 0; b < a_.batch; ++b) open(b);
    for (int64_t b = 0; b < a_.batch; b += rows_at_once_) {
      const int64_t stop = b + rows_at_once_ < a_.batch ? b + rows_at_once_ : a_.batch;
      for (int64_t w = 0; w < a_.width; w += width_) tile(b, stop, w, w + width_ < a_.width ? w + width_ : a_.width);
      close(b, stop);
    }
    return true;
  }

  const float* row(int64_t b) const { return table_.get() + b * stride_; }

 private:
  struct State {
    int64_t first;  // the first key that is not hidden
    int64_t used;   // query rows that see any key
    bool nan;
  };

  void open(int64_t b) {
    State& s = state_[b];
    s = {0, 0, false};
    if (a_.mask != nullptr && a_.length > 0) {
      const void* at = std::memchr(a_.mask + b * a_.length, 1, size_t(a_.length));
      s.first = at == nullptr ? a_.length : static_cast<const uint8_t*>(at) - (a_.mask + b * a_.length);
    }
    for (int64_t w = 0; w < a_.width; ++w) s.used += sees(b, w);
    std::memset(table_.get() + b * stride_, 0, size_t(stride_) * 4);
  }

  bool sees(int64_t b, int64_t w) const {
    const int64_t first = state_[b].first;
    return first < a_.length && (a_.position == nullptr || a_.position[b * a_.width + w] >= first);
  }

  // Adds the shares of query rows [w0, w1) of batch rows [b0, b1).
  void tile(int64_t b0, int64_t b1, int64_t w0, int64_t w1) {
    const int64_t width = w1 - w0, rows = shared_ * width, heads = a_.kv_heads, dim = padded(a_.dim);
    const int64_t element = size_of(a_.dtype);
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t h = 0; h < a_.q_heads; ++h)
        for (int64_t w = 0; w < width; ++w) {
          const int64_t from = ((b * a_.q_heads + h) * a_.width + w0 + w) * a_.dim;
          float* to = query_.get() + (((b - b0) * a_.q_heads + h) * width + w) * dim;
          kernels_.convert(static_cast<const char*>(a_.query) + from * element, a_.dtype, a_.dim, to);
          std::memset(to + a_.dim, 0, size_t(dim - a_.dim) * 4);
        }
    const int64_t all = (b1 - b0) * a_.q_heads * width;
    float *maximum = partial_.get(), *sum = maximum + all * splits_stride_;
    for (int64_t r = 0; r < all; ++r)
      for (int64_t s = splits_; s < splits_stride_; ++s) {
        maximum[r * splits_stride_ + s] = -std::numeric_limits<float>::infinity();
        sum[r * splits_stride_ + s] = 0.0f;
      }
    const int64_t tasks = (b1 - b0) * heads * splits_;
    const int64_t bytes = tasks * kSplitKeys * (a_.dim * element + rows * a_.dim / 4);
    parallel_ranges(threads_for(a_.threads, bytes), tasks, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t pair = t / splits_, l = t % splits_ * kSplitKeys, b = b0 + pair / heads, h = pair % heads;
        AttentionLogits s{};
        s.query = query_.get() + pair * rows * dim, s.rows = rows, s.dim = a_.dim;
        s.key = static_cast<const char*>(a_.key) + (b * a_.key_batch + h * a_.key_head) * element;
        s.dtype = a_.dtype, s.key_row = a_.key_row, s.length = a_.length, s.scale = a_.scale;
        s.mask = a_.mask == nullptr ? nullptr : a_.mask + b * a_.length;
        s.position = a_.position == nullptr ? nullptr : a_.position + b * a_.width + w0, s.width = width;
        s.logits = logits_.get() + t * rows * kSplitKeys;
        s.maximum = maximum + pair * rows * splits_stride_, s.sum = sum + pair * rows * splits_stride_;
        s.splits_stride = splits_stride_;
        kernels_.logits(s, l, l + kSplitKeys < a_.length ? l + kSplitKeys : a_.length);
      }
    });
    float *top = whole_.get(), *inverse = top + all;
    for (int64_t r = 0; r < all; ++r) {
      const int64_t b = b0 + r / (a_.q_heads * width);
      kernels_.combine(maximum + r * splits_stride_, sum + r * splits_stride_, splits_, top + r, inverse + r);
      if (!sees(b, w0 + r % width))
        inverse[r] = 0.0f;
      else if (!(inverse[r] <= std::numeric_limits<float>::max()))
        state_[b].nan = true;
    }
    parallel_ranges(threads_for(a_.threads, all * a_.length * 16), (b1 - b0) * splits_,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t t = begin; t < end; ++t) {
                        const int64_t b = t / splits_, split = t % splits_, l = split * kSplitKeys;
                        if (state_[b0 + b].nan) continue;
                        for (int64_t h = 0; h < heads; ++h) {
                          const int64_t pair = b * heads + h, first = pair * rows;
                          const AttentionShares s{logits_.get() + (pair * splits_ + split) * rows * kSplitKeys,
                                                  rows,
                                                  top + first,
                                                  inverse + first,
                                                  table_.get() + (b0 + b) * stride_ + l,
                                                  a_.use_max};
                          kernels_.shares(s, l + kSplitKeys < a_.length ? kSplitKeys : a_.length - l);
                        }
                      }
                    });
  }

  void close(int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      float* row = table_.get() + b * stride_;
      if (state_[b].nan)
        for (int64_t l = 0; l < a_.length; ++l) row[l] = std::numeric_limits<float>::quiet_NaN();
      const int64_t used = state_[b].used * a_.q_heads;
      kernels_.finish(row, 0, a_.length, a_.use_max || used == 0 ? 1.0f : float(used));
    }
  }

  const AttentionTopkArgs& a_;
  const AttentionTopkKernels& kernels_;
  const int64_t shared_, splits_, stride_, splits_stride_;
  int64_t width_ = 0, rows_at_once_ = 0;
  std::unique_ptr<float[]> query_, logits_, partial_, whole_, table_;
  std::unique_ptr<State[]> state_;
};

}  // namespace

Status attention_topk(const AttentionTopkArgs& args) {
  Selection chosen;
  const Status status = selection(args, chosen);
  if (status != Status::ok) return status;
  Importance importance(args);
  if (!importance.run()) return fail(Status::memory, "expected memory to score %lld keys", (long long)args.length);
  for (int64_t s = 0; s < args.spans; ++s) {
    const int64_t* span = args.span + 3 * s;
    if (span[2] > span[1])
      std::memcpy(args.score + chosen.before[s], importance.row(span[0]) + span[1], size_t(span[2] - span[1]) * 4);
  }
  const int64_t groups = int64_t(chosen.groups.size());
  std::vector<int64_t> before(size_t(groups) + 1, 0);
  for (int64_t g = 0; g < groups; ++g) before[g + 1] = before[g] + chosen.groups[g].keep;
  const auto select = kernels().topk_select.segment;
  std::atomic<bool> starved{false};
  parallel_tasks(threads_for(args.threads, chosen.scores * 16), groups, [&](int64_t g) {
    const Group& group = chosen.groups[g];
    const int64_t n = group.tokens;
    const bool one = group.spans.size() == 1;
    const std::unique_ptr<uint32_t[]> work(new (std::nothrow) uint32_t[size_t(2 * n + kRadixCounters)]);
    const std::unique_ptr<float[]> gathered(one ? nullptr : new (std::nothrow) float[size_t(n) + 1]);
    if (!work || !(one || gathered)) {
      starved = true;
      return;
    }
    int64_t* index = args.index + before[g];
    if (one) {
      const int64_t s = group.spans[0];
      select(args.score + chosen.before[s], DType::f32, n, group.keep, args.span[3 * s + 1], index, work.get());
      return;
    }
    int64_t at = 0;
    for (const int64_t s : group.spans) {
      const int64_t tokens = args.span[3 * s + 2] - args.span[3 * s + 1];
      if (tokens > 0) std::memcpy(gathered.get() + at, args.score + chosen.before[s], size_t(tokens) * 4);
      at += tokens;
    }
    select(gathered.get(), DType::f32, n, group.keep, 0, index, work.get());
    // From places in the group to positions in the row, span by span.
    int64_t i = 0, start = 0;
    for (const int64_t s : group.spans) {
      const int64_t tokens = args.span[3 * s + 2] - args.span[3 * s + 1];
      for (; i < group.keep && index[i] < start + tokens; ++i) index[i] += args.span[3 * s + 1] - start;
      start += tokens;
    }
  });
  if (starved) return fail(Status::memory, "expected memory to select among %lld scores", (long long)chosen.scores);
  return Status::ok;
}

}  // namespace vidtok
