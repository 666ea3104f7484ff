// The sum over several processes of one host, through memory that they share: microseconds, where sockets take a
// quarter of a millisecond.
//
// The segment: for each process a line with a counter, then for each process two slots of `slot` bytes. A piece goes
// into one's own slot, its number into one's counter; when all counters have come so far, everybody adds all slots up,
// in the order of the processes, in fp32: so all have the same bits. Two slots are enough: who writes piece n has seen
// all counters at n - 1, and those who wrote that had read n - 2.
#pragma once

#include <cstdint>
#include <vector>

namespace maestrale {

enum class Summand { f32, bf16 };

class SharedSum {
 public:
  static constexpr int64_t kLine = 64;

  // segment: bytes(ranks, slot) zeros to begin with, the same memory in all processes. slot: a multiple of kLine.
  SharedSum(char* segment, int64_t rank, int64_t ranks, int64_t slot);

  static int64_t bytes(int64_t ranks, int64_t slot) { return ranks * (kLine + 2 * slot); }

  // Adds `size` bytes of x up over all processes, in place. Gives -1 when that is done; else, after about `patience`
  // seconds without news, the process that is waited for: call again with the same x to go on.
  int64_t sum(char* x, int64_t size, Summand kind, double patience);

 private:
  uint64_t& counter(int64_t rank) { return *reinterpret_cast<uint64_t*>(segment_ + rank * kLine); }
  char* slot_of(int64_t rank) { return segment_ + ranks_ * kLine + (2 * rank + int64_t(number_ % 2)) * slot_; }
  bool await(int64_t rank, double patience) const;

  char* const segment_;
  const int64_t rank_, ranks_, slot_;
  std::vector<float> total_;
  uint64_t number_ = 0;    // of the piece that is under way, or was last
  int64_t done_ = 0;       // bytes of x that are summed
  bool published_ = false;  // whether the piece at done_ is in our slot
};

}  // namespace maestrale
