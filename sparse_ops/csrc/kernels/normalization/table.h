// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/normalization/kernel.h"

#define FAMILY normalization
#define KERNELS "kernels/normalization/kernels.inc"
#include "kernels/table.inc"
