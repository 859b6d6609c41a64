#include "kernels/spconv/depthwise.h"

#include <algorithm>
#include <cstring>

#include "kernels/sizes.h"
#include "kernels/spconv/copy.h"

namespace sparse_ops::spconv {
namespace {

constexpr size_t kBandFloats = 8192;   // of padded input rows: a first-level cache
constexpr size_t kSumFloats = 4096;    // of output rows as wide as the padded ones
constexpr size_t kSlack = 64;          // floats that kernels may touch behind either
constexpr size_t kMaxPhases = 16;      // of a stride in both directions together
constexpr size_t kMaxTaps = 255;       // as many as a chunk has
constexpr size_t kTaskFloats = 16384;  // outputs of one task, about

// How a band is laid out. Input rows and columns are sorted by their remainder to the stride (their phase),
// so that every tap of a band of output rows is the same band shifted.
struct Band {
  size_t row_phases, column_phases;
  size_t extra_rows;  // of a phase, beyond the output rows
  size_t pitch;       // floats from a row to the next
  size_t rows;        // output rows of a band

  size_t phase_rows() const { return rows + extra_rows; }
  size_t floats() const { return row_phases * column_phases * phase_rows() * pitch + kSlack; }
  size_t shift(const Convolution& c, size_t tap) const {
    const size_t i = tap / c.columns.kernel * c.rows.dilation,
                 j = tap % c.columns.kernel * c.columns.dilation;
    const size_t phase = i % row_phases * column_phases + j % column_phases;
    return (phase * phase_rows() + i / row_phases) * pitch + j / column_phases;
  }
};

// `rows` is 0 if not even one fits.
Band make_band(const Plan& plan, const Convolution& c) {
  Band band{c.rows.stride, c.columns.stride, 0, 0, 0};
  if (band.row_phases > kMaxPhases || band.column_phases > kMaxPhases / band.row_phases) return band;
  band.extra_rows = (c.rows.kernel - 1) * c.rows.dilation / band.row_phases;
  band.pitch = plan.out_width + (c.columns.kernel - 1) * c.columns.dilation / band.column_phases;
  const size_t row = band.row_phases * band.column_phases * band.pitch;
  if (row > kBandFloats || kBandFloats / row <= band.extra_rows) return band;
  band.rows = std::min({kBandFloats / row - band.extra_rows, kSumFloats / band.pitch, plan.out_height});
  return band;
}

struct Call {
  const Plan& plan;
  const Convolution& conv;
  Band band;
  const float* x;
  const float* residual;
  float* y;
  size_t slice, slices;  // channels of a task, and how many such there are
  size_t shifts[kMaxTaps];
};

// The padded input rows of the output rows from `first` on. Padding left and right of the image is zero
// before and stays so.
void fill_band(const Call& call, const float* map, size_t first, float* band_rows) {
  const Band& band = call.band;
  const Axis &rows = call.conv.rows, &columns = call.conv.columns;
  const size_t height = call.plan.height, width = call.plan.width;
  float* to = band_rows;
  for (size_t row_phase = 0; row_phase < band.row_phases; ++row_phase) {
    for (size_t column_phase = 0; column_phase < band.column_phases; ++column_phase) {
      // Elements of the band's rows that lie in the image.
      const auto reach = [&](size_t edge) {
        return edge <= column_phase ? 0
                                    : std::min(band.pitch, divide_up(edge - column_phase, columns.stride));
      };
      const size_t left = reach(columns.begin), right = reach(columns.begin + width);
      const size_t column = left * columns.stride + column_phase - columns.begin;
      for (size_t r = 0; r < band.phase_rows(); ++r, to += band.pitch) {
        const size_t row = (first + r) * rows.stride + row_phase;  // counted from the padding's first row
        if (row < rows.begin || row - rows.begin >= height) {
          std::memset(to, 0, band.pitch * sizeof(float));
        } else if (left < right) {
          copy_strided(map + (row - rows.begin) * width + column, right - left, columns.stride, to + left);
        }
      }
    }
  }
}

void channel(const Call& call, size_t image, size_t n, float* band_rows, float* sums) {
  const Plan& plan = call.plan;
  const spmm::Weight& weight = call.conv.weight;
  const Band& band = call.band;
  const size_t begin = weight.block_entries[n], entries = weight.counts[n];
  size_t shifts[kMaxTaps];
  for (size_t e = 0; e < entries; ++e) shifts[e] = call.shifts[weight.offsets[begin + e]];
  float bias;
  std::memcpy(&bias, weight.bias + n * sizeof(float), sizeof(bias));
  const size_t index = image * weight.N + n;
  const float* map = call.x + index * plan.height * plan.width;
  for (size_t first = 0; first < plan.out_height; first += band.rows) {
    const size_t rows = std::min(band.rows, plan.out_height - first);
    fill_band(call, map, first, band_rows);
    plan.full->combine(shifts, weight.values + begin * sizeof(float), entries, bias,
                       (rows - 1) * band.pitch + plan.out_width, band_rows, sums);
    const size_t at = (index * plan.out_height + first) * plan.out_width;
    plan.full->store_channels(call.conv.epilogue, sums, band.pitch, rows, plan.out_width, plan.out_width,
                              call.residual == nullptr ? nullptr : call.residual + at, call.y + at);
  }
}

void task(void* context, size_t index) {
  const Call& call = *static_cast<const Call*>(context);
  alignas(64) float band_rows[kBandFloats + kSlack];
  alignas(64) float sums[kSumFloats + kSlack];
  std::memset(band_rows, 0, call.band.floats() * sizeof(float));
  const size_t begin = index % call.slices * call.slice;
  for (size_t n = begin; n < std::min(begin + call.slice, call.conv.weight.N); ++n) {
    channel(call, index / call.slices, n, band_rows, sums);
  }
}

}  // namespace

bool fits_depthwise(const Plan& plan, const Convolution& c) {
  const spmm::Weight& w = c.weight;
  return w.N == c.group && w.K == c.taps() && w.block == 1 && w.chunks == 1 && make_band(plan, c).rows > 0;
}

bool run_depthwise(const Plan& plan, const Convolution& c, const float* x, const float* residual, float* y,
                   Workers& workers) {
  const size_t outputs = plan.out_height * plan.out_width;
  const size_t slice = std::clamp<size_t>(kTaskFloats / outputs, 1, c.weight.N);
  Call call{plan, c, make_band(plan, c), x, residual, y, slice, divide_up(c.weight.N, slice), {}};
  for (size_t tap = 0; tap < c.taps(); ++tap) call.shifts[tap] = call.band.shift(c, tap);
  return workers.run(plan.images * call.slices, task, &call);
}

}  // namespace sparse_ops::spconv
