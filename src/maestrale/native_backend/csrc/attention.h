// The cache's pages as the kernels see them, and attention over them.
//
// A page holds P positions of all layers of its kind; of a layer and a key/value head it holds
//   keys    uint32 [tiles][units][16]        a unit: two bf16 of head_dim, or one float; a key to a lane
//   values  uint32 [tiles][key units][padded]   a unit: two keys' bf16 of one entry of head_dim, or one key's float
// with a tile for each 16 positions (one where P = 16), and head_dim padded to a multiple of 16 for values. So the
// scores of 16 keys, and 16 entries of the weighted values, are sums that no lane shares with another.
//
// Kept as int8, a unit is four entries, or four keys, and there follow
//   scales  float [tiles][2][16]   of each position's key and value: max|x| / 127 of the head's entries
// Such tiles are widened to bf16, which holds every code exactly, before they are multiplied.
#pragma once

#include <cstdint>

namespace maestrale {

constexpr int kTile = 16;       // keys of a tile
constexpr int kTilesAtOnce = 8;  // tiles between two corrections of the running softmax; borders lie at multiples
constexpr int kRowsAtOnce = 4;   // query rows whose sums stay in registers
constexpr int kMaxHead = 1024;  // head_dim
constexpr int kQueryRows = 32;  // query rows (tokens times query heads) that share a pass over their keys, about

enum class Kept : int { f32 = 0, bf16 = 1, int8 = 2 };  // how a cache holds keys and values

// What a layer's keys and values of one head look like, and where they lie.
struct HeadLayout {
  int64_t head_dim, padded;  // padded: to a multiple of 16
  int64_t page_size;         // P
  int64_t tiles;             // of a page
  Kept kept;

  bool half() const { return kept != Kept::f32; }  // what is multiplied is bf16, else float
  bool bytes() const { return kept == Kept::int8; }
  int64_t units() const { return half() ? head_dim / 2 : head_dim; }
  int64_t key_units() const { return half() ? kTile / 2 : kTile; }

  // uint32 of a tile's keys, of its values, of a page's head; `wide` as they are multiplied, else as they are kept.
  int64_t wide_key_size() const { return bytes() ? 2 * key_size() : key_size(); }
  int64_t wide_value_size() const { return key_units() * padded; }
  int64_t key_size() const { return (bytes() ? (head_dim + 3) / 4 : units()) * kTile; }
  int64_t value_size() const { return bytes() ? kTile / 4 * padded : wide_value_size(); }
  int64_t scales() const { return tiles * (key_size() + value_size()); }  // where they begin
  int64_t size() const { return scales() + (bytes() ? tiles * 2 * kTile : 0); }
};

inline HeadLayout head_layout(int64_t head_dim, int64_t page_size, Kept kept) {
  const auto tiles = [](int64_t n) { return (n + kTile - 1) / kTile; };
  return {head_dim, tiles(head_dim) * kTile, page_size, tiles(page_size), kept};
}

// One layer's part of the pool of its kind.
struct CacheView {
  uint32_t* base;         // page 0, this layer, head 0
  int64_t page_stride;    // uint32 from a page to the next
  HeadLayout head;
  int64_t ring;           // entries of a page table
  int64_t window;         // keys that a query sees, itself included; the largest int64 is all

  uint32_t* page(const int64_t* table, int64_t position, int64_t g) const {
    return base + table[position / head.page_size % ring] * page_stride + g * head.size();
  }
};

// Consecutive positions of one sequence: rows first … first + count - 1 of the step.
struct Span {
  int64_t first, count;
  int64_t position;      // of the first row
  const int64_t* table;  // the sequence's page table
};

// Writes rows of keys (turned here) and values of head g into one page; the span must not leave its page.
// k, v: the head's entries of row 0; turns [rows][2][padded]: cosines and signed sines of each entry.
using WriteKeys = void (*)(const CacheView& cache, const Span& span, int64_t g, const float* k, const float* v,
                           int64_t stride, const float* turns);

// Attention of a span's queries, of the `group` query heads of kv head g: y[row][head] = softmax(q k / sqrt(C)) v.
// q, y: the group's first head of row 0 of the step, and of the span's own first row. scratch: `attend_scratch` bytes.
using AttendSpan = void (*)(const CacheView& cache, const Span& span, int64_t g, int64_t group, const float* q,
                            int64_t q_stride, const float* turns, float* y, int64_t y_stride, void* scratch);

inline int64_t attend_scratch(const HeadLayout& head, int64_t group) {
  const int64_t rows = group > kQueryRows ? group : kQueryRows, keys = kTile * kTilesAtOnce;
  const int64_t floats = rows * (head.units() + kTile + head.padded + 2) + kRowsAtOnce * 2 * keys + 2 * head.padded;
  const int64_t tile = head.wide_value_size() + (head.bytes() ? head.wide_key_size() + 2 * kTile : 0);
  return 4 * (floats + kTilesAtOnce * tile) + 11 * 64;  // eleven arrays, each begun at a multiple of 64 bytes
}

}  // namespace maestrale
