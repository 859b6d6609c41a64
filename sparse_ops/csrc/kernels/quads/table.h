// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/quads/kernel.h"

#define FAMILY quads
#define KERNELS "kernels/quads/kernels.inc"
#include "kernels/table.inc"
