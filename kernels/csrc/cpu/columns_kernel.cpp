// Row operations on column-major bf16 logits, the layout of weight @ hidden.T. A vector holds one
// column's logits of neighbouring rows, so that each lane is one row.

#include "columns_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "row_math.h"
#include "rows.h"
#include "vector.h"

namespace {

// Columns of a run: their floats, for one vector of rows, stay in the first-level cache. Not
// measured.
constexpr std::int64_t kRun = 128;
// Rows of a task. A task's columns are a block with sums of its own; blocks are added up in order.
// Not measured.
constexpr std::int64_t kBand = 64;
// Columns by which the code prefetches: they are too far apart for the processor to foresee the
// next one. Not measured.
constexpr std::int64_t kAhead = 32;

const BFloat16* at(const AepoLogits& logits, std::int64_t column, std::int64_t row) {
  return static_cast<const BFloat16*>(logits.products) + column * logits.column_stride + row;
}

// The logits of one column for at most a vector of rows; 0 in the other lanes. GCC would not inline
// the function on its own, which costs a third of the time.
__attribute__((always_inline)) inline Floats logits_of(const AepoLogits& logits,
                                                       std::int64_t column, std::int64_t row,
                                                       std::int64_t count) {
  const BFloat16* from = at(logits, column, row);
  Floats value;
  if (count >= kLanes) {
    value = load(from);
  } else {
    BFloat16 padded[kLanes] = {};
    std::copy(from, from + count, padded);
    value = load(padded);
  }
  if (logits.bias != nullptr) value += logits.bias[column];
  return shaped(logits, value);
}

// The running statistics of each row of a band, [kBand], after some of its columns.
struct Band {
  float max[kBand], inverse[kBand], second_inverse[kBand];
  double weights[kBand] = {}, tempered[kBand] = {}, squares[kBand] = {}, second[kBand] = {};
  double logits[kBand] = {};  // their sums
  bool is_top1[kBand] = {};

  Band(const AepoLogits& logits, std::int64_t row) {
    for (std::int64_t i = 0; i < kBand; ++i) {
      const std::int64_t index = std::min(row + i, logits.rows - 1);
      max[i] = -INFINITY;
      inverse[i] = logits.inv_temperature[index];
      const float* second = logits.second_inv_temperature;
      second_inverse[i] = second == nullptr ? 1 : second[index];
    }
  }

  RowState at(std::int64_t i) const {
    RowState state;
    state.max = max[i];
    state.first = {weights[i], tempered[i], squares[i]};
    state.second.weights = second[i];
    state.logits = logits[i];
    state.is_top1 = is_top1[i];
    return state;
  }

  // Raises the maxima of a vector of rows where `largest` is larger, and rescales their sums.
  void raise(std::int64_t first, Floats largest) {
    bool grew = false;
    for (int lane = 0; lane < kLanes; ++lane) grew |= largest[lane] > max[first + lane];
    if (!grew) return;
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::int64_t i = first + lane;
      if (!(largest[lane] > max[i])) continue;
      RowState state = at(i);
      state.raise(largest[lane], inverse[i], second_inverse[i]);
      max[i] = state.max;
      weights[i] = state.first.weights;
      tempered[i] = state.first.tempered;
      squares[i] = state.first.squares;
      second[i] = state.second.weights;
    }
  }
};

void add(double* sums, Floats more) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += more[lane];
}

// Adds a run's logits, a vector for each column from `start` on. largest: of this run and before.
void add_logits(const AepoLogits& logits, const Floats* block, Floats largest, std::int64_t row,
                std::int64_t count, std::int64_t start, std::int64_t end, std::int64_t first,
                Band& band) {
  Floats sums{};
  for (std::int64_t i = 0; i < end - start; ++i) sums += block[i];
  add(band.logits + first, sums);
  for (std::int64_t lane = 0; lane < std::min<std::int64_t>(kLanes, count); ++lane) {
    if (!(largest[lane] > band.max[first + lane])) continue;
    const std::int64_t target = logits.targets[row + lane];
    std::int64_t i = start;  // becomes the place of the first of the largest
    while (i < end - 1 && block[i - start][lane] != largest[lane]) ++i;
    band.is_top1[first + lane] = i == target;
  }
}

