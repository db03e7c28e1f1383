// What of ONNX Runtime's C interface the operators need, declared here: its wheel comes without headers.
//
// The interface is a table of functions whose order never changes, and a struct per operator with the version that it is
// of (onnxruntime_c_api.h, MIT licence). Ours is 17, the first in which an operator may use the session's threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace skylapse::ort {

constexpr uint32_t VERSION = 17;
constexpr int FLOAT = 1;  // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
enum Presence { REQUIRED = 0, OPTIONAL = 1 };

struct Status;
struct Info;
struct Context;
struct Value;
struct Shape;
struct Domain;
struct Options;

typedef const void* const* Api;

struct ApiBase {
  Api (*get_api)(uint32_t version);
  const char* (*version)();
};

// Places in the table.
enum Slot {
  CREATE_STATUS = 0,
  GET_ERROR_MESSAGE = 2,
  CREATE_CUSTOM_OP_DOMAIN = 26,
  CUSTOM_OP_DOMAIN_ADD = 27,
  ADD_CUSTOM_OP_DOMAIN = 28,
  GET_TENSOR_MUTABLE_DATA = 51,
  GET_DIMENSIONS_COUNT = 61,
  GET_DIMENSIONS = 62,
  GET_TENSOR_TYPE_AND_SHAPE = 65,
  KERNEL_INFO_GET_ATTRIBUTE_INT64 = 86,
  KERNEL_CONTEXT_GET_INPUT = 90,
  KERNEL_CONTEXT_GET_OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99,
  KERNEL_INFO_GET_CONSTANT_INPUT_TENSOR = 249,
  KERNEL_CONTEXT_PARALLEL_FOR = 274,
};

inline Api api;  // set once, when the library is registered

template <typename Result, typename... Arguments>
Result raw(Slot slot, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api[slot]))(arguments...);
}

// Calls what may fail; throws its message.
template <typename... Arguments>
void call(Slot slot, Arguments... arguments) {
  if (Status* status = raw<Status*>(slot, arguments...)) {
    const std::string message = raw<const char*, const Status*>(GET_ERROR_MESSAGE, status);
    raw<void>(RELEASE_STATUS, status);
    throw std::runtime_error(message);
  }
}

inline Status* failed(const std::exception& error) {
  constexpr int RUNTIME_EXCEPTION = 6;
  return raw<Status*, int, const char*>(CREATE_STATUS, RUNTIME_EXCEPTION, error.what());
}

struct Tensor {
  float* data = nullptr;
  std::vector<int64_t> shape;
  explicit operator bool() const { return data != nullptr; }
};

inline Tensor tensor_of(const Value* value) {
  Tensor tensor;
  if (!value) return tensor;
  Shape* shape = nullptr;
  size_t rank = 0;
  call<const Value*, Shape**>(GET_TENSOR_TYPE_AND_SHAPE, value, &shape);
  call<const Shape*, size_t*>(GET_DIMENSIONS_COUNT, shape, &rank);
  tensor.shape.resize(rank);
  call<const Shape*, int64_t*, size_t>(GET_DIMENSIONS, shape, tensor.shape.data(), rank);
  raw<void, Shape*>(RELEASE_TENSOR_TYPE_AND_SHAPE_INFO, shape);
  void* data = nullptr;
  call<Value*, void**>(GET_TENSOR_MUTABLE_DATA, const_cast<Value*>(value), &data);
  tensor.data = static_cast<float*>(data);
  return tensor;
}

inline Tensor input(Context* context, size_t index) {
  const Value* value = nullptr;
  call<const Context*, size_t, const Value**>(KERNEL_CONTEXT_GET_INPUT, context, index, &value);
  return tensor_of(value);
}

// Empty where the graph does not use it.
inline Tensor output(Context* context, size_t index, const std::vector<int64_t>& shape) {
  Value* value = nullptr;
  call<Context*, size_t, const int64_t*, size_t, Value**>(
      KERNEL_CONTEXT_GET_OUTPUT, context, index, shape.data(), shape.size(), &value);
  return tensor_of(value);
}

