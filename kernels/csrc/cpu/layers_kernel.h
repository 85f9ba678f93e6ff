// The layers' operations, by instruction set; interface.cpp chooses among them.
#pragma once

#include "layers.h"

struct LayerKernels {
  int (*rms_norm)(const AepoNorm&);
  int (*rms_norm_grad)(const AepoNorm&);
  int (*swiglu)(const AepoSwiglu&);
  int (*swiglu_grad)(const AepoSwiglu&);
  int (*rotary)(const AepoRotary&);
  int (*decode)(const AepoDecode&);
};

extern const LayerKernels kPortableLayers;
#if defined(__x86_64__)
extern const LayerKernels kAvx2Layers;
extern const LayerKernels kAvx512Layers;
#endif
