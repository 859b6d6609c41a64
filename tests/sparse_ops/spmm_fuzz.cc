// Stored tensors that may say anything: check() must accept exactly what obeys the format, and what it
// accepts must be safe for every kernel and give the same result on all of them.
//
// A libFuzzer target (SPARSE_ONNX_FUZZ); otherwise spmm_fuzz_main.cc drives it.

#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels/spmm/spmm.h"
#include "spmm_fuzz_input.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

class ThisThread final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    for (size_t i = 0; i < total; ++i) task(context, i);
    return true;
  }
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::abort();
}

// The rules of the format, one after the other, as sparse_ops/formats/chunked_csc.py states them.
bool obeys_format(const StoredWeight& s) {
  if (s.K < 1 || s.N < 1 || s.chunk < 1 || s.chunk > 255 || s.block < 1 || s.block > 256) return false;
  if ((s.width != 1 && s.width != 4 && s.width != 8) || s.block % s.width != 0) return false;
  const auto K = static_cast<uint64_t>(s.K), N = static_cast<uint64_t>(s.N);
  const auto chunk = static_cast<uint64_t>(s.chunk), block = static_cast<uint64_t>(s.block);
  const auto width = static_cast<uint64_t>(s.width), rows = block / width;
  const uint64_t chunks = (K - 1) / chunk + 1;
  uint64_t blocks = s.parts.empty() ? (N - 1) / block + 1 : 0, outputs = 0;
  for (int64_t part : s.parts) {
    if (part < 1 || part > s.N) return false;
    outputs += static_cast<uint64_t>(part);  // three of them at most: no overflow
    blocks += (static_cast<uint64_t>(part) - 1) / block + 1;
  }
  if (!s.parts.empty() && outputs != N) return false;
  if (chunks > s.count_count || blocks > s.count_count) return false;  // and nothing below overflows
  if (s.count_count != chunks * blocks * rows || s.row_count != s.count_count) return false;
  if (s.bias_count != N) return false;
  uint64_t entry = 0;
  for (uint64_t group = 0; group < chunks * blocks; ++group) {
    std::vector<bool> seen(rows);
    for (uint64_t i = group * rows; i < (group + 1) * rows; ++i) {
      if (s.rows[i] >= rows || seen[s.rows[i]]) return false;
      seen[s.rows[i]] = true;
      if (s.counts[i] < 1 || s.counts[i] > chunk) return false;
      int last = -1;
      for (uint64_t j = 0; j < s.counts[i]; ++j, ++entry) {
        if (entry >= s.offset_count || s.offsets[entry] <= last || s.offsets[entry] >= chunk) return false;
        if (group % chunks * chunk + s.offsets[entry] >= K) return false;
        last = s.offsets[entry];
      }
    }
  }
  return s.value_count == entry * width && s.offset_count == entry;
}

std::vector<float> run_kernel(const Kernel& kernel, const Weight& weight, size_t tokens,
                              const std::vector<float>& x) {
  const Plan plan = make_plan(weight, tokens, kernel);
  std::vector<float> y(tokens * weight.N);
  std::vector<char> scratch(plan.scratch_bytes);
  ThisThread workers;
  run(plan, weight, x.data(), y.data(), scratch.data(), workers);
  return y;
}

// `count` small whole numbers, none of them zero, at an odd address: sums of their products are exact in
// float32.
std::vector<uint8_t> whole_numbers(size_t count) {
  std::vector<uint8_t> bytes(1 + count * sizeof(float));
  for (size_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(i % 3 + 1) * (i % 2 == 0 ? 1.0f : -1.0f);
    std::memcpy(&bytes[1 + i * sizeof(float)], &value, sizeof value);
  }
  return bytes;
}

void multiply(const FuzzInput& input) {
  CheckedWeight checked, exact;
  check(input.stored, input.activation, checked);
  const std::vector<uint8_t> values = whole_numbers(input.stored.value_count);
  const std::vector<uint8_t> bias = whole_numbers(input.stored.bias_count);
  StoredWeight whole = input.stored;
  whole.values = values.data() + 1;
  whole.bias = bias.data() + 1;
  if (!check(whole, Activation::relu, exact).empty()) fail("the numbers matter to check()");

  const size_t K = checked.weight.K;
  const size_t tokens = K < 10000 ? input.tokens : 1;
  std::vector<float> x(tokens * K);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3.0f;
  const std::vector<float> want = run_kernel(*find_kernel("reference"), exact.weight, tokens, x);
  for (const Kernel* kernel : kernels()) {
    if (!runs_here(*kernel) || !fits(*kernel, checked.weight)) continue;
    run_kernel(*kernel, checked.weight, tokens, x);  // any float, NaN too: nothing to compare, but no fault
    if (run_kernel(*kernel, exact.weight, tokens, x) != want) fail(std::string(kernel->name) + " is wrong");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzInput input;
  if (!decode(data, size, input)) return -1;  // not worth keeping
  CheckedWeight checked;
  const std::string problem = check(input.stored, input.activation, checked);
  if (problem.empty() != obeys_format(input.stored)) {
    fail(problem.empty() ? "check() accepts what breaks the format"
                         : "check() refuses a good weight: " + problem);
  }
  if (problem.empty()) multiply(input);
  return 0;
}
