// Forward: dot products of rows of x and h with rows of the weights, a block of units at a time.
// Backward: gradients of the gates, then each of the other gradients as one product.
#include <algorithm>
#include <atomic>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/small_matmul.h"
#include "gru/gru_gates.h"
#include "gru_cell/gru_cell.h"

namespace mbm::MBM_ISA {
namespace {

// Units whose gates are applied together: their sums [B, 2, 3, kUnits] stay in L1 and L2.
constexpr int64_t kUnits = kLanes;
// Multiply-adds below which a second thread costs more than it brings (2 us at 16 lanes).
constexpr int64_t kSerialWork = 100000;

// The part of n that thread i of a team takes, in whole blocks: the same part at each call, since a
// core's L2 still holds some of its weights then.
struct Part {
  int64_t begin, end;
  Part(int64_t n, int64_t block, int i, int team) {
    const int64_t blocks = (n + block - 1) / block;
    begin = std::min(n, i * blocks / team * block);
    end = std::min(n, (i + 1) * blocks / team * block);
  }
};

int threads_for(const GruCellInputs& in, int num_threads) {
  return 3 * in.B * in.H * (in.C + in.H) < kSerialWork ? 1 : num_threads;
}

float optional(const float* bias, int64_t i) { return bias ? bias[i] : 0.0f; }

// Units u0 .. u0 + n; sums: [B, 2, 3, kUnits].
void forward_block(const GruCellForward& args, int64_t u0, int64_t n, float* sums) {
  const GruCellInputs& in = args.in;
  const int64_t H = in.H, step = 6 * kUnits;
  alignas(64) float bias[4 * kUnits] = {};  // of r, z, n from the input, n from the state
  for (int64_t j = 0; j < n; ++j) {
    const int64_t u = u0 + j;
    for (int64_t gate = 0; gate < 2; ++gate)
      bias[gate * kUnits + j] =
          optional(args.b_ih, gate * H + u) + optional(args.b_hh, gate * H + u);
    bias[2 * kUnits + j] = optional(args.b_ih, 2 * H + u);
    bias[3 * kUnits + j] = optional(args.b_hh, 2 * H + u);
  }
  for (int64_t gate = 0; gate < 3; ++gate) {
    float* from_input = sums + gate * kUnits;
    matmul_nt(in.B, n, in.C, in.x, in.x_stride_b, in.w_ih + (gate * H + u0) * in.C, in.C,
              from_input, step);
    matmul_nt(in.B, n, H, in.h, H, in.w_hh + (gate * H + u0) * H, H, from_input + 3 * kUnits, step);
  }
  for (int64_t b = 0; b < in.B; ++b, sums += step) {
    const vf hn = load(sums + 5 * kUnits) + load(bias + 3 * kUnits);
    const GruGates gates = gru_gates(
        load(sums) + load(bias), load(sums + 3 * kUnits), load(sums + kUnits) + load(bias + kUnits),
        load(sums + 4 * kUnits), load(sums + 2 * kUnits) + load(bias + 2 * kUnits), hn);
    store_part(args.h_new + b * H + u0, gates.next(load_part(in.h + b * H + u0, n)), n);
    if (args.reserve) store_gates(args.reserve + b * 4 * H + u0, H, gates, hn, n);
  }
}

class Backward {
 public:
  // grad_gates [B, 4H] = n, r, z, hn: the first three meet W_ih, the last three W_hh.
  Backward(const GruCellBackward& args, float* grad_gates)
      : args_(args), in_(args.in), grad_(grad_gates) {}

  // Gate gradients of units u0 .. u1, and what of grad_h passes by the gates.
  void pointwise(int64_t u0, int64_t u1) const {
    const int64_t H = in_.H;
    for (int64_t b = 0; b < in_.B; ++b)
      for (int64_t u = u0; u < u1; u += kLanes) {
        const int64_t left = u1 - u, at = b * H + u;
        const vf passed =
            grad_gates(args_.reserve + b * 4 * H + u, H, load_part(in_.h + at, left),
                       load_part(args_.grad_h_new + at, left), grad_ + b * 4 * H + u, left);
        if (args_.grad_h) store_part(args_.grad_h + at, passed, left);
      }
  }

  void grad_h(int64_t u0, int64_t u1) const {
    const int64_t H = in_.H;
    through(3 * H, u1 - u0, grad_ + H, in_.w_hh + u0, H, args_.grad_h + u0, true);
  }

