#include "core.h"

namespace uniworld {

void bind_adaln_modulate(pybind11::module_&) {}

}  // namespace uniworld
