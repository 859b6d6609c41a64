// A band of the rows of one map with its padding around it, as depthwise convolutions take it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "kernels/spconv/spconv.h"

namespace sparse_ops::spconv {

// Rows and columns are counted from the padding's first ones. A band of output rows first..first+rows-1 is
// laid out from padded row first * stride on, so that a window finds what it sees in padding and map alike.
struct PaddedMap {
  Axis rows, columns;
  size_t height, width;  // of the map
  size_t out_height, out_width;
  size_t pitch;  // floats from a row to the next

  PaddedMap(const Axis& row_axis, const Axis& column_axis, size_t map_height, size_t map_width)
      : rows(row_axis),
        columns(column_axis),
        height(map_height),
        width(map_width),
        out_height(output_size(row_axis, map_height)),
        out_width(output_size(column_axis, map_width)),
        pitch(std::max(column_axis.begin + map_width, reach(column_axis, out_width))) {}

  // What `count` outputs see.
  static size_t reach(const Axis& axis, size_t count) {
    return (count - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1;
  }

  // Of a band of `count` output rows, with what kernels may touch behind.
  size_t floats(size_t count) const { return reach(rows, count) * pitch + kMapSlack; }

  // The rows of the map that a band sees: begin..end-1; row `begin` is row `offset` of the band.
  struct Rows {
    size_t begin, end, offset;
  };
  Rows seen(size_t first, size_t count) const {
    const size_t top = first * rows.stride, bottom = top + reach(rows, count);
    const size_t begin = std::min(std::max(top, rows.begin) - rows.begin, height);
    const size_t end = std::clamp(bottom - std::min(bottom, rows.begin), begin, height);
    return {begin, end, begin + rows.begin - std::min(top, begin + rows.begin)};
  }

  // Zeros in the rows of a band that lie in the padding.
  void clear_outside(size_t first, size_t count, float* band) const {
    const Rows inside = seen(first, count);
    const size_t all = reach(rows, count), end = inside.offset + (inside.end - inside.begin);
    std::memset(band, 0, std::min(inside.offset, all) * pitch * sizeof(float));
    if (end < all) std::memset(band + end * pitch, 0, (all - end) * pitch * sizeof(float));
  }

  // What `filter`, with all taps of the window, gives on a band.
  MapProduct product(const unsigned char* filter, const unsigned char* bias, const float* band,
                     size_t count) const {
    MapProduct result{filter,
                      0.0f,
                      band,
                      rows.kernel,
                      columns.kernel,
                      rows.dilation * pitch,
                      columns.dilation,
                      rows.stride * pitch,
                      columns.stride,
                      count,
                      out_width};
    std::memcpy(&result.bias, bias, sizeof(result.bias));
    return result;
  }
};

}  // namespace sparse_ops::spconv
