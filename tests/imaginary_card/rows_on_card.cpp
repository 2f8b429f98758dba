// Runs the launches of our row kernels on the host, with the device's code and the launch's own arguments.
#include <dlfcn.h>

#include <mutex>
#include <utility>

#include "../csrc/emulator/row_kernels.h"

namespace {

// kernel(arguments...), which lie where the launch says.
template <typename... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Arguments*>(arguments[I])...);
}
template <typename... Arguments>
void call(void (*kernel)(Arguments...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Arguments...>{});
}

// g++ gives an instantiation the name that nvcc gives it.
const char* name_of(const void* kernel) {
  Dl_info symbol{};
  return dladdr(kernel, &symbol) && symbol.dli_sname ? symbol.dli_sname : "";
}

}  // namespace

// `name`: the launched kernel's. `arguments`: pointers to its arguments, whose first is the Rows.
extern "C" void run_row_kernel(const char* name, void** arguments, unsigned blocks, unsigned threads, size_t shared) {
  static std::mutex mutex;  // the trainer launches from a thread, too, in backward
  const std::lock_guard lock(mutex);
  const auto& rows = *static_cast<const abkd::Rows*>(arguments[0]);
  emulator::with_kernel(rows, [&](auto kernel, const auto&) {
    const char* chosen = name_of(reinterpret_cast<const void*>(kernel));
    if (std::strcmp(chosen, name) != 0) {
      std::fprintf(stderr, "launched: %s\nemulated: %s\n", name, chosen);
      emulator::Block::fail("row_kernels.h and rows.cu choose differently");
    }
    emulator::launch(blocks, int(threads), abkd::cuda::shared_rows, sizeof(abkd::cuda::shared_rows), shared, 0,
                     [&] { call(kernel, arguments); });
  });
}
