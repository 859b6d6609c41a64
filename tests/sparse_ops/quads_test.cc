// Every kernel of the table against sums in 64 bits, between inaccessible pages; several linears in one
// weight; dispatch; the check of stored tensors, also of ones that may say anything; threads.

#include "kernels/quads/quads.h"

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "linear_checks.h"
#include "quads_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::quads;

struct Shape {
  size_t K, N, chunk, block;
  double density;  // 2: the dense format
  int limit = 64;
};

// Sizes around quads, vectors of 4, 8, 16 and 64, tiles and blocks; weights with no quad, some and all.
constexpr Shape kShapes[] = {{1, 1, 1, 1, 1.0},           {3, 5, 1, 5, 1.0, 128},       {5, 3, 2, 2, 0.5},
                             {16, 16, 4, 16, 0.0},        {31, 65, 7, 5, 0.3, 127},     {64, 33, 16, 32, 1.0},
                             {129, 63, 33, 64, 0.2, 128}, {257, 130, 64, 128, 0.7, 65}, {383, 101, 96, 60, 0.1},
                             {1, 1, 1, 4, 2.0},           {7, 5, 3, 8, 2.0, 128},       {130, 67, 11, 12, 2.0},
                             {383, 101, 32, 52, 2.0, 127}};

RandomQuads random_of(const Shape& s) {
  return s.density > 1 ? random_dense(s.K, s.N, s.chunk, s.block, s.limit)
                       : random_quads(s.K, s.N, s.density, s.chunk, s.block, s.limit);
}

void test_shapes() {
  std::vector<size_t> counts = {31, 32, 33, 63, 64, 65, 127, 128, 129};
  for (size_t tokens = 1; tokens <= 17; ++tokens) counts.push_back(tokens);
  for (const Shape& s : kShapes) {
    const RandomQuads random = random_of(s);
    for (Edge edge : {Edge::front, Edge::back}) {
      const GuardedQuads guarded(random, Activation::none, edge == Edge::front ? 1 : 0, edge);
      const Weight& weight = guarded.checked.weight;
      expect(weight.wide == (s.limit > 64 && s.density > 0), "wide or not: a look at the integers");
      for (size_t tokens : counts) {
        const std::vector<float> x = random_tokens(tokens * s.K);
        const Exact want = exact(random, x, tokens);
        const std::vector<uint8_t> bytes = random_bytes(tokens * s.K);
        const Bytes steps{nullptr, tokens % 2 == 0, static_cast<int32_t>(tokens * 37 % 256), 0.02f};
        const Exact of_bytes = exact(random, bytes, steps, tokens);
        for (const Kernel* kernel : kernels()) {
          if (!runs_here(*kernel) || !fits(*kernel, weight)) continue;
          const Plan plan = make_plan(weight, tokens, *kernel);
          compare(plan, weight, random, guarded_run(plan, weight, x, edge), want);
          compare(plan, weight, random, guarded_run(plan, weight, bytes, steps, edge), of_bytes);
        }
        for (const Features features : offered_sets()) {
          const Plan plan = make_plan(weight, tokens, features);
          compare(plan, weight, random, guarded_run(plan, weight, x, edge), want);
          compare(plan, weight, random, guarded_run(plan, weight, bytes, steps, edge), of_bytes);
        }
      }
    }
  }
}

// The largest products and sums: what 16 bits saturate at, and what K allows.
void test_extremes() {
  for (int limit : {64, 127, 128}) {
    for (size_t K : {size_t{64}, kMaxInputs}) {
      RandomQuads random = random_quads(K, 2, 1.0, 255, 2, limit);
      const size_t half = random.values.size() / 2;
      for (size_t i = 0; i < random.values.size(); ++i) {
        random.values[i] = static_cast<int8_t>(i < half ? -limit : std::min(limit, 127));
      }
      std::vector<float> x(3 * K);
      for (size_t k = 0; k < K; ++k) {
        x[k] = 1.0f;                                      // all 255, zero point 0
        x[K + k] = -1.0f;                                 // all 0, zero point 255
        x[2 * K + k] = k == 0 ? -1.0f : 1.0f;             // steps of 2 / 255: halves round to even
      }
      const GuardedQuads guarded(random, Activation::none);
      const Exact want = exact(random, x, 3);
      for (const Kernel* kernel : kernels()) {
        if (!runs_here(*kernel) || !fits(*kernel, guarded.checked.weight)) continue;
        const Plan plan = make_plan(guarded.checked.weight, 3, *kernel);
        compare(plan, guarded.checked.weight, random, guarded_run(plan, guarded.checked.weight, x), want);
      }
    }
  }
}

