// Weights, linear layers and packing as Python sees them.
#include <nanobind/stl/pair.h>

#include <numeric>
#include <stdexcept>
#include <system_error>

#include "activations.h"
#include "module.h"
#include "tiles.h"

namespace nb = nanobind;

namespace maestrale {

const Kernels& kernels_named(const std::string& isa) {
  if (const Kernels* table = find_kernels(isa)) return *table;
  throw std::invalid_argument("this processor cannot run the kernels '" + isa + "'");
}

namespace {

Format format_named(const std::string& name) {
  if (name == "f32") return Format::f32;
  if (name == "bf16") return Format::bf16;
  if (name == "int8") return Format::int8;
  if (name == "int4") return Format::int4;
  throw std::invalid_argument("format '" + name + "': expected f32, bf16, int8 or int4");
}

using Part = std::optional<AnyArray>;

const void* part(HeldWeight& held, const Part& array, const char* name, int64_t bytes) {
  if (!array) throw std::invalid_argument(std::string(name) + ": missing");
  if (int64_t(array->nbytes()) != bytes)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(bytes) + " bytes, got " +
                                std::to_string(array->nbytes()));
  held.parts.push_back(*array);
  return array->data();
}

// A weight on the parts of a PackedWeight (checkpoint/packed.py), which it keeps alive; ValueError where a part has
// not the size that the layout asks for.
HeldWeight held_weight(const std::string& format, int64_t n, int64_t k, int64_t group, const Part& data,
                       const Part& scales, const Part& sums, const Part& offsets) {
  constexpr int64_t kMost = int64_t(1) << 17;  // of k: 2^17 products of two bytes still fit in 32 bits
  if (n < 1 || n > int64_t(1) << 40 || k < 1 || k > kMost)
    throw std::invalid_argument("a weight of " + std::to_string(n) + " outputs and " + std::to_string(k) +
                                " inputs: expected at least 1 of each and at most " + std::to_string(kMost) +
                                " inputs");
  HeldWeight held;
  Weight& w = held.weight;
  w = {format_named(format), n, k, group, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int64_t wide = blocks_of(w) * kBlock;
  switch (w.format) {
    case Format::f32:
      w.data = part(held, data, "data", wide * k * 4);
      break;
    case Format::bf16:
      w.data = part(held, data, "data", wide * ((k + 1) / 2) * 4);
      break;
    case Format::int8:
      w.data = part(held, data, "data", wide * ((k + 3) / 4) * 4);
      w.row_scales = static_cast<const float*>(part(held, scales, "scales", wide * 4));
      w.sums = static_cast<const int32_t*>(part(held, sums, "sums", wide * 4));
      break;
    case Format::int4:
      if (group < 8 || group % 8 || k % group)
        throw std::invalid_argument("groups of " + std::to_string(group) + ": expected a multiple of 8 that divides " +
                                    std::to_string(k));
      w.data = part(held, data, "data", wide * k / 2);
      w.scales = static_cast<const uint16_t*>(part(held, scales, "scales", wide * (k / group) * 2));
      if (offsets) w.offsets = static_cast<const float*>(part(held, offsets, "offsets", wide * (k / group) * 4));
  }
  return held;
}

// Work over blocks, spread evenly; the unit is what a tile takes at once.
template <class Work>
void spread(Pool& pool, int64_t first, int64_t last, const Work& work) {
  const int64_t units = (last - first + 3) / 4, size = pool.size();
  pool.run([&](int thread) {
    const int64_t begin = first + units * thread / size * 4, end = first + units * (thread + 1) / size * 4;
    if (begin < last) work(begin, end < last ? end : last);
  });
}

// The rows of x as w takes them, after a look at the shapes; they lie in `room`.
Rows prepared(Pool& pool, const Kernels& kernels, Activations& room, const Weight& w, const Array<const float>& x,
              const Array<float>& y) {
  if (x.ndim() != 2 || y.ndim() != 2 || int64_t(x.shape(1)) != w.k || int64_t(y.shape(1)) != w.n ||
      x.shape(0) != y.shape(0))
    throw std::invalid_argument("x must be [rows, " + std::to_string(w.k) + "] and y [rows, " + std::to_string(w.n) +
                                "]");
  const int64_t count = int64_t(x.shape(0));
  room.want(w);
  room.reserve(count);
  pool.run([&](int thread) {
    room.prepare(kernels, {&w}, x.data(), w.k, count * thread / pool.size(), count * (thread + 1) / pool.size());
  });
  return room.rows(w, 0, count);
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* table : kernels()) names.push_back(table->isa);
    return names;
  });
  m.def("amx_problem", &amx_problem, "Why AMX is not among the sets; None where it is.");
  m.def("amx_self_test", &amx_self_test, "The same for its self-test alone, in a process of its own.");

  nb::exception<std::system_error>(m, "ThreadError");  // nothing but a pool's threads asks the system for such things
  nb::class_<Pool>(m, "Pool")
      .def("__init__",
           [](Pool* self, int size) {
             if (size < 1 || size > 1024) throw std::invalid_argument("a pool of 1 to 1024 threads");
             new (self) Pool(size);
           })
      .def_prop_ro("size", &Pool::size);

  nb::class_<HeldWeight>(m, "Weight")
      .def("__init__",
           [](HeldWeight* self, const std::string& format, int64_t n, int64_t k, int64_t group, const Part& data,
              const Part& scales, const Part& sums, const Part& offsets) {
             new (self) HeldWeight(held_weight(format, n, k, group, data, scales, sums, offsets));
           },
           nb::arg("format"), nb::arg("n"), nb::arg("k"), nb::arg("group"), nb::arg("data"),
           nb::arg("scales").none(), nb::arg("sums").none(), nb::arg("offsets").none())
      .def_prop_ro("n", [](const HeldWeight& self) { return self.weight.n; })
      .def_prop_ro("k", [](const HeldWeight& self) { return self.weight.k; });

  m.def(
      "linear",
      [](Pool& pool, const std::string& isa, const HeldWeight& held, Array<const float> x, Array<float> y,
         std::optional<std::pair<int64_t, int64_t>> blocks, bool add) {
        const Kernels& kernels = kernels_named(isa);
        const Weight& w = held.weight;
        const auto [first, last] = blocks.value_or(std::pair<int64_t, int64_t>(0, blocks_of(w)));
        if (first < 0 || last > blocks_of(w)) throw std::invalid_argument("blocks beyond the weight's");
        Activations room;
        nb::gil_scoped_release released;
        const Rows rows = prepared(pool, kernels, room, w, x, y);
        spread(pool, first, last,
               [&](int64_t begin, int64_t end) { kernels.linear(w, rows, begin, end, {y.data(), w.n, add}); });
      },
      nb::arg("pool"), nb::arg("isa"), nb::arg("weight"), nb::arg("x"), nb::arg("y"),
      nb::arg("blocks") = nb::none(), nb::arg("add") = false);

  m.def(
      "swiglu",
      [](Pool& pool, const std::string& isa, const HeldWeight& held1, const HeldWeight& held3, Array<const float> x,
         Array<float> y) {
        const Kernels& kernels = kernels_named(isa);
        const Weight &w1 = held1.weight, &w3 = held3.weight;
        if (!alike(w1, w3) || w1.n != w3.n || w1.k != w3.k)
          throw std::invalid_argument("w1 and w3 must have one shape and format");
        Activations room;
        nb::gil_scoped_release released;
        const Rows rows = prepared(pool, kernels, room, w1, x, y);
        spread(pool, 0, blocks_of(w1),
               [&](int64_t begin, int64_t end) { kernels.swiglu(w1, w3, rows, begin, end, {y.data(), w1.n}); });
      },
      nb::arg("pool"), nb::arg("isa"), nb::arg("w1"), nb::arg("w3"), nb::arg("x"), nb::arg("y"));

  m.def("read_limit", [](Pool& pool, const std::string& isa, AnyArray memory) {
    const Kernels& kernels = kernels_named(isa);
    const auto* p = static_cast<const uint8_t*>(memory.data());
    const int64_t part = int64_t(memory.nbytes()) / pool.size();
    nb::gil_scoped_release released;
    pool.run([&](int thread) { kernels.read(p + thread * part, part); });
  });

  m.def("multiply_limit", [](Pool& pool, const std::string& isa, const std::string& format, int64_t rounds) {
    const Kernels& kernels = kernels_named(isa);
    const Format of = format_named(format);
    std::vector<double> done(size_t(pool.size()));
    nb::gil_scoped_release released;
    pool.run([&](int thread) { done[size_t(thread)] = kernels.multiply(of, rounds); });
    return std::accumulate(done.begin(), done.end(), 0.0);
  });
}

}  // namespace maestrale
