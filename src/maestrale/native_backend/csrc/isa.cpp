// Which instruction sets this processor and its operating system offer.
#include "kernels.h"
#include "tiles.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace maestrale {

namespace generic {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}
namespace amx_emulated {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#endif

namespace {

std::vector<const Kernels*> found() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C is older than AVX2
  const bool wide = two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#if defined(__linux__)
  if (wide && !amx_problem()) tables.push_back(&amx::table);
#endif
  if (wide) tables.push_back(&avx512::table);
  if (two) tables.push_back(&avx2::table);
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) tables.push_back(&neon::table);
#elif defined(__aarch64__) && defined(__APPLE__)
  tables.push_back(&neon::table);  // every Apple processor of this kind has dot products
#endif
  tables.push_back(&generic::table);
#if defined(__x86_64__)
  if (wide) tables.push_back(&amx_emulated::table);  // for tests: last, so that none but who names it gets it
#endif
  return tables;
}

}  // namespace

const std::vector<const Kernels*>& kernels() {
  static const std::vector<const Kernels*> tables = found();
  return tables;
}

const Kernels* find_kernels(const std::string& isa) {
  for (const Kernels* table : kernels())
    if (isa == table->isa) return table;
  return nullptr;
}

}  // namespace maestrale
