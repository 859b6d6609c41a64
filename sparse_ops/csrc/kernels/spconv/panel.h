// Gathering what a tile of output positions sees of the input: im2col of one tile.
#pragma once

#include <cstddef>

#include "kernels/spconv/spconv.h"

namespace sparse_ops::spconv {

constexpr size_t kMaxTile = 256;  // of any kernel

// A list on the stack: tasks run on the threads of others, where nothing may be thrown.
template <class T, size_t kCapacity>
class List {
 public:
  void clear() { size_ = 0; }
  void push(const T& item) { items_[size_++] = item; }
  size_t room() const { return kCapacity - size_; }
  size_t size() const { return size_; }
  const T* begin() const { return items_; }
  const T* end() const { return items_ + size_; }

 private:
  T items_[kCapacity];
  size_t size_ = 0;
};

// Positions of one tile that lie in one row of one output image.
struct Run {
  size_t image, row, column;  // of the first position
  size_t lane, count;         // where they are in the tile
};

using Runs = List<Run, kMaxTile>;

// Positions first..first+count-1 of the axis of all output positions, count <= kMaxTile.
Runs runs_of(size_t first, size_t count, size_t out_height, size_t out_width);

// What a panel is made from.
struct Source {
  const float* x;  // the first channel wanted, of the first image
  size_t height, width;
  size_t image_stride;  // floats from an image to the next
  Axis rows, columns;
  const float* outside = nullptr;  // [kMaxTile]: what there is outside the image; nullptr: zeros
};

// All images of a call. Where the window is one element that visits all elements in order, rows need not be
// told apart: the source then has one row of all of them.
Source make_source(const Convolution& convolution, const float* x, size_t height, size_t width);

// Input channels begin..end-1 of the source into the rows of `panel` [channels * taps, tile] that belong to
// them: channel by channel, inside that tap by tap. Lanes outside all runs and taps outside the image hold
// what the source has outside.
void gather(const Kernel& kernel, const Source& source, const Runs& runs, size_t begin, size_t end, size_t tile,
            float* panel);

}  // namespace sparse_ops::spconv
