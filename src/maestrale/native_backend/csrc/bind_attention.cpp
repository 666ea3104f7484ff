// One layer's attention as Python sees it, for tests and measurements: writes keys and values, then attends.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "model.h"
#include "module.h"

namespace nb = nanobind;

namespace maestrale {

Kept kept_named(const std::string& name) {
  if (name == "f32") return Kept::f32;
  if (name == "bf16") return Kept::bf16;
  if (name == "int8") return Kept::int8;
  throw std::invalid_argument("cache '" + name + "': expected f32, bf16 or int8");
}

namespace {

// q [T][H][C], k and v [T][G][C], y as q; positions [T], starts [B + 1], tables [B][ring]; turns [T][2][padded] as
// `rope_turns` makes them. pool: uint8 [pages * page_bytes]. longest: the most tokens of a pass over the keys.
void attention(const std::string& isa, const std::string& cached, int64_t page_size, std::optional<int64_t> window,
               const Array<uint8_t>& pool, const Array<const int64_t>& tables, const Array<const int64_t>& positions,
               const Array<const int64_t>& starts, const Array<const float>& turns, const Array<const float>& q,
               const Array<const float>& k, const Array<const float>& v, const Array<float>& y, int64_t longest) {
  if (q.ndim() != 3 || k.ndim() != 3 || v.ndim() != 3 || tables.ndim() != 2 || tables.shape(0) + 1 != starts.size())
    throw std::invalid_argument("q, k and v must be [tokens, heads, head_dim], tables [sequences, ring]");
  const Kernels& kernels = kernels_named(isa);
  const auto T = int64_t(q.shape(0)), H = int64_t(q.shape(1)), C = int64_t(q.shape(2)), G = int64_t(k.shape(1));
  const HeadLayout head = head_layout(C, page_size, kept_named(cached));
  const CacheView cache{reinterpret_cast<uint32_t*>(pool.data()), G * head.size(), head, int64_t(tables.shape(1)),
                        window.value_or(kNoWindow)};
  const auto pages = int64_t(pool.size()) / (cache.page_stride * 4);
  if (int64_t(k.size()) != T * G * C || int64_t(v.size()) != T * G * C || y.size() != q.size() || H % G || C % 2 ||
      C > kMaxHead || int64_t(positions.size()) != T || int64_t(turns.size()) != T * 2 * head.padded || longest < 1 ||
      longest > std::max<int64_t>(1, kQueryRows / (H / G)) || starts.data()[tables.shape(0)] != T ||
      *std::max_element(tables.data(), tables.data() + tables.size()) >= pages)
    throw std::invalid_argument("arrays of sizes that do not fit together");
  const auto each_span = [&](int64_t limit, bool within_page, const auto& work) {
    for (size_t b = 0; b < tables.shape(0); ++b)
      for (int64_t t = starts.data()[b]; t < starts.data()[b + 1];) {
        const int64_t position = positions.data()[t], left = starts.data()[b + 1] - t;
        const int64_t room = within_page ? page_size - position % page_size : limit;
        const Span span{t, std::min(left, room), position, tables.data() + b * tables.shape(1)};
        for (int64_t g = 0; g < G; ++g) work(span, g);
        t += span.count;
      }
  };
  Buffer<char> scratch;
  scratch.reserve(attend_scratch(head, H / G));
  each_span(0, true, [&](const Span& span, int64_t g) {
    kernels.write_keys(cache, span, g, k.data() + g * C, v.data() + g * C, G * C, turns.data());
  });
  each_span(longest, false, [&](const Span& span, int64_t g) {
    const int64_t first = g * (H / G) * C;
    kernels.attend(cache, span, g, H / G, q.data() + first, H * C, turns.data(),
                   y.data() + span.first * H * C + first, H * C, scratch.data());
  });
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention", &attention, nb::kw_only(), nb::arg("isa"), nb::arg("cache"), nb::arg("page_size"),
        nb::arg("window").none(), nb::arg("pool"), nb::arg("tables"), nb::arg("positions"), nb::arg("starts"),
        nb::arg("turns"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("y"), nb::arg("longest") = 1);
  m.def(
      "page_bytes",
      [](int64_t n_kv_heads, int64_t head_dim, int64_t page_size, const std::string& cached) {
        return n_kv_heads * head_layout(head_dim, page_size, kept_named(cached)).size() * 4;
      },
      "Bytes that a page takes in one layer.", nb::arg("n_kv_heads"), nb::arg("head_dim"), nb::arg("page_size"),
      nb::arg("cache"));
}

}  // namespace maestrale