// Bytes at both ends, with and without a sign, and zero points there.
void test_extreme_bytes() {
  for (int limit : {64, 128}) {
    RandomQuads random = random_quads(kMaxInputs, 2, 1.0, 255, 2, limit);
    for (size_t i = 0; i < random.values.size(); ++i) {
      random.values[i] = static_cast<int8_t>(i < random.values.size() / 2 ? -limit : std::min(limit, 127));
    }
    const GuardedQuads guarded(random, Activation::none);
    for (const Bytes& steps : {Bytes{nullptr, false, 0, 1.0f}, Bytes{nullptr, false, 255, 1.0f},
                               Bytes{nullptr, true, 0, 1.0f}, Bytes{nullptr, true, 255, 1.0f}}) {
      for (int byte : {0, 127, 128, 255}) {
        const std::vector<uint8_t> x(2 * random.K, static_cast<uint8_t>(byte));
        const Exact want = exact(random, x, steps, 2);
        for (const Kernel* kernel : kernels()) {
          if (!runs_here(*kernel) || !fits(*kernel, guarded.checked.weight)) continue;
          const Plan plan = make_plan(guarded.checked.weight, 2, *kernel);
          compare(plan, guarded.checked.weight, random, guarded_run(plan, guarded.checked.weight, x, steps),
                  want);
        }
      }
    }
  }
}

// Products on a grid, then the bias: of numbers that halves and multiples of two make exact.
void test_grid() {
  for (const Shape& s : kShapes) {
    RandomQuads random = random_of(s);
    for (float& scale : random.scales) scale = 0.5f;
    for (float& bias : random.bias) bias = std::nearbyint(bias * 8) / 8;
    for (const Grid& grid : {Grid{64.0f, -128, 127}, Grid{16.0f, 0, 255}, Grid{4.0f, -65535, 65535}}) {
      GuardedQuads guarded(random, Activation::none);
      Weight& weight = guarded.checked.weight;
      weight.grid = grid;
      for (size_t tokens : {1, 5, 16, 33, 130}) {
        const std::vector<uint8_t> x = random_bytes(tokens * s.K);
        const Bytes steps{nullptr, false, 100, 0.25f};
        const Exact want = exact(random, x, steps, tokens);
        for (const Kernel* kernel : kernels()) {
          if (!runs_here(*kernel) || !fits(*kernel, weight)) continue;
          const Plan plan = make_plan(weight, tokens, *kernel);
          const std::vector<float> y = guarded_run(plan, weight, x, steps);
          size_t wrong = 0;
          for (size_t i = 0; i < y.size(); ++i) {
            const double steps_of = std::nearbyint(static_cast<double>(want.sums[i]) * 0.125 / grid.size);
            const double inside = std::min<double>(std::max<double>(steps_of, grid.low), grid.high);
            wrong += y[i] != inside * grid.size + random.bias[i % s.N];
          }
          expect(wrong == 0, describe(plan, weight) + ": " + std::to_string(wrong) + " off the grid");
        }
      }
    }
  }
}

