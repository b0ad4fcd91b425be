// The CUDA kernels' launchers under ThreadSanitizer (csrc/common/gpu/emulation.h).
//
//   cuda_races KERNEL [BARRIER]   runs KERNEL's cases without the barriers named so; prints a hash
//                                 of the results and, last, the barriers reached
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "additive_attention/additive_attention_cuda.h"
#include "common/gpu/emulation.h"
#include "common/gpu/gpu.cuh"
#include "common/gpu/launch.h"
#include "conv_bias_act/conv_bias_act_cuda.h"
#include "gru/gru_cuda.h"
#include "gru_cell/gru_cell_cuda.h"

namespace {

using Results = std::vector<std::vector<float>>;

struct Random {
  std::mt19937 engine{1};
  std::vector<float> normal(int64_t n, float scale) {
    std::normal_distribution<float> draw(0.0f, scale);
    std::vector<float> found(n);
    for (float& x : found) x = draw(engine);
    return found;
  }
};

struct AdditiveCase {
  int64_t B, T, S, D, E;
  float scale;
};

// Every tile, a cluster of one and of more, several passes of values, each form of tanh.
const AdditiveCase kAdditive[] = {
    {1, 20, 196, 40, 300, 1.0f}, {1, 3, 9, 70, 5, 1.0f},   {1, 7, 140, 8, 600, 0.05f},
    {1, 41, 150, 33, 4, 1.0f},   {1, 24, 9, 33, 4, 30.0f},
};

mbm::AdditiveAttentionCudaInputs additive_inputs(const AdditiveCase& c,
                                                 const std::vector<float>& query,
                                                 const std::vector<float>& key,
                                                 const std::vector<float>& value,
                                                 const std::vector<float>& v) {
  mbm::AdditiveAttentionCudaInputs in{};
  in.B = c.B, in.T = c.T, in.S = c.S, in.D = c.D, in.E = c.E;
  in.query = query.data(), in.query_b = c.T * c.D, in.query_t = c.D;
  in.key = key.data(), in.key_b = c.S * c.D, in.key_s = c.D;
  in.value = value.data(), in.value_b = c.S * c.E, in.value_s = c.E;
  in.v = v.data();
  return in;
}

Results run_additive(const AdditiveCase& c, bool backward) {
  Random random;
  auto query = random.normal(c.B * c.T * c.D, c.scale),
       key = random.normal(c.B * c.S * c.D, c.scale);
  auto value = random.normal(c.B * c.S * c.E, 1.0f), v = random.normal(c.D, 1.0f);
  const auto in = additive_inputs(c, query, key, value, v);
  std::vector<float> context(c.B * c.T * c.E), weights(c.B * c.T * c.S, 1.0f / c.S);
  if (!backward) {
    mbm::additive_attention_cuda_fwd({in, context.data(), weights.data()}, 0, nullptr);
    return {context, weights};
  }
  const auto arriving = random.normal(c.B * c.T * c.E, 1.0f);
  std::vector<float> scores(c.B * c.S * mbm::additive_attention_cuda_rows(c.T));
  std::vector<float> totals(c.B * c.S * c.D), by_query(query.size()), by_key(key.size());
  std::vector<float> by_v(c.B * c.D);
  mbm::AdditiveAttentionCudaBackward args{};
  args.in = in;
  args.weights = weights.data();
  args.grad_context = arriving.data();
  args.grad_context_b = c.T * c.E, args.grad_context_t = c.E;
  args.grad_scores = scores.data(), args.grad_key_totals = totals.data();
  args.grad_query = by_query.data(), args.grad_key = by_key.data(), args.grad_v = by_v.data();
  mbm::additive_attention_cuda_bwd(args, 0, nullptr);
  return {by_query, by_key, by_v};
}

std::vector<Results> additive(bool backward) {
  std::vector<Results> found;
  for (const AdditiveCase& c : kAdditive) found.push_back(run_additive(c, backward));
  return found;
}

// Each number of queries, a cluster of one and of more, several chunks of features, each form.
const AdditiveCase kDecode[] = {
    {1, 1, 140, 24, 300, 1.0f},
    {1, 2, 9, 520, 600, 1.0f},
    {1, 3, 70, 8, 5, 0.05f},
    {1, 8, 9, 9, 4, 30.0f},
};

std::vector<Results> decode() {
  std::vector<Results> found;
  for (const AdditiveCase& c : kDecode) {
    Random random;
    const auto query = random.normal(c.B * c.T * c.D, c.scale),
               key = random.normal(c.B * c.S * c.D, c.scale);
    const auto value = random.normal(c.B * c.S * c.E, 1.0f), v = random.normal(c.D, 1.0f);
    std::vector<float> context(c.B * c.T * c.E), weights(c.B * c.T * c.S);
    std::vector<float> powers(c.B * c.S * mbm::additive_attention_cuda_pitch(c.D));
    std::vector<float> magnitudes(c.B * c.S);
    mbm::AdditiveAttentionCudaKeys keys{};
    keys.B = c.B, keys.S = c.S, keys.D = c.D;
    keys.key = key.data(), keys.key_b = c.S * c.D, keys.key_s = c.D;
    keys.powers = powers.data(), keys.magnitudes = magnitudes.data();
    mbm::additive_attention_cuda_keys(keys, 0, nullptr);
    mbm::AdditiveAttentionCudaDecode args{};
    args.in = additive_inputs(c, query, key, value, v);
    args.powers = powers.data(), args.magnitudes = magnitudes.data();
    args.context = context.data(), args.weights = weights.data();
    mbm::additive_attention_cuda_decode(args, 0, nullptr);
    found.push_back({context, weights});
  }
  return found;
}

struct CellCase {
  int64_t B, C, H;
};
// Clusters of several blocks; tiles of 8 and of 16 rows.
const CellCase kCells[] = {{3, 140, 20}, {20, 5, 20}};

Results run_cell(const CellCase& c) {
  Random random;
  const int64_t units = c.B * c.H;
  const auto x = random.normal(c.B * c.C, 1.0f), h = random.normal(units, 1.0f);
  const auto w_ih = random.normal(3 * c.H * c.C, 0.2f), w_hh = random.normal(3 * c.H * c.H, 0.2f);
  std::vector<float> h_new(units), reserve(4 * units);
  const mbm::GruCellCudaForward forward{
      c.B, c.C,         c.H,         {},      x.data(), c.C,          h.data(),
      c.H, w_ih.data(), w_hh.data(), nullptr, nullptr,  h_new.data(), reserve.data()};
  mbm::gru_cell_cuda_fwd(forward, 0, nullptr);
  return {h_new, reserve};
}

std::vector<Results> cell() {
  std::vector<Results> found;
  for (const CellCase& c : kCells) found.push_back(run_cell(c));
  return found;
}

// Two clusters of 4, or one group of 4 blocks with two tiles, with rows that end early, both
// directions of time; units past one tile.
Results run_gru(int64_t H, bool reverse, bool backward, bool by_groups) {
  constexpr int64_t kT = 5, kB = 9;
  if (by_groups) mbm::gpu::emulated_device() = {4, 227 * 1024, 1};
  const int64_t units = kB * H;
  Random random;
  const auto inputs = random.normal(3 * kT * units, 1.0f), w_hh = random.normal(3 * H * H, 0.2f);
  const std::vector<int64_t> lengths = {5, 0, 3, 4, 5, 2, 1, 5, 4};
  std::vector<float> y(kT * units), h_n(units), reserve(4 * kT * units);
  mbm::GruCudaForward forward{};
  forward.sizes = {kT, kB, H, {}, false, 1, 0, 0, 0, lengths.data(), units, H};
  mbm::GruCudaPlan plan{};
  mbm::gru_cuda_plan(forward.sizes, 0, &plan);
  forward.sizes.cluster = plan.cluster, forward.sizes.groups = plan.groups;
  forward.sizes.at_once = plan.at_once;
  std::vector<uint32_t> flags(plan.flags);
  std::vector<float> states(backward ? plan.backward_states : plan.states), own(units);
  forward.through = {flags.data(), states.data()};
  forward.direction[0] = {reverse,  inputs.data(), w_hh.data(),    nullptr,   nullptr,
                          y.data(), h_n.data(),    reserve.data(), own.data()};
  if (!backward) {
    mbm::gru_cuda_fwd(forward, 0, nullptr);
    return {y, h_n, reserve};
  }
  const auto grad_y = random.normal(kT * units, 1.0f);
  reserve = random.normal(4 * kT * units, 0.5f);
  std::vector<float> carried(units, 1.0f), gates(4 * kT * units);
  mbm::GruCudaBackward args{};
  args.sizes = forward.sizes;
  args.through = forward.through;
  args.direction[0] = {reverse, grad_y.data(),  units,          H,           w_hh.data(), y.data(),
                       nullptr, reserve.data(), carried.data(), gates.data()};
  mbm::gru_cuda_bwd(args, 0, nullptr);
  return {carried, gates};
}

std::vector<Results> gru(bool backward, bool by_groups) {
  return {run_gru(37, false, backward, by_groups), run_gru(64, true, backward, by_groups)};
}

struct ConvCase {
  int C, K, Y, X, taps, stride, pool;
  bool depthwise;
  mbm::gpu::Dtype dtype;
};
constexpr mbm::gpu::Dtype kFloat = mbm::gpu::Dtype::kFloat32;

template <class T>
struct ConvRun {
  mbm::ConvCudaSizes s{};
  std::vector<T> x, weight, y;
  std::vector<uint8_t> places;

