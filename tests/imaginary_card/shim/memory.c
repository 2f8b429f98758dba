// Memory, copies, streams, events and graphs, and who waits for them.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "card.h"

// ---- streams, captures, waits

typedef struct {
  size_t nodes;
} Graph;
typedef void (*Hook)(const char* what, void* stream, size_t bytes);
static Hook hook;  // of every call that makes the host wait for the device
static Stream default_stream;
static Stream* capture;  // the stream under capture
static __thread int thread_mode = cudaStreamCaptureModeGlobal;
static size_t work, done;  // launches and copies so far, and those that the host has waited for

void card_on_wait(Hook f) { hook = f; }

Stream* card_stream(cudaStream_t stream) { return (size_t)stream <= 2 ? &default_stream : (Stream*)stream; }

void card_add_work(cudaStream_t stream) {
  ++work;
  if (card_stream(stream)->capturing) card_stream(stream)->nodes++;
}

// Of calls that a capture forbids.
static cudaError_t unsafe(const char* what) {
  if (!capture || thread_mode == cudaStreamCaptureModeRelaxed || capture->mode == cudaStreamCaptureModeRelaxed)
    return 0;
  if (capture->mode == cudaStreamCaptureModeThreadLocal && !pthread_equal(capture->thread, pthread_self())) return 0;
  capture->dead = 1;
  return card_fail(cudaErrorStreamCaptureUnsupported, what);
}

static cudaError_t invalidate(Stream* stream, const char* what) {
  stream->dead = 1;
  return card_fail(cudaErrorStreamCaptureUnsupported, what);
}

static cudaError_t wait_for(const char* what, cudaStream_t stream, size_t bytes) {
  if (stream && card_stream(stream)->capturing) return invalidate(card_stream(stream), what);
  cudaError_t error = unsafe(what);
  if (error) return error;
  if (hook && done != work) hook(what, stream, bytes);  // an idle device makes nobody wait
  done = work;
  return 0;
}

