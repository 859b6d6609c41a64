#include "ops/op_support.h"

#include <atomic>

namespace sparse_ops {

OrtCustomOp cpu_op() {
  OrtCustomOp op{};
  op.version = kOrtApiVersion;
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEM_DEFAULT; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

NodeReader::NodeReader(const OrtApi& api, const OrtKernelInfo* info, const char* op_type)
    : api_(api), info_(info) {
  size_t size = 0;
  check_status(api_.KernelInfo_GetNodeName(info, nullptr, &size));
  std::string name(size, '\0');
  check_status(api_.KernelInfo_GetNodeName(info, name.data(), &size));
  name.resize(size > 0 ? size - 1 : 0);  // the size counts the terminating zero
  where_ = "sparse_onnx: node '" + name + "' (" + op_type + ")";
}

void NodeReader::fail(const std::string& what) const { throw InvalidError{where_ + ": " + what}; }

int64_t NodeReader::integer(const char* name) const {
  int64_t value = 0;
  if (OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value)) {
    api_.ReleaseStatus(status);
    fail(std::string("attribute ") + name + " is missing or no integer");
  }
  return value;
}

std::vector<int64_t> NodeReader::integers(const char* name) const {
  int64_t values[16];
  size_t count = std::size(values);
  if (OrtStatus* status = api_.KernelInfoGetAttributeArray_int64(info_, name, values, &count)) {
    api_.ReleaseStatus(status);
    fail(std::string("attribute ") + name + " is missing or no list of at most 16 integers");
  }
  return {values, values + count};
}

std::vector<int64_t> NodeReader::integers(const char* name, size_t count) const {
  std::vector<int64_t> found = integers(name);
  if (found.size() != count) {
    fail(std::string("attribute ") + name + " is " + text_of(found) + ", expected " + std::to_string(count) +
         " sizes");
  }
  return found;
}

float NodeReader::number(const char* name) const {
  float value = 0;
  if (OrtStatus* status = api_.KernelInfoGetAttribute_float(info_, name, &value)) {
    api_.ReleaseStatus(status);
    fail(std::string("attribute ") + name + " is missing or no float");
  }
  return value;
}

std::string NodeReader::text(const char* name) const {
  char found[64] = {};
  size_t size = sizeof(found);
  if (OrtStatus* status = api_.KernelInfoGetAttribute_string(info_, name, found, &size)) {
    api_.ReleaseStatus(status);
    fail(std::string("attribute ") + name + " is missing or no short text");
  }
  return found;
}

size_t NodeReader::one_of(const char* name, std::initializer_list<const char*> values) const {
  std::string known;
  for (const char* value : values) known += (known.empty() ? "" : " and ") + std::string(value);
  char found[64] = {};
  size_t size = sizeof(found);
  if (OrtStatus* status = api_.KernelInfoGetAttribute_string(info_, name, found, &size)) {
    api_.ReleaseStatus(status);
    fail(std::string("attribute ") + name + " is missing or unknown; this library reads " + known);
  }
  size_t index = 0;
  for (const char* value : values) {
    if (std::string(found) == value) return index;
    ++index;
  }
  fail(std::string("attribute ") + name + " is '" + found + "'; this library reads " + known);
}

NodeReader::Constant NodeReader::constant(size_t index, const char* name, OrtElementType type) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check_status(api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (!is_constant || value == nullptr) {
    fail(std::string("input ") + name + " is not a constant initializer");
  }
  Owned<OrtTensorTypeAndShapeInfo> shape(api_.ReleaseTensorTypeAndShapeInfo);
  check_status(api_.GetTensorTypeAndShape(value, shape.out()));
  OrtElementType found = ORT_UNDEFINED;
  size_t rank = 0, count = 0;
  check_status(api_.GetTensorElementType(shape.get(), &found));
  check_status(api_.GetDimensionsCount(shape.get(), &rank));
  if (found != type || rank != 1) {
    fail(std::string("input ") + name + " has a wrong element type or is no vector");
  }
  check_status(api_.GetTensorShapeElementCount(shape.get(), &count));
  void* data = nullptr;
  check_status(api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return {data, count};
}

Features NodeReader::features() const {
  const FeatureChoice choice = active_features();
  if (choice.error != nullptr) fail(choice.error);
  return choice.features;
}

void NodeReader::log(const std::string& message) const {
  const OrtLogger* logger = nullptr;
  check_status(api_.KernelInfo_GetLogger(info_, &logger));
  const std::string line = where_ + ": " + message;
  check_status(
      api_.Logger_LogMessage(logger, ORT_LOG_INFO, line.c_str(), "op_support.cc", __LINE__, "Kernel"));
}

namespace {

// Its shape goes to `dims`, the number of its elements to `elements` and what they are to `type`.
const void* input(const OrtApi& api, const OrtKernelContext* context, size_t index, const OrtValue*& value,
                  std::vector<int64_t>& dims, size_t& elements, OrtElementType* type = nullptr) {
  check_status(api.KernelContext_GetInput(context, index, &value));
  Owned<OrtTensorTypeAndShapeInfo> info(api.ReleaseTensorTypeAndShapeInfo);
  check_status(api.GetTensorTypeAndShape(value, info.out()));
  size_t rank = 0;
  check_status(api.GetDimensionsCount(info.get(), &rank));
  check_status(api.GetTensorShapeElementCount(info.get(), &elements));
  dims.resize(rank);
  check_status(api.GetDimensions(info.get(), dims.data(), rank));
  if (type != nullptr) check_status(api.GetTensorElementType(info.get(), type));
  void* data = nullptr;
  check_status(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

}  // namespace

InputTensor float_input(const OrtApi& api, const OrtKernelContext* context, size_t index) {
  InputTensor tensor{};
  tensor.data =
      static_cast<const float*>(input(api, context, index, tensor.value, tensor.dims, tensor.elements));
  return tensor;
}

void expect_rows(const std::vector<int64_t>& dims, const std::string& where, size_t K) {
  if (dims.empty() || dims.back() != static_cast<int64_t>(K)) {
    throw InvalidError{where + ": input X has shape " + text_of(dims) + ", expected [..., " +
                       std::to_string(K) + "]"};
  }
}

InputTensor rows_input(const OrtApi& api, const OrtKernelContext* context, const std::string& where,
                       size_t K) {
  InputTensor x = float_input(api, context, 0);
  expect_rows(x.dims, where, K);
  return x;
}

ByteTensor byte_input(const OrtApi& api, const OrtKernelContext* context, const std::string& where,
                      size_t index, const char* name) {
  ByteTensor x{};
  OrtElementType type = ORT_UNDEFINED;
  x.data = static_cast<const unsigned char*>(input(api, context, index, x.value, x.dims, x.elements, &type));
  if (type != ORT_INT8 && type != ORT_UINT8) {
    throw InvalidError{where + ": input " + name + " is neither int8 nor uint8"};
  }
  x.is_signed = type == ORT_INT8;
  return x;
}

IntegerTensor integer_input(const OrtApi& api, const OrtKernelContext* context, size_t index) {
  IntegerTensor tensor{};
  const OrtValue* value = nullptr;
  size_t elements = 0;
  tensor.data = static_cast<const int32_t*>(input(api, context, index, value, tensor.dims, elements));
  return tensor;
}

namespace {

void* output(const OrtApi& api, OrtKernelContext* context, size_t index, const std::vector<int64_t>& dims) {
  OrtValue* value = nullptr;
  check_status(api.KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
  void* data = nullptr;
  check_status(api.GetTensorMutableData(value, &data));
  return data;
}

}  // namespace

float* float_output(const OrtApi& api, OrtKernelContext* context, size_t index,
                    const std::vector<int64_t>& dims) {
  return static_cast<float*>(output(api, context, index, dims));
}

unsigned char* byte_output(const OrtApi& api, OrtKernelContext* context, size_t index,
                           const std::vector<int64_t>& dims) {
  return static_cast<unsigned char*>(output(api, context, index, dims));
}

std::string text_of(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t axis = 0; axis < dims.size(); ++axis) text += (axis ? ", " : "") + std::to_string(dims[axis]);
  return text + "]";
}

Scratch::Scratch(const OrtApi& api, const OrtKernelContext* context, const OrtValue* value, size_t size)
    : api_(api), allocator_(api.ReleaseAllocator) {
  const OrtMemoryInfo* memory_info = nullptr;
  check_status(api.GetTensorMemoryInfo(value, &memory_info));
  check_status(api.KernelContext_GetAllocator(context, memory_info, allocator_.out()));
  check_status(api.AllocatorAlloc(allocator_.get(), size, &memory_));
}

Scratch::~Scratch() {
  if (OrtStatus* status = api_.AllocatorFree(allocator_.get(), memory_)) api_.ReleaseStatus(status);
}

bool SessionWorkers::run(size_t total, void (*task)(void*, size_t), void* context) {
  struct Counted {
    void (*task)(void*, size_t);
    void* context;
    Attendance& attendance;
  } counted{task, context, attendance_};
  const auto counted_task = [](void* c, size_t index) {
    const Counted& work = *static_cast<const Counted*>(c);
    work.attendance.here();
    work.task(work.context, index);
  };
  status_ = api_.KernelContext_ParallelFor(context_, counted_task, total, 0, &counted);
  return status_ == nullptr;
}

bool input_shape(const OrtApi& api, const OrtShapeInferContext* context, size_t index, SymbolicShape& shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // borrowed
  check_status(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  check_status(api.GetDimensionsCount(info, &rank));
  if (rank == 0) return false;  // how the runtime says that the rank is unknown
  std::vector<const char*> names(rank);
  shape.dims.resize(rank);
  check_status(api.GetDimensions(info, shape.dims.data(), rank));
  check_status(api.GetSymbolicDimensions(info, names.data(), rank));
  shape.names.assign(names.begin(), names.end());
  return true;
}

void set_output_shape(const OrtApi& api, const OrtShapeInferContext* context, size_t index,
                      SymbolicShape shape, OrtElementType type) {
  // The runtime would store an unknown dimension without a name as the number -1, which then spreads as if it
  // were a size. A name of its own keeps it unknown, and different from every other.
  static std::atomic<uint64_t> unknown{0};
  const size_t rank = shape.dims.size();
  shape.names.resize(rank);
  std::vector<const char*> names(rank);
  for (size_t axis = 0; axis < rank; ++axis) {
    if (shape.dims[axis] < 0 && shape.names[axis].empty()) {
      shape.names[axis] = "sparse_onnx_unknown_" + std::to_string(unknown++);
    }
    names[axis] = shape.names[axis].c_str();
  }
  Owned<OrtTensorTypeAndShapeInfo> info(api.ReleaseTensorTypeAndShapeInfo);
  check_status(api.CreateTensorTypeAndShapeInfo(info.out()));
  check_status(api.SetTensorElementType(info.get(), type));
  check_status(api.SetDimensions(info.get(), shape.dims.data(), rank));
  check_status(api.SetSymbolicDimensions(info.get(), names.data(), rank));
  check_status(api.ShapeInferContext_SetOutputTypeShape(context, index, info.get()));
}

int64_t integer_attribute(const OrtApi& api, const OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  check_status(api.ShapeInferContext_GetAttribute(context, name, &attribute));
  int64_t value = 0;
  size_t size = 0;
  check_status(api.ReadOpAttr(attribute, ORT_ATTR_INT, &value, sizeof(value), &size));
  return value;
}

std::vector<int64_t> integers_attribute(const OrtApi& api, const OrtShapeInferContext* context,
                                        const char* name) {
  const OrtOpAttr* attribute = nullptr;
  check_status(api.ShapeInferContext_GetAttribute(context, name, &attribute));
  int64_t values[16];
  size_t bytes = 0;
  check_status(api.ReadOpAttr(attribute, ORT_ATTR_INTS, values, sizeof(values), &bytes));
  return {values, values + bytes / sizeof(int64_t)};
}

void infer_product_shapes(const OrtApi& api, OrtShapeInferContext* context, size_t outputs, bool gated) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  shape.names.back() = "";
  const std::vector<int64_t> channels =
      outputs > 1 ? integers_attribute(api, context, "split")
                  : std::vector{integer_attribute(api, context, "N") / (gated ? 2 : 1)};
  if (channels.size() != outputs) return;  // refused when the kernel is created
  for (size_t i = 0; i < outputs; ++i) {
    shape.dims.back() = channels[i];
    set_output_shape(api, context, i, shape);
  }
}

void infer_pair_shape(const OrtApi& api, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  shape.names.back() = "";
  shape.dims.back() = integer_attribute(api, context, "down_N");
  set_output_shape(api, context, 0, shape);
}

}  // namespace sparse_ops
