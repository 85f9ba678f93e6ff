// The row kernels through their C interface, on each instruction set, against rows_truth.h.
//
// Every buffer has exactly the size the interface asks for, so that AddressSanitizer sees a stray
// access; rows are an odd number of elements apart and start where no vector would, with NaN
// between them.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>

#include "../cpu/rows.h"
#include "../cpu/vector.h"
#include "buffer.h"
#include "rows_truth.h"

namespace {

int failures = 0;
double worst = 0;  // error before the last rounding, as a share of its bound

void expect(bool ok, const std::string& what, double value) {
  if (ok) return;
  if (++failures < 20) std::printf("%s: failed at %.9g\n", what.c_str(), value);
}

template <typename Name>
void near(float found, Bounded truth, double rounding, Name name) {
  if (found == truth.value) return;  // infinities, too
  const double bound = kSecondOrder * truth.off + rounding;
  const double error = std::fabs(found - truth.value);
  if (found != 0) worst = std::fmax(worst, (error - rounding) / truth.off);
  if (!(error <= bound)) expect(false, name(), found);
}

// squares: ask for the sum of squared probabilities, and for the logits' own statistics.
struct Options {
  const char* name;
  bool bias = false, second = false, squares = false, only_logprob = false, bias_grad = false;
  float softcap = 0, scale = 1;
  bool in_place = false, by_columns = false;
};

constexpr AepoKept kNowhere{};
constexpr int kStats = 9;         // of AepoStats
constexpr std::int64_t kKinds = 6;  // of rows
constexpr std::int64_t kSizes[] = {1, 7, 15, 16, 17, 31, 2047, 2048, 2049, 5003};
constexpr float kInverse[kKinds] = {1, 0.5f, 1 / 0.7f, 2, 1, 0.7f};
constexpr float kSecondInverse[kKinds] = {0.8f, 1, 1.25f, 0.5f, 3, 1};

// A row each of ordinary, equal, large and very negative logits, some of them -inf or the least
// number of their dtype.
std::vector<float> products_of(std::int64_t rows, std::int64_t vocab, std::int32_t dtype) {
  std::mt19937 random(unsigned(vocab) * 3 + dtype);
  std::normal_distribution<float> normal;
  const float least = dtype == kFloat16 ? -65504.0f : dtype == kFloat32 ? -0x1.fffffep127f
                                                                        : -0x1.fep127f;
  std::vector<float> products;
  for (std::int64_t index = 0; index < rows; ++index) {
    const std::int64_t kept = random() % vocab, row = index % kKinds;
    for (std::int64_t column = 0; column < vocab; ++column) {
      const float x = normal(random);
      const bool hidden = row >= 4 && column != kept && (column < 2100 || x < 0);
      const float values[kKinds] = {4 * x, 0.75f, 1e4f * x, 8 * x - 2e4f, 4 * x, 4 * x};
      products.push_back(!hidden ? values[row] : row == 4 ? -INFINITY : least);
    }
  }
  return products;
}

// What one call of both operations needs and gives, for one number of threads.
struct Run {
  std::vector<float> stats[kStats];
  Buffer out, by_rows;
  std::vector<float> bias_grad;
};

// The layout of a matrix: rows an odd number of elements apart, after one element of no row.
struct Strides {
  std::int64_t row, column;

  std::int64_t at(std::int64_t index, std::int64_t place) const {
    return 1 + index * row + place * column;
  }
};

Strides strides_of(const Options& options, std::int64_t rows, std::int64_t vocab,
                   std::int64_t apart) {
  if (options.by_columns) return {1, rows + 4 - rows % 2 - 1 + apart};
  return {vocab + 4 - vocab % 2 - 1 + apart, 1};
}

struct Case {
  Options options;
  std::int64_t vocab;
  std::int32_t in, out;
  std::int64_t rows;
  Strides strides, out_strides;
  std::vector<float> values;  // rows * vocab
  Buffer products;
  std::vector<std::int64_t> targets;
  std::vector<float> inverse, second_inverse, bias, coefs[4];
  AepoLogits logits{};
  AepoCoefs given{};

