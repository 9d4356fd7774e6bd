#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

// Native ops live in a namespace of their own; efficient_attn/ops/native.py puts them in place of the
// portable ones, after it has compared the schemas, and can take them out again.

STABLE_TORCH_LIBRARY(efficient_attn_native, m) {
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_attn_native, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&ea::cpu::merge_states));
}
