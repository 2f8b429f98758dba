// Launches the kernels on a CUDA stream.
#pragma once

#include "../row_call.h"

namespace abkd::cuda {

// Returns null, or the text of the error. `stream` is a cudaStream_t. Logits may be float32, bfloat16 or float16.
const char* launch(const Rows& rows, void* stream);

// values [count] *= *factor, which is on the device. Returns as `launch` does.
const char* scale(float* values, int64_t count, const float* factor, void* stream);

}  // namespace abkd::cuda
