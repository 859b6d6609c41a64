#include "kernels/normalization/generic.h"
#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {

constexpr Kernel avx512 = {"avx512", Isa::avx512, run_rows<16>};

}  // namespace sparse_ops::normalization
