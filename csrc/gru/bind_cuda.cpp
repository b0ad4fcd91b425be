// Calls take the block of a problem, then tuples of addresses; 0 stands for null.
#include <limits>
#include <string_view>
#include <vector>

#include "common/gpu/bind.h"
#include "common/problem_fields.h"
#include "gru/gru_cuda.h"

namespace {

using mbm::gpu::Place;

// `cluster`, `groups` and `at_once` are a plan's, 0 where one is asked for; `reverse` is that of
// one direction alone.
// clang-format off
#define MBM_GRU_CUDA_PROBLEM(FIELD) \
  FIELD(T) FIELD(B) FIELD(H) FIELD(dtype) FIELD(tf32) FIELD(directions) FIELD(reverse) \
  FIELD(cluster) FIELD(groups) FIELD(at_once)
// clang-format on

struct Problem {
  MBM_PROBLEM_FIELDS("gru_cuda_problem_fields", MBM_GRU_CUDA_PROBLEM)

  void check() const {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
    for (int64_t size : {T, B}) mbm::check_field("a size", size, 0, kMost);
    mbm::check_field("dtype", dtype, 0, 2);
    mbm::check_field("H", H, 0, mbm::gru_cuda_most_units(type()));
    mbm::check_field("directions", directions, 1, mbm::kGruCudaDirections);
    mbm::check_field("cluster", cluster, 0, 16);
    mbm::check_field("groups", groups, 0, B);
    mbm::check_field("at_once", at_once, 0, directions);
  }

  mbm::gpu::Dtype type() const { return static_cast<mbm::gpu::Dtype>(dtype); }
  bool reversed(int direction) const { return directions == 1 ? reverse != 0 : direction == 1; }

  mbm::GruCudaSizes sizes(Address lengths) const {
    mbm::GruCudaSizes found{};
    found.T = T;
    found.B = B;
    found.H = H;
    found.dtype = type();
    found.tf32 = tf32 != 0;
    found.directions = static_cast<int>(directions);
    found.cluster = static_cast<int>(cluster);
    found.groups = static_cast<int>(groups);
    found.at_once = static_cast<int>(at_once);
    found.lengths = optional_ptr<const int64_t>(lengths, B, "lengths");
    found.y_t = B * directions * H;
    found.y_b = directions * H;
    return found;
  }

