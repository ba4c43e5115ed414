#include "vidtok/cluster_dpc_knn.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/gram.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

constexpr double kSteps = 1048576.0;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Longer lists of neighbours are selected row by row instead of kept sorted.
constexpr int64_t kLongestList = 32;
// Columns whose lists stay in L1 while the rows pass by.
constexpr int64_t kColumns = 512;
constexpr int64_t kHugePage = int64_t(2) << 20;

// Memory of one segment, in huge pages where it is large: touching 4 KiB pages for the first time
// would cost a tenth of the whole computation.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    const int64_t align = bytes >= 2 * kHugePage ? kHugePage : 64;
    const int64_t size = round_up(bytes, align);
    base_ = static_cast<char*>(std::aligned_alloc(size_t(align), size_t(size)));
#ifdef MADV_HUGEPAGE
    if (base_ && align == kHugePage) madvise(base_, size_t(size), MADV_HUGEPAGE);
#endif
  }
  ~Workspace() { std::free(base_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  explicit operator bool() const { return base_ != nullptr; }

  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return out;
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

struct Segment {
  const char* x;
  DType dtype;
  int64_t x_stride, n, c, k, clusters, first;  // first: packed index of its first token
  int64_t* assignment;
  int64_t* center;
  int64_t workspace;
  int threads;
};

// What is known of each token; arrays are padded to whole panels.
struct Tokens {
  float* norm;
  float* nearest_higher;
  float* largest;
  float* best;
  int32_t* density;  // multiples of 2⁻²⁰
  int32_t* rank;     // place by density descending, then index; none for padding
  int32_t* who;
  int32_t* by_index;  // centres, ascending

  static int64_t bytes(int64_t padded) { return 8 * round_up(padded * 4, 64); }
  Tokens(Workspace& w, int64_t padded)
      : norm(w.take<float>(padded)),
        nearest_higher(w.take<float>(padded)),
        largest(w.take<float>(padded)),
        best(w.take<float>(padded)),
        density(w.take<int32_t>(padded)),
        rank(w.take<int32_t>(padded)),
        who(w.take<int32_t>(padded)),
        by_index(w.take<int32_t>(padded)) {}
};

int32_t density_of(double sum, int64_t k, double unit) {
  return int32_t(std::nearbyint(std::exp(-(sum * unit / double(k))) * kSteps));
}

void densities(const float* list, int64_t ldl, int64_t begin, int64_t end, int64_t k, double unit, int32_t* density) {
  for (int64_t j = begin; j < end; ++j) {
    double sum = 0;
    for (int64_t t = 0; t < k; ++t) sum += double(list[t * ldl + j]);
    density[j] = density_of(sum, k, unit);
  }
}

int32_t density_of_row(const float* u, int64_t n, int64_t k, double unit, std::vector<float>& row) {
  row.assign(u, u + n);
  if (k < n) std::nth_element(row.begin(), row.begin() + k, row.end());
  double sum = 0;
  for (int64_t t = 0; t < k; ++t) sum += double(row[size_t(t)]);
  return density_of(sum, k, unit);
}

void rank_by_density(const Tokens& t, int64_t n, int64_t padded) {
  std::vector<uint64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[size_t(i)] = (uint64_t(int64_t(kSteps) - t.density[i]) << 32) | uint64_t(i);
  std::sort(order.begin(), order.end());
  for (int64_t i = 0; i < n; ++i) t.rank[order[size_t(i)] & 0xffffffffu] = int32_t(i);
  for (int64_t i = n; i < padded; ++i) t.rank[i] = std::numeric_limits<int32_t>::max();
}

// Centres by ρ·δ descending, then index; also by_index, and their ranks in that order.
void choose_centers(const Segment& s, const Tokens& t, double unit, std::vector<int32_t>& rank_by_index) {
  struct Scored {
    double score;
    int32_t index;
    bool operator<(const Scored& other) const {
      return score != other.score ? score > other.score : index < other.index;
    }
  };
  float largest = 0.0f;
  for (int64_t i = 0; i < s.n; ++i) largest = std::max(largest, t.largest[i]);
  std::vector<Scored> order(static_cast<size_t>(s.n));
  for (int64_t i = 0; i < s.n; ++i) {
    const float units = t.nearest_higher[i] == kInfinity ? largest : t.nearest_higher[i];
    order[size_t(i)] = {double(t.density[i]) / kSteps * std::sqrt(double(units) * unit), int32_t(i)};
  }
  if (s.clusters < s.n) std::nth_element(order.begin(), order.begin() + s.clusters, order.end());
  std::sort(order.begin(), order.begin() + s.clusters);
  constexpr int32_t kNone = -1;
  // The places of `who` serve as a map from tokens to ranks until the assignment begins.
  std::fill(t.who, t.who + s.n, kNone);
  for (int64_t r = 0; r < s.clusters; ++r) {
    s.center[r] = s.first + order[size_t(r)].index;
    t.who[order[size_t(r)].index] = int32_t(r);
  }
  rank_by_index.clear();
  for (int64_t i = 0, at = 0; i < s.n; ++i)
    if (t.who[i] != kNone) {
      t.by_index[at++] = int32_t(i);
      rank_by_index.push_back(t.who[i]);
    }
}

void write_assignment(const Segment& s, const Tokens& t, const std::vector<int32_t>& rank_by_index, int64_t begin,
                      int64_t end) {
  for (int64_t i = begin; i < end; ++i) s.assignment[i] = rank_by_index[size_t(t.who[i])];
}

void assign_centers(const Segment& s, const Tokens& t, const std::vector<int32_t>& rank_by_index) {
  for (int64_t r = 0; r < s.clusters; ++r) s.assignment[t.by_index[r]] = rank_by_index[size_t(r)];
}

// Runs body(begin, end) over chunks of columns, for work of that many bytes in all.
template <class Body>
void over_columns(int threads, int64_t cols, int64_t bytes, Body&& body) {
  parallel_tasks(threads_for(threads, bytes), (cols + kColumns - 1) / kColumns,
                 [&](int64_t i) { body(i * kColumns, std::min((i + 1) * kColumns, cols)); });
}

// ---------------------------------------------------------------- distances kept

// Rows an odd number of cache lines apart, so that a column does not fall into one cache set.
int64_t row_length(int64_t padded) { return padded % 32 == 0 ? padded + 16 : padded; }

// Lists of up to eight neighbours take a sorting network of that size; 0 for no lists.
int64_t list_slots(int64_t k) { return k <= 8 ? 8 : k <= kLongestList ? k : 0; }

struct KeptLayout {
  int64_t padded, ld, slab, list;
  int64_t bytes() const {
    return 4 * padded * ld + 4 * padded * slab + round_up(4 * list * padded, 64) + Tokens::bytes(padded) + 256;
  }
};

// A whole segment's distances take at most three quarters of the workspace, packed tokens as much of
// the rest as they need; a single thread packs no more than stays in L2 beside small distances.
bool kept_layout(const Segment& s, int64_t workspace, int threads, KeptLayout& out) {
  const int64_t padded = round_up(s.n, 16), ld = row_length(padded);
  if (padded > 65536 || 4 * padded * ld > workspace / 4 * 3) return false;
  const int64_t words = round_up(gram_words(s.dtype, s.c), kGramBlock);
  const int64_t room = threads == 1 && padded <= 400 ? int64_t(512) << 10 : workspace / 16 * 3;
  const int64_t fitting = std::max(room / (4 * padded) / kGramBlock * kGramBlock, kGramBlock);
  out = {padded, ld, std::min(words, fitting), list_slots(s.k)};
  return true;
}

Status cluster_kept(const Segment& s, const KeptLayout& layout) {
  const ClusterKernels& kernel = kernels().cluster;
  Workspace workspace(layout.bytes());
  if (!workspace) return fail(Status::memory, "expected %lld bytes of workspace, got none", (long long)layout.bytes());
  const int64_t padded = layout.padded, ld = layout.ld;
  float* u = workspace.take<float>(padded * ld);
  float* packed = workspace.take<float>(padded * layout.slab);
  float* list = workspace.take<float>(layout.list * padded);
  const Tokens t(workspace, padded);
  GramBlock block{};
  block.x = s.x, block.dtype = s.dtype, block.x_stride = s.x_stride, block.c = s.c;
  block.rows = {nullptr, 0, s.n, packed, t.norm};
  block.symmetric = true, block.measure = true;
  block.g = u, block.ldg = ld, block.slab = layout.slab, block.threads = s.threads;
  gram_block(block);
  const double unit = block.scale.unit;
  // A quarter of the bytes: such a pass is soon done, and another thread is worth waking later.
  const int64_t pass = s.n * ld, cols = round_up(s.n, kernels().gram.panel);

  if (layout.list > 0) {
    over_columns(s.threads, cols, pass, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < layout.list; ++i)
        std::fill(list + i * padded + begin, list + i * padded + end, kInfinity);
      kernel.nearest(u, ld, s.n, begin, end, layout.list, list, padded);
      densities(list, padded, begin, std::min(end, s.n), s.k, unit, t.density);
    });
  } else {
    parallel_tasks(s.threads, (s.n + 63) / 64, [&](int64_t chunk) {
      std::vector<float> row;
      for (int64_t i = chunk * 64; i < std::min(chunk * 64 + 64, s.n); ++i)
        t.density[i] = density_of_row(u + i * ld, s.n, s.k, unit, row);
    });
  }
  rank_by_density(t, s.n, padded);

  std::fill(t.nearest_higher, t.nearest_higher + s.n, kInfinity);
  std::fill(t.largest, t.largest + s.n, 0.0f);
  parallel_ranges(threads_for(s.threads, pass), s.n, [&](int64_t begin, int64_t end) {
    kernel.higher(u, ld, begin, end, cols, t.rank, t.rank, t.nearest_higher, t.largest);
  });
  std::vector<int32_t> rank_by_index;
  choose_centers(s, t, unit, rank_by_index);

  over_columns(s.threads, cols, s.clusters * ld, [&](int64_t begin, int64_t end) {
    std::fill(t.best + begin, t.best + end, kInfinity);
    kernel.assign(u, ld, t.by_index, s.clusters, 0, begin, end, t.best, t.who);
    write_assignment(s, t, rank_by_index, begin, std::min(end, s.n));
  });
  assign_centers(s, t, rank_by_index);
  return Status::ok;
}

