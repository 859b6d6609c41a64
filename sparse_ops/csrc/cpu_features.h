// Which instruction sets this processor and operating system offer, and which of them to use.
#pragma once

namespace sparse_ops {

// From the most to the least capable. `generic` is the baseline that the compiler targets; `reference` marks
// plain loops, which are never chosen but by the name of the kernel.
enum class Isa { avx512, avx2, neon, generic, reference };

// Every set that can be chosen, best first; which of them this processor offers is another question.
inline constexpr Isa kIsas[] = {Isa::avx512, Isa::avx2, Isa::neon, Isa::generic};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

struct IsaChoice {
  Isa isa;
  const char* error;  // nullptr, or what is wrong with the forced name
};

// The best supported set, or the one named by `forced` (the value of SPARSE_ONNX_FORCE_ISA; nullptr or empty:
// not forced). A name that is unknown or not supported here is an error, never a silent fallback.
IsaChoice choose_isa(const char* forced);

// choose_isa with the value found in the environment.
IsaChoice active_isa();

// Bytes of the first-level data cache of one core; 32 KiB where the system does not say.
long l1_cache_bytes();

}  // namespace sparse_ops
