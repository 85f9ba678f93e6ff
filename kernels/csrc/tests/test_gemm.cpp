// Matrix products through their C interface, against sums in double.
//
// Every buffer has exactly the size the interface asks for, so that AddressSanitizer sees a stray
// access. Operands are row-major or column-major, with NaN between rows that are an odd number
// apart.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../cpu/gemm.h"
#include "buffer.h"

namespace {

constexpr int kSkipped = 77;
int failures = 0;

struct Matrix {
  std::int64_t rows, columns, row_stride, column_stride;
  Buffer buffer;

  Matrix(std::int32_t dtype, std::int64_t rows, std::int64_t columns, bool by_rows)
      : rows(rows), columns(columns), row_stride(by_rows ? columns + 3 : 1),
        column_stride(by_rows ? 1 : rows + 3),
        buffer(dtype, (rows - 1) * row_stride + (columns - 1) * column_stride + 1) {}
  AepoMatrix view() { return {buffer.at(0), buffer.dtype, row_stride, column_stride}; }
  float get(std::int64_t i, std::int64_t j) {
    return buffer.get(i * row_stride + j * column_stride);
  }

  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        buffer.set(i * row_stride + j * column_stride, normal(random));
      }
    }
  }
};

void check(std::int32_t left_dtype, std::int32_t right_dtype, std::int32_t dtype, int layout,
           bool add, std::int64_t rows, std::int64_t inner, std::int64_t columns) {
  std::mt19937 random(static_cast<unsigned>(rows * 131 + inner * 17 + columns));
  Matrix left(left_dtype, rows, inner, layout & 1), right(right_dtype, inner, columns, layout & 2);
  left.fill(random);
  right.fill(random);
  std::vector<unsigned char> first;
  for (const int threads : {1, 2, 5, 8}) {
    Matrix out(dtype, rows, columns, true);
    std::mt19937 before(1);
    if (add) out.fill(before);
    Matrix old = out;
    const AepoGemm gemm{left.view(), right.view(), out.buffer.at(0), dtype, threads, add,
                        out.row_stride, rows, inner, columns};
    if (aepo_gemm(&gemm) != 0) ++failures;
    if (first.empty()) first = out.buffer.bytes;
    if (out.buffer.bytes != first) {
      ++failures;
      std::printf("%d threads give other bits\n", threads);
    }
    for (std::int64_t i = 0; threads == 1 && i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        double truth = add ? old.get(i, j) : 0, size = std::fabs(truth);
        for (std::int64_t k = 0; k < inner; ++k) {
          const double product = double(left.get(i, k)) * right.get(k, j);
          truth += product;
          size += std::fabs(product);
        }
        // A chain of 192 roundings, those of the chains' sums, and the last one.
        const double off = (194 + inner / 192.0) * 0x1p-24 * size + unit_of(dtype) * std::fabs(truth);
        if (std::fabs(out.get(i, j) - truth) <= off) continue;
        if (++failures < 20) {
          std::printf("%ld x %ld x %ld at %ld, %ld: %g, not %g\n", long(rows), long(inner),
                      long(columns), long(i), long(j), out.get(i, j), truth);
        }
      }
    }
  }
}

}  // namespace

int main() {
  const float two = 2, three = 3;
  float six = 0;
  const AepoGemm one{{&two, kFloat32, 1, 1}, {&three, kFloat32, 1, 1}, &six, kFloat32, 1, 0, 1, 1, 1, 1};
  if (aepo_gemm(&one) == 2) {
    std::puts("skipped: no AVX2");
    return kSkipped;
  }
  if (six != 6) ++failures;
  AepoGemm unknown = one;
  unknown.left.dtype = 7;
  if (aepo_gemm(&unknown) != 1) ++failures;
  const std::int64_t shapes[][3] = {{1, 1, 1},    {1, 9, 40},    {6, 8, 16},    {7, 17, 15},
                                    {13, 600, 33}, {130, 20, 70}, {50, 193, 530}, {250, 1, 17},
                                    {2, 64, 1530}};  // at 5 threads the widest tiles
  for (const auto& [rows, inner, columns] : shapes) {
    for (int layout = 0; layout < 4; ++layout) {
      for (const std::int32_t dtype : {kFloat32, kBFloat16, kFloat16}) {
        check(dtype, dtype, dtype, layout, false, rows, inner, columns);
        check(kFloat32, dtype, kFloat32, layout, true, rows, inner, columns);
        check(dtype, kFloat32, dtype, layout, true, rows, inner, columns);
      }
    }
  }
  if (failures == 0) std::puts("ok");
  return failures != 0;
}
