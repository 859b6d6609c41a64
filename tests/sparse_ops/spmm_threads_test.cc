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
#include "ops/thread_count.h"
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
      if (!runs_here(*kernel) || !fits(*kernel, weight)) continue;
      const Plan plan = make_plan(weight, s.tokens, *kernel, 4);
      in_strips += plan.strip < plan.tokens;
      Threads alone(1), many(4);
      const std::vector<float> one = run_on(alone, plan, weight, x);
      compare(plan, weight, x, want);
      expect(run_on(many, plan, weight, x) == one, describe(plan, weight) + ": threads disagree");
      for (size_t threads : {1, 2, 3, 8, 64}) {
        expect(run_on(many, make_plan(weight, s.tokens, *kernel, threads), weight, x) == one,
               describe(plan, weight) + ": plans for other threads disagree");
      }
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
      if (!runs_here(*kernel) || !fits(*kernel, first.checked.weight, second.checked.weight)) continue;
      const Plan plan = make_plan(first.checked.weight, second.checked.weight, tokens, *kernel, 4);
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
  const Features features = offered_features();
  const size_t tokens = 40;
  const std::vector<float> x = random_floats(tokens * random.K);
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> callers;
  for (std::vector<float>& result : results) {
    callers.emplace_back([&weight, &x, &result, features] {
      const Plan plan = make_plan(weight, tokens, features);
      const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes]);
      result.resize(tokens * weight.N);
      Threads two(2);
      run(plan, weight, x.data(), result.data(), scratch.get(), two);
    });
  }
  for (std::thread& caller : callers) caller.join();
  compare(make_plan(weight, tokens, features), weight, x, exact(random, x, tokens));
  for (const std::vector<float>& result : results) expect(result == results[0], "calls at once disagree");
}

// Counts the tasks of every run.
class Counting final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    runs.push_back(total);
    for (size_t i = 0; i < total; ++i) task(context, i);
    return true;
  }
  std::vector<size_t> runs;
};

// As many tasks as threads, but no more pieces than they need: whole tiles where these are enough.
void test_tasks_fit_the_threads() {
  const RandomWeight random = random_weight(256, 128, 0.1, 64, 32);
  const GuardedWeight guarded(random, Activation::none);
  const Weight& weight = guarded.checked.weight;
  const Kernel& kernel = *find_kernel("generic_t32");
  struct Case {
    size_t tokens, threads, runs;
  };
  // Blocks of 32 of 128 outputs: four tasks a tile. Two runs for each strip where tiles are not enough.
  for (const Case& c : {Case{32, 1, 1}, Case{32, 2, 2}, Case{64, 1, 1}, Case{64, 2, 1}, Case{64, 8, 2},
                        Case{256, 8, 1}, Case{256, 16, 2}}) {
    const Plan plan = make_plan(weight, c.tokens, kernel, c.threads);
    Counting workers;
    run_on(workers, plan, weight, random_floats(c.tokens * random.K));
    const std::string what = std::to_string(c.tokens) + " tokens for " + std::to_string(c.threads);
    expect(workers.runs.size() == c.runs, what + " threads: " + std::to_string(workers.runs.size()) + " runs");
    const size_t tiles = c.tokens / kernel.tile;
    const size_t possible = c.runs == 1 ? tiles : tiles * 4;
    expect(workers.runs.back() == possible, what + " threads: other tasks");
    expect(plan.threads == c.threads, what + " threads: planned for others");
  }
}

void test_threads_are_learned() {
  const size_t all = ThreadCount::processors();
  ThreadCount count;
  static_assert(ThreadCount::kFirst % ThreadCount::kAgain ==
                0);  // the call behind the first ones looks again, too
  for (size_t call = 0; call <= ThreadCount::kFirst; ++call) {
    expect(count.expected() == all, "the first calls are for all that could be there");
  }
  expect(count.expected() == 1, "nobody was seen but the caller");
  for (size_t seen : {1, 3, 2}) count.saw(seen);
  expect(count.expected() == 3, "the most that were seen together");
  size_t again = 0;
  for (size_t call = 0; call < 2 * ThreadCount::kAgain; ++call) {
    const size_t expected = count.expected();
    expect(expected == 3 || expected == std::max<size_t>(3, all), "neither learned nor possible");
    again += expected != 3;
  }
  expect(again == (all > 3 ? 2u : 0u), "now and then it looks again");
}

// Who takes part in a call is counted once, however many tasks and calls there are at a time.
void test_attendance() {
  for (size_t threads : {1, 2, 5}) {
    struct Call {
      Attendance attendance;
      std::atomic<size_t> waiting;
    } call{{}, threads};
    const auto task = [](void* context, size_t) {
      Call& c = *static_cast<Call*>(context);
      c.attendance.here();
      c.waiting -= c.waiting > 0;
      while (c.waiting > 0) std::this_thread::yield();  // until all have a task
      c.attendance.here();
    };
    Threads workers(threads);
    workers.run(threads, task, &call);
    expect(call.attendance.threads() == threads, "miscounted");
    Attendance alone;
    for (size_t i = 0; i < 3; ++i) alone.here();
    expect(alone.threads() == 1, "the caller is one");
  }
}

void race() {
  const RandomWeight random = random_weight(300, 100, 0.2, 128, 64);
  const GuardedWeight guarded(random, Activation::none);
  Twice twice;
  run_on(twice, make_plan(guarded.checked.weight, 40, kGeneric), guarded.checked.weight,
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
    test_tasks_fit_the_threads();
    test_threads_are_learned();
    test_attendance();
  }
  return summary();
}
