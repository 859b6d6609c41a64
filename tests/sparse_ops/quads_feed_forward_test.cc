// Two linears of bytes as one. Bit for bit what they give one after the other with the same kernel.

#include "kernels/quads/feed_forward.h"

#include <atomic>
#include <thread>

#include "linear_checks.h"
#include "quads_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::quads;

struct Shape {
  size_t K, hidden, N, chunk, block, second_chunk, second_block;
  double density;  // 2: the dense format
  int limit = 64;
};

RandomQuads random_of(size_t K, size_t N, size_t chunk, size_t block, const Shape& s) {
  return s.density > 1 ? random_dense(K, N, chunk, block, s.limit)
                       : random_quads(K, N, s.density, chunk, block, s.limit);
}

std::vector<float> one_by_one(const Kernel& kernel, const Weight& first, const Weight& second,
                              const std::vector<float>& x, size_t tokens) {
  const Plan plan = make_plan(first, tokens, kernel);
  std::vector<float> hidden(tokens * second.K);
  std::vector<char> scratch(plan.scratch_bytes);
  Backwards workers;
  expect(run(plan, first, x.data(), hidden.data(), scratch.data(), workers), "workers failed");
  return guarded_run(make_plan(second, tokens, kernel), second, hidden);
}

// NaN is equal to NaN.
bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  bool all = a.size() == b.size();
  for (size_t i = 0; all && i < a.size(); ++i) all = a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]));
  return all;
}

void check_kernels(const Weight& first, const Weight& second, const std::vector<float>& x, size_t tokens) {
  for (const Kernel* kernel : kernels()) {
    if (!runs_here(*kernel) || !fits(*kernel, first, second)) continue;
    const Plan plan = make_plan(first, second, tokens, *kernel);
    expect(equal(run_both(plan, first, second, x), one_by_one(*kernel, first, second, x, tokens)),
           describe(plan, first) + ": differs from the linears one after the other");
  }
  for (const Features features : offered_sets()) {  // the last tile may have another kernel: of the same sums
    const Plan plan = make_plan(first, second, tokens, features);
    expect(equal(run_both(plan, first, second, x), one_by_one(*plan.full, first, second, x, tokens)),
           describe(plan, first) + ": the chosen kernels differ");
  }
}

// Sizes around quads, vectors, tiles, blocks and slices.
constexpr Shape kShapes[] = {
    {31, 24, 14, 7, 6, 3, 7, 0.4},          {33, 70, 20, 9, 5, 18, 16, 0.3, 127},
    {129, 256, 130, 33, 128, 64, 64, 0.2},  {1, 2, 1, 1, 1, 1, 1, 1.0},
    {64, 256, 66, 16, 64, 60, 33, 0.1},     {901, 8, 6, 200, 4, 2, 6, 0.05, 128},
    {90, 830, 65, 23, 5, 96, 64, 0.1},      {130, 96, 67, 11, 12, 24, 12, 2.0, 128},
    {7, 1600, 5, 2, 16, 96, 8, 2.0},        {40, 18, 9, 10, 9, 5, 4, 0.0}};

void test_every_kernel() {
  for (const Shape& s : kShapes) {
    const GuardedQuads first(random_of(s.K, s.hidden, s.chunk, s.block, s), Activation::gelu, 1);
    const GuardedQuads second(random_of(s.hidden, s.N, s.second_chunk, s.second_block, s), Activation::none);
    const GuardedQuads half(random_of(s.hidden / 2, s.N, s.second_chunk, s.second_block, s),
                            Activation::none);
    const GuardedQuads gated(random_of(s.K, s.hidden, s.chunk, s.block, s), Activation::silu, 1);
    Weight gate = gated.checked.weight;
    gate.gated = s.hidden / 2 % s.block == 0;
    for (size_t tokens : {1, 2, 3, 5, 8, 15, 16, 17, 33, 130}) {
      const std::vector<float> x = random_tokens(tokens * s.K);
      check_kernels(first.checked.weight, second.checked.weight, x, tokens);
      if (gate.gated) check_kernels(gate, half.checked.weight, x, tokens);
    }
  }
}

