// Weights of several linears side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace sparse_ops {

// An empty string if a weight with N outputs in blocks is that of several linears with so many outputs each:
// all but the last have whole blocks. Otherwise what was expected.
std::string check_whole_blocks(size_t N, size_t block, std::span<const int64_t> linears);

}  // namespace sparse_ops
