#include "cuda/decode_device.cuh"
#include "cuda/latent_tensors.h"
#include "cuda/ops.h"

namespace ea::cuda {

std::tuple<Tensor, Tensor> mla_decode(
    Tensor q_latent, Tensor q_rope, Tensor cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, double scale) {
  return mla_decode_on(
      DecodeDevice(q_latent), q_latent, q_rope, cache, cache_lengths, block_table, scale);
}

}  // namespace ea::cuda
