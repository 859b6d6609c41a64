// Gates and recurrence against formulas in double, with an unreadable page behind every buffer.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "guarded.h"
#include "kernels/recurrent/recurrent.h"
#include "random_weight.h"
#include "workers.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::recurrent;

std::vector<float> random_floats(size_t count, unsigned seed, float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> value(0, scale);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

template <class Function>
void for_each_kernel(Function function) {
  for (const Kernel* kernel : kernels()) {
    if (runs_here(*kernel)) function(*kernel);
  }
}

// The gates of the same instruction set.
const Kernel& gates_beside(const spmm::Kernel& products) {
  return &products == spmm::kernels().back() ? *kernels().back() : select_kernel(products.needs);
}

// What a kernel makes of one row.
struct Result {
  std::vector<float> p, h, c, reset;
};

Result run_gates(const Kernel& kernel, Gates Kernel::* act, size_t hidden, size_t begin, size_t end,
                 float scale, Edge edge) {
  const Guarded<float> x(random_floats(4 * hidden, 1, scale), 0, edge),
      p(random_floats(4 * hidden, 2, scale), 0, edge), h(random_floats(hidden, 3), 0, edge),
      c(random_floats(hidden, 4), 0, edge), reset(std::vector<float>(hidden), 0, edge);
  x.make_read_only();
  (kernel.*act)({x.typed(), p.typed(), hidden, h.typed(), c.typed(), reset.typed()}, begin, end);
  const auto copy = [](const Guarded<float>& from, size_t size) {
    return std::vector<float>(from.typed(), from.typed() + size);
  };
  return {copy(p, 4 * hidden), copy(h, hidden), copy(c, hidden), copy(reset, hidden)};
}

bool close(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= 4e-7f * (1 + std::abs(b[i])))) return false;
  }
  return true;
}

void test_gates() {
  const Kernel& reference = *kernels().back();
  constexpr Gates Kernel::* kGates[] = {&Kernel::lstm, &Kernel::gru, &Kernel::gru_reset, &Kernel::gru_update};
  for (size_t hidden : {1, 2, 7, 8, 15, 16, 17, 33, 100}) {
    for (size_t which = 0; which < std::size(kGates); ++which) {
      for (float scale : {0.01f, 1.0f, 100.0f}) {
        for (size_t begin : {size_t{0}, hidden / 3}) {
          const auto want = run_gates(reference, kGates[which], hidden, begin, hidden, scale, Edge::back);
          for_each_kernel([&](const Kernel& kernel) {
            for (Edge edge : {Edge::front, Edge::back}) {
              const auto got = run_gates(kernel, kGates[which], hidden, begin, hidden, scale, edge);
              expect(close(got.p, want.p) && close(got.h, want.h) && close(got.c, want.c) &&
                         close(got.reset, want.reset),
                     std::string(kernel.name) + ": gates " + std::to_string(which) + " of " +
                         std::to_string(hidden));
            }
          });
        }
      }
    }
  }
}

struct Shape {
  size_t steps, batch, directions, hidden, block, width;
};

std::vector<int32_t> some_lengths(const Shape& s) {
  std::vector<int32_t> lengths(s.batch);
  for (size_t b = 0; b < s.batch; ++b) lengths[b] = static_cast<int32_t>((b * 3 + s.steps) % (s.steps + 1));
  return lengths;
}

struct Outputs {
  std::vector<float> y, h, c;
};

