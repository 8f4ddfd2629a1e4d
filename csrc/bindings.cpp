#include "core.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of uniworld: CPU kernels, and CUDA kernels where nvcc was found.";
#ifdef UNIWORLD_WITH_CUDA
  m.attr("cuda_archs") = UNIWORLD_WITH_CUDA;
#else
  m.attr("cuda_archs") = "";
#endif
  uniworld::bind_adaln_modulate(m);
  uniworld::bind_gate_residual(m);
  uniworld::bind_qk_norm_rope(m);
  uniworld::bind_ema_update(m);
  uniworld::bind_region_mask(m);
  uniworld::bind_scene_render(m);
}
