// The sum over processes as Python sees it.
#include <stdexcept>

#include "module.h"
#include "shared_sum.h"

namespace nb = nanobind;

namespace maestrale {

namespace {

struct HeldSum {
  Array<uint8_t> segment;
  SharedSum sum;
};

void make(HeldSum* self, const Array<uint8_t>& segment, int64_t rank, int64_t ranks, int64_t slot) {
  if (ranks < 1 || slot < 1 || int64_t(segment.size()) != SharedSum::bytes(ranks, slot))
    throw std::invalid_argument("a segment of the wrong size");
  new (self) HeldSum{segment, {reinterpret_cast<char*>(segment.data()), rank, ranks, slot}};
}

int64_t sum(HeldSum& self, const Array<uint8_t>& x, bool half, double patience) {
  nb::gil_scoped_release released;
  return self.sum.sum(reinterpret_cast<char*>(x.data()), int64_t(x.size()), half ? Summand::bf16 : Summand::f32, patience);
}

}  // namespace

void bind_shared_sum(nb::module_& m) {
  nb::class_<HeldSum>(m, "SharedSum")
      .def("__init__", &make, nb::arg("segment"), nb::arg("rank"), nb::arg("ranks"), nb::arg("slot"))
      .def_static("bytes", &SharedSum::bytes, nb::arg("ranks"), nb::arg("slot"))
      .def("sum", &sum, nb::arg("x"), nb::arg("half"), nb::arg("patience"));
}

}  // namespace maestrale