  static std::vector<T> rounded(const std::vector<float>& from) {
    std::vector<T> to;
    for (float value : from) to.push_back(mbm::gpu::from_float<T>(value));
    return to;
  }
  static Results widened(const std::vector<T>& from) {
    std::vector<float> to;
    for (T value : from) to.push_back(mbm::gpu::to_float(value));
    return {to};
  }
  static mbm::ConvCudaMap map(std::vector<T>& data, int64_t C, int64_t Y, int64_t X) {
    return {data.data(), C * Y * X, 1, X * C, C};
  }

  explicit ConvRun(const ConvCase& c) {
    const auto outputs = [](int n, int taps, int stride) { return (n - taps) / stride + 1; };
    s.B = 1, s.C = c.C, s.K = c.K, s.Y = c.Y, s.X = c.X, s.R = s.S = c.taps;
    s.stride_y = s.stride_x = c.stride;
    s.conv_y = outputs(c.Y, c.taps, c.stride), s.conv_x = outputs(c.X, c.taps, c.stride);
    s.pool_y = s.pool_x = s.pool_stride_y = s.pool_stride_x = c.pool;
    s.out_y = outputs(s.conv_y, c.pool, c.pool), s.out_x = outputs(s.conv_x, c.pool, c.pool);
    s.activation = mbm::Activation::kRelu, s.depthwise = c.depthwise, s.dtype = c.dtype;
    s.terms = (c.depthwise ? 1 : c.C) * c.taps * c.taps;
    Random random;
    x = rounded(random.normal(int64_t{s.C} * s.Y * s.X, 1.0f));
    weight = rounded(random.normal(int64_t{s.K} * s.terms, 1.0f));
    places.resize(int64_t{s.K} * s.out_y * s.out_x);
    y.resize(places.size());
    mbm::ConvCudaForward args{};
    args.sizes = s, args.x = map(x, s.C, s.Y, s.X), args.weight = weight.data();
    args.y = map(y, s.K, s.out_y, s.out_x), args.saved.places = places.data();
    mbm::conv_cuda_fwd(args, 0, nullptr);
  }

