// Detects every race within a block: two threads access the same byte between the same two barriers, and at least one
// of them writes it. Shuffles order nothing, as in CUDA.
//
// With g++ -fsanitize=thread every memory access calls one of the functions below. (The library of g++ must not be
// linked, because it knows no blocks.) In other builds nothing calls them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace races {

#define RACES_UNINSTRUMENTED __attribute__((noinline, no_sanitize("thread")))

// Accesses of the kernel are recorded, those of the emulator are not.
inline bool recording = false;
RACES_UNINSTRUMENTED inline void record_from_now_on(bool yes) { recording = yes; }

inline int thread = 0;                        // the running thread
inline const unsigned char* stack = nullptr;  // the thread's own stack, which no other thread sees
inline size_t stack_bytes = 0;
inline uint32_t interval = 0;  // the number of barriers so far

// The accesses to one byte of memory in one interval.
struct Byte {
  static constexpr int kNobody = -1, kMany = -2;
  uintptr_t address;
  uint32_t interval;
  int16_t writer, reader;
};

#if defined(__SANITIZE_THREAD__)
constexpr size_t kBytes = size_t(1) << 20;  // more than a block touches between two barriers
inline Byte bytes[kBytes];                  // a hash table; entries of earlier intervals are free

RACES_UNINSTRUMENTED inline Byte& find(uintptr_t address) {
  size_t slot = address * 0x9e3779b97f4a7c15u >> 44;
  while (bytes[slot].interval == interval && bytes[slot].address != address) slot = (slot + 1) % kBytes;
  if (bytes[slot].interval != interval) bytes[slot] = {address, interval, Byte::kNobody, Byte::kNobody};
  return bytes[slot];
}

RACES_UNINSTRUMENTED inline void record(const void* where, size_t size, bool writes, const void* code) {
  if (!recording || size_t(static_cast<const unsigned char*>(where) - stack) < stack_bytes) return;
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = find(reinterpret_cast<uintptr_t>(where) + i);
    const bool read_by_others = byte.reader != Byte::kNobody && byte.reader != thread;
    const bool written_by_others = byte.writer != Byte::kNobody && byte.writer != thread;
    if (written_by_others || (writes && read_by_others)) {
      std::fprintf(stderr,
                   "emulator: race: thread %d %s %p, which thread %d (-2: several) %s since the last barrier; "
                   "the place is what `addr2line -Cfie` says of %p\n",
                   thread, writes ? "writes" : "reads", where, written_by_others ? byte.writer : byte.reader,
                   written_by_others ? "wrote" : "read", code);
      std::_Exit(3);
    }
    if (writes)
      byte.writer = int16_t(thread);
    else
      byte.reader = read_by_others ? int16_t(Byte::kMany) : int16_t(thread);
  }
}

}  // namespace races

#define RACES_HOOK(name, size, writes)                                              \
  extern "C" RACES_UNINSTRUMENTED inline __attribute__((used)) void name(void* p) { \
    races::record(p, size, writes, __builtin_return_address(0));                    \
  }
#define RACES_HOOKS(size)                              \
  RACES_HOOK(__tsan_read##size, size, false)           \
  RACES_HOOK(__tsan_write##size, size, true)           \
  RACES_HOOK(__tsan_unaligned_read##size, size, false) \
  RACES_HOOK(__tsan_unaligned_write##size, size, true)
RACES_HOOKS(1)
RACES_HOOKS(2)
RACES_HOOKS(4)
RACES_HOOKS(8)
RACES_HOOKS(16)
#undef RACES_HOOKS
#undef RACES_HOOK

extern "C" {
RACES_UNINSTRUMENTED inline __attribute__((used)) void __tsan_read_range(void* p, size_t size) {
  races::record(p, size, false, __builtin_return_address(0));
}
RACES_UNINSTRUMENTED inline __attribute__((used)) void __tsan_write_range(void* p, size_t size) {
  races::record(p, size, true, __builtin_return_address(0));
}
RACES_UNINSTRUMENTED inline __attribute__((used)) void __tsan_func_entry(void*) {}
RACES_UNINSTRUMENTED inline __attribute__((used)) void __tsan_func_exit() {}
RACES_UNINSTRUMENTED inline __attribute__((used)) void __tsan_init() {}
}
#else
}  // namespace races
#endif
#undef RACES_UNINSTRUMENTED
