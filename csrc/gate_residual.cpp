#include "core.h"

namespace uniworld {

void bind_gate_residual(pybind11::module_&) {}

}  // namespace uniworld