  // `count` elements from number `first` on.
  const void* part(Address address, int64_t first, int64_t count, const char* name) const {
    const int64_t bytes = dtype == 0 ? 4 : 2;
    return mbm::gpu::pointer(address == 0 ? 0 : address + first * bytes, dtype, count, name);
  }
  const void* optional_part(Address address, int64_t first, int64_t count, const char* name) const {
    return address == 0 ? nullptr : part(address, first, count, name);
  }
};

using Through = Addresses<2>;                        // flags, states
using Layer = Addresses<3>;                          // inputs, w_hh, b_hh
using Rows = std::tuple<Address, int64_t, int64_t>;  // address, strides of t and b

mbm::GruCudaThrough through_of(const Problem& p, const Through& given) {
  if (p.cluster != 0) return {};
  auto* flags = checked_ptr<uint32_t>(given[0], 1, "flags");
  return {flags, mbm::gpu::writable(given[1], p.dtype, 1, "states")};
}

void check_layers(const Problem& p, size_t given) {
  mbm::check_field("layers", static_cast<int64_t>(given), p.directions, p.directions);
}

// states: h0, y, h_n, reserve, carried, which hold all directions; through and carried are 0 with
// clusters.
void forward(const py::bytes& problem, Address lengths, const std::vector<Layer>& layers,
             const Addresses<5>& states, const Through& through, const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  check_layers(p, layers.size());
  const auto [h0, y, h_n, reserve, carried] = states;
  const int64_t rows = p.T * p.B, state = p.B * p.H;
  mbm::GruCudaForward args{};
  args.sizes = p.sizes(lengths);
  args.through = through_of(p, through);
  for (int i = 0; i < p.directions; ++i) {
    auto& to = args.direction[i];
    to.reverse = p.reversed(i);
    to.inputs = p.part(layers[i][0], 0, 3 * rows * p.H, "inputs");
    to.w_hh = p.part(layers[i][1], 0, 3 * p.H * p.H, "w_hh");
    to.b_hh = p.optional_part(layers[i][2], 0, 3 * p.H, "b_hh");
    to.h0 = p.optional_part(h0, i * state, state, "h0");
    to.y = const_cast<void*>(p.part(y, i * p.H, rows * p.H, "y"));
    to.h_n = const_cast<void*>(p.part(h_n, i * state, state, "h_n"));
    to.reserve =
        const_cast<void*>(p.optional_part(reserve, 4 * i * rows * p.H, 4 * rows * p.H, "reserve"));
    if (p.cluster == 0)
      to.carried = checked_ptr<float>(carried, p.directions * state, "carried") + i * state;
  }
  mbm::gpu::run(mbm::gru_cuda_fwd, args, place, "gru");
}

// weights: w_hh transposed, by direction; saved: h0, y, reserve; found: carried, gates.
void backward(const py::bytes& problem, Address lengths, const std::vector<Address>& weights,
              const Addresses<3>& saved, const Rows& grad_y, const Addresses<2>& found,
              const Through& through, const Place& place) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  check_layers(p, weights.size());
  const auto [h0, y, reserve] = saved;
  const auto [arriving, arriving_t, arriving_b] = grad_y;
  const int64_t rows = p.T * p.B, state = p.B * p.H;
  float* carried = checked_ptr<float>(found[0], p.directions * state, "carried");
  mbm::GruCudaBackward args{};
  args.sizes = p.sizes(lengths);
  args.through = through_of(p, through);
  for (int i = 0; i < p.directions; ++i) {
    auto& to = args.direction[i];
    to.reverse = p.reversed(i);
    to.grad_y = p.optional_part(arriving, i * p.H, 1, "grad_y");
    to.grad_y_t = arriving_t;
    to.grad_y_b = arriving_b;
    to.w_hh_transposed = p.part(weights[i], 0, 3 * p.H * p.H, "w_hh");
    to.y = p.part(y, i * p.H, rows * p.H, "y");
    to.h0 = p.optional_part(h0, i * state, state, "h0");
    to.reserve = p.part(reserve, 4 * i * rows * p.H, 4 * rows * p.H, "reserve");
    to.carried = carried + i * state;
    to.gates = const_cast<void*>(p.part(found[1], 4 * i * rows * p.H, 4 * rows * p.H, "gates"));
  }
  mbm::gpu::run(mbm::gru_cuda_bwd, args, place, "gru");
}

// By the names of GruCudaPlan.
py::dict plan(const py::bytes& problem, int device) {
  const auto p = mbm::read_block<Problem>(std::string_view(problem));
  mbm::GruCudaPlan found{};
  mbm::gpu::check(mbm::gru_cuda_plan(p.sizes(0), device, &found), "gru");
  py::dict named;
  named["cluster"] = found.cluster;
  named["groups"] = found.groups;
  named["at_once"] = found.at_once;
  named["needed"] = found.needed;
  named["resident"] = found.resident;
  named["flags"] = found.flags;
  named["states"] = found.states;
  named["backward_states"] = found.backward_states;
  return named;
}

void bind_gru(py::module_& m) {
  bind_problem_fields<Problem>(m);
  m.def("gru_cuda_most_units",
        [](int dtype) { return mbm::gru_cuda_most_units(static_cast<mbm::gpu::Dtype>(dtype)); });
  m.def("gru_cuda_plan", &plan);
  m.def("gru_cuda_fwd", &forward);
  m.def("gru_cuda_bwd", &backward);
}

const Binding registered(bind_gru);

}  // namespace
