// Every header that driver.h needs from outside the project, included before a translation unit raises its instruction
// set: their inline functions are shared with the rest of the program and must run on any processor.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>
