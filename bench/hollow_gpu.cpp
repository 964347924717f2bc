// CUDA's runtime, driver, cuBLAS and NCCL as far as PyTorch calls them, with no GPU behind: see
// hollow_gpu.py. Memory is the host's and is touched only by copies; streams and events are done at
// once; kernels and products are counted and not computed. What may not be done while a stream is
// captured into a graph is refused as CUDA refuses it.
//
// Functions that only have to succeed are in hollow_gpu_rest.inc, which hollow_gpu.py writes.

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#undef cudaGetDeviceProperties
#define API extern "C" __attribute__((visibility("default")))

static size_t setting(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}
static size_t memory_size() { return setting("HOLLOW_GPU_MIB", 143771) << 20; }
static int capability() { return setting("HOLLOW_GPU_CAPABILITY", 90); }
static int device_count() { return setting("HOLLOW_GPU_COUNT", 1); }

static thread_local int device = 0;
static thread_local cudaError_t last_error = cudaSuccess;
static cudaError_t fail(cudaError_t error) { return last_error = error; }

// ---- what is counted

static std::atomic<long> kernels{0}, waits{0}, graphs{0};
API long hollow_kernels() { return kernels; }
API long hollow_waits() { return waits; }
API long hollow_graphs() { return graphs; }

// ---- memory

using Blocks = std::map<char*, size_t>;
static std::mutex lock;
static Blocks on_device, on_host;
static size_t used = 0;

static bool holds(const Blocks& blocks, const void* p) {
  std::lock_guard<std::mutex> guard(lock);
  auto after = blocks.upper_bound((char*)p);
  if (after == blocks.begin()) return false;
  auto& [begin, size] = *--after;
  return (char*)p < begin + size;
}
static void* pages(size_t size) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* p = mmap(nullptr, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}
static bool give_back(Blocks& blocks, void* p) {
  auto found = blocks.find((char*)p);
  if (found == blocks.end()) return false;
  munmap(p, found->second ? found->second : 1);
  blocks.erase(found);
  return true;
}
API cudaError_t cudaMalloc(void** p, size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  if (used + size > memory_size() || !(*p = pages(size))) return fail(cudaErrorMemoryAllocation);
  on_device[(char*)*p] = size;
  used += size;
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** p, size_t size, cudaStream_t) { return cudaMalloc(p, size); }
API cudaError_t cudaFree(void* p) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = on_device.find((char*)p);
  if (found != on_device.end()) used -= found->second;
  return !p || give_back(on_device, p) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t size, unsigned) {
  std::lock_guard<std::mutex> guard(lock);
  if (!(*p = pages(size))) return fail(cudaErrorMemoryAllocation);
  on_host[(char*)*p] = size;
  return cudaSuccess;
}
API cudaError_t cudaMallocHost(void** p, size_t size) { return cudaHostAlloc(p, size, 0); }
API cudaError_t cudaFreeHost(void* p) {
  std::lock_guard<std::mutex> guard(lock);
  give_back(on_host, p);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* p, size_t size, unsigned) {
  std::lock_guard<std::mutex> guard(lock);
  on_host[(char*)p] = size;
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
  std::lock_guard<std::mutex> guard(lock);
  on_host.erase((char*)p);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = memory_size();
  *free = *total - used;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeUnregistered;
  if (holds(on_device, p)) a->type = cudaMemoryTypeDevice;
  if (holds(on_host, p)) a->type = cudaMemoryTypeHost, a->hostPointer = (void*)p;
  if (a->type != cudaMemoryTypeUnregistered) a->devicePointer = (void*)p;
  return cudaSuccess;
}

// ---- capture into a graph, and waiting for the device