// What is no number stays in its token and makes all of it NaN; zeros and tiny numbers are exact.
void test_special_values() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (const Shape& s : {Shape{70, 9, 8, 4, 0.6}, Shape{3, 9, 1, 4, 2.0}}) {
    const RandomQuads random = random_of(s);
    const GuardedQuads guarded(random, Activation::none);
    const Weight& weight = guarded.checked.weight;
    const size_t tokens = 20;
    std::vector<float> x = random_tokens(tokens * s.K);
    for (size_t k = 0; k < s.K; ++k) {
      x[k] = 0.0f;
      x[s.K + k] = 1e-38f;
      x[2 * s.K + k] = k % 2 == 0 ? 3e38f : -3e38f;  // their distance is no float
    }
    x[3 * s.K] = nan, x[5 * s.K + s.K - 1] = inf, x[6 * s.K + 1] = -inf;
    x[7 * s.K] = inf, x[7 * s.K + 1] = -inf;
    const Exact want = exact(random, random_tokens(tokens * s.K), tokens);
    for (const Kernel* kernel : kernels()) {
      if (!runs_here(*kernel)) continue;
      const Plan plan = make_plan(weight, tokens, *kernel);
      const std::vector<float> y = guarded_run(plan, weight, x);
      const auto row = [&](size_t t, auto right) {
        bool all = true;
        for (size_t n = 0; n < s.N; ++n) all = all && right(y[t * s.N + n], n);
        return all;
      };
      const std::string what = describe(plan, weight);
      const auto is_bias = [&](float v, size_t n) { return std::abs(v - random.bias[n]) < 1e-6; };
      for (size_t t : {0, 1}) expect(row(t, is_bias), what + ": zeros give the bias");
      for (size_t t : {2, 3, 5, 6, 7}) {
        expect(row(t, [](float v, size_t) { return std::isnan(v); }), what + ": NaN is lost");
      }
      for (size_t t : {4, 8, 19}) {
        const auto finite = [&](float v, size_t n) {
          const double sum = static_cast<double>(want.sums[t * s.N + n]);
          return std::abs(v - (sum * want.steps[t] * random.scales[n] + random.bias[n])) < 1e-5;
        };
        expect(row(t, finite), what + ": NaN reaches other tokens");
      }
    }
  }
}

void test_activations() {
  const RandomQuads random = random_quads(40, 33, 0.5, 10, 20);
  const std::vector<float> x = random_tokens(37 * random.K);
  const GuardedQuads plain(random, Activation::none);
  for (Activation activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu,
                                Activation::quick_gelu}) {
    const GuardedQuads guarded(random, activation);
    for (const Kernel* kernel : kernels()) {
      if (!runs_here(*kernel)) continue;
      std::vector<float> h = guarded_run(make_plan(plain.checked.weight, 37, *kernel), plain.checked.weight, x);
      const Plan plan = make_plan(guarded.checked.weight, 37, *kernel);
      const std::vector<float> y = guarded_run(plan, guarded.checked.weight, x);
      kernels().back()->activate(activation, h.data(), h.size());
      bool near = true;
      for (size_t i = 0; i < y.size(); ++i) near = near && std::abs(y[i] - h[i]) < 2e-6 * (1 + std::abs(h[i]));
      expect(near, describe(plan, guarded.checked.weight) + ": another activation");
    }
  }
}

// Several linears in one weight are, bit for bit, its columns; gates are the products of two halves.
template <class Tokens>
void check_linears(const Plan& plan, const Weight& plain, const Tokens& x, const std::vector<size_t>& split) {
  const std::vector<float> want = run_apart(plan, plain, x, {plain.N});
  expect(run_apart(plan, plain, x, split) == want, describe(plan, plain) + ": outputs apart differ");
  if (split.size() != 2 || split[0] != split[1]) return;
  for (Activation activation : {Activation::silu, Activation::gelu_tanh}) {
    Weight weight = plain;
    weight.activation = activation;
    const std::vector<float> activated = run_apart(plan, weight, x, {weight.N});
    weight.gated = true;
    const std::vector<float> y = run_apart(plan, weight, x, {split[0]});
    bool equal = y.size() * 2 == want.size();
    for (size_t i = 0; equal && i < y.size(); ++i) {
      const size_t at = i / split[0] * weight.N + i % split[0];
      equal = y[i] == activated[at] * want[at + split[0]];
    }
    expect(equal, describe(plan, weight) + ": the gate differs");
  }
}

