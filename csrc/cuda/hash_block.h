#pragma once

#include <cmath>

#include "common/lsh.h"
#include "cuda/machine.h"
#include "cuda/numbers.h"

// Codes of tokens in one launch, or, if means are to be subtracted, in three: projections and the sums
// of parts of them, the means of runs, codes.

namespace ea::cuda {

struct HashCall {
  const void* data;  // (batch, heads, tokens, dim); steps in elements
  int64_t batch_step, head_step, token_step;
  int32_t heads_of_sample, dim, bits;
  const Float4* normals;  // (dim, 16)
  HashParts parts;
  bool center, own;   // own: whether its own leaf is past for a token
  int32_t* codes;     // (batch * heads, tokens)
  float* projections; // (batch * heads, bits, tokens), where there are means
  float* sums;        // (batch * heads, parts, 16)
  float* means;       // (batch * heads, runs, 16)
};

// One block per head and part, a thread per token.
template <typename Element>
struct ProjectBlock {
  using Call = HashCall;
  static constexpr int kMostThreads = HashParts::kTokens;
  static constexpr int kWarps = kMostThreads / 32;

  static int64_t shared_bytes(const HashCall& call) {
    return (call.dim + kWarps) * kMostBits * sizeof(float);
  }

  EA_DEVICE static void run(const HashCall& call, int64_t block, char* shared) {
    const int64_t head = block / call.parts.parts;
    const int32_t part = int32_t(block % call.parts.parts);
    auto* normals = reinterpret_cast<Float4*>(shared);
    for (int i = thread(); i < call.dim * 4; i += kMostThreads) normals[i] = call.normals[i];
    sync_block();

    const int32_t token = call.parts.part_begin(part) + thread();
    const bool is_token = token < call.parts.part_end(part);
    float projections[kMostBits] = {};
    if (is_token) project(call, head, token, normals, projections);
    if (!call.center) {
      const float zeros[kMostBits] = {};
      const uint32_t code = sign_code(projections, zeros, call.bits);
      if (is_token) call.codes[head * call.parts.tokens + token] = int32_t(code);
      return;
    }
    auto* sums = reinterpret_cast<float*>(shared) + call.dim * kMostBits;
#pragma unroll
    for (int j = 0; j < kMostBits; ++j) {
      if (j >= call.bits) continue;
      if (is_token) {
        call.projections[(head * call.bits + j) * call.parts.tokens + token] = projections[j];
      }
      float sum = projections[j];
      for (int bit = 16; bit > 0; bit /= 2) sum += shuffle(sum, lane() ^ bit);
      if (lane() == 0) sums[warp() * kMostBits + j] = sum;
    }
    sync_block();
    if (thread() < call.bits) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += sums[w * kMostBits + thread()];
      call.sums[(head * call.parts.parts + part) * kMostBits + thread()] = sum;
    }
  }

 private:
  EA_DEVICE static void project(const HashCall& call, int64_t head, int32_t token,
                                const Float4* normals, float (&projections)[kMostBits]) {
    const int64_t row = head / call.heads_of_sample * call.batch_step +
                        head % call.heads_of_sample * call.head_step + token * call.token_step;
    const auto* granules =
        reinterpret_cast<const Granule*>(static_cast<const Element*>(call.data) + row);
    for (int32_t d = 0; d < call.dim; d += kNumbers<Element>) {
      const Granule granule = granules[d / kNumbers<Element>];
#pragma unroll
      for (int i = 0; i < kNumbers<Element>; ++i) {
        const float x = number_of(granule, i, Element{});
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (4 * c >= call.bits) continue;
          const Float4 columns = normals[(d + i) * 4 + c];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            projections[4 * c + j] = fmaf(x, columns.x[j], projections[4 * c + j]);
          }
        }
      }
    }
  }
};

// One block per head: sums of parts to the means of runs. A thread adds up some neighbouring parts for one
// bit; later parts add what threads before it have found.
struct MeansBlock {
  using Call = HashCall;
  static constexpr int kShares = 32, kMostThreads = kShares * kMostBits;

  static int64_t shared_bytes(const HashCall&) { return kMostThreads * sizeof(double); }

  EA_DEVICE static void run(const HashCall& call, int64_t head, char* shared) {
    auto* totals = reinterpret_cast<double*>(shared);
    const HashParts& parts = call.parts;
    const int bit = thread() % kMostBits, share = thread() / kMostBits;
    const bool is_bit = bit < call.bits;
    const int32_t each = ceil_div(parts.parts, kShares);
    const int32_t begin = share * each, end = begin + each < parts.parts ? begin + each : parts.parts;
    const float* sums = call.sums + head * parts.parts * kMostBits + bit;
    float* means = call.means + head * parts.runs * kMostBits + bit;

    double sum = 0;
    for (int32_t p = begin; is_bit && p < end; ++p) sum += sums[int64_t(p) * kMostBits];
    totals[thread()] = sum;
    sync_block();
    sum = 0;
    for (int s = 0; s < share; ++s) sum += totals[s * kMostBits + bit];
    for (int32_t p = begin; is_bit && p < end; ++p) {
      const int32_t run = parts.run_of_part(p);
      const int32_t past = call.own ? parts.run_end(run) : parts.run_begin(run);
      const double before = sum;
      sum += sums[int64_t(p) * kMostBits];
      if (parts.leaf == 0) {
        if (p + 1 == parts.parts) means[0] = float(sum / parts.tokens);
      } else if (call.own ? p + 1 == parts.parts || parts.begins_run(p + 1) : parts.begins_run(p)) {
        means[int64_t(run) * kMostBits] = float((call.own ? sum : before) / (past > 0 ? past : 1));
      }
    }
  }
};

// A thread per token: codes of projections against means.
struct CodesBlock {
  using Call = HashCall;
  static constexpr int kMostThreads = 256;

  static int64_t shared_bytes(const HashCall&) { return 0; }
  static int64_t blocks_of_head(const HashCall& call) {
    return ceil_div(call.parts.tokens, kMostThreads);
  }

  EA_DEVICE static void run(const HashCall& call, int64_t block, char*) {
    const int64_t blocks = ceil_div(call.parts.tokens, kMostThreads), head = block / blocks;
    const int32_t token = int32_t(block % blocks) * kMostThreads + thread();
    if (token >= call.parts.tokens) return;
    const float* mean =
        call.means + (head * call.parts.runs + call.parts.run_of(token)) * kMostBits;
    float projections[kMostBits], thresholds[kMostBits];
#pragma unroll
    for (int j = 0; j < kMostBits; ++j) {
      if (j >= call.bits) continue;
      projections[j] = call.projections[(head * call.bits + j) * call.parts.tokens + token];
      thresholds[j] = mean[j];
    }
    call.codes[head * call.parts.tokens + token] =
        int32_t(sign_code(projections, thresholds, call.bits));
  }
};

}  // namespace ea::cuda
