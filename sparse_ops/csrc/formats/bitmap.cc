#include "formats/bitmap.h"

#include <algorithm>

namespace sparse_ops::bitmap {

std::string check(const RawWeight& raw, Weight& result) {
  if (raw.sizes.size() != std::size(kSizes) || raw.parts.size() != std::size(kParts)) {
    return std::string("a weight in the format ") + kFormat + " has 2 sizes and 2 parts";
  }
  const int64_t K = raw.sizes[0], N = raw.sizes[1];
  if (K < 1) return "attribute K is " + std::to_string(K) + ", expected at least 1";
  if (N < 1) return "attribute N is " + std::to_string(N) + ", expected at least 1";
  size_t size;
  if (__builtin_mul_overflow(static_cast<size_t>(K), static_cast<size_t>(N), &size)) {
    return "attributes K and N are too large";
  }
  const RawArray &values = raw.parts[0], &mask = raw.parts[1];
  const size_t bytes = size / 8 + (size % 8 != 0);
  if (mask.count != bytes) {
    return "mask has " + std::to_string(mask.count) + " elements, expected " + std::to_string(bytes) + " (K * N bits)";
  }
  const auto* bits = static_cast<const uint8_t*>(mask.data);
  if (size % 8 != 0 && bits[bytes - 1] >> (size % 8) != 0) return "mask has bits behind the last weight";
  size_t kept = 0;
  for (size_t i = 0; i < bytes; ++i) kept += static_cast<size_t>(__builtin_popcount(bits[i]));
  kept = std::max<size_t>(kept, 1);
  if (values.count != kept) {
    return "values has " + std::to_string(values.count) + " elements, expected " + std::to_string(kept) +
           " (the bits of mask)";
  }
  if (raw.bias.count != static_cast<size_t>(N)) {
    return "bias has " + std::to_string(raw.bias.count) + " elements, expected " + std::to_string(N) + " (N)";
  }
  result = {static_cast<size_t>(K), static_cast<size_t>(N), static_cast<const unsigned char*>(values.data), bits,
            static_cast<const unsigned char*>(raw.bias.data)};
  return {};
}

}  // namespace sparse_ops::bitmap
