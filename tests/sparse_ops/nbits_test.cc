// Every kernel for integers of few bits against plain loops over the matrix that was packed, with an
// unreadable page behind every buffer; and stored tensors that may say anything, which must be refused or be
// safe.

#include <cmath>
#include <cstdio>
#include <deque>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "formats/nbits.h"
#include "guarded.h"
#include "instruction_sets.h"
#include "kernels/nbits/nbits.h"
#include "workers.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::nbits;

constexpr size_t kPiece = kBlock * kQuad;

struct Packed {
  Layout layout;
  size_t K, N, group, kept;
  std::vector<int> integers;  // [K, N], 0 where nothing is kept
  std::vector<float> scales;  // [groups, N]
  std::vector<uint8_t> masks, values;
  std::vector<uint16_t> halves;
  std::vector<uint8_t> zeros = {};
  std::vector<float> bias = {};
};

std::vector<float> random_floats(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> value(0.0f, 3.0f);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

size_t up(size_t value, size_t step) { return (value + step - 1) / step; }

// A positive number and the bits of it as float16.
std::pair<float, uint16_t> random_half(std::mt19937& generator) {
  const auto exponent = static_cast<unsigned>(generator() % 12),
             digits = static_cast<unsigned>(generator() % 1024);  // subnormal ones, too
  const double value =
      exponent == 0 ? std::ldexp(digits, -24) : std::ldexp(1024 + digits, static_cast<int>(exponent) - 25);
  return {static_cast<float>(value), static_cast<uint16_t>(exponent << 10 | digits)};
}

// Same arguments, same weight: a share of `density` is kept, or `kept` of 16 at random places.
Packed random_weight(Layout layout, size_t K, size_t N, size_t group, size_t kept, double density = 0.5,
                     bool zeros = false) {
  std::mt19937 generator(static_cast<unsigned>(K * 31 + N * 7 + kept));
  std::bernoulli_distribution keep(density);
  const bool wide = layout == Layout::bitmap8;
  std::uniform_int_distribution<int> integer(wide ? -128 : -8, wide ? 127 : 7);
  Packed p{layout, K, N, group, kept, std::vector<int>(K * N), {}, {}, {}, {}};
  const size_t blocks = up(N, kBlock), groups = up(K, group);
  p.scales.resize(groups * N);
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t g = 0; g < groups; ++g) {
      for (size_t j = 0; j < kBlock; ++j) {
        const auto [value, bits] = random_half(generator);
        if (block * kBlock + j < N) p.scales[g * N + block * kBlock + j] = value;
        p.halves.push_back(bits);
        if (zeros) p.zeros.push_back(static_cast<uint8_t>(generator() % 16));
      }
    }
    const auto set = [&](size_t k, size_t j, int value) {
      if (k < K && block * kBlock + j < N) p.integers[k * N + block * kBlock + j] = value;
    };
    if (layout == Layout::n_of_16) {
      for (size_t k = 0; k < K; k += kSpan) {
        std::vector<uint8_t> span(kept * kPiece);
        for (size_t j = 0; j < kBlock; ++j) {
          for (size_t s = 0, entry = 0; s < kSpan / 16; ++s) {
            for (size_t i = 0, left = kept; i < 16; ++i) {
              if (generator() % (16 - i) >= left) continue;
              --left;
              int value = integer(generator), stored = value;
              if (zeros) {
                stored = value + 8;
                value = stored - p.zeros[(block * groups + k / group) * kBlock + j];
              }
              span[entry / kQuad * kPiece + j * kQuad + entry % kQuad] =
                  static_cast<uint8_t>(i | static_cast<size_t>(stored & 15) << 4);
              ++entry;
              set(k + s * 16 + i, j, value);
            }
          }
        }
        p.values.insert(p.values.end(), span.begin(), span.end());
      }
      continue;
    }
    for (size_t k = 0; k < K; k += kQuad) {
      uint64_t mask = 0;
      size_t found = 0;
      for (size_t i = 0; i < kPiece; ++i) {
        if (!keep(generator)) continue;
        mask |= uint64_t{1} << i;
        const int zero = zeros ? p.zeros[(block * groups + k / group) * kBlock + i / kQuad] : 8;
        const int value = integer(generator) + (wide ? 0 : 8 - zero);
        set(k + i % kQuad, i / kQuad, value);
        if (wide) {
          p.values.push_back(static_cast<uint8_t>(value + 128));
        } else if (found % 2 == 0) {
          p.values.push_back(static_cast<uint8_t>(value + zero));
        } else {
          p.values.back() = static_cast<uint8_t>(p.values.back() | (value + zero) << 4);
        }
        ++found;
      }
      for (size_t i = 0; i < 8; ++i) p.masks.push_back(static_cast<uint8_t>(mask >> 8 * i));
    }
  }
  p.bias = random_floats(N, 11);
  return p;
}

