// An imaginary GPU: the runtime, driver and library calls of PyTorch's CUDA build, answered by one A100, H100 or B200
// whose memory is the host's. Copies are made. Kernels are recorded and not run, except for our own (see kernels.c).
// What CUDA would refuse is refused: too much shared memory, unregistered kernels, unsafe calls during a capture.
//
// The library is LD_PRELOADed under the name libcuda.so.1. ../build.py makes a stub for every other function that
// PyTorch links.
#pragma once

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stddef.h>

#define SET(pointer, value)            \
  do {                                 \
    if (pointer) *(pointer) = (value); \
  } while (0)

typedef struct {
  int major, minor, sms, shared_per_block, shared_per_sm, l2;
  const char* name;
} Chip;

// One launch, as ../card.py reads it.
typedef struct {
  char name[512];
  unsigned grid[3], block[3];
  size_t shared;  // bytes of dynamic shared memory
  void* stream;
  int captured;
} Launch;

typedef struct {
  int capturing, mode, dead, priority;
  size_t nodes;
  pthread_t thread;  // that began the capture
} Stream;

extern pthread_mutex_t card_lock;
extern const size_t card_memory;  // bytes

const Chip* card_chip(void);  // CARD_SM: 80, 90 (default) or 100
int card_attribute(int attribute);
size_t card_memory_used(void);

cudaError_t card_fail(cudaError_t error, const char* why);
cudaError_t card_launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared, void* stream,
                        int dynamic_limit, int fixed_shared);
Stream* card_stream(cudaStream_t stream);
void card_add_work(cudaStream_t stream);
