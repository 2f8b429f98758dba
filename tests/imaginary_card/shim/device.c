// The device, the driver's functions, and the libraries.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "card.h"

// ---- the device

const Chip* card_chip(void) {
  static const Chip a100 = {8, 0, 108, 163 << 10, 164 << 10, 40 << 20, "Imaginary A100"},
                    h100 = {9, 0, 132, 227 << 10, 228 << 10, 50 << 20, "Imaginary H100"},
                    b200 = {10, 0, 148, 227 << 10, 228 << 10, 126 << 20, "Imaginary B200"};
  const char* sm = getenv("CARD_SM");
  if (!sm || !strcmp(sm, "90")) return &h100;
  if (!strcmp(sm, "80")) return &a100;
  if (!strcmp(sm, "100")) return &b200;
  fprintf(stderr, "imaginary card: CARD_SM is %s, expected 80, 90 or 100\n", sm);
  exit(2);
}

int card_attribute(int attribute) {
  const Chip* chip = card_chip();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return chip->shared_per_block;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return chip->shared_per_sm;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1024;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMultiProcessorCount:
      return chip->sms;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrL2CacheSize:
      return chip->l2;
    case cudaDevAttrComputeCapabilityMajor:
      return chip->major;
    case cudaDevAttrComputeCapabilityMinor:
      return chip->minor;
    case cudaDevAttrClockRate:
      return 1755000;
    case cudaDevAttrMemoryClockRate:
      return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrConcurrentKernels:
      return 1;
    default:
      return 0;
  }
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  const Chip* chip = card_chip();
  memset(p, 0, sizeof *p);
  strcpy(p->name, chip->name);
  p->totalGlobalMem = card_memory;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = chip->shared_per_block;
  p->sharedMemPerMultiprocessor = chip->shared_per_sm;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = chip->major;
  p->minor = chip->minor;
  p->multiProcessorCount = chip->sms;
  p->l2CacheSize = chip->l2;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->memPitch = 2147483647;
  p->memoryBusWidth = 5120;
  p->asyncEngineCount = 3;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = p->clusterLaunch = p->memoryPoolsSupported = 1;
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  *value = card_attribute(attribute);
  return 0;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
cudaError_t cudaSetDevice(int device) { return device ? card_fail(cudaErrorInvalidDevice, "no such device") : 0; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return 0;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size, "0000:01:00.0");
  return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int* value, int device, int peer) {
  *value = 0;
  return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = -5;
  return 0;
}

// ---- the driver, through which Triton launches

typedef struct {
  char name[256];
  int dynamic_limit;
} Function;

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return 0;
}
CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return 0;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
CUresult cuDeviceGetName(char* text, int size, CUdevice device) {
  snprintf(text, size, "%s", card_chip()->name);
  return 0;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = card_attribute(attribute);
  return 0;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  SET(flags, 0);
  *active = 1;
  return 0;
}
static CUcontext the_context(void) { return (CUcontext)8; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = the_context();
  return 0;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = the_context();
  return 0;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return 0;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error ? "error of the imaginary card" : "no error";
  return 0;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuModuleLoad(CUmodule* module, const char* path) {
  *module = (CUmodule)8;
  return 0;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return cuModuleLoad(module, NULL); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) {
  return cuModuleLoad(module, NULL);
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Function* made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->dynamic_limit = 48 << 10;
  *function = (CUfunction)made;
  return 0;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return 0;
  if (value > card_chip()->shared_per_block) return CUDA_ERROR_INVALID_VALUE;
  ((Function*)function)->dynamic_limit = value;
  return 0;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** arguments, void** extra) {
  const Function* kernel = (const Function*)function;
  const unsigned grid[3] = {x, y, z}, block[3] = {bx, by, bz};
  return (CUresult)card_launch(kernel->name, grid, block, shared, stream, kernel->dynamic_limit, 0);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, arguments, extra);
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(void**)value = (void*)pointer;
  return 0;
}

static int nothing(void) { return 0; }
static void* lookup(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  return found ? found : (void*)nothing;
}
CUresult cuGetProcAddress_v2(const char* name, void** function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* result) {
  *function = lookup(name);
  SET(result, 0);
  return 0;
}
#undef cuGetProcAddress
CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t flags) {
  *function = lookup(name);
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* result) {
  *function = lookup(name);
  SET(result, 0);
  return 0;
}

// ---- libraries; the stubs of their products call `card_library_call`

int card_library_call(const char* name) {
  static const unsigned one[3] = {1, 1, 1};
  return card_launch(name, one, one, 0, NULL, 0, 0);
}
int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference,
                                   int wanted, char* results, int* count) {
  memset(results, 0, 96);  // a cublasLtMatmulHeuristicResult_t without workspace, whose state is success
  *count = 1;
  return 0;
}
int cublasGetMathMode(void* handle, int* mode) {
  *mode = 0;
  return 0;
}
int cublasGetPointerMode_v2(void* handle, int* mode) { return cublasGetMathMode(handle, mode); }
size_t cublasLtGetVersion(void) { return 130100; }
size_t cudnnGetVersion(void) { return 92400; }
int cudnnGetProperty(int which, int* value) {
  *value = which == 0 ? 9 : which == 1 ? 24 : 0;
  return 0;
}
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char* cudnnGetErrorString(int error) { return "error of the imaginary card's cuDNN"; }
