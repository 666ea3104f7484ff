// The packed layouts of linear.h, written fast, and rounding into them. A row is a series of 4-byte words (one fp32, two
// bf16, four int8), and a block holds word after word of its 16 rows.
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "module.h"

namespace nb = nanobind;

namespace maestrale {

namespace {

// The word of up to 4 / bytes elements; missing ones are 0.
uint32_t word_of(const uint8_t* p, int64_t bytes) {
  uint32_t word = 0;
  std::memcpy(&word, p, size_t(bytes < 4 ? bytes : 4));
  return word;
}

constexpr int64_t kWords = 16;  // a cache line of each row at a time

// A whole block of rows of whole words, at the memory's speed.
void pack_words(const uint8_t* rows, int64_t row_bytes, uint32_t* block) {
  const int64_t words = row_bytes / 4;
  for (int64_t first = 0; first < words; first += kWords) {
    const int64_t end = first + kWords < words ? first + kWords : words;
    for (int64_t word = first; word < end; ++word)
      for (int64_t o = 0; o < kBlock; ++o) std::memcpy(block + word * kBlock + o, rows + o * row_bytes + word * 4, 4);
  }
}

void pack_block(const uint8_t* rows, int64_t count, int64_t row_bytes, uint32_t* block) {
  if (count == kBlock && row_bytes % 4 == 0) return pack_words(rows, row_bytes, block);
  const int64_t words = (row_bytes + 3) / 4;
  for (int64_t first = 0; first < words; first += kWords)
    for (int64_t o = 0; o < kBlock; ++o)
      for (int64_t word = first; word < first + kWords && word < words; ++word)
        block[word * kBlock + o] = o >= count ? 0 : word_of(rows + o * row_bytes + word * 4, row_bytes - word * 4);
}

Stored stored_named(const std::string& dtype) {
  if (dtype == "F32") return Stored::f32;
  if (dtype == "BF16") return Stored::bf16;
  if (dtype == "F16") return Stored::f16;
  throw std::invalid_argument("dtype '" + dtype + "': expected F32, BF16 or F16");
}

}  // namespace

void bind_pack(nb::module_& m) {
  // rows [n, k] of fp32, bf16 patterns or int8; data: room for the blocks.
  m.def(
      "pack",
      [](Pool& pool, AnyArray rows, Array<uint32_t> data) {
        if (rows.ndim() != 2) throw std::invalid_argument("rows must be [n, k]");
        const int64_t n = int64_t(rows.shape(0)), bytes = int64_t(rows.shape(1) * rows.itemsize());
        const int64_t words = (bytes + 3) / 4, blocks = (n + kBlock - 1) / kBlock;
        if (int64_t(data.size()) != blocks * words * kBlock) throw std::invalid_argument("data has not the size");
        const auto* from = static_cast<const uint8_t*>(rows.data());
        uint32_t* to = data.data();
        nb::gil_scoped_release released;
        pool.run([&](int thread) {
          for (int64_t b = blocks * thread / pool.size(); b < blocks * (thread + 1) / pool.size(); ++b) {
            const int64_t left = n - b * kBlock;
            pack_block(from + b * kBlock * bytes, left < kBlock ? left : kBlock, bytes, to + b * words * kBlock);
          }
        });
      },
      nb::arg("pool"), nb::arg("rows"), nb::arg("data"));

  // rows [n, k] of that dtype, rounded into the parts of an int8 weight (row_scales, sums) or of an int4 one (scales);
  // False where they hold NaN, Inf, or values whose scale is beyond float16.
  m.def(
      "round",
      [](Pool& pool, const std::string& isa, const std::string& dtype, AnyArray rows, int64_t group,
         Array<uint8_t> data, std::optional<Array<float>> row_scales, std::optional<Array<int32_t>> sums,
         std::optional<Array<uint16_t>> scales) {
        const Kernels& kernels = kernels_named(isa);
        const Stored stored = stored_named(dtype);
        if (rows.ndim() != 2 || int64_t(rows.itemsize()) != (stored == Stored::f32 ? 4 : 2))
          throw std::invalid_argument("rows must be [n, k] of their dtype");
        const StoredRows from{int64_t(rows.shape(0)), int64_t(rows.shape(1)), stored, rows.data()};
        const int64_t blocks = (from.n + kBlock - 1) / kBlock, wide = blocks * kBlock;
        const Format format = group ? Format::int4 : Format::int8;
        if (format == Format::int4 ? group < 8 || group > 128 || group % 16 || from.k % group || !scales ||
                                         int64_t(scales->size()) != wide * (from.k / group) ||
                                         int64_t(data.size()) != wide * from.k / 2
                                   : !row_scales || !sums || int64_t(row_scales->size()) != wide ||
                                         int64_t(sums->size()) != wide ||
                                         int64_t(data.size()) != wide * ((from.k + 3) / 4 * 4))
          throw std::invalid_argument("the parts have not the sizes that the rows and the group ask for");
        const Rounded to{format,
                         group,
                         data.data(),
                         row_scales ? row_scales->data() : nullptr,
                         sums ? sums->data() : nullptr,
                         scales ? scales->data() : nullptr};
        nb::gil_scoped_release released;
        std::atomic<bool> fits = true;
        pool.run([&](int thread) {
          for (int64_t b = blocks * thread / pool.size(); b < blocks * (thread + 1) / pool.size(); ++b)
            if (!kernels.round_block(from, b, to)) fits = false;
        });
        return fits.load();
      },
      nb::arg("pool"), nb::arg("isa"), nb::arg("dtype"), nb::arg("rows"), nb::arg("group"), nb::arg("data"),
      nb::arg("row_scales") = nb::none(), nb::arg("sums") = nb::none(), nb::arg("scales") = nb::none());
}

}  // namespace maestrale
