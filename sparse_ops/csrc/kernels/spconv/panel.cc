#include "kernels/spconv/panel.h"

#include <algorithm>


namespace sparse_ops::spconv {
namespace {

constexpr size_t kMaxTapPieces = 3 * kMaxTile + 1;  // a run gives at most three
using PieceList = List<Piece, 2 * kMaxTapPieces>;

constexpr float kZeros[kMaxTile] = {};

// First and one past the last of `count` positions from `start` on at which the tap lies in 0..size-1.
struct Range {
  size_t begin, end;
};
Range inside(const Axis& axis, size_t start, size_t count, size_t tap, size_t size) {
  const size_t at = start * axis.stride + tap * axis.dilation;  // counted from the padding's first element
  const size_t begin = at >= axis.begin ? 0 : (axis.begin - at + axis.stride - 1) / axis.stride;
  const size_t limit = axis.begin + size;
  const size_t end = at >= limit ? 0 : (limit - at + axis.stride - 1) / axis.stride;
  const size_t last = std::min(end, count);
  return {std::min(begin, last), last};
}

// Add the pieces of one tap, whose row of the panel begins at `to`.
void add_tap(const Source& s, const Runs& runs, size_t tap_row, size_t tap_column, size_t tile, size_t to,
             PieceList& pieces) {
  const auto zeros = [&](size_t begin, size_t end) {
    if (begin < end) pieces.push({to + begin, end - begin, 0, true});
  };
  size_t lane = 0;
  for (const Run& run : runs) {
    const Range rows = inside(s.rows, run.row, 1, tap_row, s.height);
    const Range columns = inside(s.columns, run.column, run.count, tap_column, s.width);
    lane = run.lane + run.count;
    if (rows.begin == rows.end || columns.begin == columns.end) {
      zeros(run.lane, lane);
      continue;
    }
    const size_t row = run.row * s.rows.stride + tap_row * s.rows.dilation - s.rows.begin;
    const size_t column =
        (run.column + columns.begin) * s.columns.stride + tap_column * s.columns.dilation - s.columns.begin;
    zeros(run.lane, run.lane + columns.begin);
    pieces.push({to + run.lane + columns.begin, columns.end - columns.begin,
                 run.image * s.image_stride + row * s.width + column, false});
    zeros(run.lane + columns.end, lane);
  }
  zeros(lane, tile);
}

}  // namespace

Runs runs_of(size_t first, size_t count, size_t out_height, size_t out_width) {
  Runs runs;
  for (size_t lane = 0; lane < count;) {
    const size_t row = (first + lane) / out_width, column = (first + lane) % out_width;
    const size_t length = std::min(out_width - column, count - lane);
    runs.push({row / out_height, row % out_height, column, lane, length});
    lane += length;
  }
  return runs;
}

Source make_source(const Convolution& c, const float* x, size_t height, size_t width) {
  const auto is_pointwise = [](const Axis& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.begin == 0 && axis.end == 0;
  };
  Source source{x, height, width, c.channels() * height * width, c.rows, c.columns};
  if (is_pointwise(c.rows) && is_pointwise(c.columns)) {
    source.width = height * width;
    source.height = 1;
  }
  return source;
}

void gather(const Kernel& kernel, const Source& source, const Runs& runs, size_t begin, size_t end, size_t tile,
            float* panel) {
  const size_t taps = source.rows.kernel * source.columns.kernel;
  const size_t plane = source.height * source.width;
  const float* outside = source.outside == nullptr ? kZeros : source.outside;
  PieceList pieces;
  for (size_t tap = 0; tap < taps;) {
    // As many taps as there is room for, so that a channel's rows are written one after another.
    for (pieces.clear(); tap < taps && pieces.room() >= kMaxTapPieces; ++tap) {
      add_tap(source, runs, tap / source.columns.kernel, tap % source.columns.kernel, tile, tap * tile,
              pieces);
    }
    kernel.copy_pieces({pieces.begin(), pieces.size(), source.columns.stride, outside},
                       source.x + begin * plane, plane, end - begin, taps * tile, panel + begin * taps * tile);
  }
}

}  // namespace sparse_ops::spconv
