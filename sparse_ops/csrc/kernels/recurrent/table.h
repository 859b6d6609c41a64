// The kernels of this family: see kernels/table.inc.
#pragma once

#include "kernels/recurrent/kernel.h"

#define FAMILY recurrent
#define KERNELS "kernels/recurrent/kernels.inc"
#include "kernels/table.inc"
