// Row operations on a chunk of logits: the C interface, free of torch, that Python loads.
//
// `products` are the raw logits x, [rows, vocab]: the output of the head's first GEMM. Row-major
// raw logits have unit stride along the vocabulary. Column-major ones, in bf16 alone, have unit
// stride along the rows and a column stride other than 1. The logits are z = softcap * tanh(scale *
// (x + bias) / softcap), or scale * (x + bias) where softcap is 0. Per-row arguments are fp32
// [rows]. Optional arguments may be null.
#pragma once

#include <cstdint>

enum AepoDtype : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct AepoLogits {
  const void* products;
  std::int32_t dtype;
  std::int32_t threads;
  std::int64_t rows, vocab, row_stride, column_stride;
  const std::int64_t* targets;      // below 0: the row's target is not in this vocab
  const float* inv_temperature;     // per row
  const float* second_inv_temperature;
  const float* bias;                // [vocab]
  float softcap, scale;
  // base, [rows] or null: the products are z - base instead of raw logits, see AepoKept.
  // picked, [rows] or null: a row's products and its base are those at index picked[row].
  const float* base;
  const std::int64_t* picked;
};

// Statistics of each row, [rows]: log_sum = log sum_j exp((z_j - max) / T), and
// sum_squares = sum_j p_j^2. logit_sum = sum_j z_j and is_top1 come both or not at all. is_top1 is 1
// where the target is the first of the row's largest logits, and 0 elsewhere.
struct AepoStats {
  float *logprob, *entropy, *max_logit, *log_sum;
  float *second_logprob, *second_log_sum, *sum_squares;
  float *logit_sum, *is_top1;
};

// Running statistics of rows, [rows, kStateSize], for rows that come one slice of columns per call.
// Each slice has a `vocab` of its own. The first slice sets the numbers up, and the last slice
// gives the statistics. These have the bits of whole rows if every slice but the last is a multiple
// of 2048 columns.
struct AepoState {
  double* numbers;  // null: these are whole rows
  std::int32_t is_first, is_last;
};
constexpr int kStateSize = 8;

// Stashed logits, fp16 [rows, vocab]: z - base, until the gradient needs them. base, fp32 [rows],
// is a row's largest logit so far, so that fp16 rounds the largest logits least.
struct AepoKept {
  void* logits;  // null: no logits are stashed
  std::int64_t row_stride;
  float* base;
};

// Derivatives of the loss by each row's outputs, [rows] or null.
struct AepoCoefs {
  const float *logprob, *entropy, *lse, *second_logprob;
};

// The gradient by the raw logits, [rows, vocab], in the raw logits' layout. `out` may be the memory
// of the raw logits where both have one dtype.
struct AepoGrad {
  void* out;
  std::int32_t dtype;
  std::int64_t row_stride, column_stride;
  float* bias_grad;  // [vocab], added to
  void* by_rows;     // a row-major copy of a column-major gradient; may be null
  std::int64_t by_rows_stride;
};

// One draw from each row's softmax(z / T): the inverse of its cumulative distribution at `uniform`,
// [rows] in [0, 1).
struct AepoSample {
  const double* uniform;
  std::int64_t* token;
  float* logprob;
};

#define AEPO_EXPORT __attribute__((visibility("default")))

extern "C" {
// All functions return 0. They return 1 where a dtype is unknown, where column-major raw logits
// come with a base or a stash, or where the gradient has another layout than its raw logits. isa:
// see aepo_isa_name.
AEPO_EXPORT int aepo_row_stats(const AepoLogits* logits, const AepoStats* stats,
                               const AepoState* state, const AepoKept* kept, std::int32_t isa);
AEPO_EXPORT int aepo_row_grad(const AepoLogits* logits, const AepoStats* stats, const AepoCoefs* coefs,
                  const AepoGrad* grad, std::int32_t isa);
// Takes row-major raw logits and ignores the targets. A row of which all logits are -inf, or one is
// NaN, gives token -1.
AEPO_EXPORT int aepo_sample_rows(const AepoLogits* logits, const AepoSample* sample, std::int32_t isa);
// The name of an instruction set that is compiled in, by number; null beyond the last. Number 0
// runs everywhere: "neon" on 64-bit ARM, "portable" elsewhere.
AEPO_EXPORT const char* aepo_isa_name(std::int32_t isa);
// Whether this machine runs an instruction set.
AEPO_EXPORT int aepo_isa_runs(std::int32_t isa);
}
