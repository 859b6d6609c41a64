// Every kernel of the table against formulas in double, with an unreadable page behind every buffer.

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "guarded.h"
#include "instruction_sets.h"
#include "kernels/normalization/normalization.h"
#include "workers.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::normalization;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

std::vector<float> random_floats(size_t count, unsigned seed, float mean = 0) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> value(mean, 1.0f);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

struct Problem {
  size_t rows, skip_rows, channels;
  std::vector<float> x, skip, gamma, beta;  // empty skip or beta: none
  float epsilon;
};

Problem random_problem(size_t rows, size_t channels, bool has_skip, bool has_beta, float mean = 0) {
  return {rows,
          rows,
          channels,
          random_floats(rows * channels, 1, mean),
          has_skip ? random_floats(rows * channels, 2) : std::vector<float>(),
          random_floats(channels, 3),
          has_beta ? random_floats(channels, 4) : std::vector<float>(),
          1e-5f};
}

struct Result {
  std::vector<float> y, sum;
};

// In the worst case: arrays at the end or the beginning of memory, constants at odd addresses.
Result run_kernel(const Kernel& kernel, const Problem& p, bool keep_sum, size_t gap, Edge edge = Edge::back) {
  const Guarded<float> x(p.x, 0, edge), skip(p.skip, 0, edge), gamma(p.gamma, gap, edge),
      beta(p.beta, gap, edge);
  const Guarded<float> y(std::vector<float>(p.x.size(), std::nanf("")), 0, edge);
  const Guarded<float> sum(std::vector<float>(p.x.size(), std::nanf("")), 0, edge);
  Arguments arguments{};
  arguments.x = x.data();
  arguments.skip = p.skip.empty() ? nullptr : skip.data();
  arguments.gamma = gamma.data();
  arguments.beta = p.beta.empty() ? nullptr : beta.data();
  arguments.y = y.typed();
  arguments.sum = keep_sum ? sum.typed() : nullptr;
  arguments.rows = p.rows;
  arguments.skip_rows = p.skip_rows;
  arguments.channels = p.channels;
  arguments.epsilon = p.epsilon;
  Backwards workers;
  expect(normalization::run(kernel, arguments, workers), "workers failed");
  return {{y.typed(), y.typed() + p.x.size()}, {sum.typed(), sum.typed() + p.x.size()}};
}

// The normalized values, before gamma and beta, from sums that were rounded to float as the operator's are.
std::vector<double> normalized(const Problem& p, std::vector<float>& sum) {
  sum = p.x;
  for (size_t i = 0; i < sum.size() && !p.skip.empty(); ++i) sum[i] += p.skip[i % p.skip.size()];
  std::vector<double> all(sum.begin(), sum.end());
  for (size_t row = 0; row < p.rows; ++row) {
    double* s = all.data() + row * p.channels;
    double mean = 0, square = 0;
    for (size_t c = 0; c < p.channels; ++c) mean += s[c];
    mean = p.beta.empty() ? 0 : mean / static_cast<double>(p.channels);
    for (size_t c = 0; c < p.channels; ++c) square += (s[c] - mean) * (s[c] - mean);
    const double root = std::sqrt(square / static_cast<double>(p.channels) + static_cast<double>(p.epsilon));
    for (size_t c = 0; c < p.channels; ++c) s[c] = (s[c] - mean) / root;
  }
  return all;
}

// `ulps`: of the normalized value and the largest term of the result
void compare(const Kernel& kernel, const Problem& p, bool keep_sum, size_t gap, double ulps) {
  const Edge edge = p.rows == 2 ? Edge::front : Edge::back;
  const Result got = run_kernel(kernel, p, keep_sum, gap, edge);
  std::vector<float> sum;
  const std::vector<double> want = normalized(p, sum);
  size_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const size_t c = i % p.channels;
    const double beta = p.beta.empty() ? 0.0 : static_cast<double>(p.beta[c]), gamma = p.gamma[c];
    const double bound = ulps * kEpsilon * (std::abs(gamma) * (std::abs(want[i]) + 0.1) + std::abs(beta));
    wrong += !(std::abs(got.y[i] - (want[i] * gamma + beta)) <= bound);
    if (keep_sum && !p.skip.empty()) wrong += got.sum[i] != sum[i];
  }
  char where[160];
  std::snprintf(where, sizeof where, "%s: %zu rows, %zu channels, skip %d, beta %d, sum %d: %zu wrong",
                kernel.name, p.rows, p.channels, !p.skip.empty(), !p.beta.empty(), keep_sum, wrong);
  expect(wrong == 0, where);
}

template <class Function>
void for_each_kernel(Function function) {
  for (const Kernel* kernel : kernels()) {
    if (runs_here(*kernel)) function(*kernel);
  }
}

void test_shapes() {
  std::vector<size_t> widths = {31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 255, 384, 768, 1000, 4096, 5003};
  for (size_t channels = 1; channels <= 18; ++channels) widths.push_back(channels);
  for (size_t channels : widths) {
    for (size_t rows : {size_t{1}, size_t{2}, size_t{7}}) {
      for (bool has_skip : {false, true}) {
        for (bool has_beta : {false, true}) {
          const Problem p = random_problem(rows, channels, has_skip, has_beta);
          for_each_kernel([&](const Kernel& kernel) {
            compare(kernel, p, false, channels % 4, 4);
            compare(kernel, p, true, channels % 4, 4);
          });
        }
      }
    }
  }
}

