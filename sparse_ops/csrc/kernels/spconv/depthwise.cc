#include "kernels/spconv/depthwise.h"

#include <algorithm>
#include <cstring>

#include "kernels/sizes.h"
#include "kernels/spconv/copy.h"
#include "kernels/spconv/padded_map.h"

namespace sparse_ops::spconv {
namespace {

constexpr size_t kBandFloats = 8192;   // a first-level cache
constexpr size_t kMaxTaps = 255;       // as many as a chunk has
constexpr size_t kTaskFloats = 16384;  // outputs of one task, about

struct Call {
  const Plan& plan;
  const Convolution& conv;
  PaddedMap map;
  size_t band;  // output rows at a time
  const float* x;
  const float* residual;
  float* y;
  size_t slice, slices;  // channels of a task, and how many such there are
};

PaddedMap padded_map(const Plan& plan, const Convolution& c) {
  return PaddedMap(c.rows, c.columns, plan.height, plan.width);
}

// Output rows that fit into a band; 0 if not even one does.
size_t rows_of_band(const PaddedMap& map) {
  size_t rows = 0;
  while (rows < map.out_height && map.floats(rows + 1) <= kBandFloats) ++rows;
  return rows;
}

// The map's part of a band whose left and right borders are zeros.
void fill(const PaddedMap& map, const float* from, size_t first, size_t count, float* band) {
  map.clear_outside(first, count, band);
  const PaddedMap::Rows rows = map.seen(first, count);
  float* to = band + rows.offset * map.pitch + map.columns.begin;
  for (size_t row = rows.begin; row < rows.end; ++row, to += map.pitch) {
    copy_row(from + row * map.width, map.width, to);
  }
}

void channel(const Call& call, size_t image, size_t n, float* band) {
  const PaddedMap& map = call.map;
  const spmm::Weight& weight = call.conv.weight;
  float filter[kMaxTaps] = {};
  const size_t begin = weight.block_entries[n];
  for (size_t e = begin; e < begin + weight.counts[n]; ++e) {
    std::memcpy(filter + weight.offsets[e], weight.values + e * sizeof(float), sizeof(float));
  }
  const size_t index = image * weight.N + n;
  for (size_t first = 0; first < map.out_height; first += call.band) {
    const size_t rows = std::min(call.band, map.out_height - first);
    fill(map, call.x + index * map.height * map.width, first, rows, band);
    const MapProduct product = map.product(reinterpret_cast<const unsigned char*>(filter),
                                           weight.bias + n * sizeof(float), band, rows);
    const size_t at = (index * map.out_height + first) * map.out_width;
    call.plan.maps->depthwise(call.conv.epilogue, product,
                              call.residual == nullptr ? nullptr : call.residual + at, call.y + at);
  }
}

void task(void* context, size_t index) {
  const Call& call = *static_cast<const Call*>(context);
  alignas(kCacheLine) float band[kBandFloats];
  std::memset(band, 0, call.map.floats(call.band) * sizeof(float));
  const size_t begin = index % call.slices * call.slice;
  for (size_t n = begin; n < std::min(begin + call.slice, call.conv.weight.N); ++n) {
    channel(call, index / call.slices, n, band);
  }
}

}  // namespace

bool fits_depthwise(const Plan& plan, const Convolution& c) {
  const spmm::Weight& w = c.weight;
  return w.N == c.group && w.K == c.taps() && w.block == 1 && w.chunks == 1 &&
         rows_of_band(padded_map(plan, c)) > 0;
}

bool run_depthwise(const Plan& plan, const Convolution& c, const float* x, const float* residual, float* y,
                   Workers& workers) {
  const size_t outputs = plan.out_height * plan.out_width;
  const size_t slice = std::clamp<size_t>(kTaskFloats / outputs, 1, c.weight.N);
  const PaddedMap map = padded_map(plan, c);
  Call call{plan, c, map, rows_of_band(map), x, residual, y, slice, divide_up(c.weight.N, slice)};
  return workers.run(plan.images * call.slices, task, &call);
}

}  // namespace sparse_ops::spconv
