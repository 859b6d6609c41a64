// From the accumulators of a tile to feature maps: residual and activation on the way. Included like generic.h.
#pragma once

#include "kernels/activations.h"
#include "kernels/spmm/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::spmm {
namespace {

template <size_t kLanes, class Function>
inline void store_map(const float* acc, size_t positions, const float* residual, float* y,
                      Function function) {
  size_t p = 0;
  for (; p + kLanes <= positions; p += kLanes) {
    Vector<kLanes> h = load<kLanes>(acc + p);
    if (residual != nullptr) h += load<kLanes>(residual + p);
    store<kLanes>(y + p, function(h));
  }
  if (p == positions) return;
  // Neither the residual nor y may be touched behind its end.
  Vector<kLanes> h = {}, r = {};
  const size_t rest = (positions - p) * sizeof(float);
  __builtin_memcpy(&h, acc + p, rest);
  if (residual != nullptr) __builtin_memcpy(&r, residual + p, rest);
  h = function(h + r);
  __builtin_memcpy(y + p, &h, rest);
}

template <size_t kLanes, size_t kTile, class Function>
inline void store_maps(const float* acc, size_t channels, size_t positions, size_t stride,
                       const float* residual, float* y, Function function) {
  if (kTile == 1 && stride == 1) {  // maps of one element: the channels are neighbours
    return store_map<kLanes>(acc, channels, residual, y, function);
  }
  for (size_t n = 0; n < channels; ++n) {
    store_map<kLanes>(acc + n * kTile, positions, residual == nullptr ? nullptr : residual + n * stride,
                      y + n * stride, function);
  }
}

template <size_t kLanes, size_t kTile>
void store_channels(const MapEpilogue& epilogue, const float* acc, size_t channels, size_t positions,
                    size_t stride, const float* residual, float* y) {
  const auto maps = [&](auto function) {
    store_maps<kLanes, kTile>(acc, channels, positions, stride, residual, y, function);
  };
  using V = Vector<kLanes>;
  switch (epilogue.activation) {
    case MapEpilogue::Activation::none:
      return maps([](V h) { return h; });
    case MapEpilogue::Activation::clip: {
      const V low = splat<kLanes>(epilogue.low), high = splat<kLanes>(epilogue.high);
      return maps([low, high](V h) { return clip<kLanes>(h, low, high); });
    }
    case MapEpilogue::Activation::silu:
      return maps([](V h) { return silu<kLanes>(h); });
    case MapEpilogue::Activation::hard_swish:
      return maps([](V h) { return hard_swish<kLanes>(h); });
  }
}

}  // namespace
}  // namespace sparse_ops::spmm