  Case(const Options& options, std::int64_t vocab, std::int32_t in, std::int32_t out)
      : options(options), vocab(vocab), in(in), out(out), rows(options.by_columns ? 19 : kKinds),
        strides(strides_of(options, rows, vocab, 0)),
        out_strides(strides_of(options, rows, vocab, options.in_place ? 0 : 2)),
        values(products_of(rows, vocab, in)), products(in, strides.at(rows - 1, vocab - 1) + 1) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < vocab; ++column) {
        products.set(strides.at(row, column), values[row * vocab + column]);
        values[row * vocab + column] = products.get(strides.at(row, column));  // as rounded
      }
      const std::int64_t first = first_largest(row), other = (row * 7919 + 6) % vocab;
      targets.push_back(row == 3 ? -1 : row == 1 || row % kKinds == 5 ? first : other);
      inverse.push_back(kInverse[row % kKinds]);
      second_inverse.push_back(kSecondInverse[row % kKinds]);
      for (auto& coef : coefs) coef.push_back(normal(random));
    }
    for (std::int64_t column = 0; column < vocab; ++column) bias.push_back(normal(random));
    logits = {products.at(1), in, 1, rows, vocab, strides.row, strides.column, targets.data(),
              inverse.data(),
              options.second ? second_inverse.data() : nullptr,
              options.bias ? bias.data() : nullptr, options.softcap, options.scale, nullptr, nullptr};
    given.logprob = coefs[0].data();
    if (options.only_logprob) return;
    given.entropy = coefs[1].data();
    given.lse = coefs[2].data();
    if (options.second) given.second_logprob = coefs[3].data();
  }

  std::int64_t first_largest(std::int64_t row) const {
    const float* from = values.data() + row * vocab;
    return std::max_element(from, from + vocab) - from;
  }

  AepoStats stats_into(Run& run) {
    auto* stat = run.stats;
    for (int number = 0; number < kStats; ++number) stat[number].assign(rows, NAN);
    return {stat[0].data(), stat[1].data(), stat[2].data(), stat[3].data(),
            options.second ? stat[4].data() : nullptr, options.second ? stat[5].data() : nullptr,
            options.squares ? stat[6].data() : nullptr, options.squares ? stat[7].data() : nullptr,
            options.squares ? stat[8].data() : nullptr};
  }

  // The statistics alone, from the same logits a slice of columns after the other.
  Run run_sliced(std::int32_t isa, std::int64_t slice) {
    Run run{{}, Buffer(out, 0), Buffer(out, 0), {}};
    const AepoStats stats = stats_into(run);
    std::vector<double> numbers(rows * kStateSize, NAN);
    for (std::int64_t start = 0; start < vocab; start += slice) {
      AepoLogits call = logits;
      call.products = products.at(strides.at(0, start));
      call.vocab = std::min(slice, vocab - start);
      std::vector<std::int64_t> inside;
      for (const std::int64_t target : targets) {
        inside.push_back(target >= start && target < start + call.vocab ? target - start : -1);
      }
      call.targets = inside.data();
      if (options.bias) call.bias = bias.data() + start;
      const AepoState state{numbers.data(), start == 0, start + slice >= vocab};
      expect(aepo_row_stats(&call, &stats, &state, &kNowhere, isa) == 0, "row_stats", isa);
    }
    return run;
  }

  Run run(std::int32_t isa, std::int32_t threads) {
    Run run{{}, Buffer(out, out_strides.at(rows - 1, vocab - 1) + 1),
            Buffer(out, options.by_columns ? rows * (vocab + 3) : 0), {}};
    Buffer kept = products;
    AepoLogits call = logits;
    call.threads = threads;
    const AepoStats stats = stats_into(run);
    if (options.bias_grad) run.bias_grad.assign(vocab, 0.5f);
    AepoGrad grad{run.out.at(1), out, out_strides.row, out_strides.column,
                  options.bias_grad ? run.bias_grad.data() : nullptr,
                  options.by_columns ? run.by_rows.at(0) : nullptr, vocab + 3};
    if (options.in_place) {
      call.products = kept.at(1);
      grad.out = kept.at(1);
    }
    const AepoState whole{};
    expect(aepo_row_stats(&call, &stats, &whole, &kNowhere, isa) == 0, "row_stats", isa);
    expect(aepo_row_grad(&call, &stats, &given, &grad, isa) == 0, "row_grad", isa);
    if (options.in_place) run.out = std::move(kept);
    return run;
  }

  // Stashed logits change no statistic, and give the gradient of the rounded logits.
  void check_kept(Run& whole, std::int32_t isa, const std::string& name) {
    const std::int64_t stride = vocab + 3;
    Run run{{}, Buffer(kFloat32, rows * vocab), Buffer(kFloat32, 0), {}};
    Buffer halves(kFloat16, rows * stride), rounded(kFloat32, rows * vocab), right = run.out;
    std::vector<float> bases(rows, NAN);
    const AepoStats stats = stats_into(run);
    const AepoState state{};
    const AepoKept kept{halves.at(0), stride, bases.data()};
    expect(aepo_row_stats(&logits, &stats, &state, &kept, isa) == 0, name, isa);
    for (int i = 0; i < kStats; ++i) expect(same(whole.stats[i], run.stats[i]), name + ": stats", i);
    for (std::int64_t row = 0; row < rows; ++row) {
      expect(bases[row] == stats.max_logit[row], name + ": base", bases[row]);
      bool has_largest = false;
      for (std::int64_t column = 0; column < stride; ++column) {
        const float half = halves.get(row * stride + column);
        if (column >= vocab) {
          expect(std::isnan(half), name + ": a gap", half);
          continue;
        }
        has_largest |= half == 0;
        rounded.set(row * vocab + column, half + bases[row]);
        if (options.softcap != 0 || options.bias || options.scale != 1) continue;
        const float z = values[row * vocab + column] - bases[row];
        const float right_half = z < -65519 ? -INFINITY : z;
        const double off = std::fmax(0x1p-11 * std::fabs(z), 0x1p-25);
        expect(half == right_half || std::fabs(half - z) <= off, name + ": half", half);
      }
      expect(has_largest, name + ": the largest is exact", double(row));
    }
    if (options.softcap != 0 || options.scale != 1) return;  // their slope is not that of 1
    AepoLogits waited = logits, plain = logits;
    waited.products = halves.at(0);
    waited.dtype = kFloat16;
    waited.row_stride = stride;
    waited.base = bases.data();
    plain.products = rounded.at(0);
    plain.dtype = kFloat32;
    plain.row_stride = vocab;
    plain.bias = nullptr;
    AepoGrad grad{run.out.at(0), kFloat32, vocab, 1, nullptr, nullptr, 0};
    expect(aepo_row_grad(&waited, &stats, &given, &grad, isa) == 0, name, isa);
    grad.out = right.at(0);
    expect(aepo_row_grad(&plain, &stats, &given, &grad, isa) == 0, name, isa);
    expect(run.out.bytes == right.bytes, name + ": gradient of what waited", isa);
  }

  void check_stats(Run& run, const std::vector<RowTruth>& truth, const std::string& name) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto stat = [&](int number, Bounded right, const char* what) {
        near(run.stats[number][row], right, 0,
             [&] { return name + ", row " + std::to_string(row) + what; });
      };
      const Law &one = truth[row].first, &two = truth[row].second;
      expect(one.sum_off < 0.01 && two.sum_off < 0.01, name + ": first order", one.sum_off);
      if (targets[row] >= 0) stat(0, one.logprob, ", logprob");
      stat(1, one.entropy, ", entropy");
      stat(2, truth[row].max, ", max");
      stat(3, one.log_sum, ", log_sum");
      if (options.second && targets[row] >= 0) stat(4, two.logprob, ", second logprob");
      if (options.second) stat(5, two.log_sum, ", second log_sum");
      if (!options.squares) continue;
      stat(6, one.squares, ", squares");
      stat(7, truth[row].logit_sum, ", sum of logits");
      if (options.bias || options.softcap != 0) continue;  // what is largest depends on roundings
      const bool is_top1 = first_largest(row) == targets[row];
      expect(run.stats[8][row] == is_top1, name + ", is_top1", double(row));
    }
  }

  // Only what is asked for is written, and the row-major copy is the same.
  void check_gaps(Run& run, const std::string& name) {
    std::vector<bool> is_gap(out_strides.at(rows - 1, vocab - 1) + 1, true);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < vocab + 3; ++column) {
        if (column < vocab) is_gap[out_strides.at(row, column)] = false;
        if (!options.by_columns) continue;
        const float copy = run.by_rows.get(row * (vocab + 3) + column);
        const float right = column < vocab ? run.out.get(out_strides.at(row, column)) : NAN;
        expect(std::memcmp(&copy, &right, sizeof copy) == 0 ||
                   (std::isnan(copy) && std::isnan(right)), name + ": by rows", copy);
      }
    }
    for (std::size_t i = 0; i < is_gap.size(); ++i) {
      if (is_gap[i]) expect(std::isnan(run.out.get(i)), name + ": a gap", double(i));
    }
  }

  void check(Run& run, const std::vector<RowTruth>& truth, const std::string& name) {
    std::vector<Bounded> bias_grad(vocab, Bounded{0.5, 0});
    check_stats(run, truth, name);
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::vector<Bounded> grad = gradient_of(logits, given, truth[row], row);
      for (std::int64_t column = 0; column < vocab; ++column) {
        const Bounded& right = grad[column];
        const float found = run.out.get(out_strides.at(row, column));
        const double rounding = rounding_of(out, std::fabs(right.value) + right.off);
        // As float32, the output is the value itself.
        near(found, right, out == kFloat32 ? 0 : rounding, [&] {
          return name + ", row " + std::to_string(row) + ", column " + std::to_string(column);
        });
        bias_grad[column].value += right.value;
        bias_grad[column].off += right.off;
      }
    }
    check_gaps(run, name);
    for (std::size_t column = 0; column < run.bias_grad.size(); ++column) {
      const Bounded& right = bias_grad[column];  // the rows' sum is rounded, and the addition
      const double rounding = kUnit * (std::fabs(right.value - 0.5) + std::fabs(right.value));
      near(run.bias_grad[column], right, rounding, [&] { return name + ", bias gradient"; });
    }
  }
};

