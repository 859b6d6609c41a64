// Weights of several linears: outputs apart from each other, and gates. Bit for bit what the linears give
// alone.

#include <memory>

#include "spmm_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

struct Shape {
  size_t K;
  std::vector<size_t> split;  // all but the last are multiples of block
  size_t chunk, block;
  double density;
  size_t width = 1;
};

// The outputs side by side again, each computed between inaccessible pages.
std::vector<float> split_run(const Plan& plan, const Weight& weight, const std::vector<float>& x,
                             const std::vector<size_t>& split) {
  const Guarded<float> guarded_x(x);
  guarded_x.make_read_only();
  const Guarded<char> scratch(plan.scratch_bytes);
  std::vector<std::unique_ptr<Guarded<float>>> memory;
  std::vector<Output> outputs;
  for (size_t channels : split) {
    const std::vector<float> nothing(plan.tokens * channels, std::nanf(""));
    memory.push_back(std::make_unique<Guarded<float>>(nothing));
    outputs.push_back({memory.back()->typed(), channels});
  }
  Backwards workers;
  expect(run(plan, weight, guarded_x.typed(), outputs, scratch.data(), workers), "workers failed");
  std::vector<float> y;
  for (size_t t = 0; t < plan.tokens; ++t) {
    for (const Output& output : outputs) {
      y.insert(y.end(), output.y + t * output.channels, output.y + (t + 1) * output.channels);
    }
  }
  return y;
}

// act(first half of the columns) * second half
std::vector<float> gated(const std::vector<float>& activated, const std::vector<float>& plain, size_t N) {
  std::vector<float> y;
  for (size_t row = 0; row < plain.size(); row += N) {
    for (size_t n = 0; n < N / 2; ++n) y.push_back(activated[row + n] * plain[row + N / 2 + n]);
  }
  return y;
}

void check_plan(const Plan& plan, const Weight& plain, const std::vector<float>& x,
                const std::vector<size_t>& split) {
  const std::vector<float> want = guarded_run(plan, plain, x);
  expect(split_run(plan, plain, x, split) == want, describe(plan, plain) + ": outputs apart differ");
  if (split.size() != 2 || split[0] != split[1]) return;
  for (Activation activation : {Activation::silu, Activation::gelu_tanh}) {
    Weight weight = plain;
    weight.activation = activation;
    const std::vector<float> activated = guarded_run(plan, weight, x);
    weight.gated = true;
    expect(split_run(plan, weight, x, {split[0]}) == gated(activated, want, plain.N),
           describe(plan, weight) + ": the gate differs");
  }
}

void test_every_kernel() {
  const Shape shapes[] = {
      {31, {7, 14, 3}, 7, 7, 0.4},      {33, {10, 10}, 16, 5, 0.3},       {129, {64, 128, 64}, 128, 64, 0.2},
      {130, {64, 64}, 128, 64, 0.2},    {40, {16, 8, 30}, 16, 8, 0.4, 4}, {130, {64, 64}, 128, 64, 0.3, 8},
      {300, {256, 256}, 128, 256, 0.1}, {7001, {6, 6}, 255, 2, 0.01},
  };
  size_t in_strips = 0;
  for (const Shape& s : shapes) {
    size_t N = 0;
    for (size_t channels : s.split) N += channels;
    const RandomWeight random = random_weight(s.K, N, s.density, s.chunk, s.block, s.width);
    const GuardedWeight guarded(random, Activation::none, 1);
    const Weight& weight = guarded.checked.weight;
    for (size_t tokens : {1, 5, 16, 33, 130}) {
      const std::vector<float> x = random_floats(tokens * s.K);
      for (const Kernel* kernel : kernels()) {
        if (!isa_supported(kernel->isa) || !fits(*kernel, weight)) continue;
        const Plan plan = make_plan(weight, tokens, *kernel);
        in_strips += plan.strip < tokens;
        check_plan(plan, weight, x, s.split);
      }
      for (Isa isa : kIsas) {
        if (isa_supported(isa)) check_plan(make_plan(weight, tokens, isa), weight, x, s.split);
      }
    }
  }
  expect(in_strips > 0, "the test is too small for strips");
}

}  // namespace

int main() {
  test_every_kernel();
  return summary();
}
