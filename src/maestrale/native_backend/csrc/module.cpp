// The extension module: what Python sees of the kernels. Each part registers its own names.
#include "module.h"

NB_MODULE(_native, m) {
  m.doc() = "C++ kernels of Maestrale's native backend";
  maestrale::bind_linear(m);
  maestrale::bind_attention(m);
  maestrale::bind_pack(m);
  maestrale::bind_model(m);
  maestrale::bind_shared_sum(m);
}
