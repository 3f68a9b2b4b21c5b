// Causal attention of a block of query rows over packed keys and values, with a running softmax.
//
// Keys lie in panels [ceil(n / kPanel)][D][kPanel], the transpose that a product with them reads, values in rows
// [n][width]; both in float32 whatever the tensors hold. They are packed once for a head and read by every block of rows.
// A block walks over the keys kKeys at a time: those of one step stay in the second-level cache while all of its tiles of
// kRows rows use them, and the scores of one tile, kRows x kKeys, stay in the first. docs/native.md explains the sizes.
#pragma once

#include "gemm.h"
#include "half.h"

namespace trtpass::TRTPASS_ISA {

inline constexpr int kBlock = 8 * 12;  // query rows of a unit of work; a multiple of kRows everywhere
inline constexpr int kKeys = 256;      // keys of a step; a multiple of kPanel
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kNothing = -__builtin_inff();

struct Widths {
  std::int64_t depth;   // D, of queries and keys
  std::int64_t values;  // Dv
  std::int64_t padded;  // Dv rounded up to panels; the rest is zero

  Widths(std::int64_t d, std::int64_t dv) : depth(d), values(dv), padded(round_up(dv, kPanel)) {}
  std::int64_t key_floats(std::int64_t n) const { return round_up(n, kPanel) * depth; }
  std::int64_t value_floats(std::int64_t n) const { return round_up(n, kPanel) * padded; }
};

// Packs keys [first, first + kPanel) of n into their panel; where fewer are left the rest of it is zero.
// row(i) is the place of the i-th key.
template <class Row>
TRTPASS_INLINE void pack_keys(std::int64_t depth, Type type, std::int64_t first, std::int64_t n, const Row& row,
                              float* keys) {
  const std::int64_t count = n - first < kPanel ? n - first : kPanel;
  const std::int64_t whole = depth / kLanes * kLanes;
  const std::int64_t step = kLanes * static_cast<std::int64_t>(bytes_of(type));
  float* panel = keys + first * depth;
  float tail[kLanes];
  for (std::int64_t half = 0; half < kPanel; half += kLanes) {
    const char* places[kLanes];
    for (std::int64_t j = 0; j < kLanes; ++j)
      places[j] = half + j < count ? static_cast<const char*>(row(first + half + j)) : nullptr;
    for (std::int64_t d = 0; d < whole; d += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = places[j] == nullptr ? Vec{} : load_as(places[j] + d / kLanes * step, type);
      transpose(block);
#pragma GCC unroll 16
      for (int e = 0; e < kLanes; ++e) store(panel + (d + e) * kPanel + half, block[e]);
    }
    for (std::int64_t j = 0; j < kLanes && whole < depth; ++j) {
      for (std::int64_t e = 0; e < kLanes; ++e) tail[e] = 0.0f;
      if (places[j] != nullptr) read_row(tail, places[j] + whole / kLanes * step, type, depth - whole);
      for (std::int64_t e = 0; e < depth - whole; ++e) panel[(whole + e) * kPanel + half + j] = tail[e];
    }
  }
}

// Packs keys and values [first, first + kPanel) of n; row(i) is the Place of the i-th.
template <class Row>
TRTPASS_INLINE void pack_panel(const Widths& w, Type type, std::int64_t first, std::int64_t n, const Row& row,
                               float* keys, float* values) {
  pack_keys(w.depth, type, first, n, [&](std::int64_t i) { return row(i).key; }, keys);
  for (std::int64_t i = first; i < first + kPanel; ++i) {
    float* value = values + i * w.padded;
    if (i < n) read_row(value, row(i).value, type, w.values);
    const std::int64_t from = i < n ? w.values : 0;
    zero_row(value + from, Type::float32, w.padded - from);
  }
}

struct Place {
  const void* key;
  const void* value;
};

// What one worker needs for a block.
struct Block {
  float* queries;  // [kBlock][depth], scaled by scale * log2(e)
  float* rows;     // [kBlock][padded]: sums of values, not yet divided
  float* scores;   // [kRows][kKeys]
  float* largest;  // [kBlock]
  float* total;    // [kBlock]

