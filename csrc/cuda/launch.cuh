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

template <class... Parameters, class... Arguments>
cudaError_t launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  if (how.shared > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster;
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
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace vqk::cuda
