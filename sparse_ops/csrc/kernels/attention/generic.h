// The kernel's body for any vector width. Included by one source file per instruction set.
//
// Scores are vectors of queries: those of a tile are transposed once, while keys are read where they are,
// element by element; and a maximum or a sum over keys is one of whole vectors. For the result, channels of
// values lie in the lanes, and weights are read element by element. Keys come in blocks; when a later one has
// a larger score, what was summed so far is made smaller (online softmax: Milakov and Gimelshein, 2018).
//
// Few queries would leave most lanes of the scores empty. For them, channels lie in the lanes there, too.
#pragma once

#include "kernels/attention/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::attention {
namespace {

using Bytes = const unsigned char*;

inline Bytes at(const void* array, size_t index) { return static_cast<Bytes>(array) + index * sizeof(float); }

inline Bytes rows_of(const Operand& x, const Tile& tile) {
  return at(x.data, tile.batch * x.batch + tile.head * x.head);
}

inline float* result_row(const Arguments& a, const Tile& tile, size_t query) {
  return a.y + ((tile.batch * a.queries + query) * a.heads + tile.head) * a.value_size;
}

constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

template <size_t n>
struct Count {};

// act(i, Count<n>()) for pieces of i = 0..count - 1 of n each: first as many as possible, last one.
template <size_t n, class Do>
inline void in_pieces(size_t count, Do act, size_t begin = 0) {
  for (; begin + n <= count; begin += n) act(begin, Count<n>());
  if constexpr (n > 1) in_pieces<(n > 4 ? 4 : n / 2)>(count, act, begin);
}

// sums[i][v] += sum over t of a[i * row + t * step] * b[t * b_step + v * kLanes ..]
template <size_t kLanes, size_t kRows, size_t kVectors>
inline void multiply(Bytes a, size_t row, size_t step, Bytes b, size_t b_step, size_t count,
                     Vector<kLanes> (&sums)[kRows][kVectors]) {
  for (size_t t = 0; t < count; ++t, a = at(a, step), b = at(b, b_step)) {
    Vector<kLanes> right[kVectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) right[v] = load<kLanes>(at(b, v * kLanes));
#pragma GCC unroll 8
    for (size_t i = 0; i < kRows; ++i) {
      const Vector<kLanes> left = splat<kLanes>(load_float(at(a, i * row)));
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) sums[i][v] += left * right[v];
    }
  }
}

// to[c * to_row + r] = from[r * from_row + c] for c < columns and r < kLanes; rows from `rows` on are like
// the last.
template <size_t kLanes, bool kFull>
inline void transpose_in(Bytes from, size_t from_row, size_t rows, size_t columns, float* to, size_t to_row) {
  const auto place = [&](size_t r, size_t c) {
    return at(from, (kFull ? r : smaller(r, rows - 1)) * from_row + c);
  };
  size_t c = 0;
  if constexpr (kFull && kLanes == 8) {  // half as many exchanges as for a square
    for (; c + 4 <= columns; c += 4) {
      Vector<kLanes> four[4];
      load_columns<kLanes>(reinterpret_cast<const float*>(place(0, c)), from_row, four);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) store<kLanes>(to + (c + i) * to_row, four[i]);
    }
  }
  for (; c + kLanes <= columns; c += kLanes) {
    Vector<kLanes> square[kLanes];
#pragma GCC unroll 16
    for (size_t r = 0; r < kLanes; ++r) square[r] = load<kLanes>(place(r, c));
    transpose_square<kLanes>(square);
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) store<kLanes>(to + (c + i) * to_row, square[i]);
  }
  for (; c < columns; ++c) {
    for (size_t r = 0; r < kLanes; ++r) to[c * to_row + r] = load_float(place(r, c));
  }
}

template <size_t kLanes>
inline void transpose_in(Bytes from, size_t from_row, size_t rows, size_t columns, float* to, size_t to_row) {
  if (rows >= kLanes) {
    transpose_in<kLanes, true>(from, from_row, rows, columns, to, to_row);
  } else {
    transpose_in<kLanes, false>(from, from_row, rows, columns, to, to_row);
  }
}

