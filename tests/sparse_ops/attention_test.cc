// Every kernel of the table against formulas in double, with an unreadable page behind every buffer.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "guarded.h"
#include "kernels/attention/attention.h"
#include "workers.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::attention;

using List = std::initializer_list<size_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

std::vector<float> random_floats(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> value(0.0f, 1.0f);
  std::vector<float> all(count);
  for (float& v : all) v = value(generator);
  return all;
}

struct Sizes {
  size_t batches, heads, queries, keys, size, value_size;
};

// Which axes of the mask are full; no mask where `present` is false.
struct MaskForm {
  bool present, batch, head, row, key;
};
constexpr MaskForm kNoMask = {false, false, false, false, false};
constexpr MaskForm kPadding = {true, true, false, false, true};
constexpr MaskForm kCausal = {true, false, false, true, true};

struct Problem {
  Sizes sizes;
  MaskForm form;
  bool split;  // keys and values lie head by head, else row by row
  float scale;
  std::vector<float> q, k, v, mask;
  bool one_batch = false, one_query = false, one_key = false;  // of q, q and k: there is one, which is repeated
  bool nan_to_zero = false;
};

Problem random_problem(const Sizes& s, const MaskForm& form, bool split = false) {
  const size_t keys = s.batches * s.heads * s.keys;
  const size_t mask = (form.batch ? s.batches : 1) * (form.head ? s.heads : 1) * (form.row ? s.queries : 1) *
                      (form.key ? s.keys : 1);
  return {s,
          form,
          split,
          1.5f / std::sqrt(static_cast<float>(s.size)),
          random_floats(s.batches * s.queries * s.heads * s.size, 1),
          random_floats(keys * s.size, 2),
          random_floats(keys * s.value_size, 3),
          form.present ? random_floats(mask, 4) : std::vector<float>()};
}

Operand operand(const void* data, size_t heads, size_t rows, size_t size, bool split) {
  const size_t batch = heads * rows * size;
  return split ? Operand{data, batch, rows * size, size} : Operand{data, batch, size, heads * size};
}

Arguments arguments_of(const Problem& p, const void* q, const void* k, const void* v, const void* mask,
                       float* y) {
  const Sizes& s = p.sizes;
  Arguments a{};
  a.q = operand(q, s.heads, p.one_query ? 1 : s.queries, s.size, false);
  a.k = operand(k, s.heads, p.one_key ? 1 : s.keys, s.size, p.split);
  if (p.one_batch) a.q.batch = 0;
  if (p.one_query) a.q.row = 0;
  if (p.one_key) a.k.row = 0;
  a.v = operand(v, s.heads, s.keys, s.value_size, p.split);
  if (p.form.present) {
    const size_t row = p.form.key ? s.keys : 1, head = row * (p.form.row ? s.queries : 1);
    const size_t batch = head * (p.form.head ? s.heads : 1);
    a.mask = {mask, p.form.batch ? batch : 0, p.form.head ? head : 0, p.form.row ? row : 0,
              p.form.key ? 1u : 0u};
  }
  a.y = y;
  a.batches = s.batches;
  a.heads = s.heads;
  a.queries = s.queries;
  a.keys = s.keys;
  a.size = s.size;
  a.value_size = s.value_size;
  a.scale = p.scale;
  a.nan_to_zero = p.nan_to_zero;
  return a;
}

// In the worst case: arrays at the end or the beginning of memory, the mask at an odd address.
std::vector<float> run_kernel(const Kernel& kernel, const Problem& p, size_t gap = 0,
                              Edge edge = Edge::back) {
  const Sizes& s = p.sizes;
  const Guarded<float> q(p.q, gap, edge), k(p.k, gap, edge), v(p.v, gap, edge), mask(p.mask, gap, edge);
  q.make_read_only(), k.make_read_only(), v.make_read_only();
  const Guarded<float> y(std::vector<float>(s.batches * s.queries * s.heads * s.value_size, std::nanf("")), 0,
                         edge);
  const Arguments arguments = arguments_of(p, q.data(), k.data(), v.data(), mask.data(), y.typed());
  const Guarded<char> scratch(std::vector<char>(scratch_bytes(kernel, arguments), '\x7f'), 0, edge);
  Backwards workers;
  expect(attention::run(kernel, arguments, scratch.data(), workers), "workers failed");
  return {y.typed(), y.typed() + s.batches * s.queries * s.heads * s.value_size};
}

