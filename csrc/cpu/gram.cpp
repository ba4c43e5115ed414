#include "cpu/gram.h"

#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

constexpr double kSteps = 1048576.0;
// Panels per side of a tile: its rows of one block stay in L2, and a column group in L1.
constexpr int64_t kTileSides[] = {12, 6, 3};

struct Tile {
  int64_t row_begin, row_end, panel_begin, panel_end;
  bool triangle;
};

// Tiles from the dearest to the cheapest, so that the last ones even out the threads.
std::vector<Tile> tiles_of(const GramBlock& b, int64_t panel) {
  const int64_t cols = b.symmetric ? b.rows.count : b.cols.count;
  const int64_t whole = b.rows.count / panel, tail = b.rows.count % panel;
  const int64_t row_panels = b.symmetric ? whole : round_up(b.rows.count, panel) / panel;
  const int64_t col_panels = b.symmetric ? whole : round_up(cols, panel) / panel;
  int64_t side = kTileSides[0];
  for (const int64_t s : kTileSides) {
    side = s;
    const int64_t count = (row_panels / s) * (col_panels / s) / (b.symmetric ? 2 : 1);
    if (b.threads == 1 || count >= 16 * b.threads) break;
  }
  std::vector<Tile> tiles;
  const int64_t last_row = b.symmetric ? whole * panel : b.rows.count;
  // A last tile of one or two panels would keep few sums at a time, so it joins the one before.
  const auto end_of = [side](int64_t begin, int64_t panels) {
    return panels - begin < side + 3 ? panels : begin + side;
  };
  const auto add = [&](int64_t i, int64_t i_end, int64_t j, bool triangle) {
    const int64_t row_end = i_end * panel < last_row ? i_end * panel : last_row;
    tiles.push_back({i * panel, row_end, j, end_of(j, col_panels), triangle});
  };
  for (int64_t i = 0, i_end; i < row_panels; i = i_end) {
    i_end = end_of(i, row_panels);
    for (int64_t j = b.symmetric ? i_end : 0; j < col_panels; j = end_of(j, col_panels)) add(i, i_end, j, false);
  }
  if (!b.symmetric) return tiles;
  for (int64_t i = 0; i < row_panels; i = end_of(i, row_panels)) add(i, end_of(i, row_panels), i, true);
  // Tokens beyond the last whole panel meet all columns as a few rows, which costs less than a padded panel of columns.
  for (int64_t j = 0; tail > 0 && j <= whole; j += 4 * side)
    tiles.push_back({whole * panel, b.rows.count, j, j + 4 * side < whole + 1 ? j + 4 * side : whole + 1, false});
  return tiles;
}

}  // namespace

int64_t gram_words(DType dtype, int64_t c) {
  const GramKernels& k = kernels().gram;
  const int64_t words = round_up(k.words(dtype, c), k.panel);
  return words > 0 ? words : k.panel;
}

GramScale gram_scale(const float* norm, int64_t count, int64_t c) {
  const double channels = double(c > 0 ? c : 1);
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i)
    if (norm[i] > largest && std::isfinite(norm[i])) largest = norm[i];
  if (!(largest > 0.0f)) return {0.0f, 0.0};
  const double scale = std::exp2(std::ceil(std::log2(double(largest) / channels)));
  return {float(kSteps / (channels * scale)), scale / kSteps};
}

void gram_block(GramBlock& b) {
  const GramKernels& kernel = kernels().gram;
  const int64_t panel = kernel.panel, words = gram_words(b.dtype, b.c);
  const GramSide& cols = b.symmetric ? b.rows : b.cols;
  const std::vector<Tile> tiles = tiles_of(b, panel);
  const int64_t width = b.dtype == DType::f32 ? 4 : 2;
  const auto pack = [&](const GramSide& side, int64_t begin, int64_t end) {
    const char* x = static_cast<const char*>(b.x) + side.begin * b.x_stride * width;
    const GramPack args{x,          b.dtype, b.x_stride, b.c,         side.token,
                        side.count, begin,   end,        side.packed, b.measure ? side.norm : nullptr};
    const int64_t panels = round_up(side.count, panel) / panel;
    parallel_tasks(b.threads, panels, [&](int64_t p) { kernel.pack(args, p, p + 1, panels); });
  };
  for (int64_t begin = 0; begin < words; begin += b.slab) {
    const int64_t end = begin + b.slab < words ? begin + b.slab : words;
    pack(b.rows, begin, end);
    if (!b.symmetric) pack(b.cols, begin, end);
    if (b.measure && end == words) b.scale = gram_scale(b.rows.norm, b.rows.count, b.c);
    // A factor beyond fp32 makes every distance infinite or NaN: all are the largest.
    const bool overflow = !std::isfinite(b.scale.factor);
    parallel_tasks(b.threads, int64_t(tiles.size()), [&](int64_t i) {
      const Tile& t = tiles[size_t(i)];
      kernel.tile(
          {b.rows.packed, cols.packed, round_up(b.rows.count, panel) / panel, round_up(cols.count, panel) / panel,
           end - begin, b.g, b.ldg, t.row_begin, t.row_end, t.panel_begin, t.panel_end, begin == 0, t.triangle},
          b.dtype);
      if (end < words) return;
      kernel.units({b.g, b.ldg, b.symmetric ? b.g : b.mirror, b.symmetric ? b.ldg : b.ldm, b.rows.norm, cols.norm,
                    b.rows.count, cols.count, overflow ? 0.0f : b.scale.factor, kGramLargest,
                    overflow ? kGramLargest : 0.0f, t.row_begin, t.row_end, t.panel_begin, t.panel_end, b.symmetric});
    });
  }
}

}  // namespace vidtok
