#include "cpu_features.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparse_ops {
namespace {

#if defined(__x86_64__)
constexpr bool all(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

// What the processor offers (CPUID) and the operating system saves when it switches threads (XGETBV).
bool processor_has(Isa isa) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  constexpr uint32_t kFma = 1u << 12, kOsXsave = 1u << 27, kAvx = 1u << 28;
  if (!all(c, kFma | kOsXsave | kAvx)) return false;
  uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kYmmSaved = 0x06, kZmmSaved = 0xe6;
  if (!all(low, kYmmSaved)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kAvx2 = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  if (isa == Isa::avx2) return all(b, kAvx2);
  return all(b, kAvx2 | kF | kDq | kBw | kVl) && all(low, kZmmSaved);
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::neon:
      return "neon";
    case Isa::generic:
      return "generic";
    case Isa::reference:
      return "reference";
  }
  return "";
}

bool isa_supported(Isa isa) {
  if (isa == Isa::generic || isa == Isa::reference) return true;
#if defined(__x86_64__)
  static const bool avx2 = processor_has(Isa::avx2), avx512 = processor_has(Isa::avx512);
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 && avx2;
#elif defined(__aarch64__)
  return isa == Isa::neon;  // part of the architecture
#else
  return false;
#endif
}

IsaChoice choose_isa(const char* forced) {
  if (forced != nullptr && *forced != '\0') {
    for (Isa isa : kIsas) {
      if (std::strcmp(forced, isa_name(isa)) != 0) continue;
      if (isa_supported(isa)) return {isa, nullptr};
      return {isa,
              "SPARSE_ONNX_FORCE_ISA names an instruction set that this processor or operating system lacks"};
    }
    return {Isa::generic, "SPARSE_ONNX_FORCE_ISA is none of avx512, avx2, neon, generic"};
  }
  for (Isa isa : kIsas) {
    if (isa_supported(isa)) return {isa, nullptr};
  }
  return {Isa::generic, nullptr};
}

IsaChoice active_isa() { return choose_isa(std::getenv("SPARSE_ONNX_FORCE_ISA")); }

long l1_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 * 1024;
}

}  // namespace sparse_ops