// What is subtracted from scores before they go into the exponential: the largest, but a number where that is
// -Inf.
template <size_t kLanes>
inline Vector<kLanes> finite_top(Vector<kLanes> top) {
  return maximum<kLanes>(splat<kLanes>(-__FLT_MAX__), top);
}

// e^(score - top), and 0 from -88 on: 2^(n + f) with an integer n and |f| <= 1/2, and a polynomial of
// degree 5 for 2^f (relative error 1.6e-7, fitted by iteratively reweighted least squares). log2(e) is not
// exact, for which small weights pay: they may be off by |n| units in the last place, little beside the
// largest, 1.
template <size_t kLanes>
inline Vector<kLanes> weight(Vector<kLanes> score, Vector<kLanes> top) {
  using V = Vector<kLanes>;
  const V x = maximum<kLanes>(splat<kLanes>(-88.0f), score - top);  // NaN stays
  // Adding 1.5 * 2^23 + 127 rounds to an integer: the low bits of the sum are n + 127, the exponent of 2^n.
  const V magic = splat<kLanes>(12583039.0f);
  const V sum = x * 1.44269504f + magic;
  const V f = x * 1.44269504f - (sum - magic);
  V p = splat<kLanes>(1.326472731307149e-3f);
  p = p * f + 9.671512991189957e-3f;
  p = p * f + 5.550733581185341e-2f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  IntVector<kLanes> bits;
  __builtin_memcpy(&bits, &sum, sizeof(bits));
  bits <<= 23;  // 0 for n = -127
  V power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// A mask as vectors of queries: element (key, vector) at data[key * step + vector * across].
struct MaskVectors {
  const float* data;
  size_t step, across;
};

// Of the keys key..key + keys - 1, for the queries of a tile. `to` has room for [keys, kVectors * kLanes].
template <size_t kLanes, size_t kVectors>
MaskVectors lay_mask(const Arguments& a, const Tile& tile, size_t key, size_t keys, float* to) {
  const Mask& mask = a.mask;
  if (mask.data == nullptr) {
    store<kLanes>(to, Vector<kLanes>{});
    return {to, 0, 0};
  }
  const Bytes from =
      at(mask.data, tile.batch * mask.batch + tile.head * mask.head + tile.first * mask.row + key * mask.key);
  if (mask.row == 0) {  // as for most padding: one number for all queries
    for (size_t j = 0; j < keys; ++j) {
      store<kLanes>(to + j * kLanes, splat<kLanes>(load_float(at(from, j * mask.key))));
    }
    return {to, kLanes, 0};
  }
  for (size_t v = 0; v < kVectors; ++v) {
    const size_t rows = tile.count - v * kLanes;
    const Bytes strip = at(from, v * kLanes * mask.row);
    if (mask.key == 1) {
      transpose_in<kLanes>(strip, mask.row, rows, keys, to + v * kLanes, kVectors * kLanes);
    } else {
      for (size_t r = 0; r < kLanes; ++r) {
        const float same = load_float(at(strip, smaller(r, rows - 1) * mask.row));
        for (size_t j = 0; j < keys; ++j) to[(j * kVectors + v) * kLanes + r] = same;
      }
    }
  }
  return {to, kVectors * kLanes, kLanes};
}

// Side by side, so that they stay in the cache: to[r * width + c] = from[r * row + c], zeros for c from
// `columns` on.
template <size_t kLanes>
inline void pack_rows(Bytes from, size_t row, size_t rows, size_t columns, size_t width, float* to) {
  for (size_t r = 0; r < rows; ++r, from = at(from, row), to += width) {
    size_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store<kLanes>(to + c, load<kLanes>(at(from, c)));
    if (c < columns) {
      store<kLanes>(to + c, Vector<kLanes>{});
      for (; c < columns; ++c) to[c] = load_float(at(from, c));
    }
  }
}

// Rows of a result and what they become, (from * factor + weights . values) * scale.
struct Update {
  const float *from, *factor;  // [rows, width] and [rows]; nullptr: nothing was summed before
  float* to;
  size_t to_row;
  const float* scale;  // [rows]; nullptr: 1
};

// For rows r < rows of the result, weight (r, key) lies at weights[key * weights_row + r].
template <size_t kLanes, size_t kMostVectors, size_t kSums>
void add_values(const float* weights, size_t weights_row, const float* values, size_t width, size_t rows,
                size_t keys, Update update) {
  in_pieces<kMostVectors>(width / kLanes, [&]<size_t kVectors>(size_t column, Count<kVectors>) {
    in_pieces<smaller(8, kSums / kVectors)>(rows, [&]<size_t n>(size_t r, Count<n>) {
      Vector<kLanes> s[n][kVectors] = {};
      if (update.from != nullptr) {
        const float* place = update.from + r * width + column * kLanes;
#pragma GCC unroll 8
        for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
          for (size_t v = 0; v < kVectors; ++v)
            s[i][v] = load<kLanes>(place + i * width + v * kLanes) * update.factor[r + i];
        }
      }
      multiply<kLanes>(at(weights, r), 1, weights_row, at(values, column * kLanes), width, keys, s);
      if (update.scale != nullptr) {
#pragma GCC unroll 8
        for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
          for (size_t v = 0; v < kVectors; ++v) s[i][v] *= update.scale[r + i];
        }
      }
      float* place = update.to + r * update.to_row + column * kLanes;
#pragma GCC unroll 8
      for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) store<kLanes>(place + i * update.to_row + v * kLanes, s[i][v]);
      }
    });
  });
}

