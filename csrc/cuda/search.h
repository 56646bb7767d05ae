// Launchers of the searches, behind nearest_code.cu.
#pragma once

#include "fill.cuh"

namespace vqk::cuda {

// whether the driver makes the tensor maps that the Hopper search needs
bool sm90_ready();
cudaError_t search_sm90(const Search& s, const Plan& plan, bool bf16, cudaStream_t stream);
cudaError_t search_mma(const Search& s, const Plan& plan, bool bf16, cudaStream_t stream);
// by the tiles of a plan for a GPU without wgmma
cudaError_t candidates(const Search& s, const Open& open, const Plan& plan, int blocks, bool bf16,
                       cudaStream_t stream);

}  // namespace vqk::cuda
