#include <algorithm>

#include "core.h"
#include "rows.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of uniworld: CPU kernels, and CUDA kernels where nvcc was found.";
#ifdef UNIWORLD_WITH_CUDA
  m.attr("cuda_archs") = UNIWORLD_WITH_CUDA;
#else
  m.attr("cuda_archs") = "";
#endif
  m.def(
      "limit_instruction_set",
      [](int level) {
        const int before = uniworld::instruction_set();
        uniworld::instruction_set() = std::min(level, uniworld::widest_instruction_set());
        return before;
      },
      "For tests: at most 2 AVX-512, 1 AVX2 or 0 the baseline from now on. Returns what was in use.");
  uniworld::bind_adaln_modulate(m);
  uniworld::bind_gate_residual(m);
  uniworld::bind_qk_norm_rope(m);
  uniworld::bind_ema_update(m);
  uniworld::bind_region_mask(m);
  uniworld::bind_scene_render(m);
}
