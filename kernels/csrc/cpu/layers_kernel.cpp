// The layers' operations. This file is compiled once per instruction set, and AEPO_LAYERS names the
// result.

#include "layers_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "elements.h"
#include "layers.h"

namespace {

// Rows of a block: their weight gradients are summed first, and then the sums of all blocks. Not
// measured.
constexpr std::int64_t kRowBlock = 32;
// Elements that a thread takes at once. Not measured.
constexpr std::int64_t kCountBlock = 1 << 14;

// Upcasts an array to float32, [count]; false where the dtype is unknown.
bool widen(const void* from, std::int32_t dtype, std::int64_t count, float* to) {
  return with_type(dtype, [&](auto* type) {
    const auto* values = static_cast<decltype(type)>(const_cast<void*>(from));
    for (std::int64_t i = 0; i < count; i += kLanes) {
      store_some(to + i, load_some(values + i, count - i), count - i);
    }
    return 0;
  }) == 0;
}

using Four = float __attribute__((vector_size(16)));
using Eight = float __attribute__((vector_size(32)));
using Sixteen = float __attribute__((vector_size(64)));

// The sum of the lanes: one half is added to the other, until one lane is left.
inline float total(Four value) { return (value[0] + value[2]) + (value[1] + value[3]); }

inline float total(Eight value) {
  Four halves[2];
  std::memcpy(halves, &value, sizeof value);
  return total(halves[0] + halves[1]);
}

inline float total(Sixteen value) {
  Eight halves[2];
  std::memcpy(halves, &value, sizeof value);
  return total(halves[0] + halves[1]);
}

// The sum over a row. at: gives a vector from a column on, with 0 beyond the row's end.
template <typename At>
float row_sum(std::int64_t columns, At at) {
  Floats parts[kParts] = {};
  for (std::int64_t column = 0; column < columns; column += kWide) {
    for (int part = 0; part < kParts; ++part) {
      const std::int64_t from = column + part * kLanes;
      if (from < columns) parts[part] += at(from);
    }
  }
  for (int part = 1; part < kParts; ++part) parts[0] += parts[part];
  return total(parts[0]);
}

template <typename Value, typename Out>
int norm_rows(const AepoNorm& norm, const float* weight) {
  const std::int64_t columns = norm.columns;
#pragma omp parallel for schedule(static) num_threads(norm.threads)
  for (std::int64_t row = 0; row < norm.rows; ++row) {
    const auto* x = static_cast<const Value*>(norm.x) + row * columns;
    auto* out = static_cast<Out*>(norm.out) + row * columns;
    const float squares = row_sum(columns, [&](std::int64_t column) {
      const Floats value = load_some(x + column, columns - column);
      return value * value;
    });
    const float rstd = 1.0f / std::sqrt(squares / float(columns) + norm.eps);
    norm.rstd[row] = rstd;
    for (std::int64_t column = 0; column < columns; column += kLanes) {
      const std::int64_t count = columns - column;
      const Floats scaled = load_some(x + column, count) * rstd;
      store_some(out + column, scaled * load_some(weight + column, count), count);
    }
  }
  return 0;
}

// With u = weight * dy and n = x * rstd: dx = rstd (u - n mean(u n)), and dweight is the sum of dy
// n over the rows.
template <typename Value, typename Out>
int norm_grad_rows(const AepoNorm& norm, const float* weight) {
  const std::int64_t columns = norm.columns, blocks = (norm.rows + kRowBlock - 1) / kRowBlock;
  const bool sums = norm.weight_grad != nullptr;
  const std::unique_ptr<float[]> parts(new float[sums ? blocks * columns : 0]());
#pragma omp parallel for schedule(static) num_threads(norm.threads)
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t end = std::min(norm.rows, (block + 1) * kRowBlock);
    for (std::int64_t row = block * kRowBlock; row < end; ++row) {
      const auto* x = static_cast<const Value*>(norm.x) + row * columns;
      const auto* dy = static_cast<const Out*>(norm.out) + row * columns;
      auto* dx = static_cast<Value*>(norm.x_grad) + row * columns;
      const float rstd = norm.rstd[row];
      const float dot = row_sum(columns, [&](std::int64_t column) {
        const std::int64_t count = columns - column;
        return load_some(dy + column, count) * load_some(weight + column, count) *
               load_some(x + column, count);
      });
      const float along = dot * rstd * rstd / float(columns);
      for (std::int64_t column = 0; column < columns; column += kLanes) {
        const std::int64_t count = columns - column;
        const Floats value = load_some(x + column, count), slope = load_some(dy + column, count);
        const Floats by_norm = slope * load_some(weight + column, count);
        store_some(dx + column, (by_norm - value * along) * rstd, count);
        if (!sums) continue;
        float* part = parts.get() + block * columns + column;
        store_some(part, load_some(part, count) + slope * value * rstd, count);
      }
    }
  }
  if (!sums) return 0;
  for (std::int64_t column = 0; column < columns; column += kLanes) {
    Floats sum = {};
    for (std::int64_t block = 0; block < blocks; ++block) {
      sum += load_some(parts.get() + block * columns + column, columns - column);
    }
    store_some(norm.weight_grad + column, sum, columns - column);
  }
  return 0;
}

