// Kernels: registration, shared memory, launches, and errors.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "card.h"

pthread_mutex_t card_lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last_error;

cudaError_t card_fail(cudaError_t error, const char* why) {
  if (error != cudaErrorMemoryAllocation) fprintf(stderr, "imaginary card: error %d: %s\n", error, why);
  return last_error = error;
}
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = 0;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : error ? "error of the imaginary card" : "no error";
}
const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorImaginary" : "cudaSuccess"; }

// ---- registered kernels, by the address of their host function

typedef struct {
  const void* host;
  char* name;
  int fixed_shared;   // bytes of static shared memory; -1: unknown
  int dynamic_limit;  // bytes
} Kernel;
enum { SLOTS = 1 << 20, DEFAULT_LIMIT = 48 << 10 };
static Kernel* table;

static Kernel* find(const void* host) {
  if (!table) table = calloc(SLOTS, sizeof *table);
  size_t i = ((size_t)host >> 4) * 0x9E3779B97F4A7C15ull >> 44;
  while (table[i].host && table[i].host != host) i = (i + 1) % SLOTS;
  return &table[i];
}

// The lines of CARD_RESOURCES are "sm name bytes", as cuobjdump tells them of our kernels. The others' are taken for 0.
static int fixed_shared(const char* name) {
  static char* text;
  if (!strstr(name, "abkd")) return 0;
  if (!text) {
    const char* path = getenv("CARD_RESOURCES");
    FILE* file = path ? fopen(path, "r") : NULL;
    text = calloc(1, 1 << 22);
    if (file) {
      if (!fread(text, 1, (1 << 22) - 1, file)) text[0] = 0;
      fclose(file);
    }
  }
  char key[600];
  snprintf(key, sizeof key, "sm_%d%d %s ", card_chip()->major, card_chip()->minor, name);
  const char* at = strstr(text, key);
  return at ? atoi(at + strlen(key)) : -1;
}

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int threads, void* tid,
                            void* bid, void* block, void* grid, int* size) {
  pthread_mutex_lock(&card_lock);
  *find(host) = (Kernel){host, strdup(name), fixed_shared(name), DEFAULT_LIMIT};
  pthread_mutex_unlock(&card_lock);
}
void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
char __cudaInitModule(void** handle) { return 0; }
void __cudaRegisterVar(void** handle, char* host, char* address, const char* name, int external, size_t size,
                       int constant, int global) {}

cudaError_t cudaFuncSetAttribute(const void* host, enum cudaFuncAttribute attribute, int value) {
  Kernel* kernel = find(host);
  if (!kernel->host) return card_fail(cudaErrorInvalidDeviceFunction, "attribute of an unregistered kernel");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return 0;
  if (value < 0 || value + (kernel->fixed_shared > 0 ? kernel->fixed_shared : 0) > card_chip()->shared_per_block) {
    char why[700];
    snprintf(why, sizeof why, "%d + %d bytes of shared memory: %s", value, kernel->fixed_shared, kernel->name);
    return card_fail(cudaErrorInvalidValue, why);
  }
  kernel->dynamic_limit = value > DEFAULT_LIMIT ? value : DEFAULT_LIMIT;  // what is allowed anyway stays allowed
  return 0;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                            int device) {
  return cudaFuncSetAttribute(kernel, attribute, value);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* host) {
  Kernel* kernel = find(host);
  if (!kernel->host) return card_fail(cudaErrorInvalidDeviceFunction, "attributes of an unregistered kernel");
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = kernel->fixed_shared > 0 ? kernel->fixed_shared : 0;
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->maxDynamicSharedSizeBytes = kernel->dynamic_limit;
  attributes->ptxVersion = attributes->binaryVersion = card_chip()->major * 10;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t shared, unsigned flags) {
  *blocks = 2;
  return 0;
}

// ---- launches

enum { RING = 1 << 16 };
static Launch* ring;
static size_t launches;

// Runs our row kernel's device code on the host; NULL: kernels are recorded alone. (../rows_on_card.cpp)
typedef void (*RowKernel)(const char* name, void** arguments, unsigned blocks, unsigned threads, size_t shared);
static RowKernel row_kernel;

cudaError_t card_launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared, void* stream,
                        int dynamic_limit, int fixed_shared) {
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535)
    return card_fail(cudaErrorInvalidConfiguration, name);
  const size_t threads = (size_t)block[0] * block[1] * block[2];
  if (threads == 0 || threads > 1024 || block[2] > 64) return card_fail(cudaErrorInvalidConfiguration, name);
  if ((long)shared > dynamic_limit || (long)shared + fixed_shared > card_chip()->shared_per_block)
    return card_fail(cudaErrorInvalidValue, name);
  pthread_mutex_lock(&card_lock);
  if (!ring) ring = calloc(RING, sizeof *ring);
  Launch* launch = &ring[launches++ % RING];
  snprintf(launch->name, sizeof launch->name, "%s", name);
  memcpy(launch->grid, grid, sizeof launch->grid);
  memcpy(launch->block, block, sizeof launch->block);
  launch->shared = shared;
  launch->stream = stream;
  launch->captured = card_stream(stream)->capturing;
  pthread_mutex_unlock(&card_lock);
  card_add_work(stream);
  return 0;
}

static cudaError_t launch(const void* host, dim3 g, dim3 b, void** arguments, size_t shared, void* stream) {
  const Kernel* kernel = find(host);
  if (!kernel->host) return card_fail(cudaErrorInvalidDeviceFunction, "launch of an unregistered kernel");
  if (kernel->fixed_shared < 0) return card_fail(cudaErrorInvalidKernelImage, "a kernel that CARD_RESOURCES lacks");
  const unsigned grid[3] = {g.x, g.y, g.z}, block[3] = {b.x, b.y, b.z};
  cudaError_t error =
      card_launch(kernel->name, grid, block, shared, stream, kernel->dynamic_limit, kernel->fixed_shared);
  if (!error && row_kernel && !card_stream(stream)->capturing && strstr(kernel->name, "row_kernel"))
    row_kernel(kernel->name, arguments, g.x, b.x, shared);
  return error;
}

typedef struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} Configuration;
static __thread Configuration calls[8];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  calls[depth++] = (Configuration){grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration* call = &calls[--depth];
  *grid = call->grid;
  *block = call->block;
  *shared = call->shared;
  *(void**)stream = call->stream;
  return 0;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)host;
  return 0;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(host, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  return launch(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

// ---- for ../card.py

size_t card_launches(void) { return launches; }
const Launch* card_launch_at(size_t i) { return &ring[i % RING]; }
void card_run_row_kernels(RowKernel run) { row_kernel = run; }
int card_fixed_shared(const char* name) { return fixed_shared(name); }
