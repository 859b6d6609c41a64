#include "formats/linears.h"

namespace sparse_ops {

std::string check_whole_blocks(size_t N, size_t block, std::span<const int64_t> linears) {
  bool good = true;
  size_t left = N;
  for (int64_t outputs : linears) {
    good = good && outputs >= 1 && static_cast<uint64_t>(outputs) <= left;
    if (!good) break;
    const auto own = static_cast<size_t>(outputs);
    good = own == left || own % block == 0;
    left -= own;
  }
  if (good && left == 0) return {};
  return std::to_string(linears.size()) + " sizes that add up to N = " + std::to_string(N) +
         ", all but the last multiples of block " + std::to_string(block);
}

}  // namespace sparse_ops