// y = 0 . values: 0, but NaN in a channel where a value is not finite, as it is with weights of 0 elsewhere.
inline void weigh_with_zeros(const Arguments& a, const Tile& tile, float* y) {
  Bytes values = rows_of(a.v, tile);
  for (size_t c = 0; c < a.value_size; ++c) y[c] = 0;
  for (size_t key = 0; key < a.keys; ++key, values = at(values, a.v.row)) {
    for (size_t c = 0; c < a.value_size; ++c) y[c] += 0.0f * load_float(at(values, c));
  }
}

// Some keys, `key_row` apart, and their values, `value_width` apart.
struct KeyBlock {
  size_t first, count;
  Bytes keys;
  size_t key_row;
  const float* values;
  size_t value_width;
};

// Rows that are needed soon, fetched a few cache lines at a time while the processor computes: asked for all
// at once, they would hold up what follows.
class Ahead {
 public:
  Ahead() = default;
  Ahead(Bytes first, size_t row, size_t columns, size_t rows)
      : place_(first), row_(row), columns_(columns), rows_(rows) {}
  void fetch(size_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(at(place_, column_));
      column_ += kLine;
      if (column_ >= columns_) column_ = 0, --rows_, place_ = at(place_, row_);
    }
  }

 private:
  static constexpr size_t kLine = 16;  // floats of a cache line
  Bytes place_ = nullptr;
  size_t row_ = 0, columns_ = 0, rows_ = 0, column_ = 0;
};

// What a strip of `width` queries keeps from one block of keys to the next, and room for the block at hand.
struct Strip {
  float *queries, *top, *sum, *result;  // [size, width], [width], [width], [width, value_width]
  float *scores, *masks, *factors;      // [kKeyBlock, width], [kKeyBlock, width], [width]
};

