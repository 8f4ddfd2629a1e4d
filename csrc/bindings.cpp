#include <algorithm>

#include "core.h"
#include "rows.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

// What this CPU and its system can run beyond the baseline, of what the choice of kernels asks for.
static pybind11::list cpu_features() {
  pybind11::list found;
#ifdef __x86_64__
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");  // these ask the system, too
  if (avx512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1)) found.append("avx512_bf16");
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1) && (edx >> 24 & 1)) found.append("amx_bf16");
#endif
  return found;
}

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of uniworld: CPU kernels, and CUDA kernels where nvcc was found.";
#ifdef UNIWORLD_WITH_CUDA
  m.attr("cuda_archs") = UNIWORLD_WITH_CUDA;
#else
  m.attr("cuda_archs") = "";
#endif
  m.def("cpu_features", &cpu_features, "Of avx512_bf16 and amx_bf16, those that this CPU has.");
  m.def(
      "limit_instruction_set",
      [](int level) {
        const int before = uniworld::instruction_set();
        uniworld::instruction_set() = std::min(level, uniworld::widest_instruction_set());
        return before;
      },
      "For tests: at most 2 AVX-512, 1 AVX2 or 0 the baseline from now on. Returns what was in use.");
  uniworld::bind_adaln_modulate(m);
  uniworld::bind_attention_bf16(m);
  uniworld::bind_attention_bf16_backward(m);
  uniworld::bind_gate_residual(m);
  uniworld::bind_gelu(m);
  uniworld::bind_qk_norm_rope(m);
  uniworld::bind_ema_update(m);
  uniworld::bind_region_mask(m);
  uniworld::bind_scene_render(m);
}
