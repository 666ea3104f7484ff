// Whether AMX may be used: the processor has it, the system lends it, and it gives the sums that it should.
#include "tiles.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "activations.h"

namespace maestrale {

namespace avx512 {
extern const Kernels table;
}
namespace amx {
extern const Kernels table;
}

namespace {

// A product of numbers so small and round that every order of adding gives the same bits.
struct Sample {
  static constexpr int64_t kOutputs = 48, kInputs = 192, kGroup = 32, kCount = 23;  // rows: a full tile, and another
  Weight weight;
  Activations room;
  Rows rows{};
  std::vector<uint8_t> data;
  std::vector<int32_t> sums;
  std::vector<float> ones, expected, found;
  std::vector<uint16_t> scales;

  explicit Sample(Format format)
      : weight{format, kOutputs, kInputs, kGroup, nullptr, nullptr, nullptr, nullptr, nullptr},
        data(size_t(kOutputs / kBlock * block_bytes(weight))),
        sums(size_t(kOutputs)),
        ones(size_t(kOutputs), 1),
        expected(size_t(kCount * kOutputs)),
        found(size_t(kCount * kOutputs)),
        scales(size_t(kOutputs * (kInputs / kGroup)), 0x3c00) {  // 1 in float16
    for (size_t i = 0; i < data.size(); ++i) {
      const bool upper = i % 2;  // bf16: 0.5 to 0.875 and 2 to 3.5
      data[i] = uint8_t(format != Format::bf16 ? i * 11 % 251 : upper ? 0x3f + i / 2 % 2 : i * 5 % 8 * 16);
      sums[i / size_t(block_bytes(weight)) * kBlock + i / 4 % kBlock] += int8_t(data[i]);
    }
    weight.data = data.data(), weight.row_scales = ones.data(), weight.sums = sums.data();
    weight.scales = scales.data();
    std::vector<float> x(size_t(kCount * kInputs));
    for (size_t i = 0; i < x.size(); ++i) x[i] = i % kInputs ? float(int(i * 7 % 15) - 7) : 127;  // 127: a scale of 1
    room.want(weight);
    room.reserve(kCount);
    room.prepare(avx512::table, {&weight}, x.data(), kInputs, 0, kCount);
    rows = room.rows(weight, 0, kCount);
    avx512::table.linear(weight, rows, 0, blocks_of(weight), {expected.data(), kOutputs});
  }

  bool same() {
    amx::table.linear(weight, rows, 0, blocks_of(weight), {found.data(), kOutputs});
    return std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0;
  }
};

constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of Linux

const char* unavailable() {
  unsigned a, b, c, d;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, bytes
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return "this processor has no AMX";
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kSaved = 3u << 17;
  if ((low & kSaved) != kSaved) return "the operating system does not keep AMX's tiles";
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the operating system does not lend AMX's tiles";
  return amx_self_test();
}

}  // namespace

const char* amx_self_test() {
  Sample bytes(Format::int8), nibbles(Format::int4), pairs(Format::bf16);
  const pid_t child = fork();
  if (child < 0) return "no process can be started for AMX's self-test";
  if (child == 0) {  // nothing here takes memory or a lock: other threads may have held one
    for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGALRM}) signal(number, SIG_DFL);
    alarm(10);
    _exit(bytes.same() && nibbles.same() && pairs.same() ? 0 : 1);
  }
  int status = 0;
  pid_t ended;
  while ((ended = waitpid(child, &status, 0)) < 0 && errno == EINTR) {
  }
  if (ended != child || !WIFEXITED(status)) return "AMX's self-test was ended by the system";
  return WEXITSTATUS(status) == 0 ? nullptr : "AMX's self-test gave other sums than vectors do";
}

const char* amx_problem() {
  static const char* const problem = unavailable();
  return problem;
}

}  // namespace maestrale

#else

namespace maestrale {

const char* amx_problem() { return "AMX is used on x86-64 under Linux alone"; }
const char* amx_self_test() { return amx_problem(); }

}  // namespace maestrale

#endif