// Adds columns `start` to `end` of the vector of rows from `row` on. first: the row within the
// band.
void add_run(const AepoLogits& logits, const AepoStats& stats, std::int64_t row, std::int64_t count,
             std::int64_t start, std::int64_t end, std::int64_t first, Band& band) {
  Floats block[kRun], largest = load(band.max + first);
  for (std::int64_t column = start; column < end; ++column) {
    __builtin_prefetch(at(logits, column + kAhead, row));
    const Floats value = logits_of(logits, column, row, count);
    block[column - start] = value;
    largest = largest < value ? value : largest;
  }
  const bool squares = stats.sum_squares != nullptr;
  if (stats.logit_sum != nullptr) {
    add_logits(logits, block, largest, row, count, start, end, first, band);
  }
  band.raise(first, largest);
  // While all logits are -inf, the base is finite, so that a NaN among them still gets into the
  // sums.
  const Floats base = larger(all(std::numeric_limits<float>::lowest()), largest);
  const Floats inverse = load(band.inverse + first);
  Floats weights{}, tempered{}, squared{};
  for (std::int64_t i = 0; i < end - start; ++i) {
    const Floats t = larger(block[i] - base, all(kFloor)) * inverse;
    const Floats w = exp_negative(t);
    weights += w;
    tempered += w * t;
    if (squares) squared += w * w;
  }
  add(band.weights + first, weights);
  add(band.tempered + first, tempered);
  if (squares) add(band.squares + first, squared);
  if (logits.second_inv_temperature == nullptr) return;
  const Floats second_inverse = load(band.second_inverse + first);
  Floats second{};
  for (std::int64_t i = 0; i < end - start; ++i) {
    second += exp_negative(larger(block[i] - base, all(kFloor)) * second_inverse);
  }
  add(band.second + first, second);
}

// The running statistics of one block of columns for a band of rows. numbers: the block's, [rows,
// kStateSize].
void stats_of_task(const AepoLogits& logits, const AepoStats& stats, std::int64_t block,
                   std::int64_t row, double* numbers) {
  Band band(logits, row);
  const std::int64_t stop = std::min(row + kBand, logits.rows);
  const std::int64_t last = std::min((block + 1) * kBlock, logits.vocab);
  for (std::int64_t start = block * kBlock; start < last; start += kRun) {
    const std::int64_t end = std::min(start + kRun, last);
    for (std::int64_t first = row; first < stop; first += kLanes) {
      add_run(logits, stats, first, stop - first, start, end, first - row, band);
    }
  }
  for (std::int64_t index = row; index < stop; ++index) {
    band.at(index - row).write(numbers + index * kStateSize);
  }
}

RowState merged(const AepoLogits& logits, std::int64_t index, RowState state, RowState more) {
  const float inverse = logits.inv_temperature[index];
  const bool has_second = logits.second_inv_temperature != nullptr;
  const float second_inverse = has_second ? logits.second_inv_temperature[index] : 1;
  state.logits += more.logits;
  if (more.max > state.max) state.is_top1 = more.is_top1;
  if (more.max > state.max) state.raise(more.max, inverse, second_inverse);
  if (state.max > more.max) more.raise(state.max, inverse, second_inverse);
  state.first.weights += more.first.weights;
  state.first.tempered += more.first.tempered;
  state.first.squares += more.first.squares;
  state.second.weights += more.second.weights;
  return state;
}

int row_stats(const AepoLogits& logits, const AepoStats& stats, const AepoState& known,
              const AepoKept& kept) {
  if (logits.dtype != kBFloat16 || logits.base != nullptr || kept.logits != nullptr) return 1;
  const bool is_whole = known.numbers == nullptr;
  const bool is_first = is_whole || known.is_first, is_last = is_whole || known.is_last;
  const std::int64_t blocks = (logits.vocab + kBlock - 1) / kBlock;
  const std::unique_ptr<double[]> parts(new double[blocks * logits.rows * kStateSize]);
#pragma omp parallel num_threads(logits.threads)
  {
#pragma omp for schedule(dynamic) collapse(2)
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::int64_t row = 0; row < logits.rows; row += kBand) {
        stats_of_task(logits, stats, block, row, &parts[block * logits.rows * kStateSize]);
      }
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < logits.rows; ++row) {
      double* numbers = is_whole ? nullptr : known.numbers + row * kStateSize;
      RowState state = is_first ? RowState{} : RowState::read(numbers);
      for (std::int64_t block = 0; block < blocks; ++block) {
        const double* part = &parts[(block * logits.rows + row) * kStateSize];
        state = merged(logits, row, state, RowState::read(part));
      }
      const std::int64_t target = std::max<std::int64_t>(logits.targets[row], 0);
      if (logits.targets[row] >= 0 || is_first) state.target = logits_of(logits, target, row, 1)[0];
      if (is_last) {
        finish_row(logits, stats, row, state);
      } else {
        state.write(numbers);
      }
    }
  }
  return 0;
}

// GradOfRow of a vector of rows: lane i belongs to row i.
struct GradOfRows {
  Floats max, inverse, second_inverse, constant, slope, second, at_target;
  Ints target;
};

