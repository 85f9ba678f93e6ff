// Matrix products by packed panels in float32, compiled for AVX2 alone.
//
// The result is made tile by tile, and for each tile a block of `inner` at a time. Columns of the
// right operand are packed first, and stay in the last-level cache. Rows of the left operand are
// packed next, and stay in the second-level cache. The inner loop then takes the few rows and
// columns whose sums fit into registers. Packing upcasts half precision, so that no float32 copy of
// a whole operand is ever written to memory. The scheme is that of Goto and van de Geijn, "Anatomy
// of High-Performance Matrix Multiplication" (2008).

#include "gemm_kernel.h"

#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "elements.h"

namespace {

using Index = std::int64_t;

// Rows and columns whose sums are in registers: 12 of AVX2's 16.
constexpr int kRows = 6, kVectors = 2, kColumns = kVectors * kLanes;
// Most `inner` of a block, and rows of the left operand that are packed at once. Not measured.
constexpr Index kInner = 576, kPackedRows = 120;
// Products that are added up in registers before they join the sum so far. A longer chain rounds
// worse. Not measured.
constexpr Index kChain = 192;
// Limits for the tiles of all threads together: columns (a tile has 128 to 768) and sums that need
// a copy. Not measured.
constexpr Index kAllColumns = 1536, kAllSums = 3 << 18;
// Packing one element costs as much time as multiplying it by so many numbers. Not measured.
constexpr double kPackLeft = 5, kPackRight = 4;
constexpr std::size_t kLine = 64;  // bytes of a line of the cache

inline Index parts(Index count, Index size) { return (count + size - 1) / size; }
inline Index up(Index count, Index size) { return parts(count, size) * size; }

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Room = std::unique_ptr<float[], Free>;

Room room(Index count) {
  auto* memory = static_cast<float*>(std::aligned_alloc(64, up(4 * count, 64)));
  if (memory == nullptr && count > 0) throw std::bad_alloc();
  return Room(memory);
}

// Transposes a square of words in place. AVX2 has no single instruction for the shuffles of
// vector.h's transpose.
inline void transpose_square(__m256 (&x)[8]) {
  __m256 pairs[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 low = _mm256_unpacklo_ps(x[i], x[i + 1]), high = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const __m256 low2 = _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
    const __m256 high2 = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    pairs[i] = _mm256_shuffle_ps(low, low2, 0x44);
    pairs[i + 1] = _mm256_shuffle_ps(low, low2, 0xee);
    pairs[i + 2] = _mm256_shuffle_ps(high, high2, 0x44);
    pairs[i + 3] = _mm256_shuffle_ps(high, high2, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(pairs[i], pairs[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(pairs[i], pairs[i + 4], 0x31);
  }
}

// Packing reads short pieces, so that the processor does not foresee the next one: the code
// prefetches it.

// Packs items (rows of the left operand, or columns of the right one) into panels [inner, kWidth]
// of kWidth items each. Items beyond the last are 0. Writes up to one vector beyond the last panel.
// This function is for items that are adjacent in memory.
template <int kWidth, typename Value>
void pack_adjacent(const Value* from, Index k_stride, Index items, Index inner, float* to) {
  constexpr int kParts = (kWidth + kLanes - 1) / kLanes;
  // k at a time: their lines stay in the first-level cache although they fall into the same sets.
  constexpr Index kBlock = 8;
  for (Index start = 0; start < inner; start += kBlock) {
    const Index stop = std::min(start + kBlock, inner);
    for (Index first = 0; first < items; first += kWidth) {
      const Index left = items - first;
      float* panel = to + first * inner;
      const Value* at = from + first + start * k_stride;
      // A whole vector may reach into memory that is written next, but not into the next panel.
      if (left >= kParts * kLanes && (kWidth % kLanes == 0 || stop < inner)) {
        for (Index k = start; k < stop; ++k, at += k_stride) {
          __builtin_prefetch(at + kBlock * k_stride);
          for (int lane = 0; lane < kWidth; lane += kLanes) {
            store(panel + k * kWidth + lane, load(at + lane));
          }
        }
        continue;
      }
      for (Index k = start; k < stop; ++k, at += k_stride) {
        for (int lane = 0; lane < kWidth; lane += kLanes) {
          const Floats value = load_some(at + lane, std::max<Index>(left - lane, 0));
          store_some(panel + k * kWidth + lane, value, kWidth - lane);
        }
      }
    }
  }
}

// The same for items whose numbers for successive k are adjacent in memory.
template <int kWidth, typename Value>
void pack_across(const Value* from, Index item_stride, Index items, Index inner, float* to) {
  constexpr int kMost = kWidth < kLanes ? kWidth : kLanes;
  for (Index first = 0; first < items; first += kWidth) {
    float* panel = to + first * inner;
    for (int lane = 0; lane < kWidth; lane += kLanes) {
      const Index count = std::min<Index>(kMost, items - first - lane);
      const Value* at = from + (first + lane) * item_stride;
      Index k = 0;
      for (; count == kMost && k + kLanes <= inner; k += kLanes, at += kLanes) {
        for (int i = 0; i < kMost && k * sizeof(Value) % kLine == 0; ++i) {
          __builtin_prefetch(at + (i + kMost) * item_stride);
        }
        __m256 square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          square[i] = i < kMost ? bits<__m256>(load(at + i * item_stride)) : __m256{};
        }
        transpose_square(square);
        for (int i = 0; i < kLanes; ++i) {
          store(panel + (k + i) * kWidth + lane, bits<Floats>(square[i]));
        }
      }
      for (; k < inner; k += kLanes, at += kLanes) {
        const Index some = std::min<Index>(kLanes, inner - k);
        __m256 square[kLanes] = {};
        for (Index i = 0; i < count; ++i) {
          square[i] = bits<__m256>(load_some(at + i * item_stride, some));
        }
        transpose_square(square);
        for (Index i = 0; i < some; ++i) {
          store(panel + (k + i) * kWidth + lane, bits<Floats>(square[i]));
        }
      }
    }
  }
}

template <int kWidth>
void pack(const AepoMatrix& matrix, Index offset, Index item_stride, Index k_stride, Index items,
          Index inner, float* to) {
  with_type(matrix.dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(const_cast<void*>(matrix.data)) + offset;
    if (item_stride == 1) {
      pack_adjacent<kWidth>(from, k_stride, items, inner, to);
    } else {
      pack_across<kWidth>(from, item_stride, items, inner, to);
    }
    return 0;
  });
}

__attribute__((always_inline)) inline void add_product(const float* left, const float* right,
                                                       Floats (&sums)[kRows][kVectors]) {
  Floats columns[kVectors];
  for (int j = 0; j < kVectors; ++j) columns[j] = load(right + j * kLanes);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][j] += left[i] * columns[j];
  }
}

