// What the kernels share, and those without instructions of their own. Included by one source file per
// instruction set.
#pragma once

#include "kernels/nbits/kernel.h"
#include "kernels/spmm/generic.h"
#include "kernels/vector.h"

namespace sparse_ops::nbits {
namespace {

// A float16 that is finite and not negative.
inline float widened(uint16_t half) {
  // Above the smallest exponent the same digits behind another exponent; else digits without the leading one.
  const bool small = half < 0x400;
  const uint32_t bits = (uint32_t{half} << 13) + ((small ? 113u : 112u) << 23);
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return small ? value - 0x1p-14f : value;
}

inline size_t groups_of(const Weight& w) { return (w.K + w.group - 1) / w.group; }

// See Kernel::round.
template <size_t kLanes>
void round_row(const void* x, size_t K, size_t group, size_t stride, int8_t* q, float* scales,
               int32_t* sums) {
  using V = Vector<kLanes>;
  const char* from = static_cast<const char*>(x);
  __builtin_memset(q, 0, stride);
  for (size_t begin = 0, g = 0; begin < K; begin += group, ++g) {
    const size_t size = group < K - begin ? group : K - begin;
    const char* own = from + begin * sizeof(float);
    V most = {}, odd = {};  // odd: NaN once there was a NaN or an Inf
    size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      const V v = load<kLanes>(own + i * sizeof(float));
      most = maximum<kLanes>(magnitude<kLanes>(v), most);
      odd += v * 0.0f;
    }
    float largest = 0, strange = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      largest = most[lane] > largest ? most[lane] : largest;
      strange += odd[lane];
    }
    for (size_t j = i; j < size; ++j) {
      const float v = load<1>(own + j * sizeof(float))[0], a = v < 0 ? -v : v;
      largest = a > largest ? a : largest;
      strange += v * 0.0f;
    }
    sums[g] = 0;
    if (strange != 0) {
      scales[g] = strange;
      continue;
    }
    const float exact = largest / static_cast<float>(kHighest);
    const float scale = exact == 0 ? 1.0f : exact;
    scales[g] = scale;
    // Adding 1.5 * 2^23 rounds to an integer, whose lowest byte is that of the sum.
    const V magic = splat<kLanes>(12582912.0f), divisor = splat<kLanes>(scale);
    int8_t* to = q + begin;
    for (i = 0; i + kLanes <= size; i += kLanes) {
      const V sum = load<kLanes>(own + i * sizeof(float)) / divisor + magic;
      IntVector<kLanes> bits;
      __builtin_memcpy(&bits, &sum, sizeof bits);
      for (size_t lane = 0; lane < kLanes; ++lane) to[i + lane] = static_cast<int8_t>(bits[lane]);
    }
    for (; i < size; ++i) {
      const float sum = load<1>(own + i * sizeof(float))[0] / scale + 12582912.0f;
      uint32_t bits;
      __builtin_memcpy(&bits, &sum, sizeof bits);
      to[i] = static_cast<int8_t>(bits);
    }
    int32_t total = 0;
    for (i = 0; i < size; ++i) total += to[i];
    sums[g] = total;
  }
}

// The sums of a block for `kRows` tokens.
template <size_t kRows>
using Sums = float[kRows][kBlock];

// How many outputs a block has.
inline size_t outputs_of(const Weight& w, size_t block) {
  const size_t left = w.N - block * kBlock;
  return kBlock < left ? kBlock : left;
}

template <size_t kRows>
inline void store_sums(const Sums<kRows>& sums, size_t count, float* y, size_t stride) {
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t j = 0; j < count; ++j) y[r * stride + j] = sums[r][j];
  }
}

// See Kernel::finish.
template <size_t kLanes>
void finish(Activation activation, const unsigned char* bias, float* y, size_t size) {
  const size_t whole = size - size % kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    store<kLanes>(y + i, load<kLanes>(y + i) + load<kLanes>(bias + i * sizeof(float)));
  }
  spmm::activate<kLanes>(activation, y, whole);
  if (whole == size) return;
  float rest[kLanes] = {};
  for (size_t i = whole; i < size; ++i) rest[i - whole] = y[i] + load<1>(bias + i * sizeof(float))[0];
  spmm::activate<kLanes>(activation, rest, kLanes);
  for (size_t i = whole; i < size; ++i) y[i] = rest[i - whole];
}

inline float scale_at(const Weight& w, size_t block, size_t g, size_t j) {
  uint16_t half;
  __builtin_memcpy(&half, static_cast<const char*>(w.scales) + ((block * groups_of(w) + g) * kBlock + j) * 2,
                   sizeof half);
  return widened(half);
}

// Those of the outputs of a block, or nullptr.
inline const uint8_t* zeros_of(const Weight& w, size_t block, size_t g) {
  return w.zeros == nullptr ? nullptr : w.zeros + (block * groups_of(w) + g) * kBlock;
}