  Results gradients() {
    std::vector<T> grad_x(x.size()), grad_weight(weight.size()), grad_bias(s.K);
    std::vector<T> grad_z(int64_t{s.K} * s.conv_y * s.conv_x);
    std::vector<float> parts(mbm::conv_cuda_parts(s));
    mbm::ConvCudaBackward args{};
    args.sizes = s, args.x = map(x, s.C, s.Y, s.X), args.weight = weight.data();
    args.grad_y = map(y, s.K, s.out_y, s.out_x), args.saved.places = places.data();
    args.grad_x = map(grad_x, s.C, s.Y, s.X), args.grad_z = map(grad_z, s.K, s.conv_y, s.conv_x);
    args.grad_weight = grad_weight.data(), args.grad_bias = grad_bias.data();
    args.parts = parts.data();
    mbm::conv_cuda_bwd(args, 0, nullptr);
    return {widened(grad_x)[0], widened(grad_weight)[0], widened(grad_bias)[0], widened(grad_z)[0]};
  }
};

Results conv_forward(const ConvCase& c) {
  if (c.dtype == kFloat) return ConvRun<float>::widened(ConvRun<float>(c).y);
  using Half = mbm::gpu::bfloat16;
  return ConvRun<Half>::widened(ConvRun<Half>(c).y);
}

// Several tiles of a block where it walks over them; of few channels two blocks of outputs.
constexpr ConvCase kStemCase = {2, 33, 19, 13, 3, 1, 2, false, kFloat};
constexpr ConvCase kMmaCase = {3, 16, 40, 70, 3, 1, 2, false, mbm::gpu::Dtype::kBFloat16};
constexpr ConvCase kDepthwiseCase = {33, 33, 13, 12, 3, 2, 1, true, kFloat};

uint64_t hash(const std::vector<Results>& all) {
  uint64_t state = 1469598103934665603u;
  for (const Results& results : all)
    for (const auto& result : results)
      for (float x : result) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        state = (state ^ bits) * 1099511628211u;
      }
  return state;
}