// out [kRows, kColumns] = a panel of rows times a panel of columns; add: out + that product. The
// function is out of line and unrolled by hand, because GCC would spill sums in some inlined
// copies.
__attribute__((noinline)) void multiply(const float* left, const float* right, Index inner,
                                        float* out, Index stride, bool add) {
  for (int i = 0; i < kRows; ++i) __builtin_prefetch(out + i * stride, 1);
  for (Index start = 0; start < inner; start += kChain, add = true) {
    const Index count = std::min(kChain, inner - start);
    Floats sums[kRows][kVectors] = {};
    for (const float* end = left + count / 2 * 2 * kRows; left != end;) {
      add_product(left, right, sums);
      add_product(left + kRows, right + kColumns, sums);
      left += 2 * kRows;
      right += 2 * kColumns;
    }
    if (count % 2 != 0) {
      add_product(left, right, sums);
      left += kRows;
      right += kColumns;
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        float* at = out + i * stride + j * kLanes;
        store(at, add ? load(at) + sums[i][j] : sums[i][j]);
      }
    }
  }
}

// The same for the last rows and columns, which may be fewer than kRows and kColumns.
void multiply_edge(const float* left, const float* right, Index inner, float* out, Index stride,
                   bool add, Index rows, Index columns) {
  float whole[kRows * kColumns] = {};
  for (Index i = 0; add && i < rows; ++i) {
    std::copy_n(out + i * stride, columns, whole + i * kColumns);
  }
  multiply(left, right, inner, whole, kColumns, add);
  for (Index i = 0; i < rows; ++i) {
    std::copy_n(whole + i * kColumns, columns, out + i * stride);
  }
}

// A part of the result: its first row and column, and its size. As a size alone: the largest part.
struct Tile {
  Index row, column, rows, columns;
};

// The product to compute. block: `inner` that is taken at a time.
struct Task {
  const AepoGemm& gemm;
  Index block;

  // Rows of a tile whose sums are kept: all of them where several blocks of k add to each sum.
  Index kept_rows(Index rows) const {
    return gemm.inner > block ? rows : std::min(rows, kPackedRows);
  }
};

// The size of tiles at which packing and uneven shares of the threads cost least.
Tile size_of_tiles(const Task& task) {
  const AepoGemm& gemm = task.gemm;
  // Packing writes whole panels.
  const Index share = kAllColumns / gemm.threads / kColumns * kColumns;
  const Index most = std::clamp<Index>(share, 128, 768);
  const Index sums = kAllSums / std::min(gemm.threads, 16);
  Tile best{};
  double least = INFINITY;
  const auto next = [](Index count) { return count < 3 ? count + 1 : count + count / 3; };
  for (Index m = 1; m == 1 || gemm.rows / m >= 8 * kRows; m = next(m)) {
    for (Index n = 1; n == 1 || gemm.columns / n >= 4 * kColumns; n = next(n)) {
      const Index rows = up(parts(gemm.rows, m), kRows);
      const Index columns = std::min(up(parts(gemm.columns, n), kColumns), most);
      if (gemm.dtype != kFloat32 && task.kept_rows(rows) * columns > sums) continue;
      const Index tiles = parts(gemm.rows, rows) * parts(gemm.columns, columns);
      const double rounds = double(parts(tiles, gemm.threads));
      const double packing = kPackLeft / double(columns) + kPackRight / double(rows);
      // The 0.05: any one thread may be held up in a tile.
      const double time = double(rows * columns) * (1 + packing) * (rounds + 0.05);
      if (time < least) {
        least = time;
        best = {0, 0, rows, columns};
      }
    }
  }
  return best;
}