// Arrays at the edge of memory; scales and bias at odd addresses.
struct Placed {
  Placed(const Packed& p, Edge edge)
      : masks(p.masks, 0, edge),
        values(p.values, 0, edge),
        halves(p.halves, 1, edge),
        zeros(p.zeros, 0, edge),
        bias(p.bias, 1, edge) {
    masks.make_read_only();
    values.make_read_only();
    halves.make_read_only();
    bias.make_read_only();
    stored = {p.layout,
              static_cast<int64_t>(p.K),
              static_cast<int64_t>(p.N),
              static_cast<int64_t>(p.group),
              static_cast<int64_t>(p.kept),
              {masks.data(), p.masks.size()},
              {values.data(), p.values.size()},
              {halves.data(), p.halves.size()},
              {zeros.data(), p.zeros.size()},
              !p.zeros.empty(),
              {bias.data(), p.bias.size()}};
  }
  Guarded<uint8_t> masks, values;
  Guarded<uint16_t> halves;
  Guarded<uint8_t> zeros;
  Guarded<float> bias;
  StoredWeight stored;
};

// Y, with that of several `linears` side by side.
std::vector<float> run_kernel(const Kernel& kernel, const Weight& w, const std::vector<float>& x,
                              size_t tokens, size_t threads = 1, size_t* tasks = nullptr,
                              std::vector<size_t> linears = {}) {
  const size_t columns = w.gated ? w.N / 2 : w.N;
  if (linears.empty()) linears = {columns};
  const Guarded<float> input(x);
  std::deque<Guarded<float>> parts;
  std::vector<Output> outputs;
  for (size_t channels : linears) {
    parts.emplace_back(std::vector<float>(tokens * channels, std::nanf("")));
    outputs.push_back({parts.back().typed(), channels});
  }
  const Guarded<uint8_t> scratch(scratch_bytes(w, tokens));
  Backwards workers;
  expect(nbits::run(kernel, w, input.typed(), tokens, outputs, scratch.data(), threads, workers),
         "workers failed");
  if (tasks != nullptr) *tasks = workers.tasks;
  std::vector<float> y;
  for (size_t t = 0; t < tokens; ++t) {
    for (const Output& part : outputs) {
      y.insert(y.end(), part.y + t * part.channels, part.y + (t + 1) * part.channels);
    }
  }
  return y;
}

double activated(Activation activation, double h) {
  float y = static_cast<float>(h);
  spmm::find_kernel("reference")->activate(activation, &y, 1);
  return y;
}

