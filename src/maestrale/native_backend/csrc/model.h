// A Mistral or Mixtral decoder, or some of its layers, on packed weights and a paged cache: the numbers of
// torch_backend/model.py, one step at a time.
//
// A step is one call: all threads run through all layers together and wait for each other between two stages. The
// residual stream, norms, router and softmax are fp32. The bits of a row of logits depend on its sequence alone, not on
// the rest of the batch, nor on chunks or threads: no sum is ever shared between threads, and each runs in one order.
#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "activations.h"
#include "attention.h"
#include "kernels.h"
#include "pool.h"

namespace maestrale {

constexpr int64_t kNoWindow = std::numeric_limits<int64_t>::max();
constexpr size_t kDivisions = 5;  // of the work among threads, in a layer: four linear stages and attention

struct Shape {
  int64_t dim, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, n_chosen;
  float norm_eps;
  std::vector<float> speeds;  // [head_dim / 2]: what each pair of entries turns in one position, in radians
};

struct FeedForward {
  Weight w1, w2, w3;
};

struct Layer {
  const float* attention_norm;
  Weight wq, wk, wv, wo;
  const float* ffn_norm;
  const float* gate;                 // [experts][dim], null where there is no mixture
  std::vector<FeedForward> experts;  // one where there is no mixture
  int64_t kind, index;               // of the cache, and its number among the layers of that kind
};

// The pages of one kind of layer: page after page, in it layer after layer, head after head (attention.h).
struct CacheKind {
  uint32_t* pool;
  int64_t pages, ring, window, layers;
};

// One step's work: `Batch` of batch.py as pointers.
struct Step {
  int64_t rows, sequences, wanted;
  const int64_t *tokens, *positions, *starts, *logit_rows;
  std::vector<const int64_t*> tables, copies;  // for each kind: [sequences][ring], [n][2]
  std::vector<int64_t> copy_counts;
  const float* hidden_in;  // [rows][dim], where the embeddings are on another stage
  float* hidden_out;       // [rows][dim], where the head is on another stage
  float* logits;           // [wanted][vocab]
  int16_t* chosen;         // [layers][rows][n_chosen] experts, the likeliest first, or null; rows left out stay as they are
};

class Model {
 public:
  Model(Shape shape, int64_t page_size, Kept kept, const Kernels& kernels, int threads);

  void add_kind(const CacheKind& kind) { kinds_.push_back(kind); }
  void add_layer(Layer layer);
  void set_embeddings(Stored dtype, const void* rows) { stored_ = dtype, embeddings_ = rows; }
  void set_head(const float* norm, const Weight& output);

  const Shape& shape() const { return shape_; }
  const std::vector<CacheKind>& kinds() const { return kinds_; }
  int64_t layers() const { return int64_t(layers_.size()); }
  int64_t page_units(int64_t layers) const { return layers * shape_.n_kv_heads * head_.size(); }  // uint32 of a page
  bool has_embeddings() const { return embeddings_ != nullptr; }
  bool has_head() const { return final_norm_ != nullptr; }

  void step(const Step& step);  // std::invalid_argument where the step does not fit the model

 private:
  // Rows prepared for products: of all threads together, or of one thread where there is a single row.
  struct Desk {
    Activations dim, heads, hidden, gathered;
    Buffer<float> normed;    // [rows][dim]
    Buffer<int32_t> experts;  // [rows][n_chosen], ascending
    Buffer<float> shares;    // [rows][n_chosen], the weights of those experts
  };
  // The rows of a mixture expert after expert: begins[e] … begins[e + 1] are e's.
  struct Order {
    std::vector<int64_t> begins, rows, places;  // rows[place] = row; places[row * n_chosen + i] = place
    std::vector<int64_t> busy;                  // the experts that have rows
    std::vector<const float*> outputs;
    Buffer<float> scores;
    Buffer<char> scratch;
    size_t divisions = 0;  // that the thread has come to in this step
  };
  struct Range {
    int64_t first, last;
  };
  // Consecutive positions of one sequence: rows first … first + count - 1, whose results go to rows `out` and after.
  struct Run {
    int64_t first, count, sequence, out;
  };

  void check(const Step& step) const;
  void begin(const Step& step);
  void copy_pages(const Step& step);
  void cut(const Step& step);
  void run(const Step& step, int thread);
  void embed(const Step& step, int64_t row);
  void turn(int64_t position, float* turns) const;
  Span span(const Step& step, const Layer& layer, const Run& run) const;
  CacheView view(const Layer& layer) const;
  void write(const Step& step, const Layer& layer, int thread);
  void linears(std::initializer_list<std::pair<const Weight*, Output>> products, const Activations& activations,
               int64_t rows, int thread);
  void attend(const Step& step, const Layer& layer, const std::vector<Run>& runs, int thread);
  void feed_forward(const Layer& layer, int64_t rows, int thread);
  void mixture(const Layer& layer, int64_t rows, int16_t* chosen, const int64_t* original, int thread);
  static void choose(const float* scores, int64_t experts, int64_t K, int32_t* chosen);
  static void weigh(const float* scores, int64_t K, int32_t* chosen, float* shares);
  void sort_rows(const Desk& desk, int64_t experts, int64_t rows, Order& order) const;

  Range share(int64_t count, int thread) const {
    return {count * thread / pool_.size(), count * (thread + 1) / pool_.size()};
  }
  template <class Work>
  void divide(int64_t count, int64_t rows, int thread, const Work& work);
  template <class Prepare>
  const Desk& prepared(int64_t rows, int thread, const Prepare& prepare);

  const Shape shape_;
  const HeadLayout head_;
  const Kernels& kernels_;
  std::vector<CacheKind> kinds_;
  std::vector<Layer> layers_;
  Stored stored_ = Stored::f32;
  const void* embeddings_ = nullptr;
  const float* final_norm_ = nullptr;
  Weight output_{};

  Desk shared_;
  std::vector<Desk> own_;      // for each thread
  std::vector<Order> orders_;  // for each thread
  Buffer<float> x_, q_, k_, v_, mixed_, hidden_, expert_out_, turns_;
  Buffer<uint32_t> copied_;
  std::vector<Run> written_, queries_, wanted_;  // within a page; of a length for attention; the wanted ones of these
  std::vector<std::atomic<int64_t>> taken_;  // of each division of the step: how many of its items are begun
  Pool pool_;
};

}  // namespace maestrale
