#include "call.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>

#include "error.h"

namespace trtpass {

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error(text);
}

namespace {

constexpr std::size_t kAlign = 64;

const char* name_of(Type type) {
  return type == Type::float32 ? "float32" : type == Type::float16 ? "float16" : "int32";
}

bool moved(const Tensor& t, bool swapped) { return swapped && t.rank == 4; }

// Strides of a contiguous tensor, or of one whose axes 1 and 2 are exchanged in memory.
void lay_out(Tensor& t, bool swapped) {
  std::int64_t step = 1;
  for (int place = t.rank - 1; place >= 0; --place) {
    const int axis = moved(t, swapped) && (place == 1 || place == 2) ? 3 - place : place;
    t.strides[axis] = step;
    step *= t.dims[axis];
  }
}

template <class Item>
int find(const char* name, const Item* items, int count) {
  for (int i = 0; i < count; ++i)
    if (std::strcmp(items[i].name, name) == 0) return i;
  fail("internal: a kernel asks for '%s', which its operator does not declare", name);
}

}  // namespace

Call::Call(const Schema& schema, const Backend& backend, const Tensor* inputs, const Value* attributes, bool swapped)
    : schema_(schema), backend_(backend), attributes_(attributes), swapped_(swapped) {
  for (int i = 0; i < schema.input_count; ++i) {
    inputs_[i] = inputs[i];
    check(schema.inputs[i], inputs_[i]);
  }
}

Call::~Call() {
  while (block_count_ > 0) backend_.release(backend_.self, blocks_[--block_count_]);
}

void Call::check(const Port& port, Tensor& t) {
  if (t.rank != port.rank) fail("%s.%s has %d axes; expected %d", schema_.name, port.name, t.rank, port.rank);
  if (!port.floating && t.type != port.type)
    fail("%s.%s is %s; expected %s", schema_.name, port.name, name_of(t.type), name_of(port.type));
  if (port.floating) {
    if (t.type == Type::int32) fail("%s.%s is int32; expected float32 or float16", schema_.name, port.name);
    if (floating_known_ && t.type != floating_)
      fail("%s.%s is %s, but others are %s; expected one type", schema_.name, port.name, name_of(t.type),
           name_of(floating_));
    floating_ = t.type;
    floating_known_ = true;
  }
  if (moved(t, swapped_)) std::swap(t.dims[1], t.dims[2]);
  lay_out(t, swapped_);
  for (int axis = 0; axis < t.rank; ++axis) {
    int known = 0;
    while (known < name_count_ && std::strcmp(names_[known], port.axes[axis]) != 0) ++known;
    if (known == name_count_) {
      names_[name_count_] = port.axes[axis];
      sizes_[name_count_++] = t.dims[axis];
    } else if (sizes_[known] != t.dims[axis]) {
      fail("%s.%s has %s = %lld, but %s = %lld elsewhere; expected one size for one name", schema_.name, port.name,
           port.axes[axis], static_cast<long long>(t.dims[axis]), port.axes[axis],
           static_cast<long long>(sizes_[known]));
    }
  }
}

const Tensor& Call::input(const char* name) const {
  return inputs_[find(name, schema_.inputs, schema_.input_count)];
}

std::int64_t Call::size(const char* dimension) const {
  for (int i = 0; i < name_count_; ++i)
    if (std::strcmp(names_[i], dimension) == 0) return sizes_[i];
  fail("internal: %s has no dimension '%s'", schema_.name, dimension);
}

std::int64_t Call::integer(const char* attribute) const {
  return attributes_[find(attribute, schema_.attributes, schema_.attribute_count)].integer;
}

float Call::number(const char* attribute) const {
  return attributes_[find(attribute, schema_.attributes, schema_.attribute_count)].number;
}

Tensor Call::output(const char* name, std::initializer_list<std::int64_t> dims) {
  const int number = find(name, schema_.outputs, schema_.output_count);
  const Port& port = schema_.outputs[number];
  if (static_cast<int>(dims.size()) != port.rank)
    fail("internal: %s.%s is made with %d axes", schema_.name, name, static_cast<int>(dims.size()));
  Tensor t;
  t.type = port.floating ? floating_ : port.type;
  t.rank = port.rank;
  std::copy(dims.begin(), dims.end(), t.dims);
  lay_out(t, swapped_);
  std::int64_t placed[kMaxRank];
  std::copy(dims.begin(), dims.end(), placed);
  if (moved(t, swapped_)) std::swap(placed[1], placed[2]);
  t.data = backend_.make_output(backend_.self, number, placed, t.rank);
  return t;
}

void* Call::scratch(std::size_t bytes) {
  if (block_count_ == static_cast<int>(std::size(blocks_))) fail("internal: %s wants too many blocks", schema_.name);
  if (bytes > std::numeric_limits<std::size_t>::max() / 2) fail("%s: its scratch memory is too large", schema_.name);
  void* block = backend_.allocate(backend_.self, bytes + kAlign);
  if (block == nullptr) fail("%s: no memory for %zu bytes of scratch", schema_.name, bytes);
  blocks_[block_count_++] = block;
  return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(block) + kAlign - 1) / kAlign * kAlign);
}

int Call::workers() const {
  static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return cores;
}

void Call::start(std::int64_t units, void (*run)(const void*, std::int64_t, int), const void* argument) {
  if (units <= 0) return;
  // Each worker takes the next unit until none is left. A runtime with fewer threads than workers runs the rest of them
  // afterwards, and they find nothing to do.
  struct Queue {
    std::atomic<std::int64_t> next{0};
    std::int64_t units;
    void (*run)(const void*, std::int64_t, int);
    const void* argument;
  } queue{{0}, units, run, argument};
  const auto work = [](void* of, std::size_t worker) {
    Queue& queue = *static_cast<Queue*>(of);
    for (;;) {
      const std::int64_t unit = queue.next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= queue.units) return;
      queue.run(queue.argument, unit, static_cast<int>(worker));
    }
  };
  backend_.parallel(backend_.self, std::min<std::int64_t>(units, workers()), work, &queue);
}

}  // namespace trtpass
