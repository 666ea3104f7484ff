#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace maestrale {

namespace {

void demand(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("a step does not fit the model: ") + what);
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_bf16(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 0x3ff;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(rest);
  return from_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13);
}

}  // namespace

Model::Model(Shape shape, int64_t page_size, Kept kept, const Kernels& kernels, int threads)
    : shape_(std::move(shape)),
      head_(head_layout(shape_.head_dim, page_size, kept)),
      kernels_(kernels),
      own_(size_t(threads)),
      orders_(size_t(threads)),
      pool_(threads) {}

void Model::add_layer(Layer layer) {
  const auto note = [&](Desk& desk) {
    for (const Weight* w : {&layer.wq, &layer.wk, &layer.wv}) desk.dim.want(*w);
    desk.heads.want(layer.wo);
    for (const FeedForward& expert : layer.experts) {
      for (const Weight* w : {&expert.w1, &expert.w3}) desk.dim.want(*w), desk.gathered.want(*w);
      desk.hidden.want(expert.w2);
    }
  };
  note(shared_);
  for (Desk& desk : own_) note(desk);
  layers_.push_back(std::move(layer));
  taken_ = std::vector<std::atomic<int64_t>>(kDivisions * (layers_.size() + 1));
}

void Model::set_head(const float* norm, const Weight& output) {
  final_norm_ = norm;
  output_ = output;
  shared_.dim.want(output);
  for (Desk& desk : own_) desk.dim.want(output);
}

void Model::step(const Step& step) {
  check(step);
  begin(step);
  pool_.run([&](int thread) { run(step, thread); });
}

void Model::check(const Step& step) const {
  demand(step.rows > 0, "it has no rows");
  demand(step.starts[0] == 0 && step.starts[step.sequences] == step.rows, "its sequences do not cover its rows");
  demand((step.hidden_in != nullptr) != has_embeddings(), "hidden rows come in where there are no embeddings");
  demand((step.hidden_out != nullptr) != has_head(), "hidden rows go out where there is no head");
  for (int64_t b = 0; b < step.sequences; ++b) {
    demand(step.starts[b] < step.starts[b + 1], "a sequence has no rows");
    demand(step.starts[b + 1] <= step.rows, "a sequence ends behind the step's rows");
    for (int64_t t = step.starts[b]; t < step.starts[b + 1]; ++t) {
      if (has_embeddings()) demand(step.tokens[t] >= 0 && step.tokens[t] < shape_.vocab_size, "a token's id");
      demand(step.positions[t] >= 0 && step.positions[t] < int64_t(1) << 31, "a position");
      for (size_t kind = 0; kind < kinds_.size(); ++kind) {
        const int64_t entry = step.positions[t] / head_.page_size % kinds_[kind].ring;
        const int64_t page = step.tables[kind][b * kinds_[kind].ring + entry];
        demand(page >= 0 && page < kinds_[kind].pages, "a page's number");
      }
    }
  }
  for (int64_t i = 0; i < step.wanted; ++i)
    demand(step.logit_rows[i] >= (i ? step.logit_rows[i - 1] + 1 : 0) && step.logit_rows[i] < step.rows, "wanted rows");
  for (size_t kind = 0; kind < kinds_.size(); ++kind)
    for (int64_t i = 0; i < 2 * step.copy_counts[kind]; ++i)
      demand(step.copies[kind][i] >= 0 && step.copies[kind][i] < kinds_[kind].pages, "a page's number in a copy");
}

// What is done once, by the caller's thread: memory, page copies, and who computes what.
void Model::begin(const Step& step) {
  const int64_t T = step.rows, K = shape_.n_chosen, heads = shape_.n_heads * shape_.head_dim;
  const int64_t kv_heads = shape_.n_kv_heads * shape_.head_dim, group = shape_.n_heads / shape_.n_kv_heads;
  const auto reserve = [&](Desk& desk, int64_t rows) {
    for (Activations* rows_of : {&desk.dim, &desk.heads}) rows_of->reserve(rows);
    desk.hidden.reserve(rows * std::max<int64_t>(K, 1));
    if (K) desk.gathered.reserve(rows * K);
    desk.normed.reserve(rows * shape_.dim);
    desk.experts.reserve(rows * K);
    desk.shares.reserve(rows * K);
  };
  reserve(shared_, T);
  for (Desk& desk : own_) reserve(desk, 1);
  for (Order& order : orders_) {
    order.rows.resize(size_t(T * K));
    order.places.resize(size_t(T * K));
    order.outputs.resize(size_t(K));
    order.scratch.reserve(attend_scratch(head_, group));
    int64_t experts = 1;
    for (const Layer& layer : layers_) experts = std::max(experts, int64_t(layer.experts.size()));
    order.begins.resize(size_t(experts + 1));
    order.scores.reserve(experts);
  }
  x_.reserve(T * shape_.dim);
  q_.reserve(T * heads);
  mixed_.reserve(T * heads);
  k_.reserve(T * kv_heads);
  v_.reserve(T * kv_heads);
  hidden_.reserve(T * std::max<int64_t>(K, 1) * shape_.hidden_dim);
  if (K) expert_out_.reserve(T * K * shape_.dim);
  turns_.reserve(T * 2 * head_.padded);
  copy_pages(step);
  cut(step);
  for (auto& taken : taken_) taken.store(0, std::memory_order_relaxed);
  for (Order& order : orders_) order.divisions = 0;
}

