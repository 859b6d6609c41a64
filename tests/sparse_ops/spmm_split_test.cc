// Weights of several linears: outputs apart from each other, and gates. Bit for bit what the linears give
// alone, whether they have whole blocks or padding lies between them.

#include "linear_checks.h"
#include "spmm_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

struct Shape {
  size_t K;
  std::vector<size_t> split;
  size_t chunk, block;
  double density;
  size_t width = 1;
};

// Between inaccessible pages, the activations too.
std::vector<float> split_run(const Plan& plan, const Weight& weight, const std::vector<float>& x,
                             const std::vector<size_t>& split) {
  const Guarded<float> guarded_x(x);
  guarded_x.make_read_only();
  return run_apart(plan, weight, guarded_x.typed(), split);
}

// The columns of the linears, of those of all blocks.
std::vector<float> without_padding(const std::vector<float>& y, const Weight& weight,
                                   const std::vector<size_t>& split) {
  std::vector<float> kept;
  for (size_t row = 0; row < y.size(); row += weight.N) {
    size_t first = row;
    for (size_t channels : split) {
      const auto from = y.begin() + static_cast<std::ptrdiff_t>(first);
      kept.insert(kept.end(), from, from + static_cast<std::ptrdiff_t>(channels));
      first += (channels + weight.block - 1) / weight.block * weight.block;
    }
  }
  return kept;
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
  const std::vector<float> want = without_padding(guarded_run(plan, plain, x), plain, split);
  expect(split_run(plan, plain, x, split) == want, describe(plan, plain) + ": outputs apart differ");
  if (split.size() != 2 || split[0] != split[1]) return;
  for (Activation activation : {Activation::silu, Activation::gelu_tanh}) {
    Weight weight = plain;
    weight.activation = activation;
    const std::vector<float> activated = without_padding(guarded_run(plan, weight, x), plain, split);
    weight.gated = true;
    expect(split_run(plan, weight, x, {split[0]}) == gated(activated, want, 2 * split[0]),
           describe(plan, weight) + ": the gate differs");
  }
}

void test_every_kernel() {
  const Shape shapes[] = {
      {31, {7, 14, 3}, 7, 7, 0.4},      {33, {10, 10}, 16, 5, 0.3},       {129, {64, 128, 64}, 128, 64, 0.2},
      {130, {64, 64}, 128, 64, 0.2},    {40, {16, 8, 30}, 16, 8, 0.4, 4}, {130, {64, 64}, 128, 64, 0.3, 8},
      {300, {256, 256}, 128, 256, 0.1}, {7001, {6, 6}, 255, 2, 0.01},
      // No whole blocks.
      {31, {5, 13, 8}, 7, 7, 0.4},      {33, {9, 9}, 16, 5, 0.3},         {129, {63, 129, 1}, 128, 64, 0.2},
      {130, {65, 65}, 128, 64, 0.2},    {40, {13, 3, 31}, 16, 8, 0.4, 4}, {130, {61, 61}, 128, 64, 0.3, 8},
      {90, {312, 383, 312}, 128, 64, 0.1}, {3001, {1, 1}, 255, 2, 0.01},
  };
  size_t in_strips = 0;
  for (const Shape& s : shapes) {
    const RandomWeight random = random_parts(s.K, s.split, s.density, s.chunk, s.block, s.width);
    const GuardedWeight guarded(random, Activation::none, 1);
    const Weight& weight = guarded.checked.weight;
    for (size_t tokens : {1, 5, 16, 33, 130}) {
      const std::vector<float> x = random_floats(tokens * s.K);
      for (const Kernel* kernel : kernels()) {
        if (!runs_here(*kernel) || !fits(*kernel, weight)) continue;
        const Plan plan = make_plan(weight, tokens, *kernel);
        in_strips += plan.strip < tokens;
        check_plan(plan, weight, x, s.split);
      }
      for (const Features features : offered_sets()) {
        check_plan(make_plan(weight, tokens, features), weight, x, s.split);
      }
    }
  }
  expect(in_strips > 0, "the test is too small for strips");
}

void test_check() {
  const RandomWeight good = random_parts(70, {20, 7, 33}, 0.3, 32, 16);
  CheckedWeight checked;
  expect(check(good.stored(), Activation::none, checked).empty(), "good parts were refused");
  expect(checked.weight.N == 32 + 16 + 33, "padding is not counted");
  expect(checked.weight.blocks == 2 + 1 + 3, "blocks are not counted by parts");
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  const std::vector<std::vector<int64_t>> wrong = {
      {20, 7, 34}, {20, 7, 32}, {20, 7}, {20, 7, 33, 0}, {0, 27, 33}, {-16, 43, 33}, {60, 0}, {kMax, 7, 33},
      {kMax, kMax, 62}};
  for (const std::vector<int64_t>& parts : wrong) {
    RandomWeight bad = good;
    bad.parts = parts;
    const std::string problem = check(bad.stored(), Activation::none, checked);
    expect(problem.find("add up to N") != std::string::npos, "'" + problem + "' lacks the sum");
  }
  for (const std::vector<int64_t>& parts : {std::vector<int64_t>{60}, {16, 11, 33}, {}}) {
    RandomWeight other = good;
    other.parts = parts;
    const std::string problem = check(other.stored(), Activation::none, checked);
    expect(problem.find("counts has") != std::string::npos, "'" + problem + "': other blocks are accepted");
  }
  RandomWeight huge = good;
  huge.N = static_cast<size_t>(kMax);
  huge.parts = {kMax - 1, 1};
  expect(!check(huge.stored(), Activation::none, checked).empty(), "huge parts were accepted");
  RandomWeight bad = good;
  bad.bias.pop_back();
  expect(check(bad.stored(), Activation::none, checked).find("bias has") == 0, "a short bias was accepted");
}

}  // namespace

int main() {
  test_check();
  test_every_kernel();
  return summary();
}
