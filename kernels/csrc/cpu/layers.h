// What a transformer's layers do between their GEMMs: the C interface, free of torch.
//
// Arrays have unit stride along their last dimension. Strides are in elements. The functions
// compute in fp32, round once, and give the same bits at any number of threads.
#pragma once

#include <cstdint>

#include "rows.h"

// out = weight * x / sqrt(mean(x^2) + eps), row by row: [rows, columns].
struct AepoNorm {
  const void *x, *weight;  // weight: [columns], of dtype weight_dtype
  void* out;               // the gradient functions read the gradient by `out` here
  float* rstd;             // 1 / sqrt(...): [rows]
  void* x_grad;            // of x's dtype
  float* weight_grad;      // [columns]; may be null
  std::int32_t dtype, weight_dtype, out_dtype, threads;
  std::int64_t rows, columns;
  float eps;
};

// out = gate * sigmoid(gate) * up, [count] each, all of one dtype.
struct AepoSwiglu {
  const void *gate, *up;
  void* out;  // the gradient function reads the gradient by `out` here
  void *gate_grad, *up_grad;
  std::int32_t dtype, threads;
  std::int64_t count;
};

// Rotates the two halves of x's last dimension: out = x * cos + (-x_2, x_1) * sin. transpose: apply
// the transposed map, which gives the gradient. x, out: [batch, heads, length, width]. cos, sin:
// [batch, length, width].
struct AepoRotary {
  const void *x, *cos, *sin;
  void* out;
  std::int32_t dtype, angle_dtype, threads, transpose;
  std::int64_t batch, heads, length, width;
  std::int64_t x_strides[3], out_strides[3], angle_strides[2];
};

// Attention of one query per row and head: softmax(scale * q k^T + mask) v. Each of the `shared`
// heads of keys and values serves heads / shared neighbouring queries. q, out: [batch, heads,
// width]. k, v: [batch, shared, keys, width]. mask: [batch, keys], added to the scores, may be
// null.
struct AepoDecode {
  const void *q, *k, *v, *mask;
  void* out;
  std::int32_t dtype, mask_dtype, threads;
  float scale;
  std::int64_t batch, heads, shared, keys, width;
  std::int64_t q_strides[2], k_strides[3], v_strides[3], out_strides[2], mask_stride;
};

extern "C" {
// All functions return 0, or 1 where a dtype is unknown. isa: see aepo_isa_name.
AEPO_EXPORT int aepo_rms_norm(const AepoNorm* norm, std::int32_t isa);
AEPO_EXPORT int aepo_rms_norm_grad(const AepoNorm* norm, std::int32_t isa);
AEPO_EXPORT int aepo_swiglu(const AepoSwiglu* swiglu, std::int32_t isa);
AEPO_EXPORT int aepo_swiglu_grad(const AepoSwiglu* swiglu, std::int32_t isa);
AEPO_EXPORT int aepo_rotary(const AepoRotary* rotary, std::int32_t isa);
AEPO_EXPORT int aepo_decode(const AepoDecode* decode, std::int32_t isa);
}
