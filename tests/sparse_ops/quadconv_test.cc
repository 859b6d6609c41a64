// Sparse convolution of bytes with every kernel against sums in 64 bits, bit for bit, with an unreadable page
// behind every buffer.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "expect.h"
#include "guarded.h"
#include "instruction_sets.h"
#include "kernels/quadconv/quadconv.h"
#include "random_quads.h"
#include "workers.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::quadconv;
using quads::ByteSteps;
using quads::CheckedWeight;
using quads::RandomQuads;

struct Case {
  size_t images, channels, height, width, outputs;  // channels: of X
  Axis rows, columns;
  size_t group, chunk, block;
  double density;
  int limit = 127;

  size_t per_group() const { return channels / group; }
  size_t fours() const { return (per_group() + 3) / 4; }
  size_t taps() const { return rows.kernel * columns.kernel; }
  size_t K() const { return fours() * taps() * 4; }
};

// What the layer has beside a window: bytes of X are those of int8 if `is_signed`.
struct Numbers {
  bool is_signed;
  int x_zero, y_zero, low, high;  // limits of y
  std::vector<int32_t> bias;
  std::vector<float> factors;

  int byte_of(unsigned char byte) const { return is_signed ? static_cast<signed char>(byte) : byte; }
  ByteSteps steps() const {
    return {x_zero + (is_signed ? 128 : 0), factors.data(), y_zero, static_cast<float>(low - y_zero),
            static_cast<float>(high - y_zero)};
  }
};

Numbers numbers_of(const Case& c, unsigned seed, int32_t most_bias) {
  std::mt19937 generator(seed);
  const auto between = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(generator);
  };
  const bool is_signed = seed % 2 == 1;
  const int least = is_signed ? -128 : 0;
  Numbers n{is_signed, least + between(0, 255), least + between(0, 255), least, least + 255, {}, {}};
  if (seed % 3 == 0) n.low = n.y_zero;                             // a ReLU
  if (seed % 5 == 0) n.high = std::min(n.high, n.low + between(0, 90));
  std::uniform_real_distribution<float> factor(0.0005f, 0.01f);
  for (size_t i = 0; i < c.outputs; ++i) {
    n.bias.push_back(between(-most_bias, most_bias));
    n.factors.push_back(factor(generator));
  }
  return n;
}

// Weights of a case: what pads its channels is 0.
RandomQuads random_weight(const Case& c) {
  RandomQuads w = quads::random_quads(c.K(), c.outputs, c.density, c.chunk, c.block, c.limit);
  size_t entry = 0, segment = 0;
  const size_t all = c.K() / 4, padded = c.fours() * 4 - c.per_group();
  for (size_t first = 0; first < w.N; first += w.block) {
    for (size_t begin = 0; begin < all; begin += w.chunk) {
      for (const size_t end = segment + w.block; segment < end; ++segment) {
        for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
          const bool is_last = (begin + w.offsets[entry]) / c.taps() == c.fours() - 1;
          for (size_t j = 4 - padded; is_last && j < 4; ++j) w.values[4 * entry + j] = 0;
        }
      }
    }
  }
  return w;
}

std::vector<int> unpack(const RandomQuads& w) {
  std::vector<int> dense(w.K * w.N);
  size_t entry = 0, segment = 0;
  const size_t quads = (w.K + 3) / 4;
  for (size_t first = 0; first < w.N; first += w.block) {
    for (size_t begin = 0; begin < quads; begin += w.chunk) {
      for (size_t s = 0; s < w.block; ++s, ++segment) {
        for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
          const size_t n = first + w.rows[segment];
          for (size_t j = 0; j < 4 && n < w.N; ++j) {
            dense[((begin + w.offsets[entry]) * 4 + j) * w.N + n] = w.values[4 * entry + j];
          }
        }
      }
    }
  }
  return dense;
}

// The convolution by its definition: padding is the zero point, which is 0.
std::vector<unsigned char> exact(const Case& c, const RandomQuads& w, const Numbers& is,
                                 const std::vector<unsigned char>& x) {
  const std::vector<int> dense = unpack(w);
  const size_t out_height = spconv::output_size(c.rows, c.height);
  const size_t out_width = spconv::output_size(c.columns, c.width);
  std::vector<unsigned char> y;
  for (size_t image = 0; image < c.images; ++image) {
    for (size_t n = 0; n < c.outputs; ++n) {
      for (size_t i = 0; i < out_height; ++i) {
        for (size_t j = 0; j < out_width; ++j) {
          int64_t sum = is.bias[n];
          for (size_t k = 0; k < w.K; ++k) {
            const size_t tap = k / 4 % c.taps(), inside = k / 4 / c.taps() * 4 + k % 4;
            if (inside >= c.per_group()) continue;
            const size_t channel = n / (c.outputs / c.group) * c.per_group() + inside;
            const size_t row = i * c.rows.stride + tap / c.columns.kernel * c.rows.dilation;
            const size_t column = j * c.columns.stride + tap % c.columns.kernel * c.columns.dilation;
            if (row < c.rows.begin || row - c.rows.begin >= c.height) continue;
            if (column < c.columns.begin || column - c.columns.begin >= c.width) continue;
            const size_t at =
                ((image * c.channels + channel) * c.height + row - c.rows.begin) * c.width + column - c.columns.begin;
            sum += int64_t{dense[k * w.N + n]} * (is.byte_of(x[at]) - is.x_zero);
          }
          const float h = std::nearbyint(static_cast<float>(sum) * is.factors[n]);
          const float limited =
              std::clamp(h, static_cast<float>(is.low - is.y_zero), static_cast<float>(is.high - is.y_zero));
          y.push_back(static_cast<unsigned char>(static_cast<int>(limited) + is.y_zero));
        }
      }
    }
  }
  return y;
}

