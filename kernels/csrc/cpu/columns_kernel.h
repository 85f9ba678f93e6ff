// The row operations on column-major logits; interface.cpp chooses between these and rows_kernel.h.
#pragma once

#include "rows.h"

struct ColumnKernels {
  int (*row_stats)(const AepoLogits&, const AepoStats&, const AepoState&, const AepoKept&);
  int (*row_grad)(const AepoLogits&, const AepoStats&, const AepoCoefs&, const AepoGrad&);
};

extern const ColumnKernels kPortableColumns;
#if defined(__x86_64__)
extern const ColumnKernels kAvx2Columns;
extern const ColumnKernels kAvx512Columns;
#endif