void test_repeated_skip() {
  for (size_t skip_rows : {size_t{1}, size_t{2}, size_t{6}}) {
    for (bool has_beta : {false, true}) {
      Problem p = random_problem(12, 37, true, has_beta);
      p.skip_rows = skip_rows;
      p.skip.resize(skip_rows * p.channels);
      for_each_kernel([&](const Kernel& kernel) {
        compare(kernel, p, false, 0, 4);
        compare(kernel, p, true, 0, 4);
      });
    }
  }
}

// A mean far from zero: what rounding the mean loses must come back.
void test_large_mean() {
  for (float mean : {100.0f, -1e4f, 1e6f}) {
    for (size_t channels : {size_t{5}, size_t{100}, size_t{768}, size_t{4096}}) {
      const Problem p = random_problem(3, channels, false, true, mean);
      for_each_kernel([&](const Kernel& kernel) { compare(kernel, p, false, 0, 4); });
    }
  }
}

void test_constant_rows() {
  for (float value : {0.0f, -0.0f, 3.0f, 0.1f, 123456.7f, -1e30f, 1e-40f}) {
    for (size_t channels : {size_t{1}, size_t{3}, size_t{64}, size_t{100}}) {
      Problem p = random_problem(2, channels, true, true);
      p.x.assign(p.x.size(), value);
      p.skip.assign(p.skip.size(), 0.0f);
      for_each_kernel([&](const Kernel& kernel) {
        const Result got = run_kernel(kernel, p, false, 0);
        size_t wrong = 0;
        for (size_t i = 0; i < got.y.size(); ++i)
          wrong += !(std::abs(got.y[i] - p.beta[i % channels]) < 1e-3f);
        expect(wrong == 0, std::string(kernel.name) + ": a constant row is not beta");
      });
    }
  }
}

// What a row holds decides about that row alone, and about all of it.
void test_special_values() {
  const float tiny = std::numeric_limits<float>::denorm_min();
  for (float special : {std::nanf(""), kInf, -kInf, 3e38f, tiny}) {
    for (size_t channels : {size_t{1}, size_t{19}, size_t{64}, size_t{131}}) {
      for (bool has_beta : {false, true}) {
        for (bool in_skip : {false, true}) {
          Problem p = random_problem(3, channels, true, has_beta);
          const Problem clean = p;
          (in_skip ? p.skip : p.x)[2 * channels - 1] = special;
          for_each_kernel([&](const Kernel& kernel) {
            const Result got = run_kernel(kernel, p, true, 0), before = run_kernel(kernel, clean, true, 0);
            size_t wrong = 0;
            for (size_t i = 0; i < got.y.size(); ++i) {
              const float s = p.x[i] + p.skip[i];
              wrong += std::isnan(s) ? !std::isnan(got.sum[i]) : got.sum[i] != s;
              const bool row = i / channels == 1, last = i + 1 == 2 * channels;
              if (!row) {
                wrong += got.y[i] != before.y[i];
              } else if (std::isnan(special) || (std::isinf(special) && (has_beta || last))) {
                wrong += !std::isnan(got.y[i]);
              } else if (std::isinf(special)) {
                wrong += got.y[i] != 0;  // a finite number over an infinite root
              } else {
                wrong += !std::isfinite(got.y[i]);
              }
            }
            char where[160];
            std::snprintf(where, sizeof where, "%s: %g among %zu channels, beta %d: %zu wrong", kernel.name,
                          static_cast<double>(special), channels, has_beta, wrong);
            expect(wrong == 0, where);
          });
        }
      }
    }
  }
}

void test_parallel() {
  const size_t channels = 130;
  for (size_t rows : {size_t{1}, size_t{100}, size_t{127}, size_t{128}, size_t{1000}}) {
    const Problem p = random_problem(rows, channels, true, true);
    for_each_kernel([&](const Kernel& kernel) { compare(kernel, p, true, 1, 4); });
  }
  std::vector<float> x(1000 * channels), y(x.size()), gamma(channels);
  Arguments arguments = {x.data(), nullptr, gamma.data(), nullptr, y.data(), nullptr,
                         1000,     0,       channels,     1e-5f};
  const Kernel& kernel = select_kernel(kGeneric);
  Backwards workers;
  Failing failing;
  expect(normalization::run(kernel, arguments, workers) && workers.tasks > 4, "many rows are not spread");
  expect(!normalization::run(kernel, arguments, failing), "a failure of workers was lost");
  arguments.rows = 100;
  expect(normalization::run(kernel, arguments, failing), "few rows were spread");
  arguments.rows = 0;
  expect(normalization::run(kernel, arguments, failing), "no rows, yet work");
  arguments.rows = 1 << 20;
  arguments.channels = 0;
  expect(normalization::run(kernel, arguments, failing), "no channels, yet work");
}

void test_dispatch() {
  for (const Features features : offered_sets()) {
    const Kernel& kernel = select_kernel(features);
    expect(is_of_set(kernel, features), "select_kernel");
  }
}

}  // namespace

int main() {
  test_dispatch();
  test_parallel();
  test_constant_rows();
  test_special_values();
  test_large_mean();
  test_repeated_skip();
  test_shapes();
  return summary();
}
