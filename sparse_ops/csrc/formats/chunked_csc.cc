#include "formats/chunked_csc.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace sparse_ops::chunked_csc {
namespace {

using spmm::Activation;
using spmm::Weight;

std::string text(std::initializer_list<std::string> parts) {
  std::string all;
  for (const std::string& part : parts) all += part;
  return all;
}

std::string number(uint64_t value) { return std::to_string(value); }

std::string wrong_length(const char* name, size_t found, uint64_t expected, const char* why) {
  return text({name, " has ", number(found), " elements, expected ", number(expected), why});
}

// How many of `size` bytes are not less than the one that follows them; `bytes` holds one more than `size`.
uint64_t count_not_rising(const uint8_t* bytes, size_t size) {
  uint64_t total = 0;
  while (size > 0) {
    const size_t part = std::min<size_t>(size, 1 << 16);
    uint32_t found = 0;  // narrow, so that the compiler's vector code is fast
    for (size_t i = 0; i < part; ++i) found += bytes[i] >= bytes[i + 1];
    total += found;
    bytes += part;
    size -= part;
  }
  return total;
}

bool is_permutation(const uint8_t* rows, size_t size) {
  uint64_t seen[4] = {};
  for (size_t i = 0; i < size; ++i) {
    if (rows[i] >= size) return false;
    seen[rows[i] / 64] |= uint64_t{1} << (rows[i] % 64);
  }
  int found = 0;
  for (uint64_t word : seen) found += __builtin_popcountll(word);
  return static_cast<size_t>(found) == size;
}

// What is wrong with the sizes of parts that shall add up to N, or an empty string.
std::string check_parts(std::span<const int64_t> parts, int64_t N) {
  std::string sizes;
  bool good = true;
  int64_t left = N;
  for (int64_t outputs : parts) {
    sizes += (sizes.empty() ? "" : ", ") + std::to_string(outputs);
    good = good && outputs >= 1 && outputs <= left;
    if (good) left -= outputs;
  }
  if (good && left == 0) return {};
  return text({"the linears have ", sizes, " outputs, expected sizes that add up to N = ",
               std::to_string(N)});
}

// The bias of all stored outputs, of which some lie behind each part: zeros there.
std::vector<float> padded_bias(const StoredWeight& s, const Weight& weight) {
  std::vector<float> bias(weight.N);
  const auto* from = static_cast<const unsigned char*>(s.bias);
  size_t first = 0;
  for (int64_t outputs : s.parts) {
    const auto size = static_cast<size_t>(outputs);
    std::memcpy(bias.data() + first, from, size * sizeof(float));
    from += size * sizeof(float);
    first += (size + weight.block - 1) / weight.block * weight.block;
  }
  return bias;
}

}  // namespace

std::string check_sizes(std::span<const int64_t> sizes, Weight& result) {
  if (sizes.size() != std::size(kSizes))
    return text({"a weight in the format ", kFormat, " has ", number(std::size(kSizes)), " sizes, not ",
                 number(sizes.size())});
  const int64_t K = sizes[0], N = sizes[1], chunk = sizes[2], block = sizes[3], width = sizes[4];
  if (K < 1) return text({"attribute K is ", std::to_string(K), ", expected at least 1"});
  if (N < 1) return text({"attribute N is ", std::to_string(N), ", expected at least 1"});
  if (chunk < 1 || chunk > 255)
    return text({"attribute chunk is ", std::to_string(chunk), ", expected 1..255"});
  if (block < 1 || block > 256)
    return text({"attribute block is ", std::to_string(block), ", expected 1..256"});
  if (width != 1 && width != 4 && width != 8)
    return text({"attribute width is ", std::to_string(width), ", expected 1, 4 or 8"});
  if (block % width != 0)
    return text({"attribute block is ", std::to_string(block), ", expected a multiple of width ",
                 std::to_string(width)});
  result = Weight{};
  result.K = static_cast<size_t>(K);
  result.N = static_cast<size_t>(N);
  result.chunk = static_cast<size_t>(chunk);
  result.block = static_cast<size_t>(block);
  result.width = static_cast<size_t>(width);
  return {};
}

std::string check(const RawWeight& raw, Activation activation, CheckedWeight& result) {
  if (raw.sizes.size() != std::size(kSizes) || raw.parts.size() != std::size(kParts)) {
    return text({"a weight in the format ", kFormat, " has ", number(std::size(kSizes)), " sizes and ",
                 number(std::size(kParts)), " parts, not ", number(raw.sizes.size()), " and ",
                 number(raw.parts.size())});
  }
  const auto bytes = [&](size_t part) { return static_cast<const uint8_t*>(raw.parts[part].data); };
  const StoredWeight stored = {raw.sizes[0],   raw.sizes[1],       raw.sizes[2],       raw.sizes[3],
                               raw.sizes[4],   raw.parts[0].data,  raw.parts[0].count, bytes(1),
                               raw.parts[1].count, bytes(2),       raw.parts[2].count, bytes(3),
                               raw.parts[3].count, raw.bias.data,  raw.bias.count,     raw.linears};
  return check(stored, activation, result);
}

