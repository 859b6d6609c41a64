// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/peak/kernel.h"

#define FAMILY peak
#define KERNELS "kernels/peak/kernels.inc"
#include "kernels/table.inc"
