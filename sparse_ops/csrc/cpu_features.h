// What this processor and operating system offer, and what of it to use.
#pragma once

#include <cstdint>

namespace sparse_ops {

// A set: one bit each, named as GCC names its options.
enum class Features : uint32_t {
  none = 0,
  avx2 = 1u << 0,
  fma = 1u << 1,
  f16c = 1u << 2,
  avxvnni = 1u << 3,
  avx512f = 1u << 4,
  avx512bw = 1u << 5,
  avx512vl = 1u << 6,
  avx512dq = 1u << 7,
  avx512vnni = 1u << 8,
  avx512vbmi = 1u << 9,
  avx512vbmi2 = 1u << 10,
  avx512bf16 = 1u << 11,
  amx_int8 = 1u << 12,
  amx_bf16 = 1u << 13,
  neon = 1u << 14,
  dotprod = 1u << 15,
  i8mm = 1u << 16,
  sve = 1u << 17,
};

// Always inline: else the linker could keep a copy that was compiled for wide vectors.
[[gnu::always_inline]] constexpr Features operator|(Features a, Features b) {
  return static_cast<Features>(static_cast<uint32_t>(a) | static_cast<uint32_t>(b));
}
[[gnu::always_inline]] constexpr Features operator&(Features a, Features b) {
  return static_cast<Features>(static_cast<uint32_t>(a) & static_cast<uint32_t>(b));
}
[[gnu::always_inline]] constexpr Features without(Features all, Features some) {
  return static_cast<Features>(static_cast<uint32_t>(all) & ~static_cast<uint32_t>(some));
}
[[gnu::always_inline]] constexpr bool contains(Features all, Features some) { return (all & some) == some; }

// What the kernels of one instruction set are compiled for. `kGeneric` is the baseline of the compiler.
inline constexpr Features kGeneric = Features::none;
inline constexpr Features kNeon = Features::neon;
inline constexpr Features kAvx2 = Features::avx2 | Features::fma;
inline constexpr Features kAvx512 =
    kAvx2 | Features::avx512f | Features::avx512bw | Features::avx512vl | Features::avx512dq;
// The operating system gives the registers of these to a process that asks for them.
inline constexpr Features kAmx = Features::amx_int8 | Features::amx_bf16;

struct NamedFeatures {
  const char* name;
  Features features;
};

// The instruction sets that a user can name, best first.
inline constexpr NamedFeatures kInstructionSets[] = {
    {"avx512", kAvx512}, {"avx2", kAvx2}, {"neon", kNeon}, {"generic", kGeneric}};

// Every feature by its name.
inline constexpr NamedFeatures kFeatureNames[] = {{"avx2", Features::avx2},
                                                  {"fma", Features::fma},
                                                  {"f16c", Features::f16c},
                                                  {"avxvnni", Features::avxvnni},
                                                  {"avx512f", Features::avx512f},
                                                  {"avx512bw", Features::avx512bw},
                                                  {"avx512vl", Features::avx512vl},
                                                  {"avx512dq", Features::avx512dq},
                                                  {"avx512vnni", Features::avx512vnni},
                                                  {"avx512vbmi", Features::avx512vbmi},
                                                  {"avx512vbmi2", Features::avx512vbmi2},
                                                  {"avx512bf16", Features::avx512bf16},
                                                  {"amx_int8", Features::amx_int8},
                                                  {"amx_bf16", Features::amx_bf16},
                                                  {"neon", Features::neon},
                                                  {"dotprod", Features::dotprod},
                                                  {"i8mm", Features::i8mm},
                                                  {"sve", Features::sve}};

// The best instruction set of which `features` has all.
const NamedFeatures& instruction_set(Features features);

// What CPUID and XGETBV say.
struct X86Words {
  uint32_t leaf1_c, leaf7_b, leaf7_c, leaf7_d, leaf7_1_a;
  uint64_t xcr0;  // registers that the operating system saves when it switches threads
};
Features x86_features(const X86Words& words);

// Of the two words that Linux gives a program on 64-bit ARM.
Features arm_features(uint64_t hwcap, uint64_t hwcap2);

// What this processor and operating system offer.
Features offered_features();

// Whether the process may use all of `needs`, which are offered. The first question about kAmx asks the
// operating system for its registers; nothing else does, since signal stacks grow with them.
bool permitted(Features needs);

struct FeatureChoice {
  Features features;
  const char* error;  // nullptr, or what is wrong with what was forced
};

// `offered`, or of it only what `forced` names (the value of SPARSE_ONNX_FORCE_ISA; nullptr or empty: not
// forced): an instruction set, as in "avx2", or one and features, as in "avx512+avx512vnni". What is unknown
// or not offered is an error, never a silent fallback.
FeatureChoice choose_features(const char* forced, Features offered);

// choose_features() with the value found in the environment and what is offered here.
FeatureChoice active_features();

// Bytes of the first-level data cache of one core; 32 KiB where the system does not say.
long l1_cache_bytes();

}  // namespace sparse_ops
