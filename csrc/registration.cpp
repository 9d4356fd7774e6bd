#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "emulated/ops.h"

// Native ops live in a namespace of their own; efficient_attn/ops/native.py puts them in place of the
// portable ones, after it has compared the schemas, and can take them out again.

// The fields of a HyperAttention plan.
#define EA_HYPER_PLAN                                                                           \
  "Tensor key_order, Tensor key_rank, Tensor band_start, Tensor band_end, Tensor block_rows, "  \
  "Tensor block_first, Tensor block_sample, Tensor sample_keys, Tensor sample_log_weight, "     \
  "bool causal, SymInt leaf_size, SymInt window, SymInt sinks, SymInt block_size, "             \
  "bool samples_by_leaf"

STABLE_TORCH_LIBRARY(efficient_attn_native, m) {
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, "
      "Tensor? block_table, Tensor? q_to_k, Tensor? q_to_v, SymInt? window_left, "
      "float scale, float softcap) -> (Tensor out, Tensor lse)");
  m.def(
      "mla_decode(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor cache_lengths, "
      "Tensor? block_table, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "hyper_attention(Tensor query, Tensor key, Tensor value, " EA_HYPER_PLAN
      ", float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "hyper_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor out, Tensor lse, " EA_HYPER_PLAN
      ", float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "lsh_codes(Tensor x, Tensor normals, SymInt bits, bool center, SymInt leaf, SymInt first, "
      "bool own) -> Tensor");
  m.def(
      "segment_order(Tensor codes, SymInt bins, SymInt[] sizes, SymInt tokens, SymInt first) -> "
      "(Tensor order, Tensor rank)");
  m.def(
      "selective_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, "
      "Tensor? block_table, Tensor? q_to_k, Tensor? q_to_v, SymInt? window_left, "
      "float scale, float softcap, SymInt? top_values, float dropped_mass) "
      "-> (Tensor out, Tensor lse, Tensor kept_mass)");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_attn_native, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&ea::cpu::merge_states));
  m.impl("attention_decode", TORCH_BOX(&ea::cpu::attention_decode));
  m.impl("mla_decode", TORCH_BOX(&ea::cpu::mla_decode));
  m.impl("hyper_attention", TORCH_BOX(&ea::cpu::hyper_attention));
  m.impl("hyper_attention_backward", TORCH_BOX(&ea::cpu::hyper_attention_backward));
  m.impl("lsh_codes", TORCH_BOX(&ea::cpu::lsh_codes));
  m.impl("segment_order", TORCH_BOX(&ea::cpu::segment_order));
  m.impl("selective_decode", TORCH_BOX(&ea::cpu::selective_decode));
}

// The CUDA ops on a machine that is emulated, for tests.
STABLE_TORCH_LIBRARY(efficient_attn_emulated, m) {
  m.def(
      "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, "
      "Tensor? block_table, Tensor? q_to_k, Tensor? q_to_v, SymInt? window_left, "
      "float scale, float softcap, SymInt blocks, SymInt seed) -> (Tensor out, Tensor lse)");
  m.def(
      "mla_decode(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor cache_lengths, "
      "Tensor? block_table, float scale, SymInt blocks, SymInt seed) -> (Tensor out, Tensor lse)");
  m.def(
      "lsh_codes(Tensor x, Tensor normals, SymInt bits, bool center, SymInt leaf, SymInt first, "
      "bool own, SymInt seed) -> Tensor");
  m.def(
      "segment_order(Tensor codes, SymInt bins, SymInt[] sizes, SymInt tokens, SymInt first, "
      "SymInt processors, SymInt shared_memory, SymInt seed) -> (Tensor order, Tensor rank)");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_attn_emulated, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&ea::cuda::emulated::attention_decode));
  m.impl("mla_decode", TORCH_BOX(&ea::cuda::emulated::mla_decode));
  m.impl("lsh_codes", TORCH_BOX(&ea::cuda::emulated::lsh_codes));
  m.impl("segment_order", TORCH_BOX(&ea::cuda::emulated::segment_order));
}
