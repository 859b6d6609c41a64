// What the operators on images share: how a convolution moves over its input, the activation, and the input
// itself.
#pragma once

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/spconv/spconv.h"
#include "ops/op_support.h"

namespace sparse_ops {

inline size_t size_of(int64_t value) { return static_cast<size_t>(value); }

// As a node has them, for one axis or two; named with a prefix where there are two windows.
struct Window {
  // Far more than any image has, and so little that sums and products of sizes cannot overflow.
  static constexpr int64_t kLargest = int64_t{1} << 24;

  std::vector<int64_t> kernel_shape, strides, pads, dilations;
  std::string prefix;

  // `integers` returns the attribute of a name.
  template <class Integers>
  static Window read(const std::string& prefix, Integers integers) {
    const auto get = [&](const char* name) { return integers((prefix + name).c_str()); };
    return {get("kernel_shape"), get("strides"), get("pads"), get("dilations"), prefix};
  }
  // Checked: what is wrong with them is an InvalidError.
  static Window read(const std::string& prefix, const NodeReader& node) {
    Window window = read(prefix, [&](const char* name) { return node.integers(name); });
    if (const std::string problem = window.problem(); !problem.empty()) node.fail(problem);
    return window;
  }

  size_t axes() const { return kernel_shape.size() == 1 ? 1 : 2; }

  // What is wrong with them, or "".
  std::string problem() const {
    const auto check = [&](const char* name, const std::vector<int64_t>& values, size_t count,
                           int64_t least) {
      bool good = values.size() == count;
      for (int64_t value : values) good = good && value >= least && value <= kLargest;
      return good ? ""
                  : "attribute " + prefix + name + " is " + text_of(values) + ", expected " +
                        std::to_string(count) + (count == 1 ? " number from " : " numbers from ") +
                        std::to_string(least) + " to " + std::to_string(kLargest);
    };
    for (const std::string& problem :
         {check("kernel_shape", kernel_shape, axes(), 1), check("strides", strides, axes(), 1),
          check("pads", pads, 2 * axes(), 0), check("dilations", dilations, axes(), 1)}) {
      if (!problem.empty()) return problem;
    }
    return "";
  }

  spconv::Axis axis(size_t i) const {
    return {size_of(kernel_shape[i]), size_of(strides[i]), size_of(pads[i]), size_of(pads[i + axes()]),
            size_of(dilations[i])};
  }
  // What has one axis is an image of one row.
  spconv::Axis rows() const { return axes() == 1 ? spconv::Axis{1, 1, 0, 0, 1} : axis(0); }
  spconv::Axis columns() const { return axis(axes() - 1); }

  // The weight's K must hold whole windows.
  void check_fits(const NodeReader& node, size_t K) const {
    const size_t taps = rows().kernel * columns().kernel;
    if (K % taps != 0) {
      node.fail("attribute K is " + std::to_string(K) + ", no multiple of the " + std::to_string(taps) +
                " elements of kernel_shape");
    }
  }

  // `shape` [batch, channels, sizes...] of the input to the one of an output with N channels.
  void infer(SymbolicShape& shape, int64_t N) const {
    shape.dims[1] = N;
    for (size_t i = 0; i < axes(); ++i) {
      int64_t& size = shape.dims[2 + i];
      if (size >= 0) size = static_cast<int64_t>(spconv::output_size(axis(i), size_of(size)));
    }
    for (size_t dim = 1; dim < 2 + axes(); ++dim) shape.names[dim] = "";
  }
};

// The limits of a clip are attributes, those of ReLU are known.
inline spconv::MapEpilogue read_epilogue(const NodeReader& node, spconv::MapEpilogue::Activation activation,
                                         bool has_limits) {
  if (!has_limits) return {activation, 0.0f, std::numeric_limits<float>::infinity()};
  const spconv::MapEpilogue epilogue = {activation, node.number("min"), node.number("max")};
  if (!(epilogue.low <= epilogue.high)) node.fail("attribute min is not at most attribute max");
  return epilogue;
}

// Input X [batch, channels, height, width], or [batch, channels, width] where windows have one axis.
template <class Tensor>
struct Images {
  Tensor x;
  size_t batch, height, width;
};
// `where` names the node in the error.
template <class Tensor>
inline Images<Tensor> images_of(Tensor x, const std::string& where, size_t channels, size_t axes) {
  if (x.dims.size() != 2 + axes || x.dims[1] != static_cast<int64_t>(channels)) {
    throw InvalidError{where + ": input X has shape " + text_of(x.dims) + ", expected [batch, " +
                       std::to_string(channels) + (axes == 1 ? ", width]" : ", height, width]")};
  }
  const size_t batch = size_of(x.dims[0]), width = size_of(x.dims.back());
  const size_t height = axes == 1 ? 1 : size_of(x.dims[2]);
  return {std::move(x), batch, height, width};
}
inline Images<InputTensor> images_input(const OrtApi& api, const OrtKernelContext* context,
                                        const std::string& where, size_t channels, size_t axes) {
  return images_of(float_input(api, context, 0), where, channels, axes);
}

// The sizes of an output for such an input; an error where the window does not fit even once.
struct OutputSizes {
  size_t height, width;
};
template <class Tensor>
inline OutputSizes output_sizes(const Images<Tensor>& images, const std::string& where, const spconv::Axis& rows,
                                const spconv::Axis& columns) {
  const OutputSizes sizes = {spconv::output_size(rows, images.height),
                             spconv::output_size(columns, images.width)};
  if (sizes.height == 0 || sizes.width == 0) {
    throw InvalidError{where + ": the window of kernel_shape does not fit into input X of shape " +
                       text_of(images.x.dims) + " with its padding"};
  }
  return sizes;
}

// Attribute group of a weight [K, N] whose blocks have outputs of one group each.
inline size_t read_group(const NodeReader& node, size_t N, size_t block) {
  const int64_t given = node.integer("group");
  if (given < 1) node.fail("attribute group is " + std::to_string(given) + ", expected at least 1");
  const size_t group = size_of(given);
  if (N % group != 0 || (group > 1 && N / group % block != 0)) {
    node.fail("attribute N is " + std::to_string(N) + ", which does not make " + std::to_string(group) +
              " groups of whole blocks of " + std::to_string(block));
  }
  return group;
}

// The shape of an output of that many axes.
inline std::vector<int64_t> images_dims(size_t axes, size_t batch, size_t channels, size_t height,
                                        size_t width) {
  std::vector<int64_t> dims = {static_cast<int64_t>(batch), static_cast<int64_t>(channels)};
  if (axes == 2) dims.push_back(static_cast<int64_t>(height));
  dims.push_back(static_cast<int64_t>(width));
  return dims;
}

}  // namespace sparse_ops
