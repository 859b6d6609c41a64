#include "kernels/quadconv/quadconv.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/sizes.h"
#include "kernels/spconv/panel.h"

namespace sparse_ops::quadconv {
namespace {

using spconv::Runs;

// Panels in memory at a time, for each thread: few enough to stay in the second-level cache beside what they
// are made of, so that their memory is there when it is written once more.
constexpr size_t kPanelBytes = size_t{1} << 17;
constexpr size_t kMaxPanelBytes = size_t{32} << 20;
constexpr size_t kSlice = 64;       // rows of a panel made by one task, about
constexpr size_t kSliceWords = 8192;  // words of X made by one task, about

constexpr size_t kAhead = 16;  // channels that are fetched ahead

// Words of the panels of one tile: one for each group.
size_t panel_size(const Convolution& c, const quads::Kernel& kernel) {
  return round_up(kernel.tile * c.weight.quads, kCacheLine / sizeof(int32_t));
}

bool is_pointwise(const Convolution& c) {
  const auto one = [](const Axis& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.begin == 0 && axis.end == 0;
  };
  return one(c.rows) && one(c.columns);
}

// The rows of X that make words of the channels 4 * four to 4 * four + 3 of a group. Weights of channels that
// are not there are 0: any row will do.
struct FourRows {
  const unsigned char* rows[4];

  FourRows(const Convolution& c, const unsigned char* x, size_t image, size_t group, size_t four, size_t map) {
    const size_t present = std::min<size_t>(4, c.channels - 4 * four);
    const unsigned char* first = x + ((image * c.group + group) * c.channels + 4 * four) * map;
    for (size_t i = 0; i < 4; ++i) rows[i] = first + (i < present ? i : 0) * map;
  }
  void prefetch(size_t from, size_t count) const {
    for (const unsigned char* row : rows) {
      for (size_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(row + from + i);
      __builtin_prefetch(row + from + count - 1);
    }
  }
  void make_words(const Convolution& c, const quads::Kernel& kernel, size_t from, size_t count,
                  int32_t* words) const {
    const unsigned char* const moved[4] = {rows[0] + from, rows[1] + from, rows[2] + from, rows[3] + from};
    kernel.interleave(moved, count, c.is_signed ? static_cast<int32_t>(0x80808080u) : 0, words);
  }
};

// X as words: of each image its groups, of these their fours, [height, width] each; where padding is laid
// out, of each four [images, plan.rows, plan.columns], so that positions go on from an image to the next.
struct Words {
  const Plan& plan;
  const Convolution& conv;
  const unsigned char* x;
  int32_t* words;
  int32_t padding;
  size_t slice;  // planes of a task

  size_t planes() const { return plan.images * conv.group * conv.fours(); }

  void make(size_t plane) const {
    const bool padded = plan.way == Plan::Way::padded;
    const size_t fours = conv.group * conv.fours(), map = plan.height * plan.width;
    const size_t image = padded ? plane % plan.images : plane / fours;
    const size_t four = padded ? plane / plan.images : plane % fours;
    const FourRows rows(conv, x, image, four / conv.fours(), four % conv.fours(), map);
    int32_t* to = words + plane * plan.rows * plan.columns;
    if (!padded) return rows.make_words(conv, *plan.full, 0, map, to);
    const auto pad = [&](size_t count) { to = std::fill_n(to, count, padding); };
    pad(conv.rows.begin * plan.columns);
    for (size_t row = 0; row < plan.height; ++row) {
      pad(conv.columns.begin);
      rows.make_words(conv, *plan.full, row * plan.width, plan.width, to);
      to += plan.width;
      pad(conv.columns.end);
    }
    pad(conv.rows.end * plan.columns);
  }
};

void words_task(void* context, size_t index) {
  const Words& w = *static_cast<const Words*>(context);
  for (size_t p = index * w.slice; p < std::min((index + 1) * w.slice, w.planes()); ++p) w.make(p);
}

// Everything that the tasks of one strip of tiles need.
struct Strip {
  const Plan& plan;
  const Convolution& conv;
  const unsigned char* x;
  spconv::Source source;  // words, moved as floats
  unsigned char* y;
  int32_t* panels;
  size_t first;  // position
  size_t positions, tiles;
  size_t slices, slice;  // of the fours of a group

