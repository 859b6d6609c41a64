// Every kernel of the table against plain loops in double, with an unreadable page behind every buffer.

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "kernels/spmm/spmm.h"
#include "random_weight.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

int failures = 0;
long checks = 0;

void expect(bool condition, const std::string& what) {
  ++checks;
  if (condition) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// A copy of an array that ends where memory ends, or `gap` bytes before.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count, size_t gap = 0) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = count * sizeof(T) + gap;
    size_ = (bytes + page - 1) / page * page + page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + size_ - page, page, PROT_NONE) != 0) {
      std::perror("mmap");
      std::exit(2);
    }
    memory_ = static_cast<char*>(memory);
    data_ = memory_ + size_ - page - bytes;
  }
  Guarded(const std::vector<T>& values, size_t gap = 0) : Guarded(values.size(), gap) {
    if (!values.empty()) std::memcpy(data_, values.data(), values.size() * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, size_); }
  void* data() const { return data_; }
  T* typed() const { return static_cast<T*>(data()); }

 private:
  size_t size_;
  char* memory_;
  char* data_;
};

// Runs the last task first: tasks must not depend on their order.
class Backwards final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    for (size_t i = total; i-- > 0;) task(context, i);
    return true;
  }
};

class Failing final : public Workers {
 public:
  bool run(size_t, void (*)(void*, size_t), void*) override { return false; }
};

double activate(Activation activation, double h) {
  switch (activation) {
    case Activation::none:
      return h;
    case Activation::relu:
      return h < 0 ? 0 : h;
    case Activation::gelu:
      return 0.5 * h * std::erfc(-h / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * h * (1 + std::tanh(std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h)));
    case Activation::silu:
      return h / (1 + std::exp(-h));
  }
  return h;
}

constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::gelu,
                                       Activation::gelu_tanh, Activation::silu};

// X . W + bias and the same of magnitudes, which bounds the rounding error.
struct Exact {
  std::vector<double> sum, magnitude;
};

Exact exact(const RandomWeight& w, const std::vector<float>& x, size_t tokens) {
  Exact y{std::vector<double>(tokens * w.N), std::vector<double>(tokens * w.N)};
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t n = 0; n < w.N; ++n) {
      y.sum[t * w.N + n] = w.bias[n];
      y.magnitude[t * w.N + n] = std::abs(w.bias[n]);
    }
  }
  size_t entry = 0, segment = 0;
  for (size_t first = 0; first < w.N; first += w.block) {
    for (size_t begin = 0; begin < w.K; begin += w.chunk) {
      for (size_t s = 0; s < w.block; ++s, ++segment) {
        const size_t n = first + w.rows[segment];
        for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
          if (n >= w.N) continue;
          for (size_t t = 0; t < tokens; ++t) {
            const double term = static_cast<double>(w.values[entry]) * x[t * w.K + begin + w.offsets[entry]];
            y.sum[t * w.N + n] += term;
            y.magnitude[t * w.N + n] += std::abs(term);
          }
        }
      }
    }
  }
  return y;
}

