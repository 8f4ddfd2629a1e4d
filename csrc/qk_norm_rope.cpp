#include "core.h"

namespace uniworld {

void bind_qk_norm_rope(pybind11::module_&) {}

}  // namespace uniworld
