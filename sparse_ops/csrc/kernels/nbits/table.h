// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/nbits/kernel.h"

#define FAMILY nbits
#define KERNELS "kernels/nbits/kernels.inc"
#include "kernels/table.inc"
