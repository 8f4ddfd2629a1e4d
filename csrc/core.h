// What every file of the core shares: the element types that cross the border and the binding hooks.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

namespace uniworld {

// Tensors cross the border as addresses; Python has checked shapes, strides and devices.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bfloat16 from_float<bfloat16>(float x) {  // round to nearest even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}

template <typename T>
T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// One hook a source file; bindings.cpp calls them all.
void bind_adaln_modulate(pybind11::module_& m);
void bind_attention_bf16(pybind11::module_& m);
void bind_attention_bf16_backward(pybind11::module_& m);
void bind_gate_residual(pybind11::module_& m);
void bind_gelu(pybind11::module_& m);
void bind_qk_norm_rope(pybind11::module_& m);
void bind_ema_update(pybind11::module_& m);
void bind_region_mask(pybind11::module_& m);
void bind_scene_render(pybind11::module_& m);

}  // namespace uniworld