// The operator by its definition, and the sum of the magnitudes that it adds up.
struct Expected {
  std::vector<double> y, size;
};
Expected by_definition(const Packed& p, const std::vector<float>& x, size_t tokens,
                       Activation activation = Activation::none, bool gated = false) {
  Expected e{std::vector<double>(tokens * p.N), std::vector<double>(tokens * p.N)};
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t begin = 0, g = 0; begin < p.K; begin += p.group, ++g) {
      const size_t end = std::min(begin + p.group, p.K);
      float most = 0;
      for (size_t k = begin; k < end; ++k) most = std::fmax(most, std::fabs(x[t * p.K + k]));
      const float scale = most == 0 ? 1 : most / 127;
      for (size_t k = begin; k < end; ++k) {
        const double q = std::nearbyint(x[t * p.K + k] / scale);
        for (size_t n = 0; n < p.N; ++n) {
          const double term =
              q * scale * p.integers[k * p.N + n] * static_cast<double>(p.scales[g * p.N + n]);
          e.y[t * p.N + n] += term;
          e.size[t * p.N + n] += std::abs(term);
        }
      }
    }
    for (size_t n = 0; n < p.N; ++n) {
      double& y = e.y[t * p.N + n];
      y += static_cast<double>(p.bias[n]);
      e.size[t * p.N + n] += std::abs(static_cast<double>(p.bias[n]));
      if (!gated || n < p.N / 2) y = activated(activation, y);
    }
  }
  if (!gated) return e;
  Expected products;
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t n = 0; n < p.N / 2; ++n) {
      const size_t gate = t * p.N + n, factor = gate + p.N / 2;
      products.y.push_back(e.y[gate] * e.y[factor]);
      products.size.push_back(e.size[gate] * e.size[factor]);
    }
  }
  return products;
}

template <class Function>
void for_each_kernel(Function function) {
  for (const Kernel* kernel : kernels()) {
    if (runs_here(*kernel)) function(*kernel);
  }
}

std::string name_of(Layout layout) {
  return layout == Layout::bitmap4 ? "bitmap4" : layout == Layout::bitmap8 ? "bitmap8" : "n_of_16";
}

void compare(const Packed& p, size_t tokens, Edge edge = Edge::back) {
  const Placed placed(p, edge);
  CheckedWeight checked;
  const std::string problem = check(placed.stored, Activation::none, checked);
  expect(problem.empty(), "a good weight is refused: " + problem);
  if (!problem.empty()) return;
  const std::vector<float> x = random_floats(tokens * p.K, 5);
  const Expected want = by_definition(p, x, tokens);
  for_each_kernel([&](const Kernel& kernel) {
    const std::vector<float> got = run_kernel(kernel, checked.weight, x, tokens);
    size_t wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) wrong += !(std::abs(got[i] - want.y[i]) <= 1e-6 * want.size[i]);
    expect(wrong == 0, std::string(kernel.name) + ", " + name_of(p.layout) + ", K " + std::to_string(p.K) +
                           ", N " + std::to_string(p.N) + ", group " + std::to_string(p.group) + ", kept " +
                           std::to_string(p.kept) + ", " + std::to_string(tokens) +
                           " tokens: " + std::to_string(wrong) + " wrong");
  });
}

// Steps behind the product: what a weight says of them, and where outputs go.
void compare_steps(Layout layout, size_t N, Activation activation, bool gated, size_t tokens,
                   const std::vector<size_t>& linears = {}) {
  const Packed p = random_weight(layout, 192, N, 64, 4);
  const Placed placed(p, Edge::back);
  CheckedWeight checked;
  expect(check(placed.stored, activation, checked).empty(), "a good weight is refused");
  checked.weight.gated = gated;
  const std::vector<float> x = random_floats(tokens * p.K, 5);
  const Expected want = by_definition(p, x, tokens, activation, gated);
  for_each_kernel([&](const Kernel& kernel) {
    for (size_t threads : {size_t{1}, size_t{3}}) {
      const std::vector<float> got =
          run_kernel(kernel, checked.weight, x, tokens, threads, nullptr, linears);
      size_t wrong = 0;
      for (size_t i = 0; i < want.y.size(); ++i) {
        wrong += !(std::abs(got[i] - want.y[i]) <= 3e-6 * want.size[i] + 1e-6);
      }
      expect(got.size() == want.y.size() && wrong == 0,
             std::string(kernel.name) + ", " + name_of(layout) + ", N " + std::to_string(N) +
                 ", activation " + std::to_string(static_cast<int>(activation)) + ", gated " +
                 std::to_string(gated) + ", " + std::to_string(tokens) + " tokens: " + std::to_string(wrong) +
                 " wrong");
    }
  });
}

