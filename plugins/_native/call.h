// What a kernel sees of the runtime that calls it: checked inputs, attributes, outputs to be made, scratch, threads.
//
// A kernel is one function in plugins/<op>/kernel.cc, compiled once for each instruction set:
//
//     TRTPASS_KERNEL(column_mass) {
//       const Tensor& q = call.input("q");  // [B, H, S, D]
//       Tensor mass = call.output("mass", {call.size("B"), call.size("H"), call.size("S")});
//       call.parallel(units, [&](std::int64_t unit, int worker) { ... });
//     }
//
// Ranks, types and named sizes are checked against the operator's declaration before it starts. Everything else that an
// input may get wrong (an index, a length) is the kernel's to check, before `parallel`, by `fail`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace trtpass {

enum class Type : std::int32_t { float32 = 0, float16 = 1, int32 = 2 };

inline constexpr int kMaxRank = 4;
inline constexpr int kMaxPorts = 8;

inline constexpr std::size_t bytes_of(Type type) { return type == Type::float16 ? 2 : 4; }

// Strides are in elements; the last axis is contiguous. [B, H, S, D] may lie in memory as [B, S, H, D].
struct Tensor {
  void* data = nullptr;
  Type type = Type::float32;
  int rank = 0;
  std::int64_t dims[kMaxRank] = {};
  std::int64_t strides[kMaxRank] = {};

  std::int64_t offset(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) const {
    return i * strides[0] + (rank > 1 ? j * strides[1] : 0) + (rank > 2 ? k * strides[2] : 0);
  }
  // The first element of a row, such as (b, h, s) of [B, H, S, D], whatever the type.
  void* row(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) const {
    return static_cast<char*>(data) + offset(i, j, k) * static_cast<std::int64_t>(bytes_of(type));
  }
  const std::int32_t* ints() const { return static_cast<const std::int32_t*>(data); }
  std::int32_t* ints() { return static_cast<std::int32_t*>(data); }
  const float* floats() const { return static_cast<const float*>(data); }
  float* floats() { return static_cast<float*>(data); }
};

struct Port {
  const char* name;
  const char* axes[kMaxRank];  // "B", "H", "S", "D": one name, one size
  int rank;
  bool floating;  // float32 or float16, the same for all such ports of a call; else `type`
  Type type;
};

struct Attribute {
  const char* name;
  bool integer;  // else a float
};

struct Schema {
  const char* name;  // the ONNX op_type
  const Port* inputs;
  int input_count;
  const Port* outputs;
  int output_count;
  const Attribute* attributes;
  int attribute_count;
};

struct Value {
  std::int64_t integer = 0;
  float number = 0;
};

// Stops the call with a message that says what was found and what was expected.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A backend: ONNX Runtime, or the test driver.
struct Backend {
  void* self;
  void* (*make_output)(void* self, int number, const std::int64_t* dims, int rank);
  void* (*allocate)(void* self, std::size_t bytes);
  void (*release)(void* self, void* memory);
  void (*parallel)(void* self, std::int64_t count, void (*run)(void* argument, std::size_t index), void* argument);
};

class Call {
 public:
  // `swapped`: tensors of rank 4 lie in memory with axes 1 and 2 exchanged: [B, S, H, D] for [B, H, S, D].
  Call(const Schema& schema, const Backend& backend, const Tensor* inputs, const Value* attributes, bool swapped);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const Tensor& input(const char* name) const;
  std::int64_t size(const char* dimension) const;
  std::int64_t integer(const char* attribute) const;
  float number(const char* attribute) const;
  Tensor output(const char* name, std::initializer_list<std::int64_t> dims);

  // Uninitialised, aligned to 64 bytes, released when the call ends.
  void* scratch(std::size_t bytes);
  float* scratch_floats(std::int64_t count) { return static_cast<float*>(scratch(static_cast<std::size_t>(count) * 4)); }

  // At most this many units run at one time; a worker's number is below it.
  int workers() const;

  // run(unit, worker) for every unit in [0, units), lowest first, on the runtime's threads. Units must not depend on
  // each other, must not fail, and must be cut by shapes alone, so that results do not depend on how many threads run.
  template <class Run>
  void parallel(std::int64_t units, const Run& run) {
    start(units, [](const void* f, std::int64_t unit, int worker) { (*static_cast<const Run*>(f))(unit, worker); }, &run);
  }

 private:
  void start(std::int64_t units, void (*run)(const void*, std::int64_t, int), const void* argument);

  void check(const Port& port, Tensor& tensor);

  const Schema& schema_;
  const Backend& backend_;
  const Value* attributes_;
  bool swapped_;
  Type floating_ = Type::float32;
  bool floating_known_ = false;
  Tensor inputs_[kMaxPorts];
  const char* names_[kMaxPorts * kMaxRank];
  std::int64_t sizes_[kMaxPorts * kMaxRank];
  int name_count_ = 0;
  void* blocks_[16];
  int block_count_ = 0;
};

using Run = void (*)(Call&);

// One operator of the library; `run` by instruction set, in the order of kIsaNames (registry.cc, generated).
struct Entry {
  const Schema* schema;
  const Run* run;
};

const Entry* entries();
int entry_count();

// The kernel for this machine (or for the instruction set that was forced).
Run chosen(const Entry& entry);

}  // namespace trtpass

#define TRTPASS_NAME_2(isa, op) trtpass_##isa##_##op
#define TRTPASS_NAME_1(isa, op) TRTPASS_NAME_2(isa, op)
#define TRTPASS_KERNEL(op) \
  extern "C" void TRTPASS_NAME_1(TRTPASS_ISA, op)([[maybe_unused]] trtpass::Call& call)
