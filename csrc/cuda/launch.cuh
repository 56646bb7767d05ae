// Launches, each checked.
#pragma once

#include <cuda_runtime.h>

namespace vqk::cuda {

struct Launch {
  dim3 grid, block;
  int shared;
  cudaStream_t stream;
  unsigned int cluster = 1;
};

// an error that is reported here must not be met again by whoever asks next
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  if (how.shared > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared);
    if (error != cudaSuccess) return taken(error);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = how.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = (size_t)how.shared;
  config.stream = how.stream;
  config.attrs = &cluster;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  return taken(cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...));
}

}  // namespace vqk::cuda