void test_linears() {
  struct Linears {
    Shape shape;
    std::vector<size_t> split;
  };
  const Linears all[] = {{{31, 24, 7, 7, 0.4, 127}, {7, 14, 3}},   {{33, 20, 6, 5, 0.3}, {10, 10}},
                         {{129, 256, 33, 64, 0.2}, {64, 128, 64}}, {{130, 128, 33, 64, 0.2, 128}, {64, 64}},
                         {{300, 512, 75, 256, 0.1}, {256, 256}},   {{7001, 12, 255, 2, 0.01}, {6, 6}},
                         {{130, 48, 11, 12, 2.0, 128}, {24, 24}},  {{66, 40, 9, 8, 2.0}, {16, 8, 16}}};
  for (const Linears& linears : all) {
    const Shape& s = linears.shape;
    const GuardedQuads guarded(random_of(s), Activation::none, 1);
    for (const Grid& grid : {Grid{}, Grid{0.25f, -128, 127}}) {
      Weight weight = guarded.checked.weight;
      weight.grid = grid;
      for (size_t tokens : {1, 5, 16, 33, 130}) {
        const Guarded<float> x(random_tokens(tokens * s.K));
        const Guarded<uint8_t> data(random_bytes(tokens * s.K));
        x.make_read_only(), data.make_read_only();
        const Bytes bytes{data.typed(), true, 100, 0.02f};
        const auto check_plan = [&](const Plan& plan) {
          const float* floats = x.typed();
          if (grid.size == 0) check_linears(plan, weight, floats, linears.split);
          check_linears(plan, weight, bytes, linears.split);
        };
        for (const Kernel* kernel : kernels()) {
          if (runs_here(*kernel) && fits(*kernel, weight)) check_plan(make_plan(weight, tokens, *kernel));
        }
        for (const Features features : offered_sets()) check_plan(make_plan(weight, tokens, features));
      }
    }
  }
}

using Spoil = std::function<void(RandomQuads&, RandomQuads::Stored&)>;

void test_check() {
  const auto refused = [&](const RandomQuads& good, const char* name, const std::string& word,
                           const Spoil& spoil) {
    RandomQuads bad = good;
    RandomQuads::Stored stored = bad.stored();
    spoil(bad, stored);
    CheckedWeight checked;
    const std::string problem = int8_quads::check(stored.raw(), Activation::none, checked);
    expect(problem.find(word) != std::string::npos,
           std::string(name) + ": '" + problem + "' lacks '" + word + "'");
  };
  const auto size = [](size_t which, int64_t value) -> Spoil {
    return [=](RandomQuads&, RandomQuads::Stored& s) { s.sizes[which] = value; };
  };
  const auto longer = [](size_t which, int by) -> Spoil {
    return [=](RandomQuads&, RandomQuads::Stored& s) { s.parts[which].count += static_cast<size_t>(by); };
  };
  const RandomQuads sparse = random_quads(300, 100, 0.3, 32, 64), dense = random_dense(300, 100, 32, 64);
  for (const RandomQuads* good : {&sparse, &dense}) {
    refused(*good, "K zero", "attribute K", size(0, 0));
    refused(*good, "K too large", "attribute K", size(0, 32765));
    refused(*good, "K smallest", "attribute K", size(0, INT64_MIN));
    refused(*good, "K largest", "attribute K", size(0, INT64_MAX));
    refused(*good, "N zero", "attribute N", size(1, 0));
    refused(*good, "N largest", "", size(1, INT64_MAX));
    refused(*good, "chunk zero", "attribute chunk", size(2, 0));
    refused(*good, "chunk 256", "attribute chunk", size(2, 256));
    refused(*good, "block zero", "attribute block", size(3, 0));
    refused(*good, "block 257", "attribute block", size(3, 257));
    refused(*good, "values short", "values has", longer(0, -4));
    refused(*good, "values no quads", "values has", longer(0, 1));
    refused(*good, "scales long", "scales has", longer(good->dense ? 1 : 4, 1));
    refused(*good, "bias short", "bias has", [](RandomQuads&, RandomQuads::Stored& s) { --s.bias.count; });
    refused(*good, "a part less", "parts", [](RandomQuads&, RandomQuads::Stored& s) {
      s.parts.resize(s.parts.size() - 1), s.sizes.push_back(1);
    });
  }
  refused(dense, "block no multiple of 4", "multiple of 4", size(3, 62));
  refused(sparse, "other K", "", size(0, 100));
  refused(sparse, "counts short", "counts has", longer(2, -1));
  refused(sparse, "rows long", "rows has", longer(3, 1));
  refused(sparse, "offsets short", "values has", longer(1, -1));
  const auto spoilt = [&](const char* name, const std::string& word, auto change) {
    refused(sparse, name, word, [=](RandomQuads& w, RandomQuads::Stored&) { change(w); });
  };
  spoilt("count zero", "counts of block 0, chunk 0", [](RandomQuads& w) { w.counts[5] = 0; });
  spoilt("count past chunk", "counts of block", [](RandomQuads& w) { w.counts.back() = 33; });
  spoilt("row twice", "rows of block 0, chunk 0", [](RandomQuads& w) { w.rows[1] = w.rows[0]; });
  spoilt("offset past K", "offsets of block 1, chunk 2", [](RandomQuads& w) { w.offsets.back() = 11; });
  spoilt("offset twice", "offsets of block 0, chunk 0", [](RandomQuads& w) { w.offsets[1] = w.offsets[0]; });
}

