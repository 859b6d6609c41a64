// What every kernel for Y = act(X . W + bias) must satisfy, measured against sums in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "expect.h"
#include "guarded.h"
#include "instruction_sets.h"
#include "kernels/spmm/spmm.h"
#include "random_weight.h"
#include "workers.h"

namespace sparse_ops::spmm {

inline constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::gelu,
                                              Activation::gelu_tanh, Activation::silu,
                                              Activation::quick_gelu};

inline double activated(Activation activation, double h) {
  switch (activation) {
    case Activation::none:
      return h;
    case Activation::relu:
      return h < 0 ? 0 : h;
    case Activation::gelu:
      return 0.5 * h * std::erfc(-h / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * h * (1 + std::tanh(std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h)));
    case Activation::silu:
      return h / (1 + std::exp(-h));
    case Activation::quick_gelu:
      return h / (1 + std::exp(-1.702 * h));
  }
  return h;
}

// Call visit(value, k, n) for every stored value, those of padding channels included.
template <class Visit>
void for_every_entry(const RandomWeight& w, Visit visit) {
  size_t entry = 0, segment = 0;
  for (size_t first = 0; first < w.N; first += w.block) {
    for (size_t begin = 0; begin < w.K; begin += w.chunk) {
      for (size_t s = 0; s < w.block / w.width; ++s, ++segment) {
        for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
          for (size_t r = 0; r < w.width; ++r) {
            visit(w.values[entry * w.width + r], begin + w.offsets[entry],
                  first + w.rows[segment] * w.width + r);
          }
        }
      }
    }
  }
}

// X . W + bias and the same of magnitudes, which bounds the rounding error.
struct Exact {
  std::vector<double> sum, magnitude;
};

inline Exact exact(const RandomWeight& w, const std::vector<float>& x, size_t tokens) {
  Exact y{std::vector<double>(tokens * w.N), std::vector<double>(tokens * w.N)};
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t n = 0; n < w.N; ++n) {
      y.sum[t * w.N + n] = w.bias[n];
      y.magnitude[t * w.N + n] = std::abs(w.bias[n]);
    }
  }
  for_every_entry(w, [&](float value, size_t k, size_t n) {
    if (n >= w.N) return;
    for (size_t t = 0; t < tokens; ++t) {
      const double term = static_cast<double>(value) * x[t * w.K + k];
      y.sum[t * w.N + n] += term;
      y.magnitude[t * w.N + n] += std::abs(term);
    }
  });
  return y;
}

inline std::vector<float> random_floats(size_t count) {
  std::mt19937 generator(7);
  std::uniform_real_distribution<float> value(-2.0f, 2.0f);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

// `random` as the kernels see it in the worst case: read-only arrays at the edge of memory, floats at odd
// addresses.
struct GuardedWeight {
  Guarded<float> values, bias;
  Guarded<uint8_t> offsets, counts, rows;
  CheckedWeight checked;

  GuardedWeight(const RandomWeight& random, Activation activation, size_t gap = 0, Edge edge = Edge::back)
      : values(random.values, gap, edge),
        bias(random.bias, gap, edge),
        offsets(random.offsets, 0, edge),
        counts(random.counts, 0, edge),
        rows(random.rows, 0, edge) {
    StoredWeight stored = random.stored();
    stored.values = values.data();
    stored.bias = bias.data();
    stored.offsets = offsets.typed();
    stored.counts = counts.typed();
    stored.rows = rows.typed();
    for (const auto* floats : {&values, &bias}) floats->make_read_only();
    for (const auto* bytes : {&offsets, &counts, &rows}) bytes->make_read_only();
    const std::string problem = check(stored, activation, checked);
    expect(problem.empty(), "valid weight refused: " + problem);
  }
};

inline std::string describe(const Plan& plan, const Weight& weight) {
  char text[200];
  std::snprintf(text, sizeof text, "%s: %zu tokens, %zux%zu, chunk %zu, block %zu, width %zu, activation %d",
                plan.full->name, plan.tokens, weight.K, weight.N, weight.chunk, weight.block, weight.width,
                static_cast<int>(weight.activation));
  return text;
}

// Y, computed between inaccessible pages.
inline std::vector<float> guarded_run(const Plan& plan, const Weight& weight, const std::vector<float>& x,
                                      Edge edge = Edge::back) {
  const Guarded<float> guarded_x(x, 0, edge);
  guarded_x.make_read_only();
  const Guarded<float> y(std::vector<float>(plan.tokens * weight.N, std::nanf("")), 0, edge);
  const Guarded<char> scratch(plan.scratch_bytes, 0, edge);
  Backwards workers;
  expect(run(plan, weight, guarded_x.typed(), y.typed(), scratch.data(), workers), "workers failed");
  return {y.typed(), y.typed() + plan.tokens * weight.N};
}

inline void compare(const Plan& plan, const Weight& weight, const std::vector<float>& x, const Exact& want,
                    Edge edge = Edge::back) {
  const std::vector<float> y = guarded_run(plan, weight, x, edge);
  const double epsilon = std::numeric_limits<float>::epsilon();
  const double terms = static_cast<double>(weight.K + 1);
  size_t wrong = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double expected = activated(weight.activation, want.sum[i]);
    // No activation is steeper than 1.13.
    const double bound =
        1.13 * terms * epsilon * want.magnitude[i] + 4 * epsilon * std::abs(expected) + 1e-35;
    const bool right = std::isnan(expected)   ? std::isnan(y[i])
                       : std::isinf(expected) ? y[i] == static_cast<float>(expected)
                                              : std::abs(y[i] - expected) <= bound;
    wrong += !right;
  }
  expect(wrong == 0, describe(plan, weight) + ": " + std::to_string(wrong) + " wrong");
}