// The step's rows into runs of consecutive positions.
void Model::cut(const Step& step) {
  const int64_t longest = std::max<int64_t>(1, kQueryRows / (shape_.n_heads / shape_.n_kv_heads));
  const auto add = [&](std::vector<Run>& runs, int64_t row, int64_t sequence, int64_t out, int64_t limit) {
    const bool joins = !runs.empty() && runs.back().sequence == sequence && runs.back().count < limit &&
                       runs.back().first + runs.back().count == row &&
                       step.positions[row] == step.positions[row - 1] + 1;
    if (joins)
      ++runs.back().count;
    else
      runs.push_back({row, 1, sequence, out});
  };
  for (auto* runs : {&written_, &queries_, &wanted_}) runs->clear();
  for (int64_t b = 0, next = 0; b < step.sequences; ++b)
    for (int64_t t = step.starts[b]; t < step.starts[b + 1]; ++t) {
      add(written_, t, b, t, step.positions[t] % head_.page_size ? head_.page_size : 0);
      add(queries_, t, b, t, longest);
      if (next < step.wanted && step.logit_rows[next] == t) add(wanted_, t, b, next++, longest);
    }
}

void Model::copy_pages(const Step& step) {
  for (size_t kind = 0; kind < kinds_.size(); ++kind) {
    const int64_t size = page_units(kinds_[kind].layers), count = step.copy_counts[kind];
    const int64_t* copies = step.copies[kind];
    copied_.reserve(count * size);
    // All sources are read before any target is written: a page freed in this step may be a target in it too.
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(copied_.data() + i * size, kinds_[kind].pool + copies[2 * i] * size, size_t(size) * 4);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(kinds_[kind].pool + copies[2 * i + 1] * size, copied_.data() + i * size, size_t(size) * 4);
  }
}

void Model::run(const Step& step, int thread) {
  const int64_t T = step.rows, D = shape_.dim;
  const int64_t heads = shape_.n_heads * shape_.head_dim, kv = shape_.n_kv_heads * shape_.head_dim;
  for (auto [row, last] = share(T, thread); row < last; ++row) {
    embed(step, row);
    turn(step.positions[row], turns_.data() + row * 2 * head_.padded);
  }
  pool_.barrier();
  for (int64_t i = 0; i < layers(); ++i) {
    const Layer& layer = layers_[i];
    const bool only_wanted = has_head() && i + 1 == layers();  // nobody looks at the other rows any more

    const auto& in = prepared(T, thread, [&](Desk& desk, int64_t row) {
      kernels_.norm(x_.data() + row * D, layer.attention_norm, D, shape_.norm_eps, desk.normed.data() + row * D);
      desk.dim.prepare(kernels_, {&layer.wq, &layer.wk, &layer.wv}, desk.normed.data(), D, row, row + 1);
    });
    linears({{&layer.wq, {q_.data(), heads}}, {&layer.wk, {k_.data(), kv}}, {&layer.wv, {v_.data(), kv}}}, in.dim, T,
            thread);
    pool_.barrier();
    write(step, layer, thread);
    pool_.barrier();
    attend(step, layer, only_wanted ? wanted_ : queries_, thread);
    if (only_wanted && thread == 0)
      for (int64_t n = 0; n < step.wanted; ++n)  // wanted rows ascend, so none is overwritten before it is moved
        std::memmove(x_.data() + n * D, x_.data() + step.logit_rows[n] * D, size_t(D) * 4);
    pool_.barrier();

    const int64_t rows = only_wanted ? step.wanted : T;
    if (rows == 0) return;
    const auto& attended = prepared(rows, thread, [&](Desk& desk, int64_t row) {
      desk.heads.prepare(kernels_, {&layer.wo}, mixed_.data(), heads, row, row + 1);
    });
    linears({{&layer.wo, {x_.data(), D, true}}}, attended.heads, rows, thread);
    pool_.barrier();
    if (layer.gate == nullptr) {
      feed_forward(layer, rows, thread);
    } else {
      int16_t* chosen = step.chosen ? step.chosen + i * T * shape_.n_chosen : nullptr;
      mixture(layer, rows, chosen, only_wanted ? step.logit_rows : nullptr, thread);
    }
    pool_.barrier();
  }
  if (!has_head()) {
    const auto [first, last] = share(T, thread);
    std::memcpy(step.hidden_out + first * D, x_.data() + first * D, size_t((last - first) * D) * 4);
    return;
  }
  const auto& out = prepared(step.wanted, thread, [&](Desk& desk, int64_t row) {
    kernels_.norm(x_.data() + row * D, final_norm_, D, shape_.norm_eps, desk.normed.data() + row * D);
    desk.dim.prepare(kernels_, {&output_}, desk.normed.data(), D, row, row + 1);
  });
  linears({{&output_, {step.logits, output_.n}}}, out.dim, step.wanted, thread);
}

