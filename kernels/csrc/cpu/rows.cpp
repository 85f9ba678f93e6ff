// The C interface: which instruction sets there are, which run here, and calls into one of them.

#include "rows.h"

#include "rows_kernel.h"

namespace {

struct Isa {
  const char* name;
  const RowKernels* kernels;
  bool (*runs)();
};

#if defined(__aarch64__)
constexpr const char* kFirst = "neon";  // which every such processor has
#else
constexpr const char* kFirst = "portable";
#endif

const Isa kIsas[] = {
    {kFirst, &kPortableRows, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &kAvx2Rows,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"avx512", &kAvx512Rows,
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
                   std::int32_t isa) {
  return kIsas[isa].kernels->row_stats(*logits, *stats, *state);
}

int aepo_row_grad(const AepoLogits* logits, const AepoStats* stats, const AepoCoefs* coefs,
                  const AepoGrad* grad, std::int32_t isa) {
  return kIsas[isa].kernels->row_grad(*logits, *stats, *coefs, *grad);
}

int aepo_sample_rows(const AepoLogits* logits, const AepoSample* sample, std::int32_t isa) {
  return kIsas[isa].kernels->sample_rows(*logits, *sample);
}

}
