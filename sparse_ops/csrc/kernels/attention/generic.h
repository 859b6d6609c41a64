// The kernel's body for any vector width. Included by one source file per instruction set.
//
// Queries lie in the lanes of vectors: those of a tile are transposed once, scores are made and kept transposed, and
// the result is transposed back. So keys and values are read where they are, element by element, each for many
// queries; and a maximum or a sum over keys is one of whole vectors. Keys come in blocks; when a later one has a
// larger score, what was summed so far is made smaller (online softmax: Milakov and Gimelshein, 2018).
//
// Few queries would leave most lanes empty. For them, channels lie in the lanes.
#pragma once

#include "kernels/activations.h"
#include "kernels/attention/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::attention {
namespace {

using Bytes = const unsigned char*;

inline Bytes at(const void* array, size_t index) { return static_cast<Bytes>(array) + index * sizeof(float); }

inline Bytes rows_of(const Operand& x, size_t batch, size_t head) {
  return at(x.data, batch * x.batch + head * x.head);
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

// to[c * to_row + r] = from[r * from_row + c] for c < columns and r < kLanes; rows from `rows` on are like the last.
template <size_t kLanes, bool kFull>
inline void transpose_in(Bytes from, size_t from_row, size_t rows, size_t columns, float* to, size_t to_row) {
  const auto place = [&](size_t r, size_t c) { return at(from, (kFull ? r : smaller(r, rows - 1)) * from_row + c); };
  size_t c = 0;
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

// to[r * to_row + c] = from[c * from_row + r] * factor[r] for c < columns, r < kLanes and r < rows.
template <size_t kLanes>
inline void transpose_out(const float* from, size_t from_row, Vector<kLanes> factor, size_t rows, size_t columns,
                          float* to, size_t to_row) {
  size_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Vector<kLanes> square[kLanes];
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) square[i] = load<kLanes>(from + (c + i) * from_row) * factor;
    transpose_square<kLanes>(square);
    if (rows >= kLanes) {
#pragma GCC unroll 16
      for (size_t r = 0; r < kLanes; ++r) store<kLanes>(to + r * to_row + c, square[r]);
    } else {
      for (size_t r = 0; r < rows; ++r) store<kLanes>(to + r * to_row + c, square[r]);
    }
  }
  for (; c < columns; ++c) {
    const Vector<kLanes> last = load<kLanes>(from + c * from_row) * factor;
    for (size_t r = 0; r < kLanes && r < rows; ++r) to[r * to_row + c] = last[r];
  }
}

// What is subtracted from scores before they go into the exponential: the largest, but a number where that is -Inf.
template <size_t kLanes>
inline Vector<kLanes> finite_top(Vector<kLanes> top) {
  const Vector<kLanes> least = splat<kLanes>(-__FLT_MAX__);
  return top < least ? least : top;
}

template <size_t kLanes>
inline Vector<kLanes> weight(Vector<kLanes> score, Vector<kLanes> top) {
  const Vector<kLanes> least = splat<kLanes>(kExponentialZero), x = score - top;
  return exponential<kLanes>(x < least ? least : x);  // NaN stays
}

// The mask of a tile and a block of keys as vectors of queries: element (key, vector) at data[key * step + vector *
// across].
struct MaskVectors {
  const float* data;
  size_t step, across;
};

template <size_t kLanes, size_t kVectors>
MaskVectors mask_vectors(const Arguments& a, const Tile& tile, size_t head, size_t key, size_t keys, float* to) {
  const Mask& mask = a.mask;
  if (mask.data == nullptr) {
    store<kLanes>(to, Vector<kLanes>{});
    return {to, 0, 0};
  }
  const Bytes from =
      at(mask.data, tile.batch * mask.batch + head * mask.head + tile.first * mask.row + key * mask.key);
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
        const float same = r < rows ? load_float(at(strip, r * mask.row)) : 0.0f;
        for (size_t j = 0; j < keys; ++j) to[(j * kVectors + v) * kLanes + r] = same;
      }
    }
  }
  return {to, kVectors * kLanes, kLanes};
}

