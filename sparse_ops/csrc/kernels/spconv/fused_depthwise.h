// A convolution with a sparse weight and the depthwise one behind it, as one: what lies between them, often
// the largest maps of a model, never leaves the second-level cache.
//
//   Y = act(Depthwise(act(Conv(X, W) + bias), filters) + filter bias)
//
// A task is a band of rows of Y and some blocks of channels. It gathers the panels of the positions that the
// band sees, then computes one block of the maps between at a time and the depthwise convolution of each.
#pragma once

#include <optional>

#include "kernels/spconv/spconv.h"

namespace sparse_ops::spconv {

// `first` has one group and both activations.
struct FusedDepthwise {
  Convolution first;
  Axis rows, columns;            // of the window of the depthwise convolution
  const unsigned char* filters;  // float32 [N, taps], any alignment
  const unsigned char* bias;     // float32 [N], any alignment
};

struct FusedPlan {
  const spmm::Kernel* full;
  const Kernel* maps;
  std::optional<Features>
      last;  // a narrower kernel with no more than these may take the last, partial tile of a band
  size_t images, height, width;  // of X
  size_t band_rows;              // rows of Y of a task
  size_t bands, parts;           // tasks of an image: bands, and parts of the channels
  size_t panel_floats;           // of the panels of a task,
  size_t map_floats;             // of one of its maps,
  size_t task_floats;            // and of all together
  size_t jobs;                   // tasks at a time
  size_t scratch_bytes;          // memory that run() needs, any alignment
};
// `threads`: as in spconv.h; no more than these work at a time.
FusedPlan make_plan(const FusedDepthwise& fused, size_t images, size_t height, size_t width,
                    Features features, size_t threads = 1);
FusedPlan make_plan(const FusedDepthwise& fused, size_t images, size_t height, size_t width,
                    const spmm::Kernel& products, const Kernel& maps, size_t threads = 1);

// `x` [images, channels, height, width] to `y` [images, N, out_height, out_width]. Nothing may be empty.
// False only if `workers` failed.
bool run(const FusedPlan& plan, const FusedDepthwise& fused, const float* x, float* y, void* scratch,
         Workers& workers);

}  // namespace sparse_ops::spconv
