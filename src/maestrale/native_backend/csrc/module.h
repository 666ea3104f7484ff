// What the files that register names with Python share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "kernels.h"
#include "pool.h"

namespace maestrale {

// An array of the caller's, on the CPU and contiguous.
template <class T>
using Array = nanobind::ndarray<T, nanobind::c_contig, nanobind::device::cpu>;

// The same of any type, to be read only.
using AnyArray = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;

// A weight and the arrays that keep its parts alive.
struct HeldWeight {
  Weight weight;
  std::vector<AnyArray> parts;
};

// The table of that name; ValueError where there is none.
const Kernels& kernels_named(const std::string& isa);

// "f32", "bf16" or "int8"; ValueError for anything else.
Kept kept_named(const std::string& name);

void bind_linear(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_pack(nanobind::module_& m);
void bind_model(nanobind::module_& m);
void bind_shared_sum(nanobind::module_& m);

}  // namespace maestrale
