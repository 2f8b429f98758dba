// As much of CUDA as the row kernel needs, on the host. g++ compiles the device code itself. Blocks run one after the
// other, and the threads of a block run as fibers that switch only at barriers and shuffles. This shows what a GPU
// hides:
//
//   - Sanitizers work. Shared memory beyond the launched size is poisoned; the rest is filled with NaN for every block.
//   - If threads wait at different barriers or shuffles, the process ends and reports both places.
//   - The order of the threads is a parameter, so that results which depend on it differ.
//   - With -fsanitize=thread every race ends the process (see races.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <link.h>
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "races.h"

// For a host compiler the toolkit's headers leave the first undefined and the second empty. Shared variables need
// static storage: `thread_local` gives it and may also follow `extern` (with -fno-extern-tls-init it does nothing
// more). The third asks for inlining, which takes half of the compilation with sanitizers.
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ thread_local
#undef __forceinline__
#define __forceinline__ inline

// Cache hints change no value.
inline uint4 __ldcs(const uint4* from) { return *from; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }

// csrc/divergence/math.h has this in assembly for a GPU. Subnormal results become 0.
#define ABKD_DEVICE
namespace abkd {
inline float power_of_2(float x) {
  const float power = exp2f(x);
  return power < std::numeric_limits<float>::min() ? 0.0f : power;
}
}  // namespace abkd

inline uint3 threadIdx, blockIdx;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024, kPage = 4096;

// Switches stacks by the compiler's own non-local jump, because swapcontext would take a system call each time. The
// calls must stay opaque: the compiler does not expect that other fibers run in between.
#define EMULATOR_OPAQUE __attribute__((noipa, no_sanitize("address", "undefined", "thread")))
struct Context {
  void* registers[5];
};
EMULATOR_OPAQUE inline void jump(Context& to) { __builtin_longjmp(to.registers, 1); }
EMULATOR_OPAQUE inline void change(Context& from, Context& to) {
  if (!__builtin_setjmp(from.registers)) jump(to);
}
EMULATOR_OPAQUE inline void change(Context& from, const ucontext_t& to) {
  if (!__builtin_setjmp(from.registers)) setcontext(&to);
}
#undef EMULATOR_OPAQUE

// AddressSanitizer has to know the current stack.
#if defined(__SANITIZE_ADDRESS__)
inline void leave(void** own, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(own, stack, bytes); }
inline void arrive(void* own, const void** stack, size_t* bytes) { __sanitizer_finish_switch_fiber(own, stack, bytes); }
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

enum class State { ready, at_shuffle, at_barrier, finished };

struct Fiber {
  unsigned char* stack;  // the lowest page is a guard
  Context context = {};
  void* sanitizer = nullptr;
  bool started = false;
  State state = State::finished;
  std::source_location where = {};  // place of the shuffle or barrier
  uint64_t sent = 0, received = 0;  // in a shuffle
  int partner = 0;                  // the lane whose value it receives
};

class Block {
 public:
  std::string omitted_place;  // the barrier at this "file:line" does nothing: a planted fault of the tests
  int64_t omitted = 0;        // how often a thread came to it

  // Runs kernel() in each of `threads` threads. order: 0 is ascending, 1 descending, others are seeds of a shuffle.
  void run(int threads, int order, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    prepare(threads);
    std::mt19937 random(order);
    std::vector<int> warps(threads / kWarp);
    std::iota(warps.begin(), warps.end(), 0);
    ++races::interval;
    do {
      arrange(warps, order, random);
      for (int warp : warps) run_warp(&fibers_[warp * kWarp], order, random);
    } while (pass_barrier());
  }

  // A fiber calls this. It returns when all threads that it waits for have arrived.
  void wait(State state, std::source_location where) {
    races::record_from_now_on(false);
    Fiber& self = *current_;
    self.state = state;
    self.where = where;
    leave(&self.sanitizer, stack_, stack_bytes_);
    change(self.context, scheduler_);
    arrive(self.sanitizer, &stack_, &stack_bytes_);
    races::record_from_now_on(true);
  }

  uint64_t shuffle(uint64_t value, int offset, std::source_location where) {
    Fiber& self = *current_;
    self.sent = value;
    self.partner = int(threadIdx.x % kWarp) ^ offset;
    wait(State::at_shuffle, where);
    return self.received;
  }

  void barrier(std::source_location where) {
    races::record_from_now_on(false);
    const bool is_omitted = !omitted_place.empty() && omitted_place == place(where);
    races::record_from_now_on(true);
    if (!is_omitted) return wait(State::at_barrier, where);
    races::record_from_now_on(false);
    ++omitted;
    races::record_from_now_on(true);
  }

  [[noreturn]] static void fail(const char* reason) {
    std::fprintf(stderr, "emulator: block %u: %s\n", blockIdx.x, reason);
    std::_Exit(3);
  }

 private:
  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  Context scheduler_;
  const void* stack_ = nullptr;  // the scheduler's stack, for AddressSanitizer
  size_t stack_bytes_ = 0;
  void* sanitizer_ = nullptr;

  void prepare(int threads) {
    if (threads % kWarp) fail("a part of a warp is not emulated");
    while (int(fibers_.size()) < threads) {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (stack == MAP_FAILED || mprotect(stack, kPage, PROT_NONE)) fail("no memory for stacks");
      fibers_.push_back(Fiber{static_cast<unsigned char*>(stack)});
    }
    fibers_.resize(threads);
    for (Fiber& fiber : fibers_) fiber.state = State::ready;
  }

  static void arrange(std::vector<int>& order_of, int order, std::mt19937& random) {
    if (order == 1)
      std::sort(order_of.begin(), order_of.end(), std::greater<>());
    else if (order > 1)
      std::shuffle(order_of.begin(), order_of.end(), random);
  }

