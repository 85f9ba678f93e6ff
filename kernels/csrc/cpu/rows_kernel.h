// The row operations on row-major logits, by instruction set; interface.cpp chooses among them.
#pragma once

#include "rows.h"

struct RowKernels {
  int (*row_stats)(const AepoLogits&, const AepoStats&, const AepoState&, const AepoKept&);
  int (*row_grad)(const AepoLogits&, const AepoStats&, const AepoCoefs&, const AepoGrad&);
  int (*sample_rows)(const AepoLogits&, const AepoSample&);
};

extern const RowKernels kPortableRows;
#if defined(__x86_64__)
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
#endif