// The formulas of the standard, in double.
Outputs expected(const Shape& s, Cell cell, bool reverse, const std::vector<float>& weight,
                 const std::vector<float>& bias, const std::vector<float>& x,
                 const std::vector<int32_t>& lengths, std::vector<float> h_in, std::vector<float> c_in) {
  const size_t H = s.hidden, G = gates(cell), N = s.directions * G * H;
  std::vector<float> y(s.steps * s.directions * s.batch * H);
  const auto logistic = [](double v) { return 1 / (1 + std::exp(-v)); };
  for (size_t d = 0; d < s.directions; ++d) {
    for (size_t b = 0; b < s.batch; ++b) {
      float* state = h_in.data() + (d * s.batch + b) * H;
      float* memory = c_in.data() + (d * s.batch + b) * H;
      std::vector<double> h(state, state + H), c(memory, memory + H);
      const size_t length = lengths.empty() ? s.steps : static_cast<size_t>(lengths[b]);
      for (size_t step = 0; step < length; ++step) {
        const size_t time = reverse || d == 1 ? length - 1 - step : step;
        const float* in = x.data() + ((time * s.batch + b) * s.directions + d) * G * H;
        const auto product = [&](const std::vector<double>& from, size_t gate, size_t i) {
          const size_t column = (d * G + gate) * H + i;
          double sum = bias[column];
          for (size_t k = 0; k < H; ++k) sum += from[k] * weight[k * N + column];
          return sum;
        };
        const auto gate = [&](size_t g, size_t i) { return in[g * H + i] + product(h, g, i); };
        std::vector<double> next(H), reset(H);
        for (size_t i = 0; i < H && cell == Cell::gru_reset_first; ++i)
          reset[i] = logistic(gate(1, i)) * h[i];
        for (size_t i = 0; i < H; ++i) {
          if (cell == Cell::lstm) {
            c[i] = logistic(gate(2, i)) * c[i] + logistic(gate(0, i)) * std::tanh(gate(3, i));
            next[i] = logistic(gate(1, i)) * std::tanh(c[i]);
          } else {
            const double past =
                cell == Cell::gru ? logistic(gate(1, i)) * product(h, 2, i) : product(reset, 2, i);
            const double z = logistic(gate(0, i));
            next[i] = (1 - z) * std::tanh(in[2 * H + i] + past) + z * h[i];
          }
        }
        h = next;
        for (size_t i = 0; i < H; ++i)
          y[((time * s.directions + d) * s.batch + b) * H + i] = static_cast<float>(h[i]);
      }
      for (size_t i = 0; i < H; ++i) {
        state[i] = length > 0 ? static_cast<float>(h[i]) : 0;
        memory[i] = length > 0 ? static_cast<float>(c[i]) : 0;
      }
    }
  }
  return {y, h_in, c_in};
}

std::vector<float> dense(const spmm::RandomWeight& w) {
  std::vector<float> all(w.K * w.N);
  const size_t groups = w.block / w.width, chunks = (w.K + w.chunk - 1) / w.chunk;
  size_t entry = 0;
  for (size_t segment = 0; segment < w.counts.size(); ++segment) {
    const size_t group = segment / groups;
    const size_t first = group / chunks * w.block + w.rows[segment] * w.width;
    for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
      const size_t k = group % chunks * w.chunk + w.offsets[entry];
      for (size_t r = 0; r < w.width && first + r < w.N; ++r)
        all[k * w.N + first + r] = w.values[entry * w.width + r];
    }
  }
  return all;
}

