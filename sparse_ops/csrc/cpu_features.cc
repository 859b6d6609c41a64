#include "cpu_features.h"

#include <cstdlib>
#include <cstring>

#include <unistd.h>

namespace sparse_ops {
namespace {

constexpr Isa kIsas[] = {Isa::avx512, Isa::avx2, Isa::generic};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
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
  // The compiler's run-time library asks CPUID, and XGETBV for what the operating system saves.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

IsaChoice choose_isa(const char* forced) {
  if (forced != nullptr && *forced != '\0') {
    for (Isa isa : kIsas) {
      if (std::strcmp(forced, isa_name(isa)) != 0) continue;
      if (isa_supported(isa)) return {isa, nullptr};
      return {isa, "SPARSE_ONNX_FORCE_ISA names an instruction set that this processor or operating system lacks"};
    }
    return {Isa::generic, "SPARSE_ONNX_FORCE_ISA is none of avx512, avx2, generic"};
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
