// The C interface: which instruction sets there are, which run here, and calls into one of them.

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "columns_kernel.h"
#include "gemm_kernel.h"
#include "layers.h"
#include "layers_kernel.h"
#include "rows.h"
#include "rows_kernel.h"

namespace {

struct Isa {
  const char* name;
  const RowKernels* rows;
  const ColumnKernels* columns;
  const LayerKernels* layers;
  bool (*runs)();
};

#if defined(__aarch64__)
constexpr const char* kFirst = "neon";  // which every such processor has
#else
constexpr const char* kFirst = "portable";
#endif

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows the name f16c.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

const Isa kIsas[] = {
    {kFirst, &kPortableRows, &kPortableColumns, &kPortableLayers, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &kAvx2Rows, &kAvx2Columns, &kAvx2Layers,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
     }},
    {"avx512", &kAvx512Rows, &kAvx512Columns, &kAvx512Layers,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
};
constexpr std::int32_t kCount = sizeof kIsas / sizeof kIsas[0];

}  // namespace

extern "C" {

const char* aepo_isa_name(std::int32_t isa) {
  return isa >= 0 && isa < kCount ? kIsas[isa].name : nullptr;
}

int aepo_isa_runs(std::int32_t isa) { return isa >= 0 && isa < kCount && kIsas[isa].runs(); }

int aepo_row_stats(const AepoLogits* logits, const AepoStats* stats, const AepoState* state,
                   const AepoKept* kept, std::int32_t isa) {
  if (logits->column_stride != 1) {
    return kIsas[isa].columns->row_stats(*logits, *stats, *state, *kept);
  }
  return kIsas[isa].rows->row_stats(*logits, *stats, *state, *kept);
}

int aepo_row_grad(const AepoLogits* logits, const AepoStats* stats, const AepoCoefs* coefs,
                  const AepoGrad* grad, std::int32_t isa) {
  const bool by_columns[] = {logits->column_stride != 1, grad->column_stride != 1};
  if (by_columns[0] != by_columns[1] && logits->rows > 1 && logits->vocab > 1) return 1;
  if (by_columns[0] || by_columns[1]) {  // a single row, or column, has both layouts
    return kIsas[isa].columns->row_grad(*logits, *stats, *coefs, *grad);
  }
  return kIsas[isa].rows->row_grad(*logits, *stats, *coefs, *grad);
}

int aepo_sample_rows(const AepoLogits* logits, const AepoSample* sample, std::int32_t isa) {
  return kIsas[isa].rows->sample_rows(*logits, *sample);
}

int aepo_gemm([[maybe_unused]] const AepoGemm* gemm) {
#if defined(__x86_64__)
  if (kIsas[1].runs()) return avx2_gemm(*gemm);  // number 1 is avx2
#endif
  return 2;
}

int aepo_rms_norm(const AepoNorm* norm, std::int32_t isa) {
  return kIsas[isa].layers->rms_norm(*norm);
}

int aepo_rms_norm_grad(const AepoNorm* norm, std::int32_t isa) {
  return kIsas[isa].layers->rms_norm_grad(*norm);
}

int aepo_swiglu(const AepoSwiglu* swiglu, std::int32_t isa) {
  return kIsas[isa].layers->swiglu(*swiglu);
}

int aepo_swiglu_grad(const AepoSwiglu* swiglu, std::int32_t isa) {
  return kIsas[isa].layers->swiglu_grad(*swiglu);
}

int aepo_rotary(const AepoRotary* rotary, std::int32_t isa) {
  return kIsas[isa].layers->rotary(*rotary);
}

int aepo_decode(const AepoDecode* decode, std::int32_t isa) {
  return kIsas[isa].layers->decode(*decode);
}

}
