// ConnectedComponents: the edges as a matrix of bits, then a search through it, a word of neighbours at a time.
//
// Of the products only the lower triangle is computed, in units of a strip of columns times a segment of rows; its bits
// are mirrored 32 x 32 at a time by the unit that found them. There is never a matrix of floats, and each word of bits
// has one writer.
#include "cosine.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr int kTogether = 96;        // rows whose bits are mirrored together: a multiple of kRows and of kWord
constexpr int kSegment = 4 * kTogether;  // most rows of a unit

struct Unit {
  std::int32_t row;      // of the batch
  std::int32_t column;   // first of the strip
  std::int32_t first;    // row of the triangle that it starts at
};

// Which lanes are above tau, as bits.
TRTPASS_INLINE std::uint32_t above(Vec x, float tau) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(tau), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)(x > splat(tau))));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps((__m128)(x > splat(tau))));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(x[i] > tau) << i;
  return bits;
#endif
}

// Bit j of word i to bit i of word j: exchanges the off-diagonal quarters of ever smaller squares.
void transpose_bits(std::uint32_t* words) {
  std::uint32_t low = 0x0000ffffu;
  for (int half = 16; half > 0; half /= 2, low ^= low << half)
    for (int i = 0; i < kWord; ++i) {
      if (i & half) continue;
      const std::uint32_t moved = (words[i] >> half ^ words[i | half]) & low;
      words[i] ^= moved << half;
      words[i | half] ^= moved;
    }
}

// Bits of the columns below `row` in the word that starts at `column`.
TRTPASS_INLINE std::uint32_t below(std::int64_t row, std::int64_t column) {
  const std::int64_t count = row - column;
  return count <= 0 ? 0 : count >= kWord ? ~0u : (1u << count) - 1;
}

// Labels of one row from its bits [length][pitch]; bits of 64 columns are read together.
struct Search {
  std::uint64_t* unseen;  // [ceil(S / 64)]
  std::int32_t* queue;    // [S]
  std::int32_t* head;     // [S]: of each component, in the order in which they were found
  std::int32_t* number;   // [S]: the same components by ascending head

  static std::int64_t bytes(std::int64_t tokens) { return round_up(tokens, 64) / 8 + 3 * 4 * round_up(tokens, 64); }
  Search(std::int64_t tokens, void* memory)
      : unseen(static_cast<std::uint64_t*>(memory)),
        queue(reinterpret_cast<std::int32_t*>(unseen + round_up(tokens, 64) / 64)),
        head(queue + round_up(tokens, 64)),
        number(head + round_up(tokens, 64)) {}

  std::int32_t label(const std::uint32_t* bits, std::int64_t pitch, std::int64_t length, std::int32_t* labels) const {
    const std::int64_t words = (length + 63) / 64;
    for (std::int64_t w = 0; w < words; ++w) unseen[w] = ~std::uint64_t{0};
    std::int32_t found = 0;
    for (std::int32_t start = 0; start < length; ++start) {
      if (!(unseen[start / 64] >> start % 64 & 1)) continue;
      unseen[start / 64] ^= std::uint64_t{1} << start % 64;
      std::int64_t next = 0, end = 0, most = -1;
      queue[end++] = start;
      while (next < end) {
        const std::int32_t i = queue[next++];
        const char* row = reinterpret_cast<const char*>(bits + i * pitch);
        std::int64_t degree = 0;
        for (std::int64_t w = 0; w < words; ++w) {
          std::uint64_t near;
          std::memcpy(&near, row + 8 * w, 8);
          if (near == 0) continue;
          degree += __builtin_popcountll(near);
          for (std::uint64_t fresh = near & unseen[w]; fresh != 0; fresh &= fresh - 1)
            queue[end++] = static_cast<std::int32_t>(64 * w + __builtin_ctzll(fresh));
          unseen[w] &= ~near;
        }
        labels[i] = found;
        if (degree > most || (degree == most && i < head[found])) {
          most = degree;
          head[found] = i;
        }
      }
      ++found;
    }
    std::int32_t named = 0;
    for (std::int32_t i = 0; i < length; ++i)
      if (head[labels[i]] == i) number[labels[i]] = named++;
    for (std::int64_t i = 0; i < length; ++i) labels[i] = number[labels[i]];
    return found;
  }
};

}  // namespace

