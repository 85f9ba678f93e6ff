// Matrix products, which AVX2 alone has; interface.cpp asks whether it runs here.
#pragma once

#include "gemm.h"

int avx2_gemm(const AepoGemm& gemm);