// Call visit(weight, tokens, x, want) with sizes around those of vectors, tiles and blocks.
inline void for_every_shape(
    const std::function<void(const Weight&, size_t, const std::vector<float>&, const Exact&)>& visit) {
  struct Shape {
    size_t K, N, chunk, block;
    double density;
    size_t width = 1;
  };
  const Shape shapes[] = {
      {1, 1, 1, 1, 1.0},          {5, 3, 2, 2, 0.5},           {16, 16, 16, 16, 0.0},
      {31, 65, 7, 5, 0.3},        {64, 33, 64, 64, 1.0},       {129, 63, 128, 64, 0.2},
      {255, 257, 255, 256, 0.1},  {300, 100, 128, 64, 0.9},    {40, 36, 16, 8, 0.4, 4},
      {130, 67, 128, 64, 0.2, 4}, {300, 100, 128, 64, 0.5, 8}, {33, 9, 33, 16, 0.9, 8},
      {383, 1001, 128, 64, 0.1},
  };
  std::vector<size_t> token_counts = {31, 32, 33, 63, 64, 65, 127, 128, 129};
  for (size_t tokens = 1; tokens <= 17; ++tokens) token_counts.push_back(tokens);
  const Shape& largest = shapes[std::size(shapes) - 1];
  for (const Shape& s : shapes) {
    const RandomWeight random = random_weight(s.K, s.N, s.density, s.chunk, s.block, s.width);
    size_t round = 0;
    for (size_t tokens : token_counts) {
      if (&s == &largest && tokens % 32 != 1 && tokens != 5) continue;  // for the time it takes
      const std::vector<float> x = random_floats(tokens * s.K);
      const GuardedWeight guarded(random, kActivations[round % std::size(kActivations)], round % 4);
      ++round;
      visit(guarded.checked.weight, tokens, x, exact(random, x, tokens));
    }
  }
}

// Activations at every kind of argument.
inline void check_activations(std::span<const Kernel* const> kernels) {
  const float inf = std::numeric_limits<float>::infinity();
  const float tiny = std::numeric_limits<float>::denorm_min();
  std::vector<float> x = {0.0f,   -0.0f,   inf,   -inf,   std::nanf(""), tiny,  -tiny,
                          1e-20f, -1e-20f, 3e38f, -3e38f, 1e30f,         -1e30f};
  for (float v = -110.0f; v <= 110.0f; v += 0.037f) x.push_back(v);
  RandomWeight identity = random_weight(1, 20, 1.0, 1, 7);
  for (float& v : identity.values) v = 1.0f;
  for (float& b : identity.bias) b = 0.0f;
  for (Activation activation : kActivations) {
    const GuardedWeight guarded(identity, activation, 1);
    for (const Kernel* kernel : kernels) {
      if (!runs_here(*kernel)) continue;
      const Plan plan = make_plan(guarded.checked.weight, x.size(), *kernel);
      const std::vector<float> y = guarded_run(plan, guarded.checked.weight, x);
      std::string problem;
      for (size_t i = 0; i < y.size(); ++i) {
        const double h = x[i / identity.N];
        double want = activated(activation, h);
        // Far left of zero, where the formula in double is still a product of tiny and huge numbers.
        if (std::isinf(h) && h < 0 && activation != Activation::none && activation != Activation::relu)
          want = NAN;
        const bool same =
            std::isnan(want) ? std::isnan(y[i])
            : std::isinf(want)
                ? y[i] == static_cast<float>(want)
                : std::abs(y[i] - want) <= 1e-6 * std::abs(want) + 1e-7 * std::min(1.0, std::abs(h)) + 1e-37;
        if (same) continue;
        char what[100];
        std::snprintf(what, sizeof what, ": of %g is %g, expected %g", h, static_cast<double>(y[i]), want);
        problem = describe(plan, guarded.checked.weight) + what;
      }
      expect(problem.empty(), problem);
    }
  }
}

