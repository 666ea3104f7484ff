#include "shared_sum.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "relax.h"

namespace maestrale {

namespace {

float widen(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

uint16_t narrow(float value) {  // to nearest, of two the even one
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return uint16_t(word >> 16 | 0x40);  // not a number
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace

SharedSum::SharedSum(char* segment, int64_t rank, int64_t ranks, int64_t slot)
    : segment_(segment), rank_(rank), ranks_(ranks), slot_(slot) {
  if (ranks < 1 || rank < 0 || rank >= ranks || slot < kLine || slot % kLine || reinterpret_cast<uintptr_t>(segment) % kLine)
    throw std::invalid_argument("a segment that no group of ranks shares");
  total_.resize(size_t(slot / 2));
}

int64_t SharedSum::sum(char* x, int64_t size, Summand kind, double patience) {
  while (done_ < size) {
    const int64_t piece = std::min(slot_, size - done_);
    if (!published_) {
      ++number_;
      std::memcpy(slot_of(rank_), x + done_, size_t(piece));
      std::atomic_ref(counter(rank_)).store(number_, std::memory_order_release);
      published_ = true;
    }
    for (int64_t rank = 0; rank < ranks_; ++rank)
      if (!await(rank, patience)) return rank;
    const int64_t count = piece / (kind == Summand::f32 ? 4 : 2);
    float* total = total_.data();
    for (int64_t rank = 0; rank < ranks_; ++rank) {
      const auto* floats = reinterpret_cast<const float*>(slot_of(rank));
      const auto* halves = reinterpret_cast<const uint16_t*>(slot_of(rank));
      if (kind == Summand::f32)
        for (int64_t i = 0; i < count; ++i) total[i] = rank ? total[i] + floats[i] : floats[i];
      else
        for (int64_t i = 0; i < count; ++i) total[i] = rank ? total[i] + widen(halves[i]) : widen(halves[i]);
    }
    if (kind == Summand::f32) {
      std::memcpy(x + done_, total, size_t(piece));
    } else {
      auto* halves = reinterpret_cast<uint16_t*>(x + done_);
      for (int64_t i = 0; i < count; ++i) halves[i] = narrow(total[i]);
    }
    done_ += piece;
    published_ = false;
  }
  done_ = 0;
  return -1;
}

// Until `rank` has come to our piece. The longer it takes the more of the processor is left to others.
bool SharedSum::await(int64_t rank, double patience) const {
  using Clock = std::chrono::steady_clock;
  std::atomic_ref<uint64_t> other(*reinterpret_cast<uint64_t*>(segment_ + rank * kLine));
  const auto begun = Clock::now();
  for (int spin = 0; other.load(std::memory_order_acquire) < number_; ++spin) {
    relax(spin);
    if (spin % 64 != 63) continue;
    const std::chrono::duration<double> waited = Clock::now() - begun;
    if (waited.count() > patience) return false;
    if (waited.count() > 2e-3) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}

}  // namespace maestrale
