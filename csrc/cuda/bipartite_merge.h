// Second half of bipartite matching: the best sources merge, and a run of a sequence's outputs gets its lists, its
// sizes and its rows. Every block of a sequence selects anew, from 4 bytes per source, instead of waiting for another.
#pragma once

#include "cuda/bipartite_match.h"

namespace vidtok::cuda {

struct BipartiteLists {
  int32_t *cu_in, *cu_out;  // cu_out is written where sequences are alike only
  int32_t *anchor, *member, *offset;
  float *weight, *total;  // total may be null
  const float* size;      // null for ones
  int64_t n, m;
};

// Sources that meet a destination of this block: their slots, and the destination's place among the block's outputs.
// Where they are more than the list holds, every destination searches all sources.
constexpr int kMetMost = 1024;

// Shared memory of `outputs` outputs.
struct MergeMemory {
  int32_t *scratch, *anchor, *begin, *more, *lower, *slot, *place, *met;
  float* total;
  int most;
  VIDTOK_DEVICE MergeMemory(Carver& shared, int outputs, int met_most)
      : scratch(shared.take<int32_t>(kRadixScratch<CosineKey>)),
        anchor(shared.take<int32_t>(outputs)),
        begin(shared.take<int32_t>(outputs)),
        more(shared.take<int32_t>(outputs)),
        lower(shared.take<int32_t>(outputs)),
        slot(shared.take<int32_t>(met_most)),
        place(shared.take<int32_t>(met_most)),
        met(shared.take<int32_t>(1)),
        total(shared.take<float>(outputs)),
        most(met_most) {}
};

VIDTOK_DEVICE int64_t two_counts(int low, int high) { return int64_t(high) << 32 | int64_t(low); }
VIDTOK_DEVICE int low_count(int64_t counts) { return int(counts & 0xffffffff); }
VIDTOK_DEVICE int high_count(int64_t counts) { return int(counts >> 32); }

// Up to AHEAD accesses of a row under way at once, from access v on, 32 apart.
template <class T, int N, int AHEAD>
struct RowPieces {
  Vec<T, N> piece[AHEAD];
  VIDTOK_DEVICE RowPieces(const T* from, int v, int per_row) {
    VIDTOK_UNROLL
    for (int a = 0; a < AHEAD; ++a)
      if (v + a * kWarp < per_row) piece[a] = load<T, N>(from + int64_t(v + a * kWarp) * N);
  }
  VIDTOK_DEVICE void store_to(T* to, int v, int per_row) const {
    VIDTOK_UNROLL
    for (int a = 0; a < AHEAD; ++a)
      if (v + a * kWarp < per_row) store(to + int64_t(v + a * kWarp) * N, piece[a]);
  }
};

// Rows of the outputs first .. first + count, a warp per row, N elements of T an access.
template <class T, int N>
VIDTOK_DEVICE void merge_rows(const BipartiteSequence& s, int first, int count, const BipartiteLists& lists,
                              const BipartiteRows& rows, const MergeMemory& memory) {
  constexpr int kCopied = 4, kSummed = N > 4 ? 2 : 4;
  const T* const x = static_cast<const T*>(rows.x) + (s.packed ? s.begin * rows.row : s.index * rows.batch);
  T* const y = static_cast<T*>(rows.y) + (s.out + first) * rows.per_row * N;
  for (int o = warp(); o < count; o += warps()) {
    T* const to = y + int64_t(o) * rows.per_row * N;
    const int more = memory.more[o];
    if (more == 0) {  // bit for bit
      const T* const from = x + memory.anchor[o] * rows.row;
      for (int v = lane(); v < rows.per_row; v += kWarp * kCopied)
        RowPieces<T, N, kCopied>(from, v, rows.per_row).store_to(to, v, rows.per_row);
      continue;
    }
    const int32_t* const member = lists.member + s.begin + memory.begin[o];
    const float total = memory.total[o];
    for (int v = lane(); v < rows.per_row; v += kWarp * kSummed) {
      float sum[kSummed][N] = {};
      for (int i = 0; i <= more; ++i) {
        const float mass = lists.size == nullptr ? 1.0f : lists.size[member[i]];
        const RowPieces<T, N, kSummed> row(x + (member[i] - s.begin) * rows.row, v, rows.per_row);
        VIDTOK_UNROLL
        for (int a = 0; a < kSummed; ++a) {
          VIDTOK_UNROLL
          for (int k = 0; k < N; ++k)
            if (v + a * kWarp < rows.per_row) sum[a][k] = fused(mass, to_float(row.piece[a].v[k]), sum[a][k]);
        }
      }
      VIDTOK_UNROLL
      for (int a = 0; a < kSummed; ++a) {
        if (v + a * kWarp >= rows.per_row) continue;
        Vec<T, N> mean;
        VIDTOK_UNROLL
        for (int k = 0; k < N; ++k) mean.v[k] = from_float<T>(sum[a][k] / total);
        store(to + int64_t(v + a * kWarp) * N, mean);
      }
    }
  }
}

// Which sources merge: those above the cut, and those at it up to a slot.
struct Merging {
  uint32_t prefix;
  int shift;
  int last_tie;
  VIDTOK_DEVICE bool operator()(uint32_t key, int slot) const {
    const uint32_t top = key >> shift;
    return top > prefix || (top == prefix && slot <= last_tie);
  }
};

// Where to cut for the `merges` best of n sources, all but the last tie, of which there are *ties in all.
VIDTOK_DEVICE Merging best_sources(const uint32_t* key, int n, int merges, int32_t* scratch, int64_t* ties) {
  constexpr int kFew = 160;  // so many are ranked by comparing each with each
  if (merges == 0) return {0xffffffffu, 0, -1};
  if (n > kFew || n > threads()) {
    const auto cut = radix_cut<CosineKey>([&](int64_t i, int) { return key[i]; }, n, merges, scratch);
    *ties = cut.ties;
    return {cut.prefix, cut.shift, -1};
  }
  uint32_t* const all = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* const found = all + kFew;
  const int i = thread();
  block_sync();
  if (i < n) all[i] = key[i];
  block_sync();
  if (i < n) {
    const uint32_t mine = all[i];
    int above = 0, equal = 0;
    for (int j = 0; j < n; ++j) {
      above += all[j] > mine;
      equal += all[j] == mine && j < i;
    }
    if (above + equal == merges - 1) {
      found[0] = mine;
      found[1] = uint32_t(equal + 1);
    }
  }
  block_sync();
  *ties = found[1];
  return {found[0], 0, -1};
}

// The lists of the outputs first .. first + count. key[slot] and target[slot] come from match_strip.
VIDTOK_DEVICE void merge_lists(const BipartiteSequence& s, int first, int count, const uint32_t* key,
                               const int32_t* target, const BipartiteLists& lists, const MergeMemory& memory) {
  constexpr int kRun = 4;  // neighbouring slots of a thread
  int64_t* const scratch = reinterpret_cast<int64_t*>(memory.scratch);
  const int merges = s.merges();
  const int slots = (s.tokens + 1) / 2;
  // How the outputs are made up: kept tokens, sources that stay, destinations.
  int sources = s.sources, destinations = s.destinations;
  if (s.mask != nullptr) {
    int64_t free = 0;
    for (int slot = thread(); slot < slots; slot += threads())
      free += two_counts(s.is_source(slot), 2 * slot + 1 < s.tokens && s.is_destination(slot));
    free = block_sum(free, scratch);
    sources = low_count(free);
    destinations = high_count(free);
  }
  const int kept = s.tokens - sources - destinations, before_destinations = kept + sources - merges;
  // Anchors of this block but for the sources that stay.
  for (int o = thread(); o < count; o += threads()) {
    memory.more[o] = memory.lower[o] = 0;
    if (s.mask != nullptr) continue;
    const int output = first + o;
    if (output < kept) memory.anchor[o] = output;
    if (output >= before_destinations) memory.anchor[o] = 2 * (s.first_destination + output - before_destinations) + 1;
  }
  if (thread() == 0) *memory.met = 0;
  const auto place = [&](int output, int token) {
    if (output >= first && output < first + count) memory.anchor[output - first] = token;
  };
  if (s.mask != nullptr) {
    int64_t base = 0;  // sources and destinations so far
    for (int slot0 = 0; slot0 < slots; slot0 += threads()) {
      const int slot = slot0 + thread(), token = 2 * slot;
      const bool even = token < s.tokens, odd = token + 1 < s.tokens;
      const bool source = even && s.is_source(slot), destination = odd && s.is_destination(slot);
      int64_t total = 0;
      const int64_t before = base + block_scan(two_counts(source, destination), scratch, &total);
      base += total;
      const int kept_before = token - low_count(before) - high_count(before);
      if (even && !source) place(kept_before, token);
      if (odd && !destination) place(kept_before + (even && !source), token + 1);
      if (destination) place(before_destinations + high_count(before), token + 1);
    }
  }
  int64_t ties = 0;
  Merging merging = best_sources(key + s.first_source, s.sources, merges, memory.scratch, &ties);
  block_sync();
  // The destinations of this block, in slots.
  const int first_place = smaller(larger(before_destinations - first, 0), count);
  const bool any = first_place < count;
  const int low = any ? memory.anchor[first_place] / 2 : 0, high = any ? memory.anchor[count - 1] / 2 : -1;
  int64_t so_far = 0;
  int sources_so_far = 0, below = 0, last_tie = -1;
  for (int base = 0; base < s.sources; base += threads() * kRun) {
    const int begin = base + thread() * kRun;
    int above = 0, equal = 0, here = 0;
    uint32_t top[kRun];
    bool source[kRun];
    VIDTOK_UNROLL
    for (int i = 0; i < kRun; ++i) {
      const int slot = s.first_source + begin + i;
      source[i] = begin + i < s.sources && s.is_source(slot);
      top[i] = source[i] && merges > 0 ? key[slot] >> merging.shift : 0;
      above += source[i] && merges > 0 && top[i] > merging.prefix;
      equal += source[i] && merges > 0 && top[i] == merging.prefix;
      here += source[i];
    }
    int64_t total = 0;
    const int64_t before = so_far + block_scan(two_counts(above, equal), scratch, &total);
    so_far += total;
    int index = begin;  // among the sources
    if (s.mask != nullptr) {
      int here_total = 0;
      index = sources_so_far + block_scan(here, memory.scratch, &here_total);
      sources_so_far += here_total;
    }
    int better = low_count(before), tie = high_count(before);
    VIDTOK_UNROLL
    for (int i = 0; i < kRun; ++i) {
      if (!source[i]) continue;
      const int slot = s.first_source + begin + i;
      const bool is_better = merges > 0 && top[i] > merging.prefix;
      const bool is_tie = merges > 0 && top[i] == merging.prefix;
      const bool merged = is_better || (is_tie && tie < ties);
      if (merged) {
        const int to = target[slot];
        below += to < low;
        if (to >= low && to <= high) {
          int o = first_place + to - low;
          if (s.mask != nullptr) {
            int from = first_place, upto = count - 1;
            while (from < upto) {
              const int middle = (from + upto) / 2;
              if (memory.anchor[middle] / 2 < to)
                from = middle + 1;
              else
                upto = middle;
            }
            o = from;
          }
          atomic_add(memory.more + o, 1);
          if (slot <= to) atomic_add(memory.lower + o, 1);
          const int at = atomic_add(memory.met, 1);
          if (at < memory.most) {
            memory.slot[at] = slot;
            memory.place[at] = o;
          }
        }
        if (is_tie) last_tie = slot;
      } else {
        place(kept + index - better - int(smaller(int64_t(tie), ties)), 2 * slot);
      }
      better += is_better;
      tie += is_tie;
      ++index;
    }
  }
  below = block_sum(below, memory.scratch);
  merging.last_tie = block_max(last_tie, memory.scratch);
  block_sync();
  // Where each output's members begin.
  int running = first + below;
  for (int base = 0; base < count; base += threads()) {
    const int o = base + thread();
    int total = 0;
    const int begin = running + block_scan(o < count ? 1 + memory.more[o] : 0, memory.scratch, &total);
    running += total;
    if (o >= count) continue;
    memory.begin[o] = begin;
    lists.anchor[s.out + first + o] = int32_t(s.begin + memory.anchor[o]);
    lists.offset[s.out + first + o] = int32_t(s.begin + begin);
    lists.member[s.begin + begin + memory.lower[o]] = int32_t(s.begin + memory.anchor[o]);
  }
  block_sync();
  const int met = *memory.met;
  if (met <= memory.most) {
    for (int e = thread(); e < met; e += threads()) {
      const int slot = memory.slot[e], o = memory.place[e];
      int at = memory.begin[o] + (memory.anchor[o] < 2 * slot);
      for (int other = 0; other < met; ++other) at += memory.place[other] == o && memory.slot[other] < slot;
      lists.member[s.begin + at] = int32_t(s.begin + 2 * int64_t(slot));
    }
  } else {
    for (int o = warp(); o < count; o += warps()) {
      if (memory.more[o] == 0) continue;
      int at = memory.begin[o];
      const int destination = memory.anchor[o] / 2, end = s.first_source + s.sources;
      for (int slot0 = s.first_source; slot0 < end; slot0 += kWarp) {
        const int slot = slot0 + lane();
        const bool here = slot < end && target[slot] == destination && s.is_source(slot) && merging(key[slot], slot);
        const unsigned all = ballot(here);
        if (here)
          lists.member[s.begin + at + popcount(all & lanes_below()) + (destination < slot)] =
              int32_t(s.begin + 2 * int64_t(slot));
        at += popcount(all);
      }
    }
  }
  block_sync();
  for (int o = thread(); o < count; o += threads()) {
    const int64_t begin = s.begin + memory.begin[o], end = begin + 1 + memory.more[o];
    float total = 0.0f;
    for (int64_t i = begin; i < end; ++i) total += lists.size == nullptr ? 1.0f : lists.size[lists.member[i]];
    for (int64_t i = begin; i < end; ++i)
      lists.weight[i] = (lists.size == nullptr ? 1.0f : lists.size[lists.member[i]]) / total;
    memory.total[o] = total;
    if (lists.total != nullptr) lists.total[s.out + first + o] = total;
  }
  if (thread() == 0 && first == 0) {
    lists.cu_in[s.index] = int32_t(s.begin);
    if (lists.cu_out != nullptr) lists.cu_out[s.index] = int32_t(s.out);
  }
  block_sync();
}

}  // namespace vidtok::cuda