// A strip of kVectors vectors of queries and one block of keys; kSums vectors of sums fit into registers.
// `mask`: what lay_mask() made of all keys, or nullptr. Inlined, it would lack registers: 10 % slower.
template <size_t kLanes, size_t kVectors, size_t kMostVectors, size_t kSums>
__attribute__((noinline)) void run_strip(const Arguments& a, const Tile& tile, KeyBlock block,
                                         const float* mask, Strip strip) {
  using V = Vector<kLanes>;
  constexpr size_t kWidth = kVectors * kLanes;
  V top[kVectors], sum[kVectors], new_top[kVectors];
  if (block.first == 0) {
    const Bytes q = at(rows_of(a.q, tile), tile.first * a.q.row);
    for (size_t v = 0; v < kVectors; ++v) {
      transpose_in<kLanes>(at(q, v * kLanes * a.q.row), a.q.row, tile.count - v * kLanes, a.size,
                           strip.queries + v * kLanes, kWidth);
      top[v] = splat<kLanes>(-__builtin_inff()), sum[v] = V{};
    }
  } else {
    for (size_t v = 0; v < kVectors; ++v) {
      top[v] = load<kLanes>(strip.top + v * kLanes), sum[v] = load<kLanes>(strip.sum + v * kLanes);
    }
  }
  const MaskVectors added = mask != nullptr
                                ? MaskVectors{mask + block.first * kWidth, kWidth, kLanes}
                                : lay_mask<kLanes, kVectors>(a, tile, block.first, block.count, strip.masks);
  const bool last = block.first + block.count == a.keys;
  const size_t y_row = a.heads * a.value_size, next = tile.first + kWidth;
  float* y = result_row(a, tile, tile.first);
  Ahead result_rows, next_queries;
  if (last) result_rows = Ahead(at(y, 0), y_row, a.value_size, tile.count);
  if (block.first == 0 && next < a.queries) {
    next_queries = Ahead(at(rows_of(a.q, tile), next * a.q.row), a.q.row, a.size,
                         smaller(kWidth, a.queries - next));
  }
  for (size_t v = 0; v < kVectors; ++v) new_top[v] = top[v];
  in_pieces<smaller(8, kSums / kVectors)>(block.count, [&]<size_t n>(size_t j, Count<n>) {
    result_rows.fetch(n), next_queries.fetch(n);
    V s[n][kVectors] = {};
    multiply<kLanes>(at(block.keys, j * block.key_row), block.key_row, 1, at(strip.queries, 0), kWidth,
                     a.size, s);
#pragma GCC unroll 8
    for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) {
        const V score =
            s[i][v] * a.scale + load<kLanes>(added.data + (j + i) * added.step + v * added.across);
        store<kLanes>(strip.scores + (j + i) * kWidth + v * kLanes, score);
        new_top[v] = maximum<kLanes>(score, new_top[v]);
      }
    }
  });
  for (size_t v = 0; v < kVectors; ++v) {
    const V finite = finite_top<kLanes>(new_top[v]), factor = weight<kLanes>(top[v], finite);
    store<kLanes>(strip.factors + v * kLanes, factor);
    sum[v] *= factor;
    top[v] = new_top[v];
    new_top[v] = finite;
  }
  for (size_t j = 0; j < block.count; ++j) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      float* place = strip.scores + j * kWidth + v * kLanes;
      const V w = weight<kLanes>(load<kLanes>(place), new_top[v]);
      store<kLanes>(place, w);
      sum[v] += w;
    }
  }
  const bool in_place = last && a.value_size == block.value_width;
  for (size_t v = 0; v < kVectors; ++v) {
    store<kLanes>(strip.top + v * kLanes, top[v]);
    store<kLanes>(strip.sum + v * kLanes, last ? 1.0f / sum[v] : sum[v]);
  }
  if (last && a.nan_to_zero) {
    for (size_t r = 0; r < tile.count; ++r) {  // all scores are -Inf, all weights 0 already
      if (strip.sum[r] == __builtin_inff()) strip.sum[r] = 1;
    }
  }
  add_values<kLanes, kMostVectors, kSums>(
      strip.scores, kWidth, block.values, block.value_width, tile.count, block.count,
      {block.first == 0 ? nullptr : strip.result, strip.factors, in_place ? y : strip.result,
       in_place ? y_row : block.value_width, last ? strip.sum : nullptr});
  if (!last) return;
  for (size_t r = 0; r < tile.count; ++r, y += y_row) {
    if (a.nan_to_zero && strip.sum[r] != strip.sum[r]) {
      weigh_with_zeros(a, tile, y);
    } else if (!in_place) {
      for (size_t c = 0; c < a.value_size; ++c) y[c] = strip.result[r * block.value_width + c];
    }
  }
}

// kVectors: those of a strip at most
template <size_t kLanes, size_t kVectors, size_t kMostVectors, size_t kSums>
void run_at_most(const Arguments& a, const Tile& tile, KeyBlock block, const float* mask, Strip strip) {
  if constexpr (kVectors > 1) {
    if (tile.count <= (kVectors - 1) * kLanes) {
      return run_at_most<kLanes, kVectors - 1, kMostVectors, kSums>(a, tile, block, mask, strip);
    }
  }
  run_strip<kLanes, kVectors, kMostVectors, kSums>(a, tile, block, mask, strip);
}

// Of a tile, the queries from `begin` on, `width` at most.
inline Tile strip_of(const Tile& tile, size_t begin, size_t width) {
  return {tile.batch, tile.head, tile.first + begin, smaller(width, tile.count - begin)};
}