std::vector<float> random_floats(size_t count) {
  std::mt19937 generator(7);
  std::uniform_real_distribution<float> value(-2.0f, 2.0f);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

// `random` as the kernels see it in the worst case: arrays that end at the end of memory, floats at odd
// addresses.
struct GuardedWeight {
  Guarded<float> values, bias;
  Guarded<uint8_t> offsets, counts, rows;
  CheckedWeight checked;

  GuardedWeight(const RandomWeight& random, Activation activation, size_t gap)
      : values(random.values, gap),
        bias(random.bias, gap),
        offsets(random.offsets),
        counts(random.counts),
        rows(random.rows) {
    StoredWeight stored = random.stored();
    stored.values = values.data();
    stored.bias = bias.data();
    stored.offsets = offsets.typed();
    stored.counts = counts.typed();
    stored.rows = rows.typed();
    const std::string problem = check(stored, activation, checked);
    expect(problem.empty(), "valid weight refused: " + problem);
  }
};

void compare(const Plan& plan, const Weight& weight, const std::vector<float>& x, const Exact& want) {
  const size_t tokens = plan.tokens;
  const Guarded<float> guarded_x(x);
  const Guarded<float> y(std::vector<float>(tokens * weight.N, std::nanf("")));
  const Guarded<char> scratch(plan.scratch_bytes);
  Backwards workers;
  expect(run(plan, weight, guarded_x.typed(), y.typed(), scratch.data(), workers), "workers failed");
  const double epsilon = std::numeric_limits<float>::epsilon();
  const double terms = static_cast<double>(weight.K + 1);
  size_t wrong = 0;
  for (size_t i = 0; i < tokens * weight.N; ++i) {
    const double expected = activate(weight.activation, want.sum[i]);
    // No activation is steeper than 1.13.
    const double bound =
        1.13 * terms * epsilon * want.magnitude[i] + 4 * epsilon * std::abs(expected) + 1e-35;
    wrong += !(std::abs(y.typed()[i] - expected) <= bound);
  }
  char where[200];
  std::snprintf(where, sizeof where,
                "%s: %zu tokens, %zux%zu, chunk %zu, block %zu, activation %d: %zu wrong", plan.full->name,
                tokens, weight.K, weight.N, weight.chunk, weight.block, static_cast<int>(weight.activation),
                wrong);
  expect(wrong == 0, where);
}

void test_shapes() {
  struct Shape {
    size_t K, N, chunk, block;
    double density;
  };
  const Shape shapes[] = {
      {1, 1, 1, 1, 1.0},         {5, 3, 2, 2, 0.5},        {16, 16, 16, 16, 0.0},
      {31, 65, 7, 5, 0.3},       {64, 33, 64, 64, 1.0},    {129, 63, 128, 64, 0.2},
      {255, 257, 255, 256, 0.1}, {300, 100, 128, 64, 0.9}, {383, 1001, 128, 64, 0.1},
  };
  std::vector<size_t> token_counts = {31, 32, 33, 63, 64, 65, 127, 128, 129};
  for (size_t tokens = 1; tokens <= 17; ++tokens) token_counts.push_back(tokens);
  const Shape& largest = shapes[std::size(shapes) - 1];
  for (const Shape& s : shapes) {
    const RandomWeight random = random_weight(s.K, s.N, s.density, s.chunk, s.block);
    size_t round = 0;
    for (size_t tokens : token_counts) {
      if (&s == &largest && tokens % 32 != 1 && tokens != 5) continue;  // for the time it takes
      const std::vector<float> x = random_floats(tokens * s.K);
      const Exact want = exact(random, x, tokens);
      const GuardedWeight guarded(random, kActivations[round % std::size(kActivations)], round % 4);
      ++round;
      const Weight& weight = guarded.checked.weight;
      for (const Kernel* kernel : kernels()) {
        if (!isa_supported(kernel->isa) || !fits(*kernel, weight)) continue;
        compare(make_plan(weight, tokens, *kernel), weight, x, want);
      }
      for (Isa isa : {Isa::avx512, Isa::avx2, Isa::generic}) {
        if (isa_supported(isa)) compare(make_plan(weight, tokens, isa), weight, x, want);
      }
    }
  }
}

// More tokens than fit into the scratch memory at a time.
void test_strips() {
  const size_t K = 70000, N = 3, tokens = 150;
  const RandomWeight random = random_weight(K, N, 0.005, 255, 2);
  const std::vector<float> x = random_floats(tokens * K);
  const Exact want = exact(random, x, tokens);
  const GuardedWeight guarded(random, Activation::none, 0);
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::generic}) {
    if (!isa_supported(isa)) continue;
    const Plan plan = make_plan(guarded.checked.weight, tokens, isa);
    expect(plan.strip < tokens, "the test is too small for strips");
    expect(plan.scratch_bytes < (size_t{40} << 20), "scratch memory is not bounded");
    compare(plan, guarded.checked.weight, x, want);
  }
}

