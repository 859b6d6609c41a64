// Plain loops over the weight as it is stored, with sums in double: what the other kernels are compared with.

#include <cmath>
#include <cstring>

#include "kernels/nbits/table.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::nbits {
namespace {

float number(const void* array, size_t index) {
  float value;
  std::memcpy(&value, static_cast<const char*>(array) + index * sizeof value, sizeof value);
  return value;
}

double half(const void* array, size_t index) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(array) + index * sizeof bits, sizeof bits);
  const int exponent = bits >> 10, digits = bits & 1023;
  return exponent == 0 ? std::ldexp(digits, -24) : std::ldexp(1024 + digits, exponent - 25);
}

void round_row(const void* x, size_t K, size_t group, size_t stride, int8_t* q, float* scales,
               int32_t* sums) {
  std::memset(q, 0, stride);
  for (size_t begin = 0; begin < K; begin += group, ++scales, ++sums) {
    const size_t end = begin + group < K ? begin + group : K;
    float most = 0;
    bool strange = false;
    for (size_t k = begin; k < end; ++k) {
      strange = strange || !std::isfinite(number(x, k));
      most = std::fmax(most, std::fabs(number(x, k)));
    }
    const float scale = most / static_cast<float>(kHighest);
    *scales = strange ? std::nanf("") : scale == 0 ? 1.0f : scale;
    *sums = 0;
    if (strange) continue;
    for (size_t k = begin; k < end; ++k) {
      q[k] = static_cast<int8_t>(std::nearbyint(number(x, k) / *scales));
      *sums += q[k];
    }
  }
}

void run(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  const size_t groups = (w.K + w.group - 1) / w.group, quads = (w.K + kQuad - 1) / kQuad;
  for (size_t block = begin; block < end; ++block) {
    double sums[kMaxRows][kBlock] = {};
    const auto add = [&](size_t k, size_t j, int integer) {
      const size_t g = k / w.group;
      const double scale = half(w.scales, (block * groups + g) * kBlock + j);
      for (size_t r = 0; r < x.rows; ++r) {
        sums[r][j] += static_cast<double>(x.scales[r * groups + g]) * scale * integer * x.q[r * x.stride + k];
      }
    };
    const uint8_t* values = w.values + w.block_values[block];
    if (w.layout == Layout::n_of_16) {
      for (size_t k = 0; k < w.K; k += kSpan) {
        for (size_t entry = 0; entry < w.kept * kQuad; ++entry) {
          for (size_t j = 0; j < kBlock; ++j) {
            const uint8_t stored = values[entry / kQuad * kBlock * kQuad + j * kQuad + entry % kQuad];
            const int integer = w.zeros == nullptr
                                    ? static_cast<int8_t>(stored) >> 4
                                    : (stored >> 4) - w.zeros[(block * groups + k / w.group) * kBlock + j];
            add(k + entry / w.kept * 16 + (stored & 15), j, integer);
          }
        }
        values += w.kept * kQuad * kBlock;
      }
    } else {
      for (size_t quad = 0; quad < quads; ++quad) {
        size_t found = 0;
        for (size_t i = 0; i < kBlock * kQuad; ++i) {
          if ((w.masks[(block * quads + quad) * 8 + i / 8] >> i % 8 & 1) == 0) continue;
          const size_t group = block * groups + quad * kQuad / w.group;
          const int zero = w.zeros == nullptr ? 8 : w.zeros[group * kBlock + i / kQuad];
          const int integer = w.layout == Layout::bitmap8 ? values[found] - 128
                                                          : (values[found / 2] >> found % 2 * 4 & 15) - zero;
          if (quad * kQuad + i % kQuad < w.K) add(quad * kQuad + i % kQuad, i / kQuad, integer);
          ++found;
        }
        values += w.layout == Layout::bitmap8 ? found : (found + 1) / 2;
      }
    }
    for (size_t r = 0; r < x.rows; ++r) {
      for (size_t j = 0; j < kBlock && block * kBlock + j < w.N; ++j) {
        y[r * stride + (block - begin) * kBlock + j] = static_cast<float>(sums[r][j]);
      }
    }
  }
}

void finish(Activation activation, const unsigned char* bias, float* y, size_t size) {
  for (size_t i = 0; i < size; ++i) y[i] += number(bias, i);
  spmm::reference.activate(activation, y, size);
}

}  // namespace

constexpr Kernel reference = {agreed(row::reference, 1, kMaxRows), round_row, run, finish};

}  // namespace sparse_ops::nbits