// ---------------------------------------------------------------- distances computed again for every pass

// Blocks of side × side distances and their transposes fill half of the workspace, packed tokens a quarter.
struct SweptLayout {
  int64_t side, slab, list, padded;
  int64_t bytes() const {
    return 8 * side * side + 8 * side * slab + round_up(4 * list * padded, 64) + Tokens::bytes(padded) +
           round_up(4 * side, 64) + 512;
  }
};

SweptLayout swept_layout(const Segment& s) {
  const int64_t side = std::max(int64_t(std::sqrt(double(s.workspace) / 16.0)) / 64 * 64, int64_t(64));
  const int64_t words = round_up(gram_words(s.dtype, s.c), kGramBlock);
  const int64_t slab = std::max(s.workspace / 4 / (8 * side) / kGramBlock * kGramBlock, kGramBlock);
  return {side, std::min(words, slab), list_slots(s.k), round_up(s.n, 16)};
}

Status cluster_swept(const Segment& s) {
  const ClusterKernels& kernel = kernels().cluster;
  const SweptLayout layout = swept_layout(s);
  Workspace workspace(layout.bytes());
  if (!workspace) return fail(Status::memory, "expected %lld bytes of workspace, got none", (long long)layout.bytes());
  const int64_t side = layout.side, padded = layout.padded;
  float* u = workspace.take<float>(side * side);
  float* mirror = workspace.take<float>(side * side);
  float* packed_rows = workspace.take<float>(side * layout.slab);
  float* packed_cols = workspace.take<float>(side * layout.slab);
  float* list = workspace.take<float>(layout.list * padded);
  float* gathered = workspace.take<float>(side);
  const Tokens t(workspace, padded);

  GramBlock block{};
  block.x = s.x, block.dtype = s.dtype, block.x_stride = s.x_stride, block.c = s.c;
  block.ldg = block.ldm = side, block.slab = layout.slab, block.threads = s.threads;
  const GramKernels& gram = kernels().gram;
  const int64_t words = gram_words(s.dtype, s.c);
  for (int64_t begin = 0; begin < s.n; begin += side) {
    const int64_t count = std::min(side, s.n - begin), panels = round_up(count, gram.panel) / gram.panel;
    const char* x = s.x + begin * s.x_stride * size_of(s.dtype);
    for (int64_t word = 0; word < words; word += layout.slab) {
      const GramPack args{x,           s.dtype,       s.x_stride, s.c,
                          nullptr,     count,         word,       std::min(word + layout.slab, words),
                          packed_rows, t.norm + begin};
      parallel_tasks(s.threads, panels, [&](int64_t p) { gram.pack(args, p, p + 1, panels); });
    }
  }
  block.scale = gram_scale(t.norm, s.n, s.c);
  const double unit = block.scale.unit;
  const auto side_of = [&](int64_t begin, float* packed) {
    return GramSide{nullptr, begin, std::min(side, s.n - begin), packed, t.norm + begin};
  };

  // Every pair of blocks once: use(u, row begin, rows, column begin, columns) sees it from both sides.
  const auto sweep = [&](auto&& use) {
    for (int64_t i = 0; i < s.n; i += side)
      for (int64_t j = i; j < s.n; j += side) {
        block.rows = side_of(i, packed_rows), block.cols = side_of(j, packed_cols);
        block.symmetric = i == j;
        block.g = u, block.mirror = mirror;
        gram_block(block);
        use(u, i, block.rows.count, j, std::min(side, s.n - j));
        if (i != j) use(mirror, j, block.cols.count, i, block.rows.count);
      }
  };

  if (layout.list > 0) {
    std::fill(list, list + layout.list * padded, kInfinity);
    sweep([&](const float* part, int64_t, int64_t rows, int64_t col, int64_t cols) {
      over_columns(s.threads, round_up(cols, gram.panel), 4 * rows * cols, [&](int64_t begin, int64_t end) {
        kernel.nearest(part, side, rows, begin, end, layout.list, list + col, padded);
      });
    });
    densities(list, padded, 0, s.n, s.k, unit, t.density);
  } else {
    // Whole rows at a time, as many as the workspace of a block holds.
    const int64_t ld = padded + side, rows_at_once = std::min(2 * side * side / ld / 16 * 16, side);
    if (rows_at_once == 0)
      return fail(Status::memory, "expected a workspace that holds 16 rows of %lld distances, got %lld bytes",
                  (long long)s.n, (long long)s.workspace);
    for (int64_t i = 0; i < s.n; i += rows_at_once) {
      const int64_t rows = std::min(rows_at_once, s.n - i);
      block.symmetric = false, block.mirror = nullptr, block.ldg = ld;
      for (int64_t j = 0; j < s.n; j += side) {
        block.rows = {nullptr, i, rows, packed_rows, t.norm + i};
        block.cols = side_of(j, packed_cols);
        block.g = u + j;
        gram_block(block);
      }
      for (int64_t r = 0; r < rows; ++r) u[r * ld + i + r] = 0.0f;
      parallel_tasks(s.threads, rows, [&](int64_t r) {
        std::vector<float> row;
        t.density[i + r] = density_of_row(u + r * ld, s.n, s.k, unit, row);
      });
    }
    block.ldg = side;
  }
  rank_by_density(t, s.n, padded);

  std::fill(t.nearest_higher, t.nearest_higher + s.n, kInfinity);
  std::fill(t.largest, t.largest + s.n, 0.0f);
  sweep([&](const float* part, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    parallel_ranges(s.threads, rows, [&](int64_t begin, int64_t end) {
      kernel.higher(part, side, begin, end, round_up(cols, gram.panel), t.rank + row, t.rank + col,
                    t.nearest_higher + row, t.largest + row);
    });
  });
  std::vector<int32_t> rank_by_index;
  choose_centers(s, t, unit, rank_by_index);

  std::fill(t.best, t.best + padded, kInfinity);
  std::vector<int32_t> every(static_cast<size_t>(side));
  for (int64_t i = 0; i < side; ++i) every[size_t(i)] = int32_t(i);
  block.symmetric = false, block.mirror = nullptr, block.g = u;
  for (int64_t i = 0; i < s.clusters; i += side) {
    const int64_t rows = std::min(side, s.clusters - i);
    std::fill(gathered, gathered + side, 0.0f);
    for (int64_t r = 0; r < rows; ++r) gathered[r] = t.norm[t.by_index[i + r]];
    for (int64_t j = 0; j < s.n; j += side) {
      block.rows = {t.by_index + i, 0, rows, packed_rows, gathered};
      block.cols = side_of(j, packed_cols);
      gram_block(block);
      over_columns(s.threads, round_up(block.cols.count, gram.panel), 4 * rows * side, [&](int64_t begin, int64_t end) {
        kernel.assign(u, side, every.data(), rows, i, begin, end, t.best + j, t.who + j);
      });
    }
  }
  write_assignment(s, t, rank_by_index, 0, s.n);
  assign_centers(s, t, rank_by_index);
  return Status::ok;
}