static cudaError_t new_stream(cudaStream_t* stream, int priority) {
  Stream* created = calloc(1, sizeof *created);
  created->priority = priority;
  *stream = (cudaStream_t)created;
  return 0;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_stream(stream, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return new_stream(stream, 0); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return new_stream(stream, priority);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = card_stream(stream)->priority;
  return 0;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for("cudaStreamSynchronize", stream, 0); }
cudaError_t cudaDeviceSynchronize(void) { return wait_for("cudaDeviceSynchronize", 0, 0); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return unsafe("cudaStreamQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for("cudaEventSynchronize", 0, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return unsafe("cudaEventQuery"); }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = calloc(1, 8);
  return 0;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return 0;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1;
  return 0;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  function(data);
  return 0;
}

// ---- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if ((size_t)stream <= 2) return card_fail(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
  capture = card_stream(stream);
  *capture = (Stream){1, mode, 0, capture->priority, 0, pthread_self()};
  return 0;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                                          const cudaGraphEdgeData* edges, size_t count,
                                          enum cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(stream, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Stream* ended = card_stream(stream);
  if (!ended->capturing) return card_fail(cudaErrorIllegalState, "end of no capture");
  ended->capturing = 0;
  capture = NULL;
  if (ended->dead) {
    SET(graph, NULL);
    return card_fail(cudaErrorStreamCaptureInvalidated, "the capture was invalidated");
  }
  Graph* made = calloc(1, sizeof *made);
  made->nodes = ended->nodes;
  SET(graph, (cudaGraph_t)made);
  return 0;
}
static enum cudaStreamCaptureStatus status(cudaStream_t stream) {
  const Stream* asked = card_stream(stream);
  if (!asked->capturing) return cudaStreamCaptureStatusNone;
  return asked->dead ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* result) {
  const int is_default = (size_t)stream <= 2, own = capture && pthread_equal(capture->thread, pthread_self());
  if (is_default && own && capture->mode != cudaStreamCaptureModeRelaxed)
    return card_fail(cudaErrorStreamCaptureImplicit, "the default stream is asked during a capture");
  *result = status(stream);
  return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* result, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  static Graph under_capture;
  *result = status(stream);
  SET(id, 7);
  SET(graph, (cudaGraph_t)&under_capture);
  SET(count, 0);
  SET(dependencies, NULL);
  SET(edges, NULL);
  return 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  int old = thread_mode;
  thread_mode = *mode;
  *mode = old;
  return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  *executable = (cudaGraphExec_t)graph;
  return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = ((Graph*)graph)->nodes;
  return 0;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  static const unsigned one[3] = {1, 1, 1};
  char name[64];
  snprintf(name, sizeof name, "graph of %zu nodes", ((Graph*)executable)->nodes);
  return card_launch(name, one, one, 0, stream, 0, 0);
}

// ---- memory: the device's, and pinned memory of the host

const size_t card_memory = 80ull << 30;
enum { BLOCKS = 1 << 16, GRAIN = 2 << 20 };
typedef struct {
  char* at;  // NULL: the slot is free
  size_t size;
  int on_device;
} Block;
static Block blocks[BLOCKS];
static int slots;
static size_t used;

size_t card_memory_used(void) { return used; }

static Block* find(const void* p) {
  for (int i = slots - 1; i >= 0; --i)
    if (blocks[i].at && (char*)p >= blocks[i].at && (char*)p < blocks[i].at + blocks[i].size) return &blocks[i];
  return NULL;
}
static void* obtain(size_t size, int on_device) {
  size = size ? (size + GRAIN - 1) / GRAIN * GRAIN : GRAIN;
  if (on_device && used + size > card_memory) return NULL;
  void* p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return NULL;
  pthread_mutex_lock(&card_lock);
  int i = 0;
  while (i < slots && blocks[i].at) ++i;
  if (i == slots) ++slots;
  blocks[i] = (Block){p, size, on_device};
  if (on_device) used += size;
  pthread_mutex_unlock(&card_lock);
  return p;
}
static cudaError_t release(void* p) {
  if (!p) return 0;
  pthread_mutex_lock(&card_lock);
  Block* block = find(p);
  if (block) {
    munmap(block->at, block->size);
    if (block->on_device) used -= block->size;
    block->at = NULL;
  }
  pthread_mutex_unlock(&card_lock);
  return block ? 0 : card_fail(cudaErrorInvalidValue, "free of unknown memory");
}

cudaError_t cudaMalloc(void** p, size_t size) {
  cudaError_t error = unsafe("cudaMalloc");
  if (error) return error;
  *p = size ? obtain(size, 1) : NULL;
  return size && !*p ? card_fail(cudaErrorMemoryAllocation, "out of memory") : 0;
}
cudaError_t cudaFree(void* p) {
  cudaError_t error = p ? unsafe("cudaFree") : 0;
  return error ? error : release(p);
}
cudaError_t cudaHostAlloc(void** p, size_t size, unsigned flags) {
  cudaError_t error = unsafe("cudaHostAlloc");
  if (!error) *p = obtain(size, 0);
  return error;
}
cudaError_t cudaFreeHost(void* p) { return release(p); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = card_memory - used;
  *total = card_memory;
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* p) {
  const Block* block = find(p);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = !block ? cudaMemoryTypeUnregistered : block->on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->devicePointer = (void*)p;
  attributes->hostPointer = block && !block->on_device ? (void*)p : NULL;
  return 0;
}

static cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream, int blocking) {
  const Block *target = find(to), *source = find(from);
  const int pageable = !target || !source, to_host = !target || !target->on_device;
  if (card_stream(stream)->capturing) {
    if (pageable) return invalidate(card_stream(stream), "copy of pageable memory in a capture");
    card_add_work(stream);
  } else {
    card_add_work(stream);
    if (blocking || (pageable && to_host && source && source->on_device)) {
      cudaError_t error = wait_for(blocking ? "cudaMemcpy" : "cudaMemcpyAsync to pageable memory", stream, size);
      if (error) return error;
    } else if (pageable && size > 65536 && hook) {  // smaller ones are staged
      hook("cudaMemcpyAsync from pageable memory", stream, size);
    }
  }
  memmove(to, from, size);
  return 0;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  return copy(to, from, size, 0, 1);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, size, stream, 0);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t error = 0;
  for (size_t i = 0; i < height && !error; ++i)
    error = copy((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width, stream, 0);
  return error;
}
cudaError_t cudaMemset(void* p, int value, size_t size) {
  memset(p, value, size);
  return 0;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t stream) {
  card_add_work(stream);
  return cudaMemset(p, value, size);
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  static char room[1 << 16];
  *p = room;
  return 0;
}
