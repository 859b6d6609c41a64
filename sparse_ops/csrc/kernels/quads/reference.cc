// Plain loops, one token at a time, sums in 64 bits: what the other kernels are compared with.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/quads/table.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::quads {
namespace {

void round(const Weight& w, const float* x, size_t, size_t, int32_t* panel) {
  const size_t K = w.K, quads = w.quads;
  float low = 0, high = 0, nothing = 0;
  for (size_t k = 0; k < K; ++k) {
    low = std::min(low, x[k]);
    high = std::max(high, x[k]);
    nothing += x[k] * 0.0f;
  }
  const float size = std::max((high - low) / 255.0f, 1e-30f), inverse = 1.0f / size;
  const bool finite = nothing == 0 && std::isfinite(size);
  const float zero = finite ? std::nearbyint(-low * inverse) : 0.0f;
  std::memset(panel, 0, quads * sizeof(int32_t));
  auto* bytes = reinterpret_cast<unsigned char*>(panel);
  for (size_t k = 0; k < K && finite; ++k) {
    const float product = x[k] * inverse;
    bytes[k] = static_cast<unsigned char>(std::clamp(std::nearbyint(product) + zero, 0.0f, 255.0f));
  }
  panel[quads] = static_cast<int32_t>(zero);
  const float stored = size + nothing;
  std::memcpy(panel + quads + 1, &stored, sizeof(stored));
}

void pack(const Weight& w, const Bytes& x, size_t, size_t, int32_t* panel) {
  std::memset(panel, 0, w.quads * sizeof(int32_t));
  auto* bytes = reinterpret_cast<unsigned char*>(panel);
  for (size_t k = 0; k < w.K; ++k) bytes[k] = static_cast<unsigned char>(x.data[k] + (x.is_signed ? 128 : 0));
  panel[w.quads] = x.zero;
  std::memcpy(panel + w.quads + 1, &x.size, sizeof(x.size));
}

float number(const unsigned char* from, size_t index) {
  float value;
  std::memcpy(&value, from + index * sizeof(value), sizeof(value));
  return value;
}

struct Sums {
  int64_t products[256] = {}, weights[256] = {};  // of the outputs of a block
};

Sums sums_of(const Weight& w, size_t block, const int32_t* panel) {
  Sums sums;
  const auto* bytes = reinterpret_cast<const unsigned char*>(panel);
  size_t entry = w.block_entries[block], segment = block * w.chunks * w.block;
  for (size_t c = 0; c < w.chunks; ++c) {
    for (size_t s = 0; s < w.block; ++s, ++segment) {
      for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
        const size_t quad = c * w.chunk + (w.offsets != nullptr ? w.offsets[entry] : i);
        for (size_t k = 4 * quad; k < std::min(4 * quad + 4, w.K); ++k) {
          const int64_t value = w.values[4 * entry + k % 4];
          sums.products[w.rows[segment]] += value * bytes[k];
          sums.weights[w.rows[segment]] += value;
        }
      }
    }
  }
  return sums;
}

void multiply(const Weight& w, size_t block, const int32_t* panel, float* acc) {
  const Sums sums = sums_of(w, block, panel);
  float step;
  std::memcpy(&step, panel + w.quads + 1, sizeof(step));
  for (size_t n = 0; n < w.block && block * w.block + n < w.N; ++n) {
    const size_t channel = block * w.block + n;
    const int64_t exact = sums.products[n] - panel[w.quads] * sums.weights[n];
    const double product = static_cast<double>(exact) * step * number(w.scales, channel);
    acc[n] = static_cast<float>(w.grid.size == 0 ? product + number(w.bias, channel) : product);
  }
}

void settle(const Weight& w, size_t block, size_t channels, float* acc) {
  for (size_t n = 0; n < channels; ++n) {
    const float ratio = acc[n] * (1.0f / w.grid.size);
    const float inside = ratio < w.grid.high ? ratio : w.grid.high;
    acc[n] = std::nearbyint(inside > w.grid.low ? inside : w.grid.low) * w.grid.size +
             number(w.bias, block * w.block + n);
  }
}

void interleave(const unsigned char* const* rows, size_t count, int32_t flip, int32_t* words) {
  auto* bytes = reinterpret_cast<unsigned char*>(words);
  for (size_t i = 0; i < 4 * count; ++i) bytes[i] = static_cast<unsigned char>(rows[i % 4][i / 4] ^ flip);
}

void multiply_bytes(const Weight& w, size_t block, const ByteSteps& steps, const int32_t* panel, float* acc) {
  const Sums sums = sums_of(w, block, panel);
  for (size_t n = 0; n < w.block && block * w.block + n < w.N; ++n) {
    const size_t channel = block * w.block + n;
    int32_t bias;
    std::memcpy(&bias, w.bias + 4 * channel, sizeof(bias));
    const int64_t sum = bias + sums.products[n] - steps.x_zero * sums.weights[n];
    const float floats = static_cast<float>(sum) * steps.factors[channel];
    const float limited = std::min(std::max(floats, steps.low), steps.high);
    const auto y = static_cast<unsigned char>(static_cast<int>(std::nearbyint(limited)) + steps.y_zero);
    std::memcpy(acc + n, &y, sizeof(y));
  }
}

void activate(Activation activation, float* data, size_t size) {
  spmm::reference.activate(activation, data, size);
}

void store_tokens(const float* acc, size_t channels, size_t, size_t, float* y) {
  std::memcpy(y, acc, channels * sizeof(float));
}

void find_extremes(const float* rows, size_t count, float* extremes) {
  std::fill_n(extremes, kExtremes, 0.0f);
  for (size_t i = 0; i < count; ++i) {
    extremes[0] = std::min(extremes[0], rows[i]);
    extremes[1] = std::max(extremes[1], rows[i]);
    extremes[2] += rows[i] * 0.0f;
  }
}

// Rows of one token are a token.
void round_rows(const Weight& w, const float* rows, const float*, size_t, size_t begin, size_t,
                int32_t* panel) {
  if (begin == 0) round(w, rows, 1, 0, panel);
}

}  // namespace

constexpr Kernel reference = {agreed(row::reference, 1, 1),
                              round,
                              pack,
                              multiply,
                              interleave,
                              0,
                              multiply_bytes,
                              settle,
                              activate,
                              store_tokens,
                              find_extremes,
                              round_rows};

}  // namespace sparse_ops::quads