void numbers(const Options& options, std::int64_t vocab, std::int32_t in, std::int32_t out) {
  Case test(options, vocab, in, out);
  std::vector<RowTruth> truth;
  for (std::int64_t row = 0; row < test.rows; ++row) {
    truth.push_back(truth_of(test.logits, test.values, row));
  }
  for (std::int32_t isa = 0; aepo_isa_name(isa) != nullptr; ++isa) {
    if (!aepo_isa_runs(isa)) continue;
    const std::string name = std::string(aepo_isa_name(isa)) + ", " + options.name + ", " +
                             std::to_string(vocab) + ", dtypes " + std::to_string(in) +
                             std::to_string(out);
    Run one = test.run(isa, 1);
    test.check(one, truth, name);
    if (!options.by_columns && in == out) test.check_kept(one, isa, name + ", kept");
    for (const std::int64_t slice : {7, 50, 2048, 4096}) {
      if (in != out) break;  // it has no output in `out`
      Run other = test.run_sliced(isa, slice);
      test.check_stats(other, truth, name + ", slices of " + std::to_string(slice));
      if (slice % 2048 != 0 && slice < vocab) continue;  // sums in another order
      for (int i = 0; i < kStats; ++i) expect(same(one.stats[i], other.stats[i]), name, double(slice));
    }
    for (const std::int32_t threads : {2, 8}) {
      const Run other = test.run(isa, threads);
      for (int i = 0; i < kStats; ++i) expect(same(one.stats[i], other.stats[i]), name, threads);
      expect(one.out.bytes == other.out.bytes, name + ": threads", threads);
      expect(one.by_rows.bytes == other.by_rows.bytes, name + ": threads", threads);
      expect(same(one.bias_grad, other.bias_grad), name + ": threads", threads);
    }
  }
}