template <typename Out>
void round_rows(const float* sums, Index rows, Index columns, bool add, Out* out,
                Index out_stride) {
  for (Index i = 0; i < rows; ++i, sums += columns, out += out_stride) {
    for (Index j = 0; j < columns; j += kLanes) {
      const Index count = columns - j;
      Floats value = load_some(sums + j, count);
      if (add) value += load_some(out + j, count);
      store_some(out + j, value, count);
    }
  }
}

// One thread's workspace, and its part of the work.
template <typename Out>
class Worker {
 public:
  Worker(const Task& task, const Tile& size)
      : gemm_(task.gemm),
        task_(task),
        left_(room(std::min(size.rows, kPackedRows) * task.block + kLanes)),
        right_(room(size.columns * task.block + kLanes)),
        sums_(room(kInPlace ? 0 : task.kept_rows(size.rows) * size.columns)) {}

  void multiply_tile(const Tile& tile) {
    const AepoMatrix &left = gemm_.left, &right = gemm_.right;
    for (Index k = 0; k < gemm_.inner; k += task_.block) {
      const Index inner = std::min(task_.block, gemm_.inner - k);
      pack<kColumns>(right, k * right.row_stride + tile.column * right.column_stride,
                     right.column_stride, right.row_stride, tile.columns, inner, right_.get());
      for (Index top = 0; top < tile.rows; top += kPackedRows) {
        const Tile part{tile.row + top, tile.column, std::min(kPackedRows, tile.rows - top),
                        tile.columns};
        pack<kRows>(left, part.row * left.row_stride + k * left.column_stride, left.row_stride,
                    left.column_stride, part.rows, inner, left_.get());
        multiply_part(part, top, k, inner);
      }
    }
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<Out, float>;

  // Adds a block of `inner` from k on to a tile's rows from `top` on.
  void multiply_part(const Tile& part, Index top, Index k, Index inner) {
    Out* out = static_cast<Out*>(gemm_.out) + part.row * gemm_.row_stride + part.column;
    if constexpr (kInPlace) {
      multiply_panels(part, inner, out, gemm_.row_stride, gemm_.add || k > 0);
    } else {
      float* sums = sums_.get() + (gemm_.inner > task_.block ? top * part.columns : 0);
      multiply_panels(part, inner, sums, part.columns, k > 0);
      if (k + inner < gemm_.inner) return;
      round_rows(sums, part.rows, part.columns, gemm_.add, out, gemm_.row_stride);
    }
  }

  void multiply_panels(const Tile& part, Index inner, float* out, Index stride, bool add) {
    for (Index j = 0; j < part.columns; j += kColumns) {
      const float* columns = right_.get() + j * inner;
      const Index wide = std::min<Index>(kColumns, part.columns - j);
      for (Index i = 0; i < part.rows; i += kRows) {
        const float* rows = left_.get() + i * inner;
        const Index some = std::min<Index>(kRows, part.rows - i);
        if (some == kRows && wide == kColumns) {
          multiply(rows, columns, inner, out + i * stride + j, stride, add);
        } else {
          multiply_edge(rows, columns, inner, out + i * stride + j, stride, add, some, wide);
        }
      }
    }
  }

  const AepoGemm& gemm_;
  const Task& task_;
  const Room left_, right_, sums_;
};

template <typename Out>
int multiply_all(const AepoGemm& gemm) {
  // All blocks have one size, which depends on `inner` alone. So do the roundings of the sums.
  const Task task{gemm, up(parts(gemm.inner, parts(gemm.inner, kInner)), 8)};
  const Tile size = size_of_tiles(task);
  const Index across = parts(gemm.columns, size.columns);
  const Index tiles = parts(gemm.rows, size.rows) * across;
#pragma omp parallel num_threads(gemm.threads)
  {
    Worker<Out> worker(task, size);
#pragma omp for schedule(dynamic)
    for (Index tile = 0; tile < tiles; ++tile) {
      const Index row = tile / across * size.rows, column = tile % across * size.columns;
      worker.multiply_tile({row, column, std::min(size.rows, gemm.rows - row),
                            std::min(size.columns, gemm.columns - column)});
    }
  }
  return 0;
}

}  // namespace

int avx2_gemm(const AepoGemm& gemm) {
  const auto known = [](auto*) { return 0; };
  if (with_type(gemm.left.dtype, known) || with_type(gemm.right.dtype, known)) return 1;
  return with_type(gemm.dtype, [&](auto* type) {
    return multiply_all<std::remove_pointer_t<decltype(type)>>(gemm);
  });
}