// The result and, for its rounding, the largest number that takes part in each element.
struct Wanted {
  std::vector<double> y, largest;
};

Wanted wanted(const Problem& p) {
  const Sizes& s = p.sizes;
  const Arguments a = arguments_of(p, p.q.data(), p.k.data(), p.v.data(), p.mask.data(), nullptr);
  const auto element = [](const Operand& x, size_t b, size_t h, size_t i, size_t c) {
    return static_cast<double>(static_cast<const float*>(x.data)[b * x.batch + h * x.head + i * x.row + c]);
  };
  Wanted want;
  want.y.resize(s.batches * s.queries * s.heads * s.value_size);
  want.largest.resize(want.y.size());
  std::vector<double> w(s.keys);
  for (size_t b = 0; b < s.batches; ++b) {
    for (size_t h = 0; h < s.heads; ++h) {
      for (size_t i = 0; i < s.queries; ++i) {
        double top = -std::numeric_limits<double>::infinity(), sum = 0, score_size = 1;
        for (size_t j = 0; j < s.keys; ++j) {
          double dot = 0, sizes = 0;
          for (size_t c = 0; c < s.size; ++c) {
            dot += element(a.q, b, h, i, c) * element(a.k, b, h, j, c);
            sizes += std::abs(element(a.q, b, h, i, c) * element(a.k, b, h, j, c));
          }
          const Mask& m = a.mask;
          w[j] = dot * static_cast<double>(p.scale);
          if (p.form.present) {
            w[j] += static_cast<double>(p.mask[b * m.batch + h * m.head + i * m.row + j * m.key]);
          }
          top = std::fmax(top, w[j]);
          score_size = std::fmax(score_size, sizes * std::abs(static_cast<double>(p.scale)));
        }
        for (double& weight : w) sum += weight = std::exp(weight - top);
        for (double& weight : w) weight = p.nan_to_zero && std::isnan(weight / sum) ? 0 : weight / sum;
        for (size_t c = 0; c < s.value_size; ++c) {
          const size_t at = ((b * s.queries + i) * s.heads + h) * s.value_size + c;
          for (size_t j = 0; j < s.keys; ++j) {
            want.y[at] += w[j] * element(a.v, b, h, j, c);
            want.largest[at] = std::fmax(want.largest[at], score_size * std::abs(element(a.v, b, h, j, c)));
          }
        }
      }
    }
  }
  return want;
}

std::string text_of(const Kernel& kernel, const Problem& p) {
  const Sizes& s = p.sizes;
  char text[200];
  std::snprintf(text, sizeof text,
                "%s: B %zu, H %zu, Sq %zu, Sk %zu, D %zu, Dv %zu, mask %d%d%d%d%d, split %d, NaN to zero %d",
                kernel.name, s.batches, s.heads, s.queries, s.keys, s.size, s.value_size, p.form.present,
                p.form.batch, p.form.head, p.form.row, p.form.key, p.split, p.nan_to_zero);
  return text;
}

template <class Function>
void for_each_kernel(Function function) {
  for (const Kernel* kernel : kernels()) {
    if (isa_supported(kernel->isa)) function(*kernel);
  }
}

size_t count_wrong(const std::vector<float>& got, const Wanted& want) {
  size_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isfinite(want.y[i])) {
      wrong += !(std::abs(got[i] - want.y[i]) <= 8 * kEpsilon * want.largest[i]);
    } else {
      wrong += std::isnan(want.y[i]) ? !std::isnan(got[i]) : got[i] != want.y[i];
    }
  }
  return wrong;
}