void test_what_comes_behind_the_product() {
  for (Layout layout : {Layout::bitmap4, Layout::bitmap8, Layout::n_of_16}) {
    for (Activation activation : {Activation::none, Activation::relu, Activation::gelu, Activation::gelu_tanh,
                                  Activation::silu, Activation::quick_gelu}) {
      for (size_t N : {size_t{3}, size_t{37}, size_t{64}}) {
        compare_steps(layout, N, activation, false, N % 9 + 1);
      }
    }
    for (size_t tokens : {size_t{1}, size_t{2}, size_t{8}, size_t{9}, size_t{17}}) {
      for (Activation activation : {Activation::gelu_tanh, Activation::silu}) {
        for (size_t N : {size_t{32}, size_t{96}}) compare_steps(layout, N, activation, true, tokens);
      }
      compare_steps(layout, 69, Activation::none, false, tokens, {32, 16, 21});
      compare_steps(layout, 64, Activation::none, false, tokens, {16, 48});
      compare_steps(layout, 17, Activation::none, false, tokens, {16, 1});
    }
  }
}

void test_shapes() {
  for (size_t K :
       {size_t{1}, size_t{3}, size_t{4}, size_t{15}, size_t{64}, size_t{65}, size_t{130}, size_t{257}}) {
    for (size_t N : {size_t{1}, size_t{15}, size_t{16}, size_t{17}, size_t{50}}) {
      const size_t tokens = (K + N) % 11 + 1;
      const Edge edge = N % 2 == 0 ? Edge::front : Edge::back;
      for (size_t group : {size_t{16}, size_t{32}, size_t{64}, size_t{128}}) {
        compare(random_weight(Layout::bitmap4, K, N, group, 0), tokens, edge);
        compare(random_weight(Layout::bitmap4, K, N, group, 0, 0.5, true), tokens, edge);
        compare(random_weight(Layout::bitmap8, K, N, group, 0), tokens, edge);
        if (group < kSpan) continue;
        compare(random_weight(Layout::n_of_16, K, N, group, K % 15 + 1), tokens, edge);
        compare(random_weight(Layout::n_of_16, K, N, group, K % 15 + 1, 0.5, true), tokens, edge);
      }
    }
  }
}

void test_every_share_and_number_of_tokens() {
  for (size_t tokens = 1; tokens <= 18; ++tokens) {
    for (double density : {0.0, 0.03, 0.5, 1.0}) {
      compare(random_weight(Layout::bitmap4, 192, 40, 64, 0, density), tokens);
      compare(random_weight(Layout::bitmap4, 192, 40, 64, 0, density, true), tokens);
      compare(random_weight(Layout::bitmap8, 192, 40, 64, 0, density), tokens);
    }
    const size_t N = tokens <= 2 ? 135 : 40;  // nine blocks: several at a time, and what is left
    for (size_t kept = 1; kept <= 15; ++kept) {
      compare(random_weight(Layout::n_of_16, 192, N, 64, kept), tokens);
      compare(random_weight(Layout::n_of_16, 192, N, 64, kept, 0.5, true), tokens);
    }
  }
}

// The largest sums that there can be: nothing saturates or overflows.
void test_extremes() {
  for (Layout layout : {Layout::bitmap4, Layout::bitmap8, Layout::n_of_16}) {
    Packed p = random_weight(layout, 128, 16, 128, 8, 1.0);
    const int lowest = layout == Layout::bitmap8 ? -128 : -8;
    for (uint8_t& value : p.values)
      value = layout == Layout::n_of_16 ? static_cast<uint8_t>((value & 15) | 0x80) : 0;
    for (int& integer : p.integers) integer = integer != 0 || layout != Layout::n_of_16 ? lowest : 0;
    const Placed placed(p, Edge::back);
    CheckedWeight checked;
    expect(check(placed.stored, Activation::none, checked).empty(), "extremes are refused");
    for (float sign : {1.0f, -1.0f}) {
      const std::vector<float> x(128, sign * 5.0f);
      for_each_kernel([&](const Kernel& kernel) {
        const std::vector<float> got = run_kernel(kernel, checked.weight, x, 1);
        const std::vector<float> want = run_kernel(*kernels().back(), checked.weight, x, 1);
        size_t wrong = 0;
        for (size_t i = 0; i < got.size(); ++i)
          wrong += !(std::abs(got[i] - want[i]) <= 1e-6f * std::abs(want[i]));
        expect(wrong == 0, std::string(kernel.name) + ", " + name_of(layout) + ": extremes");
      });
    }
  }
}