// NaN in whatever column, and behind however many of -inf, is not lost.
void nan_stays(std::int64_t vocab, std::int64_t from, float before) {
  const float one = 1;
  const std::int64_t target = vocab - 1;
  std::vector<float> row(vocab, 1.0f), grad(vocab), stat(4);
  std::fill(row.begin(), row.begin() + from, before);
  for (std::int64_t column = from; column < vocab; ++column) {
    row[column] = NAN;
    for (std::int32_t isa = 0; aepo_isa_runs(isa); ++isa) {
      const AepoLogits logits{row.data(), kFloat32, 1, 1, vocab, vocab, 1, &target,
                              &one, nullptr, nullptr, 0, 1, nullptr, nullptr};
      const AepoStats stats{&stat[0], &stat[1], &stat[2], &stat[3], nullptr, nullptr, nullptr,
                            nullptr, nullptr};
      const AepoState whole{};
      aepo_row_stats(&logits, &stats, &whole, &kNowhere, isa);
      const AepoCoefs coefs{&one, nullptr, nullptr, nullptr};
      const AepoGrad out{grad.data(), kFloat32, vocab, 1, nullptr, nullptr, 0};
      aepo_row_grad(&logits, &stats, &coefs, &out, isa);
      const std::string name = std::string(aepo_isa_name(isa)) + ", NaN of " + std::to_string(vocab);
      for (const int number : {0, 1, 3}) expect(std::isnan(stat[number]), name, double(column));
      bool all_nan = true;
      for (const float g : grad) all_nan = all_nan && std::isnan(g);
      expect(all_nan, name + ", gradient", double(column));
    }
    row[column] = before;
  }
}

}  // namespace

