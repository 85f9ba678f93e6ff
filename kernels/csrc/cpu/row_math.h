// The statistics of a row of logits and its gradient, whatever the logits' layout in memory.
// Everything has internal linkage: this is compiled once per target.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"
#include "vector.h"

namespace {

// Columns of a block: its weights are summed in float32, in 16 lanes or 16 runs, and the blocks'
// sums in float64. The bits of all statistics depend on it. Not measured.
constexpr std::int64_t kBlock = 2048;
// Replaces -inf: its exp is 0 as well, and 0 times it is 0, not NaN.
constexpr float kFloor = -1e30f;

// Logits from raw logits to which the bias is added already.
inline Floats shaped(const AepoLogits& logits, Floats value) {
  if (logits.softcap != 0) {
    return tanh_of(value * (logits.scale / logits.softcap)) * logits.softcap;
  }
  return logits.scale == 1.0f ? value : value * logits.scale;
}

// Sums over a row of w = exp((z - max) / T): of w, of w (z - max) / T and of w^2. They are rescaled
// when the maximum grows.
struct Sums {
  double weights = 0, tempered = 0, squares = 0;

  void rescale(double shift) {  // shift = (old maximum - new one) / T <= 0
    const double factor = std::exp(shift);
    tempered = factor * (tempered + shift * weights);
    weights *= factor;
    squares *= factor * factor;
  }
};

// A row's running statistics, after some of its columns. second: for the second temperature.
struct RowState {
  float max = -std::numeric_limits<float>::infinity(), target = 0;
  Sums first, second;
  double logits = 0;  // their sum
  bool is_top1 = false;

  void raise(float found, float inverse, float second_inverse) {  // to a larger maximum
    if (first.weights > 0) {
      const double shift = double(max) - double(found);
      first.rescale(shift * inverse);
      second.rescale(shift * second_inverse);
    }
    max = found;
  }

  static RowState read(const double* from) {
    RowState state;
    state.max = float(from[0]);
    state.target = float(from[1]);
    state.first = {from[2], from[3], from[4]};
    state.second.weights = from[5];
    state.logits = from[6];
    state.is_top1 = from[7] != 0;
    return state;
  }

  void write(double* to) const {
    const double numbers[kStateSize] = {max,           target,         first.weights,
                                        first.tempered, first.squares, second.weights,
                                        logits,        double(is_top1)};
    std::copy(numbers, numbers + kStateSize, to);
  }
};

inline void finish_row(const AepoLogits& logits, const AepoStats& stats, std::int64_t index,
                       const RowState& state) {
  const double log_sum = std::log(state.first.weights);
  const float inverse = logits.inv_temperature[index], target = state.target - state.max;
  stats.max_logit[index] = state.max;
  stats.log_sum[index] = float(log_sum);
  stats.logprob[index] = float(double(target * inverse) - log_sum);
  stats.entropy[index] = float(log_sum - state.first.tempered / state.first.weights);
  if (stats.sum_squares != nullptr) {
    const double weights = state.first.weights;
    stats.sum_squares[index] = float(state.first.squares / (weights * weights));
  }
  if (stats.logit_sum != nullptr) {
    stats.logit_sum[index] = float(state.logits);
    stats.is_top1[index] = state.is_top1;
  }
  if (logits.second_inv_temperature != nullptr) {
    const double second_log_sum = std::log(state.second.weights);
    stats.second_log_sum[index] = float(second_log_sum);
    const float tempered = target * logits.second_inv_temperature[index];
    stats.second_logprob[index] = float(double(tempered) - second_log_sum);
  }
}

// dz_j = ((c_lp (1{j=y} - p_j) + c_lse p_j - c_H p_j (log p_j + H)) / T + c_2 (1{j=y} - q_j) / T2.
// With t = (z - max) / T, w = exp(t) and v = exp((z - max) / T2), this is
// w_j (constant + slope t_j) + v_j second, plus at_target for j = y.
struct GradOfRow {
  float max, inverse, second_inverse, constant, slope, second, at_target;
  std::int64_t target;
};

inline GradOfRow prepare(const AepoLogits& logits, const AepoStats& stats, const AepoCoefs& coefs,
                         std::int64_t index) {
  const auto at = [index](const float* values) { return values == nullptr ? 0.0f : values[index]; };
  const float inverse = logits.inv_temperature[index];
  const float log_sum = stats.log_sum[index], by_entropy = at(coefs.entropy);
  const float factor = std::exp(-log_sum) * inverse * logits.scale;
  float constant = at(coefs.lse) - at(coefs.logprob);
  if (coefs.entropy != nullptr) constant += by_entropy * (log_sum - stats.entropy[index]);
  GradOfRow grad{};
  grad.max = stats.max_logit[index];
  grad.inverse = inverse;
  grad.constant = constant * factor;
  grad.slope = -by_entropy * factor;
  grad.at_target = at(coefs.logprob) * inverse * logits.scale;
  grad.target = logits.targets[index];
  if (coefs.second_logprob != nullptr) {
    grad.second_inverse = logits.second_inv_temperature[index];
    const float by_second = coefs.second_logprob[index] * grad.second_inverse * logits.scale;
    grad.second = -by_second * std::exp(-stats.second_log_sum[index]);
    grad.at_target += by_second;
  }
  return grad;
}

}  // namespace
