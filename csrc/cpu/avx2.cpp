#if defined(__x86_64__)
#include "target_headers.h"
#pragma GCC target("avx2,fma,f16c")
#define ABKD_ISA avx2
#include "driver.h"
#endif
