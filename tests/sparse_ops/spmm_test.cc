// Every kernel of the table against sums in double; dispatch; the check of stored tensors.

#include "spmm_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

void test_shapes() {
  for_every_shape([](const Weight& weight, size_t tokens, const std::vector<float>& x, const Exact& want) {
    for (const Kernel* kernel : kernels()) {
      if (!runs_here(*kernel) || !fits(*kernel, weight)) continue;
      compare(make_plan(weight, tokens, *kernel), weight, x, want);
    }
    for (const Features features : offered_sets()) {
      compare(make_plan(weight, tokens, features), weight, x, want);
    }
  });
}

// More tokens than fit into the scratch memory at a time.
void test_strips() {
  const size_t K = 70000, N = 3, tokens = 150;
  const RandomWeight random = random_weight(K, N, 0.005, 255, 2);
  const std::vector<float> x = random_floats(tokens * K);
  const Exact want = exact(random, x, tokens);
  const GuardedWeight guarded(random, Activation::none, 0);
  for (const Features features : offered_sets()) {
    const Plan plan = make_plan(guarded.checked.weight, tokens, features);
    expect(plan.strip < tokens, "the test is too small for strips");
    expect(plan.scratch_bytes < (size_t{40} << 20), "scratch memory is not bounded");
    compare(plan, guarded.checked.weight, x, want);
  }
}

void test_check() {
  const RandomWeight good = random_weight(300, 100, 0.3, 128, 64);
  const auto refused = [&](const char* name, const std::string& word,
                           const std::function<void(RandomWeight&)>& spoil) {
    RandomWeight bad = good;
    spoil(bad);
    CheckedWeight checked;
    const std::string problem = check(bad.stored(), Activation::none, checked);
    expect(problem.find(word) != std::string::npos,
           std::string(name) + ": '" + problem + "' lacks '" + word + "'");
  };
  const auto refused_stored = [&](const char* name, const std::string& word,
                                  const std::function<void(StoredWeight&)>& spoil) {
    StoredWeight bad = good.stored();
    spoil(bad);
    CheckedWeight checked;
    const std::string problem = check(bad, Activation::none, checked);
    expect(problem.find(word) != std::string::npos,
           std::string(name) + ": '" + problem + "' lacks '" + word + "'");
  };
  refused_stored("K zero", "attribute K", [](StoredWeight& w) { w.K = 0; });
  refused_stored("K negative", "attribute K", [](StoredWeight& w) { w.K = -300; });
  refused_stored("N zero", "attribute N", [](StoredWeight& w) { w.N = 0; });
  refused_stored("N smallest", "attribute N",
                 [](StoredWeight& w) { w.N = std::numeric_limits<int64_t>::min(); });
  refused_stored("chunk zero", "attribute chunk", [](StoredWeight& w) { w.chunk = 0; });
  refused_stored("chunk 256", "attribute chunk", [](StoredWeight& w) { w.chunk = 256; });
  refused_stored("block zero", "attribute block", [](StoredWeight& w) { w.block = 0; });
  refused_stored("block 257", "attribute block", [](StoredWeight& w) { w.block = 257; });
  refused_stored("width zero", "attribute width", [](StoredWeight& w) { w.width = 0; });
  refused_stored("width 3", "attribute width", [](StoredWeight& w) { w.width = 3; });
  refused_stored("width negative", "attribute width", [](StoredWeight& w) { w.width = -4; });
  refused_stored("other width", "counts has", [](StoredWeight& w) { w.width = 4; });
  refused_stored("block no multiple", "attribute block", [](StoredWeight& w) { w.width = 8, w.block = 60; });
  refused_stored("overflow", "too large",
                 [](StoredWeight& w) { w.K = w.N = std::numeric_limits<int64_t>::max(); });
  refused_stored("other K", "counts has", [](StoredWeight& w) { w.K = 512; });
  refused_stored("smaller K", "offsets", [](StoredWeight& w) { w.K = 270; });
  refused_stored("other N", "counts has", [](StoredWeight& w) { w.N = 200; });
  refused("counts short", "counts has", [](RandomWeight& w) { w.counts.pop_back(); });
  refused("counts empty", "counts has", [](RandomWeight& w) { w.counts.clear(); });
  refused("rows long", "rows has", [](RandomWeight& w) { w.rows.push_back(0); });
  refused("values short", "values has", [](RandomWeight& w) { w.values.pop_back(); });
  refused("offsets long", "offsets has", [](RandomWeight& w) { w.offsets.push_back(200); });
  refused("bias short", "bias has", [](RandomWeight& w) { w.bias.pop_back(); });
  refused("count zero", "counts of block 0, chunk 0", [](RandomWeight& w) { w.counts[5] = 0; });
  refused("count past chunk", "counts of block", [](RandomWeight& w) { w.counts.back() = 129; });
  refused("count one more", "values has", [](RandomWeight& w) { ++w.counts[3]; });
  refused("row twice", "rows of block 0, chunk 0", [](RandomWeight& w) { w.rows[1] = w.rows[0]; });
  refused("row past block", "rows of block", [](RandomWeight& w) { w.rows[64 * 3] = 64; });
  refused("last row", "rows of block 1, chunk 2", [](RandomWeight& w) { w.rows.back() ^= 1; });
  refused("offset twice", "offsets of block 0, chunk 0",
          [](RandomWeight& w) { w.offsets[1] = w.offsets[0]; });
  refused("offsets fall", "offsets of block 0, chunk 0",
          [](RandomWeight& w) { std::swap(w.offsets[0], w.offsets[1]); });
  refused("offset past chunk", "offsets of block 0, chunk 0",
          [](RandomWeight& w) { w.offsets[w.counts[0] - 1] = 128; });
  refused("offset past K", "offsets of block 1, chunk 2", [](RandomWeight& w) { w.offsets.back() = 44; });
  refused("offset 255", "offsets of block", [](RandomWeight& w) { w.offsets.back() = 255; });

  CheckedWeight checked;
  expect(check(good.stored(), Activation::none, checked).empty(), "a good weight was refused");
  RandomWeight odd = good;  // any value is allowed
  odd.values[0] = std::nanf("");
  odd.values[1] = std::numeric_limits<float>::infinity();
  expect(check(odd.stored(), Activation::none, checked).empty(), "NaN and Inf were refused");
}

