#include "kernels/spconv/fused_depthwise.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/sizes.h"
#include "kernels/spconv/padded_map.h"
#include "kernels/spconv/panel.h"
#include "kernels/spmm/spmm.h"

namespace sparse_ops::spconv {
namespace {

using spmm::Weight;

// Panels and maps of a task, in bytes: the share of a second-level cache that they may take.
constexpr size_t kTaskBytes = size_t{1} << 19;
constexpr size_t kLine = kCacheLine / sizeof(float);

struct Call {
  const FusedPlan& plan;
  const FusedDepthwise& fused;
  PaddedMap map;
  Source source;
  size_t rows, columns;  // of the maps between, as the panels see them
  float* y;
  float* scratch;
  std::atomic<size_t> next;

  size_t tasks() const { return plan.images * plan.bands * plan.parts; }
};

// The positions of the maps between that a task computes, tile by tile.
struct Tiles {
  size_t first, count;
  const spmm::Kernel& full;
  const spmm::Kernel& last;  // takes the partial tile

  size_t lanes(size_t done) const { return std::min(full.tile, count - done); }
  const spmm::Kernel& kernel(size_t done) const { return lanes(done) < full.tile ? last : full; }
};

// The panels of the tiles, one after another.
void gather_panels(const Call& call, size_t image, const Tiles& tiles, float* panels) {
  const Convolution& conv = call.fused.first;
  const size_t first = image * call.map.height * call.map.width + tiles.first;
  for (size_t done = 0; done < tiles.count; done += tiles.full.tile) {
    const Runs runs = runs_of(first + done, tiles.lanes(done), call.rows, call.columns);
    gather(*call.plan.maps, call.source, runs, 0, conv.channels(), tiles.kernel(done).tile, panels + done * conv.weight.K);
  }
}

// One block of the maps between, each map to a band of its own.
void multiply_block(const Call& call, const Tiles& tiles, size_t block, const float* panels, float* maps) {
  const Weight& weight = call.fused.first.weight;
  const size_t channels = std::min(weight.block, weight.N - block * weight.block);
  alignas(kCacheLine) float acc[spmm::kMaxAccumulators];
  for (size_t done = 0; done < tiles.count; done += tiles.full.tile) {
    const spmm::Kernel& kernel = tiles.kernel(done);
    kernel.multiply(weight, block, panels + done * weight.K, acc);
    for (const Run& run : runs_of(done, tiles.lanes(done), call.map.height, call.map.width)) {
      call.plan.maps->store_channels(call.fused.first.epilogue, acc + run.lane, kernel.tile, channels,
                                     run.count, call.plan.map_floats, nullptr,
                                     maps + run.row * call.map.pitch + run.column);
    }
  }
}

// `maps` has zeros left and right of the rows.
void compute(const Call& call, size_t task, float* panels, float* maps) {
  const FusedPlan& plan = call.plan;
  const FusedDepthwise& fused = call.fused;
  const PaddedMap& map = call.map;
  const Weight& weight = fused.first.weight;
  const size_t part = task % plan.parts, band = task / plan.parts % plan.bands;
  const size_t image = task / plan.parts / plan.bands;
  const size_t first = band * plan.band_rows, count = std::min(plan.band_rows, map.out_height - first);
  const PaddedMap::Rows rows = map.seen(first, count);
  const size_t positions = (rows.end - rows.begin) * map.width;
  const Tiles tiles{rows.begin * map.width, positions, *plan.full,
                    plan.last ? spmm::select_last(*plan.full, *plan.last, weight, positions % plan.full->tile)
                              : *plan.full};
  gather_panels(call, image, tiles, panels);
  for (size_t n = 0; n < std::min(weight.block, weight.N); ++n) {
    map.clear_outside(first, count, maps + n * plan.map_floats);
  }
  float* inside = maps + rows.offset * map.pitch + map.columns.begin;
  const size_t end = weight.blocks * (part + 1) / plan.parts;
  for (size_t block = weight.blocks * part / plan.parts; block < end; ++block) {
    multiply_block(call, tiles, block, panels, inside);
    for (size_t n = block * weight.block; n < std::min((block + 1) * weight.block, weight.N); ++n) {
      const size_t taps = fused.rows.kernel * fused.columns.kernel;
      const MapProduct product =
          map.product(fused.filters + n * taps * sizeof(float), fused.bias + n * sizeof(float),
                      maps + (n - block * weight.block) * plan.map_floats, count);
      float* to = call.y + ((image * weight.N + n) * map.out_height + first) * map.out_width;
      plan.maps->depthwise(fused.first.epilogue, product, nullptr, to);
    }
  }
}

// Takes tasks until none is left: scratch memory is needed for as many as there are threads only.
void job(void* context, size_t index) {
  Call& call = *static_cast<Call*>(context);
  float* panels = call.scratch + index * call.plan.task_floats;
  float* maps = panels + call.plan.panel_floats;
  std::memset(maps, 0, (call.plan.task_floats - call.plan.panel_floats) * sizeof(float));
  for (size_t task; (task = call.next++) < call.tasks();) compute(call, task, panels, maps);
}

PaddedMap between(const FusedDepthwise& fused, size_t height, size_t width) {
  return PaddedMap(fused.rows, fused.columns, output_size(fused.first.rows, height),
                   output_size(fused.first.columns, width));
}

FusedPlan make_plan(const FusedDepthwise& fused, size_t images, size_t height, size_t width,
                    const spmm::Kernel& full, const Kernel& maps, std::optional<Features> last,
                    size_t threads) {
  const Weight& weight = fused.first.weight;
  const PaddedMap map = between(fused, height, width);
  const auto map_floats = [&](size_t rows) {  // an odd number of cache lines: maps do not compete for sets
    return (divide_up(map.floats(rows), kLine) | 1) * kLine;
  };
  const auto panel_floats = [&](size_t rows) {
    const size_t positions = std::min(PaddedMap::reach(fused.rows, rows), map.height) * map.width;
    return round_up(round_up(positions, full.tile) * weight.K, kLine);
  };
  const auto task_floats = [&](size_t rows) {
    return panel_floats(rows) + std::min(weight.block, weight.N) * map_floats(rows);
  };
  // Rows that neighbouring bands both see are computed twice: bands as high as the cache allows, and equal.
  size_t rows = map.out_height;
  while (rows > 1 && task_floats(rows) * sizeof(float) > kTaskBytes) rows -= divide_up(rows, 8);
  const size_t band_rows = divide_up(map.out_height, divide_up(map.out_height, rows));
  const size_t bands = divide_up(map.out_height, band_rows);
  const size_t parts = std::min(weight.blocks, divide_up(threads, images * bands));
  const size_t jobs = std::min(threads, images * bands * parts);
  return {&full,
          &maps,
          last,
          images,
          height,
          width,
          band_rows,
          bands,
          parts,
          panel_floats(band_rows),
          map_floats(band_rows),
          task_floats(band_rows),
          jobs,
          jobs * task_floats(band_rows) * sizeof(float) + kCacheLine};
}

}  // namespace

FusedPlan make_plan(const FusedDepthwise& fused, size_t images, size_t height, size_t width,
                    Features features, size_t threads) {
  const size_t map = output_size(fused.first.rows, height) * output_size(fused.first.columns, width);
  const spmm::Kernel& products = spmm::select_kernel(features, fused.first.weight, map);
  return make_plan(fused, images, height, width, products, select_kernel(features), features, threads);
}

FusedPlan make_plan(const FusedDepthwise& fused, size_t images, size_t height, size_t width,
                    const spmm::Kernel& products, const Kernel& maps, size_t threads) {
  return make_plan(fused, images, height, width, products, maps, std::nullopt, threads);
}

bool run(const FusedPlan& plan, const FusedDepthwise& fused, const float* x, float* y, void* scratch,
         Workers& workers) {
  const Source source = make_source(fused.first, x, plan.height, plan.width);
  const PaddedMap map = between(fused, plan.height, plan.width);
  Call call{plan,
            fused,
            map,
            source,
            output_size(source.rows, source.height),
            output_size(source.columns, source.width),
            y,
            reinterpret_cast<float*>(round_up(reinterpret_cast<uintptr_t>(scratch), kCacheLine)),
            0};
  return workers.run(plan.jobs, job, &call);
}

}  // namespace sparse_ops::spconv
