// Numbers of one dtype for the tests.
#pragma once

#include <cstring>
#include <vector>

#include "../cpu/rows.h"
#include "../cpu/vector.h"

namespace {

// Elements of one dtype in exactly as many bytes; conversions are test_vector.cpp's concern.
struct Buffer {
  std::int32_t dtype;
  std::vector<unsigned char> bytes;

  Buffer(std::int32_t dtype, std::int64_t count)
      : dtype(dtype), bytes(count * size(), 255) {}  // NaN in each of them
  std::int64_t size() const { return dtype == kFloat32 ? 4 : 2; }
  unsigned char* at(std::int64_t index) { return bytes.data() + index * size(); }

  void set(std::int64_t index, float value) {
    BFloat16 brain[kLanes];
    Float16 half[kLanes];
    store(brain, all(value));
    store(half, all(value));
    const void* from = &value;
    if (dtype != kFloat32) from = dtype == kBFloat16 ? static_cast<const void*>(brain) : half;
    std::memcpy(at(index), from, size());
  }

  float get(std::int64_t index) {
    float value;
    std::uint16_t half;
    if (dtype == kFloat32) {
      std::memcpy(&value, at(index), sizeof value);
      return value;
    }
    std::memcpy(&half, at(index), sizeof half);
    static const std::vector<float> kBrains = table<BFloat16>(), kHalves = table<Float16>();
    return (dtype == kBFloat16 ? kBrains : kHalves)[half];
  }

  template <typename Half>
  static std::vector<float> table() {
    std::vector<float> values;
    for (std::uint32_t word = 0; word < 65536; ++word) {
      Half halves[kLanes] = {{std::uint16_t(word)}};
      values.push_back(load(halves)[0]);
    }
    return values;
  }
};

// What rounding to a dtype is off by, as a share of the number; 0 for float32.
inline double unit_of(std::int32_t dtype) {
  return dtype == kFloat32 ? 0 : dtype == kBFloat16 ? 0x1p-8 : 0x1p-11;
}

}  // namespace