// Each thread prepares its share of the rows and waits for the others'; a single row it prepares for itself.
template <class Prepare>
const Model::Desk& Model::prepared(int64_t rows, int thread, const Prepare& prepare) {
  if (rows == 1) {
    prepare(own_[thread], 0);
    return own_[thread];
  }
  for (auto [row, last] = share(rows, thread); row < last; ++row) prepare(shared_, row);
  pool_.barrier();
  return shared_;
}

// Calls work(first, last) on ranges that are `count` blocks in all. Half of them are divided beforehand, so that a
// thread finds again what its cache holds; the others go in pieces to who is there first: a core that is slower than the
// rest, or has other work to do, does less of them, and is waited for no longer than a piece takes.
template <class Work>
void Model::divide(int64_t count, int64_t rows, int thread, const Work& work) {
  std::atomic<int64_t>& taken = taken_[orders_[size_t(thread)].divisions++];
  const int64_t tile = rows <= 6 ? 4 : 3;  // blocks that are multiplied at once, where vectors are longest
  const int64_t own = count / 2 / pool_.size() / tile * tile, shared = own * pool_.size();
  const int64_t piece = std::max<int64_t>(1, (count - shared) / (4 * pool_.size()) / tile) * tile;
  if (own) work(own * thread, own * (thread + 1));
  for (int64_t from; (from = shared + taken.fetch_add(piece, std::memory_order_relaxed)) < count;)
    work(from, std::min(from + piece, count));
}

// Products of the same rows with several weights, this thread's part of all their blocks.
void Model::linears(std::initializer_list<std::pair<const Weight*, Output>> products, const Activations& activations,
                    int64_t rows, int thread) {
  int64_t blocks = 0;
  for (const auto& product : products) blocks += blocks_of(*product.first);
  divide(blocks, rows, thread, [&](int64_t first, int64_t last) {
    int64_t before = 0;
    for (const auto& [w, out] : products) {
      const int64_t begin = std::max(first - before, int64_t(0)), end = std::min(last - before, blocks_of(*w));
      if (begin < end) kernels_.linear(*w, activations.rows(*w, 0, rows), begin, end, out);
      before += blocks_of(*w);
    }
  });
}

void Model::embed(const Step& step, int64_t row) {
  const int64_t D = shape_.dim;
  float* x = x_.data() + row * D;
  if (embeddings_ == nullptr) {
    std::memcpy(x, step.hidden_in + row * D, size_t(D) * 4);
  } else if (stored_ == Stored::f32) {
    std::memcpy(x, static_cast<const float*>(embeddings_) + step.tokens[row] * D, size_t(D) * 4);
  } else {
    const uint16_t* stored = static_cast<const uint16_t*>(embeddings_) + step.tokens[row] * D;
    for (int64_t i = 0; i < D; ++i) x[i] = stored_ == Stored::bf16 ? from_bf16(stored[i]) : from_half(stored[i]);
  }
}

// For each entry of a head the cosine of its pair's angle, then the sine, negative for the first of the pair (N4).
void Model::turn(int64_t position, float* turns) const {
  for (int64_t i = 0; i < head_.head_dim; i += 2) {
    const float angle = float(position) * shape_.speeds[size_t(i / 2)];
    turns[i] = turns[i + 1] = std::cos(angle);
    turns[head_.padded + i + 1] = std::sin(angle);
    turns[head_.padded + i] = -turns[head_.padded + i + 1];
  }
  for (int64_t i = head_.head_dim; i < head_.padded; ++i) turns[i] = turns[head_.padded + i] = 0;
}