void compare(const Case& c, const Convolution& conv, const Plan& plan, const std::vector<unsigned char>& x,
             const std::vector<unsigned char>& want) {
  const Guarded<unsigned char> guarded_x(x), y(std::vector<unsigned char>(want.size(), 0xaa));
  const Guarded<char> scratch(plan.scratch_bytes);
  std::memset(scratch.data(), 0xff, plan.scratch_bytes);
  Backwards workers;
  expect(run(plan, conv, guarded_x.typed(), y.typed(), scratch.data(), workers), "workers failed");
  size_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) wrong += y.typed()[i] != want[i];
  char where[300];
  std::snprintf(where, sizeof where,
                "%s: %zux%zux%zux%zu, %zu outputs, window %zux%zu, stride %zu,%zu, pads %zu,%zu,%zu,%zu, dilation "
                "%zu,%zu, group %zu, signed %d: %zu of %zu wrong",
                plan.full->name, c.images, c.channels, c.height, c.width, c.outputs, c.rows.kernel,
                c.columns.kernel, c.rows.stride, c.columns.stride, c.rows.begin, c.columns.begin, c.rows.end,
                c.columns.end, c.rows.dilation, c.columns.dilation, c.group, conv.is_signed, wrong, want.size());
  expect(wrong == 0, where);
}

// What copies words beside `kernel`: of the same instruction set.
const spconv::Kernel& copies_beside(const quads::Kernel& kernel) {
  return &kernel == quads::kernels().back() ? *spconv::kernels().back() : spconv::select_kernel(kernel.needs);
}

void test_case(const Case& c, const RandomQuads& random, const Numbers& is, const std::vector<unsigned char>& x) {
  RandomQuads::Stored stored = random.stored();
  stored.bias = {is.bias.data(), is.bias.size()};
  CheckedWeight checked;
  const std::string problem = int8_quads::check(stored.raw(), quads::Activation::none, checked);
  expect(problem.empty(), "valid weight refused: " + problem);
  const Convolution conv{checked.weight, c.rows, c.columns, c.group, c.per_group(), is.is_signed, is.steps()};
  const std::vector<unsigned char> want = exact(c, random, is, x);
  for (const quads::Kernel* kernel : quads::kernels()) {
    if (!runs_here(*kernel) || !fits(*kernel, checked.weight)) continue;
    compare(c, conv, make_plan(conv, c.images, c.height, c.width, *kernel, copies_beside(*kernel)), x, want);
  }
  for (const Features features : offered_sets()) {
    compare(c, conv, make_plan(conv, c.images, c.height, c.width, features), x, want);
  }
}

std::vector<unsigned char> random_bytes(size_t count) {
  std::mt19937 generator(7);
  std::vector<unsigned char> all(count);
  for (unsigned char& v : all) v = static_cast<unsigned char>(generator());
  return all;
}

const Axis one = {1, 1, 0, 0, 1}, three = {3, 1, 1, 1, 1}, half = {3, 2, 1, 1, 1}, seven = {7, 2, 3, 3, 1};
const Axis bare = {3, 1, 0, 0, 1}, wide = {3, 1, 2, 2, 2}, skip = {1, 2, 0, 0, 1}, odd = {4, 3, 1, 2, 3};
const Axis late = {2, 1, 0, 3, 1}, far = {3, 5, 7, 7, 1}, edge = {1, 1, 1, 0, 1};

