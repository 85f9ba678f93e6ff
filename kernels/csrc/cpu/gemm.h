// Matrix products on CPUs with AVX2 and no instructions for half precision: the C interface.
#pragma once

#include <cstdint>

#include "rows.h"

// A matrix. Strides are in elements, and one of the two is 1.
struct AepoMatrix {
  const void* data;
  std::int32_t dtype;
  std::int64_t row_stride, column_stride;
};

// out = left @ right, or out + left @ right where `add` is set. left: [rows, inner]. right: [inner,
// columns]. out: [rows, columns]. Each size is at least 1. Sums are fp32 and rounded once. Their
// order, and so the bits, do not depend on the number of threads.
struct AepoGemm {
  AepoMatrix left, right;
  void* out;  // unit stride along the columns
  std::int32_t dtype, threads, add;
  std::int64_t row_stride, rows, inner, columns;
};

extern "C" {
// Returns 0, or 1 where a dtype is unknown, 2 where the processor lacks AVX2.
AEPO_EXPORT int aepo_gemm(const AepoGemm* gemm);
}
