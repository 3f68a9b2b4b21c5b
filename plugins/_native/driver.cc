// The kernels as a program of their own: requests on standard input, responses on standard output. The tests run it under
// sanitizers, which the process that holds Python and ONNX Runtime could not.
//
// Little-endian. `text` is u32 length, bytes. `tensor` is u32 type (of call.h), u32 rank, i64 dims[rank], u64 bytes, data.
//
//   request   u64 length of the rest | text operator | text instruction set, empty for the best | u32 threads
//             | u32 swapped: tensors of four axes are given and returned as they lie in memory, [B, S, H, D]
//             | u32 count, as many attributes: text name, i64 and f64 value, of which the declared type is used
//             | u32 count, as many inputs: tensor
//   response  u64 length of the rest | u32 0 | u32 count, as many outputs: tensor
//             or u64 length of the rest | u32 1 | text error
//
// Every tensor and every piece of scratch is a block of exactly its size, so that AddressSanitizer sees one element too
// many; outputs and scratch start as 0xFF bytes: NaN in both floating types, -1 in integers. Requests are served until the
// input ends; what is too large or makes no sense gets an error, and a length that cannot be one ends the program with 1.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "call.h"

extern "C" int trtpass_force_isa(const char* name);

namespace trtpass {
namespace {

constexpr std::uint64_t kMost = 1u << 30;  // bytes of a request, of a tensor, of a block of scratch
constexpr std::int64_t kLongest = 1 << 24;  // of an axis
constexpr std::uint32_t kThreads = 64;
constexpr std::size_t kSlack = 64;  // what Call::scratch adds to align what it gets; nothing of it is used if it is aligned

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// `bytes` of memory; no bytes are a place behind the end of a block, which nobody may read.
struct Exact {
  Memory memory;
  char* data = nullptr;

  Exact() = default;
  explicit Exact(std::size_t bytes) : memory(static_cast<char*>(std::malloc(bytes == 0 ? 16 : bytes))) {
    if (memory == nullptr) throw std::bad_alloc();
    data = memory.get() + (bytes == 0 ? 16 : 0);
  }
};

// The size in bytes of a tensor, checked: no product of sizes overflows, none is absurd.
std::uint64_t size_of(Type type, const std::int64_t* dims, int rank) {
  std::uint64_t bytes = bytes_of(type);
  for (int axis = 0; axis < rank; ++axis) {
    if (dims[axis] < 0 || dims[axis] > kLongest)
      fail("an axis has %lld places; expected 0 to %lld", (long long)dims[axis], (long long)kLongest);
    bytes *= static_cast<std::uint64_t>(dims[axis]);
    if (bytes > kMost) fail("a tensor has more than %llu bytes; expected at most that", (unsigned long long)kMost);
  }
  return bytes;
}

class Reader {
 public:
  explicit Reader(const std::vector<char>& bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}

  template <class T>
  T take() {
    T value;
    std::memcpy(&value, bytes(sizeof value), sizeof value);
    return value;
  }
  const char* bytes(std::uint64_t count) {
    if (count > static_cast<std::uint64_t>(end_ - at_)) fail("the request ends too early; expected %llu more bytes",
                                                             (unsigned long long)count);
    const char* found = at_;
    at_ += count;
    return found;
  }
  std::string text() {
    const auto length = take<std::uint32_t>();
    return {bytes(length), length};
  }
  void end() const {
    if (at_ != end_) fail("the request goes on for %lld bytes; expected its end", (long long)(end_ - at_));
  }

 private:
  const char* at_;
  const char* end_;
};

class Writer {
 public:
  template <class T>
  void put(T value) {
    append(&value, sizeof value);
  }
  void append(const void* data, std::size_t bytes) {
    const char* first = static_cast<const char*>(data);
    bytes_.insert(bytes_.end(), first, first + bytes);
  }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

struct Output {
  Exact block;
  bool made = false;
  std::uint64_t bytes = 0;
  std::vector<std::int64_t> dims;
};

struct Session {
  const Schema& schema;
  Type floating;
  std::uint32_t threads;
  std::vector<Output> outputs;

  Type type(int number) const {
    return schema.outputs[number].floating ? floating : schema.outputs[number].type;
  }

  static void* make_output(void* of, int number, const std::int64_t* dims, int rank) {
    Session& session = *static_cast<Session*>(of);
    Output& output = session.outputs[static_cast<std::size_t>(number)];
    if (output.made) fail("internal: output %d is made twice", number);
    output.bytes = size_of(session.type(number), dims, rank);
    output.block = Exact(output.bytes);
    if (output.bytes > 0) std::memset(output.block.data, 0xff, output.bytes);
    output.dims.assign(dims, dims + rank);
    output.made = true;
    return output.block.data;
  }

  static void* allocate(void*, std::size_t bytes) {
    if (bytes > kMost || bytes < kSlack) return nullptr;
    void* memory = nullptr;
    const std::size_t used = std::max(bytes - kSlack, std::size_t{1});
    if (posix_memalign(&memory, kSlack, used) != 0) return nullptr;
    return std::memset(memory, 0xff, used);
  }

  static void release(void*, void* memory) { std::free(memory); }