struct Capture {
  unsigned long long number;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
};
static std::map<void*, Capture> captures;  // by stream
static bool captured() {  // whether what is unsafe in a capture is refused to this thread
  std::lock_guard<std::mutex> guard(lock);
  for (auto& [stream, capture] : captures)
    if (capture.mode == cudaStreamCaptureModeGlobal ||
        capture.thread == std::this_thread::get_id())
      return true;
  return false;
}
static bool refused() {  // whether the host may not wait now
  waits++;
  return captured();
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  std::lock_guard<std::mutex> guard(lock);
  bool is = captures.count(s);
  *status = is ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* number) {
  cudaStreamIsCapturing(s, status);
  if (id) *id = captures.count(s) ? captures[s].number : 0;
  if (graph) *graph = (cudaGraph_t)1;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  std::lock_guard<std::mutex> guard(lock);
  static unsigned long long number = 0;
  captures[s] = {++number, mode, std::this_thread::get_id()};
  return cudaSuccess;
}
template <class T>
static cudaError_t make(T* handle) {
  *handle = (T)calloc(1, 256);
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  std::lock_guard<std::mutex> guard(lock);
  captures.erase(s);
  return make(graph);
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
  return make(e);
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
  return make(e);
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) {
  *number = 1;
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  graphs++;
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void*, cudaHostFn_t, unsigned, unsigned) {
  return make(o);
}