CacheView Model::view(const Layer& layer) const {
  const CacheKind& kind = kinds_[size_t(layer.kind)];
  const int64_t size = shape_.n_kv_heads * head_.size();
  return {kind.pool + layer.index * size, page_units(kind.layers), head_, kind.ring, kind.window};
}

Span Model::span(const Step& step, const Layer& layer, const Run& run) const {
  const int64_t* table = step.tables[size_t(layer.kind)] + run.sequence * kinds_[size_t(layer.kind)].ring;
  return {run.first, run.count, step.positions[run.first], table};
}

void Model::write(const Step& step, const Layer& layer, int thread) {
  const int64_t C = shape_.head_dim, stride = shape_.n_kv_heads * C, runs = int64_t(written_.size());
  const CacheView cache = view(layer);
  for (auto [i, last] = share(runs * shape_.n_kv_heads, thread); i < last; ++i) {
    const int64_t g = i / runs;
    kernels_.write_keys(cache, span(step, layer, written_[size_t(i % runs)]), g, k_.data() + g * C, v_.data() + g * C,
                        stride, turns_.data());
  }
}

void Model::attend(const Step& step, const Layer& layer, const std::vector<Run>& runs, int thread) {
  const int64_t group = shape_.n_heads / shape_.n_kv_heads, width = group * shape_.head_dim;
  const int64_t stride = shape_.n_heads * shape_.head_dim, items = int64_t(runs.size()) * shape_.n_kv_heads;
  const CacheView cache = view(layer);
  std::atomic<int64_t>& taken = taken_[orders_[size_t(thread)].divisions++];
  for (int64_t i; (i = items - 1 - taken.fetch_add(1, std::memory_order_relaxed)) >= 0;) {  // the longest come first
    const int64_t g = i % shape_.n_kv_heads;
    const Run& run = runs[size_t(i / shape_.n_kv_heads)];
    kernels_.attend(cache, span(step, layer, run), g, group, q_.data() + g * width, stride, turns_.data(),
                    mixed_.data() + run.out * stride + g * width, stride, orders_[size_t(thread)].scratch.data());
  }
}

void Model::feed_forward(const Layer& layer, int64_t rows, int thread) {
  const int64_t D = shape_.dim, F = shape_.hidden_dim;
  const FeedForward& ffn = layer.experts[0];
  const auto& in = prepared(rows, thread, [&](Desk& desk, int64_t row) {
    kernels_.norm(x_.data() + row * D, layer.ffn_norm, D, shape_.norm_eps, desk.normed.data() + row * D);
    desk.dim.prepare(kernels_, {&ffn.w1}, desk.normed.data(), D, row, row + 1);
  });
  divide(blocks_of(ffn.w1), rows, thread, [&](int64_t first, int64_t last) {
    kernels_.swiglu(ffn.w1, ffn.w3, in.dim.rows(ffn.w1, 0, rows), first, last, {hidden_.data(), F});
  });
  pool_.barrier();
  const auto& middle = prepared(rows, thread, [&](Desk& desk, int64_t row) {
    desk.hidden.prepare(kernels_, {&ffn.w2}, hidden_.data(), F, row, row + 1);
  });
  linears({{&ffn.w2, {x_.data(), D, true}}}, middle.hidden, rows, thread);
}

