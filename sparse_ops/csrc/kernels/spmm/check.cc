#include "kernels/spmm/check.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

namespace sparse_ops::spmm {
namespace {

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

std::string check(const StoredWeight& s, Activation activation, CheckedWeight& result) {
  if (s.K < 1) return text({"attribute K is ", std::to_string(s.K), ", expected at least 1"});
  if (s.N < 1) return text({"attribute N is ", std::to_string(s.N), ", expected at least 1"});
  if (s.chunk < 1 || s.chunk > 255)
    return text({"attribute chunk is ", std::to_string(s.chunk), ", expected 1..255"});
  if (s.block < 1 || s.block > 256)
    return text({"attribute block is ", std::to_string(s.block), ", expected 1..256"});
  if (s.width != 1 && s.width != 4 && s.width != 8)
    return text({"attribute width is ", std::to_string(s.width), ", expected 1, 4 or 8"});
  if (s.block % s.width != 0)
    return text({"attribute block is ", std::to_string(s.block), ", expected a multiple of width ",
                 std::to_string(s.width)});

  Weight& w = result.weight;
  w = Weight{};
  w.K = static_cast<size_t>(s.K);
  w.N = static_cast<size_t>(s.N);
  w.chunk = static_cast<size_t>(s.chunk);
  w.block = static_cast<size_t>(s.block);
  w.width = static_cast<size_t>(s.width);
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

}  // namespace sparse_ops::spmm