#define WAIT return refused() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess
API cudaError_t cudaDeviceSynchronize() { WAIT; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { WAIT; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { WAIT; }
#define ASK return captured() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess
API cudaError_t cudaStreamQuery(cudaStream_t) { ASK; }
API cudaError_t cudaEventQuery(cudaEvent_t) { ASK; }

API cudaError_t cudaStreamCreate(cudaStream_t* s) { return make(s); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return make(s); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return make(s); }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { return *p = 0, cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return make(e); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return make(e); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  return *ms = 1.0f, cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void* data) {
  cudaStreamCaptureStatus status;
  cudaStreamIsCapturing(s, &status);
  if (status == cudaStreamCaptureStatusNone) function(data);
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(
    cudaStream_t s, cudaStreamCallback_t function, void* data, unsigned) {
  return function(s, cudaSuccess, data), cudaSuccess;
}

// ---- copies: real, but not of what kernels would have made in bulk

static const size_t BULK = 256u << 20;
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  if (n <= BULK || !holds(on_device, to) || !holds(on_device, from)) memcpy(to, from, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
  if (refused()) return fail(cudaErrorStreamCaptureUnsupported);
  return cudaMemcpyAsync(to, from, n, kind, nullptr);
}
API cudaError_t cudaMemcpyPeerAsync(
    void* to, int, const void* from, int, size_t n, cudaStream_t s) {
  return cudaMemcpyAsync(to, from, n, cudaMemcpyDefault, s);
}
API cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
    cudaMemcpyKind, cudaStream_t) {
  for (size_t i = 0; i < height; i++)
    memcpy((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t) {
  if (n <= BULK) memset(to, value, n);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* to, int value, size_t n) {
  return cudaMemsetAsync(to, value, n, nullptr);
}

// ---- the device: an H200's sizes

static int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrL2CacheSize: return 60 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels: return 1;
    default: return 0;
  }
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  const char* name = getenv("HOLLOW_GPU_NAME");
  snprintf(p->name, sizeof p->name, "%s", name ? name : "hollow GPU");
  p->totalGlobalMem = memory_size();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->cooperativeLaunch = 1;
  p->asyncEngineCount = 3;
  p->memoryBusWidth = 6144;
  p->textureAlignment = 512;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceCount(int* n) { return *n = device_count(), cudaSuccess; }
API cudaError_t cudaGetDevice(int* n) { return *n = device, cudaSuccess; }
API cudaError_t cudaSetDevice(int n) {
  if (n < 0 || n >= device_count()) return fail(cudaErrorInvalidDevice);
  return device = n, cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) { return *v = 1, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int n) {
  return snprintf(text, size, "0000:%02x:00.0", n), cudaSuccess;
}
API const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
API const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  if (error == cudaErrorStreamCaptureUnsupported)
    return "operation not permitted when stream is capturing";
  return "an error of the hollow GPU";
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}

// ---- kernels

struct Launch {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local Launch launch;
API void** __cudaRegisterFatBinary(void*) { return (void**)calloc(1, 64); }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t s) {
  return launch = {grid, block, shared, s}, 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* s) {
  *grid = launch.grid, *block = launch.block, *shared = launch.shared;
  return *(cudaStream_t*)s = launch.stream, cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}
#define RUN return kernels++, cudaSuccess
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { RUN; }
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { RUN; }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { RUN; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = capability();
  a->maxDynamicSharedSizeBytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  return *n = 2, cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* n, const void*, int, size_t, unsigned) {
  return *n = 2, cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  return *p = (void*)symbol, cudaSuccess;
}

// ---- the driver, which Triton's launcher calls

static int nothing() { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (!(*function = dlsym(self, name))) *function = (void*)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
API CUresult cuDeviceGet(CUdevice* d, int n) { return *d = n, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* n) { return *n = device_count(), CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* v) { return *v = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
static CUcontext context(size_t n) { return (CUcontext)(16 + n); }
API CUresult cuCtxGetCurrent(CUcontext* c) { return *c = context(device), CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* d) { return *d = device, CUDA_SUCCESS; }
API CUresult cuStreamGetCtx(CUstream, CUcontext* c) { return *c = context(device), CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) {
  return *c = context(d), CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
template <class T>
static CUresult made(T* handle) {
  return make(handle), CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule* p, const char*) { return made(p); }
API CUresult cuModuleLoadData(CUmodule* p, const void*) { return made(p); }
API CUresult cuModuleLoadDataEx(CUmodule* p, const void*, unsigned, CUjit_option*, void**) {
  return made(p);
}
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char*) { return made(f); }
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(
    CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
    void**, void**) {
  return kernels++, CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction, void**, void**) {
  return kernels++, CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** text) {
  return *text = "an error of the hollow GPU", CUDA_SUCCESS;
}
API CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* status) {
  return cudaStreamIsCapturing(s, (cudaStreamCaptureStatus*)status), CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr p) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr*)value = p;
  else if (which == CU_POINTER_ATTRIBUTE_CONTEXT)
    *(CUcontext*)value = context(0);
  else
    memset(value, 0, sizeof(int));
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttributes(
    unsigned n, CUpointer_attribute* which, void** values, CUdeviceptr p) {
  for (unsigned i = 0; i < n; i++) cuPointerGetAttribute(values[i], which[i], p);
  return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  return *n = 2, CUDA_SUCCESS;
}

// ---- cuBLAS

API cublasStatus_t cublasCreate_v2(cublasHandle_t* h) { return make(h), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  return *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  return *mode = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS;
}
API size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
API cublasStatus_t cublasLtMatmulDescCreate(
    cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) {
  return make(d), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* d, cudaDataType, uint64_t, uint64_t, int64_t) {
  return make(d), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* d) {
  return make(d), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
    cublasLtMatmulHeuristicResult_t* found, int* number) {
  memset(found, 0, sizeof *found);
  return *number = 1, CUBLAS_STATUS_SUCCESS;
}

// ---- NCCL: ranks of this machine meet in shared memory. Small numbers are really summed, since
// ranks decide by them; of large ones each rank keeps its own, as if it had computed them.

struct UniqueId {
  char text[128];
};
enum { SUM = 0, MAX = 2, MIN = 3 };
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
static const size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
static const size_t SLOT = 1 << 20;  // bytes of a rank

struct Meeting {
  std::atomic<int> arrived, round;
  char padding[56];
  char slots[];
};
struct Communicator {
  int rank, size;
  Meeting* meeting;
  void meet() {  // all ranks have come here
    int round = meeting->round;
    if (++meeting->arrived == size) {
      meeting->arrived = 0;
      meeting->round++;
    } else {
      while (meeting->round == round) std::this_thread::yield();
    }
  }
  // Every rank puts `bytes` into its slot; `read` looks at all of them
  template <class F>
  void exchange(const void* mine, size_t bytes, F read) {
    if (bytes <= SLOT) memcpy(meeting->slots + rank * SLOT, mine, bytes);
    meet();
    if (bytes <= SLOT) read(meeting->slots);
    meet();
  }
};
static Communicator* join(const char* name, int size, int rank) {
  size_t bytes = sizeof(Meeting) + size * SLOT;
  int file = shm_open(name, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, bytes)) return nullptr;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  auto* result = new Communicator{rank, size, (Meeting*)p};
  result->meet();
  if (rank == 0) shm_unlink(name);
  return result;
}
API int ncclGetVersion(int* version) { return *version = 22800, 0; }
API const char* ncclGetErrorString(int) { return "an error of the hollow GPU"; }
API const char* ncclGetLastError(void*) { return ""; }
API int ncclGetUniqueId(UniqueId* id) {
  static int number = 0;
  memset(id, 0, sizeof *id);
  snprintf(id->text, sizeof id->text, "/hollow-gpu-%d-%d", getpid(), number++);
  return 0;
}
API int ncclCommInitRank(Communicator** c, int size, UniqueId id, int rank) {
  return (*c = join(id.text, size, rank)) ? 0 : 2;
}
API int ncclCommInitRankConfig(Communicator** c, int size, UniqueId id, int rank, void*) {
  return ncclCommInitRank(c, size, id, rank);
}
API int ncclCommSplit(Communicator* c, int color, int key, Communicator** out, void*) {
  static int number = 0;
  char name[128];
  int creator = getpid();
  c->exchange(&creator, sizeof creator, [&](char* slots) { memcpy(&creator, slots, 4); });
  snprintf(name, sizeof name, "/hollow-gpu-%d-split-%d-%d", creator, number++, color);
  int mine[] = {color, key}, size = 0, rank = 0;
  c->exchange(mine, sizeof mine, [&](char* slots) {
    for (int i = 0; i < c->size; i++) {
      int* theirs = (int*)(slots + i * SLOT);
      if (theirs[0] == color) size++, rank += theirs[1] < key || (theirs[1] == key && i < c->rank);
    }
  });
  *out = color < 0 ? nullptr : join(name, size, rank);
  return 0;
}
API int ncclCommCount(Communicator* c, int* n) { return *n = c->size, 0; }
API int ncclCommUserRank(Communicator* c, int* n) { return *n = c->rank, 0; }
API int ncclCommGetAsyncError(Communicator*, int* error) { return *error = 0, 0; }

template <class T>
static void reduce(void* out, const char* slots, int ranks, size_t from, size_t n, int how) {
  for (size_t i = 0; i < n; i++) {
    T value = ((T*)slots)[from + i];
    for (int r = 1; r < ranks; r++) {
      T other = ((T*)(slots + r * SLOT))[from + i];
      value = how == MAX   ? (other > value ? other : value)
              : how == MIN ? (other < value ? other : value)
                           : value + other;
    }
    ((T*)out)[i] = value;
  }
}
static void reduce(
    void* out, const char* slots, int ranks, size_t from, size_t n, int type, int how) {
  if (type == FLOAT32) reduce<float>(out, slots, ranks, from, n, how);
  if (type == FLOAT64) reduce<double>(out, slots, ranks, from, n, how);
  if (type == INT64) reduce<int64_t>(out, slots, ranks, from, n, how);
  if (type == INT32) reduce<int>(out, slots, ranks, from, n, how);
  if (type == UINT8 || type == INT8) reduce<uint8_t>(out, slots, ranks, from, n, how);
}
API int ncclAllReduce(
    const void* in, void* out, size_t n, int type, int how, Communicator* c, void*) {
  c->exchange(in, n * SIZES[type], [&](char* slots) {
    reduce(out, slots, c->size, 0, n, type, how);
  });
  return 0;
}
API int ncclReduceScatter(
    const void* in, void* out, size_t n, int type, int how, Communicator* c, void*) {
  c->exchange(in, n * c->size * SIZES[type], [&](char* slots) {
    reduce(out, slots, c->size, n * c->rank, n, type, how);
  });
  return 0;
}
API int ncclAllGather(const void* in, void* out, size_t n, int type, Communicator* c, void*) {
  size_t bytes = n * SIZES[type];
  c->exchange(in, bytes, [&](char* slots) {
    for (int r = 0; r < c->size; r++) memcpy((char*)out + r * bytes, slots + r * SLOT, bytes);
  });
  return 0;
}
API int ncclBroadcast(
    const void* in, void* out, size_t n, int type, int root, Communicator* c, void*) {
  c->exchange(in, n * SIZES[type], [&](char* slots) {
    memcpy(out, slots + root * SLOT, n * SIZES[type]);
  });
  return 0;
}

#include "hollow_gpu_rest.inc"