template <bool kGrad>
int any_norm(const AepoNorm& norm) {
  const std::unique_ptr<float[]> weight(new float[norm.columns]);
  if (!widen(norm.weight, norm.weight_dtype, norm.columns, weight.get())) return 1;
  return with_type(norm.dtype, [&](auto* value) {
    return with_type(norm.out_dtype, [&](auto* out) {
      using Value = std::remove_pointer_t<decltype(value)>;
      using Out = std::remove_pointer_t<decltype(out)>;
      return kGrad ? norm_grad_rows<Value, Out>(norm, weight.get())
                   : norm_rows<Value, Out>(norm, weight.get());
    });
  });
}

Floats sigmoid(Floats x) {
  const Floats power = exp_negative(x < 0.0f ? x : -x);
  return (x < 0.0f ? power : all(1.0f)) / (1.0f + power);
}

// Calls with the index of each vector's first element, and with the number of elements left.
template <typename Call>
void for_vectors(std::int64_t count, std::int32_t threads, Call call) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t start = 0; start < count; start += kCountBlock) {
    const std::int64_t end = std::min(count, start + kCountBlock);
    for (std::int64_t i = start; i < end; i += kLanes) call(i, end - i);
  }
}

int swiglu(const AepoSwiglu& given) {
  return with_type(given.dtype, [&](auto* type) {
    using Value = std::remove_pointer_t<decltype(type)>;
    const auto *gates = static_cast<const Value*>(given.gate), *ups = static_cast<const Value*>(given.up);
    auto* out = static_cast<Value*>(given.out);
    for_vectors(given.count, given.threads, [&](std::int64_t i, std::int64_t count) {
      const Floats gate = load_some(gates + i, count);
      store_some(out + i, gate * sigmoid(gate) * load_some(ups + i, count), count);
    });
    return 0;
  });
}

int swiglu_grad(const AepoSwiglu& given) {
  return with_type(given.dtype, [&](auto* type) {
    using Value = std::remove_pointer_t<decltype(type)>;
    const auto *gates = static_cast<const Value*>(given.gate), *ups = static_cast<const Value*>(given.up);
    const auto* slopes = static_cast<const Value*>(given.out);
    auto *by_gate = static_cast<Value*>(given.gate_grad), *by_up = static_cast<Value*>(given.up_grad);
    for_vectors(given.count, given.threads, [&](std::int64_t i, std::int64_t count) {
      const Floats gate = load_some(gates + i, count), slope = load_some(slopes + i, count);
      const Floats open = sigmoid(gate);
      const Floats by_silu = slope * load_some(ups + i, count);
      store_some(by_gate + i, by_silu * open * (1.0f + gate * (1.0f - open)), count);
      store_some(by_up + i, slope * gate * open, count);
    });
    return 0;
  });
}

template <typename Value, typename Angle>
void rotate(const AepoRotary& given, std::int64_t batch, std::int64_t position, std::int64_t head) {
  const auto at = [&](const std::int64_t (&strides)[3]) {
    return batch * strides[0] + head * strides[1] + position * strides[2];
  };
  const std::int64_t angle = batch * given.angle_strides[0] + position * given.angle_strides[1];
  const std::int64_t half = given.width / 2;
  const auto* x = static_cast<const Value*>(given.x) + at(given.x_strides);
  auto* out = static_cast<Value*>(given.out) + at(given.out_strides);
  const auto* cos = static_cast<const Angle*>(given.cos) + angle;
  const auto* sin = static_cast<const Angle*>(given.sin) + angle;
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const std::int64_t count = half - i;
    const Floats first = load_some(x + i, count), second = load_some(x + half + i, count);
    const Floats first_sin = load_some(sin + i, count), second_sin = load_some(sin + half + i, count);
    const Floats to_first = given.transpose ? second * second_sin : -second * first_sin;
    const Floats to_second = given.transpose ? -first * first_sin : first * second_sin;
    store_some(out + i, first * load_some(cos + i, count) + to_first, count);
    store_some(out + half + i, second * load_some(cos + half + i, count) + to_second, count);
  }
}

int rotary(const AepoRotary& given) {
  return with_type(given.dtype, [&](auto* type) {
    return with_type(given.angle_dtype, [&](auto* angle_type) {
      using Value = std::remove_pointer_t<decltype(type)>;
      using Angle = std::remove_pointer_t<decltype(angle_type)>;
#pragma omp parallel for collapse(2) schedule(static) num_threads(given.threads)
      for (std::int64_t batch = 0; batch < given.batch; ++batch) {
        for (std::int64_t position = 0; position < given.length; ++position) {
          for (std::int64_t head = 0; head < given.heads; ++head) {
            rotate<Value, Angle>(given, batch, position, head);
          }
        }
      }
      return 0;
    });
  });
}

