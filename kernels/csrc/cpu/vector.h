// Vectors of floats in GCC's and Clang's portable vector types, as wide as the target's registers.
// Everything has internal linkage: this is compiled once per target.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Not wider than the registers: GCC compares and selects such vectors a lane at a time.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else  // SSE2, NEON
constexpr int kLanes = 4;
#endif
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = std::int32_t __attribute__((vector_size(4 * kLanes)));
using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = std::uint16_t __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline Floats all(float value) { return Floats{} + value; }
inline Floats larger(Floats a, Floats b) { return a < b ? b : a; }  // NaN where a is

template <typename To, typename From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Words load_words(const std::uint16_t* from) {
  Halves half;
  std::memcpy(&half, from, sizeof half);
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC would convert each half by itself
  return bits<Words>(_mm256_cvtepu16_epi32(bits<__m128i>(half)));
#else
  return __builtin_convertvector(half, Words);
#endif
}

inline Floats load(const BFloat16* from) { return bits<Floats>(load_words(&from->bits) << 16); }

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store_words(std::uint16_t* to, Words words) {  // each below 2^16
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC would mask the words first
  const __m256i packed = _mm256_packus_epi32(bits<__m256i>(words), __m256i{});
  const Halves half = bits<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const Halves half = __builtin_convertvector(words, Halves);
#endif
  std::memcpy(to, &half, sizeof half);
}

// As bf16, rounded to nearest, ties to even; NaN stays NaN.
inline Words rounded_bits(Floats value) {
  const Words word = bits<Words>(value);
  const Words rounded = word + 0x7fffu + ((word >> 16) & 1u);
  return (value == value ? rounded : word | 0x400000u) >> 16;
}

inline void store(BFloat16* to, Floats value) { store_words(&to->bits, rounded_bits(value)); }

#if defined(__F16C__) && !defined(__AVX512F__)
inline Floats load(const Float16* from) {
  __m128i half;
  std::memcpy(&half, from, sizeof half);
  return bits<Floats>(_mm256_cvtph_ps(half));
}

inline void store(Float16* to, Floats value) {
  const __m128i half = _mm256_cvtps_ph(bits<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &half, sizeof half);
}
#else
inline Floats load(const Float16* from) {
  const Words half = load_words(&from->bits);
  // Exponents are 112 apart; multiplying by a power of two also makes subnormals right.
  const Floats scaled = bits<Floats>((half & 0x7fffu) << 13) * 0x1p112f;
  const Words special = (half & 0x7c00u) == 0x7c00u ? (Words{} + 0x7f800000u) : Words{};
  return bits<Floats>(bits<Words>(scaled) | special | (half & 0x8000u) << 16);
}

inline void store(Float16* to, Floats value) {
  const Words word = bits<Words>(value);
  const Words sign = (word >> 16) & 0x8000u;
  const Words magnitude = word & 0x7fffffffu;
  // Normal numbers: rebias the exponent and round the 13 bits that go.
  const Words rebased = magnitude - 0x38000000u;
  const Words normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  // Subnormal ones: adding 0.5 lines their bits up at the end of the significand, rounded.
  const Words small = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  Words half = magnitude < 0x38800000u ? small : normal;
  half = half > 0x7c00u ? (Words{} + 0x7c00u) : half;
  half = magnitude > 0x7f800000u ? (Words{} + 0x7e00u) : half;
  store_words(&to->bits, half | sign);
}
#endif

// Sums are kept in 16 lanes at any width of the registers, and added up in one order.
constexpr int kWide = 16, kParts = kWide / kLanes;

inline double sum(const Floats (&parts)[kParts]) {
  double total = 0;
  for (const Floats& part : parts) {
    for (int lane = 0; lane < kLanes; ++lane) total += part[lane];
  }
  return total;
}

// One step of a transpose: swaps the off-diagonal blocks of kBit by kBit words between two rows.
template <int kBit, std::size_t... kLane>
inline void swap_blocks(Words& a, Words& b, std::index_sequence<kLane...>) {
  const Words first = a;
#if defined(__clang__)
  a = __builtin_shufflevector(first, b, (kLane & kBit ? kLanes + kLane - kBit : kLane)...);
  b = __builtin_shufflevector(first, b, (kLane & kBit ? kLanes + kLane : kLane + kBit)...);
#else
  a = __builtin_shuffle(first, b, Words{(kLane & kBit ? kLanes + kLane - kBit : kLane)...});
  b = __builtin_shuffle(first, b, Words{(kLane & kBit ? kLanes + kLane : kLane + kBit)...});
#endif
}

// Transposes a square of words in place.
template <int kBit = kLanes / 2>
inline void transpose(Words (&square)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kBit) == 0) {
      swap_blocks<kBit>(square[i], square[i + kBit], std::make_index_sequence<kLanes>());
    }
  }
  if constexpr (kBit > 1) transpose<kBit / 2>(square);
}

// The largest lane that is a number, -inf where none is.
inline float maximum(Floats value) {
  float largest = -INFINITY;
  for (int lane = 0; lane < kLanes; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

// exp for x <= 0, within 2 ulp. It is 0 below about -87.68, and NaN for NaN.
inline Floats exp_negative(Floats x) {
  constexpr float kLowest = -88, kLog2e = 0x1.715476p0f;
  constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;  // the sum is ln 2
  // Adding it leaves a whole number in the low bits: the exponent of a power of two.
  const Floats magic = all(0x1.8p23f + 127);
  const Floats kept = larger(x, all(kLowest));
  const Floats shifted = kept * kLog2e + magic;
  const Floats whole = shifted - magic;
  const Floats r = (kept - whole * kLn2High) - whole * kLn2Low;
  // Minimax in relative error among the polynomials 1 + r + ...: off by 3.1e-9 on |r| <= ln(2) / 2.
  Floats series = all(0.00138145402f) * r + 0.00836874511f;
  series = series * r + 0.0416683908f;
  series = series * r + 0.166665204f;
  series = series * r + 0.499999934f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return series * bits<Floats>(bits<Words>(shifted) << 23);  // at kLowest times 0
}

// tanh from exp of a negative number. Its absolute error is below 2e-7.
inline Floats tanh_of(Floats x) {
  const Floats away = x < 0.0f ? x : -x;
  const Floats power = exp_negative(2.0f * away);
  const Floats value = (1.0f - power) / (1.0f + power);
  return x < 0.0f ? -value : value;
}

}  // namespace
