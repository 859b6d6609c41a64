// What every kernel for Y = act(round(X) . W + bias) must satisfy, measured against sums in 64 bits.
#pragma once

#include <cmath>
#include <string>

#include "expect.h"
#include "guarded.h"
#include "instruction_sets.h"
#include "kernels/quads/quads.h"
#include "random_quads.h"
#include "workers.h"

namespace sparse_ops::quads {

// Q . V less z . sum(V) of every token and output, and what a step of the token is: by the formulas of the
// contract, from the stored bytes.
struct Exact {
  std::vector<int64_t> sums;
  std::vector<float> steps;
};

inline void add_products(const RandomQuads& w, const std::vector<int64_t>& rounded, size_t tokens,
                         std::vector<int64_t>& sums) {
  size_t entry = 0, segment = 0;
  const size_t quads = (w.K + 3) / 4;
  for (size_t first = 0; first < w.N; first += w.block) {
    for (size_t begin = 0; begin < quads; begin += w.chunk) {
      for (size_t s = 0; s < w.block; ++s, ++segment) {
        const size_t count = w.dense ? w.chunk : w.counts[segment];
        const size_t n = first + (w.dense ? s : w.rows[segment]);
        for (size_t i = 0; i < count; ++i, ++entry) {
          const size_t quad = begin + (w.dense ? i : w.offsets[entry]);
          for (size_t k = 4 * quad; k < std::min(4 * quad + 4, w.K) && n < w.N; ++k) {
            for (size_t t = 0; t < tokens; ++t) {
              sums[t * w.N + n] += w.values[4 * entry + k % 4] * rounded[t * w.K + k];
            }
          }
        }
      }
    }
  }
}

inline Exact exact(const RandomQuads& w, const std::vector<float>& x, size_t tokens) {
  Exact y{std::vector<int64_t>(tokens * w.N), std::vector<float>(tokens)};
  std::vector<int64_t> rounded(tokens * w.K);  // less the zero point
  for (size_t t = 0; t < tokens; ++t) {
    float low = 0, high = 0;
    for (size_t k = 0; k < w.K; ++k) {
      low = std::min(low, x[t * w.K + k]);
      high = std::max(high, x[t * w.K + k]);
    }
    y.steps[t] = std::max((high - low) / 255.0f, 1e-30f);
    const float inverse = 1.0f / y.steps[t];
    const auto zero = static_cast<int64_t>(std::nearbyint(-low * inverse));
    for (size_t k = 0; k < w.K; ++k) {
      const float ratio = x[t * w.K + k] * inverse;
      rounded[t * w.K + k] =
          std::min<int64_t>(static_cast<int64_t>(std::nearbyint(ratio)) + zero, 255) - zero;
    }
  }
  add_products(w, rounded, tokens, y.sums);
  return y;
}

// The same of bytes.
inline Exact exact(const RandomQuads& w, const std::vector<uint8_t>& x, const Bytes& steps, size_t tokens) {
  Exact y{std::vector<int64_t>(tokens * w.N), std::vector<float>(tokens, steps.size)};
  std::vector<int64_t> rounded;
  for (uint8_t byte : x)
    rounded.push_back((steps.is_signed ? static_cast<int8_t>(byte) + 128 : byte) - steps.zero);
  add_products(w, rounded, tokens, y.sums);
  return y;
}

// `random` as the kernels see it in the worst case: read-only arrays at the edge of memory, floats at odd
// addresses.
struct GuardedQuads {
  Guarded<int8_t> values;
  Guarded<uint8_t> offsets, counts, rows;
  Guarded<float> scales, bias;
  CheckedWeight checked;

  GuardedQuads(const RandomQuads& random, Activation activation, size_t gap = 0, Edge edge = Edge::back)
      : values(random.values, 0, edge),
        offsets(random.offsets, 0, edge),
        counts(random.counts, 0, edge),
        rows(random.rows, 0, edge),
        scales(random.scales, gap, edge),
        bias(random.bias, gap, edge) {
    RandomQuads::Stored stored = random.stored();
    const void* arrays[] = {values.data(), offsets.data(), counts.data(), rows.data()};
    for (size_t i = 0; i + 1 < stored.parts.size(); ++i) stored.parts[i].data = arrays[i];
    stored.parts.back().data = scales.data();
    stored.bias.data = bias.data();
    values.make_read_only();
    for (const auto* bytes : {&offsets, &counts, &rows}) bytes->make_read_only();
    for (const auto* floats : {&scales, &bias}) floats->make_read_only();
    const std::string problem = int8_quads::check(stored.raw(), activation, checked);
    expect(problem.empty(), "valid weight refused: " + problem);
  }
};

inline std::string describe(const Plan& plan, const Weight& weight) {
  char text[200];
  std::snprintf(text, sizeof text, "%s: %zu tokens, %zux%zu, chunk %zu, block %zu%s%s", plan.full->name,
                plan.tokens, weight.K, weight.N, weight.chunk, weight.block, weight.wide ? ", wide" : "",
                weight.offsets == nullptr ? ", dense" : "");
  return text;
}

// Y of tokens at `x`, computed between inaccessible pages.
template <class Tokens>
std::vector<float> guarded_run_of(const Plan& plan, const Weight& weight, const Tokens& x, Edge edge) {
  const Guarded<float> y(std::vector<float>(plan.tokens * weight.N, std::nanf("")), 0, edge);
  const Guarded<char> scratch(plan.scratch_bytes, 0, edge);
  Backwards workers;
  expect(run(plan, weight, x, y.typed(), scratch.data(), workers), "workers failed");
  return {y.typed(), y.typed() + plan.tokens * weight.N};
}

inline std::vector<float> guarded_run(const Plan& plan, const Weight& weight, const std::vector<float>& x,
                                      Edge edge = Edge::back) {
  const Guarded<float> guarded_x(x, 0, edge);
  guarded_x.make_read_only();
  return guarded_run_of(plan, weight, static_cast<const float*>(guarded_x.typed()), edge);
}

// The same of bytes, which `steps` says more of.
inline std::vector<float> guarded_run(const Plan& plan, const Weight& weight, const std::vector<uint8_t>& x,
                                      Bytes steps, Edge edge = Edge::back) {
  const Guarded<uint8_t> guarded_x(x, 0, edge);
  guarded_x.make_read_only();
  steps.data = guarded_x.typed();
  return guarded_run_of(plan, weight, steps, edge);
}

inline std::vector<uint8_t> random_bytes(size_t count, unsigned seed = 9) {
  std::mt19937 generator(seed);
  std::vector<uint8_t> all(count);
  for (uint8_t& byte : all) byte = static_cast<uint8_t>(generator());
  return all;
}

// The integers must be exact: of sums below 2^23 no other whole number is as near to what the floats say.
inline void compare(const Plan& plan, const Weight& weight, const RandomQuads& random,
                    const std::vector<float>& y, const Exact& want) {
  size_t wrong = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const size_t n = i % weight.N;
    const double unit = static_cast<double>(want.steps[i / weight.N]) * random.scales[n];
    const double sum = static_cast<double>(want.sums[i]), expected = sum * unit + random.bias[n];
    const double bound = 4 * 6e-8 * (std::abs(sum * unit) + std::abs(random.bias[n]));
    wrong += !(std::abs(y[i] - expected) <= std::max(bound, 1e-37));
  }
  expect(wrong == 0, describe(plan, weight) + ": " + std::to_string(wrong) + " wrong");
}

inline std::vector<float> random_tokens(size_t count, unsigned seed = 7) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> value(0.3f, 1.0f);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

}  // namespace sparse_ops::quads
