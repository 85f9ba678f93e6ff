// Matrix products for AVX2; interface.cpp asks whether this machine runs AVX2.
#pragma once

#include "gemm.h"

int avx2_gemm(const AepoGemm& gemm);