int main() {
  const Options all_options[] = {
      {"plain", false, false, true},
      {"logprob", false, false, false, true},
      {"bias", true, false, true, false, true},
      {"softcap", false, false, true, false, false, 30},
      {"scale", false, true, false, false, false, 0, 1.3f},
      {"everything", true, true, true, false, true, 5, 0.7f},
      {"in place", true, true, false, false, false, 0, 1, true},
      {"in place, with bias", true, true, false, false, true, 0, 1, true},
      {"by columns", false, false, true, false, false, 0, 1, false, true},
      {"by columns, everything", true, true, true, false, true, 5, 0.7f, false, true},
      {"by columns, in place", false, true, false, false, false, 0, 1, true, true},
  };
  for (const Options& options : all_options) {
    for (const std::int64_t vocab : kSizes) {
      for (const std::int32_t in : {kFloat32, kBFloat16, kFloat16}) {
        for (const std::int32_t out : {kFloat32, kBFloat16, kFloat16}) {
          if (options.by_columns && (in != kBFloat16 || out != in)) continue;
          if (!options.in_place || in == out) numbers(options, vocab, in, out);
        }
      }
    }
  }
  nan_stays(33, 0, 1);
  nan_stays(2065, 2000, 1);
  nan_stays(2065, 2000, -INFINITY);
  std::printf("largest error: %.3f of its bound\n", worst);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
