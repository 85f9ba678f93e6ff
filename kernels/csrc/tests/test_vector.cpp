// exp and tanh against the C library in double, conversions against every 16-bit value.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>

#include "../cpu/vector.h"

namespace {

[[maybe_unused]] constexpr int kSkipped = 77;
int failures = 0;

void expect(bool ok, const char* what, double value) {
  if (ok) return;
  if (++failures < 20) std::printf("%s: failed at %.9g\n", what, value);
}

float of_half(std::uint16_t half) {  // by the definition of IEEE half precision
  const int exponent = half >> 10 & 31, significand = half & 1023;
  double value = exponent == 0 ? std::ldexp(significand, -24)
                               : std::ldexp(1024 + significand, exponent - 25);
  if (exponent == 31) value = significand ? NAN : INFINITY;
  return float(half >> 15 ? -value : value);
}

template <typename Half, typename Decode>
void conversions(const char* name, Decode decode, std::uint16_t infinity) {
  for (std::uint32_t word = 0; word < 65536; ++word) {
    Half halves[kLanes];
    for (Half& half : halves) half.bits = std::uint16_t(word);
    const float truth = decode(std::uint16_t(word)), found = load(halves)[0];
    if (std::isnan(truth)) {
      expect(std::isnan(found), name, word);
      continue;
    }
    expect(found == truth && std::signbit(found) == std::signbit(truth), name, word);
    store(halves, load(halves));
    expect(halves[kLanes - 1].bits == int(word), name, word);
    if (int(word & 0x7fff) >= infinity - 1) continue;
    // Halfway to the next number rounds to even, a bit less or more to the nearer one.
    const double next = decode(std::uint16_t(word + 1)), half_way = (double(truth) + next) / 2;
    const float tie = float(half_way);
    if (double(tie) != half_way) continue;
    const auto rounded = [&](float value) {
      Half out[kLanes];
      store(out, all(value));
      return out[1].bits;
    };
    const float away = word & 0x8000 ? -INFINITY : INFINITY;
    expect(rounded(tie) == int(word & 1 ? word + 1 : word), "tie", word);
    expect(rounded(std::nextafter(tie, 0.0f)) == int(word), "below a tie", word);
    expect(rounded(std::nextafter(tie, away)) == int(word + 1), "above a tie", word);
  }
}

double ulps(float found, double truth) {
  const float rounded = float(truth);
  const double unit = double(std::nextafter(rounded, INFINITY)) - double(rounded);
  return std::fabs(found - truth) / unit;
}

}  // namespace

int main() {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")) return kSkipped;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kSkipped;
#endif
  double worst_exp = 0, worst_tanh = 0;
  for (int step = 0; step <= 4000000; ++step) {
    const float x = float(-87.6 * step / 4000000.0);
    worst_exp = std::fmax(worst_exp, ulps(exp_negative(all(x))[kLanes - 1], std::exp(double(x))));
    const float y = float(-20 + 40.0 * step / 4000000.0);
    worst_tanh = std::fmax(worst_tanh, std::fabs(tanh_of(all(y))[2] - std::tanh(double(y))));
  }
  std::printf("exp: %.3f ulp, tanh: %.3g\n", worst_exp, worst_tanh);
  expect(worst_exp <= 2, "exp, ulp", worst_exp);
  expect(worst_tanh <= 2e-7, "tanh", worst_tanh);
  expect(exp_negative(all(0))[0] == 1, "exp", 0);
  for (const float x : {-87.75f, -1000.0f, -1e30f, -INFINITY}) {
    expect(exp_negative(all(x))[0] == 0, "exp", x);
  }
  expect(std::isnan(exp_negative(all(NAN))[0]), "exp of NaN", NAN);
  conversions<Float16>("float16", of_half, 0x7c00);
  conversions<BFloat16>(
      "bfloat16", [](std::uint16_t half) { return bits<float>(std::uint32_t(half) << 16); }, 0x7f80);
  Float16 halves[kLanes];
  store(halves, all(65520.0f));
  expect(halves[0].bits == 0x7c00, "float16 overflows to infinity", 65520);
  store(halves, all(65519.0f));
  expect(halves[0].bits == 0x7bff, "float16 largest", 65519);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
