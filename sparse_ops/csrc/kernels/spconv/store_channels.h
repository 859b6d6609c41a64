// From accumulators to feature maps: residual and activation on the way. Included like generic.h.
#pragma once

#include "kernels/activations.h"
#include "kernels/spconv/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::spconv {
namespace {

template <class V>
constexpr size_t lanes_of = sizeof(V) / sizeof(float);

// Activations of a vector of any width.
struct Unchanged {
  template <class V>
  V operator()(V h) const {
    return h;
  }
};
struct Clip {
  float low, high;
  template <class V>
  V operator()(V h) const {
    return clip<lanes_of<V>>(h, splat<lanes_of<V>>(low), splat<lanes_of<V>>(high));
  }
};
struct Silu {
  template <class V>
  V operator()(V h) const {
    return silu<lanes_of<V>>(h);
  }
};
struct HardSwish {
  template <class V>
  V operator()(V h) const {
    return hard_swish<lanes_of<V>>(h);
  }
};

template <size_t kLanes, class Function>
inline void store_vector(const float* acc, const float* residual, float* y, Function function) {
  Vector<kLanes> h = load<kLanes>(acc);
  if (residual != nullptr) h += load<kLanes>(residual);
  store<kLanes>(y, function(h));
}

// Neither the residual nor y is touched behind its end: the last vector overlaps the one before, and what is
// shorter than a vector takes narrower ones.
template <size_t kLanes, class Function>
inline void store_row(const float* acc, size_t positions, const float* residual, float* y,
                      Function function) {
  if (positions >= kLanes) {
    const auto at = [&](size_t p) {
      store_vector<kLanes>(acc + p, residual == nullptr ? nullptr : residual + p, y + p, function);
    };
    size_t p = 0;
    for (; p + kLanes <= positions; p += kLanes) at(p);
    if (p < positions) at(positions - kLanes);
  } else if constexpr (kLanes > 4) {
    store_row<kLanes / 2>(acc, positions, residual, y, function);
  } else {
    for (size_t p = 0; p < positions; ++p) {
      Vector<kLanes> h = splat<kLanes>(acc[p]);
      if (residual != nullptr) h += residual[p];
      y[p] = function(h)[0];
    }
  }
}

template <size_t kLanes, class Function>
inline void store_rows(const float* acc, size_t acc_stride, size_t channels, size_t positions, size_t stride,
                       const float* residual, float* y, Function function) {
  if (positions == acc_stride && positions == stride) {
    positions *= channels;
    channels = 1;
  }
  for (size_t n = 0; n < channels; ++n) {
    store_row<kLanes>(acc + n * acc_stride, positions, residual == nullptr ? nullptr : residual + n * stride,
                      y + n * stride, function);
  }
}

// Calls use(the activation).
template <class Use>
inline void with_activation(const MapEpilogue& epilogue, Use use) {
  switch (epilogue.activation) {
    case MapEpilogue::Activation::none:
      return use(Unchanged{});
    case MapEpilogue::Activation::clip:
      return use(Clip{epilogue.low, epilogue.high});
    case MapEpilogue::Activation::silu:
      return use(Silu{});
    case MapEpilogue::Activation::hard_swish:
      return use(HardSwish{});
  }
}

template <size_t kLanes>
void store_channels(const MapEpilogue& epilogue, const float* acc, size_t acc_stride, size_t channels,
                    size_t positions, size_t stride, const float* residual, float* y) {
  with_activation(epilogue, [&](auto function) {
    store_rows<kLanes>(acc, acc_stride, channels, positions, stride, residual, y, function);
  });
}

}  // namespace
}  // namespace sparse_ops::spconv
