// What the operators share: reading a node when its kernel is created, tensors when it runs, and shapes
// before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "kernels/workers.h"
#include "ops/thread_count.h"
#include "ort_abi.h"
#include "ort_status.h"

namespace sparse_ops {

constexpr const char* kDomain = "sparse_onnx";

// A description for the CPU with one op version, whose inputs and outputs are all required. Left to set: the
// name, the types and their numbers, and the functions of the kernel.
OrtCustomOp cpu_op();

// The attributes and constant inputs of one node. Every problem is an InvalidError that names the node.
class NodeReader {
 public:
  NodeReader(const OrtApi& api, const OrtKernelInfo* info, const char* op_type);

  const OrtApi& api() const { return api_; }
  const std::string& where() const { return where_; }
  [[noreturn]] void fail(const std::string& what) const;

  int64_t integer(const char* name) const;
  std::vector<int64_t> integers(const char* name) const;
  // Of which there are `count`.
  std::vector<int64_t> integers(const char* name, size_t count) const;
  float number(const char* name) const;
  // A text of at most 63 characters.
  std::string text(const char* name) const;
  // An attribute of which this library knows one value only.
  void expect(const char* name, const char* value) const { one_of(name, {value}); }
  // The place among `values` of an attribute of which this library knows these.
  size_t one_of(const char* name, std::initializer_list<const char*> values) const;

  // A constant input of rank 1; valid as long as the kernel.
  struct Constant {
    const void* data;
    size_t count;
  };
  Constant constant(size_t index, const char* name, OrtElementType type) const;

  // What kernels may use.
  Features features() const;

  void log(const std::string& message) const;

 private:
  const OrtApi& api_;
  const OrtKernelInfo* info_;
  std::string where_;
};

// An input while a kernel runs.
struct InputTensor {
  const OrtValue* value;
  std::vector<int64_t> dims;
  size_t elements;
  const float* data;
};
InputTensor float_input(const OrtApi& api, const OrtKernelContext* context, size_t index);
// The first one, X [..., K], of the operator that `where` names.
InputTensor rows_input(const OrtApi& api, const OrtKernelContext* context, const std::string& where, size_t K);
// Throws unless the shape of X is [..., K].
void expect_rows(const std::vector<int64_t>& dims, const std::string& where, size_t K);
// An input of bytes, with or without a sign, of the operator that `where` names.
struct ByteTensor {
  const OrtValue* value;
  std::vector<int64_t> dims;
  size_t elements;
  const unsigned char* data;
  bool is_signed;
};
ByteTensor byte_input(const OrtApi& api, const OrtKernelContext* context, const std::string& where,
                      size_t index, const char* name);
// One of int32.
struct IntegerTensor {
  std::vector<int64_t> dims;
  const int32_t* data;
};
IntegerTensor integer_input(const OrtApi& api, const OrtKernelContext* context, size_t index);
float* float_output(const OrtApi& api, OrtKernelContext* context, size_t index,
                    const std::vector<int64_t>& dims);
unsigned char* byte_output(const OrtApi& api, OrtKernelContext* context, size_t index,
                           const std::vector<int64_t>& dims);

// "[2, 3]"
std::string text_of(const std::vector<int64_t>& dims);

// Memory of the runtime's allocator for the device of `value`.
class Scratch {
 public:
  Scratch(const OrtApi& api, const OrtKernelContext* context, const OrtValue* value, size_t size);
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  void* get() const { return memory_; }

 private:
  const OrtApi& api_;
  Owned<OrtAllocator> allocator_;
  void* memory_ = nullptr;
};

// The session's own threads, which `count` learns to know; nullptr where nothing is planned for them.
class SessionWorkers final : public Workers {
 public:
  SessionWorkers(const OrtApi& api, const OrtKernelContext* context, ThreadCount* count = nullptr)
      : api_(api), context_(context), count_(count) {}
  SessionWorkers(const SessionWorkers&) = delete;
  SessionWorkers& operator=(const SessionWorkers&) = delete;
  ~SessionWorkers() {
    if (count_ != nullptr) count_->saw(attendance_.threads());
  }
  bool run(size_t total, void (*task)(void*, size_t), void* context) override;
  OrtStatus* status() const { return status_; }

 private:
  const OrtApi& api_;
  const OrtKernelContext* context_;
  ThreadCount* count_;
  Attendance attendance_;
  OrtStatus* status_ = nullptr;
};

// A shape at inference: -1 where a dimension is unknown, with its name or "".
struct SymbolicShape {
  std::vector<int64_t> dims;
  std::vector<std::string> names;
};
// False if not even the rank is known.
bool input_shape(const OrtApi& api, const OrtShapeInferContext* context, size_t index, SymbolicShape& shape);
void set_output_shape(const OrtApi& api, const OrtShapeInferContext* context, size_t index,
                      SymbolicShape shape, OrtElementType type = ORT_FLOAT);
int64_t integer_attribute(const OrtApi& api, const OrtShapeInferContext* context, const char* name);
std::vector<int64_t> integers_attribute(const OrtApi& api, const OrtShapeInferContext* context,
                                        const char* name);
// The shapes of the outputs of a product with W [K, N]: that of X [..., K], but for the last dimension. Of
// several outputs the attribute `split` has the channels; a gated one has N / 2, any other N.
void infer_product_shapes(const OrtApi& api, OrtShapeInferContext* context, size_t outputs = 1,
                          bool gated = false);
// The same of two linears in a row, of which the attribute `down_N` has the channels.
void infer_pair_shape(const OrtApi& api, OrtShapeInferContext* context);

}  // namespace sparse_ops
