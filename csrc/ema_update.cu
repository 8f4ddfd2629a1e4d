// ema += weight * (source - ema) over a table of chunks: one block a chunk, one launch for all tensors.
#include "ema_update.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace uniworld {
namespace {

constexpr int kThreads = 512;
constexpr int kVector = 8;  // elements a thread takes at once: 16 bytes of bf16, 32 of fp32

// Two roundings, as PyTorch's two kernels do: nvcc would fuse them. Weight 1 copies the source's bits.
__device__ __forceinline__ float update(float ema, float source, float weight) {
  return weight == 1.0f ? source : __fadd_rn(ema, __fmul_rn(weight, __fsub_rn(source, ema)));
}

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ __forceinline__ void load_vector(const float* p, float (&x)[kVector]) {
  const float4 a = __ldcs(reinterpret_cast<const float4*>(p));
  const float4 b = __ldcs(reinterpret_cast<const float4*>(p) + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void load_vector(const __nv_bfloat16* p, float (&x)[kVector]) {
  const uint4 a = __ldcs(reinterpret_cast<const uint4*>(p));
  const unsigned words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <typename T>
__device__ void update_aligned(float* ema, const T* source, int64_t count, float weight) {
#pragma unroll 2
  for (int64_t i = threadIdx.x * kVector; i < count; i += kThreads * kVector) {
    float e[kVector], s[kVector];
    load_vector(ema + i, e);
    load_vector(source + i, s);
#pragma unroll
    for (int j = 0; j < kVector; ++j) e[j] = update(e[j], s[j], weight);
    float4* out = reinterpret_cast<float4*>(ema + i);
    __stcs(out, make_float4(e[0], e[1], e[2], e[3]));
    __stcs(out + 1, make_float4(e[4], e[5], e[6], e[7]));
  }
}

template <typename T>
__device__ void update_any(float* ema, const T* source, int64_t count, float weight) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) ema[i] = update(ema[i], load(source + i), weight);
}

template <typename T>
__device__ void update_chunk(const EmaChunk& c, float weight) {
  float* ema = reinterpret_cast<float*>(c.ema);
  const T* source = reinterpret_cast<const T*>(c.source);
  if (c.flags & kEmaAligned) {
    update_aligned(ema, source, c.count, weight);
  } else {
    update_any(ema, source, c.count, weight);
  }
}

__global__ void __launch_bounds__(kThreads) ema_update_kernel(const EmaChunk* chunks, float weight) {
  const EmaChunk c = chunks[blockIdx.x];
  if (c.flags & kEmaSourceBFloat16) {
    update_chunk<__nv_bfloat16>(c, weight);
  } else {
    update_chunk<float>(c, weight);
  }
}

}  // namespace

int launch_ema_update(const EmaChunk* chunks, int64_t num_chunks, float weight, int device, void* stream) {
  if (num_chunks == 0) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  ema_update_kernel<<<static_cast<unsigned>(num_chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(chunks, weight);
  return cudaGetLastError();
}

const char* cuda_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace uniworld