  size_t tile_positions(size_t tile) const {
    return std::min(plan.full->tile, positions - tile * plan.full->tile);
  }
  const quads::Kernel& kernel(size_t tile) const {
    return tile_positions(tile) < plan.full->tile ? *plan.last : *plan.full;
  }
  int32_t* panel(size_t tile, size_t group) const {
    return panels + panel_size(conv, *plan.full) * (tile * conv.group + group);
  }
  Runs runs(size_t tile, size_t rows, size_t columns) const {
    return spconv::runs_of(first + tile * plan.full->tile, tile_positions(tile), rows, columns);
  }
  // Where the results of a tile belong, with `column` counted from the beginning of a map.
  Runs results(size_t tile) const {
    if (plan.way != Plan::Way::padded) return runs(tile, 1, plan.out_height * plan.out_width);
    Runs found;
    for (spconv::Run run : runs(tile, plan.rows, plan.columns)) {
      if (run.row >= plan.out_height || run.column >= plan.out_width) continue;
      run.count = std::min(run.count, plan.out_width - run.column);
      run.column += run.row * plan.out_width;
      found.push(run);
    }
    return found;
  }
};

// Words of a tile from X itself.
void make_words(const Strip& strip, size_t tile, size_t group, size_t begin, size_t end, int32_t* panel) {
  const quads::Kernel& kernel = strip.kernel(tile);
  const size_t map = strip.plan.height * strip.plan.width, count = strip.tile_positions(tile);
  const Runs runs = strip.runs(tile, 1, map);
  for (size_t four = begin; four < end; ++four) {
    int32_t* row = panel + four * kernel.tile;
    for (const spconv::Run& run : runs) {
      const FourRows rows(strip.conv, strip.x, run.image, group, four, map);
      rows.prefetch(run.column + kAhead * map, run.count);
      rows.make_words(strip.conv, kernel, run.column, run.count, row + run.lane);
    }
    std::fill(row + count, row + kernel.tile, 0);
  }
}

// The same from padded words: a piece for each place of the window.
void copy_words(const Strip& strip, size_t tile, const float* words, size_t channels, float* panel) {
  const Convolution& conv = strip.conv;
  const size_t width = strip.kernel(tile).tile, taps = conv.taps();
  const size_t first = strip.first + tile * strip.plan.full->tile;
  spconv::List<spconv::Piece, 64> pieces;
  for (size_t tap = 0; tap < taps;) {
    for (pieces.clear(); tap < taps && pieces.room() > 0; ++tap) {
      const size_t row = tap / conv.columns.kernel * conv.rows.dilation;
      const size_t column = tap % conv.columns.kernel * conv.columns.dilation;
      pieces.push({tap * width, width, first + row * strip.plan.columns + column, false});
    }
    strip.plan.copies->copy_pieces({pieces.begin(), pieces.size(), 1, nullptr}, words,
                                   strip.plan.images * strip.plan.rows * strip.plan.columns, channels,
                                   taps * width, panel);
  }
}

void panel_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  const Convolution& conv = strip.conv;
  const size_t fours = conv.fours(), slice = index % strip.slices, group = index / strip.slices % conv.group;
  const size_t tile = index / strip.slices / conv.group;
  const size_t begin = slice * strip.slice, end = std::min(begin + strip.slice, fours);
  int32_t* panel = strip.panel(tile, group);
  if (strip.plan.way == Plan::Way::direct) return make_words(strip, tile, group, begin, end, panel);
  // Panels hold words in the place of floats.
  auto* floats = reinterpret_cast<float*>(panel);
  const size_t width = strip.kernel(tile).tile, plane = strip.plan.rows * strip.plan.columns;
  spconv::Source source = strip.source;
  if (strip.plan.way == Plan::Way::padded) {
    const float* words = source.x + (group * fours + begin) * strip.plan.images * plane;
    return copy_words(strip, tile, words, end - begin, floats + begin * conv.taps() * width);
  }
  source.x += group * fours * plane;
  spconv::gather(*strip.plan.copies, source, strip.runs(tile, strip.plan.out_height, strip.plan.out_width), begin,
                 end, width, floats);
}

// `channels` pieces of a map for one tile will be written soon: they are on many pages, so that the processor
// does not foresee them.
void prefetch(const unsigned char* y, size_t channels, size_t count, size_t map) {
  for (size_t n = 0; n < channels; ++n, y += map) {
    for (size_t i = 0; i < count; i += kCacheLine) __builtin_prefetch(y + i, 1, 2);
    __builtin_prefetch(y + count - 1, 1, 2);
  }
}

// Rows are short and vary: steps of a fixed size, the last one overlapping, beat a call of memcpy.
template <size_t kStep>
inline void copy_steps(const unsigned char* from, size_t count, unsigned char* to) {
  for (size_t i = 0; i + kStep <= count; i += kStep) std::memcpy(to + i, from + i, kStep);
  std::memcpy(to + count - kStep, from + count - kStep, kStep);
}

inline void copy_bytes(const unsigned char* from, size_t count, unsigned char* to) {
  if (count >= 16) return copy_steps<16>(from, count, to);
  if (count >= 4) return copy_steps<4>(from, count, to);
  for (size_t i = 0; i < count; ++i) to[i] = from[i];
}

// Calls use(first, last, map) for the runs of each image, in the maps from channel `channel` of `channels`
// on.
template <class Use>
void for_images(const Runs& runs, unsigned char* y, size_t channel, size_t channels, size_t map, Use use) {
  for (const spconv::Run* first = runs.begin(); first != runs.end();) {
    const spconv::Run* last = first + 1;
    while (last != runs.end() && last->image == first->image) ++last;
    use(first, last, y + (first->image * channels + channel) * map);
    first = last;
  }
}

// Neighbouring tasks share a block of the weight and continue each other's rows of the maps; the panels come
// from the cache.
void multiply_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  const Convolution& conv = strip.conv;
  const quads::Weight& weight = conv.weight;
  const size_t tile = index % strip.tiles, block = index / strip.tiles;
  const size_t first = block * weight.block, channels = std::min(weight.block, weight.N - first);
  const quads::Kernel& kernel = strip.kernel(tile);
  const size_t map = strip.plan.out_height * strip.plan.out_width;
  const Runs results = strip.results(tile);
  const auto each_image = [&](auto use) { for_images(results, strip.y, first, weight.N, map, use); };
  each_image([&](const spconv::Run* begin, const spconv::Run* end, const unsigned char* y) {
    prefetch(y + begin->column, channels, end[-1].column + end[-1].count - begin->column, map);
  });
  alignas(kCacheLine) float acc[quads::kMaxAccumulators];
  kernel.multiply_bytes(weight, block, conv.steps, strip.panel(tile, first / (weight.N / conv.group)), acc);
  each_image([&](const spconv::Run* begin, const spconv::Run* end, unsigned char* y) {
    for (size_t n = 0; n < channels; ++n, y += map) {
      const auto* row = reinterpret_cast<const unsigned char*>(acc + n * kernel.tile);
      for (const spconv::Run* run = begin; run != end; ++run) {
        copy_bytes(row + run->lane, run->count, y + run->column);
      }
    }
  });
}

// Beside its columns a tile costs as much as so many of them: segments begin and end.
constexpr size_t kTileColumns = 12;

// Maps are small: the kernel whose tiles leave the fewest columns empty, among those that need what the best
// one does.
const quads::Kernel& select_full(const quads::Weight& weight, size_t positions, Features features) {
  const quads::Kernel& widest = quads::select_kernel(features, weight, SIZE_MAX);
  const auto cost = [&](const quads::Kernel& kernel) {
    const size_t tiles = positions / kernel.tile, rest = positions % kernel.tile;
    const size_t columns = tiles * kernel.tile + (rest > 0 ? quads::select_last(kernel, weight, rest).tile : 0);
    return columns + (tiles + (rest > 0)) * kTileColumns;
  };
  const quads::Kernel* best = &widest;
  for (const quads::Kernel* kernel : quads::kernels()) {
    if (kernel->needs == widest.needs && kernel != quads::kernels().back() && fits(*kernel, weight) &&
        cost(*kernel) < cost(*best)) {
      best = kernel;
    }
  }
  return *best;
}

// What the words of X are like, and the positions of all tiles.
void lay_out(const Convolution& c, Plan& plan) {
  plan.rows = plan.height;
  plan.columns = plan.width;
  plan.positions = plan.images * plan.out_height * plan.out_width;
  plan.way = is_pointwise(c) ? Plan::Way::direct : Plan::Way::gathered;
  plan.words = 0;
  if (plan.way == Plan::Way::direct) return;
  const size_t rows = c.rows.begin + plan.height + c.rows.end;
  const size_t columns = c.columns.begin + plan.width + c.columns.end;
  const size_t elements = plan.height * plan.width;
  const bool is_near = c.rows.stride == 1 && c.columns.stride == 1 && rows * columns <= 2 * elements;
  size_t behind = 0;  // what the last tile sees behind the last position
  if (is_near) {
    plan.way = Plan::Way::padded;
    plan.rows = rows;
    plan.columns = columns;
    plan.positions = ((plan.images - 1) * rows + plan.out_height - 1) * columns + plan.out_width;
    behind = spconv::kMaxTile;
  }
  const size_t all = c.group * c.fours() * plan.images * plan.rows * plan.columns + behind;
  plan.words = round_up(all, kCacheLine / sizeof(int32_t));
}

void set_scratch(const Convolution& c, size_t threads, Plan& plan) {
  const size_t panel_bytes = panel_size(c, *plan.full) * c.group * sizeof(int32_t);
  const size_t wanted = std::max(kPanelBytes * threads / panel_bytes, divide_up(threads, c.weight.blocks));
  const size_t possible = std::max<size_t>(1, kMaxPanelBytes / panel_bytes);
  const size_t tiles = std::max<size_t>(1, divide_up(plan.positions, plan.full->tile));
  plan.strip = std::min({wanted, possible, tiles});
  plan.scratch_bytes = plan.strip * panel_bytes + plan.words * sizeof(int32_t) + kCacheLine;
}

Plan sizes_of(const Convolution& c, size_t images, size_t height, size_t width) {
  Plan plan{};
  plan.images = images;
  plan.height = height;
  plan.width = width;
  plan.out_height = spconv::output_size(c.rows, height);
  plan.out_width = spconv::output_size(c.columns, width);
  lay_out(c, plan);
  return plan;
}

// Whether a weight of a channel that is not there is not 0.
bool has_weights_of_padding(const Convolution& c) {
  const quads::Weight& w = c.weight;
  const size_t last = c.fours() - 1, present = c.channels - 4 * last;
  size_t entry = 0;
  const uint8_t* count = w.counts;
  for (size_t block = 0; block < w.blocks; ++block) {
    for (size_t s = 0; s < w.chunks * w.block; ++s, ++count) {
      for (const size_t end = entry + *count; entry < end; ++entry) {
        if ((s / w.block * w.chunk + w.offsets[entry]) / c.taps() != last) continue;
        for (size_t i = present; i < 4; ++i) {
          if (w.values[4 * entry + i] != 0) return true;
        }
      }
    }
  }
  return false;
}

}  // namespace

