// Two linears as one. Bit for bit what they give one after the other with the same kernel.

#include "kernels/spmm/feed_forward.h"

#include "linear_checks.h"
#include "spmm_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

struct Shape {
  size_t K, hidden, N, chunk, block, second_chunk, second_block;
  double density;
  size_t width = 1, second_width = 1;
};

std::vector<float> one_by_one(const Kernel& kernel, const Weight& first, const Weight& second,
                              const std::vector<float>& x, size_t tokens) {
  const Plan plan = make_plan(first, tokens, kernel);
  std::vector<float> hidden(tokens * second.K), scratch(plan.scratch_bytes / sizeof(float) + 1);
  Backwards workers;
  const Output between = {hidden.data(), second.K};
  expect(run(plan, first, x.data(), std::span(&between, 1), scratch.data(), workers), "workers failed");
  return guarded_run(make_plan(second, tokens, kernel), second, hidden);
}

void check_close(const std::vector<float>& found, const std::vector<float>& want, const std::string& what) {
  float largest = 0, error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    error = std::max(error, std::abs(found[i] - want[i]));
    if (std::isnan(found[i])) error = std::numeric_limits<float>::infinity();
  }
  expect(error <= 2e-5f * largest, what + ": differs from the linears one after the other");
}

void check_kernels(const Weight& first, const Weight& second, const std::vector<float>& x, size_t tokens) {
  for (const Kernel* kernel : kernels()) {
    if (!runs_here(*kernel) || !fits(*kernel, first, second)) continue;
    const Plan plan = make_plan(first, second, tokens, *kernel);
    expect(run_both(plan, first, second, x) == one_by_one(*kernel, first, second, x, tokens),
           describe(plan, first) + ": differs from the linears one after the other");
  }
  for (const Features features : offered_sets()) {
    const Plan plan = make_plan(first, second, tokens, features);
    check_close(run_both(plan, first, second, x), one_by_one(*plan.full, first, second, x, tokens),
                describe(plan, first));
  }
}

void test_every_kernel() {
  const Shape shapes[] = {
      {31, 24, 14, 7, 6, 9, 7, 0.4},
      {33, 70, 20, 16, 5, 64, 16, 0.3},  // blocks that end inside a vector
      {129, 256, 130, 128, 128, 64, 64, 0.2},
      {130, 96, 64, 128, 16, 128, 64, 0.3, 4, 8},
      {64, 256, 66, 64, 64, 255, 33, 0.1},
      {3001, 8, 6, 255, 2, 8, 6, 0.01},
      {90, 766, 65, 64, 64, 128, 64, 0.1},  // halves of 383
      {40, 18, 9, 16, 8, 4, 4, 0.4, 8, 4},
  };
  for (const Shape& s : shapes) {
    const RandomWeight a = random_weight(s.K, s.hidden, s.density, s.chunk, s.block, s.width);
    const RandomWeight b =
        random_weight(s.hidden, s.N, s.density, s.second_chunk, s.second_block, s.second_width);
    const RandomWeight half =
        random_weight(s.hidden / 2, s.N, s.density, s.second_chunk, s.second_block, s.second_width);
    const GuardedWeight first(a, Activation::gelu, 1), second(b, Activation::none, 3);
    const RandomWeight halves =
        random_parts(s.K, {s.hidden / 2, s.hidden / 2}, s.density, s.chunk, s.block, s.width);
    const GuardedWeight gated(halves, Activation::silu, 1), behind_gate(half, Activation::none, 1);
    Weight gate = gated.checked.weight;
    gate.gated = true;
    for (size_t tokens : {1, 2, 5, 16, 33, 130}) {
      const std::vector<float> x = random_floats(tokens * s.K);
      check_kernels(first.checked.weight, second.checked.weight, x, tokens);
      check_kernels(gate, behind_gate.checked.weight, x, tokens);
    }
  }
}

// Where there are more tokens than panels may be in memory.
void test_strips() {
  const RandomWeight a = random_weight(300, 5000, 0.002, 128, 128), b = random_weight(5000, 9, 0.01, 128, 64);
  const GuardedWeight first(a, Activation::relu), second(b, Activation::none);
  const size_t tokens = 700;
  const std::vector<float> x = random_floats(tokens * 300);
  size_t in_strips = 0;
  for (const Features features : offered_sets()) {
    const Plan plan = make_plan(first.checked.weight, second.checked.weight, tokens, features);
    in_strips += plan.strip < tokens;
    check_close(run_both(plan, first.checked.weight, second.checked.weight, x),
                one_by_one(*plan.full, first.checked.weight, second.checked.weight, x, tokens),
                describe(plan, first.checked.weight));
  }
  expect(in_strips > 0, "the test is too small for strips");
}

}  // namespace

int main() {
  test_every_kernel();
  test_strips();
  return summary();
}