// At most kLanes * kVectors queries; sums of kRows * kVectors <= kSums vectors fit into registers.
template <size_t kLanes, size_t kVectors, size_t kSums>
void run_queries(const Arguments& a, const Tile& tile, float* scratch) {
  using V = Vector<kLanes>;
  constexpr size_t kRows = smaller(8, kSums / kVectors), kWidth = kVectors * kLanes;
  float* queries = scratch;                     // [size, kWidth]
  float* result = queries + a.size * kWidth;    // [value_size, kWidth]
  float* scores = result + a.value_size * kWidth;  // [kKeyBlock, kWidth]
  float* masks = scores + kKeyBlock * kWidth;   // at most [kKeyBlock, kWidth]
  // Heads may share the mask if there is one block of keys.
  const bool share_mask = a.mask.head == 0 && a.keys <= kKeyBlock;
  MaskVectors mask = {};
  for (size_t head = tile.head; head < tile.head_end; ++head) {
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t row = tile.first + v * kLanes;
      transpose_in<kLanes>(at(rows_of(a.q, tile.batch, head), row * a.q.row), a.q.row,
                           tile.count - v * kLanes, a.size, queries + v * kLanes, kWidth);
    }
    V top[kVectors], sum[kVectors];
    for (size_t v = 0; v < kVectors; ++v) top[v] = splat<kLanes>(-__builtin_inff()), sum[v] = V{};
    for (size_t key = 0; key < a.keys; key += kKeyBlock) {
      const size_t keys = smaller(kKeyBlock, a.keys - key);
      if (!share_mask || head == tile.head) {
        mask = mask_vectors<kLanes, kVectors>(a, tile, head, key, keys, masks);
      }
      const Bytes k = at(rows_of(a.k, tile.batch, head), key * a.k.row);
      V new_top[kVectors];
      for (size_t v = 0; v < kVectors; ++v) new_top[v] = top[v];
      in_pieces<kRows>(keys, [&]<size_t n>(size_t j, Count<n>) {
        V s[n][kVectors] = {};
        multiply<kLanes>(at(k, j * a.k.row), a.k.row, 1, at(queries, 0), kWidth, a.size, s);
#pragma GCC unroll 8
        for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
          for (size_t v = 0; v < kVectors; ++v) {
            const V score = s[i][v] * a.scale + load<kLanes>(mask.data + (j + i) * mask.step + v * mask.across);
            store<kLanes>(scores + (j + i) * kWidth + v * kLanes, score);
            new_top[v] = score > new_top[v] ? score : new_top[v];
          }
        }
      });
      V factor[kVectors];
      for (size_t v = 0; v < kVectors; ++v) {
        const V finite = finite_top<kLanes>(new_top[v]);
        factor[v] = weight<kLanes>(top[v], finite);
        top[v] = new_top[v];
        new_top[v] = finite;
        sum[v] *= factor[v];
      }
      for (size_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          float* place = scores + j * kWidth + v * kLanes;
          const V w = weight<kLanes>(load<kLanes>(place), new_top[v]);
          store<kLanes>(place, w);
          sum[v] += w;
        }
      }
      const Bytes values = at(rows_of(a.v, tile.batch, head), key * a.v.row);
      in_pieces<kRows>(a.value_size, [&]<size_t n>(size_t c, Count<n>) {
        V s[n][kVectors] = {};
        if (key > 0) {
#pragma GCC unroll 8
          for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
            for (size_t v = 0; v < kVectors; ++v) {
              s[i][v] = load<kLanes>(result + (c + i) * kWidth + v * kLanes) * factor[v];
            }
          }
        }
        multiply<kLanes>(at(values, c), 1, a.v.row, at(scores, 0), kWidth, keys, s);
#pragma GCC unroll 8
        for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
          for (size_t v = 0; v < kVectors; ++v) store<kLanes>(result + (c + i) * kWidth + v * kLanes, s[i][v]);
        }
      });
    }
    const size_t y_row = a.heads * a.value_size;
    for (size_t v = 0; v < kVectors; ++v) {
      float* y = a.y + (tile.batch * a.queries + tile.first + v * kLanes) * y_row + head * a.value_size;
      transpose_out<kLanes>(result + v * kLanes, kWidth, 1.0f / sum[v], tile.count - v * kLanes, a.value_size,
                            y, y_row);
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

// y = y * factor + weights · values, or without the first term
template <size_t kLanes, size_t kVectors>
inline void add_values(const float* weights, Bytes values, size_t row, size_t keys, bool first, float factor,
                       float* y) {
  Vector<kLanes> s[1][kVectors] = {};
  if (!first) {
    for (size_t v = 0; v < kVectors; ++v) s[0][v] = load<kLanes>(y + v * kLanes) * factor;
  }
  multiply<kLanes>(at(weights, 0), 0, 1, values, row, keys, s);
  for (size_t v = 0; v < kVectors; ++v) store<kLanes>(y + v * kLanes, s[0][v]);
}

template <size_t kLanes>
void run_query(const Arguments& a, size_t batch, size_t head, size_t query, float* scores) {
  using V = Vector<kLanes>;
  const Bytes q = at(rows_of(a.q, batch, head), query * a.q.row);
  float* y = a.y + ((batch * a.queries + query) * a.heads + head) * a.value_size;
  float top = -__builtin_inff(), sum = 0;
  for (size_t key = 0; key < a.keys; key += kKeyBlock) {
    const size_t keys = smaller(kKeyBlock, a.keys - key), padded = (keys + kLanes - 1) / kLanes * kLanes;
    const Bytes k = at(rows_of(a.k, batch, head), key * a.k.row);
    in_pieces<4>(keys, [&]<size_t n>(size_t j, Count<n>) {
      dot_products<kLanes, n>(q, at(k, j * a.k.row), a.k.row, a.size, a.scale, scores + j);
    });
    if (const Mask& m = a.mask; m.data != nullptr) {
      const Bytes mask = at(m.data, batch * m.batch + head * m.head + query * m.row + key * m.key);
      for (size_t j = 0; j < keys; ++j) scores[j] += load_float(at(mask, j * m.key));
    }
    for (size_t j = keys; j < padded; ++j) scores[j] = -__builtin_inff();
    float new_top = top;
    for (size_t j = 0; j < keys; ++j) new_top = scores[j] > new_top ? scores[j] : new_top;
    const Vector<1> finite = finite_top<1>(splat<1>(new_top));
    const float factor = weight<1>(splat<1>(top), finite)[0];
    const V tops = splat<kLanes>(finite[0]);
    V sums = {};
    for (size_t j = 0; j < padded; j += kLanes) {
      const V w = weight<kLanes>(load<kLanes>(scores + j), tops);
      store<kLanes>(scores + j, w);
      sums += w;
    }
    top = new_top;
    sum = sum * factor + add_lanes<kLanes>(sums);
    const Bytes values = at(rows_of(a.v, batch, head), key * a.v.row);
    size_t c = 0;
    for (; c + 4 * kLanes <= a.value_size; c += 4 * kLanes) {
      add_values<kLanes, 4>(scores, at(values, c), a.v.row, keys, key == 0, factor, y + c);
    }
    for (; c + kLanes <= a.value_size; c += kLanes) {
      add_values<kLanes, 1>(scores, at(values, c), a.v.row, keys, key == 0, factor, y + c);
    }
    for (; c < a.value_size; ++c) {
      add_values<1, 1>(scores, at(values, c), a.v.row, keys, key == 0, factor, y + c);
    }
  }
  for (size_t c = 0; c < a.value_size; ++c) y[c] /= sum;
}

// kVectors: those of a tile; fewer where queries are left over
template <size_t kLanes, size_t kVectors, size_t kSums>
void run_tile(const Arguments& a, const Tile& tile, float* scratch) {
  if constexpr (kVectors > 1) {
    if (tile.count <= (kVectors - 1) * kLanes) return run_tile<kLanes, kVectors - 1, kSums>(a, tile, scratch);
  } else if (tile.count <= kFewQueries) {
    for (size_t head = tile.head; head < tile.head_end; ++head) {
      for (size_t i = 0; i < tile.count; ++i) run_query<kLanes>(a, tile.batch, head, tile.first + i, scratch);
    }
    return;
  }
  run_queries<kLanes, kVectors, kSums>(a, tile, scratch);
}

}  // namespace
}  // namespace sparse_ops::attention