// The same beside positions with zero points: integers are -15 to 15.
void test_extreme_zero_points() {
  for (uint8_t zero : {uint8_t{0}, uint8_t{15}}) {
    Packed p = random_weight(Layout::n_of_16, 128, 16, 128, 15, 1.0, true);
    p.zeros.assign(p.zeros.size(), zero);
    for (uint8_t& value : p.values) value = static_cast<uint8_t>((value & 15) | (15 - zero) << 4);
    const Placed placed(p, Edge::back);
    CheckedWeight checked;
    expect(check(placed.stored, Activation::none, checked).empty(), "extremes are refused");
    for (float sign : {1.0f, -1.0f}) {
      const std::vector<float> x(128, sign * 5.0f);
      for_each_kernel([&](const Kernel& kernel) {
        const std::vector<float> got = run_kernel(kernel, checked.weight, x, 1);
        for (size_t n = 0; n < p.N; ++n) {
          const float want = sign * 5.0f * 15 * 120 * (zero == 0 ? 1.0f : -1.0f) * p.scales[n] + p.bias[n];
          expect(std::abs(got[n] - want) <= 1e-5f * (std::abs(want) + 1),
                 std::string(kernel.name) + ": extreme zero points");
        }
      });
    }
  }
}

// NaN and Inf decide about their token, and about no other.
void test_special_values() {
  const Packed p = random_weight(Layout::bitmap4, 192, 33, 64, 0);
  const Placed placed(p, Edge::back);
  CheckedWeight checked;
  expect(check(placed.stored, Activation::none, checked).empty(), "refused");
  const std::vector<float> clean = random_floats(3 * p.K, 9);
  const float inf = std::numeric_limits<float>::infinity();
  for (float special : {std::nanf(""), inf, -inf, 3e38f, 1e-45f, 0.0f, -0.0f}) {
    for (size_t place : {p.K, p.K + 70, 2 * p.K - 1}) {
      std::vector<float> x = clean;
      x[place] = special;
      for_each_kernel([&](const Kernel& kernel) {
        const std::vector<float> got = run_kernel(kernel, checked.weight, x, 3);
        const std::vector<float> before = run_kernel(kernel, checked.weight, clean, 3);
        size_t wrong = 0;
        for (size_t i = 0; i < got.size(); ++i) {
          const bool own = i / p.N == 1;
          if (!own) wrong += got[i] != before[i];
          if (own) wrong += std::isnan(got[i]) == std::isfinite(special);
        }
        expect(wrong == 0, std::string(kernel.name) + ": " + std::to_string(special));
      });
    }
  }
}

// All kernels round to the same integers.
void test_rounding() {
  for (size_t K : {size_t{1}, size_t{7}, size_t{16}, size_t{100}, size_t{300}}) {
    std::vector<float> x = random_floats(K, static_cast<unsigned>(K));
    for (size_t k = 0; k < K; k += 3) x[k] = std::nearbyint(x[k] * 2) / 2;  // ties
    x[0] = 127;
    const size_t stride = up(K, kSpan) * kSpan, groups = up(K, 64);
    std::vector<int8_t> want(stride);
    std::vector<float> want_scales(groups);
    std::vector<int32_t> want_sums(groups);
    kernels().back()->round(x.data(), K, 64, stride, want.data(), want_scales.data(), want_sums.data());
    for_each_kernel([&](const Kernel& kernel) {
      const Guarded<float> input(x);
      const Guarded<int8_t> q(stride);
      const Guarded<float> scales(groups);
      const Guarded<int32_t> sums(groups);
      kernel.round(input.data(), K, 64, stride, q.typed(), scales.typed(), sums.typed());
      expect(std::vector<int8_t>(q.typed(), q.typed() + stride) == want &&
                 std::vector<float>(scales.typed(), scales.typed() + groups) == want_scales &&
                 std::vector<int32_t>(sums.typed(), sums.typed() + groups) == want_sums,
             std::string(kernel.name) + " rounds otherwise");
    });
  }
}

