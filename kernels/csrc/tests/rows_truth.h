// What the row kernels should give, in double, and how far float32 may take them from it.
//
// Each bound adds up, to first order, the roundings that rows_kernel.cpp makes on the way: kUnit
// times the value per operation, and what exp_negative and tanh_of promise (see test_vector.cpp).
// Products of two such errors are what kSecondOrder allows for; double's own roundings vanish in
// it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../cpu/rows.h"

namespace {

constexpr double kUnit = 0x1p-24;       // one rounding to float32, relative
constexpr double kExp = 4 * kUnit;      // 2 ulp of exp_negative
constexpr double kLibraryExp = 2 * kUnit;  // 1 ulp of std::exp(float)
constexpr double kTanh = 2e-7;          // absolute
constexpr double kAdds = 127 * kUnit;   // a lane adds up the 128 vectors of a block
constexpr double kSecondOrder = 1.01;   // the errors below are all below 1 %
constexpr double kUnderflow = 0x1p-147;  // roundings of subnormal numbers

struct Bounded {
  double value = 0, off = 0;  // float32 may give value +- off
};

// softmax(z / T), from w = exp(t), t = (z - max) / T.
struct Law {
  std::vector<Bounded> t, weight;
  double sum_off = 0;  // relative
  Bounded log_sum, logprob, entropy, squares;
};

struct RowTruth {
  std::vector<Bounded> z;
  Bounded max, logit_sum;
  Law first, second;
};

// Beyond float32 lies infinity.
inline Bounded in_range(Bounded x) {
  return x.value < -std::numeric_limits<float>::max() ? Bounded{-INFINITY, 0} : x;
}

inline Bounded logit_of(double product, const AepoLogits& logits, std::int64_t column) {
  if (std::isinf(product)) return {logits.softcap != 0 ? -logits.softcap : product, 0};
  Bounded z{product, 0};
  if (logits.bias != nullptr) {
    z.value += logits.bias[column];
    z.off = kUnit * std::fabs(z.value);
  }
  const double scale = logits.scale, cap = logits.softcap;
  if (cap != 0) {  // scale / cap is rounded, and its product
    const double y = z.value * scale / cap;
    const double y_off = z.off * scale / cap + 2 * kUnit * std::fabs(y);
    const double cosh = std::cosh(std::max(std::fabs(y) - y_off, 0.0));
    z = {cap * std::tanh(y), cap * (kTanh + y_off / cosh / cosh)};
    z.off += kUnit * std::fabs(z.value);
  } else if (scale != 1) {
    z.value *= scale;
    z.off = z.off * scale + kUnit * std::fabs(z.value);
  }
  return in_range(z);
}

inline Bounded max_of(const std::vector<Bounded>& z) {
  double max = -INFINITY, highest = -INFINITY, lowest = -INFINITY;
  for (const Bounded& one : z) {
    max = std::fmax(max, one.value);
    highest = std::fmax(highest, one.value + one.off);
    lowest = std::fmax(lowest, one.value - one.off);
  }
  return {max, std::fmax(highest - max, max - lowest)};
}

inline Bounded sum_of(const std::vector<Bounded>& z) {
  Bounded sum;
  double size = 0;
  for (const Bounded& one : z) {
    sum.value += one.value;
    sum.off += one.off;
    size += std::fabs(one.value);
  }
  sum.off += kAdds * size + kUnit * std::fabs(sum.value);
  return in_range(sum);
}

inline Law law_of(const std::vector<Bounded>& z, Bounded max, double inverse, std::int64_t target) {
  Law law;
  double sum = 0, tempered = 0, squares = 0;  // tempered: of -w t >= 0
  double sum_off = 0, tempered_off = 0, squares_off = 0;
  for (const Bounded& one : z) {
    Bounded t{-1e30, 0}, w{0, 0};
    if (one.value > -INFINITY) {  // a difference and a product
      t.value = (one.value - max.value) * inverse;
      t.off = (one.off + max.off) * inverse + 2 * kUnit * std::fabs(t.value);
      w.value = std::exp(t.value);
      // Where exp would be subnormal, exp_negative gives 0.
      w.off = t.value - t.off < -87.3 ? w.value : w.value * (std::expm1(t.off) + kExp);
    }
    law.t.push_back(t);
    law.weight.push_back(w);
    sum += w.value;
    sum_off += w.off;
    tempered -= w.value * t.value;
    tempered_off += w.off * -t.value + w.value * t.off;
    squares += w.value * w.value;
    squares_off += 2 * w.value * w.off;
  }
  law.sum_off = sum_off / sum + kAdds;
  tempered_off = tempered_off / sum + tempered / sum * (kAdds + kUnit + law.sum_off);
  squares_off = squares_off / squares + kAdds + kUnit + 2 * law.sum_off;  // relative
  // Sums over blocks, logarithms and quotients are double's; each result is rounded once.
  const auto rounded = [](double value, double off) {
    return Bounded{value, off + kUnit * std::fabs(value)};
  };
  const double log_sum = std::log(sum);
  law.log_sum = rounded(log_sum, law.sum_off);
  if (target >= 0) {
    const Bounded t = z[target].value == -INFINITY ? Bounded{-INFINITY, 0} : law.t[target];
    law.logprob = in_range(rounded(t.value - log_sum, t.off + law.sum_off));
  }
  law.entropy = rounded(log_sum + tempered / sum, law.sum_off + tempered_off);
  law.squares = rounded(squares / sum / sum, squares / sum / sum * squares_off);
  return law;
}

inline RowTruth truth_of(const AepoLogits& logits, const std::vector<float>& products,
                         std::int64_t index) {
  RowTruth row;
  for (std::int64_t column = 0; column < logits.vocab; ++column) {
    row.z.push_back(logit_of(products[index * logits.vocab + column], logits, column));
  }
  row.max = max_of(row.z);
  row.logit_sum = sum_of(row.z);
  row.first = law_of(row.z, row.max, logits.inv_temperature[index], logits.targets[index]);
  if (logits.second_inv_temperature != nullptr) {
    const double inverse = logits.second_inv_temperature[index];
    row.second = law_of(row.z, row.max, inverse, logits.targets[index]);
  }
  return row;
}

// Of the loss sum_i c_i output_i by each product, before it is rounded to the output's dtype:
// dz_j = ((c_lp (1{j=y} - p_j) + c_lse p_j - c_H p_j (log p_j + H)) / T + c_2 (1{j=y} - q_j) / T2.
inline std::vector<Bounded> gradient_of(const AepoLogits& logits, const AepoCoefs& coefs,
                                        const RowTruth& row, std::int64_t index) {
  const auto at = [index](const float* values) { return values == nullptr ? 0.0 : values[index]; };
  const double inverse = logits.inv_temperature[index], scale = logits.scale;
  const double by_logprob = at(coefs.logprob), by_entropy = at(coefs.entropy);
  const double by_target = by_logprob * inverse * scale;
  const Bounded &log_sum = row.first.log_sum, &entropy = row.first.entropy;
  // p_j factor (constant - by_entropy t_j), with the roundings of each part.
  const double plain = at(coefs.lse) - by_logprob, gap = log_sum.value - entropy.value;
  Bounded constant{plain + by_entropy * gap, 0};
  constant.off = kUnit * (std::fabs(plain) + 2 * std::fabs(by_entropy * gap)) +
                 kUnit * std::fabs(constant.value) +
                 std::fabs(by_entropy) * (log_sum.off + entropy.off);
  const double factor = std::exp(-log_sum.value) * inverse * scale;
  const double factor_off = log_sum.off + kLibraryExp + 2 * kUnit;  // relative
  double second = 0, second_off = 0, second_target = 0;
  if (coefs.second_logprob != nullptr) {
    second_target = at(coefs.second_logprob) * logits.second_inv_temperature[index] * scale;
    second = second_target * std::exp(-row.second.log_sum.value);
    second_off = row.second.log_sum.off + kLibraryExp + 3 * kUnit;
  }

  std::vector<Bounded> grad(row.z.size());
  for (std::size_t j = 0; j < row.z.size(); ++j) {
    const Bounded t = row.first.t[j], w = row.first.weight[j];
    const double inner = constant.value - by_entropy * t.value;
    const double parts = std::fabs(constant.value) + std::fabs(by_entropy * t.value);
    Bounded& g = grad[j];
    g.value = w.value * factor * inner;
    // Constant and slope, slope * t, their sum, its product with w: four roundings at most.
    g.off = factor * (w.off * std::fabs(inner) + w.value * parts * (factor_off + 4 * kUnit) +
                      w.value * (constant.off + std::fabs(by_entropy) * t.off));
    if (second != 0) {  // a product and a sum
      const Bounded v = row.second.weight[j];
      g.off += std::fabs(second) * (v.off + v.value * (second_off + 2 * kUnit));
      g.off += kUnit * std::fabs(g.value);
      g.value -= second * v.value;
    }
    if (std::int64_t(j) == logits.targets[index]) {  // two products each, their sum, the addition
      g.value += by_target + second_target;
      g.off += 3 * kUnit * (std::fabs(by_target) + std::fabs(second_target));
      g.off += kUnit * std::fabs(g.value);
    }
    if (logits.softcap != 0) {
      const double share = row.z[j].value / logits.softcap, slope = 1 - share * share;
      const double share_off = row.z[j].off / logits.softcap + kUnit * std::fabs(share);
      const double slope_off = 2 * std::fabs(share) * share_off + kUnit * (share * share + slope);
      g.off = g.off * (slope + slope_off) + std::fabs(g.value) * slope_off;
      g.value *= slope;
      g.off += kUnit * std::fabs(g.value);
    }
    g.off += kUnderflow;
  }
  return grad;
}

// Half a unit in the last place of an output of this size.
double rounding_of(std::int32_t dtype, double size) {
  if (dtype == kFloat32) return std::fmax(0x1p-24 * size, 0x1p-150);
  return dtype == kBFloat16 ? std::fmax(0x1p-8 * size, 0x1p-134)
                            : std::fmax(0x1p-11 * size, 0x1p-25);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace
