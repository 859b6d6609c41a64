// Convolution of bytes with a sparse weight of int8 over images: Y = bytes(Conv(X - zero, W) + bias), NCHW.
//
// As in spconv, output positions of all images are cut into tiles and what they see is gathered into panels;
// here an element is a word, four neighbouring channels of one position, so that a row of a panel is what one
// stored quad multiplies. Words are made once for every element of X: where the window is one element, in the
// panel itself. Where it moves by one element, X is laid out with its padding, and positions are those of the
// padded rows: what a tile of them sees at a place of the window lies in one piece, and the few results in
// between are dropped.
#pragma once

#include <string>

#include "kernels/quads/quads.h"
#include "kernels/spconv/spconv.h"

namespace sparse_ops::quadconv {

using spconv::Axis;

// One convolution. `weight` is [K, N]: K counts the channels of a group in fours, the last ones padded, times
// taps times four: quad c * taps + t is of channels 4c to 4c + 3 and tap t. If group > 1, no block of the
// weight has channels of two groups.
struct Convolution {
  const quads::Weight& weight;
  Axis rows, columns;
  size_t group, channels;  // of X, in a group
  bool is_signed;          // X
  quads::ByteSteps steps;  // of X as if it were unsigned

  size_t taps() const { return rows.kernel * columns.kernel; }
  size_t fours() const { return weight.K / 4 / taps(); }  // of the channels of a group
};

// What is wrong with numbers that do not fit each other, of which those of the window, the weight and the
// steps are known to be good; or "".
std::string check(const Convolution& convolution);

// The sizes of one call, and which kernels it uses. Full tiles come first; the last, partial one may have
// another kernel.
struct Plan {
  const quads::Kernel* full;
  const quads::Kernel* last;
  const spconv::Kernel* copies;
  size_t images, height, width;  // of X
  size_t out_height, out_width;  // of Y
  enum class Way { direct, padded, gathered } way;  // from X to panels
  size_t rows, columns;                             // of X as words: with its padding, if `padded`
  size_t words;                                     // of X; 0 if `direct`
  size_t positions;                                 // of all tiles
  size_t strip;                  // tiles whose panels are in memory at a time
  size_t scratch_bytes;          // memory that run() needs, any alignment
};
// `threads`: those that the tasks are cut for; any number may run them.
Plan make_plan(const Convolution& convolution, size_t images, size_t height, size_t width, Features features,
               size_t threads = 1);
Plan make_plan(const Convolution& convolution, size_t images, size_t height, size_t width,
               const quads::Kernel& kernel, const spconv::Kernel& copies, size_t threads = 1);

// `x` [images, group * channels, height, width] to `y` [images, N, out_height, out_width]. Nothing may be
// empty. False only if `workers` failed.
bool run(const Plan& plan, const Convolution& convolution, const unsigned char* x, unsigned char* y, void* scratch,
         Workers& workers);

}  // namespace sparse_ops::quadconv