// Every expert's blocks are divided over all threads: so the load is even whatever the router chose.
void Model::mixture(const Layer& layer, int64_t rows, int16_t* chosen, const int64_t* original, int thread) {
  const int64_t D = shape_.dim, F = shape_.hidden_dim, K = shape_.n_chosen, E = int64_t(layer.experts.size());
  Order& order = orders_[size_t(thread)];
  const FeedForward& any = layer.experts[0];
  const auto& in = prepared(rows, thread, [&](Desk& desk, int64_t row) {
    float* normed = desk.normed.data() + row * D;
    kernels_.norm(x_.data() + row * D, layer.ffn_norm, D, shape_.norm_eps, normed);
    desk.dim.prepare(kernels_, {&any.w1}, desk.normed.data(), D, row, row + 1);
    kernels_.scores(layer.gate, E, normed, D, order.scores.data());
    int32_t* experts = desk.experts.data() + row * K;
    choose(order.scores.data(), E, K, experts);
    if (chosen != nullptr && (rows > 1 || thread == 0))
      std::copy(experts, experts + K, chosen + (original ? original[row] : row) * K);
    weigh(order.scores.data(), K, experts, desk.shares.data() + row * K);
  });
  sort_rows(in, E, rows, order);
  // The rows of an expert side by side; a single row is used where it lies.
  if (rows > 1) {
    for (auto [place, last] = share(rows * K, thread); place < last; ++place)
      shared_.gathered.copy(any.w1, in.dim, order.rows[size_t(place)], place);
    pool_.barrier();
  }
  const auto experts = [&](int64_t blocks, auto multiply) {
    const auto busy = int64_t(order.busy.size());
    divide(busy * blocks, rows * K / busy, thread, [&](int64_t first, int64_t last) {
      for (int64_t i = first / blocks; i * blocks < last; ++i) {
        const size_t e = size_t(order.busy[size_t(i)]);
        multiply(layer.experts[e], order.begins[e], order.begins[e + 1] - order.begins[e],
                 std::max(first - i * blocks, int64_t(0)), std::min(last - i * blocks, blocks));
      }
    });
    pool_.barrier();
  };
  experts(blocks_of(any.w1), [&](const FeedForward& ffn, int64_t begin, int64_t count, int64_t first, int64_t last) {
    const Rows of = rows > 1 ? shared_.gathered.rows(ffn.w1, begin, count) : in.dim.rows(ffn.w1, 0, 1);
    kernels_.swiglu(ffn.w1, ffn.w3, of, first, last, {hidden_.data() + begin * F, F});
  });
  const auto& middle = prepared(rows * K, thread, [&](Desk& desk, int64_t place) {
    desk.hidden.prepare(kernels_, {&any.w2}, hidden_.data(), F, place, place + 1);
  });
  experts(blocks_of(any.w2), [&](const FeedForward& ffn, int64_t begin, int64_t count, int64_t first, int64_t last) {
    kernels_.linear(ffn.w2, middle.hidden.rows(ffn.w2, begin, count), first, last,
                    {expert_out_.data() + begin * D, D});
  });
  // N5: experts are added in ascending order; every thread adds some columns.
  const auto [first, last] = share(blocks_of(any.w2), thread);
  const int64_t column = first * kBlock, columns = std::min(last * kBlock, D) - column;
  for (int64_t row = 0; row < rows && columns > 0; ++row) {
    for (int64_t k = 0; k < K; ++k)
      order.outputs[size_t(k)] = expert_out_.data() + order.places[size_t(row * K + k)] * D + column;
    kernels_.mix(x_.data() + row * D + column, order.outputs.data(), in.shares.data() + row * K, K, columns);
  }
}

// N5: the K largest scores, the largest first; of equal ones the lower expert.
void Model::choose(const float* scores, int64_t experts, int64_t K, int32_t* chosen) {
  for (int64_t k = 0; k < K; ++k) {
    int32_t best = -1;
    for (int32_t e = 0; e < experts; ++e)
      if (std::find(chosen, chosen + k, e) == chosen + k && (best < 0 || scores[e] > scores[best])) best = e;
    chosen[k] = best;
  }
}

// The chosen experts in ascending order, and what each counts: a softmax over those K.
void Model::weigh(const float* scores, int64_t K, int32_t* chosen, float* shares) {
  const float largest = scores[chosen[0]];
  std::sort(chosen, chosen + K);
  float sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += shares[k] = std::exp(scores[chosen[k]] - largest);
  for (int64_t k = 0; k < K; ++k) shares[k] /= sum;
}

void Model::sort_rows(const Desk& desk, int64_t experts, int64_t rows, Order& order) const {
  const int64_t K = shape_.n_chosen;
  auto begins = order.begins.begin();
  std::fill(begins, begins + experts + 1, 0);
  for (int64_t i = 0; i < rows * K; ++i) ++begins[desk.experts.data()[i] + 1];
  for (int64_t e = 0; e < experts; ++e) begins[e + 1] += begins[e];
  for (int64_t i = 0; i < rows * K; ++i) {
    int64_t& next = begins[desk.experts.data()[i]];
    order.rows[size_t(next)] = i / K;
    order.places[size_t(i)] = next++;
  }
  for (int64_t e = experts; e > 0; --e) begins[e] = begins[e - 1];  // each had become the next one's begin
  begins[0] = 0;
  order.busy.clear();
  for (int64_t e = 0; e < experts; ++e)
    if (begins[e] < begins[e + 1]) order.busy.push_back(e);
}

}  // namespace maestrale
