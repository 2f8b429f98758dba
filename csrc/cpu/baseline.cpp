#define ABKD_ISA baseline
#include "driver.h"