const std::map<std::string, std::function<std::vector<Results>()>> kKernels = {
    {"additive_attention_fwd", [] { return additive(false); }},
    {"additive_attention_bwd", [] { return additive(true); }},
    {"additive_attention_decode", [] { return decode(); }},
    {"conv_stem_fwd", [] { return std::vector<Results>{conv_forward(kStemCase)}; }},
    {"conv_stem_mma_fwd", [] { return std::vector<Results>{conv_forward(kMmaCase)}; }},
    {"conv_stem_bwd", [] { return std::vector<Results>{ConvRun<float>(kStemCase).gradients()}; }},
    {"conv_depthwise_fwd", [] { return std::vector<Results>{conv_forward(kDepthwiseCase)}; }},
    {"conv_depthwise_bwd",
     [] { return std::vector<Results>{ConvRun<float>(kDepthwiseCase).gradients()}; }},
    {"gru_cell_fwd", [] { return cell(); }},
    {"gru_fwd", [] { return gru(false, false); }},
    {"gru_bwd", [] { return gru(true, false); }},
    {"gru_group_fwd", [] { return gru(false, true); }},
    {"gru_group_bwd", [] { return gru(true, true); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || !kKernels.count(argv[1])) {
    for (const auto& [name, run] : kKernels) std::puts(name.c_str());
    return argc < 2 ? 0 : 2;
  }
  if (argc > 2) mbm::emulation::drop(argv[2]);
  mbm::gpu::emulated_device() = {2, 227 * 1024, 8};  // few blocks: the sanitizer has 8128 threads
  std::printf("hash %016llx\n", static_cast<unsigned long long>(hash(kKernels.at(argv[1])())));
  for (const auto& [site, reached] : mbm::emulation::sites())
    std::printf("barrier %lld %s\n", static_cast<long long>(reached), site.c_str());
  return 0;
}
