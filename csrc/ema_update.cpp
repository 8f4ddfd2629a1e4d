#include "core.h"

namespace uniworld {

void bind_ema_update(pybind11::module_&) {}

}  // namespace uniworld
