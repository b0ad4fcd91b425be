// The backward's second kernel: gradients of query, key and v at once, from those of the scores.
#pragma once

#include "additive_attention/additive_attention_cuda.h"
#include "additive_attention/score_tile.cuh"

namespace mbm::additive {

constexpr int kTermThreads = 256;
constexpr int kTermWarps = kTermThreads / 32;
constexpr int kTermFeatures = 32;    // of a block: one for each lane
constexpr int kTermPositions = 128;  // whose gradients are in shared memory at once

// Sums over a chunk of queries for one feature; a warp takes every kTermWarps-th position.
template <int CHUNK>
struct Terms {
  float x[CHUNK];         // e^-2q, or less 1 if centred
  float by_query[CHUNK];  // without the factor 4 v e^-2q
  float by_v = 0.0f;

  // The gradient by one key. g [CHUNK], of the scores at one position. With r = 1 / (x + y),
  //   sum_t g tanh = y sum_t g r - sum_t x g r,   1 - tanh^2 = 4 x y r^2
  // which keeps its digits where tanh saturates.
  template <bool CENTRED>
  MBM_DEVICE float add(const float* g, float k, float v) {
    const float y = gpu::exp(2.0f * k);
    const float numerator = CENTRED ? gpu::expm1(2.0f * k) : y;
    const float beside_x = CENTRED ? 2.0f + numerator : y;  // x + y = x[t] + beside_x
    float by_r = 0.0f, by_xr = 0.0f, by_rr = 0.0f, by_xrr = 0.0f;
#pragma unroll
    for (int t = 0; t < CHUNK; t += 4) {
      const float4 four = *reinterpret_cast<const float4*>(g + t);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        // Two queries share one reciprocal: 9 instructions a query, 10 if centred.
        float &x0 = x[t + i], &x1 = x[t + i + 1];
        const float d0 = x0 + beside_x, d1 = x1 + beside_x;
        const float inverse = gpu::reciprocal(d0 * d1);
        const float r0 = d1 * inverse, r1 = d0 * inverse;
        const float a0 = (&four.x)[i] * r0, a1 = (&four.x)[i + 1] * r1;
        const float p0 = a0 * r0, p1 = a1 * r1;
        by_r += a0, by_r += a1;
        by_xr = fmaf(x0, a0, by_xr), by_xr = fmaf(x1, a1, by_xr);
        if (CENTRED) by_rr += p0, by_rr += p1;
        by_xrr = fmaf(x0, p0, by_xrr), by_xrr = fmaf(x1, p1, by_xrr);
        by_query[t + i] = fmaf(y, p0, by_query[t + i]);
        by_query[t + i + 1] = fmaf(y, p1, by_query[t + i + 1]);
      }
    }
    by_v += fmaf(numerator, by_r, -by_xr);
    return 4.0f * v * y * (CENTRED ? by_rr + by_xrr : by_xrr);
  }

  template <bool CENTRED>
  MBM_DEVICE void begin(int t, float q) {
    x[t] = CENTRED ? gpu::expm1(-2.0f * q) : gpu::exp(-2.0f * q);
    by_query[t] = 0.0f;
  }
};

template <int CHUNK>
struct GradTermsMemory {
  static constexpr int kPartial = (CHUNK + 1) * kTermFeatures;  // the last row is v's
  static constexpr int kGrads = kTermPositions * CHUNK;
  static constexpr int kFloats = kGrads + kTermWarps * kPartial + 3 * kTermWarps;

  float* grads = reinterpret_cast<float*>(gpu::shared());  // [kTermPositions][CHUNK]
  float* partial = grads + kGrads;                         // [kTermWarps][CHUNK + 1][kTermFeatures]
  float* scratch = partial + kTermWarps * kPartial;

  // This lane's feature of warp w.
  MBM_DEVICE float* partial_of(int w) const { return partial + w * kPartial + gpu::lane(); }
};

// Of one batch element: rows of 32 features from `first` on.
template <class T>
struct TermRows {
  const AdditiveAttentionCudaBackward& args;
  int64_t b;
  int d, count, rows;
  bool inside;

