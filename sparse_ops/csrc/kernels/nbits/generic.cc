#include "kernels/nbits/generic.h"
#include "kernels/nbits/table.h"

namespace sparse_ops::nbits {
namespace {

template <size_t kRows, Layout>
struct Run {
  static constexpr auto run = run_rows<kRows>;
};

}  // namespace

constexpr Kernel generic = {agreed(row::generic, 4, kMaxRows), round_row<4>, run_any<Run>, finish<4>};

}  // namespace sparse_ops::nbits