  // r and z, then n, whose gradient lies before theirs.
  void grad_x(int64_t c0, int64_t c1) const {
    const int64_t H = in_.H, C = in_.C;
    through(2 * H, c1 - c0, grad_ + H, in_.w_ih + c0, C, args_.grad_x + c0, false);
    through(H, c1 - c0, grad_, in_.w_ih + 2 * H * C + c0, C, args_.grad_x + c0, true);
  }

  // Rows of units u0 .. u1 in each gate.
  void grad_weights(int64_t u0, int64_t u1) const {
    const int64_t H = in_.H, C = in_.C;
    for (int64_t gate = 0; gate < 3; ++gate) {
      const int64_t row = gate * H + u0;
      if (args_.grad_w_ih)
        matmul_tn(u1 - u0, in_.B, C, grad_ + (gate + 1) % 3 * H + u0, 4 * H, in_.x, in_.x_stride_b,
                  args_.grad_w_ih + row * C, C);
      if (args_.grad_w_hh)
        matmul_tn(u1 - u0, in_.B, H, grad_ + (gate + 1) * H + u0, 4 * H, in_.h, H,
                  args_.grad_w_hh + row * H, H);
      if (args_.grad_b_ih) grad_bias((gate + 1) % 3 * H + u0, args_.grad_b_ih + row, u1 - u0);
      if (args_.grad_b_hh) grad_bias((gate + 1) * H + u0, args_.grad_b_hh + row, u1 - u0);
    }
  }

 private:
  // out [B, width] (+)= gates [B, rows] weight [rows, width]. All of the width meets a slice of
  // rows before the next, so that the weights are read in one stream.
  void through(int64_t rows, int64_t width, const float* gates, const float* weight, int64_t stride,
               float* out, bool add) const {
    constexpr int64_t kSlice = 64;
    for (int64_t k = 0; k < std::max<int64_t>(rows, 1); k += kSlice)
      matmul(in_.B, std::min(kSlice, rows - k), width, gates + k, 4 * in_.H, weight + k * stride,
             stride, out, stride, add || k > 0);
  }

  void grad_bias(int64_t column, float* out, int64_t n) const {
    for (int64_t u = 0; u < n; u += kLanes) {
      vf total = zero();
      for (int64_t b = 0; b < in_.B; ++b)
        total = total + load_part(grad_ + b * 4 * in_.H + column + u, n - u);
      store_part(out + u, total, n - u);
    }
  }

  const GruCellBackward& args_;
  const GruCellInputs& in_;
  float* grad_;
};

}  // namespace

void gru_cell_forward(const GruCellForward& args, int num_threads) {
  const GruCellInputs& in = args.in;
  const int64_t floats = in.B * 6 * kUnits;
  const int threads = threads_for(in, num_threads);
  // Every other call runs from the last unit to the first: what L2 keeps of weights larger than
  // itself is the end of the last pass.
  static std::atomic<bool> last_backwards{false};
  const bool backwards = !last_backwards.load(std::memory_order_relaxed);
  last_backwards.store(backwards, std::memory_order_relaxed);
  const Scratch sums(sizeof(float) * static_cast<size_t>(floats * threads));
  parallel_region(threads, [&](int thread, int team) {
    const Part part(in.H, kUnits, thread, team);
    const int64_t blocks = (part.end - part.begin + kUnits - 1) / kUnits;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t u = part.begin + (backwards ? blocks - 1 - i : i) * kUnits;
      forward_block(args, u, std::min(kUnits, part.end - u), sums.as<float>() + thread * floats);
    }
  });
}

void gru_cell_backward(const GruCellBackward& args, int num_threads) {
  constexpr int64_t kColumns = 8 * kLanes;  // of one pass of matmul() for a single row
  const GruCellInputs& in = args.in;
  const Scratch memory(sizeof(float) * static_cast<size_t>(in.B * 4 * in.H));
  const Backward backward(args, memory.as<float>());
  Barrier barrier;
  parallel_region(threads_for(in, num_threads), [&](int thread, int team) {
    const Part units(in.H, kLanes, thread, team);
    backward.pointwise(units.begin, units.end);
    if (team > 1) barrier.wait(team);
    if (args.grad_h) {
      const Part part(in.H, kColumns, thread, team);
      backward.grad_h(part.begin, part.end);
    }
    if (args.grad_x) {
      const Part part(in.C, kColumns, thread, team);
      backward.grad_x(part.begin, part.end);
    }
    backward.grad_weights(units.begin, units.end);
  });
}

}  // namespace mbm::MBM_ISA
