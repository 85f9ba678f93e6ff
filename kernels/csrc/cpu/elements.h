// Vectors at the end of an array, and arrays of a dtype that is known only at run time.
#pragma once

#include <algorithm>

#include "rows.h"
#include "vector.h"

namespace {

// Loads a vector of which only `count` elements exist; the other lanes are 0.
template <typename Value>
inline Floats load_some(const Value* from, std::int64_t count) {
  if (count >= kLanes) return load(from);
  Value padded[kLanes] = {};
  std::copy(from, from + count, padded);
  return load(padded);
}

template <typename Value>
inline void store_some(Value* to, Floats value, std::int64_t count) {
  if (count >= kLanes) return store(to, value);
  Value padded[kLanes];
  store(padded, value);
  std::copy(padded, padded + count, to);
}

// Calls with a null pointer of a dtype's C++ type; returns 1 for an unknown dtype.
template <typename Call>
inline int with_type(std::int32_t dtype, Call call) {
  switch (dtype) {
    case kFloat32: return call(static_cast<float*>(nullptr));
    case kBFloat16: return call(static_cast<BFloat16*>(nullptr));
    case kFloat16: return call(static_cast<Float16*>(nullptr));
    default: return 1;
  }
}

}  // namespace
