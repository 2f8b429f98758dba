// The CUDA row kernels for the host, and the way from the contents of a call to the kernel that rows.cu launches.
// With ROWS_ON_HOST_BRIEF there is one divergence, which compiles in a third of the time.
#pragma once

#include "cuda_on_host.h"

namespace abkd::cuda {

// The kernel's dynamic shared memory. No GPU has more in a block.
alignas(16) inline thread_local unsigned char shared_rows[227 * 1024];

}  // namespace abkd::cuda

#include "rows.cuh"

namespace emulator {

#if defined(ROWS_ON_HOST_BRIEF)
constexpr bool kAll = false;
#else
constexpr bool kAll = true;
#endif

// Calls run(kernel, divergence) with the kernel that rows.cu launches for this call.
template <typename Run>
void with_kernel(const abkd::Rows& rows, Run run) {
  abkd::with_divergence<float>(rows, [&](const auto& divergence) {
    using Divergence = std::decay_t<decltype(divergence)>;
    if constexpr (kAll || std::is_same_v<Divergence, abkd::AlphaNet<float>>)
      run(abkd::cuda::row_kernel<Divergence>, divergence);
    else
      Block::fail("not in this build");
  });
}

}  // namespace emulator