  MBM_DEVICE TermRows(const AdditiveAttentionCudaBackward& given, int padded)
      : args(given), rows(padded) {
    const auto& in = args.in;
    const int blocks = static_cast<int>((in.D + kTermFeatures - 1) / kTermFeatures);
    b = gpu::block() / blocks;
    d = gpu::block() % blocks * kTermFeatures + gpu::lane();
    inside = d < in.D;
    count = static_cast<int>(in.S);
    if (in.key_lengths != nullptr) {
      const int64_t length = in.key_lengths[b];
      count = length < 0 ? 0 : length < in.S ? static_cast<int>(length) : count;
    }
  }
  MBM_DEVICE float query(int t) const {
    const T* data = static_cast<const T*>(args.in.query) + b * args.in.query_b;
    return inside && t < args.in.T ? gpu::to_float(data[t * args.in.query_t + d]) : 0.0f;
  }
  MBM_DEVICE float key(int s) const {
    const T* data = static_cast<const T*>(args.in.key) + b * args.in.key_b;
    return inside && s < count ? gpu::to_float(data[s * args.in.key_s + d]) : 0.0f;
  }
  MBM_DEVICE float v() const {
    return inside ? gpu::to_float(static_cast<const T*>(args.in.v)[d]) : 0.0f;
  }
  MBM_DEVICE Form form(float* scratch) const {
    Magnitudes mine{0.0f, 0.0f, 0.0f};
    for (int t = gpu::warp(); t < args.in.T; t += kTermWarps)
      mine.query = fmaxf(mine.query, magnitude(query(t)));
    for (int s = gpu::warp(); s < count; s += kTermWarps)
      mine.key = fmaxf(mine.key, magnitude(key(s)));
    return block_max<kTermWarps>(mine, scratch).form();
  }
};

// One feature of the keys that a warp takes in turn, and of their gradients: offsets of 32 bits
// within the batch element, for registers are short.
template <class T>
struct KeyRow {
  const T* keys;
  T* grads;
  float* totals;  // over earlier chunks of queries, each written by the thread that reads it
  int key_at, at;

  MBM_DEVICE KeyRow(const TermRows<T>& rows, int s) {
    const auto& in = rows.args.in;
    const int64_t first = rows.b * in.S * in.D;
    keys = static_cast<const T*>(in.key) + rows.b * in.key_b;
    grads = static_cast<T*>(rows.args.grad_key) + first;
    totals = rows.args.grad_key_totals + first;
    key_at = s * static_cast<int>(in.key_s) + rows.d;
    at = s * static_cast<int>(in.D) + rows.d;
  }
  MBM_DEVICE float key() const { return gpu::to_float(keys[key_at]); }
  MBM_DEVICE void next(const TermRows<T>& rows) {
    key_at += kTermWarps * static_cast<int>(rows.args.in.key_s);
    at += kTermWarps * static_cast<int>(rows.args.in.D);
  }
  MBM_DEVICE void store(float by_key, bool is_first, bool is_last) const {
    if (!is_first) by_key += totals[at];
    if (is_last)
      gpu::store(grads, at, by_key);
    else
      totals[at] = by_key;
  }
};

// A chunk of queries and every position. add(g, k): of the gradients of the scores at one position
// and its key; returns the gradient by the key.
template <class T, int CHUNK, class Add>
MBM_DEVICE void add_chunk(const TermRows<T>& rows, const GradTermsMemory<CHUNK>& memory, int t0,
                          const Add& add) {
  const int S = static_cast<int>(rows.args.in.S);
  const bool is_last = t0 + CHUNK >= rows.rows;
  for (int s0 = 0; s0 < S; s0 += kTermPositions) {
    const int positions = min(kTermPositions, S - s0);
    const float* from = rows.args.grad_scores + (rows.b * S + s0) * rows.rows + t0;
    for (int i = gpu::thread(); i < positions * CHUNK; i += kTermThreads)
      memory.grads[i] = from[i / CHUNK * rows.rows + i % CHUNK];
    gpu::block_barrier("gradients loaded");
    if (rows.inside) {
      KeyRow<T> row(rows, s0 + gpu::warp());
      const float* g = memory.grads + gpu::warp() * CHUNK;
      int s = s0 + gpu::warp();
      for (; s < min(s0 + positions, rows.count); s += kTermWarps) {
        row.store(add(g, row.key()), t0 == 0, is_last);
        row.next(rows);
        g += kTermWarps * CHUNK;
      }
      for (; s < s0 + positions; s += kTermWarps) {
        row.store(0.0f, t0 == 0, is_last);
        row.next(rows);
      }
    }
    gpu::block_barrier("gradients read");
  }
}

