// What the compilers of both sides share.
#pragma once

#ifdef __CUDACC__
#define VQK_BOTH __host__ __device__ __forceinline__
#define VQK_UNROLL _Pragma("unroll")
#else
#define VQK_BOTH inline
#define VQK_UNROLL
#endif
