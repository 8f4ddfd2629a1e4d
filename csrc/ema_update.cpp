// ema += weight * (source - ema), over many tensors in one call, on the CPU. Also binds the CUDA launcher.
#include "ema_update.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core.h"

// The product and the sum must be rounded one after the other, as PyTorch does: a fused multiply-add gives other bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

// One copy of the loop for each instruction set, chosen when the library is loaded: the wheel runs everywhere.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
#define UNIWORLD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define UNIWORLD_CLONES
#endif

namespace uniworld {
namespace {

constexpr int64_t kChunkElements = 1 << 16;

struct Chunk {
  float* ema;
  uintptr_t source;
  int64_t count;
  DType dtype;
};

UNIWORLD_CLONES void update_float32(float* __restrict ema, const float* __restrict source, int64_t n, float weight) {
  for (int64_t i = 0; i < n; ++i) ema[i] += weight * (source[i] - ema[i]);
}

UNIWORLD_CLONES void update_bfloat16(float* __restrict ema, const bfloat16* __restrict source, int64_t n, float weight) {
  for (int64_t i = 0; i < n; ++i) ema[i] += weight * (to_float(source[i]) - ema[i]);
}

UNIWORLD_CLONES void copy_bfloat16(float* __restrict ema, const bfloat16* __restrict source, int64_t n) {
  for (int64_t i = 0; i < n; ++i) ema[i] = to_float(source[i]);
}

void update_chunk(const Chunk& c, float weight) {
  const bool copy = weight == 1.0f;  // ema + (source - ema) is not always source: decay 0 must give its bits
  if (c.dtype == DType::kFloat32) {
    const float* source = pointer<const float>(c.source);
    if (copy) {
      std::memcpy(c.ema, source, c.count * sizeof(float));
    } else {
      update_float32(c.ema, source, c.count, weight);
    }
  } else if (copy) {
    copy_bfloat16(c.ema, pointer<const bfloat16>(c.source), c.count);
  } else {
    update_bfloat16(c.ema, pointer<const bfloat16>(c.source), c.count, weight);
  }
}

// Addresses, element counts and DType codes of the tensors, one entry each; contiguous, and checked in Python.
void ema_update(const std::vector<uintptr_t>& ema, const std::vector<uintptr_t>& source,
                const std::vector<int64_t>& counts, const std::vector<int>& source_dtypes, float weight) {
  if (ema.size() != source.size() || ema.size() != counts.size() || ema.size() != source_dtypes.size()) {
    throw std::invalid_argument("ema_update: the four lists must have equal lengths");
  }
  pybind11::gil_scoped_release release;
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < ema.size(); ++t) {
    const auto dtype = static_cast<DType>(source_dtypes[t]);
    const int64_t source_bytes = dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t start = 0; start < counts[t]; start += kChunkElements) {
      chunks.push_back({pointer<float>(ema[t]) + start, source[t] + start * source_bytes,
                        std::min(kChunkElements, counts[t] - start), dtype});
    }
  }
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
#pragma omp parallel for schedule(static) if (num_chunks > 1)
  for (int64_t i = 0; i < num_chunks; ++i) update_chunk(chunks[i], weight);
}

#ifdef UNIWORLD_WITH_CUDA
void ema_update_cuda(uintptr_t chunks, int64_t num_chunks, float weight, int device, uintptr_t stream) {
  const int error = launch_ema_update(pointer<const EmaChunk>(chunks), num_chunks, weight, device, pointer<void>(stream));
  if (error != 0) {
    throw std::runtime_error(std::string("ema_update: CUDA launch failed: ") + cuda_error_name(error) + " (" +
                             cuda_error_string(error) + ")");
  }
}
#endif

}  // namespace

void bind_ema_update(pybind11::module_& m) {
  using pybind11::arg;
  m.def("ema_update", &ema_update, arg("ema"), arg("source"), arg("counts"), arg("source_dtypes"), arg("weight"),
        "ema += weight * (source - ema) in fp32, for lists of tensors in host memory.");
#ifdef UNIWORLD_WITH_CUDA
  m.def("ema_update_cuda", &ema_update_cuda, arg("chunks"), arg("num_chunks"), arg("weight"), arg("device"),
        arg("stream"), "The same on a GPU, in one launch; `chunks` is a table of EmaChunk in device memory.");
#endif
}

}  // namespace uniworld
