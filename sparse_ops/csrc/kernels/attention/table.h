// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/attention/kernel.h"

#define FAMILY attention
#define KERNELS "kernels/attention/kernels.inc"
#include "kernels/table.inc"
