#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

// The namespace and its schemas are those of ../registration.cpp, which is loaded first.

STABLE_TORCH_LIBRARY_IMPL(efficient_attn_native, CUDA, m) {
  m.impl("attention_decode", TORCH_BOX(&ea::cuda::attention_decode));
  m.impl("mla_decode", TORCH_BOX(&ea::cuda::mla_decode));
  m.impl("lsh_codes", TORCH_BOX(&ea::cuda::lsh_codes));
  m.impl("segment_order", TORCH_BOX(&ea::cuda::segment_order));
}
