// CausalAttention: the dense form of the same kernel that attends among selected tokens.
#include "attention.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

TRTPASS_KERNEL(causal_attention) {
  const Tensor &q = call.input("q"), &k = call.input("k"), &v = call.input("v");
  const std::int64_t batch = call.size("B"), heads = call.size("H"), key_heads = call.size("Hkv");
  const std::int64_t tokens = call.size("S");
  const Widths w(call.size("D"), call.size("Dv"));
  if (key_heads < 1 || heads % key_heads)
    fail("CausalAttention has H = %lld and Hkv = %lld; expected a multiple", (long long)heads, (long long)key_heads);
  const float given = call.number("scale");
  const float scale = (given != 0.0f ? given : 1.0f / __builtin_sqrtf(static_cast<float>(w.depth))) * kLog2e;
  Tensor out = call.output("out", {batch, heads, tokens, w.values});

  const std::int64_t owners = batch * key_heads, panels = (tokens + kPanel - 1) / kPanel;
  float* keys = call.scratch_floats(owners * w.key_floats(tokens));
  float* values = call.scratch_floats(owners * w.value_floats(tokens));
  constexpr int kTogether = 8;  // panels of a unit of packing
  call.parallel(owners * ((panels + kTogether - 1) / kTogether), [&](std::int64_t unit, int) {
    const std::int64_t owner = unit % owners, b = owner / key_heads, g = owner % key_heads;
    const auto place = [&](std::int64_t i) { return Place{k.row(b, g, i), v.row(b, g, i)}; };
    for (std::int64_t p = unit / owners * kTogether, end = p + kTogether; p < end && p < panels; ++p)
      pack_panel(w, q.type, p * kPanel, tokens, place, keys + owner * w.key_floats(tokens),
                 values + owner * w.value_floats(tokens));
  });

  // Head by head, so that its keys and values stay in the caches; of a head the last blocks first: they see most keys.
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  const std::int64_t floats = round_up(Block::floats(w), 16);
  float* memory = call.scratch_floats(floats * call.workers());
  call.parallel(batch * heads * blocks, [&](std::int64_t unit, int worker) {
    const std::int64_t b = unit / blocks / heads, h = unit / blocks % heads, owner = b * key_heads + h * key_heads / heads;
    const std::int64_t first = (blocks - 1 - unit % blocks) * kBlock;
    const std::int64_t rows = tokens - first < kBlock ? tokens - first : kBlock;
    const Block block(w, memory + worker * floats);
    for (std::int64_t i = 0; i < rows; ++i)
      read_row(block.queries + i * w.depth, q.row(b, h, first + i), q.type, w.depth, scale);
    for (std::int64_t i = rows * w.depth; i < round_up(rows, kRows) * w.depth; ++i) block.queries[i] = 0.0f;
    attend(w, block, rows, first + 1, keys + owner * w.key_floats(tokens), values + owner * w.value_floats(tokens));
    for (std::int64_t i = 0; i < rows; ++i)
      write_row(out.row(b, h, first + i), out.type, block.rows + i * w.padded, w.values, 1.0f / block.total[i]);
  });
}
