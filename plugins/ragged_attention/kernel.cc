// RaggedAttention: each owner's slots are found through the page table; few query rows read them where they lie.
//
// Few rows (decode) are bound by memory: an owner's keys and values are read once, for all query heads of its group and
// all queries together. They are cut into parts of at most kPart slots, by lengths alone, so that few owners still feed
// several threads; whichever part of an owner ends last adds its parts up, in their order.
// Many rows (prefill, later turns) are bound by arithmetic: slots are packed into panels and attended to as elsewhere.
#include "attention.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr int kFew = 16;                        // rows of an owner, G * queries, up to which nothing is packed
constexpr int kPart = 512;                      // slots of a unit of work at most
constexpr int kRun = 64;                        // slots taken at once at most: they stay in the first-level cache
constexpr int kGroup = kLanes == 16 ? 4 : 3;  // rows held in registers: 4 keys x kGroup sums, or kGroup x 4 (2) sums
constexpr int kAcross = kLanes == 16 ? 4 : 2;   // vectors of a value's row held in registers
constexpr int kScores = kPart + kLanes;         // row of scores; stores of whole vectors may end behind it
constexpr int kAhead = 16384;                   // bytes between what is read and what is asked for
constexpr int kLine = 64;                       // bytes of a cache line

struct Owner {
  std::int64_t b, g;
  std::int64_t held;     // slots
  std::int64_t queries;  // valid rows of q
  const std::int32_t* table;
  std::int64_t parts;  // 0: no query sees anything
  float* results;      // [parts][G queries (padded + 2)]: rows of sums, their maxima, their totals
  std::int64_t done;   // parts that have ended
};

struct Part {
  Owner* owner;
  std::int64_t number, start, end;
};

// The pool of keys or of values, read as rows of floats padded with zeros to whole vectors.
struct Pool {
  const Tensor& pages;  // [P, Z, width]
  std::int64_t page_size, width, padded;
  bool in_place;  // rows are such already, and pages are long enough to be worth it

  explicit Pool(const Tensor& t)
      : pages(t),
        page_size(t.dims[1]),
        width(t.dims[2]),
        padded(round_up(width, kLanes)),
        in_place(t.type == Type::float32 && padded == width && page_size >= kLanes) {}

  const void* row(const std::int32_t* table, std::int64_t slot) const {
    return pages.row(table[slot / page_size], slot % page_size);
  }
};

struct Run {
  const float* rows;
  std::int64_t count;
};

// The slots from `slot` on, below `end`, that can be had at once.
TRTPASS_INLINE Run take(const Pool& pool, const std::int32_t* table, std::int64_t slot, std::int64_t end,
                        float* buffer) {
  std::int64_t count = end - slot < kRun ? end - slot : kRun;
  if (pool.in_place) {
    const std::int64_t left = pool.page_size - slot % pool.page_size;
    return {static_cast<const float*>(pool.row(table, slot)), count < left ? count : left};
  }
  for (std::int64_t i = 0; i < count; ++i) {
    float* to = buffer + i * pool.padded;
    read_row(to, pool.row(table, slot + i), pool.pages.type, pool.width);
    zero_row(to + pool.width, Type::float32, pool.padded - pool.width);
  }
  return {buffer, count};
}

// Asks for the keys of a part and then for its values, a row at a time, so early that they are there when read.
// Pages lie anywhere, and the processor's own prefetching ends with each. Into the second-level cache: the first has
// fewer places for requests on their way than it takes to hide the time that memory needs. docs/native.md has figures.
class Ahead {
 public:
  Ahead(const Pool& keys, const Pool& values, const Part& part)
      : keys_(keys), values_(values), part_(part), pool_(&keys), slot_(part.start) {
    enter();
    for (std::int64_t bytes = 0; left_ > 0 && bytes < kAhead; bytes += row_bytes_) step();
  }

  TRTPASS_INLINE void step() {
    if (left_ == 0) return;
    for (std::int64_t at = 0; at < row_bytes_; at += kLine) __builtin_prefetch(row_ + at, 0, 2);
    row_ += row_bytes_;
    if (--left_ == 0) enter();
  }

