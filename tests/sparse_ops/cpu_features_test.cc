// What words of the processor and the operating system mean, and what can be forced.

#include "cpu_features.h"

#include <cstring>
#include <set>
#include <string>

#include "expect.h"

namespace {

using namespace sparse_ops;

constexpr X86Words kEverything = {~0u, ~0u, ~0u, ~0u, ~0u, ~uint64_t{0}};
constexpr Features kX86 = kAvx512 | Features::f16c | Features::avxvnni | Features::avx512vnni |
                          Features::avx512vbmi | Features::avx512vbmi2 | Features::avx512bf16 | kAmx;
constexpr uint64_t kX87 = 1, kXmm = 2, kYmm = 4, kZmm = 0xe0, kTiles = 0x60000;

void test_names() {
  Features all = Features::none;
  std::set<std::string> names;
  for (const NamedFeatures& feature : kFeatureNames) {
    expect((all & feature.features) == Features::none, std::string(feature.name) + " shares a bit");
    expect(names.insert(feature.name).second, std::string(feature.name) + " twice");
    all = all | feature.features;
  }
  for (const NamedFeatures& set : kInstructionSets) {
    expect(contains(all, set.features), std::string(set.name) + " needs what has no name");
    expect(&instruction_set(set.features) == &set, std::string(set.name) + " is not its own set");
  }
  expect(contains(all, kX86 | kNeon), "a feature without a name");
  expect(&instruction_set(all) == kInstructionSets, "the best of all");
  expect(std::strcmp(instruction_set(Features::none).name, "generic") == 0, "nothing is not generic");
  expect(std::strcmp(instruction_set(Features::avx2).name, "generic") == 0, "AVX2 without FMA is no set");
  expect(std::strcmp(instruction_set(without(kX86, Features::avx512dq)).name, "avx2") == 0,
         "half of AVX-512");
  expect(std::strcmp(instruction_set(kAvx2 | Features::avxvnni).name, "avx2") == 0, "more than AVX2");
}

void test_x86_words() {
  const auto lacks = [](const char* what, const X86Words& words, Features lost) {
    expect(x86_features(words) == without(kX86, lost), std::string("without ") + what);
  };
  constexpr Features kAllAvx512 = without(kX86, kAvx2 | Features::f16c | Features::avxvnni | kAmx);
  lacks("anything", kEverything, Features::none);
  const auto spoiled = [](auto member, uint32_t bits) {
    X86Words words = kEverything;
    words.*member &= ~bits;
    return words;
  };
  lacks("FMA", spoiled(&X86Words::leaf1_c, 1u << 12), Features::fma);
  lacks("F16C", spoiled(&X86Words::leaf1_c, 1u << 29), Features::f16c);
  lacks("AVX", spoiled(&X86Words::leaf1_c, 1u << 28), kX86);
  lacks("XSAVE", spoiled(&X86Words::leaf1_c, 1u << 27), kX86);
  lacks("AVX2", spoiled(&X86Words::leaf7_b, 1u << 5), Features::avx2);
  lacks("AVX-512 F", spoiled(&X86Words::leaf7_b, 1u << 16), kAllAvx512);
  lacks("AVX-512 DQ", spoiled(&X86Words::leaf7_b, 1u << 17), Features::avx512dq);
  lacks("AVX-512 BW", spoiled(&X86Words::leaf7_b, 1u << 30), Features::avx512bw);
  lacks("AVX-512 VL", spoiled(&X86Words::leaf7_b, 1u << 31), Features::avx512vl);
  lacks("VBMI", spoiled(&X86Words::leaf7_c, 1u << 1), Features::avx512vbmi);
  lacks("VBMI2", spoiled(&X86Words::leaf7_c, 1u << 6), Features::avx512vbmi2);
  lacks("AVX-512 VNNI", spoiled(&X86Words::leaf7_c, 1u << 11), Features::avx512vnni);
  lacks("AMX BF16", spoiled(&X86Words::leaf7_d, 1u << 22), Features::amx_bf16);
  lacks("AMX INT8", spoiled(&X86Words::leaf7_d, 1u << 25), Features::amx_int8);
  lacks("tiles", spoiled(&X86Words::leaf7_d, 1u << 24), kAmx);
  lacks("AVX-VNNI", spoiled(&X86Words::leaf7_1_a, 1u << 4), Features::avxvnni);
  lacks("AVX-512 BF16", spoiled(&X86Words::leaf7_1_a, 1u << 5), Features::avx512bf16);

  const auto saved = [](uint64_t registers) {  // by the operating system
    X86Words words = kEverything;
    words.xcr0 = registers;
    return words;
  };
  lacks("any register", saved(0), kX86);
  lacks("YMM", saved(kX87 | kXmm | kZmm | kTiles), kX86);
  lacks("XMM", saved(kX87 | kYmm | kZmm | kTiles), kX86);
  lacks("ZMM", saved(kX87 | kXmm | kYmm | kTiles), kAllAvx512);
  lacks("half of ZMM", saved(kX87 | kXmm | kYmm | 0x60 | kTiles), kAllAvx512);
  lacks("tiles in the system", saved(kX87 | kXmm | kYmm | kZmm), kAmx);
  lacks("half of the tiles in the system", saved(kX87 | kXmm | kYmm | kZmm | 0x20000), kAmx);
  expect(x86_features({}) == Features::none, "words of zeros");
}

void test_arm_words() {
  expect(arm_features(0, 0) == kNeon, "the least");
  expect(arm_features(1u << 20, 0) == (kNeon | Features::dotprod), "dot products");
  expect(arm_features(1u << 22, 0) == (kNeon | Features::sve), "scalable vectors");
  expect(arm_features(0, 1u << 13) == (kNeon | Features::i8mm), "matrices of bytes");
  expect(arm_features(~uint64_t{0}, ~uint64_t{0}) ==
             (kNeon | Features::dotprod | Features::sve | Features::i8mm),
         "everything");
}

void test_forced() {
  const Features offered = kAvx512 | Features::avx512vnni | Features::f16c;
  const auto accepted = [&](const char* forced, Features want) {
    const FeatureChoice choice = choose_features(forced, offered);
    expect(choice.error == nullptr && choice.features == want, std::string("forcing '") + forced + "'");
  };
  expect(choose_features(nullptr, offered).error == nullptr, "nothing forced is an error");
  expect(choose_features(nullptr, offered).features == offered, "nothing forced is not everything");
  accepted("", offered);
  accepted("generic", Features::none);
  accepted("avx2", kAvx2);
  accepted("avx512", kAvx512);  // a ceiling: VNNI is there, and not used
  accepted("avx512+avx512vnni", kAvx512 | Features::avx512vnni);
  accepted("avx2+f16c", kAvx2 | Features::f16c);
  accepted("generic+fma+avx2", kAvx2);
  accepted("avx2+avx2", kAvx2);
  const auto refused = [&](const char* forced, const char* word) {
    const FeatureChoice choice = choose_features(forced, offered);
    expect(choice.error != nullptr && std::strstr(choice.error, word) != nullptr,
           std::string("'") + forced + "' was accepted, or for another reason refused");
  };
  for (const char* name :
       {"avx1024", "AVX2", "generic ", " generic", "reference", "f16c", "+f16c", "avx2,f16c"}) {
    refused(name, "is none of avx512, avx2, neon, generic");
  }
  for (const char* name : {"avx2+", "avx2++f16c", "avx2+avx512", "avx2+none", "avx2+F16C", "avx2+f16c "}) {
    refused(name, "unknown feature");
  }
  for (const char* name : {"neon", "avx2+avxvnni", "avx512+amx_int8", "generic+sve"}) refused(name, "lacks");
  expect(choose_features("avx512", kAvx2).error != nullptr, "more than is there");
}

void test_here() {
  const Features offered = offered_features();
  expect(offered == offered_features(), "the processor changes");
  for (const NamedFeatures& set : kInstructionSets) {
    expect((choose_features(set.name, offered).error == nullptr) == contains(offered, set.features),
           std::string("forcing ") + set.name);
  }
#if defined(__x86_64__)
  expect((offered & (kNeon | Features::sve)) == Features::none, "ARM on x86");
  __builtin_cpu_init();
  expect(contains(offered, Features::avx2) == (__builtin_cpu_supports("avx2") != 0), "AVX2");
  expect(contains(offered, Features::fma) == (__builtin_cpu_supports("fma") != 0), "FMA");
  expect(contains(offered, Features::avx512f) == (__builtin_cpu_supports("avx512f") != 0), "AVX-512 F");
  expect(contains(offered, Features::avx512bw) == (__builtin_cpu_supports("avx512bw") != 0), "AVX-512 BW");
  expect(contains(offered, Features::avx512vl) == (__builtin_cpu_supports("avx512vl") != 0), "AVX-512 VL");
  expect(contains(offered, Features::avx512dq) == (__builtin_cpu_supports("avx512dq") != 0), "AVX-512 DQ");
  expect(contains(offered, Features::avx512vnni) == (__builtin_cpu_supports("avx512vnni") != 0), "VNNI");
  expect(contains(offered, Features::avx512vbmi) == (__builtin_cpu_supports("avx512vbmi") != 0), "VBMI");
  expect(contains(offered, Features::avx512vbmi2) == (__builtin_cpu_supports("avx512vbmi2") != 0), "VBMI2");
#elif defined(__aarch64__)
  expect(contains(offered, kNeon) && (offered & kX86) == Features::none, "x86 on ARM");
#endif
  expect(permitted(Features::none) && permitted(kAvx512 | kNeon), "permission for what takes none");
  expect(permitted(kAmx) == permitted(Features::amx_int8), "one permission for all of AMX");
}

}  // namespace

int main() {
  test_names();
  test_x86_words();
  test_arm_words();
  test_forced();
  test_here();
  return summary();
}