const Case kCases[] = {
    {1, 5, 7, 7, 6, one, one, 1, 2, 4, 0.5},
    {3, 5, 7, 7, 6, one, one, 1, 2, 6, 0.5},
    {1, 1, 1, 1, 1, one, one, 1, 1, 1, 1.0},
    {2, 9, 1, 1, 33, one, one, 1, 3, 16, 0.4},
    {1, 4, 8, 16, 3, one, one, 1, 1, 3, 0.6},
    {1, 70, 9, 7, 20, one, one, 1, 6, 8, 0.6},
    {1, 16, 8, 8, 8, one, one, 1, 2, 8, 1.0},
    {1, 32, 5, 9, 9, one, one, 1, 4, 8, 1.0, 64},
    {1, 4, 8, 8, 3, three, three, 1, 9, 3, 0.3},
    {1, 7, 13, 5, 9, three, three, 1, 7, 4, 0.3},
    {2, 3, 9, 11, 8, half, half, 1, 9, 8, 0.5},
    {1, 3, 17, 18, 8, seven, seven, 1, 25, 8, 0.3},
    {2, 4, 6, 7, 5, bare, bare, 1, 4, 5, 0.5},
    {1, 4, 9, 9, 5, wide, wide, 1, 4, 5, 0.5},
    {3, 6, 9, 10, 8, skip, skip, 1, 2, 8, 0.5},
    {2, 2, 16, 14, 4, odd, odd, 1, 8, 4, 0.4},
    {1, 2, 5, 6, 4, late, one, 1, 2, 4, 0.7},
    {1, 2, 3, 3, 4, far, far, 1, 9, 4, 0.7},
    {1, 3, 4, 5, 4, edge, edge, 1, 1, 4, 0.7},
    {2, 3, 9, 4, 6, one, three, 1, 3, 3, 0.5},
    {2, 3, 4, 9, 6, half, skip, 1, 3, 3, 0.5},
    {2, 6, 6, 6, 8, three, three, 2, 9, 4, 0.4},
    {2, 30, 5, 5, 18, half, half, 3, 27, 3, 0.4},
    {2, 6, 7, 9, 6, three, three, 6, 9, 1, 0.9},
    {2, 16, 5, 7, 8, one, one, 4, 1, 1, 0.9},
    {5, 2, 7, 7, 3, three, three, 1, 9, 2, 0.5},
    {1, 3, 1, 127, 2, one, three, 1, 3, 2, 0.5},
    {1, 3, 1, 128, 2, one, three, 1, 3, 2, 0.5},
    {1, 3, 1, 129, 2, one, one, 1, 1, 2, 0.5},
    {1, 40, 5, 5, 70, three, three, 1, 30, 64, 0.1},
    {1, 8, 60, 70, 5, three, half, 1, 18, 5, 0.5},
    {2, 5, 0, 4, 3, far, far, 1, 9, 3, 0.8},
};

void test_all_kernels() {
  unsigned seed = 0;
  for (const Case& c : kCases) {
    const RandomQuads random = random_weight(c);
    const std::vector<unsigned char> x = random_bytes(c.images * c.channels * c.height * c.width);
    for (int i = 0; i < 3; ++i, ++seed) test_case(c, random, numbers_of(c, seed, 3000), x);
  }
}

// The largest sums that K and kMaxBias allow, and steps that leave every float.
void test_extremes() {
  for (int limit : {64, 127, 128}) {
    for (const int sign : {-1, 1}) {
      const Case c{1, quads::kMaxInputs, 1, 3, 2, one, one, 1, 255, 2, 1.0, limit};
      RandomQuads random = random_weight(c);
      std::fill(random.values.begin(), random.values.end(),
                static_cast<int8_t>(sign < 0 ? -limit : std::min(limit, 127)));
      for (const unsigned seed : {0u, 1u}) {
        for (const int end : {0, 255}) {
          Numbers is = numbers_of(c, seed, 0);
          const int least = is.is_signed ? -128 : 0;
          is.x_zero = least + 255 - end;
          is.bias = {sign * quads::kMaxBias, -sign * quads::kMaxBias};
          is.factors = {3e38f, 1e-7f};
          const std::vector<unsigned char> x(c.channels * 3, static_cast<unsigned char>(least + end));
          test_case(c, random, is, x);
        }
      }
    }
  }
}

// Halves go to the even number.
void test_halves() {
  const Case c{1, 4, 1, 40, 1, one, one, 1, 1, 1, 1.0};
  RandomQuads random = random_weight(c);
  random.values = {1, 0, 0, 0};
  std::vector<unsigned char> x(4 * 40);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<unsigned char>(i % 40);
  Numbers is{false, 20, 100, 0, 255, {0}, {0.5f}};
  test_case(c, random, is, x);
  is = {true, -3, 7, -128, 127, {1}, {1.5f}};
  test_case(c, random, is, x);
}

void test_failures() {
  const Case& c = kCases[8];
  const RandomQuads random = random_weight(c);
  CheckedWeight checked;
  const Numbers is = numbers_of(c, 1, 10);
  RandomQuads::Stored stored = random.stored();
  stored.bias = {is.bias.data(), is.bias.size()};
  expect(int8_quads::check(stored.raw(), quads::Activation::none, checked).empty(), "valid weight refused");
  const Convolution conv{checked.weight, c.rows, c.columns, c.group, c.per_group(), false, is.steps()};
  const Plan plan = make_plan(conv, c.images, c.height, c.width, kGeneric);
  std::vector<unsigned char> x(c.channels * c.height * c.width), y(c.outputs * c.height * c.width);
  std::vector<char> scratch(plan.scratch_bytes);
  for (int calls : {0, 1, 2}) {
    Failing failing(calls);
    expect(!run(plan, conv, x.data(), y.data(), scratch.data(), failing), "a failure of workers was lost");
  }
}

}  // namespace

int main() {
  test_all_kernels();
  test_extremes();
  test_halves();
  test_failures();
  return summary();
}
