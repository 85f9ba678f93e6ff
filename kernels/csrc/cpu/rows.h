// Row operations on a chunk of logits: the C interface, free of torch, that Python loads.
//
// "Products" are the raw output of the head's first GEMM, [rows, vocab]: by rows, with unit stride
// along the vocabulary, or in bf16 by columns, with unit stride along the rows and a column stride
// other than 1. z = softcap * tanh(scale * (x + bias) / softcap), or scale * (x + bias) with
// softcap 0. Per-row arguments are fp32 [rows]; optional ones may be null.
#pragma once

#include <cstdint>

enum AepoDtype : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct AepoLogits {
  const void* products;
  std::int32_t dtype;
  std::int32_t threads;
  std::int64_t rows, vocab, row_stride, column_stride;
  const std::int64_t* targets;      // below 0: no logit of this row's target is here
  const float* inv_temperature;     // per row
  const float* second_inv_temperature;
  const float* bias;                // [vocab]
  float softcap, scale;
  // Where not null, the products are z - base, see AepoKept; and where `picked` is not, those of a
  // row, and its base, are in row picked[row].
  const float* base;
  const std::int64_t* picked;
};

// log_sum = log sum_j exp((z_j - max) / T); sum_squares = sum_j p_j^2.
struct AepoStats {
  float *logprob, *entropy, *max_logit, *log_sum;
  float *second_logprob, *second_log_sum, *sum_squares;
};

// For rows that come a slice of their columns after the other, whatever `vocab` each has: what is
// known of them so far, [rows, kStateSize]. The first slice sets it up, the last one gives the stats,
// which are those of whole rows to the bit if all others are a multiple of 2048 columns.
struct AepoState {
  double* numbers;  // null: these are whole rows
  std::int32_t is_first, is_last;
};
constexpr int kStateSize = 6;

// Where logits wait for their gradient as fp16, [rows, vocab]: z - base, of which the largest are
// exact since base, fp32 [rows], is the largest logit of a row so far.
struct AepoKept {
  void* logits;  // null: they are not kept
  std::int64_t row_stride;
  float* base;
};

// Derivatives of the loss by each row's outputs.
struct AepoCoefs {
  const float *logprob, *entropy, *lse, *second_logprob;
};

// The gradient by the products, [rows, vocab], in their layout; `out` may be `products` in the same
// dtype.
struct AepoGrad {
  void* out;
  std::int32_t dtype;
  std::int64_t row_stride, column_stride;
  float* bias_grad;  // [vocab], added to
  void* by_rows;     // of products by columns: the gradient once more, by rows; may be null
  std::int64_t by_rows_stride;
};

// One draw of each row's softmax(z / T), by inverting its distribution at `uniform` in [0, 1).
struct AepoSample {
  const double* uniform;
  std::int64_t* token;
  float* logprob;
};

#define AEPO_EXPORT __attribute__((visibility("default")))

extern "C" {
// All return 0, or 1 where a dtype is unknown, products by columns have or want a base, or a gradient
// does not lie as its products do.
// isa: see aepo_isa_name.
AEPO_EXPORT int aepo_row_stats(const AepoLogits* logits, const AepoStats* stats,
                               const AepoState* state, const AepoKept* kept, std::int32_t isa);
AEPO_EXPORT int aepo_row_grad(const AepoLogits* logits, const AepoStats* stats, const AepoCoefs* coefs,
                  const AepoGrad* grad, std::int32_t isa);
// Of products by rows; ignores the targets. A row whose logits are all -inf, or NaN, gives token -1.
AEPO_EXPORT int aepo_sample_rows(const AepoLogits* logits, const AepoSample* sample, std::int32_t isa);
// The instruction sets compiled in, by number; null beyond the last. 0 runs everywhere: "neon" on
// ARM in 64 bits, "portable" elsewhere.
AEPO_EXPORT const char* aepo_isa_name(std::int32_t isa);
// Whether this machine runs an instruction set.
AEPO_EXPORT int aepo_isa_runs(std::int32_t isa);
}