// Loud and silent tokens, and such with what is no number, stay by themselves.
void test_special_values() {
  const Shape s{70, 90, 9, 8, 6, 12, 4, 0.6};
  const GuardedQuads first(random_of(s.K, s.hidden, s.chunk, s.block, s), Activation::relu);
  const GuardedQuads second(random_of(s.hidden, s.N, s.second_chunk, s.second_block, s), Activation::none);
  const size_t tokens = 20;
  std::vector<float> x = random_tokens(tokens * s.K);
  const float inf = std::numeric_limits<float>::infinity();
  for (size_t k = 0; k < s.K; ++k) {
    x[k] = 0, x[s.K + k] *= 1e-30f, x[2 * s.K + k] *= 1e30f;
  }
  x[4 * s.K + 1] = std::nanf(""), x[6 * s.K] = inf, x[7 * s.K + 3] = -inf;
  check_kernels(first.checked.weight, second.checked.weight, x, tokens);
  for (const Kernel* kernel : kernels()) {
    if (!runs_here(*kernel)) continue;
    const std::vector<float> y =
        run_both(make_plan(first.checked.weight, second.checked.weight, tokens, *kernel),
                 first.checked.weight, second.checked.weight, x);
    for (size_t t = 0; t < tokens; ++t) {
      bool none = true, all = true;
      for (size_t n = 0; n < s.N; ++n) (std::isfinite(y[t * s.N + n]) ? all : none) = false;
      const bool bad = t == 4 || t == 6 || t == 7;
      expect(bad ? all : none, std::string(kernel->name) + ": token " + std::to_string(t));
    }
  }
}

// Threads that take the next task each.
class Threads final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    std::atomic<size_t> next = 0;
    const auto work = [&] {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) task(context, i);
    };
    std::thread others[] = {std::thread(work), std::thread(work)};
    work();
    for (std::thread& other : others) other.join();
    return true;
  }
};

// More tokens than panels may be in memory; threads, and plans for them.
void test_strips_and_threads() {
  const Shape s{300, 3000, 9, 75, 64, 96, 5, 0.01};
  const GuardedQuads first(random_of(s.K, s.hidden, s.chunk, s.block, s), Activation::relu);
  const GuardedQuads second(random_of(s.hidden, s.N, s.second_chunk, s.second_block, s), Activation::none);
  const size_t tokens = 300;
  const std::vector<float> x = random_tokens(tokens * s.K);
  size_t in_strips = 0;
  for (const Features features : offered_sets()) {
    const auto plan_for = [&](size_t threads) {
      return make_plan(first.checked.weight, second.checked.weight, tokens, features, threads);
    };
    const std::vector<float> want =
        one_by_one(*plan_for(1).full, first.checked.weight, second.checked.weight, x, tokens);
    for (size_t threads : {1, 3, 64}) {
      const Plan plan = plan_for(threads);
      in_strips += plan.strip < tokens;
      std::vector<float> y(tokens * s.N);
      std::vector<char> scratch(plan.scratch_bytes);
      Threads workers;
      expect(run(plan, first.checked.weight, second.checked.weight, x.data(), y.data(), scratch.data(),
                 workers),
             "workers failed");
      expect(y == want, describe(plan, first.checked.weight) + ": threads disagree");
    }
    for (int calls : {0, 1, 2, 3}) {
      Failing failing(calls);
      const Plan plan = plan_for(1);
      std::vector<float> y(tokens * s.N);
      std::vector<char> scratch(plan.scratch_bytes);
      expect(!run(plan, first.checked.weight, second.checked.weight, x.data(), y.data(), scratch.data(),
                  failing),
             "a failure of workers was lost");
    }
  }
  expect(in_strips > 0, "the test is too small for strips");
}

}  // namespace

int main() {
  test_every_kernel();
  test_special_values();
  test_strips_and_threads();
  return summary();
}
