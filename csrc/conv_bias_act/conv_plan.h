// The algorithms behind conv_forward and conv_backward.
#pragma once

#include <vector>

#include "conv_bias_act/conv_bias_act.h"

namespace mbm::MBM_ISA {

int64_t direct_packed_size(const ConvWeight& weight, bool transposed);
void direct_pack(const ConvWeight& weight, bool transposed, float* packed, int num_threads);
int64_t winograd_packed_size(int64_t C, int64_t K);
void winograd_pack(const ConvWeight& weight, bool transposed, float* packed, int num_threads);

void direct_forward(const ConvForward& args, int num_threads);
// No pool; x, residual and y with their channels side by side; one group, or 1x1.
bool pixels_fit(const ConvForward& args);
void pixels_forward(const ConvForward& args, int num_threads);
// No pool; the pixels of x, residual and y side by side; one group, or 1x1. Reads the weight as it
// is, its inputs and taps side by side.
bool planes_fit(const ConvForward& args);
void planes_forward(const ConvForward& args, int num_threads);
// Up to four channels; pools of 2x2 side by side, or none; no activation but relu; the channels of
// y or its columns side by side.
bool few_forward_fits(const ConvForward& args);
void few_forward(const ConvForward& args, int num_threads);
// Pools of 2x2 side by side, or none.
void winograd_forward(const ConvForward& args, int num_threads);

// groups = C = K, more than a few channels.
bool depthwise_fits(int64_t C, int64_t K, int64_t groups);
int64_t depthwise_packed_size(const ConvWeight& weight);
void depthwise_pack(const ConvWeight& weight, bool transposed, float* packed);
void depthwise_forward(const ConvForward& args, int num_threads);
void depthwise_grad_weight(const ConvBackward& args, const float* grad_z, int num_threads);
// x channels_last, the kernel 3, 5 or 7 wide, stride 1 or 2.
bool depthwise_rows_fit(const ConvForward& args);
bool depthwise_rows_fit(const ConvBackward& args);
// Few taps and a large image: read in order, strips do not pay.
bool depthwise_rows_stream(const ConvSizes& sizes);
void depthwise_rows_forward(const ConvForward& args, int num_threads);
void depthwise_rows_grad_weight(const ConvBackward& args, const float* grad_z, int num_threads);
// Depthwise or up to 64 channels a group; no pool, stride 1 or 2, no dilation; the pixels of x,
// residual and y side by side, or their channels where it is depthwise.
bool group_strips_fit(const ConvForward& args);
void group_strips_forward(const ConvForward& args, int num_threads);
// Up to 64 channels a group; no pool; the channels of x, residual and y side by side.
bool group_rows_fit(const ConvForward& args);
void group_rows_forward(const ConvForward& args, int num_threads);

// grad_z [B, Y', X', padded_channels(K)], or null: computed strip by strip, with grad_bias.
void direct_grad_weight(const ConvBackward& args, const float* grad_z, int num_threads);
void winograd_grad_weight(const ConvBackward& args, const float* grad_z, int num_threads);

// Strided, more than a few channels; depthwise only where dilated too. The weight is then packed
// phase by phase; grad_z [B, Y', X', K] as laid out, grad_x written.
bool phases_fit(int64_t C, int64_t K, int64_t groups, const ConvPacking& packing);
void phases_pack(const ConvWeight& weight, const ConvPacking& packing, float* packed,
                 int num_threads);
void phases_grad_x(const ConvBackward& args, const ConvMap<const float>& grad_z, int num_threads);

bool few_channels_fit(const ConvSizes& sizes);
void few_channels_grad_x(const ConvBackward& args, int num_threads);

}  // namespace mbm::MBM_ISA
