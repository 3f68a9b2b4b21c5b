// The library as ONNX Runtime loads it: every operator as custom ops of the CPU provider.
//
// Domain `trtpass` has the operators as declared. Domain `trtpass.bshd` has them once more with every tensor of four axes
// in memory as [B, S, H, D] instead of [B, H, S, D], as projections write it: the same kernels, with other strides.
#include <onnxruntime_c_api.h>

#include <deque>
#include <exception>
#include <mutex>
#include <vector>

#include "call.h"
#include "error.h"

namespace trtpass {
namespace {

const OrtApi* api = nullptr;

// A status that is not null is an error; thrown as one so that it travels like any other.
void check(OrtStatusPtr status) {
  if (status == nullptr) return;
  Error error(api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  throw error;
}

template <class Work>
OrtStatusPtr guarded(const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Error& error) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

ONNXTensorElementDataType element(Type type) {
  return type == Type::float32   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
         : type == Type::float16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                 : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
}

Type type_of(ONNXTensorElementDataType found) {
  for (Type type : {Type::float32, Type::float16, Type::int32})
    if (element(type) == found) return type;
  fail("an input has ONNX element type %d; expected float32, float16 or int32", static_cast<int>(found));
}

// One operator for one floating type and one layout.
struct Custom : OrtCustomOp {
  Entry entry;
  Type floating;
  bool swapped;

  ONNXTensorElementDataType type(const Port& port) const { return element(port.floating ? floating : port.type); }
};

const Custom& self(const OrtCustomOp* op) { return *static_cast<const Custom*>(op); }

struct Kernel {
  const Custom* op;
  std::vector<Value> attributes;
};

OrtStatusPtr create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** made) {
  return guarded([&] {
    auto* kernel = new Kernel{&self(op), {}};
    *made = kernel;
    const Schema& schema = *kernel->op->entry.schema;
    for (int i = 0; i < schema.attribute_count; ++i) {
      Value value;
      if (schema.attributes[i].integer)
        check(api->KernelInfoGetAttribute_int64(info, schema.attributes[i].name, &value.integer));
      else
        check(api->KernelInfoGetAttribute_float(info, schema.attributes[i].name, &value.number));
      kernel->attributes.push_back(value);
    }
  });
}

struct Session {
  OrtKernelContext* context;
  OrtAllocator* allocator;

  static void* make_output(void* of, int number, const std::int64_t* dims, int rank) {
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(static_cast<Session*>(of)->context, static_cast<std::size_t>(number), dims,
                                       static_cast<std::size_t>(rank), &value));
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    return data;
  }
  static void* allocate(void* of, std::size_t bytes) {
    void* memory = nullptr;
    check(api->AllocatorAlloc(static_cast<Session*>(of)->allocator, bytes, &memory));
    return memory;
  }
  static void release(void* of, void* memory) {
    if (OrtStatusPtr status = api->AllocatorFree(static_cast<Session*>(of)->allocator, memory))
      api->ReleaseStatus(status);  // called while an error may be on its way: nothing more can be done
  }
  static void parallel(void* of, std::int64_t count, void (*run)(void*, std::size_t), void* argument) {
    check(api->KernelContext_ParallelFor(static_cast<Session*>(of)->context, run, static_cast<std::size_t>(count), 0,
                                         argument));
  }
};

Tensor read(OrtKernelContext* context, int number) {
  const OrtValue* value = nullptr;
  check(api->KernelContext_GetInput(context, static_cast<std::size_t>(number), &value));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  ONNXTensorElementDataType found = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::size_t rank = 0;
  Tensor t;
  OrtStatusPtr status = api->GetTensorElementType(info, &found);
  if (status == nullptr) status = api->GetDimensionsCount(info, &rank);
  if (status == nullptr && rank <= kMaxRank) status = api->GetDimensions(info, t.dims, rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  t.type = type_of(found);
  t.rank = static_cast<int>(rank);
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &t.data));  // read only; there is no const form
  return t;
}

OrtStatusPtr compute(void* of, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(of);
  OrtAllocator* allocator = nullptr;
  OrtMemoryInfo* where = nullptr;
  OrtStatusPtr result = guarded([&] {
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &where));
    check(api->KernelContext_GetAllocator(context, where, &allocator));
    Session session{context, allocator};
    const Schema& schema = *kernel.op->entry.schema;
    Tensor inputs[kMaxPorts];
    for (int i = 0; i < schema.input_count; ++i) inputs[i] = read(context, i);
    const Backend backend{&session, Session::make_output, Session::allocate, Session::release, Session::parallel};
    Call call(schema, backend, inputs, kernel.attributes.data(), kernel.op->swapped);
    chosen(kernel.op->entry)(call);
  });
  if (allocator != nullptr) api->ReleaseAllocator(allocator);
  if (where != nullptr) api->ReleaseMemoryInfo(where);
  return result;
}

void describe(Custom& op) {
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp* op) { return self(op).entry.schema->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp* op) { return std::size_t(self(op).entry.schema->input_count); };
  op.GetOutputTypeCount = [](const OrtCustomOp* op) { return std::size_t(self(op).entry.schema->output_count); };
  op.GetInputType = [](const OrtCustomOp* op, std::size_t i) { return self(op).type(self(op).entry.schema->inputs[i]); };
  op.GetOutputType = [](const OrtCustomOp* op, std::size_t i) {
    return self(op).type(self(op).entry.schema->outputs[i]);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

bool has_four_axes(const Schema& schema) {
  for (int i = 0; i < schema.input_count; ++i)
    if (schema.inputs[i].rank == 4) return true;
  return false;
}

bool has_floating(const Schema& schema) {
  for (int i = 0; i < schema.input_count; ++i)
    if (schema.inputs[i].floating) return true;
  return false;
}

void add_all(OrtCustomOpDomain* domain, std::deque<Custom>& owned, bool swapped) {
  for (int i = 0; i < entry_count(); ++i) {
    const Entry& entry = entries()[i];
    if (swapped && !has_four_axes(*entry.schema)) continue;
    for (Type floating : {Type::float32, Type::float16}) {
      if (floating == Type::float16 && !has_floating(*entry.schema)) continue;
      Custom& op = owned.emplace_back();
      static_cast<OrtCustomOp&>(op) = OrtCustomOp{};
      op.entry = entry;
      op.floating = floating;
      op.swapped = swapped;
      describe(op);
      check(api->CustomOpDomain_Add(domain, &op));
    }
  }
}

}  // namespace
}  // namespace trtpass

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                       const OrtApiBase* base) {
  using namespace trtpass;
  if (api == nullptr) api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "this ONNX Runtime is older than the headers of the trtpass library");
  // Operators and domains must outlive every session, and sessions end after the statics of a library may have: kept.
  static auto* const owned = new std::deque<Custom>;
  static OrtCustomOpDomain* domains[2] = {};
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  return guarded([&] {
    if (domains[0] == nullptr) {
      OrtCustomOpDomain* made[2] = {};
      check(api->CreateCustomOpDomain("trtpass", &made[0]));
      check(api->CreateCustomOpDomain("trtpass.bshd", &made[1]));
      add_all(made[0], *owned, false);
      add_all(made[1], *owned, true);
      domains[0] = made[0];
      domains[1] = made[1];
    }
    for (OrtCustomOpDomain* domain : domains) check(api->AddCustomOpDomain(options, domain));
  });
}