  static std::int64_t floats(const Widths& w) {
    return kBlock * (w.depth + w.padded) + kRows * kKeys + round_up(2 * kBlock, kLanes);
  }
  Block(const Widths& w, float* memory)
      : queries(memory),
        rows(queries + kBlock * w.depth),
        scores(rows + kBlock * w.padded),
        largest(scores + kRows * kKeys),
        total(largest + kBlock) {}
};

// scores[0, n) to weights 2^(score - maximum), the running maximum and total brought up to date, and the sums of values so
// far made relative to the new maximum. NaN stays NaN.
TRTPASS_INLINE void soften(float* scores, std::int64_t n, float& maximum, float& total, float* row, std::int64_t width) {
  const std::int64_t end = round_up(n, kLanes);
  for (std::int64_t j = n; j < end; ++j) scores[j] = kNothing;
  Vec high = splat(kNothing);
  for (std::int64_t j = 0; j < end; j += kLanes) high = larger(high, load(scores + j));
  const float found = trtpass::TRTPASS_ISA::largest(high);
  if (found > maximum) {
    if (total > 0.0f) {
      const float shrink = exp2(splat(maximum - found))[0];
      for (std::int64_t d = 0; d < width; d += kLanes) store(row + d, load(row + d) * shrink);
      total *= shrink;
    }
    maximum = found;
  }
  const Vec base = splat(maximum == kNothing ? 0.0f : maximum);
  Vec sums[2] = {};
  std::int64_t j = 0;
  for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
    const Vec a = exp2(load(scores + j) - base), b = exp2(load(scores + j + kLanes) - base);
    store(scores + j, a);
    store(scores + j + kLanes, b);
    sums[0] += a;
    sums[1] += b;
  }
  if (j < end) {
    const Vec a = exp2(load(scores + j) - base);
    store(scores + j, a);
    sums[0] += a;
  }
  total += sum(sums[0] + sums[1]);
}

// block.rows and block.total for `count` queries, of which query i sees the first visible + i keys (none if not above 0).
// Exactly causal: a key that a query does not see is not multiplied by zero but left out, so its NaN goes nowhere.
inline void attend(const Widths& w, const Block& block, std::int64_t count, std::int64_t visible, const float* keys,
                   const float* values) {
  for (std::int64_t i = 0; i < kBlock; ++i) {
    block.largest[i] = kNothing;
    block.total[i] = 0.0f;
  }
  zero_row(block.rows, Type::float32, kBlock * w.padded);
  const std::int64_t all = visible + count - 1;
  for (std::int64_t start = 0; start < all; start += kKeys) {
    for (std::int64_t first = 0; first < count; first += kRows) {
      const std::int64_t last = first + kRows < count ? first + kRows : count;
      const std::int64_t end = visible + last - 1 < start + kKeys ? visible + last - 1 : start + kKeys;
      const std::int64_t n = end - start;  // keys of this step that the tile's last row sees
      if (n <= 0) continue;
      const float* queries = block.queries + first * w.depth;
      const float* panel = keys + start * w.depth;
      for (std::int64_t p = 0; p < n; p += kPanel, panel += kPanel * w.depth) {
        if (n - p > kLanes)
          tile<kRows, 2, false>(queries, w.depth, panel, kPanel, w.depth, block.scores + p, kKeys);
        else
          tile<kRows, 1, false>(queries, w.depth, panel, kPanel, w.depth, block.scores + p, kKeys);
      }
      std::int64_t shared = visible + first - start;  // keys that every row of the tile sees
      shared = shared < 0 ? 0 : shared < n ? shared : n;
      float* rows = block.rows + first * w.padded;
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t seen = visible + i - start < n ? visible + i - start : n;
        if (seen > 0)
          soften(block.scores + (i - first) * kKeys, seen, block.largest[i], block.total[i], block.rows + i * w.padded,
                 w.padded);
      }
      const float* step = values + start * w.padded;
      if (shared > 0)
        for (std::int64_t d = 0; d < w.padded; d += kPanel)
          tile<kRows, 2, true>(block.scores, kKeys, step + d, w.padded, shared, rows + d, w.padded);
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t seen = visible + i - start < n ? visible + i - start : n;
        if (seen <= shared) continue;
        const float* weights = block.scores + (i - first) * kKeys + shared;
        const float* own = step + shared * w.padded;
        float* row = block.rows + i * w.padded;
        std::int64_t d = 0;
        for (; d + 2 * kPanel <= w.padded; d += 2 * kPanel)
          tile<1, 4, true>(weights, kKeys, own + d, w.padded, seen - shared, row + d, w.padded);
        for (; d < w.padded; d += kPanel)
          tile<1, 2, true>(weights, kKeys, own + d, w.padded, seen - shared, row + d, w.padded);
      }
    }
  }
}