void test_dispatch() {
  for (const NamedFeatures& set : kInstructionSets) {  // pure: also those that this processor lacks
    const Features features = set.features;
    const auto is_of = [&](const Kernel* kernel) {
      return &instruction_set(kernel->needs) == &set && kernel != kernels().back();
    };
    if (std::ranges::none_of(kernels(), is_of)) continue;  // of another architecture
    for (size_t block : {size_t{1}, size_t{64}, size_t{256}}) {
      for (size_t chunk : {size_t{1}, size_t{128}, size_t{255}}) {
        Weight weight{};
        weight.chunk = chunk;
        weight.block = block;
        size_t narrowest = 1000;
        for (const Kernel* kernel : kernels()) {
          if (is_of(kernel) && fits(*kernel, weight)) narrowest = std::min(narrowest, kernel->tile);
        }
        if (narrowest == 1000) continue;
        for (size_t tokens : {size_t{1}, size_t{5}, size_t{64}, size_t{1000}}) {
          const Kernel& kernel = select_kernel(features, weight, tokens);
          expect(is_of_set(kernel, features) && fits(kernel, weight),
                 std::string("wrong kernel ") + kernel.name);
          expect(kernel.tile == narrowest || kernel.tile < 2 * tokens,
                 std::string("too wide: ") + kernel.name);
        }
      }
    }
  }
  Weight long_weight{};  // a million input channels: narrow tiles keep the scratch memory small
  long_weight.K = size_t{1} << 20;
  long_weight.chunk = 128;
  long_weight.block = 64;
  long_weight.blocks = 1;
  for (const Features features : offered_sets()) {
    expect(make_plan(long_weight, 1000, features).scratch_bytes < (size_t{40} << 20),
           "scratch memory is not bounded");
  }
  expect(find_kernel("reference") != nullptr && find_kernel("nothing") == nullptr, "find_kernel");

  const RandomWeight random = random_weight(8, 8, 0.5, 8, 8);
  CheckedWeight checked;
  expect(check(random.stored(), Activation::none, checked).empty(), "weight refused");
  const Plan plan = make_plan(checked.weight, 3, kGeneric);
  std::vector<float> x(24), y(24);
  std::vector<char> scratch(plan.scratch_bytes);
  Failing failing;
  expect(!run(plan, checked.weight, x.data(), y.data(), scratch.data(), failing),
         "a failure of workers was lost");
  const Plan nothing = make_plan(checked.weight, 0, kGeneric);
  expect(run(nothing, checked.weight, x.data(), y.data(), scratch.data(), failing), "no tokens, yet work");
}

}  // namespace

int main() {
  for (const Kernel* kernel : kernels()) {
    std::printf("%s%s", kernel->name, runs_here(*kernel) ? " " : " (not here) ");
  }
  test_dispatch();
  test_check();
  check_special_values(kernels());
  test_strips();
  test_shapes();
  return summary();
}
