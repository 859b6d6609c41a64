// Plain loops in double: what the other kernels are compared with.

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/attention/table.h"

namespace sparse_ops::attention {
namespace {

double element(const void* array, size_t index) {
  float value;
  std::memcpy(&value, static_cast<const char*>(array) + index * sizeof(value), sizeof(value));
  return static_cast<double>(value);
}

double element(const Operand& x, size_t batch, size_t head, size_t row, size_t channel) {
  return element(x.data, batch * x.batch + head * x.head + row * x.row + channel);
}

void run_query(const Arguments& a, size_t b, size_t h, size_t i) {
  const auto score = [&](size_t j) {
    double dot = 0;
    for (size_t c = 0; c < a.size; ++c) dot += element(a.q, b, h, i, c) * element(a.k, b, h, j, c);
    const Mask& m = a.mask;
    const double mask =
        m.data == nullptr ? 0 : element(m.data, b * m.batch + h * m.head + i * m.row + j * m.key);
    return dot * static_cast<double>(a.scale) + mask;
  };
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (size_t j = 0; j < a.keys; ++j) top = std::fmax(top, score(j));
  for (size_t j = 0; j < a.keys; ++j) sum += std::exp(score(j) - top);
  float* y = a.y + ((b * a.queries + i) * a.heads + h) * a.value_size;
  const auto weight = [&](size_t j) {
    const double w = std::exp(score(j) - top) / sum;
    return a.nan_to_zero && std::isnan(w) ? 0 : w;
  };
  for (size_t c = 0; c < a.value_size; ++c) {
    double mean = 0;
    for (size_t j = 0; j < a.keys; ++j) mean += weight(j) * element(a.v, b, h, j, c);
    y[c] = static_cast<float>(mean);
  }
}

void run_tile(const Arguments& arguments, const Tile& tile, const float*, float*) {
  for (size_t i = 0; i < tile.count; ++i) run_query(arguments, tile.batch, tile.head, tile.first + i);
}

}  // namespace

constexpr Kernel reference = {"reference", Isa::reference, 1, 4, run_tile, nullptr};

}  // namespace sparse_ops::attention