GradOfRows prepare_rows(const AepoLogits& logits, const AepoStats& stats, const AepoCoefs& coefs,
                        std::int64_t row) {
  GradOfRows rows{};
  for (std::int64_t lane = 0; lane < kLanes; ++lane) {
    const GradOfRow grad = prepare(logits, stats, coefs, std::min(row + lane, logits.rows - 1));
    rows.max[lane] = grad.max;
    rows.inverse[lane] = grad.inverse;
    rows.second_inverse[lane] = grad.second_inverse;
    rows.constant[lane] = grad.constant;
    rows.slope[lane] = grad.slope;
    rows.second[lane] = grad.second;
    rows.at_target[lane] = grad.at_target;
    rows.target[lane] = std::int32_t(grad.target);
  }
  return rows;
}

__attribute__((always_inline)) inline Floats grad_of(const AepoLogits& logits,
                                                     const GradOfRows& rows, bool has_second,
                                                     Floats z, std::int64_t column) {
  const Floats centred = larger(z - rows.max, all(kFloor));
  const Floats t = centred * rows.inverse;
  Floats value = exp_negative(t) * (rows.constant + rows.slope * t);
  if (has_second) value += exp_negative(centred * rows.second_inverse) * rows.second;
  value = rows.target == std::int32_t(column) ? value + rows.at_target : value;
  if (logits.softcap != 0) {
    const Floats share = z / logits.softcap;
    value *= 1.0f - share * share;
  }
  return value;
}

// Columns of a tile. Two vectors of columns by one vector of rows are the smallest tile that
// consists of whole vectors in either layout.
constexpr std::int64_t kTile = 2 * kLanes;

// The gradient of a tile, [kTile columns, kLanes rows]. Adds each column's sum over the rows to
// `sums` [kTile], unless that is null.
void grad_of_tile(const AepoLogits& logits, const AepoGrad& grad, const GradOfRows& rows,
                  bool has_second, std::int64_t start, std::int64_t row, double* sums) {
  const std::int64_t columns = std::min<std::int64_t>(kTile, logits.vocab - start);
  const std::int64_t count = std::min<std::int64_t>(kLanes, logits.rows - row);
  Words pairs[kLanes];
  for (std::int64_t i = 0; i < kTile; ++i) {
    Words rounded{};
    if (i < columns) {
      const std::int64_t column = start + i;
      __builtin_prefetch(at(logits, column + kAhead, row));
      const Floats z = logits_of(logits, column, row, count);
      const Floats value = grad_of(logits, rows, has_second, z, column);
      rounded = rounded_bits(value);
      auto* out = static_cast<BFloat16*>(grad.out) + column * grad.column_stride + row;
      if (count == kLanes) {
        store_words(&out->bits, rounded);
      } else {
        BFloat16 padded[kLanes];
        store_words(&padded->bits, rounded);
        std::copy(padded, padded + count, out);
      }
      if (sums != nullptr) {
        for (std::int64_t lane = 0; lane < count; ++lane) sums[i] += value[lane];
      }
    }
    pairs[i / 2] = i % 2 == 0 ? rounded : pairs[i / 2] | rounded << 16;
  }
  if (grad.by_rows == nullptr) return;
  transpose(pairs);
  for (std::int64_t lane = 0; lane < count; ++lane) {
    auto* to = static_cast<BFloat16*>(grad.by_rows) + (row + lane) * grad.by_rows_stride + start;
    if (columns == kTile) {
      std::memcpy(to, &pairs[lane], sizeof(Words));
    } else {
      std::memcpy(to, &pairs[lane], columns * sizeof(BFloat16));
    }
  }
}

int row_grad(const AepoLogits& logits, const AepoStats& stats, const AepoCoefs& coefs,
             const AepoGrad& grad) {
  if (logits.dtype != kBFloat16 || grad.dtype != kBFloat16 || logits.base != nullptr) return 1;
  const std::int64_t groups = (logits.rows + kLanes - 1) / kLanes;
  const std::unique_ptr<GradOfRows[]> rows(new GradOfRows[groups]);
  for (std::int64_t group = 0; group < groups; ++group) {
    rows[group] = prepare_rows(logits, stats, coefs, group * kLanes);
  }
#pragma omp parallel for schedule(static) num_threads(logits.threads)
  for (std::int64_t start = 0; start < logits.vocab; start += kTile) {
    double sums[kTile] = {};
    for (std::int64_t group = 0; group < groups; ++group) {
      grad_of_tile(logits, grad, rows[group], coefs.second_logprob != nullptr, start,
                   group * kLanes, grad.bias_grad == nullptr ? nullptr : sums);
    }
    if (grad.bias_grad == nullptr) continue;
    const std::int64_t columns = std::min<std::int64_t>(kTile, logits.vocab - start);
    for (std::int64_t i = 0; i < columns; ++i) grad.bias_grad[start + i] += float(sums[i]);
  }
  return 0;
}

}  // namespace

const ColumnKernels AEPO_COLUMNS{row_stats, row_grad};
