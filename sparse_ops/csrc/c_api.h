/* The library without ONNX Runtime: for tests, benchmarks and diagnosis, from C or through a foreign function
 * interface. Sessions need none of this; they use RegisterCustomOps. All functions are thread-safe and none
 * throws, prints or aborts. */
#ifndef SPARSE_ONNX_C_API_H_
#define SPARSE_ONNX_C_API_H_

#include <stddef.h>
#include <stdint.h>

#define SPARSE_ONNX_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct SparseOnnxArray {
  const void* data;
  size_t count; /* elements */
} SparseOnnxArray;

/* A stored weight: what an operator's attributes and inputs say of it, in the order of its format, see
 * sparse_ops/formats/. Arrays of floats may have any alignment. */
typedef struct SparseOnnxWeight {
  const char* format; /* the attribute of that name */
  const int64_t* sizes;
  size_t size_count;
  const SparseOnnxArray* parts;
  size_t part_count;
  SparseOnnxArray bias;   /* float32 */
  const int64_t* linears; /* outputs of each of several linears; none: it is that of one */
  size_t linear_count;
} SparseOnnxWeight;

/* Values of `activation`. */
enum {
  SPARSE_ONNX_NONE,
  SPARSE_ONNX_RELU,
  SPARSE_ONNX_GELU,
  SPARSE_ONNX_GELU_TANH,
  SPARSE_ONNX_SILU,
  SPARSE_ONNX_QUICK_GELU
};

/* Version of the package that the library was built from. */
SPARSE_ONNX_EXPORT const char* sparse_onnx_version(void);

/* Name of the instruction set in use. If SPARSE_ONNX_FORCE_ISA is wrong: NULL, and the reason in `message`.
 */
SPARSE_ONNX_EXPORT const char* sparse_onnx_isa(char* message, size_t message_size);

/* Name of the feature number `index` of the processor that kernels may use; NULL past the end, and if
 * SPARSE_ONNX_FORCE_ISA is wrong. */
SPARSE_ONNX_EXPORT const char* sparse_onnx_feature_name(size_t index);

/* Name of the kernel number `index` of the table, best first; NULL past the end. */
SPARSE_ONNX_EXPORT const char* sparse_onnx_kernel_name(size_t index);

/* 1 if the processor can run that kernel, 0 if not or if there is no such kernel. */
SPARSE_ONNX_EXPORT int sparse_onnx_kernel_supported(const char* kernel);

/* 0 if the weight obeys every rule of the format, the same that a session checks; else 1 and the reason in
 * `message`. */
SPARSE_ONNX_EXPORT int sparse_onnx_check(const SparseOnnxWeight* weight, char* message, size_t message_size);

/* y [tokens, N] = activation(x [tokens, K] . weight + bias), row-major, in the calling thread. `kernel` names
 * a kernel of the table, or is NULL for what a session would choose. Returns 0, or 1 and the reason in
 * `message`. */
SPARSE_ONNX_EXPORT int sparse_onnx_run(const SparseOnnxWeight* weight, int activation, const char* kernel,
                                       const float* x, size_t tokens, float* y, char* message,
                                       size_t message_size);

/* Name of the kernel that a session would use for a full tile of a weight with these sizes and `tokens`
 * tokens; NULL if SPARSE_ONNX_FORCE_ISA is wrong or the format has no such sizes. */
SPARSE_ONNX_EXPORT const char* sparse_onnx_select(const char* format, const int64_t* sizes, size_t size_count,
                                                  size_t tokens);

/* Floating-point operations per second that multiply-adds in registers reach in one thread, in the widest
 * vectors that the kernel's instruction set has; measured for about `seconds`. 0 if the kernel cannot run
 * here. */
SPARSE_ONNX_EXPORT double sparse_onnx_peak(const char* kernel, double seconds);

/* The same where every multiply-add loads one factor from the first-level cache. */
SPARSE_ONNX_EXPORT double sparse_onnx_load_peak(const char* kernel, double seconds);

/* Processor time in seconds of one call of sparse_onnx_run without activation, the check of the weight apart:
 * the lower quartile of calls during about `seconds`, at least seven, warm in the caches. `kernel` as there.
 * 0 if that is not possible, and the reason in `message`. */
SPARSE_ONNX_EXPORT double sparse_onnx_time(const SparseOnnxWeight* weight, const char* kernel, size_t tokens,
                                           double seconds, char* message, size_t message_size);

#ifdef __cplusplus
}
#endif

#endif /* SPARSE_ONNX_C_API_H_ */
