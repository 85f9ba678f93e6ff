// The layers' operations through their C interface, on each instruction set, against doubles.
//
// Every buffer has exactly the size the interface asks for, so that AddressSanitizer sees a stray
// access; lines that may lie apart are an odd number of elements apart, with NaN between them.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "../cpu/layers.h"
#include "buffer.h"

namespace {

constexpr std::int32_t kDtypes[] = {kFloat32, kBFloat16, kFloat16};
std::mt19937 generator(1);
std::string current;  // what is being tested
int failures = 0;

void expect(bool ok, const char* what, std::int64_t place = 0) {
  if (ok) return;
  if (++failures < 20) std::printf("%s: %s fails at %ld\n", current.c_str(), what, long(place));
}

// Lines of `width` elements, one after the other or apart.
struct Lines {
  std::int64_t count, width, pitch;
  Buffer buffer;

  Lines(std::int32_t dtype, std::int64_t count, std::int64_t width, bool apart = false)
      : count(count), width(width), pitch(apart ? width + 3 - width % 2 : width),
        buffer(dtype, (count - 1) * pitch + width) {}
  unsigned char* data() { return buffer.at(0); }
  double get(std::int64_t line, std::int64_t i) { return buffer.get(line * pitch + i); }

  Lines& fill(float size = 1) {
    std::normal_distribution<float> normal;
    for (std::int64_t line = 0; line < count; ++line) {
      for (std::int64_t i = 0; i < width; ++i) buffer.set(line * pitch + i, size * normal(generator));
    }
    return *this;
  }