// softmax(scores + mask) in place. scores: [keys], padded to a multiple of kLanes; the padding
// becomes 0. mask: [keys] or null.
template <typename Mask>
void softmax(float* scores, std::int64_t keys, const Mask* mask) {
  Floats largest = all(-INFINITY);
  for (std::int64_t key = 0; key < keys; key += kLanes) {
    const std::int64_t count = keys - key;
    Floats score = load(scores + key);
    if (mask != nullptr) score += load_some(mask + key, count);
    for (std::int64_t lane = count; lane < kLanes; ++lane) score[lane] = -INFINITY;
    store(scores + key, score);
    largest = larger(score, largest);
  }
  // Where the mask hides all keys, all weights are 0.
  const float max = std::max(maximum(largest), -std::numeric_limits<float>::max());
  const float weights = row_sum(keys, [&](std::int64_t key) {
    const Floats weight = exp_negative(load(scores + key) - max);
    store(scores + key, weight);
    return weight;
  });
  const float inverse = weights == 0 ? 0 : 1.0f / weights;
  for (std::int64_t key = 0; key < keys; key += kLanes) {
    store(scores + key, load(scores + key) * inverse);
  }
}

// Attention of kCount neighbouring queries, from `head` on, that share a head of keys and values.
// room: a workspace of kCount * (width + keys) floats, both padded to multiples of kLanes.
template <int kCount, typename Value, typename Mask>
void decode_queries(const AepoDecode& given, std::int64_t batch, std::int64_t head, float* room) {
  const std::int64_t width = given.width, keys = given.keys;
  const auto padded = [](std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; };
  float* const queries = room;
  float* const scores = room + kCount * padded(width);
  for (int i = 0; i < kCount; ++i) {
    const auto* query = static_cast<const Value*>(given.q) + batch * given.q_strides[0] +
                        (head + i) * given.q_strides[1];
    for (std::int64_t column = 0; column < width; column += kLanes) {
      const Floats value = load_some(query + column, width - column) * given.scale;
      store(queries + i * padded(width) + column, value);
    }
  }
  const std::int64_t shared = head / (given.heads / given.shared);
  const auto* k = static_cast<const Value*>(given.k) + batch * given.k_strides[0] +
                  shared * given.k_strides[1];
  for (std::int64_t key = 0; key < keys; ++key) {
    Floats sums[kCount] = {};
    for (std::int64_t column = 0; column < width; column += kLanes) {
      const Floats value = load_some(k + key * given.k_strides[2] + column, width - column);
      for (int i = 0; i < kCount; ++i) sums[i] += value * load(queries + i * padded(width) + column);
    }
    for (int i = 0; i < kCount; ++i) scores[i * padded(keys) + key] = total(sums[i]);
  }
  const auto* mask = static_cast<const Mask*>(given.mask);
  if (mask != nullptr) mask += batch * given.mask_stride;
  for (int i = 0; i < kCount; ++i) softmax(scores + i * padded(keys), keys, mask);
  const auto* v = static_cast<const Value*>(given.v) + batch * given.v_strides[0] +
                  shared * given.v_strides[1];
  auto* out = static_cast<Value*>(given.out) + batch * given.out_strides[0] +
              head * given.out_strides[1];
  for (std::int64_t column = 0; column < width; column += kLanes) {
    Floats sums[kCount] = {};
    for (std::int64_t key = 0; key < keys; ++key) {
      const Floats value = load_some(v + key * given.v_strides[2] + column, width - column);
      for (int i = 0; i < kCount; ++i) sums[i] += value * scores[i * padded(keys) + key];
    }
    for (int i = 0; i < kCount; ++i) {
      store_some(out + i * given.out_strides[1] + column, sums[i], width - column);
    }
  }
}

template <typename Value, typename Mask>
int decode_all(const AepoDecode& given) {
  constexpr int kMost = 4;  // queries whose sums stay in registers
  const std::int64_t queries = given.heads / given.shared;
#pragma omp parallel num_threads(given.threads)
  {
    const std::unique_ptr<float[]> room(new float[kMost * (given.width + given.keys + 2 * kLanes)]());
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t batch = 0; batch < given.batch; ++batch) {
      for (std::int64_t shared = 0; shared < given.shared; ++shared) {
        for (std::int64_t query = 0; query < queries; query += kMost) {
          const std::int64_t head = shared * queries + query;
          switch (std::min<std::int64_t>(kMost, queries - query)) {
            case 1: decode_queries<1, Value, Mask>(given, batch, head, room.get()); break;
            case 2: decode_queries<2, Value, Mask>(given, batch, head, room.get()); break;
            case 3: decode_queries<3, Value, Mask>(given, batch, head, room.get()); break;
            default: decode_queries<kMost, Value, Mask>(given, batch, head, room.get());
          }
        }
      }
    }
  }
  return 0;
}

int decode(const AepoDecode& given) {
  return with_type(given.dtype, [&](auto* type) {
    return with_type(given.mask_dtype, [&](auto* mask_type) {
      using Value = std::remove_pointer_t<decltype(type)>;
      using Mask = std::remove_pointer_t<decltype(mask_type)>;
      return decode_all<Value, Mask>(given);
    });
  });
}

}  // namespace

const LayerKernels AEPO_LAYERS{any_norm<false>, any_norm<true>, swiglu, swiglu_grad, rotary, decode};
