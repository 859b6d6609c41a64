// Speed of the kernels in one thread, transposition and epilogue included.
//
//   spmm_bench [--tokens M] [--chunk C] [--block B] [--activation 0..4] [--kernel NAME | --all] [K N]...
//
// Without a kernel: what a session would choose. Without shapes: those of BERT-base. GFLOP/s are counted on
// the non-zeros; "dense" counts every weight of the dense layer instead. "peak" is the share of what
// multiply-adds in registers reach, measured in between. Activations and outputs are warm in the caches, and
// so is a weight that fits. Times are processor time, the lower quartile of many runs, so that a busy machine
// disturbs them little.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <utility>

#include "kernels/peak/peak.h"
#include "kernels/spmm/spmm.h"
#include "random_weight.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

// Processor time of this thread: what other programs take does not count.
double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

class ThisThread final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    for (size_t i = 0; i < total; ++i) task(context, i);
    return true;
  }
};

// Seconds of one call: the lower quartile of many, since the clock of a busy or virtual machine errs both
// ways.
template <class Function>
double time_of(Function function) {
  std::vector<double> times;
  const double start = now();
  while (times.size() < 7 || now() - start < 0.2) {
    const double before = now();
    function();
    times.push_back(now() - before);
  }
  const auto quartile = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 4);
  std::nth_element(times.begin(), quartile, times.end());
  return *quartile;
}

double measured_peak(const Kernel& kernel) {
  const peak::Kernel& limit = peak::select_kernel(kernel.needs);
  double operations = 0;
  const double seconds = time_of([&] { operations = limit.in_registers(100000); });
  return operations / seconds;
}

void bench(size_t K, size_t N, size_t tokens, size_t chunk, size_t block, Activation activation,
           const Kernel* kernel, bool cold, size_t width) {
  const std::vector<float> x(tokens * K, 0.5f);
  std::vector<float> y(tokens * N);
  ThisThread workers;
  for (double sparsity : {0.5, 0.7, 0.8, 0.9, 0.95}) {
    const RandomWeight random = random_weight(K, N, 1 - sparsity, chunk, block, width);
    CheckedWeight checked;
    const std::string problem = check(random.stored(), activation, checked);
    if (!problem.empty() || (kernel != nullptr && !fits(*kernel, checked.weight))) {
      std::printf("skipped: %s\n", problem.empty() ? "the chunk or the block is too large" : problem.c_str());
      return;
    }
    const Plan plan = kernel != nullptr ? make_plan(checked.weight, tokens, *kernel)
                                        : make_plan(checked.weight, tokens, active_features().features);
    std::vector<char> scratch(plan.scratch_bytes);
    const double peak = measured_peak(*plan.full);
    // Cold: copies of the weight in turn, more than the caches hold.
    std::vector<RandomWeight> copies(cold ? 1 + (size_t{256} << 20) / (5 * random.values.size()) : 0, random);
    std::vector<CheckedWeight> weights(std::max<size_t>(1, copies.size()));
    for (size_t i = 0; i < weights.size(); ++i) {
      check((cold ? copies[i] : random).stored(), activation, weights[i]);
    }
    size_t turn = 0;
    const double time = time_of([&] {
      run(plan, weights[turn++ % weights.size()].weight, x.data(), y.data(), scratch.data(), workers);
    });
    const double dense = 2.0 * static_cast<double>(K * N * tokens) / time;
    const double useful = 2.0 * static_cast<double>(random.values.size() * tokens) / time;
    std::printf(
        "%4zux%-5zu %4zu tokens %3.0f%%  %-12s %9.1f us %7.1f GFLOP/s %8.1f dense  %5.1f%% of peak %.1f\n", K,
        N, tokens, 100 * sparsity, plan.full->name, 1e6 * time, useful / 1e9, dense / 1e9,
        100 * useful / peak, peak / 1e9);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  size_t tokens = 128, chunk = 128, block = 64, width = 1;
  Activation activation = Activation::none;
  const Kernel* kernel = nullptr;
  bool all = false, cold = false;
  std::vector<std::pair<size_t, size_t>> shapes;
  for (int i = 1; i < argc; ++i) {
    const char* word = argv[i];
    const char* next = i + 1 < argc ? argv[i + 1] : "";
    const auto number = [](const char* text) {
      return static_cast<size_t>(std::strtoull(text, nullptr, 10));
    };
    if (std::strcmp(word, "--all") == 0) {
      all = true;
      continue;
    }
    if (std::strcmp(word, "--cold") == 0) {
      cold = true;
      continue;
    }
    ++i;
    if (std::strcmp(word, "--tokens") == 0) {
      tokens = number(next);
    } else if (std::strcmp(word, "--chunk") == 0) {
      chunk = number(next);
    } else if (std::strcmp(word, "--block") == 0) {
      block = number(next);
    } else if (std::strcmp(word, "--width") == 0) {
      width = number(next);
    } else if (std::strcmp(word, "--activation") == 0) {
      activation = static_cast<Activation>(number(next));
    } else if (std::strcmp(word, "--kernel") == 0) {
      kernel = find_kernel(next);
      if (kernel == nullptr || !runs_here(*kernel)) {
        std::fprintf(stderr, "no kernel %s can run here\n", next);
        return 2;
      }
    } else if (number(word) > 0 && number(next) > 0) {
      shapes.emplace_back(number(word), number(next));
    } else {
      std::fprintf(stderr, "unknown argument %s; see the head of spmm_bench.cc\n", word);
      return 2;
    }
  }
  if (active_features().error != nullptr) {
    std::fprintf(stderr, "%s\n", active_features().error);
    return 2;
  }
  if (shapes.empty()) shapes = {{768, 768}, {768, 3072}, {3072, 768}};
  for (const auto& [K, N] : shapes) {
    if (!all) bench(K, N, tokens, chunk, block, activation, kernel, cold, width);
    for (const Kernel* one : kernels()) {
      if (all && runs_here(*one)) bench(K, N, tokens, chunk, block, activation, one, cold, width);
    }
  }
}