// All queries of a tile, in strips of kVectors vectors, which share blocks of keys. Rows of several heads lie
// far apart and compete for the same cache sets: values, of which a product needs all rows at a time, are
// packed; keys, of which it needs a few, only if several strips read them and they are many.
template <size_t kLanes, size_t kVectors, size_t kSums>
void run_queries(const Arguments& a, const Tile& tile, const float* mask, float* scratch) {
  constexpr size_t kWidth = kVectors * kLanes;
  const size_t key_width = (a.size + kLanes - 1) / kLanes * kLanes;
  const size_t value_width = (a.value_size + kLanes - 1) / kLanes * kLanes;
  const bool pack_keys = tile.count > kWidth && a.k.row != a.size && a.keys > kFewKeys;
  const size_t width = (tile.count + kWidth - 1) / kWidth * kWidth;
  float* queries = scratch;                           // of each strip: [size, kWidth]
  float* scores = queries + width * a.size;           // [kKeyBlock, kWidth]
  float* masks = scores + kKeyBlock * kWidth;         // at most [kKeyBlock, kWidth]
  float* factors = masks + kKeyBlock * kWidth;        // [kWidth]
  float* values = factors + kWidth;                   // [kKeyBlock, value_width]
  float* results = values + kKeyBlock * value_width + kApart;  // [width, value_width]
  float* tops = results + width * value_width;        // [width]
  float* sums = tops + width;                         // [width]
  float* keys = sums + width;                         // [kKeyBlock, key_width]
  for (size_t first = 0; first < a.keys; first += kKeyBlock) {
    const size_t count = smaller(kKeyBlock, a.keys - first);
    const Bytes k = at(rows_of(a.k, tile), first * a.k.row);
    if (pack_keys) pack_rows<kLanes>(k, a.k.row, count, a.size, key_width, keys);
    pack_rows<kLanes>(at(rows_of(a.v, tile), first * a.v.row), a.v.row, count, a.value_size, value_width,
                      values);
    const KeyBlock block = {first,  count,      pack_keys ? at(keys, 0) : k, pack_keys ? key_width : a.k.row,
                            values, value_width};
    for (size_t begin = 0; begin < tile.count; begin += kWidth) {
      const Strip strip = {queries + begin * a.size,
                           tops + begin,
                           sums + begin,
                           results + begin * value_width,
                           scores,
                           masks,
                           factors};
      run_at_most<kLanes, kVectors, kVectors, kSums>(
          a, strip_of(tile, begin, kWidth), block, mask == nullptr ? nullptr : mask + begin * a.keys, strip);
    }
  }
}

// scores[i] = scale * (q . k[i]) for kRows keys
template <size_t kLanes, size_t kRows>
inline void dot_products(Bytes q, Bytes k, size_t row, size_t size, float scale, float* scores) {
  Vector<kLanes> sums[kRows] = {};
  Vector<1> rest[kRows] = {};
  size_t c = 0;
  for (; c + kLanes <= size; c += kLanes) {
    const Vector<kLanes> left = load<kLanes>(at(q, c));
#pragma GCC unroll 8
    for (size_t i = 0; i < kRows; ++i) sums[i] += left * load<kLanes>(at(k, i * row + c));
  }
  for (; c < size; ++c) {
    const Vector<1> left = load<1>(at(q, c));
#pragma GCC unroll 8
    for (size_t i = 0; i < kRows; ++i) rest[i] += left * load<1>(at(k, i * row + c));
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kRows; ++i) scores[i] = (add_lanes<kLanes>(sums[i]) + rest[i][0]) * scale;
}