std::string check(const StoredWeight& s, Activation activation, CheckedWeight& result) {
  const int64_t sizes[] = {s.K, s.N, s.chunk, s.block, s.width};
  Weight& w = result.weight;
  if (std::string problem = check_sizes(sizes, w); !problem.empty()) return problem;
  w.chunks = w.K / w.chunk + (w.K % w.chunk != 0);
  w.blocks = w.N / w.block + (w.N % w.block != 0);
  if (!s.parts.empty()) {
    if (std::string problem = check_parts(s.parts, s.N); !problem.empty()) return problem;
    w.blocks = 0;
    for (int64_t outputs : s.parts) {
      w.N = w.blocks * w.block + static_cast<size_t>(outputs);
      w.blocks += (static_cast<size_t>(outputs) - 1) / w.block + 1;
    }
  }
  const size_t rows_of_group = w.block / w.width;
  size_t groups, segments;
  if (__builtin_mul_overflow(w.chunks, w.blocks, &groups) ||
      __builtin_mul_overflow(groups, rows_of_group, &segments)) {
    return "attributes K and N are too large";
  }
  if (s.count_count != segments) {
    return wrong_length("counts", s.count_count, segments, " (chunks * blocks * block / width)");
  }
  if (s.row_count != segments)
    return wrong_length("rows", s.row_count, segments, " (chunks * blocks * block / width)");
  const auto outputs = static_cast<size_t>(s.N);
  if (s.bias_count != outputs) return wrong_length("bias", s.bias_count, outputs, " (N)");

  // Counts and rows, group by group; the sum of counts says where each block and segment begins.
  uint64_t entries = 0;
  result.block_entries.resize(w.blocks);
  for (size_t group = 0; group < groups; ++group) {
    if (group % w.chunks == 0) result.block_entries[group / w.chunks] = entries;
    const uint8_t* counts = s.counts + group * rows_of_group;
    const auto where = [&] {
      return text({" of block ", number(group / w.chunks), ", chunk ", number(group % w.chunks)});
    };
    for (size_t i = 0; i < rows_of_group; ++i) {
      if (counts[i] < 1 || counts[i] > w.chunk) {
        return text({"counts", where(), " hold ", number(counts[i]), ", expected 1..", number(w.chunk)});
      }
      entries += counts[i];
    }
    if (!is_permutation(s.rows + group * rows_of_group, rows_of_group)) {
      return text({"rows", where(), " are not a permutation of 0..", number(rows_of_group - 1)});
    }
  }
  if (s.value_count != entries * w.width) {  // entries <= bytes of counts * 255: no overflow
    return wrong_length("values", s.value_count, entries * w.width, " (the sum of counts, times width)");
  }
  if (s.offset_count != entries)
    return wrong_length("offsets", s.offset_count, entries, " (the sum of counts)");

  // Offsets rise strictly inside a segment exactly if every place where they do not is a border of segments.
  // The last offset of a segment is then its largest. Both passes read the same bytes while they are in the
  // cache.
  uint64_t end = 0;
  for (size_t group = 0; group < groups; ++group) {
    const size_t begin_of_group = end, chunk = group % w.chunks;
    const size_t limit = std::min(w.chunk, w.K - chunk * w.chunk);
    uint64_t at_borders = 0;
    for (size_t i = 0; i < rows_of_group; ++i) {
      end += s.counts[group * rows_of_group + i];
      if (s.offsets[end - 1] >= limit) {
        return text({"offsets of block ", number(group / w.chunks), ", chunk ", number(chunk), " reach ",
                     number(s.offsets[end - 1]), ", expected less than ", number(limit)});
      }
      at_borders += end < entries && s.offsets[end - 1] >= s.offsets[end];
    }
    if (count_not_rising(s.offsets + begin_of_group, end - begin_of_group - (end == entries)) != at_borders) {
      return text({"offsets of block ", number(group / w.chunks), ", chunk ", number(chunk),
                   " do not rise strictly inside a segment"});
    }
  }
  w.values = static_cast<const unsigned char*>(s.values);
  w.offsets = s.offsets;
  w.counts = s.counts;
  w.rows = s.rows;
  w.bias = static_cast<const unsigned char*>(s.bias);
  if (w.N != outputs) {
    result.bias = padded_bias(s, w);
    w.bias = reinterpret_cast<const unsigned char*>(result.bias.data());
  }
  w.activation = activation;
  w.block_entries = result.block_entries.data();
  w.entries = entries;
  return {};
}

}  // namespace sparse_ops::chunked_csc
