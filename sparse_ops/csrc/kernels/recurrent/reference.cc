// Plain loops in double: what the other kernels are compared with.

#include <cmath>

#include "kernels/recurrent/table.h"

namespace sparse_ops::recurrent {
namespace {

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

double sum(const Row& row, size_t gate, size_t i) {
  return static_cast<double>(row.x[gate * row.hidden + i]) + row.p[gate * row.hidden + i];
}

void lstm(const Row& row, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const double kept = logistic(sum(row, 2, i)) * row.c[i];
    const double c = kept + logistic(sum(row, 0, i)) * std::tanh(sum(row, 3, i));
    row.c[i] = static_cast<float>(c);
    row.h[i] = static_cast<float>(logistic(sum(row, 1, i)) * std::tanh(c));
  }
}

void gru(const Row& row, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const double z = logistic(sum(row, 0, i)), r = logistic(sum(row, 1, i));
    const double n = std::tanh(row.x[2 * row.hidden + i] + r * row.p[2 * row.hidden + i]);
    row.h[i] = static_cast<float>((1 - z) * n + z * row.h[i]);
  }
}

void gru_reset(const Row& row, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    row.p[i] = static_cast<float>(logistic(sum(row, 0, i)));
    row.reset[i] = static_cast<float>(logistic(sum(row, 1, i)) * row.h[i]);
  }
}

void gru_update(const Row& row, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const double z = row.p[i], n = std::tanh(sum(row, 2, i));
    row.h[i] = static_cast<float>((1 - z) * n + z * row.h[i]);
  }
}

}  // namespace

constexpr Kernel reference = {agreed(row::reference, 1), lstm, gru, gru_reset, gru_update};

}  // namespace sparse_ops::recurrent
