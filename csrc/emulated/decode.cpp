#include "cuda/attention_tensors.h"
#include "cuda/latent_tensors.h"
#include "emulated/ops.h"

namespace ea::cuda::emulated {
namespace {

struct DecodeMachine {
  int64_t blocks_at_a_time, seed;

  template <typename Kernel>
  int64_t blocks() const {
    return blocks_at_a_time;
  }

  template <typename Kernel>
  void launch(const DecodeCall& call) const {
    emulated::launch(int(call.num_blocks()), kDecodeThreads, sizeof(typename Kernel::Shared),
                     uint64_t(seed),
                     [&](int block, char* shared) { Kernel::run(call, block, shared); });
  }
};

}  // namespace

std::tuple<Tensor, Tensor> attention_decode(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, std::optional<Tensor> q_to_k, std::optional<Tensor> q_to_v,
    std::optional<int64_t> window_left, double scale, double softcap, int64_t blocks,
    int64_t seed) {
  return attention_decode_on(DecodeMachine{blocks, seed}, query, key_cache, value_cache,
                             cache_lengths, block_table, q_to_k, q_to_v, window_left, scale,
                             softcap);
}

std::tuple<Tensor, Tensor> mla_decode(
    Tensor q_latent, Tensor q_rope, Tensor cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, double scale, int64_t blocks, int64_t seed) {
  return mla_decode_on(DecodeMachine{blocks, seed}, q_latent, q_rope, cache, cache_lengths,
                       block_table, scale);
}

}  // namespace ea::cuda::emulated