// Adds up the warps' sums, which each thread stored for itself; the next chunk's are stored after
// more barriers. factor(t): of query t0 + t.
template <class T, int CHUNK, class Factor>
MBM_DEVICE void store_chunk(const TermRows<T>& rows, const GradTermsMemory<CHUNK>& memory, int t0,
                            const Factor& factor) {
  const auto& in = rows.args.in;
  gpu::block_barrier("query sums stored");
  for (int t = gpu::warp(); t <= CHUNK; t += kTermWarps) {
    float sum = 0.0f;
    for (int w = 0; w < kTermWarps; ++w) sum += memory.partial_of(w)[t * kTermFeatures];
    if (!rows.inside) continue;
    if (t < CHUNK && t0 + t < in.T)
      gpu::store(static_cast<T*>(rows.args.grad_query), (rows.b * in.T + t0 + t) * in.D + rows.d,
                 factor(rows.query(t0 + t)) * sum);
    if (t == CHUNK && t0 + CHUNK >= rows.rows) rows.args.grad_v[rows.b * in.D + rows.d] = sum;
  }
}

template <bool CENTRED, class T, int CHUNK>
MBM_DEVICE void add_terms(const TermRows<T>& rows, const GradTermsMemory<CHUNK>& memory) {
  const float v = rows.v();
  float* partial = memory.partial_of(gpu::warp());
  Terms<CHUNK> terms;
  for (int t0 = 0; t0 < rows.rows; t0 += CHUNK) {
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) terms.template begin<CENTRED>(t, rows.query(t0 + t));
    add_chunk(rows, memory, t0,
              [&](const float* g, float k) { return terms.template add<CENTRED>(g, k, v); });
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) partial[t * kTermFeatures] = terms.by_query[t];
    partial[CHUNK * kTermFeatures] = terms.by_v;
    store_chunk(rows, memory, t0, [&](float q) { return 4.0f * v * gpu::exp(-2.0f * q); });
  }
}

// By tanh itself, the sums in shared memory from the start.
template <class T, int CHUNK>
MBM_DEVICE void add_terms_directly(const TermRows<T>& rows, const GradTermsMemory<CHUNK>& memory) {
  const float v = rows.v();
  float* partial = memory.partial_of(gpu::warp());
  float by_v = 0.0f;
  for (int t0 = 0; t0 < rows.rows; t0 += CHUNK) {
    if (t0 > 0) gpu::block_barrier("query sums read");
    for (int t = 0; t < CHUNK; ++t) partial[t * kTermFeatures] = 0.0f;
    add_chunk(rows, memory, t0, [&](const float* g, float k) {
      float by_key = 0.0f;
#pragma unroll 1
      for (int t = 0; t < CHUNK; ++t) {
        if (g[t] == 0.0f) continue;  // a pair without a gradient may hold anything
        const float tanh = gpu::tanh(rows.query(t0 + t) + k);
        const float slope = g[t] * fmaf(-tanh, tanh, 1.0f);
        by_v = fmaf(g[t], tanh, by_v);
        by_key += slope;
        partial[t * kTermFeatures] += slope;
      }
      return v * by_key;
    });
    partial[CHUNK * kTermFeatures] = by_v;
    store_chunk(rows, memory, t0, [&](float) { return v; });
  }
}

// A block: 32 features of one batch element, all its queries and positions.
template <class T, int CHUNK>
MBM_KERNEL(kTermThreads, 3)
additive_attention_grad_terms_kernel(const AdditiveAttentionCudaBackward args, int padded) {
  const TermRows<T> rows(args, padded);
  const GradTermsMemory<CHUNK> memory;
  const Form form = rows.form(memory.scratch);
  if (form == Form::kRatio)
    add_terms<false>(rows, memory);
  else if (form == Form::kCentred)
    add_terms<true>(rows, memory);
  else
    add_terms_directly(rows, memory);
}

}  // namespace mbm::additive