  // `size`: the terms' that add up to the truth, in float32; then there is one rounding.
  void near(std::int64_t line, std::int64_t i, double truth, double size, const char* what) {
    const double least = buffer.dtype == kFloat16 ? 0x1p-25 : 0;  // half of its smallest step
    const double unit = unit_of(buffer.dtype) * std::fabs(truth) + least;
    expect(std::fabs(get(line, i) - truth) <= unit + 2e-6 * size, what, line * width + i);
  }
};

// Calls for 1, 2 and 8 threads: whatever `outs` hold must not change.
template <typename Call>
void each_thread_count(Call call, std::initializer_list<Lines*> outs) {
  std::vector<std::vector<unsigned char>> first;
  for (const std::int32_t threads : {1, 2, 8}) {
    for (Lines* out : outs) out->buffer.bytes.assign(out->buffer.bytes.size(), 255);
    expect(call(threads) == 0, "the call");
    std::vector<std::vector<unsigned char>> bytes;
    for (Lines* out : outs) bytes.push_back(out->buffer.bytes);
    if (threads == 1) first = bytes;
    expect(bytes == first, "the same bits for more threads", threads);
  }
}

void rms_norm(std::int32_t isa, std::int64_t rows, std::int64_t columns, std::int32_t dtype,
              std::int32_t weight_dtype, std::int32_t out_dtype) {
  constexpr double kEps = 1e-5f;
  Lines x(dtype, rows, columns), weight(weight_dtype, 1, columns), out(out_dtype, rows, columns);
  Lines rstd(kFloat32, rows, 1), dy(out_dtype, rows, columns), dx(dtype, rows, columns);
  Lines dweight(kFloat32, 1, columns);
  x.fill(3), weight.fill(), dy.fill(2);
  AepoNorm norm{x.data(), weight.data(), out.data(), reinterpret_cast<float*>(rstd.data()),
                nullptr, nullptr, dtype, weight_dtype, out_dtype, 1, rows, columns, float(kEps)};
  each_thread_count([&](std::int32_t threads) {
    norm.threads = threads;
    return aepo_rms_norm(&norm, isa);
  }, {&out, &rstd});
  norm.out = dy.data();
  norm.x_grad = dx.data();
  norm.weight_grad = reinterpret_cast<float*>(dweight.data());
  each_thread_count([&](std::int32_t threads) {
    norm.threads = threads;
    return aepo_rms_norm_grad(&norm, isa);
  }, {&dx, &dweight});
  const Lines with_sums = dx;
  norm.weight_grad = nullptr;
  expect(aepo_rms_norm_grad(&norm, isa) == 0, "the call");
  expect(dx.buffer.bytes == with_sums.buffer.bytes, "dx without dweight");
  std::vector<double> sums(columns), sizes(columns);
  for (std::int64_t row = 0; row < rows; ++row) {
    double squares = 0, along = 0, along_size = 0;
    for (std::int64_t i = 0; i < columns; ++i) squares += x.get(row, i) * x.get(row, i) / columns;
    const double scale = 1 / std::sqrt(squares + kEps);
    rstd.near(row, 0, scale, scale, "rstd");
    for (std::int64_t i = 0; i < columns; ++i) {
      const double term = weight.get(0, i) * dy.get(row, i) * x.get(row, i) * scale;
      along += term / columns;
      along_size += std::fabs(term) / columns;
    }
    for (std::int64_t i = 0; i < columns; ++i) {
      const double normed = x.get(row, i) * scale, right = weight.get(0, i) * normed;
      const double slope = weight.get(0, i) * dy.get(row, i);
      out.near(row, i, right, std::fabs(right), "the norm");
      dx.near(row, i, scale * (slope - normed * along),
              scale * (std::fabs(slope) + std::fabs(normed) * along_size), "dx");
      sums[i] += dy.get(row, i) * normed;
      sizes[i] += std::fabs(dy.get(row, i) * normed);
    }
  }
  for (std::int64_t i = 0; i < columns; ++i) dweight.near(0, i, sums[i], sizes[i], "dweight");
}

void swiglu(std::int32_t isa, std::int64_t count, std::int32_t dtype) {
  Lines gate(dtype, 1, count), up(dtype, 1, count), out(dtype, 1, count), dy(dtype, 1, count);
  Lines dgate(dtype, 1, count), dup(dtype, 1, count);
  gate.fill(8), up.fill(), dy.fill();
  AepoSwiglu given{gate.data(), up.data(), out.data(), dgate.data(), dup.data(), dtype, 1, count};
  each_thread_count([&](std::int32_t threads) {
    given.threads = threads;
    return aepo_swiglu(&given, isa);
  }, {&out});
  given.out = dy.data();
  each_thread_count([&](std::int32_t threads) {
    given.threads = threads;
    return aepo_swiglu_grad(&given, isa);
  }, {&dgate, &dup});
  for (std::int64_t i = 0; i < count; ++i) {
    const double g = gate.get(0, i), u = up.get(0, i), slope = dy.get(0, i);
    const double open = 1 / (1 + std::exp(-g)), terms = std::fabs(slope * u) * open;
    out.near(0, i, g * open * u, std::fabs(g * open * u), "swiglu");
    // In float32 1 - open is off by a rounding of open.
    dgate.near(0, i, slope * u * open * (1 + g * (1 - open)), terms * (1 + std::fabs(g)), "dgate");
    dup.near(0, i, slope * g * open, std::fabs(slope * g * open), "dup");
  }
}

void rotary(std::int32_t isa, std::int64_t batch, std::int64_t heads, std::int64_t length,
            std::int64_t width, std::int32_t dtype, std::int32_t angle_dtype) {
  Lines x(dtype, batch * heads * length, width, true), out(dtype, x.count, width, true);
  Lines cos(angle_dtype, batch * length, width, true), sin(angle_dtype, cos.count, width, true);
  x.fill(), cos.fill(), sin.fill();
  const std::int64_t half = width / 2;
  for (const std::int32_t transpose : {0, 1}) {
    AepoRotary given{x.data(), cos.data(), sin.data(), out.data(), dtype, angle_dtype, 1, transpose,
                     batch, heads, length, width,
                     {heads * length * x.pitch, length * x.pitch, x.pitch},
                     {heads * length * out.pitch, length * out.pitch, out.pitch},
                     {length * cos.pitch, cos.pitch}};
    each_thread_count([&](std::int32_t threads) {
      given.threads = threads;
      return aepo_rotary(&given, isa);
    }, {&out});
    for (std::int64_t line = 0; line < x.count; ++line) {
      const std::int64_t angle = line / (heads * length) * length + line % length;
      for (std::int64_t i = 0; i < width; ++i) {
        const std::int64_t other = i < half ? i + half : i - half;
        const double along = x.get(line, i) * cos.get(angle, i);
        const double across = (i < half) == (transpose == 0) ? -x.get(line, other) : x.get(line, other);
        const double turned = across * sin.get(angle, transpose ? other : i);
        out.near(line, i, along + turned, std::fabs(along) + std::fabs(turned), "rotary");
      }
    }
  }
}

void decode(std::int32_t isa, std::int64_t batch, std::int64_t heads, std::int64_t shared,
            std::int64_t keys, std::int64_t width, std::int32_t dtype, std::int32_t mask_dtype,
            bool masked) {
  Lines q(dtype, batch * heads, width, true), k(dtype, batch * shared * keys, width, true);
  Lines v(dtype, k.count, width, true), out(dtype, q.count, width, true);
  Lines mask(mask_dtype, batch, keys, true);
  q.fill(2), k.fill(), v.fill(), mask.fill();
  for (std::int64_t line = 0; line < batch; ++line) {  // the last row sees nothing
    for (std::int64_t key = 0; key < keys; ++key) {
      if (line == batch - 1 || key % 3 == 1) mask.buffer.set(line * mask.pitch + key, -INFINITY);
    }
  }
  const float scale = 1 / std::sqrt(float(width));
  const std::int64_t key_strides[] = {shared * keys * k.pitch, keys * k.pitch, k.pitch};
  AepoDecode given{q.data(), k.data(), v.data(), masked ? mask.data() : nullptr, out.data(), dtype,
                   mask_dtype, 1, scale, batch, heads, shared, keys, width,
                   {heads * q.pitch, q.pitch}, {}, {}, {heads * out.pitch, out.pitch}, mask.pitch};
  std::copy(key_strides, key_strides + 3, given.k_strides);
  std::copy(key_strides, key_strides + 3, given.v_strides);
  each_thread_count([&](std::int32_t threads) {
    given.threads = threads;
    return aepo_decode(&given, isa);
  }, {&out});
  for (std::int64_t line = 0; line < q.count; ++line) {
    const std::int64_t row = line / heads, from = (row * shared + line % heads / (heads / shared)) * keys;
    std::vector<double> scores(keys), sums(width), sizes(width);
    double largest = -INFINITY, total = 0, terms = 0;
    for (std::int64_t key = 0; key < keys; ++key) {
      double size = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        const double term = double(scale) * q.get(line, i) * k.get(from + key, i);
        scores[key] += term;
        size += std::fabs(term);
      }
      if (masked) scores[key] += mask.get(row, key);
      largest = std::fmax(largest, scores[key]);
      terms = std::fmax(terms, size);
    }
    for (std::int64_t key = 0; key < keys && largest != -INFINITY; ++key) {
      const double weight = std::exp(scores[key] - largest);
      total += weight;
      for (std::int64_t i = 0; i < width; ++i) {
        sums[i] += weight * v.get(from + key, i);
        sizes[i] += weight * std::fabs(v.get(from + key, i));
      }
    }
    for (std::int64_t i = 0; i < width; ++i) {
      const double share = total > 0 ? 1 / total : 0;
      out.near(line, i, sums[i] * share, (1 + terms) * sizes[i] * share, "attention");
    }
  }
}

