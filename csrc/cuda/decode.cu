#include "cuda/attention_tensors.h"
#include "cuda/decode_device.cuh"
#include "cuda/ops.h"

namespace ea::cuda {

std::tuple<Tensor, Tensor> attention_decode(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, std::optional<Tensor> q_to_k, std::optional<Tensor> q_to_v,
    std::optional<int64_t> window_left, double scale, double softcap) {
  return attention_decode_on(DecodeDevice(query), query, key_cache, value_cache, cache_lengths,
                             block_table, q_to_k, q_to_v, window_left, scale, softcap);
}

}  // namespace ea::cuda