inline Tensor constant(const Info* info, size_t index) {
  int is_constant = 0;
  const Value* value = nullptr;
  call<const Info*, size_t, int*, const Value**>(KERNEL_INFO_GET_CONSTANT_INPUT_TENSOR, info, index, &is_constant, &value);
  if (!is_constant) throw std::runtime_error("weights must be constants of the graph");
  return tensor_of(value);
}

inline int64_t attribute(const Info* info, const char* name) {
  int64_t value = 0;
  call<const Info*, const char*, int64_t*>(KERNEL_INFO_GET_ATTRIBUTE_INT64, info, name, &value);
  return value;
}

// Calls work(i) for i < count on the session's threads.
template <typename Work>
void parallel(Context* context, long count, const Work& work) {
  const auto one = [](void* given, size_t i) { (*static_cast<const Work*>(given))(static_cast<long>(i)); };
  call<const Context*, void (*)(void*, size_t), size_t, size_t, void*>(
      KERNEL_CONTEXT_PARALLEL_FOR, context, one, count, 0, const_cast<Work*>(&work));
}

// An operator as the runtime knows it. `Kernel` is made of an Info and has `void run(Context*)`, and as constants its
// NAME, the presence of its INPUTS and that of its OUTPUTS; all tensors are of floats.
struct Operator {
  uint32_t version = VERSION;
  void* create_v1 = nullptr;
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*) = [](const Operator*) -> const char* { return nullptr; };  // the CPU's
  int (*input_type)(const Operator*, size_t) = [](const Operator*, size_t) { return FLOAT; };
  size_t (*num_inputs)(const Operator*);
  int (*output_type)(const Operator*, size_t) = [](const Operator*, size_t) { return FLOAT; };
  size_t (*num_outputs)(const Operator*);
  void* compute_v1 = nullptr;
  void (*destroy)(void* kernel);
  int (*input_presence)(const Operator*, size_t);
  int (*output_presence)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };
  int (*min_inputs)(const Operator*) = [](const Operator*) { return 1; };
  int (*same_inputs)(const Operator*) = [](const Operator*) { return 1; };
  int (*min_outputs)(const Operator*) = [](const Operator*) { return 1; };
  int (*same_outputs)(const Operator*) = [](const Operator*) { return 1; };
  Status* (*create)(const Operator*, Api, const Info*, void** kernel);
  Status* (*compute)(void* kernel, Context*);
  void* infer_shapes = nullptr;
  int (*first_version)(const Operator*) = [](const Operator*) { return 1; };
  int (*last_version)(const Operator*) = [](const Operator*) { return 1 << 20; };
  void* more[4] = {};  // of later versions
};

template <typename Kernel>
Operator operator_of() {
  Operator made;
  made.name = [](const Operator*) { return Kernel::NAME; };
  made.num_inputs = [](const Operator*) { return std::size(Kernel::INPUTS); };
  made.num_outputs = [](const Operator*) { return std::size(Kernel::OUTPUTS); };
  made.input_presence = [](const Operator*, size_t i) -> int { return Kernel::INPUTS[i]; };
  made.output_presence = [](const Operator*, size_t i) -> int { return Kernel::OUTPUTS[i]; };
  made.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  made.create = [](const Operator*, Api, const Info* info, void** kernel) -> Status* {
    try {
      *kernel = new Kernel(info);
      return nullptr;
    } catch (const std::exception& error) {
      return failed(error);
    }
  };
  made.compute = [](void* kernel, Context* context) -> Status* {
    try {
      static_cast<Kernel*>(kernel)->run(context);
      return nullptr;
    } catch (const std::exception& error) {
      return failed(error);
    }
  };
  return made;
}

}  // namespace skylapse::ort