// Bytes that may say anything: what the check accepts is safe, and the same on all kernels.
void test_spoilt_bytes() {
  std::mt19937 generator(3);
  const auto below = [&](size_t limit) { return generator() % limit; };
  size_t accepted = 0, refused = 0;
  for (size_t i = 0; i < 1500; ++i) {
    const size_t K = 1 + below(90), N = 1 + below(40), chunk = 1 + below(30);
    RandomQuads w = below(3) == 0
                        ? random_dense(K, N, chunk, 4 + 4 * below(8), 128)
                        : random_quads(K, N, 0.1 * static_cast<double>(below(11)), chunk, 1 + below(40), 128);
    for (size_t left = below(3); left > 0; --left) {
      std::vector<uint8_t>* arrays[] = {&w.offsets, &w.counts, &w.rows};
      std::vector<uint8_t>& bytes = *arrays[below(3)];
      if (bytes.empty()) continue;
      uint8_t& byte = bytes[below(bytes.size())];
      byte = static_cast<uint8_t>(below(2) == 0 ? byte + 1 : below(256));
    }
    RandomQuads::Stored stored = w.stored();
    if (below(4) == 0) {
      constexpr int64_t kSizes[] = {0, 1, -1, 4, 8, 255, 256, 257, INT64_MAX, INT64_MIN, int64_t{1} << 40};
      stored.sizes[below(4)] = kSizes[below(std::size(kSizes))];
    }
    CheckedWeight checked;
    if (!int8_quads::check(stored.raw(), Activation::none, checked).empty()) {
      ++refused;
      continue;
    }
    ++accepted;
    const size_t tokens = 1 + below(40);
    const std::vector<float> x = random_tokens(tokens * checked.weight.K);
    const std::vector<float> want = guarded_run(make_plan(checked.weight, tokens, *kernels().back()),
                                                checked.weight, x);
    for (const Kernel* kernel : kernels()) {
      if (!runs_here(*kernel)) continue;
      const Plan plan = make_plan(checked.weight, tokens, *kernel);
      const std::vector<float> y = guarded_run(plan, checked.weight, x);
      bool near = true;
      for (size_t j = 0; j < y.size(); ++j) near = near && std::abs(y[j] - want[j]) < 1e-4;
      expect(near, describe(plan, checked.weight) + ": kernels disagree");
      guarded_run(plan, checked.weight, random_bytes(x.size()), {nullptr, true, 128, 1.0f});
    }
  }
  expect(accepted > 200 && refused > 200, "too many of one kind");
}

