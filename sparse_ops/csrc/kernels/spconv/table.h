// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/spconv/kernel.h"

#define FAMILY spconv
#define KERNELS "kernels/spconv/kernels.inc"
#include "kernels/table.inc"
