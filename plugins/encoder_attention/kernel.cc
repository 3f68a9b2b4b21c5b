// EncoderAttention. A unit is some query rows of one head: it packs the head's keys and values for itself, which an
// encoder's few hundred tokens allow, so that both stay in its core's cache. The bias of the keys is one more column of
// theirs, which every query multiplies by 1: it costs one step in D + 1 and no pass over the scores.
#include "attention.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr std::int64_t kStep = 384;  // keys of a step at most, a multiple of kPanel everywhere: 12 rows of scores in L1
constexpr std::int64_t kUnits = 8;   // heads and their shares together, at least, where there are as many tiles

}  // namespace

TRTPASS_KERNEL(encoder_attention) {
  const Tensor &q = call.input("q"), &k = call.input("k"), &v = call.input("v"), &bias = call.input("bias");
  const std::int64_t batch = call.size("B"), heads = call.size("H"), key_heads = call.size("Hkv");
  const std::int64_t tokens = call.size("S"), depth = call.size("D");
  if (key_heads < 1 || heads % key_heads)
    fail("EncoderAttention has H = %lld and Hkv = %lld; expected a multiple", (long long)heads, (long long)key_heads);
  const Widths w(depth + 1, call.size("Dv"));  // with the bias
  const float scale = exponent_scale(call.number("scale"), depth);
  Tensor out = call.output("out", {batch, heads, tokens, w.values});
  if (batch * heads * tokens == 0) return;

  const std::int64_t steps = (tokens + kStep - 1) / kStep, step = round_up((tokens + steps - 1) / steps, kPanel);
  const std::int64_t tiles = (tokens + kRows - 1) / kRows;
  const std::int64_t wanted = (kUnits + batch * heads - 1) / (batch * heads), shares = wanted < tiles ? wanted : tiles;
  const std::int64_t key_floats = w.key_floats(tokens), value_floats = w.value_floats(tokens);
  const std::int64_t floats =
      round_up(key_floats + value_floats + kRows * (w.depth + w.padded + step + 2) + kLanes, 16);
  float* memory = call.scratch_floats(floats * call.workers());

  call.parallel(batch * heads * shares, [&](std::int64_t unit, int worker) {
    const std::int64_t b = unit / shares / heads, h = unit / shares % heads, g = h * key_heads / heads;
    float* keys = memory + worker * floats;
    float* values = keys + key_floats;
    float* queries = values + value_floats;    // [kRows][depth + 1]
    float* rows = queries + kRows * w.depth;   // [kRows][padded]
    float* scores = rows + kRows * w.padded;   // [kRows][step]
    float* most = scores + kRows * step;       // [kRows]
    float* total = most + kRows;               // [kRows]
    for (std::int64_t first = 0; first < tokens; first += kPanel) {
      // A panel is one row longer than the keys are wide, so the next one starts that much later.
      pack_keys(depth, k.type, first, tokens, [&](std::int64_t j) { return k.row(b, g, j); }, keys + first);
      float* last = keys + first * w.depth + depth * kPanel;
      for (std::int64_t j = 0; j < kPanel; ++j)
        last[j] = first + j < tokens ? bias.floats()[b * tokens + first + j] * kLog2e : 0.0f;
      for (std::int64_t i = first; i < first + kPanel; ++i) {
        if (i < tokens) read_row(values + i * w.padded, v.row(b, g, i), v.type, w.values);
        const std::int64_t from = i < tokens ? w.values : 0;
        zero_row(values + i * w.padded + from, Type::float32, w.padded - from);
      }
    }
    const std::int64_t share = unit % shares;
    for (std::int64_t t = tiles * share / shares, end = tiles * (share + 1) / shares; t < end; ++t) {
      const std::int64_t first = t * kRows, count = tokens - first < kRows ? tokens - first : kRows;
      for (std::int64_t i = 0; i < kRows; ++i) {
        float* query = queries + i * w.depth;
        if (i < count)
          read_row(query, q.row(b, h, first + i), q.type, depth, scale);
        else
          zero_row(query, Type::float32, depth);
        query[depth] = 1.0f;
        most[i] = kNothing;
        total[i] = 0.0f;
      }
      zero_row(rows, Type::float32, kRows * w.padded);
      for (std::int64_t start = 0; start < tokens; start += step) {
        const std::int64_t n = tokens - start < step ? tokens - start : step;
        const float* panel = keys + start * w.depth;
        for (std::int64_t p = 0; p < n; p += kPanel, panel += kPanel * w.depth) {
          if (n - p > kLanes)
            tile<kRows, 2, false>(queries, w.depth, panel, kPanel, w.depth, scores + p, step);
          else
            tile<kRows, 1, false>(queries, w.depth, panel, kPanel, w.depth, scores + p, step);
        }
        for (std::int64_t i = 0; i < count; ++i)
          soften(scores + i * step, n, most[i], total[i], rows + i * w.padded, w.padded);
        for (std::int64_t d = 0; d < w.padded; d += kPanel)
          tile<kRows, 2, true>(scores, step, values + start * w.padded + d, w.padded, n, rows + d, w.padded);
      }
      for (std::int64_t i = 0; i < count; ++i)
        write_row(out.row(b, h, first + i), out.type, rows + i * w.padded, w.values, 1.0f / total[i]);
    }
  });
}
