#include "ops/sparse_matmul.h"

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "kernels/spmm/check.h"
#include "kernels/spmm/spmm.h"
#include "ort_status.h"

namespace sparse_ops {
namespace {

using spmm::Activation;

constexpr size_t kInputCount = 6;
constexpr const char* kInputNames[kInputCount] = {"X", "values", "offsets", "counts", "rows", "bias"};
constexpr OrtElementType kInputTypes[kInputCount] = {ORT_FLOAT, ORT_FLOAT, ORT_UINT8,
                                                     ORT_UINT8, ORT_UINT8, ORT_FLOAT};
constexpr const char* kFormat = "chunked_csc";

// A description, and behind it what its callbacks need.
struct Op : OrtCustomOp {
  const OrtApi* api;
  const char* name;
  Activation activation;
};

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

class Kernel {
 public:
  Kernel(const Op& op, const OrtApi& api, const OrtKernelInfo* info);
  const OrtApi& api() const { return api_; }
  void compute(OrtKernelContext* context) const;

 private:
  std::string node(const OrtKernelInfo* info) const;
  [[noreturn]] void fail(const std::string& what) const { throw InvalidError{where_ + ": " + what}; }
  int64_t integer(const OrtKernelInfo* info, const char* name) const;
  void check_format(const OrtKernelInfo* info) const;
  const void* constant(const OrtKernelInfo* info, size_t index, size_t& count) const;

