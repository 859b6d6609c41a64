// The part of ONNX Runtime's stable C ABI that this library uses, declared from its documented layout.
//
// The table of functions only ever grows, and its API version 17 is offered by every runtime from 1.17 on.
// Functions behind slot 275 must not be called. Every status that a function returns is owned by the caller.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtLogger;
struct OrtAllocator;
struct OrtMemoryInfo;
struct OrtCustomOp;

enum OrtErrorCode : int { ORT_OK = 0, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_RUNTIME_EXCEPTION = 6 };
enum OrtElementType : int {
  ORT_UNDEFINED = 0,
  ORT_FLOAT = 1,
  ORT_UINT8 = 2,
  ORT_INT8 = 3,
  ORT_INT32 = 6,
  ORT_FLOAT16 = 10
};
enum OrtCharacteristic : int { ORT_REQUIRED = 0 };
enum OrtMemType : int { ORT_MEM_DEFAULT = 0 };
enum OrtLoggingLevel : int { ORT_LOG_INFO = 1 };
enum OrtOpAttrType : int { ORT_ATTR_INT = 1, ORT_ATTR_INTS = 2 };

using OrtSlot = void (*)();  // a function that this library does not call

struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* message);  // 0
  OrtSlot unused_1[1];
  const char* (*GetErrorMessage)(const OrtStatus* status);  // 2
  OrtSlot unused_3[23];
  OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);         // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);      // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);  // 28
  OrtSlot unused_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);  // 51
  OrtSlot unused_52[5];
  OrtStatus* (*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo** out);                      // 57
  OrtStatus* (*SetTensorElementType)(OrtTensorTypeAndShapeInfo* info, OrtElementType type);         // 58
  OrtStatus* (*SetDimensions)(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t count);  // 59
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, OrtElementType* out);   // 60
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);             // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count);  // 62
  OrtStatus* (*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo* info, const char** names,
                                      size_t count);                                             // 63
  OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);  // 64
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);   // 65
  OrtSlot unused_66[9];
  OrtStatus* (*AllocatorAlloc)(OrtAllocator* allocator, size_t size, void** out);  // 75
  OrtStatus* (*AllocatorFree)(OrtAllocator* allocator, void* memory);              // 76
  OrtSlot unused_77[8];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* out);  // 85
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name,
                                             int64_t* out);  // 86
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name, char* out,
                                              size_t* size);  // 87
  OrtSlot unused_88[2];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                       const OrtValue** out);  // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dims,
                                        size_t count,
                                        OrtValue** out);  // 91
  OrtSlot unused_92[1];
  void (*ReleaseStatus)(OrtStatus* status);  // 93
  OrtSlot unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);  // 99
  OrtSlot unused_100[1];
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain* domain);  // 101
  OrtSlot unused_102[28];
  OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions* options, const char* key, const char* value);  // 130
  OrtSlot unused_131[1];
  void (*ReleaseAllocator)(OrtAllocator* allocator);  // 132
  OrtSlot unused_133[30];
  OrtStatus* (*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo* info, const char* name, int64_t* out,
                                                  size_t* size);  // 163
  OrtSlot unused_164[30];
  OrtStatus* (*GetTensorMemoryInfo)(const OrtValue* value, const OrtMemoryInfo** out);  // 194
  OrtSlot unused_195[42];
  OrtStatus* (*HasSessionConfigEntry)(const OrtSessionOptions* options, const char* key, int* out);  // 237
  OrtSlot unused_238[6];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* out, size_t* size);  // 244
  OrtStatus* (*KernelInfo_GetLogger)(const OrtKernelInfo* info, const OrtLogger** out);      // 245
  OrtSlot unused_246[1];
  OrtStatus* (*Logger_LogMessage)(const OrtLogger* logger, OrtLoggingLevel level, const char* message,
                                  const char* file, int line, const char* function);  // 247
  OrtSlot unused_248[1];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** out);  // 249
  OrtSlot unused_250[3];
  OrtStatus* (*KernelContext_GetAllocator)(const OrtKernelContext* context, const OrtMemoryInfo* memory,
                                           OrtAllocator** out);  // 253
  OrtSlot unused_254[14];
  OrtStatus* (*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                    OrtTensorTypeAndShapeInfo** borrowed);  // 268
  OrtStatus* (*ShapeInferContext_GetAttribute)(const OrtShapeInferContext* context, const char* name,
                                               const OrtOpAttr** out);  // 269
  OrtStatus* (*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                     const OrtTensorTypeAndShapeInfo* info);  // 270
  OrtStatus* (*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo* info, const char** names,
                                      size_t count);  // 271
  OrtStatus* (*ReadOpAttr)(const OrtOpAttr* attribute, OrtOpAttrType type, void* data, size_t size,
                           size_t* out);  // 272
  OrtSlot unused_273[1];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*task)(void*, size_t),
                                          size_t total, size_t batches, void* user);  // 274
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Fields up to API version 17 are used; those of version 18 stay zero.
struct OrtCustomOp {
  uint32_t version;
  OrtSlot CreateKernel;
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  OrtElementType (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  OrtElementType (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  OrtSlot KernelCompute;
  void (*KernelDestroy)(void* kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  OrtSlot of_version_18[4];
};

}  // extern "C"

namespace sparse_ops {

constexpr uint32_t kOrtApiVersion = 17;

#define ORT_SLOT(name, slot) static_assert(offsetof(OrtApi, name) == slot * sizeof(void*))
ORT_SLOT(CreateStatus, 0);
ORT_SLOT(GetErrorMessage, 2);
ORT_SLOT(CreateCustomOpDomain, 26);
ORT_SLOT(CustomOpDomain_Add, 27);
ORT_SLOT(AddCustomOpDomain, 28);
ORT_SLOT(GetTensorMutableData, 51);
ORT_SLOT(CreateTensorTypeAndShapeInfo, 57);
ORT_SLOT(SetTensorElementType, 58);
ORT_SLOT(SetDimensions, 59);
ORT_SLOT(GetTensorElementType, 60);
ORT_SLOT(GetDimensionsCount, 61);
ORT_SLOT(GetDimensions, 62);
ORT_SLOT(GetSymbolicDimensions, 63);
ORT_SLOT(GetTensorShapeElementCount, 64);
ORT_SLOT(GetTensorTypeAndShape, 65);
ORT_SLOT(AllocatorAlloc, 75);
ORT_SLOT(AllocatorFree, 76);
ORT_SLOT(KernelInfoGetAttribute_float, 85);
ORT_SLOT(KernelInfoGetAttribute_int64, 86);
ORT_SLOT(KernelInfoGetAttribute_string, 87);
ORT_SLOT(KernelContext_GetInput, 90);
ORT_SLOT(KernelContext_GetOutput, 91);
ORT_SLOT(ReleaseStatus, 93);
ORT_SLOT(ReleaseTensorTypeAndShapeInfo, 99);
ORT_SLOT(ReleaseCustomOpDomain, 101);
ORT_SLOT(AddSessionConfigEntry, 130);
ORT_SLOT(ReleaseAllocator, 132);
ORT_SLOT(KernelInfoGetAttributeArray_int64, 163);
ORT_SLOT(GetTensorMemoryInfo, 194);
ORT_SLOT(HasSessionConfigEntry, 237);
ORT_SLOT(KernelInfo_GetNodeName, 244);
ORT_SLOT(KernelInfo_GetLogger, 245);
ORT_SLOT(Logger_LogMessage, 247);
ORT_SLOT(KernelInfoGetConstantInput_tensor, 249);
ORT_SLOT(KernelContext_GetAllocator, 253);
ORT_SLOT(ShapeInferContext_GetInputTypeShape, 268);
ORT_SLOT(ShapeInferContext_GetAttribute, 269);
ORT_SLOT(ShapeInferContext_SetOutputTypeShape, 270);
ORT_SLOT(SetSymbolicDimensions, 271);
ORT_SLOT(ReadOpAttr, 272);
ORT_SLOT(KernelContext_ParallelFor, 274);
#undef ORT_SLOT

#define ORT_FIELD(name, index) static_assert(offsetof(OrtCustomOp, name) == index * sizeof(void*))
ORT_FIELD(version, 0);
ORT_FIELD(GetName, 2);
ORT_FIELD(GetExecutionProviderType, 3);
ORT_FIELD(GetInputType, 4);
ORT_FIELD(GetInputTypeCount, 5);
ORT_FIELD(GetOutputType, 6);
ORT_FIELD(GetOutputTypeCount, 7);
ORT_FIELD(KernelDestroy, 9);
ORT_FIELD(GetInputCharacteristic, 10);
ORT_FIELD(GetOutputCharacteristic, 11);
ORT_FIELD(GetInputMemoryType, 12);
ORT_FIELD(GetVariadicInputMinArity, 13);
ORT_FIELD(GetVariadicOutputHomogeneity, 16);
ORT_FIELD(CreateKernelV2, 17);
ORT_FIELD(KernelComputeV2, 18);
ORT_FIELD(InferOutputShapeFn, 19);
ORT_FIELD(GetStartVersion, 20);
ORT_FIELD(GetEndVersion, 21);
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*));
#undef ORT_FIELD

}  // namespace sparse_ops
