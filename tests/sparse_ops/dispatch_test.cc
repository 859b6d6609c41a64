// Which row of a table is chosen, for made-up tables and processors, and what every real table must satisfy.

#include "kernels/dispatch.h"

#include <algorithm>
#include <set>
#include <string>

#include "expect.h"
#include "kernels/attention/attention.h"
#include "kernels/normalization/normalization.h"
#include "kernels/peak/peak.h"
#include "kernels/quads/quads.h"
#include "kernels/recurrent/recurrent.h"
#include "kernels/spconv/spconv.h"
#include "kernels/spmm/spmm.h"

namespace {

using namespace sparse_ops;

struct Row : KernelRow {};

constexpr Row kVnni = {{"vnni", kAvx512 | Features::avx512vnni, float32, 16}};
constexpr Row kWide = {{"wide", kAvx512, float32, 16}};
constexpr Row kSecondWide = {{"second_wide", kAvx512, float32, 16}};
constexpr Row kMiddle = {{"middle", kAvx2, float32, 8}};
constexpr Row kLast = {{"last", kGeneric, float32, 4}};
constexpr Row kReference = {{"reference", kGeneric, float32, 1}};

const Row* chosen(std::initializer_list<const Row*> table, Features features) {
  return select(Table<Row>(table.begin(), table.size()), features);
}

void test_select() {
  constexpr Features kAll = kAvx512 | Features::avx512vnni | Features::f16c;
  const auto full = {&kVnni, &kWide, &kSecondWide, &kMiddle, &kLast};
  expect(chosen(full, kAll) == &kVnni, "the first of all");
  expect(chosen(full, kAvx512) == &kWide, "the first without VNNI, and of two alike the first");
  expect(chosen(full, without(kAll, Features::avx512bw)) == &kMiddle, "VNNI does not make up for BW");
  expect(chosen(full, kAvx2) == &kMiddle, "AVX2");
  expect(chosen(full, kGeneric) == &kLast, "nothing");
  expect(chosen(full, kNeon) == &kLast, "another architecture");
  // A family that has nothing for the newest instruction set.
  expect(chosen({&kMiddle, &kLast}, kAll) == &kMiddle, "AVX-512 does not fall through to AVX2");
  expect(chosen({&kLast}, kAll) == &kLast, "AVX-512 does not fall through to the baseline");
  expect(chosen({&kWide, &kLast}, kAvx2) == &kLast, "AVX2 does not fall through to the baseline");
  // Order decides, not what a row needs.
  expect(chosen({&kMiddle, &kWide, &kLast}, kAll) == &kMiddle, "the first match does not win");
  expect(chosen({&kVnni, &kWide}, kAvx2) == nullptr, "a table without a row for all processors");
  expect(chosen({}, kAll) == nullptr, "an empty table");
}

void test_reference_is_not_chosen() {
  const Row* const table[] = {&kWide, &kLast, &kReference};
  for (const NamedFeatures& set : kInstructionSets) {
    expect(&select_permitted<Row>(table, set.features) != &kReference,
           std::string(set.name) + " chose the reference");
  }
  expect(&select_permitted<Row>(table, kNeon) == &kLast, "the row before the reference");
}

void test_permission() {
  constexpr Row amx = {{"amx", kAvx512 | Features::amx_int8, float32, 16}};
  const Row* const table[] = {&amx, &kWide, &kLast, &kReference};
  const Features features = kAvx512 | Features::amx_int8;
  const Row* want = permitted(Features::amx_int8) ? &amx : &kWide;
  expect(&select_permitted<Row>(table, features) == want,
         "what the system refuses was chosen, or too little");
  expect(select(Table<Row>(table), features) == &amx, "the table alone does not ask the system");
}

void test_ceiling() {
  const auto full = {&kVnni, &kWide, &kMiddle, &kLast};
  const Features offered = kAvx512 | Features::avx512vnni;
  const auto forced = [&](const char* name) { return chosen(full, choose_features(name, offered).features); };
  expect(forced(nullptr) == &kVnni, "nothing forced");
  expect(forced("avx512+avx512vnni") == &kVnni, "a set and a feature");
  expect(forced("avx512") == &kWide, "AVX-512 alone");
  expect(forced("avx2") == &kMiddle, "AVX2");
  expect(forced("generic") == &kLast, "the baseline");
}

template <class Kernel>
void test_table(const char* family, Table<Kernel> table) {
  const std::string name = family;
  expect(table.size() >= 2, name + " has too few rows");
  expect(std::string(table.back()->name) == "reference", name + " does not end in the reference");
  const Table<Kernel> rows = without_reference(table);
  const ValueType values = rows.front()->values;
  expect(rows.back()->needs == Features::none, name + " has no row for every processor");
  std::set<std::string> names;
  for (const Kernel* kernel : table) expect(names.insert(kernel->name).second, name + ": one name twice");
  for (const NamedFeatures& set : kInstructionSets) {
    const Kernel* kernel = select(rows, set.features, values);
    expect(kernel != nullptr && contains(set.features, kernel->needs), name + ": wrong row for " + set.name);
  }
  Features all = Features::none;
  for (const NamedFeatures& feature : kFeatureNames) all = all | feature.features;
  expect(select(rows, all, values) == rows.front(), name + ": the best is not the first");
}

// A row with a needed feature more and one tile of many, which must not keep the others from being chosen.
void test_spmm() {
  using spmm::Kernel;
  Kernel wide{}, narrow{}, special{}, middle{}, last{};
  const auto fill = [](Kernel& kernel, const char* name, Features needs, size_t tile) {
    static_cast<KernelRow&>(kernel) = {name, needs, float32, 16, tile};
    kernel.max_chunk = 255;
    kernel.max_width = 8;
    kernel.wide_vectors = 1;
  };
  fill(wide, "wide", kAvx512, 64);
  fill(special, "special", kAvx512 | Features::avx512vbmi2, 16);
  fill(narrow, "narrow", kAvx512, 16);
  fill(middle, "middle", kAvx2, 32);
  fill(last, "last", kGeneric, 8);
  const Kernel* const table[] = {&wide, &special, &narrow, &middle, &last};
  spmm::Weight weight{};
  weight.K = weight.chunk = 64;
  weight.block = 64;
  weight.width = 1;
  const auto choice = [&](Features features, size_t tokens) {
    return spmm::select(table, features, weight, tokens);
  };
  const Features vbmi2 = kAvx512 | Features::avx512vbmi2;
  expect(choice(vbmi2, 1000) == &wide && choice(vbmi2, 20) == &wide, "many tokens, a tile for few");
  expect(choice(vbmi2, 16) == &special && choice(vbmi2, 1) == &special, "of one tile the first");
  expect(choice(kAvx512, 16) == &narrow, "the second of one tile, without what the first needs");
  expect(choice(kAvx512, 1) == &narrow, "rows of two instruction sets are mixed");
  expect(choice(kAvx2, 1) == &middle, "AVX2");
  expect(choice(kAvx2 | Features::avx512vbmi2, 1) == &middle, "VBMI2 alone");
  expect(choice(kGeneric, 1) == &last, "the baseline");
  weight.width = 16;
  expect(choice(vbmi2, 1) == nullptr, "no kernel takes entries so wide");
  weight.width = 8;
  wide.max_width = special.max_width = narrow.max_width = 1;
  expect(choice(vbmi2, 64) == &middle, "an instruction set whose kernels do not take the weight");
  middle.values = static_cast<ValueType>(float32 + 1);
  expect(choice(vbmi2, 64) == &last, "a kernel for other values");
}

}  // namespace

int main() {
  test_select();
  test_reference_is_not_chosen();
  test_permission();
  test_ceiling();
  test_table("attention", attention::kernels());
  test_table("normalization", normalization::kernels());
  test_table("peak", peak::kernels());
  test_table("quads", quads::kernels());
  test_table("recurrent", recurrent::kernels());
  test_table("spconv", spconv::kernels());
  test_table("spmm", spmm::kernels());
  test_spmm();
  return summary();
}
