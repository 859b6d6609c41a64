#include "kernels/normalization/generic.h"
#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {

constexpr Kernel avx2 = {"avx2", Isa::avx2, run_rows<8>};

}  // namespace sparse_ops::normalization
