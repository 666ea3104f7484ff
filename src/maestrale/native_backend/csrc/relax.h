// How a thread waits for another that is about to be done.
#pragma once

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace maestrale {

// A pause; after a while the processor is offered to others, who may be the ones that are waited for.
inline void relax(int spin) {
  if (spin > 1 << 12) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace maestrale
