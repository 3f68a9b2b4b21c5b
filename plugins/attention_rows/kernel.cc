// AttentionRows. A few rows: each head by itself, its keys read once, in place. Many rows: a tile of them against keys
// that are packed once, head by head, the mean added up in place.
#include "attention.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr int kTile = 12;  // rows of a unit; a multiple of kRows everywhere
constexpr int kFew = 4;    // up to so many rows packing costs more than it saves

// scores[0, limit), in powers of two, plus the bias to weights 2^(score - maximum); their sum. The scores have room for
// whole vectors; the bias of what is not seen goes nowhere.
float weigh(float* scores, const float* bias, std::int64_t limit) {
  const std::int64_t end = round_up(limit, kLanes);
  for (std::int64_t j = 0; j < limit; ++j) scores[j] += bias[j];
  for (std::int64_t j = limit; j < end; ++j) scores[j] = kNothing;
  Vec high = splat(kNothing);
  for (std::int64_t j = 0; j < end; j += kLanes) high = larger(high, load(scores + j));
  const float maximum = largest(high);
  const Vec base = splat(maximum == kNothing ? 0.0f : maximum);
  Vec total = {};
  for (std::int64_t j = 0; j < end; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - base);
    store(scores + j, weight);
    total += weight;
  }
  return sum(total);
}

// sums[0, limit) (+)= weights[0, limit) * factor; both have room for whole vectors.
void add_weights(float* sums, const float* weights, std::int64_t limit, float factor, bool first) {
  for (std::int64_t j = 0; j < limit; j += kLanes)
    store(sums + j, (first ? Vec{} : load(sums + j)) + load(weights + j) * factor);
}

// to[0, kLanes) = products of a query, with zeros up to a whole vector, and kLanes keys: a sum a lane of each, which one
// transpose turns into a lane a key.
TRTPASS_INLINE void multiply(float* to, const float* query, const char* const (&keys)[kLanes], Type type,
                             std::int64_t depth) {
  const auto bytes = static_cast<std::int64_t>(bytes_of(type));
  Vec sums[kLanes] = {};
  std::int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    const Vec part = load(query + d);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) sums[l] += part * load_as(keys[l] + d * bytes, type);
  }
  for (int l = 0; l < kLanes && d < depth; ++l) {
    float tail[kLanes] = {};
    read_row(tail, keys[l] + d * bytes, type, depth - d);
    sums[l] += load(query + d) * load(tail);
  }
  transpose(sums);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  store(to, sums[0]);
}

struct Rows {
  const Tensor &q, &k;
  const std::int32_t *row, *lengths;
  std::int64_t batch, heads, key_heads, rows, tokens, depth;
  std::int64_t padded;  // tokens, with room for whole panels
  bool causal;
  float scale;
  float* bias;  // [B, S], in powers of two

  std::int64_t length(std::int64_t b) const {
    const std::int64_t given = lengths[b];
    return given < 0 ? 0 : given < tokens ? given : tokens;
  }
  // Keys that a row sees: none if it is not a valid one.
  std::int64_t limit(std::int64_t b, std::int64_t r) const {
    const std::int64_t i = row[b * rows + r], end = length(b);
    return i < 0 || i >= end ? 0 : causal ? i + 1 : end;
  }
  void read_query(float* to, std::int64_t b, std::int64_t h, std::int64_t r) const {
    read_row(to, q.row(b, h, row[b * rows + r]), q.type, depth, scale);
  }
  const char* key(std::int64_t b, std::int64_t h, std::int64_t j) const {
    return static_cast<const char*>(k.row(b, h * key_heads / heads, j));
  }
};

void few_rows(Call& call, const Rows& all, Tensor& prob) {
  const std::int64_t wide = round_up(all.depth, 16), units = all.batch * all.heads;
  float* memory = call.scratch_floats(call.workers() * kFew * wide);
  float* weights = call.scratch_floats(units * all.rows * all.padded);  // [B, H, R, padded]
  float* totals = call.scratch_floats(units * all.rows);
  call.parallel(units, [&](std::int64_t unit, int worker) {
    const std::int64_t b = unit / all.heads, h = unit % all.heads;
    float* queries = memory + worker * kFew * wide;
    float* scores = weights + unit * all.rows * all.padded;
    std::int64_t limits[kFew], most = 0;
    for (std::int64_t r = 0; r < all.rows; ++r) {
      limits[r] = all.limit(b, r);
      most = limits[r] > most ? limits[r] : most;
      zero_row(queries + r * wide, Type::float32, wide);
      if (limits[r] > 0) all.read_query(queries + r * wide, b, h, r);
    }
    for (std::int64_t j = 0; j < most; j += kLanes) {
      const char* keys[kLanes];  // behind the last one that is seen, the last one again
      for (std::int64_t l = 0; l < kLanes; ++l) keys[l] = all.key(b, h, j + l < most ? j + l : most - 1);
      for (std::int64_t r = 0; r < all.rows; ++r)
        multiply(scores + r * all.padded + j, queries + r * wide, keys, all.k.type, all.depth);
    }
    for (std::int64_t r = 0; r < all.rows; ++r)
      totals[unit * all.rows + r] = weigh(scores + r * all.padded, all.bias + b * all.tokens, limits[r]);
  });
  call.parallel(all.batch * all.rows, [&](std::int64_t unit, int) {
    const std::int64_t b = unit / all.rows, r = unit % all.rows, limit = all.limit(b, r);
    float* sums = weights + (b * all.heads * all.rows + r) * all.padded;  // of head 0
    for (std::int64_t h = 0; h < all.heads; ++h) {
      const std::int64_t at = (b * all.heads + h) * all.rows + r;
      const float factor = 1.0f / (totals[at] * static_cast<float>(all.heads));
      if (h == 0)
        for (std::int64_t j = 0; j < limit; j += kLanes) store(sums + j, load(sums + j) * factor);
      else
        add_weights(sums, weights + at * all.padded, limit, factor, false);
    }
    write_row(prob.row(b, r), Type::float32, sums, limit);
    zero_row(static_cast<float*>(prob.row(b, r)) + limit, Type::float32, all.tokens - limit);
  });
}