template <size_t kLanes>
void run_query(const Arguments& a, const Tile& tile, size_t query, float* scores) {
  using V = Vector<kLanes>;
  const Bytes q = at(rows_of(a.q, tile), query * a.q.row);
  float* y = result_row(a, tile, query);
  float top = -__builtin_inff(), sum = 0;
  for (size_t key = 0; key < a.keys; key += kKeyBlock) {
    const size_t keys = smaller(kKeyBlock, a.keys - key), padded = (keys + kLanes - 1) / kLanes * kLanes;
    const Bytes k = at(rows_of(a.k, tile), key * a.k.row);
    in_pieces<4>(keys, [&]<size_t n>(size_t j, Count<n>) {
      dot_products<kLanes, n>(q, at(k, j * a.k.row), a.k.row, a.size, a.scale, scores + j);
    });
    if (const Mask& m = a.mask; m.data != nullptr) {
      const Bytes mask = at(m.data, tile.batch * m.batch + tile.head * m.head + query * m.row + key * m.key);
      for (size_t j = 0; j < keys; ++j) scores[j] += load_float(at(mask, j * m.key));
    }
    for (size_t j = keys; j < padded; ++j) scores[j] = -__builtin_inff();
    float new_top = top;
    for (size_t j = 0; j < keys; ++j) new_top = scores[j] > new_top ? scores[j] : new_top;
    const Vector<1> finite = finite_top<1>(splat<1>(new_top));
    const float factor = weight<1>(splat<1>(top), finite)[0];
    V sums = {};
    for (size_t j = 0; j < padded; j += kLanes) {
      const V w = weight<kLanes>(load<kLanes>(scores + j), splat<kLanes>(finite[0]));
      store<kLanes>(scores + j, w);
      sums += w;
    }
    top = new_top;
    sum = sum * factor + add_lanes<kLanes>(sums);
    const Bytes values = at(rows_of(a.v, tile), key * a.v.row);
    const size_t whole = a.value_size / kLanes * kLanes;
    const auto add = [&]<size_t lanes>(size_t begin, size_t size, Count<lanes>) {
      in_pieces<4>(size / lanes, [&]<size_t n>(size_t column, Count<n>) {
        const size_t c = begin + column * lanes;
        Vector<lanes> s[1][n] = {};
        if (key > 0) {
          for (size_t v = 0; v < n; ++v) s[0][v] = load<lanes>(y + c + v * lanes) * factor;
        }
        multiply<lanes>(at(scores, 0), 0, 1, at(values, c), a.v.row, keys, s);
        for (size_t v = 0; v < n; ++v) store<lanes>(y + c + v * lanes, s[0][v]);
      });
    };
    add(0, whole, Count<kLanes>());
    add(whole, a.value_size - whole, Count<1>());
  }
  if (a.nan_to_zero && !(sum > 0)) {
    if (sum != sum) weigh_with_zeros(a, tile, y);  // else all scores are -Inf, all weights 0 already
    return;
  }
  for (size_t c = 0; c < a.value_size; ++c) y[c] /= sum;
}

template <size_t kLanes, size_t kVectors, size_t kSums>
void run_tile(const Arguments& a, const Tile& tile, const float* mask, float* scratch) {
  if (tile.count > kFewQueries) return run_queries<kLanes, kVectors, kSums>(a, tile, mask, scratch);
  for (size_t i = 0; i < tile.count; ++i) run_query<kLanes>(a, tile, tile.first + i, scratch);
}

// The mask of one strip: [keys, vectors of the strip]
template <size_t kLanes, size_t kVectors>
void lay_mask_of_strip(const Arguments& a, const Tile& tile, float* to) {
  if constexpr (kVectors > 1) {
    if (tile.count <= (kVectors - 1) * kLanes) return lay_mask_of_strip<kLanes, kVectors - 1>(a, tile, to);
  }
  lay_mask<kLanes, kVectors>(a, tile, 0, a.keys, to);
}

// One strip behind the other
template <size_t kLanes, size_t kVectors>
void lay_mask_of_tile(const Arguments& a, const Tile& tile, float* to) {
  constexpr size_t kWidth = kVectors * kLanes;
  for (size_t begin = 0; begin < tile.count; begin += kWidth) {
    lay_mask_of_strip<kLanes, kVectors>(a, strip_of(tile, begin, kWidth), to + begin * a.keys);
  }
}

template <size_t kLanes, size_t kVectors, size_t kSums>
constexpr Kernel make_kernel(const KernelRow& row) {
  constexpr size_t kStrip = kLanes * kVectors;
  return {agreed(row, kLanes, row.tile / kStrip * kStrip), run_tile<kLanes, kVectors, kSums>,
          lay_mask_of_tile<kLanes, kVectors>};
}

}  // namespace
}  // namespace sparse_ops::attention
