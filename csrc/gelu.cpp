// GELU in its tanh form on the CPU, forward and backward.
//
// gelu(x) = x * sigmoid(z), z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
#include "rows.h"

namespace uniworld {
namespace {

constexpr int64_t kRows = 16;             // of a task
constexpr float kLinear = 1.5957691216f;  // z = x (kLinear + kCubic x^2)
constexpr float kCubic = 0.0713548163f;
constexpr float kFlat = 20.f;             // beyond it the sigmoid is 0 or 1 in fp32, and x^2 must not overflow

// 2^x to 2e-7 of itself; x within -126..126, NaN stays.
template <typename V>
UNIWORLD_INLINE V power_of_two(const V& x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  using Bits = typename Vector<kWidth<V>>::Bits;
  const V shifted = x + kRound;
  const V part = x - (shifted - kRound);
  V y = 1.535336188e-4f * part + 1.339887440e-3f;
  y = y * part + 9.618437357e-3f;
  y = y * part + 5.550332890e-2f;
  y = y * part + 2.402264476e-1f;
  y = y * part + 6.931472028e-1f;
  y = y * part + 1.f;
  Bits exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent << 23) + 0x3f800000u;
  V power;
  std::memcpy(&power, &exponent, sizeof(power));
  return y * power;
}

// sigmoid(z), 1 - sigmoid(z) and dz/dx of one x.
template <typename V>
struct Gate {
  V sigmoid, rest, slope;

  UNIWORLD_INLINE explicit Gate(const V& x) {
    const V above = x > kFlat ? V{} + kFlat : x;
    const V near = above < -kFlat ? V{} - kFlat : above;
    const V square = near * near;
    const V exponent = near * (kLinear + kCubic * square) * -1.4426950408889634f;
    const V low = exponent < -126.f ? V{} - 126.f : exponent;
    const V within = low > 126.f ? V{} + 126.f : low;
    const V power = power_of_two(within);
    sigmoid = 1.f / (1.f + power);
    rest = power * sigmoid;
    slope = kLinear + 3.f * kCubic * square;
  }
};

struct Forward {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const T* x, T* out, int64_t D) {
    for_channels<W>(D, UNIWORLD_BODY {
      using V = decltype(zero);
      const V value = get<V>(x + i);
      const V y = value * Gate<V>(value).sigmoid;
      store(out + i, y);
    });
  }
};

struct Backward {
  template <int W, typename T>
  static UNIWORLD_INLINE void run(const T* dout, const T* x, T* dx, int64_t D) {
    for_channels<W>(D, UNIWORLD_BODY {
      using V = decltype(zero);
      const V value = get<V>(x + i);
      const Gate<V> gate(value);
      const V d = get<V>(dout + i) * gate.sigmoid * (1.f + value * gate.rest * gate.slope);
      store(dx + i, d);
    });
  }
};

// x, out: [M, N].
void gelu(int dtype, uintptr_t x, uintptr_t out, int64_t M, int64_t N) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(1, M, N, kRows, [&](int64_t, int64_t first, int64_t last, int64_t) {
      run<Forward>(static_cast<const T*>(pointer<T>(x) + first * N), pointer<T>(out) + first * N, (last - first) * N);
    });
  });
}

// dout, x, dx: [M, N].
void gelu_backward(int dtype, uintptr_t dout, uintptr_t x, uintptr_t dx, int64_t M, int64_t N) {
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_block(1, M, N, kRows, [&](int64_t, int64_t first, int64_t last, int64_t) {
      const T *d = pointer<T>(dout) + first * N, *from = pointer<T>(x) + first * N;
      run<Backward>(d, from, pointer<T>(dx) + first * N, (last - first) * N);
    });
  });
}

}  // namespace

void bind_gelu(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("gelu", &gelu, release());
  m.def("gelu_backward", &gelu_backward, release());
}

}  // namespace uniworld