// NaN and Inf of X reach exactly those outputs that have a stored weight for them, as in a dense product,
// whatever the lane. Where no weight is stored nothing is multiplied: dense gives 0 * NaN = NaN there.
inline void check_non_finite(const Kernel& kernel, size_t width) {
  const float inf = std::numeric_limits<float>::infinity();
  const RandomWeight random = random_weight(33, 45, 0.3, 16, 8, width);
  const size_t K = random.K, N = random.N, tokens = kernel.tile + 1;
  std::vector<bool> stored(K * N);
  bool stored_zero = false;  // stands for a segment that keeps nothing
  for_every_entry(random, [&](float value, size_t k, size_t n) {
    if (n >= N) return;
    stored[k * N + n] = true;
    stored_zero |= value == 0.0f && k == K - 1;
  });
  expect(stored_zero && std::ranges::count(stored, false) > 0, "the weight is too full");
  const GuardedWeight guarded(random, Activation::none);
  const Weight& weight = guarded.checked.weight;
  if (!fits(kernel, weight)) return;
  const Plan plan = make_plan(weight, tokens, kernel);
  for (float special : {std::nanf(""), inf, -inf}) {
    for (size_t token : {size_t{0}, tokens / 2, tokens - 1}) {
      for (size_t k : {size_t{0}, size_t{16}, size_t{31}, K - 1}) {
        std::vector<float> x = random_floats(tokens * K);
        x[token * K + k] = 0.0f;
        const std::vector<float> without = guarded_run(plan, weight, x);
        x[token * K + k] = special;
        const std::vector<float> with = guarded_run(plan, weight, x);
        const Exact want = exact(random, x, tokens);
        size_t wrong = 0;
        for (size_t i = 0; i < with.size(); ++i) {
          const bool reached = i / N == token && stored[k * N + i % N];
          const float expected = reached ? static_cast<float>(want.sum[i]) : without[i];
          wrong += reached == std::isfinite(expected);
          wrong += !(std::isnan(expected) ? std::isnan(with[i]) : with[i] == expected);
        }
        expect(wrong == 0, describe(plan, weight) + ": NaN or Inf goes astray");
      }
    }
  }
  RandomWeight odd = random;
  odd.values[0] = std::nanf("");
  odd.values[random.values.size() / 2] = inf;
  odd.bias[N - 1] = -inf;
  const GuardedWeight guarded_odd(odd, Activation::none);
  const std::vector<float> x = random_floats(tokens * K);
  compare(make_plan(guarded_odd.checked.weight, tokens, kernel), guarded_odd.checked.weight, x,
          exact(odd, x, tokens));
}

// Numbers below the smallest normal one are not flushed to zero: their sums are exact.
inline void check_subnormal(std::span<const Kernel* const> kernels) {
  const size_t K = 3, N = 20;
  RandomWeight ones = random_weight(K, N, 1.0, K, 7);
  for (float& v : ones.values) v = 1.0f;
  for (float& b : ones.bias) b = 0.0f;
  const GuardedWeight guarded(ones, Activation::none);
  for (const Kernel* kernel : kernels) {
    if (!runs_here(*kernel)) continue;
    const size_t tokens = kernel->tile + 1;
    std::vector<float> x(tokens * K);
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(i + 1) * std::numeric_limits<float>::denorm_min();
    const Plan plan = make_plan(guarded.checked.weight, tokens, *kernel);
    const std::vector<float> y = guarded_run(plan, guarded.checked.weight, x);
    size_t wrong = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      const float* row = &x[i / N * K];
      wrong += y[i] != row[0] + row[1] + row[2];
    }
    expect(wrong == 0, describe(plan, guarded.checked.weight) + ": subnormal numbers are lost");
  }
}

// All checks of special numbers.
inline void check_special_values(std::span<const Kernel* const> kernels) {
  check_activations(kernels);
  check_subnormal(kernels);
  for (const Kernel* kernel : kernels) {
    if (!runs_here(*kernel)) continue;
    for (size_t width : {size_t{1}, size_t{4}, size_t{8}}) check_non_finite(*kernel, width);
  }
}

}  // namespace sparse_ops::spmm
