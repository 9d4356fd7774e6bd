#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <random>
#include <tuple>

#include "common/ticket.h"
#include "cuda/decode_call.h"
#include "cuda/machine.h"
#include "integer_tensors.h"

// Tensors to the plain data that kernels are told, for any machine that runs them: a device, or the
// emulated one. A machine has blocks<Kernel>(), how many it runs at a time, and launch<Kernel>(call).
// attention_tensors.h and latent_tensors.h are the two ops.

namespace ea::cuda {
namespace {  // What holds tensors has no visibility to give.

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// So many are counted in 32 bits.
constexpr int64_t kMostTokens = int64_t(1) << 30;

// A number for the tickets of a call that no other call of this process has, also when it is replayed.
inline uint64_t new_call_number() {
  static std::atomic<uint64_t> last{std::random_device{}()};
  return 1 + last.fetch_add(1) % (kMostCalls - 1);
}

inline CachedRows rows_of_cache(const char* op, const Tensor& cache) {
  const int64_t size = 2, granule = sizeof(Granule);
  const int64_t head_step = cache.dim() == 4 ? cache.stride(1) : 0;
  const auto* data = static_cast<const char*>(cache.const_data_ptr());
  CachedRows rows{data, cache.stride(0) * size, head_step * size, cache.stride(-2) * size};
  const bool whole_granules = reinterpret_cast<uintptr_t>(data) % granule == 0 &&
                              rows.page_step % granule == 0 && rows.head_step % granule == 0 &&
                              rows.row_step % granule == 0 && cache.stride(-1) == 1;
  STD_TORCH_CHECK(cache.numel() == 0 || whole_granules, op,
                  " got a cache whose rows do not all begin at multiples of 16 bytes.");
  return rows;
}

// What lies next to each other in a query is loaded two by two.
inline void check_query(const char* op, const Tensor& query) {
  const bool even = reinterpret_cast<uintptr_t>(query.const_data_ptr()) % 4 == 0 &&
                    query.stride(0) % 2 == 0 && query.stride(1) % 2 == 0 &&
                    query.stride(2) % 2 == 0 && query.stride(3) == 1;
  STD_TORCH_CHECK(query.numel() == 0 || even, op,
                  " got a query whose rows do not all begin at multiples of 4 bytes.");
}

inline void set_query(const char* op, DecodeCall& call, const Tensor& query) {
  check_query(op, query);
  call.batch = int(query.size(0));
  call.heads = int(query.size(1));
  call.tokens = int(query.size(2));
  call.query = query.const_data_ptr();
  call.query_batch_step = query.stride(0);
  call.query_head_step = query.stride(1);
  call.query_token_step = query.stride(2);
}

inline void set_cache(const char* op, DecodeCall& call, const Tensor& key, const Tensor& value,
                      const Tensor& lengths, const std::optional<Tensor>& table, double scale) {
  call.key = rows_of_cache(op, key);
  call.value = rows_of_cache(op, value);
  call.lengths = integers(lengths);
  call.capacity = key.size(-2);
  if (table) {
    call.table = {integers(*table), table->stride(0), key.size(-2)};
    call.capacity *= table->size(1);
  }
  STD_TORCH_CHECK(lengths.size(0) == call.batch &&
                      (table ? table->size(0) : key.size(0)) == call.batch,
                  op, " must get one length and one row of the cache or of block_table for each of ",
                  call.batch, " sequences.");
  STD_TORCH_CHECK(call.capacity <= kMostTokens, op, " got room for ", call.capacity,
                  " tokens of a sequence; there may be ", kMostTokens, ".");
  call.log2_scale = float(scale * 1.4426950408889634);
}

// A map as int32 without gaps; the step from one sample to the next is 0 if all have one.
inline std::optional<Tensor> set_map(const std::optional<Tensor>& map, int heads,
                                     const int32_t** data, int64_t* step) {
  if (!map) return map;
  const Tensor index = torch::stable::contiguous(*map);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.size(-1) == heads,
                  "a head map must be int32 and have one entry for each query head.");
  *data = static_cast<const int32_t*>(index.const_data_ptr());
  *step = index.dim() == 2 ? heads : 0;
  return index;
}

template <typename Kernel, typename Machine>
std::tuple<Tensor, Tensor> run(
    const Machine& machine, DecodeCall call, const Tensor& like, int64_t value_dim) {
  const int64_t batch = call.batch, heads = call.heads, tokens = call.tokens;
  Tensor out = torch::stable::new_empty(like, {batch, tokens, heads, value_dim});
  Tensor lse = torch::stable::new_empty(like, {batch, heads, tokens}, ScalarType::Float);
  const std::tuple<Tensor, Tensor> results{torch::stable::transpose(out, 1, 2), lse};
  if (call.num_rows() == 0) return results;
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());

  call.num_splits = fewest_splits(batch * call.num_tiles, machine.template blocks<Kernel>(),
                                  int(call.capacity), call.smallest_split, kMostSplits);
  std::optional<Tensor> parts, part_lses, tickets;
  if (call.num_splits > 1) {
    const int64_t rows = call.num_splits * call.num_rows();
    parts = torch::stable::new_empty(like, {rows, value_dim}, ScalarType::Float);
    part_lses = torch::stable::new_empty(like, {rows}, ScalarType::Float);
    tickets = torch::stable::new_empty(
        like, {batch * call.num_tiles * call.tickets_per_tile()}, ScalarType::Long);
    call.parts = static_cast<float*>(parts->mutable_data_ptr());
    call.part_lses = static_cast<float*>(part_lses->mutable_data_ptr());
    call.tickets = static_cast<uint64_t*>(tickets->mutable_data_ptr());
    call.number = new_call_number();
  }
  machine.template launch<Kernel>(call);
  return results;
}

// Calls act(Element{}) for the element type of a tensor.
template <typename Act>
auto for_dtype(const char* op, const Tensor& query, const Act& act) {
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::BFloat16 ||
                      query.scalar_type() == ScalarType::Half,
                  op, " got ", torch::headeronly::toString(query.scalar_type()),
                  "; pass bfloat16 or float16.");
  return query.scalar_type() == ScalarType::Half ? act(Half{}) : act(BFloat16{});
}

}  // namespace
}  // namespace ea::cuda