 private:
  void enter() {  // the page of slot_, or what comes after the last
    if (slot_ == part_.end && pool_ == &keys_) {
      pool_ = &values_;
      slot_ = part_.start;
    }
    row_bytes_ = pool_->width * static_cast<std::int64_t>(bytes_of(pool_->pages.type));
    if (slot_ == part_.end || row_bytes_ == 0) return;
    row_ = static_cast<const char*>(pool_->row(part_.owner->table, slot_));
    left_ = pool_->page_size - slot_ % pool_->page_size;
    left_ = left_ < part_.end - slot_ ? left_ : part_.end - slot_;
    slot_ += left_;
  }

  const Pool &keys_, &values_;
  const Part& part_;
  const Pool* pool_;
  std::int64_t slot_, row_bytes_ = 0, left_ = 0;
  const char* row_ = nullptr;
};

#if defined(__AVX512F__)
#define TRTPASS_SUM_PAIRS(a, b)                                                                              \
  (__builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +                 \
   __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
#define TRTPASS_SUM_HALVES(a, b)                                                                             \
  (__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +                 \
   __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define TRTPASS_SUM_FOURS(a, b)                                                                              \
  (__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +                 \
   __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#elif defined(__AVX2__)
#define TRTPASS_SUM_PAIRS(a, b) \
  (__builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15))
#define TRTPASS_SUM_HALVES(a, b) \
  (__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#define TRTPASS_SUM_FOURS(a, b) \
  (__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
#else
#define TRTPASS_SUM_PAIRS(a, b) (__builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7))
#define TRTPASS_SUM_HALVES(a, b) (__builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7))
#endif

// Four vectors to one: each four lanes of it are partial sums of a, b, c and d, over the same four lanes of theirs.
TRTPASS_INLINE Vec quad(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = TRTPASS_SUM_PAIRS(a, b), cd = TRTPASS_SUM_PAIRS(c, d);
  return TRTPASS_SUM_HALVES(ab, cd);
}

// kLanes / 4 quads to the sums of the kLanes vectors that they are of, in order.
TRTPASS_INLINE Vec join(const Vec* quads) {
#if defined(__AVX512F__)
  const Vec low = TRTPASS_SUM_FOURS(quads[0], quads[1]), high = TRTPASS_SUM_FOURS(quads[2], quads[3]);
  return TRTPASS_SUM_FOURS(low, high);
#elif defined(__AVX2__)
  return TRTPASS_SUM_FOURS(quads[0], quads[1]);
#else
  return quads[0];
#endif
}

// In a register: GCC repeats a load as an operand of each product that uses it, and loads would then be the limit.
TRTPASS_INLINE Vec loaded(const float* from) {
  Vec v = load(from);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// scores[R][kScores] from rows of queries and of keys, both [.][depth], for the first `count` of kLanes keys; what is
// stored behind them is of no use.
template <int R>
TRTPASS_INLINE void dots(const float* queries, const float* keys, std::int64_t depth, std::int64_t count, Ahead* ahead,
                         float* scores) {
  Vec quads[R][kLanes / 4];
#pragma GCC unroll 4
  for (int part = 0; part < kLanes / 4; ++part) {
    const float* key[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const bool real = 4 * part + i < count;
      key[i] = keys + (real ? 4 * part + i : count - 1) * depth;
      if (real && ahead != nullptr) ahead->step();
    }
    Vec sums[R][4] = {};
    for (std::int64_t d = 0; d < depth; d += kLanes)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec k = loaded(key[i] + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][i] += load(queries + r * depth + d) * k;
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) quads[r][part] = quad(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store(scores + r * kScores, join(quads[r]));
}

// rows[R][width] += weights[R][kScores] values[count][width], for N vectors of width.
template <int R, int N>
TRTPASS_INLINE void weigh(const float* weights, const float* values, std::int64_t width, std::int64_t count,
                          Ahead* ahead, float* rows) {
  Vec sums[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[r][j] = load(rows + r * width + j * kLanes);
  for (std::int64_t t = 0; t < count; ++t) {
    if (ahead != nullptr) ahead->step();
    Vec value[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) value[j] = loaded(values + t * width + j * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[r][j] += weights[r * kScores + t] * value[j];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(rows + r * width + j * kLanes, sums[r][j]);
}

template <int R>
TRTPASS_INLINE void weigh_all(const float* weights, const float* values, std::int64_t width, std::int64_t count,
                              Ahead* ahead, float* rows) {
  std::int64_t d = 0;
  for (; d + kAcross * kLanes <= width; d += kAcross * kLanes)
    weigh<R, kAcross>(weights, values + d, width, count, d == 0 ? ahead : nullptr, rows + d);
  for (; d < width; d += kLanes) weigh<R, 1>(weights, values + d, width, count, d == 0 ? ahead : nullptr, rows + d);
}

template <int R>
struct Rows {
  static constexpr int count = R;
};

// f(Rows<R>, first row) for each group of R = min(rows left, kGroup) rows.
template <class F>
TRTPASS_INLINE void by_groups(std::int64_t rows, const F& f) {
  for (std::int64_t first = 0; first < rows; first += kGroup) switch (rows - first) {
      case 1:
        f(Rows<1>{}, first);
        break;
      case 2:
        f(Rows<2>{}, first);
        break;
      case 3:
        f(Rows<3>{}, first);
        break;
      default:
        f(Rows<kGroup>{}, first);
    }
}

// Walks over the slots of a part: f(offset from its start, rows, count).
template <class F>
TRTPASS_INLINE void walk(const Pool& pool, const Part& part, float* buffer, const F& f) {
  for (std::int64_t slot = part.start; slot < part.end;) {
    const Run run = take(pool, part.owner->table, slot, part.end, buffer);
    f(slot - part.start, run.rows, run.count);
    slot += run.count;
  }
}

// What one worker needs for a part.
struct Few {
  float* queries;  // [kFew][depth padded], scaled by scale * log2(e)
  float* scores;   // [kFew][kScores]
  float* buffer;   // [kRun][the wider of depth and values, padded]

  static std::int64_t floats(const Pool& keys, const Pool& values) {
    return kFew * (keys.padded + kScores) + kRun * (keys.padded > values.padded ? keys.padded : values.padded);
  }
  Few(const Pool& keys, float* memory)
      : queries(memory), scores(queries + kFew * keys.padded), buffer(scores + kFew * kScores) {}
};

struct Shapes {
  const Tensor& q;
  Pool keys, values;
  std::int64_t group;  // G
  float scale;         // times log2(e)

  std::int64_t result_floats(const Owner& o) const {
    return round_up(group * o.queries * (values.padded + 2), 16);
  }
};

// Row i of an owner is query i / G of its head i % G. Maxima, totals and sums of values of all rows, over one part.
inline void attend_part(const Shapes& shapes, const Part& part, const Few& few) {
  const Owner& o = *part.owner;
  const Pool &keys = shapes.keys, &values = shapes.values;
  const std::int64_t rows = shapes.group * o.queries, n = part.end - part.start, depth = keys.padded;
  float* sums = o.results + part.number * shapes.result_floats(o);
  float *largest = sums + rows * values.padded, *total = largest + rows;
  for (std::int64_t i = 0; i < rows; ++i) {
    float* to = few.queries + i * depth;
    read_row(to, shapes.q.row(o.b, o.g * shapes.group + i % shapes.group, i / shapes.group), shapes.q.type, keys.width,
             shapes.scale);
    zero_row(to + keys.width, Type::float32, depth - keys.width);
  }

  Ahead ahead(keys, values, part);
  walk(keys, part, few.buffer, [&](std::int64_t at, const float* run, std::int64_t count) {
    by_groups(rows, [&](auto r, std::int64_t first) {
      for (std::int64_t j = 0; j < count; j += kLanes)
        dots<r.count>(few.queries + first * depth, run + j * depth, depth, count - j, first == 0 ? &ahead : nullptr,
                      few.scores + first * kScores + at + j);
    });
  });

  zero_row(sums, Type::float32, rows * values.padded);
  const auto seen_by = [&](std::int64_t i) {  // slots of this part that a row sees
    const std::int64_t seen = o.held - o.queries + i / shapes.group + 1 - part.start;
    return seen < 0 ? 0 : seen < n ? seen : n;
  };
  for (std::int64_t i = 0; i < rows; ++i) {
    largest[i] = kNothing;
    total[i] = 0.0f;
    if (seen_by(i) > 0) soften(few.scores + i * kScores, seen_by(i), largest[i], total[i], nullptr, 0);
  }

  walk(values, part, few.buffer, [&](std::int64_t at, const float* run, std::int64_t count) {
    by_groups(rows, [&](auto r, std::int64_t first) {
      std::int64_t shared = seen_by(first) - at;  // slots that the whole group sees
      shared = shared < 0 ? 0 : shared < count ? shared : count;
      weigh_all<r.count>(few.scores + first * kScores + at, run, values.padded, shared, first == 0 ? &ahead : nullptr,
                         sums + first * values.padded);
      for (std::int64_t i = first; i < first + r.count; ++i) {  // those that only later queries see
        std::int64_t seen = seen_by(i) - at;
        seen = seen < count ? seen : count;
        if (seen > shared)
          weigh_all<1>(few.scores + i * kScores + at + shared, run + shared * values.padded, values.padded,
                       seen - shared, nullptr, sums + i * values.padded);
      }
    });
  });
}

// Brings the parts of an owner to one maximum, adds them up in order, and writes its rows.
inline void add_up(const Shapes& shapes, const Owner& o, const Tensor& out) {
  const std::int64_t rows = shapes.group * o.queries, width = shapes.values.padded, step = shapes.result_floats(o);
  for (std::int64_t i = 0; i < rows; ++i) {
    float base = kNothing;
    for (std::int64_t p = 0; p < o.parts; ++p) {
      const float found = o.results[p * step + rows * width + i];
      base = found > base ? found : base;
    }
    float *row = o.results + i * width, total = 0.0f;
    for (std::int64_t p = 0; p < o.parts; ++p) {
      const float *part = o.results + p * step, found = part[rows * width + i], its = part[rows * (width + 1) + i];
      const float weight = its == 0.0f ? 0.0f : exp2(splat(found == base ? 0.0f : found - base))[0];
      if (p == 0)
        for (std::int64_t d = 0; d < width; d += kLanes) store(row + d, load(row + d) * weight);
      else if (weight != 0.0f)
        for (std::int64_t d = 0; d < width; d += kLanes)
          store(row + d, load(row + d) + load(part + i * width + d) * weight);
      total += weight * its;
    }
    if (total != 0.0f)
      write_row(out.row(o.b, o.g * shapes.group + i % shapes.group, i / shapes.group), out.type, row,
                shapes.values.width, 1.0f / total);
  }
}

// Owners of few rows each; the memory they read is all there is to gain.
void attend_few(Call& call, const Shapes& shapes, Owner* owners, std::int64_t owner_count, const Tensor& out) {
  std::int64_t parts = 0, floats = 0;
  for (std::int64_t i = 0; i < owner_count; ++i) {
    parts += owners[i].parts;
    floats += owners[i].parts * shapes.result_floats(owners[i]);
  }
  auto* units = static_cast<Part*>(call.scratch(static_cast<std::size_t>(parts) * sizeof(Part)));
  float* results = call.scratch_floats(floats);
  Part* unit = units;
  for (Owner* o = owners; o < owners + owner_count; ++o) {
    o->results = results;
    results += o->parts * shapes.result_floats(*o);
    for (std::int64_t p = 0; p < o->parts; ++p)  // of equal length, but for one slot
      *unit++ = {o, p, o->held * p / o->parts, o->held * (p + 1) / o->parts};
  }
  const std::int64_t step = round_up(Few::floats(shapes.keys, shapes.values), kLine);
  float* memory = call.scratch_floats(step * call.workers());
  call.parallel(parts, [&](std::int64_t number, int worker) {
    const Part& part = units[number];
    attend_part(shapes, part, Few(shapes.keys, memory + worker * step));
    if (__atomic_add_fetch(&part.owner->done, 1, __ATOMIC_ACQ_REL) == part.owner->parts)
      add_up(shapes, *part.owner, out);
  });
}

// Owners of many rows each: packed, then as in token-sparse and dense attention.
void attend_many(Call& call, const Shapes& shapes, const Owner* owners, std::int64_t owner_count, const Tensor& out) {
  const Widths w(shapes.keys.width, shapes.values.width);
  std::int64_t held = 0, queries = 0;
  for (std::int64_t i = 0; i < owner_count; ++i) {
    held = owners[i].held > held ? owners[i].held : held;
    queries = owners[i].queries > queries ? owners[i].queries : queries;
  }
  const Packed packed = pack_all(
      call, w, shapes.q.type, owner_count, held, [&](std::int64_t number) { return owners[number].held; },
      [&](std::int64_t number, std::int64_t slot) {
        const std::int32_t* table = owners[number].table;
        return Place{shapes.keys.row(table, slot), shapes.values.row(table, slot)};
      });
  const auto owner_of = [&](std::int64_t head) -> const Owner& { return owners[head / shapes.group]; };
  const auto head_of = [&](std::int64_t head) { return owner_of(head).g * shapes.group + head % shapes.group; };
  attend_all(
      call, packed, shapes.q.type, shapes.scale, owner_count * shapes.group, queries,
      [&](std::int64_t head) {
        const Owner& o = owner_of(head);
        return Queries{head / shapes.group, o.queries, o.held - o.queries + 1};
      },
      [&](std::int64_t head, std::int64_t i) { return shapes.q.row(owner_of(head).b, head_of(head), i); },
      [&](std::int64_t head, std::int64_t first, std::int64_t rows, const Block& block) {
        const Owner& o = owner_of(head);
        for (std::int64_t i = 0; i < rows; ++i)
          if (o.held - o.queries + first + i >= 0)  // else it sees nothing, and is zero already
            write_row(out.row(o.b, head_of(head), first + i), out.type, block.rows + i * w.padded, w.values,
                      1.0f / block.total[i]);
      });
}

void check_pages(const Owner& o, std::int64_t page_size, std::int64_t pages) {
  const std::int64_t used = o.held == 0 ? 0 : (o.held - 1) / page_size + 1;
  for (std::int64_t m = 0; m < used; ++m)
    if (o.table[m] < 0 || o.table[m] >= pages)
      fail("RaggedAttention.page_table[%lld, %lld, %lld] is %d, and its page is in use; expected 0 to P - 1 = %lld",
           (long long)o.b, (long long)o.g, (long long)m, o.table[m], (long long)pages - 1);
}

}  // namespace

TRTPASS_KERNEL(ragged_attention) {
  const Tensor &q = call.input("q"), &table = call.input("page_table");
  const std::int64_t batch = call.size("B"), heads = call.size("H"), key_heads = call.size("Hkv");
  const std::int64_t tokens = call.size("S"), slots = call.size("M") * call.size("Z");
  if (key_heads < 1 || heads % key_heads)
    fail("RaggedAttention has H = %lld and Hkv = %lld; expected a multiple", (long long)heads, (long long)key_heads);
  const float scale = exponent_scale(call.number("scale"), call.size("D"));
  const Shapes shapes{q, Pool(call.input("k_pages")), Pool(call.input("v_pages")), heads / key_heads, scale};
  Tensor out = call.output("out", {batch, heads, tokens, call.size("Dv")});

  // Owners of few rows from the front, those of many from the back, and zeros where nothing is seen.
  const std::int64_t owner_count = batch * key_heads;
  auto* owners = static_cast<Owner*>(call.scratch(static_cast<std::size_t>(owner_count) * sizeof(Owner)));
  std::int64_t few = 0, many = 0;
  for (std::int64_t i = 0; i < owner_count; ++i) {
    const std::int64_t b = i / key_heads, g = i % key_heads;
    const std::int64_t held = call.input("lengths").ints()[i], queries = call.input("queries").ints()[b];
    if (held < 0 || held > slots)
      fail("RaggedAttention.lengths[%lld, %lld] is %lld; expected 0 to M Z = %lld", (long long)b, (long long)g,
           (long long)held, (long long)slots);
    if (queries < 0 || queries > tokens)
      fail("RaggedAttention.queries[%lld] is %lld; expected 0 to S = %lld", (long long)b, (long long)queries,
           (long long)tokens);
    const bool sees = held > 0 && queries > 0, some = shapes.group * queries <= kFew;
    const std::int64_t parts = sees && some ? (held + kPart - 1) / kPart : 0;
    const Owner owner{b, g, held, queries, table.ints() + i * call.size("M"), parts, nullptr, 0};
    check_pages(owner, shapes.keys.page_size, call.size("P"));
    if (sees) owners[some ? few++ : owner_count - ++many] = owner;
    const std::int64_t blind = !sees ? queries : queries > held ? queries - held : 0;  // queries that see nothing
    for (std::int64_t h = g * shapes.group; h < (g + 1) * shapes.group; ++h)
      for (std::int64_t t = 0; t < tokens; ++t)
        if (t < blind || t >= queries) zero_row(out.row(b, h, t), out.type, shapes.values.width);
  }
  if (few > 0) attend_few(call, shapes, owners, few, out);
  if (many > 0) attend_many(call, shapes, owners + owner_count - many, many, out);
}