// The integers of a quad as [kBlock, kQuad]; returns how many bytes of values these were.
inline size_t expand_quad(const Weight& w, const uint8_t* zeros, const uint8_t* mask, const uint8_t* values,
                          int8_t* integers) {
  size_t found = 0;
  for (size_t i = 0; i < kBlock * kQuad; ++i) {
    integers[i] = 0;
    if ((mask[i / 8] >> i % 8 & 1) == 0) continue;
    if (w.layout == Layout::bitmap8) {
      integers[i] = static_cast<int8_t>(values[found] - 128);
    } else {
      const int zero = zeros == nullptr ? 8 : zeros[i / kQuad];
      integers[i] = static_cast<int8_t>((values[found / 2] >> found % 2 * 4 & 15) - zero);
    }
    ++found;
  }
  return w.layout == Layout::bitmap8 ? found : (found + 1) / 2;
}

// Calls multiply(g, first input, integers [kBlock, kQuad], positions) for all that is stored of a block,
// group by group, and finish(g) behind each. `positions` are the inputs of each integer, relative to the
// first, or nullptr: 0, 1, 2, 3.
template <class Multiply, class Finish>
inline void for_each_quad(const Weight& w, size_t block, Multiply multiply, Finish finish) {
  const uint8_t* values = w.values + w.block_values[block];
  alignas(64) int8_t integers[kBlock * kQuad];
  uint8_t positions[kBlock * kQuad];
  for (size_t g = 0, begin = 0; begin < w.K; ++g, begin += w.group) {
    const size_t end = begin + w.group < w.K ? begin + w.group : w.K;
    const uint8_t* zeros = zeros_of(w, block, g);
    if (w.layout == Layout::n_of_16) {
      for (size_t k = begin; k < end; k += kSpan) {
        for (size_t d = 0; d < w.kept; ++d, values += kBlock * kQuad) {
          for (size_t i = 0; i < kBlock * kQuad; ++i) {
            integers[i] = static_cast<int8_t>(
                zeros == nullptr ? static_cast<int8_t>(values[i]) >> 4 : (values[i] >> 4) - zeros[i / kQuad]);
            const size_t sixteen = (d * kQuad + i % kQuad) / w.kept;
            positions[i] = static_cast<uint8_t>(sixteen * 16 + (values[i] & 15));
          }
          multiply(k, integers, positions);
        }
      }
    } else {
      const size_t quads = (w.K + kQuad - 1) / kQuad;
      for (size_t k = begin; k < end; k += kQuad) {
        const uint8_t* mask = w.masks + (block * quads + k / kQuad) * 8;
        values += expand_quad(w, zeros, mask, values, integers);
        multiply(k, integers, static_cast<const uint8_t*>(nullptr));
      }
    }
    finish(g);
  }
}

template <size_t kRows>
void run_rows(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  const size_t groups = groups_of(w);
  for (size_t block = begin; block < end; ++block) {
    Sums<kRows> sums = {};
    int32_t exact[kRows][kBlock] = {};
    for_each_quad(
        w, block,
        [&](size_t k, const int8_t* integers, const uint8_t* positions) {
          for (size_t r = 0; r < kRows; ++r) {
            const int8_t* q = x.q + r * x.stride + k;
            for (size_t j = 0; j < kBlock; ++j) {
              int32_t sum = 0;
              for (size_t i = 0; i < kQuad; ++i) {
                const size_t at = positions == nullptr ? i : positions[j * kQuad + i];
                sum += q[at] * integers[j * kQuad + i];
              }
              exact[r][j] += sum;
            }
          }
        },
        [&](size_t g) {
          for (size_t r = 0; r < kRows; ++r) {
            for (size_t j = 0; j < kBlock; ++j) {
              sums[r][j] +=
                  static_cast<float>(exact[r][j]) * (x.scales[r * groups + g] * scale_at(w, block, g, j));
              exact[r][j] = 0;
            }
          }
        });
    store_sums<kRows>(sums, outputs_of(w, block), y + (block - begin) * kBlock, stride);
  }
}

// Tokens one number at a time are a template parameter: their sums stay in registers.
template <template <size_t, Layout> class Run, Layout kLayout>
inline void run_tokens(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  switch (x.rows) {
    case 1:
      return Run<1, kLayout>::run(w, x, begin, end, y, stride);
    case 2:
      return Run<2, kLayout>::run(w, x, begin, end, y, stride);
    case 3:
      return Run<3, kLayout>::run(w, x, begin, end, y, stride);
    case 4:
      return Run<4, kLayout>::run(w, x, begin, end, y, stride);
    case 5:
      return Run<5, kLayout>::run(w, x, begin, end, y, stride);
    case 6:
      return Run<6, kLayout>::run(w, x, begin, end, y, stride);
    case 7:
      return Run<7, kLayout>::run(w, x, begin, end, y, stride);
    default:
      return Run<8, kLayout>::run(w, x, begin, end, y, stride);
  }
}

// See Kernel::run; Run<rows, layout>::run is the same for one number of tokens and one layout.
template <template <size_t, Layout> class Run>
void run_any(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  switch (w.layout) {
    case Layout::bitmap4:
      return run_tokens<Run, Layout::bitmap4>(w, x, begin, end, y, stride);
    case Layout::bitmap8:
      return run_tokens<Run, Layout::bitmap8>(w, x, begin, end, y, stride);
    default:
      return run_tokens<Run, Layout::n_of_16>(w, x, begin, end, y, stride);
  }
}

}  // namespace
}  // namespace sparse_ops::nbits
