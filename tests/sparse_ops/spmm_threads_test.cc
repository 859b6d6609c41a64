// Many threads over many tiles and strips give what one thread gives, bit for bit. Built with the thread
// sanitizer (SPARSE_ONNX_TSAN) it also proves that no two tasks touch the same memory.
//
//   spmm_threads_test           must pass
//   spmm_threads_test --race    does every task twice at once: the sanitizer must report it

#include <atomic>
#include <cstring>
#include <memory>
#include <thread>

#include "kernels/spmm/feed_forward.h"
#include "spmm_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

// Threads that take the next task each.
class Threads final : public Workers {
 public:
  explicit Threads(size_t threads) : threads_(threads) {}
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    std::atomic<size_t> next = 0;
    const auto work = [&] {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) task(context, i);
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < threads_; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return true;
  }

 private:
  size_t threads_;
};

// Two threads that do every task each, which no operator survives.
class Twice final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    const auto work = [=] {
      for (size_t i = 0; i < total; ++i) task(context, i);
    };
    std::thread other(work);
    work();
    other.join();
    return true;
  }
};

// On the heap, whose every access the sanitizer sees.
std::vector<float> run_on(Workers& workers, const Plan& plan, const Weight& weight,
                          const std::vector<float>& x) {
  std::vector<float> y(plan.tokens * weight.N);
  const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes]);
  expect(run(plan, weight, x.data(), y.data(), scratch.get(), workers), "workers failed");
  return y;
}

void test_threads_agree() {
  struct Shape {
    size_t K, N, chunk, block, tokens;
    double density;
    size_t width = 1;
  };
  // Odd sizes, so that neighbouring tasks write the same cache lines.
  size_t in_strips = 0;
  for (const Shape& s : {Shape{301, 101, 64, 16, 200, 0.2}, Shape{600, 37, 128, 8, 65, 0.1, 4},
                         Shape{9001, 41, 255, 2, 150, 0.002}}) {
    const RandomWeight random = random_weight(s.K, s.N, s.density, s.chunk, s.block, s.width);
    const std::vector<float> x = random_floats(s.tokens * s.K);
    const Exact want = exact(random, x, s.tokens);
    const GuardedWeight guarded(random, Activation::gelu);
    const Weight& weight = guarded.checked.weight;
    for (const Kernel* kernel : kernels()) {
      if (!isa_supported(kernel->isa) || !fits(*kernel, weight)) continue;
      const Plan plan = make_plan(weight, s.tokens, *kernel);
      in_strips += plan.strip < plan.tokens;
      Threads alone(1), many(4);
      const std::vector<float> one = run_on(alone, plan, weight, x);
      compare(plan, weight, x, want);
      expect(run_on(many, plan, weight, x) == one, describe(plan, weight) + ": threads disagree");
    }
  }
  expect(in_strips > 0, "the test is too small for strips");
}

void test_feed_forward() {
  const RandomWeight a = random_weight(301, 101, 0.2, 64, 16), b = random_weight(101, 37, 0.2, 64, 8);
  const GuardedWeight first(a, Activation::gelu), second(b, Activation::none);
  for (size_t tokens : {3, 200}) {  // blocks as tasks, and tiles
    const std::vector<float> x = random_floats(tokens * a.K);
    for (const Kernel* kernel : kernels()) {
      if (!isa_supported(kernel->isa) || !fits(*kernel, first.checked.weight, second.checked.weight))
        continue;
      const Plan plan = make_plan(first.checked.weight, second.checked.weight, tokens, *kernel);
      const auto run_on_threads = [&](size_t threads) {
        std::vector<float> y(tokens * b.N);
        const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes]);
        Threads workers(threads);
        run(plan, first.checked.weight, second.checked.weight, x.data(), y.data(), scratch.get(), workers);
        return y;
      };
      expect(run_on_threads(4) == run_on_threads(1),
             describe(plan, first.checked.weight) + ": threads disagree");
    }
  }
}

// Calls of one operator from several threads share its weight and nothing else.
void test_calls_at_once() {
  const RandomWeight random = random_weight(300, 100, 0.2, 128, 64);
  const GuardedWeight guarded(random, Activation::silu);
  const Weight& weight = guarded.checked.weight;
  const Isa isa = choose_isa(nullptr).isa;
  const size_t tokens = 40;
  const std::vector<float> x = random_floats(tokens * random.K);
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> callers;
  for (std::vector<float>& result : results) {
    callers.emplace_back([&weight, &x, &result, isa] {
      const Plan plan = make_plan(weight, tokens, isa);
      const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes]);
      result.resize(tokens * weight.N);
      Threads two(2);
      run(plan, weight, x.data(), result.data(), scratch.get(), two);
    });
  }
  for (std::thread& caller : callers) caller.join();
  compare(make_plan(weight, tokens, isa), weight, x, exact(random, x, tokens));
  for (const std::vector<float>& result : results) expect(result == results[0], "calls at once disagree");
}

void race() {
  const RandomWeight random = random_weight(300, 100, 0.2, 128, 64);
  const GuardedWeight guarded(random, Activation::none);
  Twice twice;
  run_on(twice, make_plan(guarded.checked.weight, 40, Isa::generic), guarded.checked.weight,
         random_floats(40 * random.K));
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "--race") == 0) {
    race();
  } else {
    test_threads_agree();
    test_feed_forward();
    test_calls_at_once();
  }
  return summary();
}