void many_rows(Call& call, const Rows& all, Tensor& prob) {
  const std::int64_t owners = all.batch * all.key_heads, panels = all.padded / kPanel;
  const std::int64_t key_floats = all.padded * all.depth;
  float* keys = call.scratch_floats(owners * key_floats);
  constexpr int kTogether = 8;  // panels of a unit of packing
  call.parallel(owners * ((panels + kTogether - 1) / kTogether), [&](std::int64_t unit, int) {
    const std::int64_t owner = unit % owners, b = owner / all.key_heads, g = owner % all.key_heads;
    const std::int64_t length = all.length(b);
    const auto place = [&](std::int64_t j) { return all.k.row(b, g, j); };
    for (std::int64_t p = unit / owners * kTogether, end = p + kTogether; p < end && p * kPanel < length; ++p)
      pack_keys(all.depth, all.k.type, p * kPanel, length, place, keys + owner * key_floats);
  });

  const std::int64_t tiles = (all.rows + kTile - 1) / kTile;
  const std::int64_t floats = round_up(kTile * (all.depth + 2 * all.padded), 16);  // queries, scores, sums
  float* memory = call.scratch_floats(floats * call.workers());
  call.parallel(all.batch * tiles, [&](std::int64_t unit, int worker) {
    const std::int64_t b = unit / tiles, first = unit % tiles * kTile;
    const std::int64_t count = all.rows - first < kTile ? all.rows - first : kTile;
    float* queries = memory + worker * floats;
    float* scores = queries + kTile * all.depth;
    float* sums = scores + kTile * all.padded;
    std::int64_t limits[kTile] = {}, most = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      limits[i] = all.limit(b, first + i);
      most = limits[i] > most ? limits[i] : most;
    }
    zero_row(queries, Type::float32, kTile * all.depth);
    for (std::int64_t h = 0; h < all.heads && most > 0; ++h) {
      for (std::int64_t i = 0; i < count; ++i)
        if (limits[i] > 0) all.read_query(queries + i * all.depth, b, h, first + i);
      const float* packed = keys + (b * all.key_heads + h * all.key_heads / all.heads) * key_floats;
      for (std::int64_t p = 0; p < most; p += kPanel)
        for (std::int64_t i = 0; i < count; i += kRows)
          tile<kRows, 2, false>(queries + i * all.depth, all.depth, packed + p * all.depth, kPanel, all.depth,
                                scores + i * all.padded + p, all.padded);
      for (std::int64_t i = 0; i < count; ++i) {
        if (limits[i] == 0) continue;
        float* row = scores + i * all.padded;
        const float total = weigh(row, all.bias + b * all.tokens, limits[i]);
        add_weights(sums + i * all.padded, row, limits[i], 1.0f / (total * static_cast<float>(all.heads)), h == 0);
      }
    }
    for (std::int64_t i = 0; i < count; ++i) {
      float* to = static_cast<float*>(prob.row(b, first + i));
      write_row(to, Type::float32, sums + i * all.padded, limits[i]);
      zero_row(to + limits[i], Type::float32, all.tokens - limits[i]);
    }
  });
}

}  // namespace

TRTPASS_KERNEL(attention_rows) {
  const Tensor &q = call.input("q"), &k = call.input("k");
  const std::int64_t batch = call.size("B"), heads = call.size("H"), key_heads = call.size("Hkv");
  const std::int64_t tokens = call.size("S"), depth = call.size("D"), rows = call.size("R");
  const std::int64_t causal = call.integer("causal");
  if (key_heads < 1 || heads % key_heads)
    fail("AttentionRows has H = %lld and Hkv = %lld; expected a multiple", (long long)heads, (long long)key_heads);
  if (causal != 0 && causal != 1) fail("AttentionRows.causal is %lld; expected 0 or 1", (long long)causal);
  const std::int64_t padded = round_up(tokens, kPanel);
  Tensor prob = call.output("prob", {batch, rows, tokens});

  float* bias = call.scratch_floats(batch * tokens);
  const Rows all{q,    k,      call.input("row").ints(), call.input("lengths").ints(), batch, heads, key_heads,
                 rows, tokens, depth, padded, causal == 1, exponent_scale(call.number("scale"), depth), bias};
  read_row(bias, call.input("bias").data, Type::float32, batch * tokens, kLog2e);
  if (rows <= kFew)
    few_rows(call, all, prob);
  else
    many_rows(call, all, prob);
}
