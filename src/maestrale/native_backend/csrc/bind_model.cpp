// The model as Python sees it: made of arrays that it keeps alive, then one call a step.
#include <stdexcept>

#include "model.h"
#include "module.h"

namespace nb = nanobind;

namespace maestrale {

namespace {

using Floats = Array<const float>;
using Numbers = Array<const int64_t>;
template <class T>
using Maybe = std::optional<T>;

struct HeldModel {
  Model model;
  std::vector<HeldWeight> weights;
  std::vector<AnyArray> arrays;

  HeldModel(Shape shape, int64_t page_size, Kept kept, const Kernels& kernels, int threads)
      : model(std::move(shape), page_size, kept, kernels, threads) {}
  HeldModel(const HeldModel&) = delete;

  const Weight& hold(const HeldWeight& held, int64_t n, int64_t k) {
    if (held.weight.n != n || held.weight.k != k)
      throw std::invalid_argument("a weight of " + std::to_string(held.weight.n) + " by " +
                                  std::to_string(held.weight.k) + ": expected " + std::to_string(n) + " by " +
                                  std::to_string(k));
    weights.push_back(held);
    return held.weight;
  }

  const float* hold(const Floats& array, int64_t count) {
    if (int64_t(array.size()) != count)
      throw std::invalid_argument("an array of " + std::to_string(array.size()) + " floats: expected " +
                                  std::to_string(count));
    arrays.emplace_back(array);
    return array.data();
  }
};

void make(HeldModel* self, int64_t dim, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t hidden_dim,
          int64_t vocab_size, int64_t n_chosen, float norm_eps, const Floats& speeds, int64_t page_size,
          const std::string& cached, const std::string& isa, int threads) {
  if (head_dim < 2 || head_dim % 2 || head_dim > kMaxHead || n_kv_heads < 1 || n_heads % n_kv_heads ||
      int64_t(speeds.size()) != head_dim / 2 || page_size < 1 || threads < 1 || threads > 1024)
    throw std::invalid_argument("a shape that no model has");
  Shape shape{dim, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, n_chosen, norm_eps, {}};
  shape.speeds.assign(speeds.data(), speeds.data() + speeds.size());
  new (self) HeldModel(std::move(shape), page_size, kept_named(cached), kernels_named(isa), threads);
}

// pool: uint8 [pages * page_bytes], zeros or anything else.
void add_kind(HeldModel& self, const Array<uint8_t>& pool, int64_t pages, int64_t ring, Maybe<int64_t> window,
              int64_t layers) {
  const CacheKind kind{reinterpret_cast<uint32_t*>(pool.data()), pages, ring, window.value_or(kNoWindow), layers};
  if (int64_t(pool.size()) != pages * self.model.page_units(layers) * 4 || ring < 1 || kind.window < 1)
    throw std::invalid_argument("a pool of the wrong size");
  self.model.add_kind(kind);
  self.arrays.emplace_back(pool);
}

void add_layer(HeldModel& self, int64_t kind, int64_t index, const Floats& attention_norm, const HeldWeight& wq,
               const HeldWeight& wk, const HeldWeight& wv, const HeldWeight& wo, const Floats& ffn_norm,
               const Maybe<Floats>& gate, const std::vector<const HeldWeight*>& w1,
               const std::vector<const HeldWeight*>& w2, const std::vector<const HeldWeight*>& w3) {
  const Shape& shape = self.model.shape();
  const int64_t heads = shape.n_heads * shape.head_dim, kv_heads = shape.n_kv_heads * shape.head_dim;
  const auto experts = int64_t(w1.size());
  if (kind < 0 || kind >= int64_t(self.model.kinds().size()) || index < 0 ||
      index >= self.model.kinds()[size_t(kind)].layers || experts < 1 || w2.size() != w1.size() ||
      w3.size() != w1.size() || gate.has_value() != (shape.n_chosen > 0) || shape.n_chosen > experts)
    throw std::invalid_argument("a layer that does not fit the model");
  Layer layer{};
  layer.kind = kind, layer.index = index;
  layer.attention_norm = self.hold(attention_norm, shape.dim);
  layer.ffn_norm = self.hold(ffn_norm, shape.dim);
  if (gate) layer.gate = self.hold(*gate, experts * shape.dim);
  layer.wq = self.hold(wq, heads, shape.dim);
  layer.wk = self.hold(wk, kv_heads, shape.dim);
  layer.wv = self.hold(wv, kv_heads, shape.dim);
  layer.wo = self.hold(wo, shape.dim, heads);
  for (size_t e = 0; e < w1.size(); ++e) {
    layer.experts.push_back({self.hold(*w1[e], shape.hidden_dim, shape.dim), self.hold(*w2[e], shape.dim, shape.hidden_dim),
                             self.hold(*w3[e], shape.hidden_dim, shape.dim)});
    const FeedForward &one = layer.experts[0], &other = layer.experts[e];
    if (!alike(one.w1, other.w1) || !alike(one.w1, other.w3) || !alike(one.w2, other.w2))
      throw std::invalid_argument("w1 and w3, and all experts of a layer, must have one format and group");
  }
  self.model.add_layer(std::move(layer));
}

void set_embeddings(HeldModel& self, const std::string& dtype, const AnyArray& rows) {
  const Shape& shape = self.model.shape();
  const bool wide = dtype == "F32";
  if ((!wide && dtype != "BF16" && dtype != "F16") ||
      int64_t(rows.nbytes()) != shape.vocab_size * shape.dim * (wide ? 4 : 2))
    throw std::invalid_argument("embeddings of the wrong dtype or size");
  self.model.set_embeddings(wide ? Stored::f32 : dtype == "BF16" ? Stored::bf16 : Stored::f16, rows.data());
  self.arrays.push_back(rows);
}

void set_head(HeldModel& self, const Floats& norm, const HeldWeight& output) {
  const Shape& shape = self.model.shape();
  const float* kept = self.hold(norm, shape.dim);
  self.model.set_head(kept, self.hold(output, shape.vocab_size, shape.dim));
}

void step(HeldModel& self, const Numbers& tokens, const Numbers& positions, const Numbers& starts,
          const std::vector<Numbers>& tables, const std::vector<Numbers>& copies, const Numbers& logit_rows,
          const Maybe<Floats>& hidden_in, const Maybe<Array<float>>& hidden_out, const Maybe<Array<float>>& logits,
          const Maybe<Array<int16_t>>& chosen) {
  Model& model = self.model;
  const Shape& shape = model.shape();
  const auto demand = [](bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(std::string("a step's ") + what + " has the wrong size");
  };
  Step step{};
  step.rows = int64_t(tokens.size()), step.sequences = int64_t(starts.size()) - 1;
  step.wanted = int64_t(logit_rows.size());
  step.tokens = tokens.data(), step.positions = positions.data(), step.starts = starts.data();
  step.logit_rows = logit_rows.data();
  demand(int64_t(positions.size()) == step.rows, "positions");
  demand(step.sequences > 0 && step.sequences <= step.rows, "starts");
  demand(tables.size() == model.kinds().size() && copies.size() == model.kinds().size(), "list of tables or copies");
  for (size_t kind = 0; kind < tables.size(); ++kind) {
    demand(int64_t(tables[kind].size()) == step.sequences * model.kinds()[kind].ring, "page tables");
    demand(copies[kind].size() % 2 == 0, "copies");
    step.tables.push_back(tables[kind].data());
    step.copies.push_back(copies[kind].data());
    step.copy_counts.push_back(int64_t(copies[kind].size()) / 2);
  }
  if (hidden_in) demand(int64_t(hidden_in->size()) == step.rows * shape.dim, "hidden_in");
  if (hidden_out) demand(int64_t(hidden_out->size()) == step.rows * shape.dim, "hidden_out");
  if (logits) demand(int64_t(logits->size()) == step.wanted * shape.vocab_size, "logits");
  if (chosen) demand(int64_t(chosen->size()) == model.layers() * step.rows * shape.n_chosen, "chosen");
  step.hidden_in = hidden_in ? hidden_in->data() : nullptr;
  step.hidden_out = hidden_out ? hidden_out->data() : nullptr;
  step.logits = logits ? logits->data() : nullptr;
  step.chosen = chosen ? chosen->data() : nullptr;
  nb::gil_scoped_release released;
  model.step(step);
}

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<HeldModel>(m, "Model")
      .def("__init__", &make, nb::kw_only(), nb::arg("dim"), nb::arg("n_heads"), nb::arg("n_kv_heads"),
           nb::arg("head_dim"), nb::arg("hidden_dim"), nb::arg("vocab_size"), nb::arg("n_chosen"),
           nb::arg("norm_eps"), nb::arg("speeds"), nb::arg("page_size"), nb::arg("cache"), nb::arg("isa"),
           nb::arg("threads"))
      .def(
          "page_bytes", [](const HeldModel& self, int64_t layers) { return self.model.page_units(layers) * 4; },
          nb::arg("layers"))
      .def("add_kind", &add_kind, nb::arg("pool"), nb::arg("pages"), nb::arg("ring"), nb::arg("window").none(),
           nb::arg("layers"))
      .def("add_layer", &add_layer, nb::arg("kind"), nb::arg("index"), nb::arg("attention_norm"), nb::arg("wq"),
           nb::arg("wk"), nb::arg("wv"), nb::arg("wo"), nb::arg("ffn_norm"), nb::arg("gate").none(), nb::arg("w1"),
           nb::arg("w2"), nb::arg("w3"))
      .def("set_embeddings", &set_embeddings, nb::arg("dtype"), nb::arg("rows"))
      .def("set_head", &set_head, nb::arg("norm"), nb::arg("output"))
      .def("step", &step, nb::arg("tokens"), nb::arg("positions"), nb::arg("starts"), nb::arg("tables"),
           nb::arg("copies"), nb::arg("logit_rows"), nb::arg("hidden_in") = nb::none(),
           nb::arg("hidden_out") = nb::none(), nb::arg("logits") = nb::none(), nb::arg("chosen") = nb::none());
}

}  // namespace maestrale
