#include "cpu_features.h"

#include <cstdlib>
#include <iterator>
#include <string_view>

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace sparse_ops {
namespace {

constexpr bool all(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

constexpr Features when(bool condition, Features features) { return condition ? features : Features::none; }

Features detect() {
#if defined(__x86_64__)
  X86Words words{};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Features::none;
  words.leaf1_c = c;
  constexpr uint32_t kOsXsave = 1u << 27;  // without it, XGETBV does not exist
  if (!all(c, kOsXsave)) return Features::none;
  uint32_t low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  words.xcr0 = low | uint64_t{high} << 32;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    words.leaf7_b = b;
    words.leaf7_c = c;
    words.leaf7_d = d;
    const uint32_t subleaves = a;
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) words.leaf7_1_a = a;
  }
  return x86_features(words);
#elif defined(__aarch64__) && defined(__linux__)
  return arm_features(getauxval(AT_HWCAP), getauxval(AT_HWCAP2));
#elif defined(__aarch64__)
  return kNeon;
#else
  return Features::none;
#endif
}

bool request_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const NamedFeatures* find(std::string_view name, const NamedFeatures* begin, const NamedFeatures* end) {
  while (begin != end && name != begin->name) ++begin;
  return begin == end ? nullptr : begin;
}

}  // namespace

const NamedFeatures& instruction_set(Features features) {
  const NamedFeatures* set = kInstructionSets;
  while (!contains(features, set->features)) ++set;  // the last one needs nothing
  return *set;
}

Features x86_features(const X86Words& words) {
  constexpr uint32_t kFma = 1u << 12, kOsXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;  // leaf 1, ECX
  constexpr uint64_t kYmmSaved = 0x06, kZmmSaved = 0xe6, kTilesSaved = 0x60000;
  if (!all(words.leaf1_c, kOsXsave | kAvx) || !all(words.xcr0, kYmmSaved)) return Features::none;
  Features found = when(all(words.leaf1_c, kFma), Features::fma) |
                   when(all(words.leaf1_c, kF16c), Features::f16c) |
                   when(all(words.leaf7_b, 1u << 5), Features::avx2) |
                   when(all(words.leaf7_1_a, 1u << 4), Features::avxvnni);
  if (all(words.leaf7_b, 1u << 16) && all(words.xcr0, kZmmSaved)) {
    found = found | Features::avx512f | when(all(words.leaf7_b, 1u << 17), Features::avx512dq) |
            when(all(words.leaf7_b, 1u << 30), Features::avx512bw) |
            when(all(words.leaf7_b, 1u << 31), Features::avx512vl) |
            when(all(words.leaf7_c, 1u << 1), Features::avx512vbmi) |
            when(all(words.leaf7_c, 1u << 6), Features::avx512vbmi2) |
            when(all(words.leaf7_c, 1u << 11), Features::avx512vnni) |
            when(all(words.leaf7_1_a, 1u << 5), Features::avx512bf16);
  }
  constexpr uint32_t kAmxTile = 1u << 24;
  if (all(words.leaf7_d, kAmxTile) && all(words.xcr0, kTilesSaved)) {
    found = found | when(all(words.leaf7_d, 1u << 25), Features::amx_int8) |
            when(all(words.leaf7_d, 1u << 22), Features::amx_bf16);
  }
  return found;
}

Features arm_features(uint64_t hwcap, uint64_t hwcap2) {
  return kNeon  // part of the architecture
         | when(all(hwcap, 1u << 20), Features::dotprod) | when(all(hwcap, 1u << 22), Features::sve) |
         when(all(hwcap2, 1u << 13), Features::i8mm);
}

Features offered_features() {
  static const Features offered = detect();
  return offered;
}

bool permitted(Features needs) {
  if ((needs & kAmx) == Features::none) return true;
  static const bool granted = request_amx();
  return granted;
}

FeatureChoice choose_features(const char* forced, Features offered) {
  if (forced == nullptr || *forced == '\0') return {offered, nullptr};
  std::string_view rest = forced;
  const auto next = [&] {
    const std::string_view word = rest.substr(0, rest.find('+'));
    rest.remove_prefix(word.size());
    return word;
  };
  const NamedFeatures* set = find(next(), std::begin(kInstructionSets), std::end(kInstructionSets));
  if (set == nullptr) return {kGeneric, "SPARSE_ONNX_FORCE_ISA is none of avx512, avx2, neon, generic"};
  Features features = set->features;
  while (!rest.empty()) {
    rest.remove_prefix(1);
    const NamedFeatures* added = find(next(), std::begin(kFeatureNames), std::end(kFeatureNames));
    if (added == nullptr) {
      return {
          kGeneric,
          "SPARSE_ONNX_FORCE_ISA adds an unknown feature; an instruction set and a feature are written as in "
          "avx512+avx512vnni, and sparse-onnx doctor lists what this processor has"};
    }
    features = features | added->features;
  }
  if (contains(offered, features)) return {features, nullptr};
  return {features,
          "SPARSE_ONNX_FORCE_ISA names an instruction set that this processor or operating system lacks"};
}

FeatureChoice active_features() {
  return choose_features(std::getenv("SPARSE_ONNX_FORCE_ISA"), offered_features());
}

long l1_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 * 1024;
}

}  // namespace sparse_ops