  const OrtApi& api_;
  std::string where_;  // node and op type, for messages
  Isa isa_;
  spmm::CheckedWeight weight_;
};

Kernel::Kernel(const Op& op, const OrtApi& api, const OrtKernelInfo* info) : api_(api) {
  where_ = "sparse_onnx: node '" + node(info) + "' (" + op.name + ")";
  const IsaChoice choice = active_isa();
  if (choice.error != nullptr) fail(choice.error);
  isa_ = choice.isa;
  check_format(info);

  spmm::StoredWeight stored;
  stored.K = integer(info, "K");
  stored.N = integer(info, "N");
  stored.chunk = integer(info, "chunk");
  stored.block = integer(info, "block");
  stored.values = constant(info, 1, stored.value_count);
  stored.offsets = static_cast<const uint8_t*>(constant(info, 2, stored.offset_count));
  stored.counts = static_cast<const uint8_t*>(constant(info, 3, stored.count_count));
  stored.rows = static_cast<const uint8_t*>(constant(info, 4, stored.row_count));
  stored.bias = constant(info, 5, stored.bias_count);
  const std::string problem = spmm::check(stored, op.activation, weight_);
  if (!problem.empty()) fail(problem);

  const OrtLogger* logger = nullptr;
  check_status(api_.KernelInfo_GetLogger(info, &logger));
  const spmm::Kernel& kernel = spmm::select_kernel(isa_, weight_.weight, SIZE_MAX);
  const std::string message = where_ + ": kernel " + kernel.name;
  check_status(
      api_.Logger_LogMessage(logger, ORT_LOG_INFO, message.c_str(), "sparse_matmul.cc", __LINE__, "Kernel"));
}

std::string Kernel::node(const OrtKernelInfo* info) const {
  size_t size = 0;
  check_status(api_.KernelInfo_GetNodeName(info, nullptr, &size));
  std::string name(size, '\0');
  check_status(api_.KernelInfo_GetNodeName(info, name.data(), &size));
  name.resize(size > 0 ? size - 1 : 0);  // the size counts the terminating zero
  return name;
}

int64_t Kernel::integer(const OrtKernelInfo* info, const char* name) const {
  int64_t value = 0;
  OrtStatus* status = api_.KernelInfoGetAttribute_int64(info, name, &value);
  if (status != nullptr) {
    api_.ReleaseStatus(status);
    fail(std::string("attribute ") + name + " is missing or no integer");
  }
  return value;
}

void Kernel::check_format(const OrtKernelInfo* info) const {
  char value[64] = {};
  size_t size = sizeof(value);
  OrtStatus* status = api_.KernelInfoGetAttribute_string(info, "format", value, &size);
  if (status != nullptr) {
    api_.ReleaseStatus(status);
    fail(std::string("attribute format is missing or unknown; this library reads ") + kFormat);
  }
  if (std::string(value) != kFormat) {
    fail(std::string("attribute format is '") + value + "'; this library reads " + kFormat);
  }
}

// The data of a constant input; `count` becomes its number of elements.
const void* Kernel::constant(const OrtKernelInfo* info, size_t index, size_t& count) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check_status(api_.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || value == nullptr) {
    fail(std::string("input ") + kInputNames[index] + " is not a constant initializer");
  }
  Owned<OrtTensorTypeAndShapeInfo> shape(api_.ReleaseTensorTypeAndShapeInfo);
  check_status(api_.GetTensorTypeAndShape(value, shape.out()));
  OrtElementType type = ORT_UNDEFINED;
  size_t rank = 0;
  check_status(api_.GetTensorElementType(shape.get(), &type));
  check_status(api_.GetDimensionsCount(shape.get(), &rank));
  if (type != kInputTypes[index] || rank != 1) {
    fail(std::string("input ") + kInputNames[index] + " has a wrong element type or is no vector");
  }
  check_status(api_.GetTensorShapeElementCount(shape.get(), &count));
  void* data = nullptr;
  check_status(api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

// Memory of the runtime's allocator for the device of `value`.
class Scratch {
 public:
  Scratch(const OrtApi& api, const OrtKernelContext* context, const OrtValue* value, size_t size)
      : api_(api), allocator_(api.ReleaseAllocator) {
    const OrtMemoryInfo* memory_info = nullptr;
    check_status(api.GetTensorMemoryInfo(value, &memory_info));
    check_status(api.KernelContext_GetAllocator(context, memory_info, allocator_.out()));
    check_status(api.AllocatorAlloc(allocator_.get(), size, &memory_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (OrtStatus* status = api_.AllocatorFree(allocator_.get(), memory_)) api_.ReleaseStatus(status);
  }
  void* get() const { return memory_; }

 private:
  const OrtApi& api_;
  Owned<OrtAllocator> allocator_;
  void* memory_ = nullptr;
};

// The session's own threads.
class SessionWorkers final : public spmm::Workers {
 public:
  SessionWorkers(const OrtApi& api, const OrtKernelContext* context) : api_(api), context_(context) {}
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    status_ = api_.KernelContext_ParallelFor(context_, task, total, 0, context);
    return status_ == nullptr;
  }
  OrtStatus* status() const { return status_; }

 private:
  const OrtApi& api_;
  const OrtKernelContext* context_;
  OrtStatus* status_ = nullptr;
};

void Kernel::compute(OrtKernelContext* context) const {
  const spmm::Weight& weight = weight_.weight;
  const OrtValue* x = nullptr;
  check_status(api_.KernelContext_GetInput(context, 0, &x));
  Owned<OrtTensorTypeAndShapeInfo> info(api_.ReleaseTensorTypeAndShapeInfo);
  check_status(api_.GetTensorTypeAndShape(x, info.out()));
  size_t rank = 0, elements = 0;
  check_status(api_.GetDimensionsCount(info.get(), &rank));
  check_status(api_.GetTensorShapeElementCount(info.get(), &elements));
  std::vector<int64_t> dims(rank);
  check_status(api_.GetDimensions(info.get(), dims.data(), rank));
  if (rank == 0) fail("input X is a scalar, expected [..., " + std::to_string(weight.K) + "]");
  if (dims.back() != static_cast<int64_t>(weight.K)) {
    fail("the last dimension of input X is " + std::to_string(dims.back()) +
         ", expected K = " + std::to_string(weight.K));
  }
  dims.back() = static_cast<int64_t>(weight.N);
  OrtValue* y = nullptr;
  check_status(api_.KernelContext_GetOutput(context, 0, dims.data(), rank, &y));
  if (elements == 0) return;

  void* x_data = nullptr;
  void* y_data = nullptr;
  check_status(api_.GetTensorMutableData(const_cast<OrtValue*>(x), &x_data));
  check_status(api_.GetTensorMutableData(y, &y_data));
  const spmm::Plan plan = spmm::make_plan(weight, elements / weight.K, isa_);
  const Scratch scratch(api_, context, x, plan.scratch_bytes);
  SessionWorkers workers(api_, context);
  if (!spmm::run(plan, weight, static_cast<const float*>(x_data), static_cast<float*>(y_data), scratch.get(),
                 workers)) {
    check_status(workers.status());
  }
}

void infer_shape(const OrtApi& api, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* x = nullptr;  // borrowed
  check_status(api.ShapeInferContext_GetInputTypeShape(context, 0, &x));
  size_t rank = 0;
  check_status(api.GetDimensionsCount(x, &rank));
  if (rank == 0) return;  // how the runtime says that the rank is unknown
  std::vector<int64_t> dims(rank);
  std::vector<const char*> names(rank);
  check_status(api.GetDimensions(x, dims.data(), rank));
  check_status(api.GetSymbolicDimensions(x, names.data(), rank));
  const OrtOpAttr* attribute = nullptr;
  check_status(api.ShapeInferContext_GetAttribute(context, "N", &attribute));
  size_t size = 0;
  check_status(api.ReadOpAttr(attribute, ORT_ATTR_INT, &dims.back(), sizeof(int64_t), &size));
  names.back() = "";
  // The runtime would store an unknown dimension without a name as the number -1, which then spreads as if it were
  // a size. A name of its own keeps it unknown, and different from every other.
  static std::atomic<uint64_t> unknown{0};
  std::vector<std::string> made(rank);
  for (size_t axis = 0; axis + 1 < rank; ++axis) {
    if (dims[axis] >= 0 || names[axis][0] != '\0') continue;
    made[axis] = "sparse_onnx_unknown_" + std::to_string(unknown++);
    names[axis] = made[axis].c_str();
  }
  Owned<OrtTensorTypeAndShapeInfo> y(api.ReleaseTensorTypeAndShapeInfo);
  check_status(api.CreateTensorTypeAndShapeInfo(y.out()));
  check_status(api.SetTensorElementType(y.get(), ORT_FLOAT));
  check_status(api.SetDimensions(y.get(), dims.data(), rank));
  check_status(api.SetSymbolicDimensions(y.get(), names.data(), rank));
  check_status(api.ShapeInferContext_SetOutputTypeShape(context, 0, y.get()));
}

Op make_op(const OrtApi& api, const char* name, Activation activation) {
  Op op{};
  op.version = kOrtApiVersion;
  op.GetName = [](const OrtCustomOp* o) { return self(o).name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return kInputTypes[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputCount; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ORT_MEM_DEFAULT; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi* runtime, const OrtKernelInfo* info,
                         void** kernel) {
    return guarded(*runtime, [&] { *kernel = new Kernel(self(o), *runtime, info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& k = *static_cast<Kernel*>(kernel);
    return guarded(k.api(), [&] { k.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
    return guarded(*self(o).api, [&] { infer_shape(*self(o).api, context); });
  };
  op.api = &api;
  op.name = name;
  op.activation = activation;
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_ops(const OrtApi& api) {
  // A process may hold several runtimes. Sessions may outlive any moment at which these could be freed.
  static std::mutex mutex;
  static auto& sets = *new std::map<const OrtApi*, std::array<Op, 5>>;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = sets.try_emplace(&api);
  if (is_new) {
    place->second = {make_op(api, "SparseMatMul", Activation::none),
                     make_op(api, "SparseMatMulRelu", Activation::relu),
                     make_op(api, "SparseMatMulGelu", Activation::gelu),
                     make_op(api, "SparseMatMulGeluTanh", Activation::gelu_tanh),
                     make_op(api, "SparseMatMulSilu", Activation::silu)};
  }
  std::vector<const OrtCustomOp*> ops;
  for (const Op& op : place->second) ops.push_back(&op);
  return ops;
}

}  // namespace sparse_ops