void test_recurrence(const Shape& s, Cell cell, bool reverse, bool has_lengths) {
  const size_t H = s.hidden, N = s.directions * gates(cell) * H;
  const spmm::RandomWeight random = spmm::random_weight(H, N, 0.3, std::min<size_t>(H, 32), s.block, s.width);
  spmm::CheckedWeight checked;
  expect(spmm::check(random.stored(), spmm::Activation::none, checked).empty(), "weight refused");
  const std::vector<float> x = random_floats(s.steps * s.batch * N, 1);
  const std::vector<float> h = random_floats(s.directions * s.batch * H, 2), c = random_floats(h.size(), 3);
  const std::vector<int32_t> lengths = has_lengths ? some_lengths(s) : std::vector<int32_t>();
  const Outputs want = expected(s, cell, reverse, dense(random), random.bias, x, lengths, h, c);

  for (const spmm::Kernel* kernel : spmm::kernels()) {
    if (!runs_here(*kernel) || !spmm::fits(*kernel, checked.weight)) continue;
    std::vector<float> first;
    for (bool split : {false, true}) {
      const Guarded<float> x_guarded(x), h_guarded(h), c_guarded(c),
          y(std::vector<float>(want.y.size(), NAN));
      const Guarded<int32_t> lengths_guarded(lengths);
      x_guarded.make_read_only();
      Problem problem{};
      problem.cell = cell;
      problem.reverse = reverse;
      problem.steps = s.steps;
      problem.batch = s.batch;
      problem.directions = s.directions;
      problem.hidden = H;
      problem.weight = &checked.weight;
      problem.x = x_guarded.typed();
      problem.lengths = has_lengths ? lengths_guarded.typed() : nullptr;
      problem.y = y.typed();
      problem.h = h_guarded.typed();
      problem.c = cell == Cell::lstm ? c_guarded.typed() : nullptr;
      const Plan plan = make_plan(problem, gates_beside(*kernel), *kernel, split);
      const Guarded<char> scratch(plan.scratch_bytes);
      Backwards workers;
      expect(run(plan, problem, scratch.data(), workers), "workers failed");
      const auto distance = [](const float* got, const std::vector<float>& right) {
        float most = 0;
        for (size_t i = 0; i < right.size(); ++i) {
          const float error = std::abs(got[i] - right[i]);
          most = error <= most ? most : error;  // NaN counts
        }
        return most;
      };
      const std::string where = std::string(kernel->name) + ": " + std::to_string(s.steps) + " steps of " +
                                std::to_string(s.batch) + ", hidden " + std::to_string(H) + ", block " +
                                std::to_string(s.block) + ", cell " + std::to_string(static_cast<int>(cell));
      expect(distance(y.typed(), want.y) < 5e-6f && distance(h_guarded.typed(), want.h) < 5e-6f, where);
      if (cell == Cell::lstm) expect(distance(c_guarded.typed(), want.c) < 5e-6f, where + ": c");
      if (!split) first.assign(y.typed(), y.typed() + want.y.size());
      if (split)
        expect(std::equal(first.begin(), first.end(), y.typed()),
               where + ": another result with shared steps");
    }
  }
}

void test_recurrences() {
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::gru_reset_first}) {
    for (bool has_lengths : {false, true}) {
      for (bool reverse : {false, true}) {
        for (size_t batch : {1, 2, 3, 5, 19})
          test_recurrence({4, batch, 1, 32, 16, 1}, cell, reverse, has_lengths);
      }
      test_recurrence({3, 4, 2, 48, 16, 1}, cell, false, has_lengths);
      test_recurrence({3, 4, 2, 37, 8, 1}, cell, false, has_lengths);   // gates begin inside of blocks
      test_recurrence({3, 3, 2, 90, 64, 1}, cell, false, has_lengths);  // as do slices
      test_recurrence({3, 4, 1, 40, 8, 4}, cell, false, has_lengths);
      test_recurrence({2, 9, 1, 24, 8, 8}, cell, true, has_lengths);
      test_recurrence({1, 1, 1, 1, 1, 1}, cell, false, has_lengths);
      test_recurrence({0, 2, 2, 16, 16, 1}, cell, false, has_lengths);
    }
  }
}

void test_failing_workers() {
  const Shape s{3, 2, 1, 16, 16, 1};
  const spmm::RandomWeight random = spmm::random_weight(16, 64, 0.5, 16, 16);
  spmm::CheckedWeight checked;
  spmm::check(random.stored(), spmm::Activation::none, checked);
  std::vector<float> x(s.steps * s.batch * 64), y(s.steps * s.batch * 16), h(s.batch * 16), c(h.size());
  Problem problem{Cell::lstm,      false,    s.steps, s.batch,  1,        16,
                  &checked.weight, x.data(), nullptr, y.data(), h.data(), c.data()};
  for (bool split : {false, true}) {
    for (int calls = 0; calls < (split ? 3 : 1); ++calls) {
      const Plan plan = make_plan(problem, select_kernel(kGeneric),
                                  spmm::select_kernel(kGeneric, checked.weight, 2), split);
      std::vector<char> scratch(plan.scratch_bytes);
      Failing workers(calls);
      expect(!run(plan, problem, scratch.data(), workers), "a failure of the workers got lost");
    }
  }
}

}  // namespace

int main() {
  test_gates();
  test_recurrences();
  test_failing_workers();
  return sparse_ops::summary();
}