Status cluster(const Segment& s, int64_t workspace) {
  if (s.clusters == 0) {
    std::fill(s.assignment, s.assignment + s.n, int64_t(-1));
    return Status::ok;
  }
  KeptLayout layout;
  return kept_layout(s, workspace, s.threads, layout) ? cluster_kept(s, layout) : cluster_swept(s);
}

Status check(const ClusterDpcKnnArgs& a) {
  if (a.num_counts != 1 && a.num_counts != a.segments)
    return fail(Status::value, "expected num_clusters as one number or one for each of %lld segments, got %lld",
                (long long)a.segments, (long long)a.num_counts);
  if (a.k < 1) return fail(Status::value, "expected k of at least 1, got %lld", (long long)a.k);
  if (a.n > std::numeric_limits<int32_t>::max())
    return fail(Status::value, "expected fewer than 2^31 tokens, got %lld", (long long)a.n);
  int64_t before = 0;
  for (int64_t i = 0; a.cu_seqlens && i <= a.segments; ++i) {
    const int64_t at = a.cu_seqlens[i];
    if (at < before || at > a.n || (i == 0 && at != 0))
      return fail(Status::index, "expected cu_seqlens that start at 0, never fall and end at %lld, got %lld at %lld",
                  (long long)a.n, (long long)at, (long long)i);
    before = at;
  }
  if (a.cu_seqlens && before != a.n)
    return fail(Status::index, "expected cu_seqlens that end at %lld, got %lld", (long long)a.n, (long long)before);
  for (int64_t i = 0; i < a.segments; ++i) {
    const int64_t n = a.cu_seqlens ? a.cu_seqlens[i + 1] - a.cu_seqlens[i] : a.n;
    const int64_t count = a.num_clusters[a.num_counts == 1 ? 0 : i];
    if (count < 0 || count > n)
      return fail(Status::value, "expected num_clusters between 0 and the segment's %lld tokens, got %lld",
                  (long long)n, (long long)count);
  }
  return Status::ok;
}

}  // namespace

