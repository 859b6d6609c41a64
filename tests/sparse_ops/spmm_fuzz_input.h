// How the fuzzer's bytes stand for the attributes and tensors of one operator.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "formats/chunked_csc.h"

namespace sparse_ops::spmm {

using chunked_csc::check;
using chunked_csc::CheckedWeight;
using chunked_csc::StoredWeight;

// The bytes begin with these fields, in host byte order and without padding. The arrays follow: values,
// offsets, counts, rows, bias. One that is longer than what is left takes what is left.
struct FuzzHeader {
  std::array<int64_t, 8> attributes;  // K, N, chunk, block, width, and three parts of which `parts` count
  std::array<uint32_t, 5> lengths;    // elements
  uint8_t activation;
  uint8_t tokens;
  uint8_t parts;

  static constexpr size_t kSize = 8 * sizeof(int64_t) + 5 * sizeof(uint32_t) + 3;
};

inline constexpr size_t kElementSizes[] = {4, 1, 1, 1, 4};

inline std::vector<uint8_t> encode(const StoredWeight& w, uint8_t activation, uint8_t tokens) {
  const void* arrays[] = {w.values, w.offsets, w.counts, w.rows, w.bias};
  const size_t lengths[] = {w.value_count, w.offset_count, w.count_count, w.row_count, w.bias_count};
  std::vector<uint8_t> bytes;
  const auto append = [&](const void* data, size_t size) {
    const auto* from = static_cast<const uint8_t*>(data);
    bytes.insert(bytes.end(), from, from + size);
  };
  for (int64_t attribute : {w.K, w.N, w.chunk, w.block, w.width}) append(&attribute, sizeof attribute);
  for (size_t i = 0; i < 3; ++i) {
    const int64_t part = i < w.parts.size() ? w.parts[i] : 0;
    append(&part, sizeof part);
  }
  for (size_t length : lengths) {
    const auto narrow = static_cast<uint32_t>(length);
    append(&narrow, sizeof narrow);
  }
  append(&activation, 1);
  append(&tokens, 1);
  const auto parts = static_cast<uint8_t>(w.parts.size());
  append(&parts, 1);
  for (size_t i = 0; i < 5; ++i) append(arrays[i], lengths[i] * kElementSizes[i]);
  return bytes;
}

// Owns the arrays, each in memory of exactly its size, so that the address sanitizer sees an access behind
// it.
struct FuzzInput {
  std::array<std::vector<uint8_t>, 5> arrays;
  std::vector<int64_t> parts;
  StoredWeight stored;
  Activation activation;
  size_t tokens;
};

// False if there is not even a header.
inline bool decode(const uint8_t* data, size_t size, FuzzInput& input) {
  if (size < FuzzHeader::kSize) return false;
  const auto take = [&](void* to, size_t bytes) {
    if (bytes > 0) std::memcpy(to, data, bytes);
    data += bytes;
    size -= bytes;
  };
  FuzzHeader header;
  take(header.attributes.data(), sizeof header.attributes);
  take(header.lengths.data(), sizeof header.lengths);
  take(&header.activation, 1);
  take(&header.tokens, 1);
  take(&header.parts, 1);
  size_t lengths[5];
  for (size_t i = 0; i < 5; ++i) {
    lengths[i] = std::min<size_t>(header.lengths[i], size / kElementSizes[i]);
    input.arrays[i] = std::vector<uint8_t>(lengths[i] * kElementSizes[i]);
    take(input.arrays[i].data(), input.arrays[i].size());
  }
  const auto& [values, offsets, counts, rows, bias] = input.arrays;
  const auto& [K, N, chunk, block, width, part0, part1, part2] = header.attributes;
  input.parts = {part0, part1, part2};
  input.parts.resize(header.parts % 4);
  input.stored = {K,          N,
                  chunk,      block,
                  width,      values.data(),
                  lengths[0], offsets.data(),
                  lengths[1], counts.data(),
                  lengths[2], rows.data(),
                  lengths[3], bias.data(),
                  lengths[4], input.parts};
  input.activation = static_cast<Activation>(header.activation % 5);
  input.tokens = 1 + header.tokens % 70;
  return true;
}

}  // namespace sparse_ops::spmm
