// Speed of the kernels for int8 in one thread, with rounding and epilogue, and of their parts.
//
//   quads_bench [--tokens M] [--chunk C] [--block B] [--kernel NAME] [--limit L] [K N]...
//
// Without a kernel: what a session would choose. Without shapes: those of BERT-base. Zeros are whole quads
// (`1x4`); the first row is the dense format. Times are processor time, the lower quartile of many runs.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <utility>

#include "kernels/quads/quads.h"
#include "random_quads.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::quads;

double now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Adds up the time of every kind of task.
class Stopwatch final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    const double before = now();
    for (size_t i = 0; i < total; ++i) task(context, i);
    parts[calls++ % 2] += now() - before;
    return true;
  }
  double parts[2] = {};  // rounding, and all else
  size_t calls = 0;
};

void bench(size_t K, size_t N, size_t tokens, size_t chunk, size_t block, int limit, const Kernel* kernel) {
  std::vector<float> x(tokens * K), y(tokens * N);
  std::mt19937 generator(1);
  std::normal_distribution<float> value;
  for (float& v : x) v = value(generator);
  for (double zeros : {-1.0, 0.0, 0.5, 0.7, 0.8, 0.9}) {
    const RandomQuads random = zeros < 0 ? random_dense(K, N, chunk, block, limit)
                                         : random_quads(K, N, 1 - zeros, chunk, block, limit);
    CheckedWeight checked;
    const std::string problem = int8_quads::check(random.stored().raw(), Activation::none, checked);
    if (!problem.empty() || (kernel != nullptr && !fits(*kernel, checked.weight))) {
      std::printf("skipped: %s\n", problem.empty() ? "the block is too large" : problem.c_str());
      continue;
    }
    const Plan plan = kernel != nullptr ? make_plan(checked.weight, tokens, *kernel)
                                        : make_plan(checked.weight, tokens, active_features().features);
    std::vector<char> scratch(plan.scratch_bytes);
    std::vector<std::pair<double, double>> times;  // all, rounding
    const double start = now();
    while (times.size() < 7 || now() - start < 0.2) {
      Stopwatch watch;
      run(plan, checked.weight, x.data(), y.data(), scratch.data(), watch);
      times.emplace_back(watch.parts[0] + watch.parts[1], watch.parts[0]);
    }
    const auto quartile = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 4);
    std::nth_element(times.begin(), quartile, times.end());
    const auto [time, rounding] = *quartile;
    std::printf("%4zux%-5zu %4zu tokens %-11s %-14s %9.1f us, rounding %6.1f us %7.1f GMAC/s dense\n", K, N,
                tokens, zeros < 0 ? "dense" : (std::to_string(static_cast<int>(100 * zeros)) + " %").c_str(),
                plan.full->name, 1e6 * time, 1e6 * rounding,
                static_cast<double>(K * N * tokens) / time / 1e9);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  size_t tokens = 128, chunk = 96, block = 128;
  int limit = 64;
  const Kernel* kernel = nullptr;
  std::vector<std::pair<size_t, size_t>> shapes;
  for (int i = 1; i + 1 < argc; i += 2) {
    const char *word = argv[i], *next = argv[i + 1];
    const auto number = [](const char* text) {
      return static_cast<size_t>(std::strtoull(text, nullptr, 10));
    };
    if (std::strcmp(word, "--tokens") == 0) {
      tokens = number(next);
    } else if (std::strcmp(word, "--chunk") == 0) {
      chunk = number(next);
    } else if (std::strcmp(word, "--block") == 0) {
      block = number(next);
    } else if (std::strcmp(word, "--limit") == 0) {
      limit = static_cast<int>(number(next));
    } else if (std::strcmp(word, "--kernel") == 0) {
      for (const Kernel* one : kernels()) {
        if (std::strcmp(one->name, next) == 0 && runs_here(*one)) kernel = one;
      }
      if (kernel == nullptr) {
        std::fprintf(stderr, "no kernel %s can run here\n", next);
        return 2;
      }
    } else if (number(word) > 0 && number(next) > 0) {
      shapes.emplace_back(number(word), number(next));
    } else {
      std::fprintf(stderr, "unknown argument %s; see the head of quads_bench.cc\n", word);
      return 2;
    }
  }
  if (active_features().error != nullptr) {
    std::fprintf(stderr, "%s\n", active_features().error);
    return 2;
  }
  if (shapes.empty()) shapes = {{768, 768}, {768, 3072}, {3072, 768}};
  for (const auto& [K, N] : shapes) bench(K, N, tokens, chunk, block, limit, kernel);
}
