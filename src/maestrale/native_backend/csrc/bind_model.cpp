#include "module.h"

namespace maestrale {

void bind_model(nanobind::module_&) {}

}  // namespace maestrale
