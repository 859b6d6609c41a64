#include "kernels/spconv/spconv.h"

#include <algorithm>

#include "kernels/sizes.h"
#include "kernels/spconv/depthwise.h"
#include "kernels/spconv/panel.h"
#include "kernels/spconv/table.h"
#include "kernels/spmm/spmm.h"

namespace sparse_ops::spconv {
namespace {

// Panels in memory at a time: few enough to stay in the second-level cache, enough for every thread.
constexpr size_t kPanelBytes = size_t{1} << 19;
constexpr size_t kMaxPanelBytes = size_t{32} << 20;
constexpr size_t kSlice = 256;  // rows of a panel gathered by one task, about

// Floats of the panels of one tile: one for each group.
size_t panel_size(const Convolution& c, const spmm::Kernel& kernel) {
  return round_up(kernel.tile * c.weight.K, kCacheLine / sizeof(float));
}

// Everything that the tasks of one strip of tiles need.
struct Strip {
  const Plan& plan;
  const Convolution& conv;
  Source source;
  const float* residual;
  float* y;
  float* panels;
  size_t first;  // position
  size_t positions, tiles;
  size_t slices, slice;  // of a group's channels
  size_t out_rows, out_columns;

  size_t tile_positions(size_t tile) const {
    return std::min(plan.full->tile, positions - tile * plan.full->tile);
  }
  const spmm::Kernel& kernel(size_t tile) const {
    return tile_positions(tile) < plan.full->tile ? *plan.last : *plan.full;
  }
  float* panel(size_t tile, size_t group) const {
    return panels + panel_size(conv, *plan.full) * (tile * conv.group + group);
  }
  Runs runs(size_t tile, size_t rows, size_t columns) const {
    return runs_of(first + tile * plan.full->tile, tile_positions(tile), rows, columns);
  }
};

void gather_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  const Convolution& conv = strip.conv;
  const size_t channels = conv.channels() / conv.group;
  const size_t slice = index % strip.slices, group = index / strip.slices % conv.group;
  const size_t tile = index / strip.slices / conv.group;
  Source source = strip.source;
  source.x += group * channels * source.height * source.width;
  gather(*strip.plan.maps, source, strip.runs(tile, strip.out_rows, strip.out_columns), slice * strip.slice,
         std::min((slice + 1) * strip.slice, channels), strip.kernel(tile).tile, strip.panel(tile, group));
}

// `channels` pieces of `count` floats, `stride` floats apart, are wanted soon. Large maps are not in the
// second-level cache, and the pieces of one tile are on many pages, so that the processor does not foresee
// them.
void prefetch(const float* from, size_t channels, size_t count, size_t stride) {
  for (size_t n = 0; n < channels; ++n) {
    for (size_t i = 0; i < count; i += kCacheLine / sizeof(float))
      __builtin_prefetch(from + n * stride + i, 0, 2);
  }
}

// Neighbouring tasks share a block of the weight and continue each other's rows of the maps; the panels come
// from the cache.
void multiply_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  const Convolution& conv = strip.conv;
  const spmm::Weight& weight = conv.weight;
  const size_t tile = index % strip.tiles, block = index / strip.tiles;
  const size_t first = block * weight.block, channels = std::min(weight.block, weight.N - first);
  const spmm::Kernel& kernel = strip.kernel(tile);
  const size_t map = strip.plan.out_height * strip.plan.out_width;
  const Runs images = strip.runs(tile, 1, map);
  const auto place = [&](const Run& run) { return (run.image * weight.N + first) * map + run.column; };
  const bool large = weight.N * map * sizeof(float) > kPanelBytes;
  for (const Run& run : images) {
    if (!large) break;
    prefetch(strip.y + place(run), channels, run.count, map);
    if (strip.residual != nullptr) prefetch(strip.residual + place(run), channels, run.count, map);
  }
  alignas(kCacheLine) float acc[spmm::kMaxAccumulators];
  kernel.multiply(weight, block, strip.panel(tile, first / (weight.N / conv.group)), acc);
  for (const Run& run : images) {
    strip.plan.maps->store_channels(conv.epilogue, acc + run.lane, kernel.tile, channels, run.count, map,
                                    strip.residual == nullptr ? nullptr : strip.residual + place(run),
                                    strip.y + place(run));
  }
}

Plan make_plan(const Convolution& c, size_t images, size_t height, size_t width, const spmm::Kernel& full,
               const spmm::Kernel& last, const Kernel& maps, size_t threads) {
  const size_t out_height = output_size(c.rows, height), out_width = output_size(c.columns, width);
  const size_t panel_bytes = panel_size(c, full) * c.group * sizeof(float);
  const size_t wanted = std::max(kPanelBytes / panel_bytes, divide_up(threads, c.weight.blocks));
  const size_t possible = std::max<size_t>(1, kMaxPanelBytes / panel_bytes);
  const size_t tiles = std::max<size_t>(1, divide_up(images * out_height * out_width, full.tile));
  const size_t strip = std::min({wanted, possible, tiles});
  return {&full, &last,      &maps,     images, height,
          width, out_height, out_width, strip,  strip * panel_bytes + kCacheLine};
}

}  // namespace

Table<Kernel> kernels() { return kKernels; }

const Kernel& select_kernel(Features features) { return select_permitted<Kernel>(kKernels, features); }

size_t output_size(const Axis& axis, size_t size) {
  const size_t window = (axis.kernel - 1) * axis.dilation + 1, padded = axis.begin + size + axis.end;
  return padded < window ? 0 : (padded - window) / axis.stride + 1;
}

Plan make_plan(const Convolution& c, size_t images, size_t height, size_t width, Features features,
               size_t threads) {
  const size_t positions = images * output_size(c.rows, height) * output_size(c.columns, width);
  const spmm::Kernel& full = spmm::select_kernel(features, c.weight, positions);
  const spmm::Kernel& last = spmm::select_last(full, features, c.weight, positions % full.tile);
  return make_plan(c, images, height, width, full, last, select_kernel(features), threads);
}

Plan make_plan(const Convolution& c, size_t images, size_t height, size_t width, const spmm::Kernel& products,
               const Kernel& maps, size_t threads) {
  return make_plan(c, images, height, width, products, products, maps, threads);
}

bool run(const Plan& plan, const Convolution& conv, const float* x, const float* residual, float* y,
         void* scratch, Workers& workers) {
  if (fits_depthwise(plan, conv)) return run_depthwise(plan, conv, x, residual, y, workers);
  const size_t tile = plan.full->tile, positions = plan.images * plan.out_height * plan.out_width;
  const size_t channels = conv.channels() / conv.group;
  const size_t slice = std::max<size_t>(1, kSlice / conv.taps());
  const Source source = make_source(conv, x, plan.height, plan.width);
  const size_t out_rows = output_size(source.rows, source.height);
  const size_t out_columns = output_size(source.columns, source.width);
  float* panels = reinterpret_cast<float*>(round_up(reinterpret_cast<uintptr_t>(scratch), kCacheLine));
  for (size_t first = 0; first < positions; first += plan.strip * tile) {
    const size_t count = std::min(plan.strip * tile, positions - first), tiles = divide_up(count, tile);
    const size_t slices = divide_up(channels, slice);
    Strip strip{plan,  conv,  source, residual, y,        panels,     first,
                count, tiles, slices, slice,    out_rows, out_columns};
    if (!workers.run(tiles * conv.group * slices, gather_task, &strip)) return false;
    if (!workers.run(tiles * conv.weight.blocks, multiply_task, &strip)) return false;
  }
  return true;
}

}  // namespace sparse_ops::spconv