void compare(const Problem& p, size_t gap = 0) {
  const Wanted want = wanted(p);
  for_each_kernel([&](const Kernel& kernel) {
    for (const Edge edge : {Edge::back, Edge::front}) {
      const size_t wrong = count_wrong(run_kernel(kernel, p, gap, edge), want);
      expect(wrong == 0, text_of(kernel, p) + ": " + std::to_string(wrong) + " wrong");
    }
  });
}

// Around the vectors of every instruction set, the pieces of a tile and the blocks of keys.
void test_queries_and_keys() {
  for (size_t queries : List{1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 81, 130}) {
    for (size_t keys : List{1, 2, 5, 6, 7, 8, 15, 63, 64, 65, 129}) {
      const Sizes sizes = {1, 2, queries, keys, 20, 12};
      compare(random_problem(sizes, (queries + keys) % 2 == 0 ? kNoMask : kCausal));
    }
  }
}

void test_channels() {
  for (size_t size : List{1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 32, 48, 63, 64, 65, 80, 96, 128}) {
    for (size_t queries : List{1, 6, 37}) {
      compare(random_problem({1, 2, queries, 19, size, size}, kNoMask));
      compare(random_problem({2, 1, queries, 70, size, 7}, kPadding));
      compare(random_problem({1, 1, queries, 9, 7, size}, kNoMask, true));
    }
  }
}