Status cluster_dpc_knn(const ClusterDpcKnnArgs& a) {
  const Status status = check(a);
  if (status != Status::ok) return status;
  std::vector<Segment> segments;
  segments.reserve(size_t(a.segments));
  int64_t* center = a.center;
  double work = 0;
  for (int64_t i = 0; i < a.segments; ++i) {
    const int64_t first = a.cu_seqlens ? a.cu_seqlens[i] : 0, n = (a.cu_seqlens ? a.cu_seqlens[i + 1] : a.n) - first;
    const int64_t clusters = a.num_clusters[a.num_counts == 1 ? 0 : i];
    if (n > 0)
      segments.push_back({static_cast<const char*>(a.x) + first * a.x_stride * size_of(a.dtype), a.dtype, a.x_stride, n,
                          a.c, std::min(a.k, n), clusters, first, a.assignment + first, center, a.workspace,
                          a.threads});
    center += clusters;
    work += double(n) * double(n);
  }
  // Segments that are a small part of the work go to one thread each, the dearest first; the others
  // use all threads, one after another.
  const int64_t share = a.workspace / std::max(a.threads, 1);
  std::vector<Segment> alone;
  std::vector<Segment*> together;
  for (Segment& s : segments) {
    KeptLayout layout;
    const bool small = double(s.n) * double(s.n) * 4 * a.threads <= work;
    if (a.threads > 1 && small && kept_layout(s, share, 1, layout) && layout.bytes() <= share) {
      s.threads = 1;
      alone.push_back(s);
    } else {
      together.push_back(&s);
    }
  }
  for (Segment* s : together) {
    const Status done = cluster(*s, a.workspace);
    if (done != Status::ok) return done;
  }
  std::stable_sort(alone.begin(), alone.end(), [](const Segment& x, const Segment& y) { return x.n > y.n; });
  std::atomic<bool> failed{false};
  parallel_tasks(a.threads, int64_t(alone.size()), [&](int64_t i) {
    if (cluster(alone[size_t(i)], share) != Status::ok) failed = true;
  });
  if (failed) return fail(Status::memory, "expected %lld bytes of workspace, got none", (long long)a.workspace);
  return Status::ok;
}

}  // namespace vidtok