void test_dispatch() {
  Weight weight{};
  weight.K = 256, weight.quads = weight.chunk = 64, weight.block = 128, weight.N = 128;
  weight.blocks = 1;
  const auto name = [&](Features features, size_t tokens) {
    return std::string(select_kernel(features, weight, tokens).name);
  };
  expect(name(kGeneric, 1) == "generic_t4" && name(kGeneric, 100) == "generic_t16", "the baseline");
#if defined(__x86_64__)
  constexpr Features kVnni = kAvx512 | Features::avx512vnni;
  expect(name(kVnni, 1) == "avx512vnni_t16" && name(kVnni, 17) == "avx512vnni_t32" &&
             name(kVnni, 1000) == "avx512vnni_t128" && name(kVnni, 100) == "avx512vnni_t128",
         "AVX-512 with VNNI");
  expect(name(kVnni, 65) == "avx512vnni_t64", "a tile half empty");
  expect(std::string(make_plan(weight, 65, kVnni).last->name) == "avx512vnni_t16", "one token behind a tile");
  expect(name(kAvx512, 1000) == "avx512_t64", "AVX-512 alone");
  expect(name(kAvx2 | Features::avxvnni, 1000) == "avx2vnni_t64" && name(kAvx2, 7) == "avx2_t8", "AVX2");
  weight.block = 256;
  expect(name(kVnni, 1000) == "avx512vnni_t64", "a block whose sums are too many for the widest tile");
#elif defined(__aarch64__)
  expect(name(kNeon | Features::dotprod, 1000) == "neon_dotprod_t32", "NEON with dot products");
  expect(name(kNeon, 1000) == "generic_t16", "NEON alone");
#endif
  for (const Features features : offered_sets()) {
    const Kernel& kernel = select_kernel(features, weight, 5);
    expect(contains(features, kernel.needs) && kernel.values == int8, "a kernel that is not there");
  }
  const RandomQuads random = random_quads(8, 8, 0.5, 2, 8);
  const GuardedQuads guarded(random, Activation::none);
  const Plan plan = make_plan(guarded.checked.weight, 3, kGeneric);
  std::vector<float> x(24), y(24);
  std::vector<char> scratch(plan.scratch_bytes);
  for (int calls : {0, 1}) {
    Failing failing(calls);
    expect(!run(plan, guarded.checked.weight, x.data(), y.data(), scratch.data(), failing),
           "a failure of workers was lost");
  }
  Failing failing;
  expect(run(make_plan(guarded.checked.weight, 0, kGeneric), guarded.checked.weight, x.data(), y.data(),
             scratch.data(), failing),
         "no tokens, yet work");
}

// Threads that take the next task each.
class Threads final : public Workers {
 public:
  explicit Threads(size_t threads) : threads_(threads) {}
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    std::atomic<size_t> next = 0;
    const auto work = [&] {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total;) task(context, i);
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < threads_; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return true;
  }

 private:
  size_t threads_;
};

// Many threads over many tiles and strips give what one thread gives, bit for bit.
void test_threads() {
  size_t in_strips = 0;
  for (const Shape& s :
       {Shape{301, 101, 30, 16, 0.2}, Shape{8001, 41, 255, 8, 0.01}, Shape{301, 101, 30, 16, 2.0}}) {
    const RandomQuads random = random_of(s);
    const GuardedQuads guarded(random, Activation::gelu);
    const Weight& weight = guarded.checked.weight;
    const size_t tokens = 300;
    const std::vector<float> x = random_tokens(tokens * s.K);
    for (const Kernel* kernel : kernels()) {
      if (!runs_here(*kernel)) continue;
      const auto run_on = [&](size_t threads, size_t planned) {
        const Plan plan = make_plan(weight, tokens, *kernel, planned);
        in_strips += plan.strip < tokens;
        std::vector<float> y(tokens * s.N);
        const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes]);
        Threads workers(threads);
        expect(run(plan, weight, x.data(), y.data(), scratch.get(), workers), "workers failed");
        return y;
      };
      const std::vector<float> one = run_on(1, 1);
      for (size_t threads : {2, 4}) {
        expect(run_on(threads, threads) == one, std::string(kernel->name) + ": threads disagree");
      }
      expect(run_on(3, 64) == one, std::string(kernel->name) + ": plans for other threads disagree");
    }
  }
  expect(in_strips > 0, "the test is too small for strips");
}

}  // namespace

int main() {
  for (const Kernel* kernel : kernels()) {
    std::printf("%s%s", kernel->name, runs_here(*kernel) ? " " : " (not here) ");
  }
  test_dispatch();
  test_check();
  test_extremes();
  test_extreme_bytes();
  test_grid();
  test_special_values();
  test_activations();
  test_linears();
  test_spoilt_bytes();
  test_threads();
  test_shapes();
  return summary();
}