std::string check(const Convolution& c) {
  const quads::Weight& w = c.weight;
  const size_t taps = c.taps();  // windows are small
  if (w.K % 4 != 0 || w.K / 4 % taps != 0 || w.K / 4 / taps != divide_up(c.channels, 4)) {
    return "attribute K is " + std::to_string(w.K) + ", expected " + std::to_string(taps) + " taps of " +
           std::to_string(c.channels) + " channels in fours";
  }
  size_t all;
  if (__builtin_mul_overflow(c.channels, c.group, &all) || all > size_t{1} << 48) {
    return "attributes K and group are too large";
  }
  for (size_t n = 0; n < w.N; ++n) {
    int32_t bias;
    std::memcpy(&bias, w.bias + n * sizeof(bias), sizeof(bias));
    if (bias < -quads::kMaxBias || bias > quads::kMaxBias) {
      return "bias[" + std::to_string(n) + "] is " + std::to_string(bias) + ", expected at most " +
             std::to_string(quads::kMaxBias) + " on either side of 0";
    }
  }
  return has_weights_of_padding(c) ? "values has weights of channels that are not there" : "";
}

Plan make_plan(const Convolution& c, size_t images, size_t height, size_t width, Features features,
               size_t threads) {
  Plan plan = sizes_of(c, images, height, width);
  plan.full = &select_full(c.weight, plan.positions, features);
  plan.last = &quads::select_last(*plan.full, c.weight, plan.positions % plan.full->tile);
  plan.copies = &spconv::select_kernel(features);
  set_scratch(c, threads, plan);
  return plan;
}

