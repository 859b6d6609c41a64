// Sparse convolution with every kernel against plain loops in double, with an unreadable page behind every
// buffer.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <set>
#include <string>

#include "expect.h"
#include "guarded.h"
#include "instruction_sets.h"
#include "kernels/sizes.h"
#include "kernels/spconv/fused_depthwise.h"
#include "kernels/spconv/panel.h"
#include "kernels/spconv/spconv.h"
#include "kernels/spmm/spmm.h"
#include "random_weight.h"
#include "workers.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spconv;
using Activation = MapEpilogue::Activation;

// What turns the accumulators of `products` into maps: of the same instruction set.
const Kernel& maps_beside(const spmm::Kernel& products) {
  return &products == spmm::kernels().back() ? *kernels().back() : select_kernel(products.needs);
}

double activated(const MapEpilogue& epilogue, double h) {
  switch (epilogue.activation) {
    case Activation::none:
      return h;
    case Activation::clip:
      return std::min(std::max(h, static_cast<double>(epilogue.low)), static_cast<double>(epilogue.high));
    case Activation::silu:
      return h / (1 + std::exp(-h));
    case Activation::hard_swish:
      return h * std::min(std::max(h / 6 + 0.5, 0.0), 1.0);
  }
  return h;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr MapEpilogue kEpilogues[] = {{Activation::none, 0, 0},
                                      {Activation::clip, 0, kInfinity},
                                      {Activation::clip, -0.5f, 6},
                                      {Activation::silu, 0, 0},
                                      {Activation::hard_swish, 0, 0}};

std::vector<float> random_floats(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> value(-2.0f, 2.0f);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

// The dense weight [K, N].
std::vector<double> unpack(const spmm::RandomWeight& w) {
  std::vector<double> dense(w.K * w.N);
  size_t entry = 0, segment = 0;
  for (size_t first = 0; first < w.N; first += w.block) {
    for (size_t begin = 0; begin < w.K; begin += w.chunk) {
      for (size_t s = 0; s < w.block / w.width; ++s, ++segment) {
        for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
          for (size_t j = 0; j < w.width; ++j) {
            const size_t n = first + w.rows[segment] * w.width + j;
            if (n >= w.N) continue;
            dense[(begin + w.offsets[entry]) * w.N + n] = static_cast<double>(w.values[entry * w.width + j]);
          }
        }
      }
    }
  }
  return dense;
}

struct Case {
  size_t images, channels, height, width, outputs;
  Axis rows, columns;
  size_t group, chunk, block;
  double density;
  size_t entry_width = 1;
};

// The convolution by its definition, and the same of magnitudes, which bounds the rounding error.
struct Exact {
  std::vector<double> sum, magnitude;
};

Exact exact(const Case& c, const spmm::RandomWeight& w, const std::vector<float>& x) {
  const std::vector<double> dense = unpack(w);
  const size_t out_height = output_size(c.rows, c.height), out_width = output_size(c.columns, c.width);
  const size_t per_group = c.channels / c.group, taps = c.rows.kernel * c.columns.kernel;
  Exact y;
  for (size_t image = 0; image < c.images; ++image) {
    for (size_t n = 0; n < c.outputs; ++n) {
      for (size_t i = 0; i < out_height; ++i) {
        for (size_t j = 0; j < out_width; ++j) {
          double sum = static_cast<double>(w.bias[n]), magnitude = std::abs(sum);
          for (size_t k = 0; k < w.K; ++k) {
            const size_t tap = k % taps;
            const size_t channel = n / (c.outputs / c.group) * per_group + k / taps;
            const auto row =
                static_cast<std::ptrdiff_t>(i * c.rows.stride + tap / c.columns.kernel * c.rows.dilation) -
                static_cast<std::ptrdiff_t>(c.rows.begin);
            const auto column = static_cast<std::ptrdiff_t>(j * c.columns.stride +
                                                            tap % c.columns.kernel * c.columns.dilation) -
                                static_cast<std::ptrdiff_t>(c.columns.begin);
            if (row < 0 || row >= static_cast<std::ptrdiff_t>(c.height)) continue;
            if (column < 0 || column >= static_cast<std::ptrdiff_t>(c.width)) continue;
            const size_t at =
                ((image * c.channels + channel) * c.height + static_cast<size_t>(row)) * c.width +
                static_cast<size_t>(column);
            const double term = dense[k * w.N + n] * static_cast<double>(x[at]);
            sum += term;
            magnitude += std::abs(term);
          }
          y.sum.push_back(sum);
          y.magnitude.push_back(magnitude);
        }
      }
    }
  }
  return y;
}

void compare(const Case& c, const Convolution& conv, const Plan& plan, const std::vector<float>& x,
             const std::vector<float>& residual, const Exact& want) {
  const size_t size = want.sum.size();
  const Guarded<float> guarded_x(x), guarded_residual(residual);
  const Guarded<float> y(std::vector<float>(size, std::nanf("")));
  const Guarded<char> scratch(plan.scratch_bytes);
  std::memset(scratch.data(), 0xff, plan.scratch_bytes);  // NaN: what is not written must not be read
  Backwards workers;
  const float* r = residual.empty() ? nullptr : guarded_residual.typed();
  expect(run(plan, conv, guarded_x.typed(), r, y.typed(), scratch.data(), workers), "workers failed");
  const double epsilon = static_cast<double>(std::numeric_limits<float>::epsilon());
  size_t wrong = 0;
  for (size_t i = 0; i < size; ++i) {
    const double added = r == nullptr ? 0.0 : static_cast<double>(r[i]);
    const double expected = activated(conv.epilogue, want.sum[i] + added);
    const double magnitude = want.magnitude[i] + std::abs(added);
    const double bound = 1.5 * static_cast<double>(conv.weight.K + 2) * epsilon * magnitude +
                         4 * epsilon * std::abs(expected) + 1e-35;  // no activation is steeper than 1.5
    wrong += !(std::abs(static_cast<double>(y.typed()[i]) - expected) <= bound);
  }
  char where[300];
  std::snprintf(
      where, sizeof where,
      "%s: %zux%zux%zux%zu, %zu outputs, window %zux%zu, stride %zu,%zu, pads %zu,%zu,%zu,%zu, dilation "
      "%zu,%zu, group %zu, activation %d, residual %d: %zu of %zu wrong",
      plan.full->name, c.images, c.channels, c.height, c.width, c.outputs, c.rows.kernel, c.columns.kernel,
      c.rows.stride, c.columns.stride, c.rows.begin, c.columns.begin, c.rows.end, c.columns.end,
      c.rows.dilation, c.columns.dilation, c.group, static_cast<int>(conv.epilogue.activation), r != nullptr,
      wrong, size);
  expect(wrong == 0, where);
}

void test_all_kernels() {
  const Axis one = {1, 1, 0, 0, 1}, three = {3, 1, 1, 1, 1}, half = {3, 2, 1, 1, 1}, seven = {7, 2, 3, 3, 1};
  const Axis bare = {3, 1, 0, 0, 1}, wide = {3, 1, 2, 2, 2}, skip = {1, 2, 0, 0, 1}, odd = {4, 3, 1, 2, 3};
  const Axis late = {2, 1, 0, 3, 1}, far = {3, 5, 7, 7, 1}, edge = {1, 1, 1, 0, 1};
  const Case cases[] = {
      {1, 5, 7, 7, 6, one, one, 1, 4, 4, 0.5},
      {3, 5, 7, 7, 6, one, one, 1, 5, 6, 0.5},
      {1, 1, 1, 1, 1, one, one, 1, 1, 1, 1.0},
      {2, 9, 1, 1, 33, one, one, 1, 9, 16, 0.4},
      {1, 4, 8, 16, 3, one, one, 1, 4, 3, 0.6},
      {1, 4, 8, 8, 3, three, three, 1, 36, 3, 0.3},
      {1, 3, 13, 5, 9, three, three, 1, 7, 4, 0.3},
      {2, 3, 9, 11, 8, half, half, 1, 27, 8, 0.5},
      {1, 3, 17, 18, 8, seven, seven, 1, 128, 8, 0.3},
      {2, 4, 6, 7, 5, bare, bare, 1, 16, 5, 0.5},
      {1, 4, 9, 9, 5, wide, wide, 1, 16, 5, 0.5},
      {3, 6, 9, 10, 8, skip, skip, 1, 6, 8, 0.5},
      {2, 2, 16, 14, 4, odd, odd, 1, 32, 4, 0.4},
      {1, 2, 5, 6, 4, late, one, 1, 4, 4, 0.7},
      {1, 2, 3, 3, 4, far, far, 1, 18, 4, 0.7},
      {1, 3, 4, 5, 4, edge, edge, 1, 3, 4, 0.7},
      {2, 3, 9, 4, 6, one, three, 1, 9, 3, 0.5},
      {2, 3, 4, 9, 6, half, skip, 1, 9, 3, 0.5},
      {2, 6, 6, 6, 8, three, three, 2, 27, 4, 0.4},
      {2, 6, 5, 5, 18, half, half, 3, 18, 3, 0.4},
      {2, 6, 7, 9, 6, three, three, 6, 9, 1, 0.9},
      {1, 5, 14, 14, 5, half, half, 5, 9, 1, 1.0},
      {2, 3, 9, 8, 3, wide, odd, 3, 12, 1, 0.8},
      {1, 2, 60, 70, 2, seven, three, 2, 21, 1, 0.5},
      {1, 2, 4, 3000, 2, three, three, 2, 9, 1, 0.9},
      {1, 2, 3, 4, 2, far, late, 2, 6, 1, 0.9},
      {1, 2, 70, 70, 2, {17, 1, 8, 8, 1}, {17, 1, 8, 8, 1}, 2, 255, 1, 0.2},
      {1, 4, 9, 9, 4, {1, 6, 0, 0, 1}, {1, 3, 0, 0, 1}, 4, 1, 1, 1.0},
      {3, 4, 1, 1, 4, one, one, 4, 1, 1, 1.0},
      {2, 8, 5, 7, 4, one, one, 4, 2, 1, 0.9},
      {5, 2, 7, 7, 3, three, three, 1, 18, 2, 0.5},
      {1, 3, 1, 127, 2, one, three, 1, 9, 2, 0.5},
      {1, 3, 1, 128, 2, one, three, 1, 9, 2, 0.5},
      {1, 3, 1, 129, 2, one, three, 1, 9, 2, 0.5},
      {1, 40, 5, 5, 70, three, three, 1, 128, 64, 0.1},
      {2, 5, 9, 8, 13, three, half, 1, 45, 8, 0.4, 4},
      {1, 6, 7, 11, 32, three, three, 2, 27, 16, 0.4, 8},
  };
  size_t round = 0;
  for (const Case& c : cases) {
    const size_t K = c.channels / c.group * c.rows.kernel * c.columns.kernel;
    const spmm::RandomWeight random =
        spmm::random_weight(K, c.outputs, c.density, c.chunk, c.block, c.entry_width);
    spmm::CheckedWeight checked;
    const std::string problem = check(random.stored(), spmm::Activation::none, checked);
    expect(problem.empty(), "valid weight refused: " + problem);
    const std::vector<float> x = random_floats(c.images * c.channels * c.height * c.width, 1);
    const Exact want = exact(c, random, x);
    for (int with_residual : {0, 1}) {
      const std::vector<float> residual = random_floats(with_residual ? want.sum.size() : 0, 2);
      const MapEpilogue& epilogue = kEpilogues[round++ % std::size(kEpilogues)];
      const Convolution conv = {checked.weight, c.rows, c.columns, c.group, epilogue};
      for (const spmm::Kernel* kernel : spmm::kernels()) {
        if (!runs_here(*kernel) || !fits(*kernel, checked.weight)) continue;
        compare(c, conv, make_plan(conv, c.images, c.height, c.width, *kernel, maps_beside(*kernel)), x,
                residual, want);
      }
      for (const Features features : offered_sets()) {
        compare(c, conv, make_plan(conv, c.images, c.height, c.width, features), x, residual, want);
      }
    }
  }
}

// Every activation, for each number of positions of a tile, on the numbers `h`.
void test_epilogues(const Kernel& kernel, size_t tile, const std::vector<float>& h) {
  for (const MapEpilogue& epilogue : kEpilogues) {
    for (size_t positions = 1; positions <= tile; ++positions) {
      const size_t stride = positions + 3;
      for (size_t first = 0; first < h.size(); first += positions) {
        std::vector<float> acc(2 * tile, 77.0f), y(stride + positions, 55.0f);
        for (size_t p = 0; p < positions; ++p) acc[tile + p] = acc[p] = h[(first + p) % h.size()];
        const Guarded<float> guarded_acc(acc), guarded_y(y);
        kernel.store_channels(epilogue, guarded_acc.typed(), tile, 2, positions, stride, nullptr,
                              guarded_y.typed());
        for (size_t i = 0; i < stride + positions; ++i) {
          const bool between = i >= positions && i < stride;
          const double x = static_cast<double>(acc[i % stride % positions]);
          double want = between ? 55.0 : activated(epilogue, x);
          if (std::isnan(x) && !between) want = NAN;
          const bool unbounded =
              epilogue.activation != Activation::none && epilogue.activation != Activation::clip;
          if (!between && unbounded && std::isinf(x) && x < 0) want = NAN;  // infinity times zero
          const double got = static_cast<double>(guarded_y.typed()[i]);
          const bool same = std::isnan(want)   ? std::isnan(got)
                            : std::isinf(want) ? got == want
                                               : std::abs(got - want) <= 2e-6 * std::abs(want) + 1e-6;
          char where[160];
          std::snprintf(where, sizeof where, "%s: activation %d of %g is %g, expected %g (%zu positions)",
                        kernel.name, static_cast<int>(epilogue.activation), x, got, want, positions);
          expect(same, where);
        }
      }
      if (positions > 20 && positions + 3 < tile) positions += 6;  // for the time it takes
    }
  }
}

// Every activation in every kernel, in whole vectors and in their rest, on values that are special to it.
void test_epilogues() {
  std::vector<float> h = {0.0f, -0.0f, kInfinity, -kInfinity, std::nanf(""),
                          3.0f, -3.0f, 6.0f,      -0.5f,      2.9999998f};
  for (float v = -9.0f; v < 9.0f; v += 0.171f) h.push_back(v);
  std::set<size_t> tiles;
  for (const spmm::Kernel* kernel : spmm::kernels()) {
    expect(kernel->tile <= kMaxTile, std::string(kernel->name) + " has too wide a tile");
    tiles.insert(kernel->tile);
  }
  for (const Kernel* kernel : kernels()) {
    if (runs_here(*kernel)) {
      for (size_t tile : tiles) test_epilogues(*kernel, tile, h);
    }
  }
}

void test_sizes() {
  expect(output_size({3, 1, 1, 1, 1}, 56) == 56, "same");
  expect(output_size({7, 2, 3, 3, 1}, 224) == 112, "stem");
  expect(output_size({3, 2, 1, 1, 1}, 55) == 28, "odd");
  expect(output_size({3, 1, 0, 0, 2}, 5) == 1, "fits once");
  expect(output_size({3, 1, 0, 0, 2}, 4) == 0, "does not fit");
  expect(output_size({1, 1, 0, 0, 1}, 0) == 0, "empty image");
  expect(output_size({1, 3, 0, 0, 1}, 1) == 1, "stride past the end");
}

// More panels than may be in memory at a time, and workers that fail in either step.
void test_strips() {
  const Case c = {1, 600, 60, 60, 2, {3, 1, 1, 1, 1}, {3, 1, 1, 1, 1}, 1, 255, 2, 0.002};
  const spmm::RandomWeight random =
      spmm::random_weight(c.channels * 9, c.outputs, c.density, c.chunk, c.block);
  spmm::CheckedWeight checked;
  expect(check(random.stored(), spmm::Activation::none, checked).empty(), "valid weight refused");
  const std::vector<float> x = random_floats(c.channels * c.height * c.width, 1);
  const Exact want = exact(c, random, x);
  const Convolution conv = {checked.weight, c.rows, c.columns, 1, kEpilogues[0]};
  for (const Features features : offered_sets()) {
    const Plan plan = make_plan(conv, 1, c.height, c.width, features);
    expect(plan.strip * plan.full->tile < c.height * c.width, "the test is too small for strips");
    expect(plan.scratch_bytes < (size_t{40} << 20), "scratch memory is not bounded");
    compare(c, conv, plan, x, {}, want);
    for (int calls : {0, 1, 3}) {
      Failing failing(calls);
      std::vector<float> y(want.sum.size());
      std::vector<char> scratch(plan.scratch_bytes);
      expect(!run(plan, conv, x.data(), nullptr, y.data(), scratch.data(), failing), "a failure was lost");
    }
  }
}

// The depthwise convolution of maps [images, N, height, width] in double, and the same of magnitudes.
Exact exact_depthwise(const Exact& maps, size_t count, size_t height, size_t width, size_t N,
                      const Axis& rows, const Axis& columns, const std::vector<float>& filters,
                      const std::vector<float>& bias) {
  Exact y;
  for (size_t m = 0; m < count; ++m) {
    for (size_t i = 0; i < output_size(rows, height); ++i) {
      for (size_t j = 0; j < output_size(columns, width); ++j) {
        double sum = static_cast<double>(bias[m % N]), magnitude = std::abs(sum);
        for (size_t tap = 0; tap < rows.kernel * columns.kernel; ++tap) {
          const size_t row = i * rows.stride + tap / columns.kernel * rows.dilation;
          const size_t column = j * columns.stride + tap % columns.kernel * columns.dilation;
          if (row < rows.begin || row >= rows.begin + height) continue;
          if (column < columns.begin || column >= columns.begin + width) continue;
          const size_t at = (m * height + row - rows.begin) * width + column - columns.begin;
          const double f = static_cast<double>(filters[m % N * rows.kernel * columns.kernel + tap]);
          sum += f * maps.sum[at];
          magnitude += std::abs(f) * maps.magnitude[at];
        }
        y.sum.push_back(sum);
        y.magnitude.push_back(magnitude);
      }
    }
  }
  return y;
}

// A convolution and the depthwise one behind it as one, with every kernel, in one band and in several.
void test_fused_depthwise() {
  const Axis one = {1, 1, 0, 0, 1}, three = {3, 1, 1, 1, 1}, half = {3, 2, 1, 1, 1}, bare = {3, 1, 0, 0, 1};
  const Axis wide = {3, 1, 2, 2, 2}, odd = {4, 3, 1, 2, 3}, far = {3, 5, 7, 7, 1}, five = {5, 2, 2, 2, 1};
  struct Fused {
    Case first;
    Axis rows, columns;
  };
  const Fused cases[] = {
      {{1, 4, 14, 14, 40, one, one, 1, 4, 16, 0.5}, three, three},
      {{2, 4, 14, 15, 40, one, one, 1, 4, 16, 0.5}, half, half},
      {{1, 5, 7, 7, 33, one, one, 1, 5, 8, 0.5}, three, three},
      {{3, 5, 7, 8, 6, one, one, 1, 2, 6, 0.5}, half, three},
      {{1, 3, 33, 31, 9, half, half, 1, 27, 4, 1.0}, three, three},
      {{1, 3, 20, 40, 5, three, three, 1, 27, 4, 0.4}, five, five},
      {{1, 2, 300, 70, 8, one, one, 1, 2, 8, 0.9}, three, half},
      {{1, 2, 120, 200, 64, one, one, 1, 2, 64, 0.9}, half, half},
      {{1, 1, 1, 1, 1, one, one, 1, 1, 1, 1.0}, three, three},
      {{2, 2, 5, 1, 3, one, one, 1, 2, 2, 0.9}, bare, {1, 1, 0, 0, 1}},
      {{1, 2, 6, 2, 3, one, one, 1, 2, 2, 0.9}, three, three},
      {{1, 2, 9, 3, 3, one, one, 1, 2, 2, 0.9}, three, three},
      {{1, 2, 9, 17, 3, one, one, 1, 2, 2, 0.9}, wide, wide},
      {{1, 2, 12, 19, 3, one, one, 1, 2, 2, 0.9}, odd, odd},
      {{1, 2, 4, 5, 3, one, one, 1, 2, 2, 0.9}, far, far},
      {{1, 2, 3, 4, 130, one, one, 1, 2, 64, 0.9}, three, three},
      {{2, 2, 4, 9000, 2, one, one, 1, 2, 2, 0.9}, half, half},
  };
  size_t round = 0, most_bands = 0, most_parts = 0;
  for (const Fused& c : cases) {
    const Case& first = c.first;
    const size_t K = first.channels * first.rows.kernel * first.columns.kernel;
    const spmm::RandomWeight random =
        spmm::random_weight(K, first.outputs, first.density, first.chunk, first.block);
    spmm::CheckedWeight checked;
    expect(check(random.stored(), spmm::Activation::none, checked).empty(), "valid weight refused");
    const std::vector<float> x = random_floats(first.images * first.channels * first.height * first.width, 1);
    const size_t height = output_size(first.rows, first.height);
    const size_t width = output_size(first.columns, first.width);
    const std::vector<float> filters = random_floats(first.outputs * c.rows.kernel * c.columns.kernel, 3);
    const std::vector<float> bias = random_floats(first.outputs, 4);
    const MapEpilogue& epilogue = kEpilogues[1 + round++ % (std::size(kEpilogues) - 1)];
    Exact maps = exact(first, random, x);
    for (double& value : maps.sum) value = activated(epilogue, value);
    const Exact want = exact_depthwise(maps, first.images * first.outputs, height, width, first.outputs,
                                       c.rows, c.columns, filters, bias);
    const Guarded<float> guarded_x(x), guarded_filters(filters), guarded_bias(bias);
    const FusedDepthwise fused = {{checked.weight, first.rows, first.columns, 1, epilogue},
                                  c.rows,
                                  c.columns,
                                  reinterpret_cast<const unsigned char*>(guarded_filters.typed()),
                                  reinterpret_cast<const unsigned char*>(guarded_bias.typed())};
    const auto run_plan = [&](const FusedPlan& plan) {
      most_bands = std::max(most_bands, plan.bands);
      most_parts = std::max(most_parts, plan.parts);
      const Guarded<float> y(std::vector<float>(want.sum.size(), std::nanf("")));
      const Guarded<char> scratch(plan.scratch_bytes);
      std::memset(scratch.data(), 0xff, plan.scratch_bytes);  // NaN: what is not written must not be read
      Backwards workers;
      expect(run(plan, fused, guarded_x.typed(), y.typed(), scratch.data(), workers), "workers failed");
      const double epsilon = static_cast<double>(std::numeric_limits<float>::epsilon());
      const auto terms = static_cast<double>(K + c.rows.kernel * c.columns.kernel + 4);
      size_t wrong = 0;
      for (size_t i = 0; i < want.sum.size(); ++i) {
        const double expected = activated(epilogue, want.sum[i]);
        const double bound = 4 * terms * epsilon * (want.magnitude[i] + std::abs(expected)) + 1e-30;
        wrong += !(std::abs(static_cast<double>(y.typed()[i]) - expected) <= bound);
      }
      char where[200];
      std::snprintf(where, sizeof where,
                    "%s: fused depthwise case %zu (%zu bands, %zu parts): %zu of %zu wrong", plan.full->name,
                    round, plan.bands, plan.parts, wrong, want.sum.size());
      expect(wrong == 0, where);
    };
    for (const spmm::Kernel* kernel : spmm::kernels()) {
      if (!runs_here(*kernel) || !fits(*kernel, checked.weight)) continue;
      for (size_t threads : {1, 4}) {
        run_plan(make_plan(fused, first.images, first.height, first.width, *kernel, maps_beside(*kernel),
                           threads));
      }
    }
    for (const Features features : offered_sets()) {
      run_plan(make_plan(fused, first.images, first.height, first.width, features, 4));
    }
    const FusedPlan plan = make_plan(fused, first.images, first.height, first.width, kGeneric);
    std::vector<float> y(want.sum.size());
    std::vector<char> scratch(plan.scratch_bytes);
    Failing failing(0);
    expect(!run(plan, fused, x.data(), y.data(), scratch.data(), failing), "a failure was lost");
  }
  expect(most_bands > 1, "no case has several bands");
  expect(most_parts > 1, "no case has several parts");
}

}  // namespace

int main() {
  test_sizes();
  test_epilogues();
  test_strips();
  test_all_kernels();
  test_fused_depthwise();
  return summary();
}