  // All threads start at the same moment, so that even short work is shared.
  static void parallel(void* of, std::int64_t count, void (*run)(void*, std::size_t), void* argument) {
    const auto team = std::min<std::int64_t>(static_cast<Session*>(of)->threads, count);
    std::atomic<std::int64_t> next{0}, missing{team};
    const auto work = [&] {
      missing.fetch_sub(1);
      while (missing.load() > 0) std::this_thread::yield();
      for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) run(argument, static_cast<std::size_t>(i));
    };
    std::vector<std::thread> others;
    for (std::int64_t i = 1; i < team; ++i) others.emplace_back(work);
    work();
    for (std::thread& thread : others) thread.join();
  }
};

const Entry& entry_of(const std::string& name) {
  for (int i = 0; i < entry_count(); ++i)
    if (name == entries()[i].schema->name) return entries()[i];
  fail("'%.60s' is no operator; expected one that has a kernel", name.c_str());
}

std::vector<Value> attributes_of(const Schema& schema, Reader& request) {
  std::vector<Value> values(static_cast<std::size_t>(schema.attribute_count));
  std::vector<bool> given(values.size());
  for (auto count = request.take<std::uint32_t>(); count > 0; --count) {
    const std::string name = request.text();
    std::size_t number = 0;
    while (number < values.size() && name != schema.attributes[number].name) ++number;
    if (number == values.size() || given[number])
      fail("%s is given '%.60s'; expected each of its attributes once", schema.name, name.c_str());
    given[number] = true;
    values[number].integer = request.take<std::int64_t>();
    values[number].number = static_cast<float>(request.take<double>());
  }
  for (std::size_t i = 0; i < given.size(); ++i)
    if (!given[i]) fail("%s lacks %s; expected each of its attributes once", schema.name, schema.attributes[i].name);
  return values;
}

Tensor tensor_of(Reader& request, Exact& block) {
  const auto type = request.take<std::uint32_t>(), rank = request.take<std::uint32_t>();
  if (type > 2 || rank > kMaxRank) fail("a tensor has type %u and %u axes; expected type 0 to 2, 0 to 4 axes", type, rank);
  Tensor t;
  t.type = static_cast<Type>(type);
  t.rank = static_cast<int>(rank);
  for (std::uint32_t axis = 0; axis < rank; ++axis) t.dims[axis] = request.take<std::int64_t>();
  const std::uint64_t bytes = size_of(t.type, t.dims, t.rank), given = request.take<std::uint64_t>();
  if (given != bytes)
    fail("a tensor has %llu bytes; expected %llu by its shape", (unsigned long long)given, (unsigned long long)bytes);
  block = Exact(bytes);
  if (bytes > 0) std::memcpy(block.data, request.bytes(bytes), bytes);
  t.data = block.data;
  return t;
}

Writer serve(const std::vector<char>& bytes) {
  Reader request(bytes);
  const Entry& entry = entry_of(request.text());
  const Schema& schema = *entry.schema;
  const std::string isa = request.text();
  if (!trtpass_force_isa(isa.empty() ? nullptr : isa.c_str()))
    fail("'%.60s' is no instruction set of this machine; expected one that it has", isa.c_str());
  const auto threads = request.take<std::uint32_t>();
  if (threads < 1 || threads > kThreads) fail("%u threads are wanted; expected 1 to %u", threads, kThreads);
  const bool swapped = request.take<std::uint32_t>() != 0;
  const std::vector<Value> attributes = attributes_of(schema, request);
  const auto count = request.take<std::uint32_t>();
  if (count != static_cast<std::uint32_t>(schema.input_count))
    fail("%s gets %u inputs; expected %d", schema.name, count, schema.input_count);
  Exact blocks[kMaxPorts];
  Tensor inputs[kMaxPorts];
  Type floating = Type::float32;
  for (std::uint32_t i = 0; i < count; ++i) {
    inputs[i] = tensor_of(request, blocks[i]);
    if (schema.inputs[i].floating) floating = inputs[i].type;
  }
  request.end();

  Session session{schema, floating, threads, std::vector<Output>(static_cast<std::size_t>(schema.output_count))};
  const Backend backend{&session, Session::make_output, Session::allocate, Session::release, Session::parallel};
  {
    Call call(schema, backend, inputs, attributes.data(), swapped);
    chosen(entry)(call);
  }
  Writer response;
  response.put(std::uint32_t{0});
  response.put(static_cast<std::uint32_t>(schema.output_count));
  for (int i = 0; i < schema.output_count; ++i) {
    const Output& output = session.outputs[static_cast<std::size_t>(i)];
    if (!output.made) fail("internal: %s does not make %s", schema.name, schema.outputs[i].name);
    response.put(static_cast<std::uint32_t>(session.type(i)));
    response.put(static_cast<std::uint32_t>(output.dims.size()));
    for (std::int64_t size : output.dims) response.put(size);
    response.put(output.bytes);
    response.append(output.block.data, output.bytes);
  }
  return response;
}

Writer answer(const std::vector<char>& request) {
  try {
    return serve(request);
  } catch (const std::exception& error) {
    Writer response;
    response.put(std::uint32_t{1});
    response.put(static_cast<std::uint32_t>(std::strlen(error.what())));
    response.append(error.what(), std::strlen(error.what()));
    return response;
  }
}

}  // namespace
}  // namespace trtpass

int main() {
  std::uint64_t length = 0;
  while (std::fread(&length, sizeof length, 1, stdin) == 1) {
    if (length > trtpass::kMost) {
      std::fprintf(stderr, "a request has %llu bytes; expected at most %llu\n", (unsigned long long)length,
                   (unsigned long long)trtpass::kMost);
      return 1;
    }
    std::vector<char> request(length);
    if (std::fread(request.data(), 1, length, stdin) != length) {
      std::fprintf(stderr, "the input ends within a request of %llu bytes; expected all of it\n",
                   (unsigned long long)length);
      return 1;
    }
    const trtpass::Writer response = trtpass::answer(request);
    const std::uint64_t size = response.bytes().size();
    std::fwrite(&size, sizeof size, 1, stdout);
    std::fwrite(response.bytes().data(), 1, size, stdout);
    if (std::fflush(stdout) != 0) return 1;
  }
  return 0;
}