  // Runs a warp until its lanes have finished or are at a barrier. Other warps wait, so one may be far ahead.
  void run_warp(Fiber* lanes, int order, std::mt19937& random) {
    std::vector<int> sequence(kWarp);
    std::iota(sequence.begin(), sequence.end(), 0);
    do {
      arrange(sequence, order, random);
      for (int lane : sequence)
        if (lanes[lane].state == State::ready) resume(lanes[lane]);
    } while (exchange(lanes));
  }

  // Exchanges the values if the lanes are at a shuffle; else returns false.
  bool exchange(Fiber* lanes) {
    const auto shuffles = [](const Fiber& lane) { return lane.state == State::at_shuffle; };
    if (std::none_of(lanes, lanes + kWarp, shuffles)) return false;
    expect_together(lanes, kWarp);
    for (int lane = 0; lane < kWarp; ++lane) {
      lanes[lane].received = lanes[lanes[lane].partner].sent;
      lanes[lane].state = State::ready;
    }
    return true;
  }

  // Lets all threads pass the barrier; returns false if all have finished.
  bool pass_barrier() {
    expect_together(fibers_.data(), int(fibers_.size()));
    if (fibers_[0].state == State::finished) return false;
    for (Fiber& fiber : fibers_) fiber.state = State::ready;
    ++races::interval;
    return true;
  }

  void expect_together(const Fiber* fibers, int count) const {
    for (const Fiber* fiber = fibers; fiber < fibers + count; ++fiber) {
      const auto &one = fibers->where, &other = fiber->where;
      const bool same_place = one.line() == other.line() && one.column() == other.column();
      if (fiber->state == fibers->state && (fiber->state == State::finished || same_place)) continue;
      char text[2][160], reason[400];
      describe(*fibers, text[0]);
      describe(*fiber, text[1]);
      std::snprintf(reason, sizeof(reason), "threads part: %s, %s", text[0], text[1]);
      fail(reason);
    }
  }

  void describe(const Fiber& fiber, char (&text)[160]) const {
    const char* what = fiber.state == State::at_barrier ? "is at the barrier" : "is at the shuffle";
    const int thread = int(&fiber - fibers_.data()), column = int(fiber.where.column());
    if (fiber.state == State::finished)
      std::snprintf(text, sizeof(text), "thread %d has finished", thread);
    else
      std::snprintf(text, sizeof(text), "thread %d %s of %s:%d", thread, what, place(fiber.where).c_str(), column);
  }

  // "file:line"
  static std::string place(const std::source_location& where) {
    const char* path = where.file_name();
    const char* name = std::strrchr(path, '/') ? std::strrchr(path, '/') + 1 : path;
    return std::string(name) + ":" + std::to_string(where.line());
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    races::thread = int(&fiber - fibers_.data());
    races::stack = fiber.stack;
    races::stack_bytes = kStack;
    threadIdx = uint3{unsigned(races::thread), 0, 0};
    leave(&sanitizer_, fiber.stack, kStack);
    if (fiber.started) {
      change(scheduler_, fiber.context);
    } else {
      fiber.started = true;
      ucontext_t entry;
      getcontext(&entry);
      entry.uc_stack.ss_sp = fiber.stack;
      entry.uc_stack.ss_size = kStack;
      entry.uc_link = nullptr;
      makecontext(&entry, &Block::live, 0);
      change(scheduler_, entry);
    }
    arrive(sanitizer_, nullptr, nullptr);
  }

  // The life of a fiber: it runs the kernel again and again.
  static void live();
};

inline Block block;

inline void Block::live() {
  arrive(nullptr, &block.stack_, &block.stack_bytes_);
  races::record_from_now_on(true);
  for (;;) {
    (*block.kernel_)();
    block.wait(State::finished, {});
  }
}

// All shared memory: the thread-local variables of the program or library that has `dynamic`.
struct SharedMemory {
  unsigned char* start = nullptr;
  size_t bytes = 0;

  explicit SharedMemory(const unsigned char* dynamic) : dynamic_(dynamic) {
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* self) { return static_cast<SharedMemory*>(self)->take(*object); }, this);
  }

 private:
  const unsigned char* dynamic_;

  int take(const dl_phdr_info& object) {
    for (int i = 0; i < object.dlpi_phnum; ++i) {
      auto* data = static_cast<unsigned char*>(object.dlpi_tls_data);
      const size_t size = object.dlpi_phdr[i].p_memsz;
      if (object.dlpi_phdr[i].p_type != PT_TLS || !data || dynamic_ < data || dynamic_ >= data + size) continue;
      start = data;
      bytes = size;
      return 1;
    }
    return 0;
  }
};

// kernel<<<blocks, threads, bytes>>>. `dynamic` [capacity] is the kernel's `extern __shared__` array.
inline void launch(unsigned blocks, int threads, unsigned char* dynamic, size_t capacity, size_t bytes, int order,
                   const std::function<void()>& kernel) {
  const SharedMemory shared(dynamic);
  for (blockIdx = uint3{0, 0, 0}; blockIdx.x < blocks; ++blockIdx.x) {
    if (bytes > capacity) Block::fail("a block has less shared memory");
    std::memset(shared.start, 0xff, shared.bytes);  // NaN: on a GPU it holds anything when a block starts
    ASAN_POISON_MEMORY_REGION(dynamic + bytes, capacity - bytes);
    block.run(threads, order, kernel);
    ASAN_UNPOISON_MEMORY_REGION(dynamic, capacity);
  }
}

}  // namespace emulator

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  emulator::block.barrier(where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset, std::source_location where = std::source_location::current()) {
  if (mask != 0xffffffffu) emulator::Block::fail("a shuffle among some lanes is not emulated");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = emulator::block.shuffle(bits, offset, where);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
