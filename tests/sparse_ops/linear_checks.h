// What the tests of several linears as one share, for every family of kernels.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "expect.h"
#include "guarded.h"
#include "kernels/spmm/spmm.h"
#include "workers.h"

namespace sparse_ops {

// Outputs apart from each other, side by side again, each computed between inaccessible pages.
template <class Plan, class Weight, class Tokens>
std::vector<float> run_apart(const Plan& plan, const Weight& weight, const Tokens& x,
                             const std::vector<size_t>& split) {
  const Guarded<char> scratch(plan.scratch_bytes);
  std::vector<std::unique_ptr<Guarded<float>>> memory;
  std::vector<spmm::Output> outputs;
  for (size_t channels : split) {
    const std::vector<float> nothing(plan.tokens * channels, std::nanf(""));
    memory.push_back(std::make_unique<Guarded<float>>(nothing));
    outputs.push_back({memory.back()->typed(), channels});
  }
  Backwards workers;
  expect(run(plan, weight, x, outputs, scratch.data(), workers), "workers failed");
  std::vector<float> y;
  for (size_t t = 0; t < plan.tokens; ++t) {
    for (const spmm::Output& output : outputs) {
      y.insert(y.end(), output.y + t * output.channels, output.y + (t + 1) * output.channels);
    }
  }
  return y;
}

// Two in a row, between inaccessible pages.
template <class Plan, class Weight>
std::vector<float> run_both(const Plan& plan, const Weight& first, const Weight& second,
                            const std::vector<float>& x) {
  const Guarded<float> guarded_x(x);
  guarded_x.make_read_only();
  const Guarded<float> y(std::vector<float>(plan.tokens * second.N, std::nanf("")));
  const Guarded<char> scratch(plan.scratch_bytes);
  Backwards workers;
  expect(run(plan, first, second, guarded_x.typed(), y.typed(), scratch.data(), workers), "workers failed");
  return {y.typed(), y.typed() + plan.tokens * second.N};
}

}  // namespace sparse_ops
