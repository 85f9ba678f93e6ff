// Row operations on row-major logits. This file is compiled once per instruction set, and
// AEPO_KERNELS names the result.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "elements.h"
#include "row_math.h"
#include "rows.h"
#include "rows_kernel.h"
#include "vector.h"

namespace {

template <typename Value>
struct Row {
  const Value* products;
  const AepoLogits& logits;
  float base;  // of stashed logits, z - base; 0 for raw logits

  // A vector of logits from a column on; lanes beyond the vocabulary are -inf.
  Floats at(std::int64_t column) const {
    if (column + kLanes <= logits.vocab) return map(load(products + column), column);
    if (kParts > 1 && column >= logits.vocab) return all(-INFINITY);
    Value padded[kLanes] = {};
    const std::int64_t count = logits.vocab - column;
    std::copy(products + column, products + logits.vocab, padded);
    Floats value = map(load(padded), column, count);
    for (std::int64_t lane = count; lane < kLanes; ++lane) value[lane] = -INFINITY;
    return value;
  }

  float one(std::int64_t column) const { return at(column)[0]; }

  Floats map(Floats value, std::int64_t column, std::int64_t count = kLanes) const {
    if (logits.base != nullptr) return value + base;
    if (logits.bias != nullptr) {
      if (count == kLanes) {
        value += load(logits.bias + column);
      } else {
        for (std::int64_t lane = 0; lane < count; ++lane) value[lane] += logits.bias[column + lane];
      }
    }
    return shaped(logits, value);
  }
};

template <typename Value>
Row<Value> row_at(const AepoLogits& logits, std::int64_t index) {
  const auto* products = static_cast<const Value*>(logits.products);
  if (logits.base == nullptr) return {products + index * logits.row_stride, logits, 0};
  const std::int64_t source = logits.picked == nullptr ? index : logits.picked[index];
  return {products + source * logits.row_stride, logits, logits.base[source]};
}

Sums block_sums(const Floats* block, std::int64_t count, float max, float inverse, bool squares) {
  Floats weights[kParts] = {}, tempered[kParts] = {}, squared[kParts] = {};
  for (std::int64_t i = 0; i < count; i += kParts) {
    for (int part = 0; part < kParts; ++part) {
      const Floats t = larger(block[i + part] - max, all(kFloor)) * inverse;
      const Floats w = exp_negative(t);
      weights[part] += w;
      tempered[part] += w * t;
      if (squares) squared[part] += w * w;
    }
  }
  return {sum(weights), sum(tempered), sum(squared)};
}

// The sum of a block's first `count` logits.
double logit_sum(const Floats* block, std::int64_t count) {
  Floats sums[kParts] = {};
  const std::int64_t whole = count / kLanes;
  for (std::int64_t i = 0; i < whole; ++i) sums[i % kParts] += block[i];
  for (std::int64_t lane = 0; lane < count % kLanes; ++lane) {
    sums[whole % kParts][lane] += block[whole][lane];
  }
  return sum(sums);
}

// Whether a block's logit at `place` is the first one of this size.
bool is_first_of(const Floats* block, std::int64_t place, float size) {
  const auto at = [block](std::int64_t i) { return block[i / kLanes][i % kLanes]; };
  std::int64_t first = 0;
  while (first < place && at(first) != size) ++first;
  return first == place && at(place) == size;
}

template <typename Value>
void add_columns(const AepoLogits& logits, const AepoStats& stats, std::int64_t index,
                 bool is_first, RowState& state) {
  const Row<Value> row = row_at<Value>(logits, index);
  const float inverse = logits.inv_temperature[index];
  const bool has_second = logits.second_inv_temperature != nullptr;
  const float second_inverse = has_second ? logits.second_inv_temperature[index] : 0;
  // These are copies. Through the reference, each block would write the sums to memory.
  float max = state.max;
  Sums first = state.first, second = state.second;
  Floats block[kBlock / kLanes];
  for (std::int64_t start = 0; start < logits.vocab; start += kBlock) {
    const std::int64_t end = std::min(start + kBlock, logits.vocab);
    std::int64_t count = 0;
    Floats largest = all(-INFINITY);
    for (std::int64_t column = start; column < end; column += kWide) {
      for (int part = 0; part < kParts; ++part, ++count) {
        block[count] = row.at(column + part * kLanes);
        largest = larger(block[count], largest);
      }
    }
    const float found = maximum(largest);
    if (stats.logit_sum != nullptr) {
      const std::int64_t place = logits.targets[index] - start;
      const bool is_here = place >= 0 && place < end - start;
      state.logits += logit_sum(block, end - start);
      if (found > max) state.is_top1 = is_here && is_first_of(block, place, found);
    }
    if (found > max) {
      if (first.weights > 0) {
        const double shift = double(max) - double(found);
        first.rescale(shift * inverse);
        second.rescale(shift * second_inverse);
      }
      max = found;
    }
    // While all logits are -inf, the base is finite, so that a NaN among them still gets into the
    // sums.
    const float base = std::max(max, std::numeric_limits<float>::lowest());
    const Sums more = block_sums(block, count, base, inverse, stats.sum_squares != nullptr);
    first.weights += more.weights;
    first.tempered += more.tempered;
    first.squares += more.squares;
    if (has_second) second.weights += block_sums(block, count, base, second_inverse, false).weights;
  }
  const std::int64_t target = logits.targets[index];
  if (target >= 0 || is_first) state.target = row.one(std::max<std::int64_t>(target, 0));
  state.max = max;
  state.first = first;
  state.second = second;
}

// Stashes a row's logits, which the statistics have just brought into the cache.
template <typename Value>
void keep_row(const AepoLogits& logits, const AepoKept& kept, std::int64_t index, float max) {
  const Row<Value> row = row_at<Value>(logits, index);
  auto* to = static_cast<Float16*>(kept.logits) + index * kept.row_stride;
  const float base = std::max(max, std::numeric_limits<float>::lowest());  // all may be -inf
  kept.base[index] = base;
  for (std::int64_t column = 0; column < logits.vocab; column += kLanes) {
    store_some(to + column, row.at(column) - base, logits.vocab - column);
  }
}

template <typename Value>
void stats_of_row(const AepoLogits& logits, const AepoStats& stats, const AepoState& known,
                  const AepoKept& kept, std::int64_t index) {
  const bool is_whole = known.numbers == nullptr;
  const bool is_first = is_whole || known.is_first, is_last = is_whole || known.is_last;
  double* numbers = is_whole ? nullptr : known.numbers + index * kStateSize;
  RowState state = is_first ? RowState{} : RowState::read(numbers);
  add_columns<Value>(logits, stats, index, is_first, state);
  if (kept.logits != nullptr) keep_row<Value>(logits, kept, index, state.max);
  if (is_last) {
    finish_row(logits, stats, index, state);
  } else {
    state.write(numbers);
  }
}

template <typename Value, typename Out>
void grad_of_part(const AepoLogits& logits, const GradOfRow& row_grad, const AepoGrad& grad,
                  std::int64_t index, std::int64_t start, std::int64_t end, double* sums) {
  const Row<Value> row = row_at<Value>(logits, index);
  auto* out = static_cast<Out*>(grad.out) + index * grad.row_stride;
  for (std::int64_t column = start; column < end; column += kLanes) {
    const Floats z = row.at(column);
    const Floats centred = larger(z - row_grad.max, all(kFloor));
    const Floats t = centred * row_grad.inverse;
    Floats value = exp_negative(t) * (row_grad.constant + row_grad.slope * t);
    if (row_grad.second != 0) {
      value += exp_negative(centred * row_grad.second_inverse) * row_grad.second;
    }
    const std::int64_t lane = row_grad.target - column;
    if (lane >= 0 && lane < kLanes) value[lane] += row_grad.at_target;
    if (logits.softcap != 0) {
      const Floats share = z / logits.softcap;
      value *= 1.0f - share * share;
    }
    const std::int64_t count = std::min<std::int64_t>(kLanes, logits.vocab - column);
    store_some(out + column, value, count);
    if (sums != nullptr) {
      for (std::int64_t i = 0; i < count; ++i) sums[column - start + i] += value[i];
    }
  }
}

template <typename Value>
void sample_row(const AepoLogits& logits, const AepoSample& sample, std::int64_t index) {
  const Row<Value> row = row_at<Value>(logits, index);
  const float inverse = logits.inv_temperature[index];
  Floats largest = all(-INFINITY);
  for (std::int64_t column = 0; column < logits.vocab; column += kLanes) {
    largest = larger(row.at(column), largest);
  }
  const float max = maximum(largest);
  sample.token[index] = -1;
  sample.logprob[index] = -INFINITY;
  if (max == -INFINITY) return;
  const auto weights_at = [&](std::int64_t column) {
    return exp_negative(larger(row.at(column) - max, all(kFloor)) * inverse);
  };
  // Not std::vector: the linker would share its functions with other instruction sets' objects.
  const std::int64_t count = (logits.vocab + kBlock - 1) / kBlock;
  const std::unique_ptr<double[]> blocks(new double[count]);
  double total = 0;
  for (std::int64_t start = 0; start < logits.vocab; start += kBlock) {
    Floats weights[kParts] = {};
    const std::int64_t end = std::min(start + kBlock, logits.vocab);
    for (std::int64_t column = start; column < end; column += kWide) {
      for (int part = 0; part < kParts; ++part) weights[part] += weights_at(column + part * kLanes);
    }
    blocks[start / kBlock] = sum(weights);
    total += blocks[start / kBlock];
  }
  // Rounding may leave the point at or beyond the end of a block's mass. Then the block's last
  // token with mass is drawn.
  const double point = sample.uniform[index] * total;
  double before = 0;
  std::int64_t block = 0, last = count - 1;
  while (last > 0 && blocks[last] == 0) --last;
  while (block < last && before + blocks[block] <= point) before += blocks[block++];
  const std::int64_t start = block * kBlock;
  const std::int64_t end = std::min(start + kBlock, logits.vocab);
  for (std::int64_t column = start; column < end && before <= point; column += kLanes) {
    const Floats weights = weights_at(column);
    for (std::int64_t lane = 0; lane < kLanes && before <= point; ++lane) {
      if (weights[lane] == 0) continue;
      before += weights[lane];
      sample.token[index] = column + lane;
    }
  }
  if (sample.token[index] < 0) return;  // NaN among the logits
  const float z = row.one(sample.token[index]);
  sample.logprob[index] = float(double((z - max) * inverse) - std::log(total));
}

template <typename Value>
void all_samples(const AepoLogits& logits, const AepoSample& sample) {
#pragma omp parallel for schedule(static) num_threads(logits.threads)
  for (std::int64_t index = 0; index < logits.rows; ++index) {
    sample_row<Value>(logits, sample, index);
  }
}

template <typename Value>
void all_stats(const AepoLogits& logits, const AepoStats& stats, const AepoState& state,
               const AepoKept& kept) {
#pragma omp parallel for schedule(static) num_threads(logits.threads)
  for (std::int64_t index = 0; index < logits.rows; ++index) {
    stats_of_row<Value>(logits, stats, state, kept, index);
  }
}

template <typename Value, typename Out>
void all_grads(const AepoLogits& logits, const AepoStats& stats, const AepoCoefs& coefs,
               const AepoGrad& grad) {
  if (grad.bias_grad == nullptr) {
#pragma omp parallel for schedule(static) num_threads(logits.threads)
    for (std::int64_t index = 0; index < logits.rows; ++index) {
      const GradOfRow row_grad = prepare(logits, stats, coefs, index);
      grad_of_part<Value, Out>(logits, row_grad, grad, index, 0, logits.vocab, nullptr);
    }
    return;
  }
  // Threads share the columns, so that each bias sums its rows in order at any number of threads.
#pragma omp parallel for schedule(static) num_threads(logits.threads)
  for (std::int64_t start = 0; start < logits.vocab; start += kBlock) {
    const std::int64_t end = std::min(start + kBlock, logits.vocab);
    double sums[kBlock] = {};
    for (std::int64_t index = 0; index < logits.rows; ++index) {
      const GradOfRow row_grad = prepare(logits, stats, coefs, index);
      grad_of_part<Value, Out>(logits, row_grad, grad, index, start, end, sums);
    }
    for (std::int64_t i = 0; i < end - start; ++i) grad.bias_grad[start + i] += float(sums[i]);
  }
}

template <typename Value>
int grads_from(const AepoLogits& logits, const AepoStats& stats, const AepoCoefs& coefs,
               const AepoGrad& grad) {
  switch (grad.dtype) {
    case kFloat32: all_grads<Value, float>(logits, stats, coefs, grad); return 0;
    case kBFloat16: all_grads<Value, BFloat16>(logits, stats, coefs, grad); return 0;
    case kFloat16: all_grads<Value, Float16>(logits, stats, coefs, grad); return 0;
    default: return 1;
  }
}

int row_stats(const AepoLogits& logits, const AepoStats& stats, const AepoState& state,
              const AepoKept& kept) {
  switch (logits.dtype) {
    case kFloat32: all_stats<float>(logits, stats, state, kept); return 0;
    case kBFloat16: all_stats<BFloat16>(logits, stats, state, kept); return 0;
    case kFloat16: all_stats<Float16>(logits, stats, state, kept); return 0;
    default: return 1;
  }
}

int row_grad(const AepoLogits& logits, const AepoStats& stats, const AepoCoefs& coefs,
             const AepoGrad& grad) {
  switch (logits.dtype) {
    case kFloat32: return grads_from<float>(logits, stats, coefs, grad);
    case kBFloat16: return grads_from<BFloat16>(logits, stats, coefs, grad);
    case kFloat16: return grads_from<Float16>(logits, stats, coefs, grad);
    default: return 1;
  }
}

int sample_rows(const AepoLogits& logits, const AepoSample& sample) {
  switch (logits.dtype) {
    case kFloat32: all_samples<float>(logits, sample); return 0;
    case kBFloat16: all_samples<BFloat16>(logits, sample); return 0;
    case kFloat16: all_samples<Float16>(logits, sample); return 0;
    default: return 1;
  }
}

}  // namespace

const RowKernels AEPO_KERNELS{row_stats, row_grad, sample_rows};
