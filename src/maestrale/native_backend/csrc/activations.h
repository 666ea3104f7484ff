// Buffers of a step: fp32 rows, and rows prepared in every form that some weight multiplies with.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels.h"

namespace maestrale {

// Memory that begins at a multiple of 64 bytes and grows, losing what it held.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void reserve(int64_t count) {
    if (count <= size_) return;
    std::free(data_);
    size_ = 0;
    data_ = static_cast<T*>(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 63) / 64 * 64));
    if (!data_) throw std::bad_alloc();
    size_ = count;
  }

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Rows of one width in the forms that weights ask for: bf16, int8 …
class Activations {
 public:
  // Before the first step: `w` will multiply with these rows.
  void want(const Weight& w) {
    for (const Form& form : forms_)
      if (matches(form.rows, w)) return;
    Rows rows{};
    rows.format = w.format;
    rows.k = w.k;
    rows.group = rows.format == Format::int4 ? w.group : w.k;
    rows.stride = row_bytes(rows.format, rows.k);
    forms_.push_back({rows, {}, {}, {}});
  }

  void reserve(int64_t count) {
    for (Form& form : forms_) {
      Rows& rows = form.rows;
      form.data.reserve(count * rows.stride);
      form.scales.reserve(count);
      if (rows.format == Format::int4) form.sums.reserve(count * (rows.k / rows.group));
      rows.count = count, rows.data = form.data.data(), rows.scales = form.scales.data(), rows.sums = form.sums.data();
    }
  }

  // Rows [first, last) of x in the forms that these weights take.
  void prepare(const Kernels& kernels, std::initializer_list<const Weight*> weights, const float* x, int64_t stride,
               int64_t first, int64_t last) const {
    for (const Form& form : forms_)
      for (const Weight* w : weights)
        if (matches(form.rows, *w)) {
          kernels.prepare(x, stride, first, last, form.rows);
          break;
        }
  }

  // `count` rows from `first` on, as `w` takes them.
  Rows rows(const Weight& w, int64_t first, int64_t count) const {
    Rows part = form(w).rows;
    part.count = count;
    part.data = static_cast<uint8_t*>(part.data) + first * part.stride;
    part.scales += first;
    if (part.sums) part.sums += first * (part.k / part.group);
    return part;
  }

  // Copies a prepared row of `from`, which knows the same weights, to row `to`.
  void copy(const Weight& w, const Activations& from, int64_t row, int64_t to) const {
    const Rows source = from.rows(w, row, 1), target = rows(w, to, 1);
    std::memcpy(target.data, source.data, size_t(source.stride));
    target.scales[0] = source.scales[0];
    if (source.sums) std::memcpy(target.sums, source.sums, size_t(source.k / source.group) * sizeof(int32_t));
  }

 private:
  struct Form {
    Rows rows;
    Buffer<uint8_t> data;
    Buffer<float> scales;
    Buffer<int32_t> sums;
  };

  static bool matches(const Rows& rows, const Weight& w) {
    return rows.format == w.format && (rows.format != Format::int4 || rows.group == w.group);
  }
  const Form& form(const Weight& w) const {
    for (const Form& form : forms_)
      if (matches(form.rows, w)) return form;
    throw std::logic_error("rows were not prepared for this weight");
  }

  std::vector<Form> forms_;
};

}  // namespace maestrale
