// What the operators with linears of bytes share: their names, and reading and checking a weight when a node
// is created.
#pragma once

#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/int8_quads.h"
#include "ops/op_support.h"

namespace sparse_ops {

// The parts of a weight of which all quads are stored, or only some.
inline std::span<const Part> int8_parts(bool dense) {
  return dense ? std::span<const Part>(int8_quads::kDenseParts) : int8_quads::kParts;
}

// `name`, an array that is large enough, becomes these words in a row.
template <size_t kSize>
constexpr void join_words(std::initializer_list<std::string_view> words, char (&name)[kSize]) {
  size_t length = 0;
  for (std::string_view word : words) {
    for (char letter : word) name[length++] = letter;
  }
  name[length] = 0;
}

// The weight whose parts and bias are the inputs from `place` on. Names of a node's second weight have a
// `prefix`.
inline void read_int8_weight(const NodeReader& node, bool dense, quads::Activation activation, size_t place,
                             const std::string& prefix, int8_quads::CheckedWeight& checked) {
  std::vector<RawArray> arrays;
  const auto input = [&](const char* name, OrtElementType type) {
    const NodeReader::Constant found = node.constant(place++, (prefix + name).c_str(), type);
    return RawArray{found.data, found.count};
  };
  for (const Part& part : int8_parts(dense)) arrays.push_back(input(part.name, part.type));
  const RawArray bias = input("bias", ORT_FLOAT);
  int64_t sizes[std::size(int8_quads::kSizes)];
  for (size_t i = 0; i < std::size(sizes); ++i) {
    sizes[i] = node.integer((prefix + int8_quads::kSizes[i]).c_str());
  }
  const std::string problem = int8_quads::check({sizes, arrays, bias}, activation, checked);
  if (!problem.empty()) node.fail(prefix.empty() ? problem : "weight " + prefix + "*: " + problem);
}

}  // namespace sparse_ops
