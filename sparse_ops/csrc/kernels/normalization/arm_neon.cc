#include "kernels/normalization/generic.h"
#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {

constexpr Kernel neon = {"neon", Isa::neon, run_rows<4>};

}  // namespace sparse_ops::normalization
