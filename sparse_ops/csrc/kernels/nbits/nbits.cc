#include "kernels/nbits/nbits.h"

#include <algorithm>

#include "kernels/nbits/table.h"
#include "kernels/sizes.h"

namespace sparse_ops::nbits {
namespace {

// Where many tokens need several passes over the weight, so much of it is taken at a time: it stays in the
// second-level cache.
constexpr size_t kWeightBytes = 256 * 1024;
// What makes waking a thread pay: activations to round, bytes of a weight to read.
constexpr size_t kRoundedTogether = 32 * 1024, kTaskBytes = 64 * 1024;
constexpr size_t kTasksPerThread = 4;

size_t blocks_of(const Weight& w) { return divide_up(w.N, kBlock); }
size_t groups_of(const Weight& w) { return divide_up(w.K, w.group); }
size_t stride_of(const Weight& w) { return round_up(w.K, kCacheLine); }
size_t rounded_bytes(const Weight& w, size_t tokens) { return tokens * stride_of(w); }

// Blocks of Y: where the weight is gated, each is made of two.
size_t output_blocks(const Weight& w) { return w.gated ? blocks_of(w) / 2 : blocks_of(w); }

// Numbers of what a gate multiplies that are in memory at a time.
size_t factors_of(const Weight& w, size_t tokens) {
  return w.gated ? std::min(tokens, kMaxRows) * (w.N / 2) : 0;
}

struct Job {
  const Kernel& kernel;
  const Weight& weight;
  const float* x;
  size_t tokens;
  std::span<const Output> outputs;
  int8_t* q;
  float* scales;
  int32_t* sums;
  float* factors;
  size_t tokens_per_task, blocks_per_task, blocks_per_pass;
};

void round_tokens(const Job& job, size_t begin, size_t end) {
  const Weight& w = job.weight;
  for (size_t t = begin; t < end; ++t) {
    job.kernel.round(job.x + t * w.K, w.K, w.group, stride_of(w), job.q + t * stride_of(w),
                     job.scales + t * groups_of(w), job.sums + t * groups_of(w));
  }
}

void round_task(void* context, size_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const size_t begin = index * job.tokens_per_task;
  round_tokens(job, begin, std::min(begin + job.tokens_per_task, job.tokens));
}

// `size` outputs of blocks begin..end-1 in rows of y, `stride` floats apart.
void multiply(const Job& job, Activation activation, const Rows& rows, size_t begin, size_t end, size_t size,
              float* y, size_t stride) {
  const Weight& w = job.weight;
  job.kernel.run(w, rows, begin, end, y, stride);
  for (size_t r = 0; r < rows.rows; ++r) {
    job.kernel.finish(activation, w.bias + begin * kBlock * sizeof(float), y + r * stride, size);
  }
}

// Blocks begin..end-1 of Y, which lie in `output` from column `column` on.
void compute(const Job& job, const Output& output, size_t begin, size_t end, size_t column) {
  const Weight& w = job.weight;
  const size_t size = std::min((end - begin) * kBlock, output.channels - column);
  for (size_t t = 0; t < job.tokens; t += kMaxRows) {
    const Rows rows = {job.q + t * stride_of(w), stride_of(w), job.scales + t * groups_of(w),
                       job.sums + t * groups_of(w), std::min(kMaxRows, job.tokens - t)};
    float* y = output.y + t * output.channels + column;
    multiply(job, w.activation, rows, begin, end, size, y, output.channels);
    if (!w.gated) continue;
    float* factors = job.factors + column;  // no other task has these columns
    const size_t behind = output_blocks(w);
    multiply(job, Activation::none, rows, begin + behind, end + behind, size, factors, output.channels);
    for (size_t r = 0; r < rows.rows; ++r) {
      for (size_t i = 0; i < size; ++i) y[r * output.channels + i] *= factors[r * output.channels + i];
    }
  }
}

void product_task(void* context, size_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const size_t begin = index * job.blocks_per_task;
  const size_t end = std::min(begin + job.blocks_per_task, output_blocks(job.weight));
  size_t at = 0;  // the first block of an output
  for (const Output& output : job.outputs) {
    const size_t behind = at + divide_up(output.channels, kBlock), last = std::min(end, behind);
    for (size_t first = std::max(begin, at); first < last; first += job.blocks_per_pass) {
      compute(job, output, first, std::min(first + job.blocks_per_pass, last), (first - at) * kBlock);
    }
    at = behind;
  }
}

}  // namespace

Table<Kernel> kernels() { return kKernels; }

const Kernel& select_kernel(Features features) {
  return choose_permitted(features,
                          [](Features f) { return select(without_reference<Kernel>(kKernels), f, int8); });
}

size_t scratch_bytes(const Weight& weight, size_t tokens) {
  return kCacheLine + rounded_bytes(weight, tokens) +
         tokens * groups_of(weight) * (sizeof(float) + sizeof(int32_t)) +
         factors_of(weight, tokens) * sizeof(float);
}

bool run(const Kernel& kernel, const Weight& weight, const float* x, size_t tokens,
         std::span<const Output> outputs, void* scratch, size_t threads, Workers& workers) {
  if (tokens == 0) return true;
  auto* memory = static_cast<int8_t*>(scratch);
  memory += -reinterpret_cast<uintptr_t>(memory) % kCacheLine;
  auto* scales = reinterpret_cast<float*>(memory + rounded_bytes(weight, tokens));
  auto* sums = reinterpret_cast<int32_t*>(scales + tokens * groups_of(weight));
  auto* factors = reinterpret_cast<float*>(sums + tokens * groups_of(weight));
  Job job = {kernel, weight, x, tokens, outputs, memory, scales, sums, factors, 0, 0, 0};
  job.tokens_per_task = divide_up(kRoundedTogether, weight.K);
  if (threads < 2 || job.tokens_per_task >= tokens) {
    round_tokens(job, 0, tokens);
  } else if (!workers.run(divide_up(tokens, job.tokens_per_task), round_task, &job)) {
    return false;
  }
  const size_t blocks = output_blocks(weight);
  const size_t bytes =
      (static_cast<size_t>(weight.values_end - weight.values) / blocks_of(weight) + weight.K) *
      (weight.gated ? 2 : 1);  // of a block of Y
  job.blocks_per_pass = tokens > kMaxRows ? std::max<size_t>(1, kWeightBytes / bytes) : blocks;
  job.blocks_per_task = blocks;
  if (threads > 1) {
    const size_t least = divide_up(kTaskBytes, bytes * divide_up(tokens, kMaxRows));
    job.blocks_per_task = std::min(blocks, std::max(least, divide_up(blocks, threads * kTasksPerThread)));
  }
  return workers.run(divide_up(blocks, job.blocks_per_task), product_task, &job);
}

}  // namespace sparse_ops::nbits
