// Drives the fuzz target without libFuzzer: weights of random shapes, some of them spoiled.
//
//   spmm_fuzz [ITERATIONS [SEED [FOLDER]]]
//
// Same arguments, same inputs. Into FOLDER goes every input before it is tried: after a crash the last one is
// the cause, and all of them are a start for libFuzzer.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <random>
#include <string>

#include "random_weight.h"
#include "spmm_fuzz_input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using namespace sparse_ops::spmm;

class Source {
 public:
  explicit Source(uint64_t seed) : generator_(seed) {}
  size_t below(size_t limit) { return generator_() % limit; }
  size_t between(size_t low, size_t high) { return low + below(high - low + 1); }

 private:
  std::mt19937_64 generator_;
};

// One entry less, consistently: still valid, unless it was the only one of its segment.
void remove_entry(RandomWeight& w, Source& source) {
  const size_t segment = source.below(w.counts.size());
  const auto begin = w.counts.begin();
  const auto entry = std::accumulate(begin, begin + static_cast<std::ptrdiff_t>(segment), std::ptrdiff_t{0});
  const auto width = static_cast<std::ptrdiff_t>(w.width);
  --w.counts[segment];
  w.offsets.erase(w.offsets.begin() + entry);
  w.values.erase(w.values.begin() + entry * width, w.values.begin() + (entry + 1) * width);
}

std::vector<uint8_t> plausible_input(Source& source) {
  constexpr double kDensities[] = {0.0, 0.05, 0.3, 1.0};
  constexpr size_t kWidths[] = {1, 1, 4, 8};
  const size_t K = source.between(1, 300), N = source.between(1, 80);
  const size_t chunk =
      source.below(4) == 0 ? source.between(1, 255) : source.between(1, std::min<size_t>(K, 255));
  const size_t width = kWidths[source.below(4)], most = 256 / width;
  const size_t block = width * source.between(1, source.below(4) == 0 ? most : std::min(most, N / width + 1));
  const double density = kDensities[source.below(4)];
  RandomWeight weight = random_weight(K, N, density, chunk, block, width);
  if (source.below(2) == 0) {
    weight = random_parts(K, {N, source.between(1, 80), source.between(1, 80)}, density, chunk, block, width);
  }
  if (source.below(4) == 0) remove_entry(weight, source);
  return encode(weight.stored(), static_cast<uint8_t>(source.below(5)),
                static_cast<uint8_t>(source.below(70)));
}

void spoil(std::vector<uint8_t>& bytes, Source& source) {
  constexpr uint8_t kBytes[] = {0, 1, 2, 63, 64, 127, 128, 254, 255};
  constexpr int64_t kAttributes[] = {
      0, 1, -1, 4, 8, 255, 256, 257, INT64_MAX, INT64_MIN, int64_t{1} << 32, int64_t{1} << 62};
  constexpr size_t kLengths = 8 * sizeof(int64_t);
  const size_t at = source.below(3) == 0 ? source.below(FuzzHeader::kSize) : source.below(bytes.size());
  switch (source.below(8)) {
    case 0:
      bytes[at] = static_cast<uint8_t>(bytes[at] ^ (1u << source.below(8)));
      return;
    case 1:
      bytes[at] = kBytes[source.below(std::size(kBytes))];
      return;
    case 2:
      bytes[at] = static_cast<uint8_t>(bytes[at] + (source.below(2) == 0 ? 1 : -1));
      return;
    case 3:
      std::swap(bytes[at], bytes[source.below(bytes.size())]);
      return;
    case 4:  // a neighbour: two rows, offsets or counts change places
      if (at + 1 < bytes.size()) std::swap(bytes[at], bytes[at + 1]);
      return;
    case 5: {  // one attribute
      const int64_t value = kAttributes[source.below(std::size(kAttributes))];
      std::memcpy(&bytes[source.below(8) * sizeof value], &value, sizeof value);
      return;
    }
    case 6: {  // an array one element longer or shorter, the others where they were or not
      uint8_t& low = bytes[kLengths + source.below(5) * sizeof(uint32_t)];
      low = static_cast<uint8_t>(low + (source.below(2) == 0 ? 1 : -1));
      if (source.below(2) == 0)
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(FuzzHeader::kSize), low);
      return;
    }
    default:  // the file ends early
      bytes.resize(source.between(FuzzHeader::kSize, bytes.size()));
      return;
  }
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned long iterations = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 1000;
  const unsigned long seed = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 1;
  Source source(seed);
  unsigned long accepted = 0, refused = 0;
  for (unsigned long i = 0; i < iterations; ++i) {
    std::vector<uint8_t> bytes = plausible_input(source);
    for (size_t left = source.below(3); left > 0; --left) spoil(bytes, source);
    if (count > 3) {
      std::ofstream file(std::string(arguments[3]) + "/" + std::to_string(i), std::ios::binary);
      file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
      if (!file.flush()) {
        std::fprintf(stderr, "cannot write to %s\n", arguments[3]);
        return 2;
      }
    }
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    FuzzInput input;
    CheckedWeight checked;
    const bool good =
        decode(bytes.data(), bytes.size(), input) && check(input.stored, input.activation, checked).empty();
    ++(good ? accepted : refused);
  }
  std::printf("%lu inputs from seed %lu: %lu accepted, %lu refused\n", iterations, seed, accepted, refused);
  return accepted > iterations / 10 && refused > iterations / 10 ? 0 : 1;
}
