// Every array that a kernel touches, in turn right before and right behind an inaccessible page. Inputs are
// read-only, like a model file that is mapped into memory.

#include <signal.h>
#include <sys/wait.h>

#include "spmm_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

constexpr int kFaulted = 3;
std::string current;  // what runs now, for the message of a fault

extern "C" void on_fault(int) {
  static const char text[] = "FAILED: access outside an array: ";
  if (!current.empty()) {
    [[maybe_unused]] const auto ignored = write(STDERR_FILENO, text, sizeof text - 1) +
                                          write(STDERR_FILENO, current.data(), current.size()) +
                                          write(STDERR_FILENO, "\n", 1);
  }
  _exit(kFaulted);
}

// Whether `function` touches inaccessible memory, found out in a process of its own.
template <class Function>
bool faults(Function function) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    current.clear();
    function();
    _exit(0);
  }
  int status = 0;
  expect(child > 0 && waitpid(child, &status, 0) == child, "fork");
  return WIFEXITED(status) && WEXITSTATUS(status) == kFaulted;
}

struct Shape {
  size_t K, N, chunk, block;
  double density;
  size_t width = 1;
};

// Sizes around vectors of 4, 8 and 16; weights without an entry, half full and full.
constexpr Shape kShapes[] = {{1, 1, 1, 1, 1.0},       {3, 5, 3, 5, 1.0},         {15, 17, 15, 17, 0.5},
                             {16, 16, 16, 16, 1.0},   {17, 15, 16, 8, 1.0},      {33, 31, 11, 16, 0.5},
                             {64, 64, 64, 64, 0.5},   {65, 7, 64, 4, 0.0},       {127, 33, 64, 32, 0.3},
                             {257, 65, 128, 64, 0.1}, {17, 15, 16, 8, 1.0, 4},   {33, 31, 11, 16, 0.5, 8},
                             {65, 7, 64, 4, 0.0, 4},  {129, 65, 128, 64, 0.3, 8}};

void test_every_kernel() {
  for (Edge edge : {Edge::front, Edge::back}) {
    for (const Shape& s : kShapes) {
      const RandomWeight random = random_weight(s.K, s.N, s.density, s.chunk, s.block, s.width);
      const GuardedWeight guarded(random, Activation::relu, 0, edge);
      const Weight& weight = guarded.checked.weight;
      for (const Kernel* kernel : kernels()) {
        if (!runs_here(*kernel) || !fits(*kernel, weight)) continue;
        for (size_t tokens : {kernel->tile - 1, kernel->tile, kernel->tile + 1}) {
          const Plan plan = make_plan(weight, tokens, *kernel);
          current = describe(plan, weight);
          const std::vector<float> x = random_floats(tokens * s.K);
          compare(plan, weight, x, exact(random, x, tokens), edge);
        }
      }
    }
  }
  current.clear();
}

// Each array one element out of place must fault: else the test above would prove nothing.
void test_every_guard() {
  const RandomWeight random = random_weight(33, 31, 0.5, 11, 16);
  const size_t tokens = 2;
  for (const char* name : {"reference", "generic_t4"}) {
    for (Edge edge : {Edge::front, Edge::back}) {
      const GuardedWeight guarded(random, Activation::none, 0, edge);
      const Guarded<float> x(random_floats(tokens * random.K), 0, edge);
      const Guarded<float> y(tokens * random.N, 0, edge);
      const auto run_with = [&](const Weight& weight, const float* from, float* to) {
        const Plan plan = make_plan(weight, tokens, *find_kernel(name));
        std::vector<char> scratch(plan.scratch_bytes);
        Backwards workers;
        run(plan, weight, from, to, scratch.data(), workers);
      };
      const std::ptrdiff_t step = edge == Edge::front ? -1 : 1, floats = step * 4;
      const auto shifted = [&](const char* array, auto shift) {
        Weight weight = guarded.checked.weight;
        const float* from = x.typed();
        float* to = y.typed();
        shift(weight, from, to);
        expect(faults([&] { run_with(weight, from, to); }),
               std::string(name) + ": no fault where " + array + " is out of place");
      };
      expect(!faults([&] { run_with(guarded.checked.weight, x.typed(), y.typed()); }), "faults for nothing");
      shifted("values", [&](Weight& w, auto&, auto&) { w.values += floats; });
      shifted("offsets", [&](Weight& w, auto&, auto&) { w.offsets += step; });
      shifted("counts", [&](Weight& w, auto&, auto&) { w.counts += step; });
      shifted("rows", [&](Weight& w, auto&, auto&) { w.rows += step; });
      shifted("bias", [&](Weight& w, auto&, auto&) { w.bias += floats; });
      shifted("x", [&](auto&, const float*& from, auto&) { from += step; });
      shifted("y", [&](auto&, auto&, float*& to) { to += step; });
      expect(faults([&] { *guarded.rows.typed() = 0; }), "an input can be written");
    }
  }
}

}  // namespace

int main() {
  struct sigaction action {};
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  test_every_guard();
  test_every_kernel();
  return summary();
}
