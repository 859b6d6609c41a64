// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/spmm/kernel.h"

#define FAMILY spmm
#define KERNELS "kernels/spmm/kernels.inc"
#include "kernels/table.inc"