void test_parallel() {
  const Packed p = random_weight(Layout::bitmap4, 512, 2000, 64, 0);
  const Placed placed(p, Edge::back);
  CheckedWeight checked;
  expect(check(placed.stored, Activation::none, checked).empty(), "refused");
  const Kernel& kernel = select_kernel(offered_features());
  for (size_t tokens : {size_t{1}, size_t{8}, size_t{200}}) {
    const std::vector<float> x = random_floats(tokens * p.K, 2);
    size_t alone = 0, together = 0;
    const std::vector<float> one = run_kernel(kernel, checked.weight, x, tokens, 1, &alone);
    const std::vector<float> four = run_kernel(kernel, checked.weight, x, tokens, 4, &together);
    expect(one == four, "threads change the result");
    expect(alone == 1 && together > 3, "tasks for one thread and for four");
  }
  const std::vector<float> x(200 * p.K, 1.0f);
  std::vector<float> y(200 * p.N);
  const std::vector<Output> all = {{y.data(), p.N}};
  std::vector<char> scratch(scratch_bytes(checked.weight, 200));
  for (int calls : {0, 1}) {
    Failing failing(calls);
    expect(!nbits::run(kernel, checked.weight, x.data(), 200, all, scratch.data(), 4, failing),
           "a failure of workers was lost");
  }
  Failing failing;
  expect(nbits::run(kernel, checked.weight, x.data(), 0, all, scratch.data(), 4, failing),
         "no tokens, yet work");
}

// The rules of the format, one after the other.
void test_refusals() {
  const auto refused = [](Layout layout, auto change, const char* why) {
    Packed p = random_weight(layout, 70, 20, 64, 5);
    change(p);
    const Placed placed(p, Edge::back);
    CheckedWeight checked;
    const std::string problem = check(placed.stored, Activation::none, checked);
    expect(problem.find(why) != std::string::npos,
           std::string("expected '") + why + "', found '" + problem + "'");
  };
  for (Layout layout : {Layout::bitmap4, Layout::bitmap8, Layout::n_of_16}) {
    refused(layout, [](Packed& p) { p.K = 0; }, "attribute K is 0");
    refused(layout, [](Packed& p) { p.N = 0; }, "attribute N is 0");
    refused(layout, [](Packed& p) { p.K = size_t{1} << 40; }, "too many elements");
    refused(layout, [](Packed& p) { p.N = SIZE_MAX / 2; }, "too many elements");
    refused(layout, [](Packed& p) { p.group = 48; }, "attribute group is 48");
    refused(layout, [](Packed& p) { p.group = 0; }, "attribute group is 0");
    refused(layout, [](Packed& p) { p.values.pop_back(); }, "values has");
    refused(layout, [](Packed& p) { p.values.push_back(0); }, "values has");
    refused(layout, [](Packed& p) { p.halves.pop_back(); }, "scales has");
    refused(layout, [](Packed& p) { p.bias.pop_back(); }, "bias has");
    refused(layout, [](Packed& p) { p.halves[3] = 0x7c00; }, "a scale is");
    refused(layout, [](Packed& p) { p.halves[9] = 0x8001; }, "a scale is");
    refused(layout, [](Packed& p) { p.N += 16; }, "expected");
    refused(layout, [](Packed& p) { p.K += 64; }, "expected");
  }
  for (Layout layout : {Layout::bitmap4, Layout::bitmap8}) {
    refused(layout, [](Packed& p) { p.masks.pop_back(); }, "masks has");
    refused(layout, [](Packed& p) { p.masks[5] = 0xff, p.masks[6] = 0xff; }, "values has");
  }
  for (Layout layout : {Layout::bitmap4, Layout::n_of_16}) {
    refused(layout, [](Packed& p) { p.zeros.assign(3, 0); }, "zeros has");
    refused(layout, [](Packed& p) { p.zeros.assign(p.halves.size(), 16); }, "more than 15");
  }
  refused(Layout::n_of_16, [](Packed& p) { p.group = 32; }, "attribute group is 32");
  refused(Layout::n_of_16, [](Packed& p) { p.kept = 16; }, "attribute kept is 16");
  refused(Layout::n_of_16, [](Packed& p) { p.kept = 0; }, "attribute kept is 0");
  refused(Layout::n_of_16, [](Packed& p) { p.values[1] = p.values[0]; }, "do not rise");
}