// Keys and values of several sets, packed: scratch memory of a call.
struct Packed {
  const Widths& widths;
  std::int64_t most;  // rows of the largest set
  float *keys, *values;

  float* keys_of(std::int64_t set) const { return keys + set * widths.key_floats(most); }
  float* values_of(std::int64_t set) const { return values + set * widths.value_floats(most); }
};

// Packs all sets on all threads: count(set) rows each, `most` at most; place(set, i) is the Place of the i-th.
template <class Count, class At>
TRTPASS_INLINE Packed pack_all(Call& call, const Widths& w, Type type, std::int64_t sets, std::int64_t most,
                               const Count& count, const At& place) {
  const Packed packed{w, most, call.scratch_floats(sets * w.key_floats(most)),
                      call.scratch_floats(sets * w.value_floats(most))};
  constexpr int kTogether = 8;  // panels of a unit
  const std::int64_t panels = (most + kPanel - 1) / kPanel;
  call.parallel(sets * ((panels + kTogether - 1) / kTogether), [&](std::int64_t unit, int) {
    const std::int64_t set = unit % sets, n = count(set);
    const auto row = [&](std::int64_t i) { return place(set, i); };
    for (std::int64_t p = unit / sets * kTogether, end = p + kTogether; p < end && p * kPanel < n; ++p)
      pack_panel(w, type, p * kPanel, n, row, packed.keys_of(set), packed.values_of(set));
  });
  return packed;
}

// The query rows of a head: `count` of them attend to a packed set, of which the first row sees `visible` keys.
struct Queries {
  std::int64_t set, count, visible;
};

// Attends on all threads. of(head) are its Queries, `most` at most; query(head, i) is the place of the i-th; and
// write(head, first, rows, block) takes over what rows [first, first + rows) came to; once for a head without rows.
//
// Units go head by head, so that its keys and values stay in the caches; of a head the last blocks first: they see most
// keys, and what is left at the end should be small.
template <class Of, class Query, class Write>
TRTPASS_INLINE void attend_all(Call& call, const Packed& packed, Type type, float scale, std::int64_t heads,
                               std::int64_t most, const Of& of, const Query& query, const Write& write) {
  const Widths& w = packed.widths;
  const std::int64_t blocks = most == 0 ? 1 : (most + kBlock - 1) / kBlock;
  const std::int64_t floats = round_up(Block::floats(w), 16);
  float* memory = call.scratch_floats(floats * call.workers());
  call.parallel(heads * blocks, [&](std::int64_t unit, int worker) {
    const std::int64_t head = unit / blocks, first = (blocks - 1 - unit % blocks) * kBlock;
    const Queries mine = of(head);
    if (first > 0 && first >= mine.count) return;
    const std::int64_t rows = mine.count - first < kBlock ? mine.count - first : kBlock;
    const Block block(w, memory + worker * floats);
    for (std::int64_t i = 0; i < rows; ++i)
      read_row(block.queries + i * w.depth, query(head, first + i), type, w.depth, scale);
    for (std::int64_t i = rows * w.depth; i < round_up(rows, kRows) * w.depth; ++i) block.queries[i] = 0.0f;
    if (rows > 0)
      attend(w, block, rows, mine.visible + first, packed.keys_of(mine.set), packed.values_of(mine.set));
    write(head, first, rows, block);
  });
}

// The factor of the scores in powers of two; 0 was given where it is 1 / sqrt(D).
TRTPASS_INLINE float exponent_scale(float given, std::int64_t depth) {
  return (given != 0.0f ? given : 1.0f / __builtin_sqrtf(static_cast<float>(depth))) * kLog2e;
}

}  // namespace trtpass::TRTPASS_ISA