Plan make_plan(const Convolution& c, size_t images, size_t height, size_t width, const quads::Kernel& kernel,
               const spconv::Kernel& copies, size_t threads) {
  Plan plan = sizes_of(c, images, height, width);
  plan.full = plan.last = &kernel;
  plan.copies = &copies;
  set_scratch(c, threads, plan);
  return plan;
}

bool run(const Plan& plan, const Convolution& conv, const unsigned char* x, unsigned char* y, void* scratch,
         Workers& workers) {
  const size_t tile = plan.full->tile, positions = plan.positions, fours = conv.fours();
  auto* memory = reinterpret_cast<int32_t*>(round_up(reinterpret_cast<uintptr_t>(scratch), kCacheLine));
  int32_t* panels = memory + plan.words;
  const auto zero = static_cast<uint32_t>(conv.steps.x_zero) * 0x01010101u;
  const auto padding = static_cast<int32_t>(zero ^ static_cast<uint32_t>(plan.full->middle));
  if (const size_t map = plan.height * plan.width; plan.words > 0 && map > 0) {
    Words words{plan, conv, x, memory, padding, std::max<size_t>(1, kSliceWords / map)};
    if (!workers.run(divide_up(words.planes(), words.slice), words_task, &words)) return false;
  }
  float outside[spconv::kMaxTile];
  for (float& word : outside) std::memcpy(&word, &padding, sizeof(word));
  const size_t image = conv.group * fours * plan.rows * plan.columns;
  const spconv::Source source{reinterpret_cast<const float*>(memory), plan.rows, plan.columns, image,
                              conv.rows, conv.columns, outside};
  const size_t slice = std::max<size_t>(1, kSlice / conv.taps()), slices = divide_up(fours, slice);
  for (size_t first = 0; first < positions; first += plan.strip * tile) {
    const size_t count = std::min(plan.strip * tile, positions - first), tiles = divide_up(count, tile);
    Strip strip{plan, conv, x, source, y, panels, first, count, tiles, slices, slice};
    if (!workers.run(tiles * conv.group * slices, panel_task, &strip)) return false;
    if (!workers.run(tiles * conv.weight.blocks, multiply_task, &strip)) return false;
  }
  return true;
}

}  // namespace sparse_ops::quadconv
