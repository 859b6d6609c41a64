#include "formats/nbits.h"

#include <algorithm>
#include <cstring>

#include "kernels/sizes.h"

namespace sparse_ops::nbits {
namespace {

constexpr uint64_t kMaxElements = (uint64_t{1} << 31) - (uint64_t{1} << 24);
constexpr size_t kSixteen = 16, kMaskBytes = 8, kPiece = kBlock * kQuad;

std::string wrong_length(const char* name, size_t found, uint64_t expected) {
  return std::string(name) + " has " + std::to_string(found) + " elements, expected " +
         std::to_string(expected);
}

std::string wrong_size(const char* name, int64_t found, const char* expected) {
  return std::string("attribute ") + name + " is " + std::to_string(found) + ", expected " + expected;
}

std::string check_sizes(const StoredWeight& s) {
  if (s.K < 1) return wrong_size("K", s.K, "at least 1");
  if (s.N < 1) return wrong_size("N", s.N, "at least 1");
  constexpr auto kMost = static_cast<int64_t>(kMaxElements);
  if (s.K > kMost || s.N > kMost / s.K) return "the weight has too many elements";
  if (s.layout == Layout::n_of_16) {
    if (s.group != 64 && s.group != 128) return wrong_size("group", s.group, "64 or 128");
    if (s.kept < 1 || s.kept > 15) return wrong_size("kept", s.kept, "1..15");
  } else if (s.group != 16 && s.group != 32 && s.group != 64 && s.group != 128) {
    return wrong_size("group", s.group, "16, 32, 64 or 128");
  }
  return {};
}

// Whether no two integers that an output has of the same sixteen inputs are of the same one.
bool positions_rise(const uint8_t* values, size_t pieces, size_t kept) {
  unsigned wrong = 0;
  for (size_t span = 0; span < pieces; ++span, values += kept * kPiece) {
    for (size_t entry = 1; entry < kept * kQuad; ++entry) {
      if (entry % kept == 0) continue;
      const uint8_t* before = values + (entry - 1) / kQuad * kPiece + (entry - 1) % kQuad;
      const uint8_t* own = values + entry / kQuad * kPiece + entry % kQuad;
      for (size_t j = 0; j < kBlock; ++j) wrong |= (own[j * kQuad] & 15) <= (before[j * kQuad] & 15);
    }
  }
  return wrong == 0;
}

bool finite_and_positive(const RawArray& scales) {
  const auto* from = static_cast<const unsigned char*>(scales.data);
  unsigned wrong = 0;
  for (size_t i = 0; i < scales.count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + i * sizeof half, sizeof half);
    wrong |= half >= 0x7c00;  // Inf, NaN, and all that are negative
  }
  return wrong == 0;
}

}  // namespace

std::string check(const StoredWeight& s, Activation activation, CheckedWeight& result) {
  const std::string problem = check_sizes(s);
  if (!problem.empty()) return problem;
  Weight& w = result.weight;
  w = {};
  w.layout = s.layout;
  w.K = static_cast<size_t>(s.K);
  w.N = static_cast<size_t>(s.N);
  w.group = static_cast<size_t>(s.group);
  const size_t blocks = divide_up(w.N, kBlock), groups = divide_up(w.K, w.group);
  if (s.scales.count != blocks * groups * kBlock) {
    return wrong_length("scales", s.scales.count, blocks * groups * kBlock);
  }
  if (s.bias.count != w.N) return wrong_length("bias", s.bias.count, w.N);
  if (!finite_and_positive(s.scales)) return "a scale is negative, Inf or NaN";
  if (s.has_zeros) {
    w.zeros = static_cast<const uint8_t*>(s.zeros.data);
    if (s.zeros.count != s.scales.count) return wrong_length("zeros", s.zeros.count, s.scales.count);
    if (std::any_of(w.zeros, w.zeros + s.zeros.count, [](uint8_t zero) { return zero > 15; })) {
      return "an element of zeros is more than 15";
    }
  }
  const auto* values = static_cast<const uint8_t*>(s.values.data);
  const auto* masks = static_cast<const uint8_t*>(s.masks.data);
  result.block_values.resize(blocks);
  uint64_t expected = 0;
  if (s.layout == Layout::n_of_16) {
    w.kept = static_cast<size_t>(s.kept);
    const size_t spans = divide_up(w.K, kSpan);
    for (uint64_t& begin : result.block_values) {
      begin = expected;
      expected += spans * w.kept * kPiece;
    }
    if (s.values.count != expected) return wrong_length("values", s.values.count, expected);
    if (!positions_rise(values, blocks * spans, w.kept)) {
      return "positions in values do not rise strictly within " + std::to_string(kSixteen) + " inputs";
    }
  } else {
    const size_t quads = divide_up(w.K, kQuad);
    if (s.masks.count != blocks * quads * kMaskBytes) {
      return wrong_length("masks", s.masks.count, blocks * quads * kMaskBytes);
    }
    for (size_t block = 0; block < blocks; ++block) {
      result.block_values[block] = expected;
      for (size_t quad = 0; quad < quads; ++quad) {
        uint64_t mask;
        std::memcpy(&mask, masks + (block * quads + quad) * kMaskBytes, sizeof mask);
        const auto found = static_cast<uint64_t>(__builtin_popcountll(mask));
        expected += s.layout == Layout::bitmap8 ? found : (found + 1) / 2;
      }
    }
    if (s.values.count != expected) return wrong_length("values", s.values.count, expected);
  }
  w.masks = masks;
  w.values = values;
  w.values_end = values + s.values.count;
  w.block_values = result.block_values.data();
  w.scales = s.scales.data;
  w.bias = static_cast<const unsigned char*>(s.bias.data);
  w.activation = activation;
  return {};
}

}  // namespace sparse_ops::nbits