TRTPASS_KERNEL(connected_components) {
  const Tensor &x = call.input("x"), &lengths = call.input("lengths");
  const std::int64_t batch = call.size("B"), tokens = call.size("S"), depth = call.size("E");
  const float tau = call.number("tau");
  if (tau != tau) fail("ConnectedComponents.tau is NaN; expected a number");
  Tensor label = call.output("label", {batch, tokens}), components = call.output("components", {batch});

  const auto length_of = [&](std::int64_t b) -> std::int64_t {
    const std::int64_t given = lengths.ints()[b];
    return given < 0 ? 0 : given > tokens ? tokens : given;
  };
  std::int64_t longest = 0, most = 0;
  const int strip = strip_of(depth);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t length = length_of(b);
    longest = length > longest ? length : longest;
    for (std::int64_t column = 0; column < length; column += strip) most += (length - column + kSegment - 1) / kSegment;
  }
  // The largest first: what is left for the last worker should be small.
  Unit* units = static_cast<Unit*>(call.scratch(static_cast<std::size_t>(most) * sizeof(Unit)));
  std::int64_t count = 0;
  for (int least = kSegment, above = kSegment + 1; above > 1; above = least, least = least > 48 ? least / 2 : 1)
    for (std::int32_t b = 0; b < batch; ++b)
      for (std::int64_t column = 0, length = length_of(b); column < length; column += strip)
        for (std::int64_t first = column; first < length; first += kSegment) {
          const std::int64_t rows = length - first < kSegment ? length - first : kSegment;
          if (rows >= least && rows < above)
            units[count++] = {b, static_cast<std::int32_t>(column), static_cast<std::int32_t>(first)};
        }

  const std::int64_t words = round_up(longest, 64) / kWord, rows_of_bits = round_up(longest, kWord);
  auto* bits = static_cast<std::uint32_t*>(call.scratch(static_cast<std::size_t>(batch * rows_of_bits * words) * 4));
  const std::int64_t pitch = pitch_of(depth);
  constexpr int kTall = kRows > kLanes ? kRows : kLanes;
  const std::int64_t floats = strip * depth + kTall * pitch + kRows * kStrip;  // panels, rows, products
  float* memory = call.scratch_floats(call.workers() * round_up(floats, 16));
  call.parallel(count, [&](std::int64_t number, int worker) {
    const Unit unit = units[number];
    const std::int64_t length = length_of(unit.row);
    float* panels = memory + worker * round_up(floats, 16);
    float* rows = panels + strip * depth;
    float* products = rows + kTall * pitch;
    zero_row(products, Type::float32, kRows * kStrip);
    std::uint32_t directed[kStrip / kWord] = {};
    const int columns = static_cast<int>(length - unit.column < strip ? length - unit.column : strip);
    pack_units(x.type, depth, columns, [&](int i) { return x.row(unit.row, unit.column + i); }, rows, panels, directed);

    std::uint32_t* mine = bits + unit.row * rows_of_bits * words;
    const std::int64_t end = length - unit.first < kSegment ? length : unit.first + kSegment;
    for (std::int64_t top = unit.first; top < end; top += kTogether) {
      std::uint32_t found[kStrip / kWord][kTogether] = {};
      const std::int64_t bottom = end - top < kTogether ? end : top + kTogether;
      for (std::int64_t first = top; first < bottom; first += kRows) {
        const int here = static_cast<int>(bottom - first < kRows ? bottom - first : kRows);
        // Columns below the last of these rows.
        const std::int64_t reach = first + here - 1 - unit.column;
        const int seen = static_cast<int>(reach < columns ? reach : columns);
        bool has[kRows] = {};
        for (int i = 0; i < here; ++i)
          has[i] = unit_row(rows + i * pitch, x.row(unit.row, first + i), x.type, depth, pitch);
        multiply(here, rows, pitch, panels, depth, seen, products);
        for (int i = 0; i < here; ++i)
          for (int w = 0; has[i] && w * kWord < seen; ++w) {
            std::uint32_t word = 0;
            for (int j = 0; j < kWord; j += kLanes)
              word |= above(load(products + i * kStrip + w * kWord + j), tau) << j;
            found[w][first - top + i] = word & directed[w] & below(first + i, unit.column + w * kWord);
          }
      }
      for (std::int64_t block = top; block < bottom; block += kWord)
        for (int w = 0; w * kWord < columns && unit.column + w * kWord <= block; ++w) {
          std::uint32_t* words_here = found[w] + (block - top);
          std::uint32_t mirrored[kWord];
          std::memcpy(mirrored, words_here, sizeof mirrored);
          transpose_bits(mirrored);
          const std::int64_t column = unit.column + w * kWord;
          for (int i = 0; i < kWord; ++i) {
            if (column == block) mirrored[i] |= words_here[i];
            mine[(column + i) * words + block / kWord] = mirrored[i];
            if (column != block) mine[(block + i) * words + column / kWord] = words_here[i];
          }
        }
    }
  });

  const std::int64_t bytes = round_up(Search::bytes(longest), 64);
  char* searching = static_cast<char*>(call.scratch(static_cast<std::size_t>(bytes * call.workers())));
  call.parallel(batch, [&](std::int64_t b, int worker) {
    const std::int64_t length = length_of(b);
    std::uint32_t* mine = bits + b * rows_of_bits * words;
    if (round_up(length, kWord) % 64)  // the second half of the last 64 bits: nobody's
      for (std::int64_t i = 0; i < length; ++i) mine[i * words + length / kWord + (length % kWord ? 1 : 0)] = 0;
    std::int32_t* labels = label.ints() + b * tokens;
    components.ints()[b] = Search(longest, searching + worker * bytes).label(mine, words, length, labels);
    for (std::int64_t i = length; i < tokens; ++i) labels[i] = static_cast<std::int32_t>(tokens);
  });
}