void unknown_dtypes(std::int32_t isa) {
  constexpr std::int32_t kUnknown = 7;
  float number = 1, out = 0;
  const AepoNorm norm{&number, &number, &out, &out, nullptr, nullptr, kFloat32, kUnknown, kFloat32,
                      1, 1, 1, 0};
  expect(aepo_rms_norm(&norm, isa) == 1, "an unknown dtype of a norm");
  const AepoSwiglu gated{&number, &number, &out, nullptr, nullptr, kUnknown, 1, 1};
  expect(aepo_swiglu(&gated, isa) == 1, "an unknown dtype of swiglu");
}

}  // namespace

int main() {
  const std::int64_t norms[][2] = {{1, 1}, {3, 7}, {33, 64}, {70, 131}, {2, 1009}};
  const std::int64_t rotations[][4] = {{1, 1, 1, 2}, {2, 3, 5, 64}, {3, 2, 4, 86}, {2, 2, 3, 6}};
  const std::int64_t attentions[][5] = {
      {1, 1, 1, 1, 1}, {3, 9, 3, 37, 64}, {2, 4, 4, 16, 80}, {3, 5, 1, 130, 7}, {2, 6, 3, 9, 33}};
  for (std::int32_t isa = 0; aepo_isa_runs(isa); ++isa) {
    unknown_dtypes(isa);
    for (const std::int32_t dtype : kDtypes) {
      current = std::string(aepo_isa_name(isa)) + ", dtype " + std::to_string(dtype);
      for (const std::int64_t count : {1, 17, 40001}) swiglu(isa, count, dtype);
      for (const std::int32_t other : kDtypes) {
        for (const auto& [rows, columns] : norms) {
          rms_norm(isa, rows, columns, dtype, other, dtype);
          rms_norm(isa, rows, columns, dtype, dtype, other);
        }
        for (const auto& [batch, heads, length, width] : rotations) {
          rotary(isa, batch, heads, length, width, dtype, other);
        }
        for (const auto& [batch, heads, shared, keys, width] : attentions) {
          for (const bool masked : {false, true}) {
            decode(isa, batch, heads, shared, keys, width, dtype, other, masked);
          }
        }
      }
    }
  }
  if (failures == 0) std::puts("ok");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
