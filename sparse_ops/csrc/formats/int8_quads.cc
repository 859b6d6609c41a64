#include "formats/int8_quads.h"

#include <iterator>

#include "formats/chunked_csc.h"

namespace sparse_ops::int8_quads {
namespace {

std::string wrong_length(const char* name, size_t found, size_t expected, const char* why) {
  return std::string(name) + " has " + std::to_string(found) + " elements, expected " +
         std::to_string(expected) + why;
}

// Sums of the integers of every output, and whether some are beyond -64..64.
void read_values(CheckedWeight& checked) {
  quads::Weight& w = checked.weight;
  checked.sums.assign(w.N, 0);
  const int8_t* value = w.values;
  const uint8_t *count = w.counts, *row = w.rows;
  for (size_t block = 0; block < w.blocks; ++block) {
    for (size_t i = 0; i < w.chunks * w.block; ++i, ++count, ++row) {
      int32_t sum = 0;
      int8_t low = 0, high = 0;
      for (const int8_t* end = value + size_t{4} * *count; value < end; ++value) {
        sum += *value;
        low = *value < low ? *value : low;
        high = *value > high ? *value : high;
      }
      w.wide = w.wide || low < -64 || high > 64;
      const size_t channel = block * w.block + *row;
      if (channel < w.N) checked.sums[channel] += sum;
    }
  }
  w.sums = checked.sums.data();
}

std::string check_quads(const RawWeight& raw, quads::Activation activation, CheckedWeight& result) {
  const RawArray& values = raw.parts[0];
  const auto bytes = [&](size_t part) { return static_cast<const uint8_t*>(raw.parts[part].data); };
  if (values.count % 4 != 0 || values.count / 4 != raw.parts[1].count) {
    return wrong_length("values", values.count, raw.parts[1].count * 4, " (four for each of the offsets)");
  }
  // Quads lie as the weights of chunked_csc do, which knows all other rules.
  const chunked_csc::StoredWeight stored = {
      (raw.sizes[0] + 3) / 4, raw.sizes[1],       raw.sizes[2], raw.sizes[3],       1,
      values.data,            values.count / 4,   bytes(1),     raw.parts[1].count, bytes(2),
      raw.parts[2].count,     bytes(3),           raw.parts[3].count, raw.bias.data, raw.bias.count};
  chunked_csc::CheckedWeight checked;
  if (std::string problem = chunked_csc::check(stored, activation, checked); !problem.empty()) return problem;
  const spmm::Weight& w = checked.weight;
  result.block_entries = std::move(checked.block_entries);
  result.weight.chunk = w.chunk;
  result.weight.block = w.block;
  result.weight.chunks = w.chunks;
  result.weight.blocks = w.blocks;
  result.weight.offsets = w.offsets;
  result.weight.counts = w.counts;
  result.weight.rows = w.rows;
  result.weight.entries = w.entries;
  return {};
}

std::string check_dense(const RawWeight& raw, CheckedWeight& result) {
  spmm::Weight sizes;
  const int64_t of_quads[] = {(raw.sizes[0] + 3) / 4, raw.sizes[1], raw.sizes[2], raw.sizes[3], 1};
  if (std::string problem = chunked_csc::check_sizes(of_quads, sizes); !problem.empty()) return problem;
  quads::Weight& w = result.weight;
  w.chunk = sizes.chunk;
  w.block = sizes.block;
  if (w.block % quads::kFullRows != 0) {
    return "attribute block is " + std::to_string(w.block) + ", expected a multiple of " +
           std::to_string(quads::kFullRows);
  }
  w.chunks = (sizes.K - 1) / w.chunk + 1;
  w.blocks = (sizes.N - 1) / w.block + 1;
  const size_t of_block = w.chunks * w.chunk * w.block * 4;  // K and block are small
  size_t all;
  if (__builtin_mul_overflow(of_block, w.blocks, &all)) return "attribute N is too large";
  if (raw.parts[0].count != all) {
    return wrong_length("values", raw.parts[0].count, all, " (all quads of whole chunks and blocks)");
  }
  if (raw.bias.count != sizes.N) return wrong_length("bias", raw.bias.count, sizes.N, " (N)");
  w.entries = all / 4;
  for (size_t block = 0; block < w.blocks; ++block) result.block_entries.push_back(block * of_block / 4);
  result.counts.assign(w.blocks * w.chunks * w.block, static_cast<uint8_t>(w.chunk));
  for (size_t i = 0; i < result.counts.size(); ++i) {
    result.rows.push_back(static_cast<uint8_t>(i % w.block));
  }
  w.counts = result.counts.data();
  w.rows = result.rows.data();
  return {};
}

}  // namespace

std::string check(const RawWeight& raw, quads::Activation activation, CheckedWeight& result) {
  const bool dense = raw.parts.size() == std::size(kDenseParts);
  if (raw.sizes.size() != std::size(kSizes) || (!dense && raw.parts.size() != std::size(kParts))) {
    return "a weight of int8 has " + std::to_string(std::size(kSizes)) + " sizes and " +
           std::to_string(std::size(kDenseParts)) + " or " + std::to_string(std::size(kParts)) +
           " parts, not " + std::to_string(raw.sizes.size()) + " and " + std::to_string(raw.parts.size());
  }
  const int64_t K = raw.sizes[0];
  if (K < 1 || K > static_cast<int64_t>(quads::kMaxInputs)) {
    return "attribute K is " + std::to_string(K) + ", expected 1.." + std::to_string(quads::kMaxInputs);
  }
  result = {};
  if (std::string problem = dense ? check_dense(raw, result) : check_quads(raw, activation, result);
      !problem.empty()) {
    return problem;
  }
  quads::Weight& w = result.weight;
  w.K = static_cast<size_t>(K);
  w.N = static_cast<size_t>(raw.sizes[1]);
  w.quads = w.chunks * w.chunk;
  const RawArray& scales = raw.parts.back();
  if (scales.count != w.N) return wrong_length("scales", scales.count, w.N, " (N)");
  w.values = static_cast<const int8_t*>(raw.parts[0].data);
  w.block_entries = result.block_entries.data();
  w.scales = static_cast<const unsigned char*>(scales.data);
  w.bias = static_cast<const unsigned char*>(raw.bias.data);
  w.activation = activation;
  read_values(result);
  return {};
}

}  // namespace sparse_ops::int8_quads
