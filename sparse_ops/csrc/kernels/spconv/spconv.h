// Convolution with a sparse weight over images: Y = act(Conv(X, W) + bias [+ R]), all NCHW float32.
//
// The output positions of all images form one axis, which is cut into tiles. For every tile the inputs that
// its positions see are gathered into a panel [K, tile] (im2col), K = channels of a group * taps of the
// window, and a kernel of spmm multiplies the panel by one block of output channels at a time.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/spconv/kernel.h"
#include "kernels/spmm/kernel.h"
#include "kernels/workers.h"

namespace sparse_ops::spconv {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The best kernel that needs none but `features`.
const Kernel& select_kernel(Features features);

// Of one spatial axis. `end` is the padding behind the image.
struct Axis {
  size_t kernel, stride, begin, end, dilation;
};

// Positions of the window on `size` elements: 0 where it does not fit even once.
size_t output_size(const Axis& axis, size_t size);

// One convolution. `weight` is [K, N]: K = channels / group * taps, N = output channels; if group > 1, no
// block of the weight has channels of two groups.
struct Convolution {
  const spmm::Weight& weight;
  Axis rows, columns;
  size_t group;
  MapEpilogue epilogue;

  size_t taps() const { return rows.kernel * columns.kernel; }
  size_t channels() const { return weight.K / taps() * group; }  // of X
};

// The sizes of one call, and which kernels it uses. Full tiles come first; the last, partial one may have
// another kernel.
struct Plan {
  const spmm::Kernel* full;
  const spmm::Kernel* last;
  const Kernel* maps;
  size_t images, height, width;  // of X
  size_t out_height, out_width;  // of Y
  size_t strip;                  // tiles whose panels are in memory at a time
  size_t scratch_bytes;          // memory that run() needs, any alignment
};
// `threads`: those that the tasks are cut for; any number may run them.
Plan make_plan(const Convolution& convolution, size_t images, size_t height, size_t width, Features features,
               size_t threads = 1);
Plan make_plan(const Convolution& convolution, size_t images, size_t height, size_t width,
               const spmm::Kernel& products, const Kernel& maps, size_t threads = 1);

// `x` [images, channels, height, width] to `y` [images, N, out_height, out_width]; `residual` is nullptr or
// has y's shape. Nothing may be empty. False only if `workers` failed.
bool run(const Plan& plan, const Convolution& convolution, const float* x, const float* residual, float* y,
         void* scratch, Workers& workers);

}  // namespace sparse_ops::spconv
