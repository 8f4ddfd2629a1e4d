// The table of chunks that the CUDA kernel walks; Python fills it (see kernels/ema_update.py).
#pragma once

#include <cstdint>

namespace uniworld {

// One row of the table in device memory: four int64.
struct EmaChunk {
  int64_t ema;     // address of the first fp32 element of the average
  int64_t source;  // address of the first element of the source
  int64_t count;   // elements, at least 1
  int64_t flags;   // kEmaSource* and kEmaAligned
};

constexpr int64_t kEmaSourceBFloat16 = 1;  // else fp32
constexpr int64_t kEmaAligned = 2;         // both addresses are multiples of 16 bytes and the count of 16

// Updates all chunks in one launch on `stream` of `device`. Returns a cudaError_t; 0 is success.
int launch_ema_update(const EmaChunk* chunks, int64_t num_chunks, float weight, int device, void* stream);

// Name and description of a cudaError_t, in static memory.
const char* cuda_error_name(int error);
const char* cuda_error_string(int error);

}  // namespace uniworld
