// Memory for prepared rows, kept from one step to the next.
#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "linear.h"

namespace maestrale {

class RowsBuffer {
 public:
  RowsBuffer() = default;
  RowsBuffer(const RowsBuffer&) = delete;
  RowsBuffer& operator=(const RowsBuffer&) = delete;
  ~RowsBuffer() { std::free(data_); }

  // Room for `count` rows of k inputs; what an earlier call gave is gone. `group` matters for int4 alone.
  Rows rows(Format format, int64_t count, int64_t k, int64_t group) {
    const int64_t stride = row_bytes(format, k), groups = format == Format::int4 ? k / group : 0;
    if (count * stride > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, size_t(count * stride));
      if (!data_) throw std::bad_alloc();
      size_ = count * stride;
    }
    scales_.resize(size_t(count));
    sums_.resize(size_t(count * groups));
    return {format, count, k, group, stride, data_, scales_.data(), sums_.data()};
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

}  // namespace maestrale
