#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace ea::cuda {

// The device of a tensor, made current for as long as this lives, and the stream that torch is using.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream_(current_stream(index_)) {}

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }

  // How many blocks of a kernel the device runs at a time.
  template <typename... Parameters>
  int64_t resident_blocks(
      void (*kernel)(Parameters...), int threads, int64_t shared_bytes) const {
    allow_shared_memory(kernel, shared_bytes);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks, kernel, threads, size_t(shared_bytes)));
    return int64_t(blocks) * attribute(cudaDevAttrMultiProcessorCount);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(
      void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
      const Arguments&... arguments) const {
    if (blocks == 0) return;
    allow_shared_memory(kernel, shared_bytes);
    kernel<<<unsigned(blocks), unsigned(threads), size_t(shared_bytes), stream_>>>(arguments...);
    check(cudaGetLastError());
  }

 private:
  static cudaStream_t current_stream(int32_t index) {
    // What is built against a CPU build of torch cannot be linked to this function, and what is linked to it
    // cannot be loaded by a CPU build.
    using CurrentStream = AOTITorchError (*)(int32_t, void**);
    static const auto ask = [] {
      void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<CurrentStream>(
          torch ? dlsym(torch, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    STD_TORCH_CHECK(ask, "this build of torch has no CUDA streams.");
    void* stream = nullptr;
    STD_TORCH_CHECK(ask(index, &stream) == 0, "torch has no stream for device ", index, ".");
    return static_cast<cudaStream_t>(stream);
  }

  // More than 48 KiB have to be asked for.
  template <typename... Parameters>
  static void allow_shared_memory(void (*kernel)(Parameters...), int64_t bytes) {
    if (bytes <= 48 << 10) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  }

  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA says: ", cudaGetErrorString(error), ".");
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace ea::cuda
