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

struct Job {
  const Kernel& kernel;
  const Weight& weight;
  const float* x;
  size_t tokens;
  float* y;
  int8_t* q;
  float* scales;
  int32_t* sums;
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

void product_task(void* context, size_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const Weight& w = job.weight;
  const size_t begin = index * job.blocks_per_task, end = std::min(begin + job.blocks_per_task, blocks_of(w));
  for (size_t first = begin; first < end; first += job.blocks_per_pass) {
    const size_t last = std::min(first + job.blocks_per_pass, end);
    for (size_t t = 0; t < job.tokens; t += kMaxRows) {
      const Rows rows = {job.q + t * stride_of(w), stride_of(w), job.scales + t * groups_of(w),
                         job.sums + t * groups_of(w), std::min(kMaxRows, job.tokens - t)};
      job.kernel.run(w, rows, first, last, job.y + t * w.N);
    }
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
         tokens * groups_of(weight) * (sizeof(float) + sizeof(int32_t));
}

bool run(const Kernel& kernel, const Weight& weight, const float* x, size_t tokens, float* y, void* scratch,
         size_t threads, Workers& workers) {
  if (tokens == 0) return true;
  auto* memory = static_cast<int8_t*>(scratch);
  memory += -reinterpret_cast<uintptr_t>(memory) % kCacheLine;
  auto* scales = reinterpret_cast<float*>(memory + rounded_bytes(weight, tokens));
  auto* sums = reinterpret_cast<int32_t*>(scales + tokens * groups_of(weight));
  Job job = {kernel, weight, x, tokens, y, memory, scales, sums, 0, 0, 0};
  job.tokens_per_task = divide_up(kRoundedTogether, weight.K);
  if (threads < 2 || job.tokens_per_task >= tokens) {
    round_tokens(job, 0, tokens);
  } else if (!workers.run(divide_up(tokens, job.tokens_per_task), round_task, &job)) {
    return false;
  }
  const size_t blocks = blocks_of(weight);
  const size_t bytes =
      static_cast<size_t>(weight.values_end - weight.values) / blocks + weight.K;  // of a block
  job.blocks_per_pass = tokens > kMaxRows ? std::max<size_t>(1, kWeightBytes / bytes) : blocks;
  job.blocks_per_task = blocks;
  if (threads > 1) {
    const size_t least = divide_up(kTaskBytes, bytes * divide_up(tokens, kMaxRows));
    job.blocks_per_task = std::min(blocks, std::max(least, divide_up(blocks, threads * kTasksPerThread)));
  }
  return workers.run(divide_up(blocks, job.blocks_per_task), product_task, &job);
}

}  // namespace sparse_ops::nbits