void test_special_values() {
  const float inf = std::numeric_limits<float>::infinity();
  const float tiny = std::numeric_limits<float>::denorm_min();
  std::vector<float> x = {0.0f,   -0.0f,   inf,   -inf,   std::nanf(""), tiny,  -tiny,
                          1e-20f, -1e-20f, 3e38f, -3e38f, 1e30f,         -1e30f};
  for (float v = -110.0f; v <= 110.0f; v += 0.037f) x.push_back(v);
  RandomWeight identity = random_weight(1, 20, 1.0, 1, 7);
  for (float& v : identity.values) v = 1.0f;
  for (float& b : identity.bias) b = 0.0f;
  for (Activation activation : kActivations) {
    const GuardedWeight guarded(identity, activation, 1);
    for (const Kernel* kernel : kernels()) {
      if (!isa_supported(kernel->isa)) continue;
      const Plan plan = make_plan(guarded.checked.weight, x.size(), *kernel);
      std::vector<float> y(x.size() * identity.N);
      std::vector<char> scratch(plan.scratch_bytes);
      Backwards workers;
      expect(run(plan, guarded.checked.weight, x.data(), y.data(), scratch.data(), workers),
             "workers failed");
      for (size_t i = 0; i < y.size(); ++i) {
        const double h = x[i / identity.N];
        double want = activate(activation, h);
        // Far left of zero, where the formula in double is still a product of tiny and huge numbers.
        if (std::isinf(h) && h < 0 && activation != Activation::none && activation != Activation::relu)
          want = NAN;
        const bool same =
            std::isnan(want) ? std::isnan(y[i])
            : std::isinf(want)
                ? y[i] == static_cast<float>(want)
                : std::abs(y[i] - want) <= 1e-6 * std::abs(want) + 1e-7 * std::min(1.0, std::abs(h)) + 1e-37;
        char where[120];
        std::snprintf(where, sizeof where, "%s: activation %d of %g is %g, expected %g", kernel->name,
                      static_cast<int>(activation), h, static_cast<double>(y[i]), want);
        expect(same, where);
      }
    }
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
  expect(choose_isa(nullptr).error == nullptr, "nothing forced is an error");
  expect(choose_isa("").error == nullptr, "an empty name is an error");
  for (const char* name : {"avx1024", "AVX2", "generic ", "reference"}) {
    expect(choose_isa(name).error != nullptr, std::string(name) + " was accepted");
  }
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::generic}) {
    const IsaChoice choice = choose_isa(isa_name(isa));
    expect((choice.error == nullptr) == isa_supported(isa), std::string("forcing ") + isa_name(isa));
    if (choice.error == nullptr)
      expect(choice.isa == isa, std::string("forcing does not force ") + isa_name(isa));
    for (size_t block : {size_t{1}, size_t{64}, size_t{256}}) {
      for (size_t chunk : {size_t{1}, size_t{128}, size_t{255}}) {
        Weight weight{};
        weight.chunk = chunk;
        weight.block = block;
        size_t narrowest = 1000;
        for (const Kernel* kernel : kernels()) {
          if (kernel->isa == isa && fits(*kernel, weight)) narrowest = std::min(narrowest, kernel->tile);
        }
        if (narrowest == 1000) continue;
        for (size_t tokens : {size_t{1}, size_t{5}, size_t{64}, size_t{1000}}) {
          const Kernel& kernel = select_kernel(isa, weight, tokens);
          expect(kernel.isa == isa && fits(kernel, weight), std::string("wrong kernel ") + kernel.name);
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
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::generic}) {
    if (!isa_supported(isa)) continue;
    expect(make_plan(long_weight, 1000, isa).scratch_bytes < (size_t{40} << 20),
           "scratch memory is not bounded");
  }
  expect(find_kernel("reference") != nullptr && find_kernel("nothing") == nullptr, "find_kernel");

  const RandomWeight random = random_weight(8, 8, 0.5, 8, 8);
  CheckedWeight checked;
  expect(check(random.stored(), Activation::none, checked).empty(), "weight refused");
  const Plan plan = make_plan(checked.weight, 3, Isa::generic);
  std::vector<float> x(24), y(24);
  std::vector<char> scratch(plan.scratch_bytes);
  Failing failing;
  expect(!run(plan, checked.weight, x.data(), y.data(), scratch.data(), failing),
         "a failure of workers was lost");
  const Plan nothing = make_plan(checked.weight, 0, Isa::generic);
  expect(run(nothing, checked.weight, x.data(), y.data(), scratch.data(), failing), "no tokens, yet work");
}

}  // namespace

int main() {
  test_dispatch();
  test_check();
  test_special_values();
  test_strips();
  test_shapes();
  std::printf("%ld checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
