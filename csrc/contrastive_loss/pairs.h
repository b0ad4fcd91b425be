// What both contrastive losses share: products x = image text^T of a chunk of images at a time, on
// linear_head.h with images as rows and texts as classes; the pair of row r is class r.
#pragma once

#include "contrastive_loss/contrastive_loss.h"
#include "linear_head/linear_head.h"
#include "linear_head/row_statistics.h"

namespace mbm::MBM_ISA {

inline vi lane_numbers() {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}
// All ones in the first n lanes, zero in the rest.
inline vi lanes_below(int64_t n) { return lane_numbers() < static_cast<int32_t>(n); }
inline vf keep_lanes(vf x, vi mask) { return (vf)((vi)x & mask); }

// Sums of one block of texts over all chunks of images, in the order of the chunks.
struct BlockSums {
  double loss = 0, by_scale = 0, by_bias = 0;  // of the loss, of g x and of g, g the logit's
  void add(const BlockSums& more) {
    loss += more.loss;
    by_scale += more.by_scale;
    by_bias += more.by_bias;
  }
};

class Pairs {
 public:
  // differentiate: gradients of the logits are made, over the products.
  Pairs(const ContrastiveLoss& args, bool differentiate, int num_threads)
      : a_(args),
        all_(iota(args.B)),
        rows_(all_.data(), args.B, differentiate ? kChunkBytes : kForwardBytes,
              differentiate ? kFloat * args.B : forward_bytes_a_row(args.D)),
        threads_(num_threads),
        chunk_({args.B, args.D, args.image, args.text, nullptr}, rows_, threads_, differentiate,
               args.grad_text != nullptr),
        sums_(static_cast<size_t>(chunk_.blocks().count)) {}

 protected:
  static constexpr int64_t kFloat = sizeof(float);

  // body(thread, block) for all blocks of texts.
  template <class Body>
  void for_blocks(const Body& body) const {
    for_items(threads_.count, chunk_.blocks().count, body);
  }
  int64_t first_text(int64_t b) const { return chunk_.blocks().begin(b); }
  int64_t texts(int64_t b) const { return chunk_.blocks().end(b) - first_text(b); }

  // Products of a block. Lanes past the last image repeat the first of their panel, so that they
  // change no maximum.
  RowPanels products(const RowChunk& rows, int thread, int64_t b) const {
    const RowPanels x = chunk_.logits(thread, b);
    const int64_t last = rows.panels - 1;
    for (int64_t v = 0; v < texts(b); ++v) {
      float* at = x.at(last, v);
      for (int64_t i = rows.rows_of_panel(last); i < kPanel; ++i) at[i] = at[0];
    }
    return x;
  }

  // Whether pairs lie where panel p of the rows meets block b.
  bool meets_pairs(const RowChunk& rows, int64_t p, int64_t b) const {
    const int64_t row = rows.first + p * kPanel;
    return row < chunk_.blocks().end(b) && first_text(b) < row + kPanel;
  }
  // body(v, r, text) for every pair of the rows in block b: class v of it, row r of the chunk.
  template <class Body>
  void for_pairs(const RowChunk& rows, int64_t b, const Body& body) const {
    const int64_t v0 = first_text(b), v1 = chunk_.blocks().end(b);
    const int64_t end = rows.first + rows.rows < v1 ? rows.first + rows.rows : v1;
    for (int64_t i = rows.first > v0 ? rows.first : v0; i < end; ++i)
      body(i - v0, i - rows.first, i);
  }

  // What the gradients of a block of logits bring, once they stand in x.
  void add_to_text(int thread, int64_t b, RowPanels x, bool add) const {
    if (a_.grad_text) chunk_.grad_weight(thread, b, x, a_.grad_text, add);
  }
  void write_image(const RowChunk& rows) const {
    if (a_.grad_image) chunk_.grad_hidden(rows, a_.grad_image);
  }

  double share() const {  // of the loss's gradient, in a sum over pairs
    return (a_.grad_loss ? static_cast<double>(a_.grad_loss[0]) : 1.0) /
           static_cast<double>(a_.B > 0 ? a_.B : 1);
  }
  BlockSums total() const {
    BlockSums all;
    for (const BlockSums& block : sums_) all.add(block);
    return all;
  }

  const ContrastiveLoss& a_;
  std::vector<int64_t> all_;
  RowChunks rows_;
  HeadThreads threads_;
  HeadChunk chunk_;
  std::vector<BlockSums> sums_;

 private:
  static std::vector<int64_t> iota(int64_t n) {
    std::vector<int64_t> numbers(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) numbers[static_cast<size_t>(i)] = i;
    return numbers;
  }
};

}  // namespace mbm::MBM_ISA