// Whatever is accepted is safe for every kernel, and gives the same on all of them.
void test_hostile_bytes() {
  std::mt19937_64 generator(3);
  const auto below = [&](size_t limit) { return static_cast<size_t>(generator() % limit); };
  size_t accepted = 0, refused = 0;
  for (int i = 0; i < 3000; ++i) {
    const auto layout = static_cast<Layout>(below(3));
    const size_t group = layout == Layout::n_of_16 ? size_t{64} << below(2) : size_t{16} << below(4);
    Packed p = random_weight(layout, 1 + below(150), 1 + below(40), group, 1 + below(15),
                             static_cast<double>(below(5)) / 4, layout != Layout::bitmap8 && below(2) == 0);
    for (size_t left = below(3); left > 0; --left) {
      std::vector<uint8_t>& bytes = below(2) == 0 || p.masks.empty() ? p.values : p.masks;
      switch (below(6)) {
        case 0:
          p.K += below(3) - 1;
          break;
        case 1:
          p.N += below(3) - 1;
          if (below(8) > 0) p.bias.resize(p.N % 64);
          break;
        case 2:
          p.kept = below(18);
          break;
        case 3:
          p.halves[below(p.halves.size())] = static_cast<uint16_t>(generator());
          break;
        case 4:
          if (!bytes.empty()) bytes[below(bytes.size())] = static_cast<uint8_t>(generator());
          break;
        default:
          bytes.resize(below(bytes.size() + 2));
          break;
      }
    }
    const Placed placed(p, Edge::back);
    CheckedWeight checked;
    if (!check(placed.stored, Activation::none, checked).empty()) {
      ++refused;
      continue;
    }
    ++accepted;
    const size_t tokens = 1 + below(9);
    const std::vector<float> x = random_floats(tokens * p.K, 4);
    std::optional<std::vector<float>> first;
    for_each_kernel([&](const Kernel& kernel) {
      const std::vector<float> got = run_kernel(kernel, checked.weight, x, tokens);
      if (!first) first = got;
      size_t wrong = 0;
      for (size_t at = 0; at < got.size(); ++at) {
        wrong += !(std::abs(got[at] - (*first)[at]) <= 1e-2f + 1e-4f * std::abs((*first)[at]));
      }
      expect(wrong == 0, std::string(kernel.name) + " differs on accepted bytes, input " + std::to_string(i));
    });
  }
  expect(accepted > 500 && refused > 500,
         "accepted " + std::to_string(accepted) + ", refused " + std::to_string(refused));
}

void test_dispatch() {
  for (const Features features : offered_sets()) {
    const Kernel& kernel = select_kernel(features);
    expect(contains(features, kernel.needs), "select_kernel takes a kernel that needs more");
    expect(&kernel != kernels().back(), "the reference is chosen");
  }
  if (contains(offered_features(), kAvx2)) {
    expect(std::string(select_kernel(kAvx2).name) == "avx2", "AVX2 has its kernel");
  }
}

}  // namespace

int main() {
  test_dispatch();
  test_refusals();
  test_rounding();
  test_extremes();
  test_extreme_zero_points();
  test_special_values();
  test_parallel();
  test_what_comes_behind_the_product();
  test_shapes();
  test_every_share_and_number_of_tokens();
  test_hostile_bytes();
  return summary();
}
