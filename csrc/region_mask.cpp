#include "core.h"

namespace uniworld {

void bind_region_mask(pybind11::module_&) {}

}  // namespace uniworld