void test_masks() {
  for (int bits = 0; bits < 16; ++bits) {
    const MaskForm form = {true, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
    for (size_t queries : List{1, 3, 5, 20, 70}) {
      for (size_t keys : List{3, 70}) {
        compare(random_problem({2, 3, queries, keys, 8, 16}, form));
        compare(random_problem({2, 3, queries, keys, 8, 16}, form, true), 1);
      }
    }
  }
}

// One batch of queries, one query or one key, repeated for a larger mask: nothing behind it is read.
void test_repeated() {
  for (int bits = 1; bits < 8; ++bits) {
    for (size_t queries : List{1, 3, 5, 70}) {
      for (size_t keys : List{5, 70}) {
        for (bool split : {false, true}) {
          Problem p = random_problem({2, 3, queries, keys, 8, 16}, {true, true, false, true, true}, split);
          p.one_batch = (bits & 1) != 0, p.one_query = (bits & 2) != 0, p.one_key = (bits & 4) != 0;
          p.q.resize((p.one_batch ? 1 : 2) * (p.one_query ? 1 : queries) * 3 * 8);
          p.k.resize(2 * 3 * (p.one_key ? 1 : keys) * 8);
          compare(p);
        }
      }
    }
  }
}

// More elements than are laid out at once for all heads, and more keys than are in memory at a time.
void test_long_sequences() {
  compare(random_problem({1, 2, 2, 8200, 4, 4}, kCausal));
  compare(random_problem({1, 2, 20, 8200, 4, 4}, kNoMask));
  const Problem p = random_problem({1, 2, 1100, 1000, 3, 3}, kCausal);
  const Wanted want = wanted(p);
  for_each_kernel([&](const Kernel& kernel) {
    if (kernel.isa == Isa::reference) return;
    const size_t wrong = count_wrong(run_kernel(kernel, p), want);
    expect(wrong == 0, text_of(kernel, p) + ": " + std::to_string(wrong) + " wrong");
  });
}

// Scores far apart, and tops that move from block to block, up and down.
void test_strong_scores() {
  for (float scale : {0.0f, -0.5f, 10.0f, 300.0f}) {
    for (size_t queries : List{1, 30}) {
      Problem p = random_problem({1, 2, queries, 200, 16, 16}, kPadding);
      p.scale = scale;
      compare(p);
      for (size_t j = 0; j < 200; ++j) p.mask[j] = static_cast<float>(j);
      compare(p);
      for (size_t j = 0; j < 200; ++j) p.mask[j] = -static_cast<float>(j);
      compare(p);
    }
  }
}

// Masked keys have no weight at all; rows without any key are the mean for the lowest number, and for -Inf NaN,
// or zeros if asked for.
void test_masked_keys(bool nan_to_zero) {
  for (float fill : {kLowest, -1e30f, -kInf}) {
    for (size_t queries : List{2, 40}) {
      for (size_t keys : List{5, 64, 150}) {
        Problem p = random_problem({1, 2, queries, keys, 16, 16}, kCausal);
        p.nan_to_zero = nan_to_zero;
        const size_t alone = keys / 2;  // the first query keeps this key only, the last one keeps none
        for (size_t j = 0; j < keys; ++j) {
          p.mask[j] = j == alone ? 0 : fill;
          p.mask[(queries - 1) * keys + j] = fill;
        }
        for_each_kernel([&](const Kernel& kernel) {
          const std::vector<float> got = run_kernel(kernel, p);
          size_t wrong = 0;
          for (size_t c = 0; c < 32; ++c) {
            wrong += got[c] != p.v[alone * 32 + c];
            const float last = got[(queries - 1) * 32 + c];
            double mean = 0;
            for (size_t j = 0; j < keys; ++j)
              mean += static_cast<double>(p.v[j * 32 + c]) / static_cast<double>(keys);
            if (!std::isinf(fill)) {
              wrong += !(std::abs(last - mean) < 1e-5);
            } else {
              wrong += nan_to_zero ? last != 0 : !std::isnan(last);
            }
          }
          for (size_t i = 32; i < (queries - 1) * 32; ++i) wrong += !std::isfinite(got[i]);
          expect(wrong == 0, text_of(kernel, p) + ", masked: " + std::to_string(wrong) + " wrong");
        });
      }
    }
  }
}

// Blocks of keys of -Inf before, between and behind others.
void test_blocks_without_a_key() {
  for (size_t begin : List{0, 64, 128}) {
    for (size_t queries : List{1, 20}) {
      Problem p = random_problem({1, 1, queries, 192, 8, 8}, kPadding);
      for (size_t j = 0; j < 64; ++j) p.mask[begin + j] = -kInf;
      compare(p);
    }
  }
}

// What is no number in a query, key or value reaches what it reaches in dense arithmetic, and nothing else.
void test_special_values() {
  const Sizes sizes = {1, 2, 21, 70, 8, 8};
  for (float special : {std::nanf(""), kInf, -kInf}) {
    for (size_t queries : List{2, 21}) {
      Problem p = random_problem(sizes, kNoMask);
      p.sizes.queries = queries;
      p.q.resize(queries * 16);
      const Problem clean = p;
      for_each_kernel([&](const Kernel& kernel) {
        const std::vector<float> before = run_kernel(kernel, clean);
        Problem q = clean, k = clean, v = clean;
        q.q[16 + 3] = special;             // query 1 of head 0
        k.k[69 * 16 + 3] = std::nanf("");  // the last key of head 0
        v.v[5 * 16 + 2] = special;         // channel 2 of head 0
        const std::vector<float> of_q = run_kernel(kernel, q), of_k = run_kernel(kernel, k),
                                 of_v = run_kernel(kernel, v);
        size_t wrong = 0;
        for (size_t i = 0; i < before.size(); ++i) {
          const size_t row = i / 16, head = i % 16 / 8, channel = i % 8;
          wrong += row == 1 && head == 0 ? !std::isnan(of_q[i]) : of_q[i] != before[i];
          wrong += head == 0 ? !std::isnan(of_k[i]) : of_k[i] != before[i];
          if (head == 0 && channel == 2) {
            wrong += std::isnan(special) ? !std::isnan(of_v[i]) : of_v[i] != special;
          } else {
            wrong += of_v[i] != before[i];
          }
        }
        expect(wrong == 0, text_of(kernel, p) + ", special: " + std::to_string(wrong) + " wrong");
      });
    }
  }
}

// Rows whose weights are NaN, each in its own way, between others that stay as they are; and values that are no
// numbers, which weights of 0 do not hide.
void test_nan_to_zero() {
  const float nan = std::nanf("");
  for (size_t queries : List{1, 3, 5, 20, 70}) {
    for (size_t keys : List{1, 5, 64, 150}) {
      for (size_t size : List{5, 16}) {
        const bool split = (queries + keys) % 2 == 0;
        const size_t row = split ? size : 2 * size;  // of keys and values
        for (size_t kind = 0; kind < 5; ++kind) {
          Problem p = random_problem({1, 2, queries, keys, size, size}, kCausal, split);
          p.nan_to_zero = true;
          if (kind == 0) p.k[(keys - 1) * row] = nan;  // of head 0, for all queries
          for (size_t i = kind % 2; i < queries; i += 2) {
            float* mask = p.mask.data() + i * keys;
            if (kind == 1 || kind == 2) std::fill_n(mask, keys, -kInf);
            if (kind == 2) mask[i * 37 % keys] = nan;
            if (kind == 3) mask[i * 37 % keys] = kInf;
            if (kind == 4) p.q[i * 2 * size] = nan;  // of head 0
          }
          compare(p);
          p.v[keys / 2 * row + 1] = nan;  // channel 1 of head 0
          p.v[keys / 3 * row + 2] = -kInf;
          compare(p);
        }
      }
    }
  }
}

void test_no_keys() {
  for_each_kernel([&](const Kernel& kernel) {
    const std::vector<float> got = run_kernel(kernel, random_problem({2, 2, 3, 0, 4, 5}, kNoMask));
    size_t wrong = 0;
    for (float y : got) wrong += y != 0;
    expect(wrong == 0 && got.size() == 60, std::string(kernel.name) + ": no keys");
  });
}

void test_parallel() {
  Problem p = random_problem({4, 12, 128, 128, 16, 16}, kCausal);
  std::vector<float> y(p.q.size());
  const Arguments large = arguments_of(p, p.q.data(), p.k.data(), p.v.data(), p.mask.data(), y.data());
  Arguments small = large;
  small.batches = small.heads = 1;
  small.queries = small.keys = 4;
  const Kernel& kernel = select_kernel(Isa::generic);
  std::vector<char> scratch(scratch_bytes(kernel, large));
  Backwards workers;
  Failing failing;
  expect(attention::run(kernel, large, scratch.data(), workers) && workers.tasks > 16,
         "many tiles are not spread");
  expect(!attention::run(kernel, large, scratch.data(), failing), "a failure of workers was lost");
  expect(attention::run(kernel, small, scratch.data(), failing), "one small tile was spread");
  small.batches = 0;
  expect(attention::run(kernel, small, scratch.data(), failing), "no batches, yet work");
  Arguments longer = large;
  longer.mask = {};
  longer.keys = 1 << 20;
  const size_t bytes = scratch_bytes(kernel, longer);
  longer.keys = 128;
  expect(scratch_bytes(kernel, longer) == bytes, "memory grows with the keys");
}

void test_dispatch() {
  for (const Isa isa : kIsas) {
    if (!isa_supported(isa)) continue;
    const Kernel& kernel = select_kernel(isa);
    expect(kernel.isa == isa && std::string(kernel.name) == isa_name(isa), "select_kernel");
    expect(kernel.queries % kernel.lanes == 0, "tiles have whole vectors");
  }
}

}  // namespace

int main() {
  test_dispatch();
  test_parallel();
  test_no_keys();
  test_queries_and_keys();
  test_channels();
  test_masks();
  test_repeated();
  test_strong_scores();
  test_masked_keys(false);
  test_masked_keys(true);
  test_blocks_without_a_key();
  test_special_values();
  test_nan_to_zero();
  test_long_sequences();
  return summary();
}
