// The extension module: what Python sees of the kernels. Each part registers its own names.
#include "module.h"

NB_MODULE(_native, m) {
  nanobind::set_leak_warnings(false);  // a model that a thread still holds at the process's end is freed by that end
  m.doc() = "C++ kernels of Maestrale's native backend";
  maestrale::bind_linear(m);
  maestrale::bind_attention(m);
  maestrale::bind_pack(m);
  maestrale::bind_model(m);
  maestrale::bind_shared_sum(m);
}
