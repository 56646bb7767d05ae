// Eight features of a strided row at a time, exact points, and the contract's own distance.
#pragma once

#include "certificate.h"
#include "device.cuh"
#include "plan.h"

namespace vqk::cuda {

constexpr unsigned int kAll = 0xffffffffu;

// rows whose groups of eight features are 16-byte (float32: two of them) aligned and whole
inline bool vectors(const Rows& r) {
  const int64_t size = size_of(r.type);
  return r.stride_feature == 1 && r.features % 8 == 0 && (uintptr_t)r.data % 16 == 0 &&
         r.stride_inner * size % 16 == 0 && r.stride_batch * size % 16 == 0;
}

template <class H>
__device__ __forceinline__ H half_of(float v);
template <>
__device__ __forceinline__ __half half_of<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 half_of<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
__device__ __forceinline__ float float_from(__half v) { return __half2float(v); }
__device__ __forceinline__ float float_from(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void unpack(uint32_t word, Type type, float* v) {
  if (type == Type::bf16) {
    v[0] = __uint_as_float(word << 16);
    v[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    __half2 h;
    memcpy(&h, &word, 4);
    const float2 f = __half22float2(h);
    v[0] = f.x;
    v[1] = f.y;
  }
}

__device__ __forceinline__ float float_from(float v) { return v; }

template <class T>
__device__ __forceinline__ void load8_as(const Rows& r, int64_t from, int64_t k, float* v) {
  const T* const p = (const T*)r.data + from + k * r.stride_feature;
  const int left = r.features - k < 8 ? (int)(r.features - k) : 8;
#pragma unroll
  for (int q = 0; q < 8; ++q) v[q] = q < left ? float_from(p[q * r.stride_feature]) : 0.0f;
}

// the same where the eight are whole and aligned
__device__ __forceinline__ void load8_vector(const Rows& r, int64_t from, int64_t k, float* v) {
  if (r.type == Type::f32) {
    const float4* const p = (const float4*)((const float*)r.data + from + k);
    const float4 a = __ldg(p), b = __ldg(p + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    const uint4 w = __ldg((const uint4*)((const uint16_t*)r.data + from + k));
    unpack(w.x, r.type, v);
    unpack(w.y, r.type, v + 2);
    unpack(w.z, r.type, v + 4);
    unpack(w.w, r.type, v + 6);
  }
}

// features k .. k + 7 as float32, which is exact; 0 past the last. kWhole: `vector` is known to hold
template <bool kWhole = false>
__device__ __forceinline__ void load8(const Rows& r, bool vector, int64_t from, int64_t k, float* v) {
  if (kWhole || (vector && k < r.features)) {
    load8_vector(r, from, k, v);
    return;
  }
  switch (r.type) {
    case Type::f16: load8_as<__half>(r, from, k, v); break;
    case Type::bf16: load8_as<__nv_bfloat16>(r, from, k, v); break;
    default: load8_as<float>(r, from, k, v);
  }
}

// where the points come from
struct Points {
  Rows codebook, dither;
  bool vector;
};

inline Points points_of(const NearestCode& a) { return {a.codebook, a.dither, vectors(a.codebook)}; }

__device__ __forceinline__ double between(double weight, double a, double b) {
  return __dadd_rn(__dmul_rn(1 - weight, a), __dmul_rn(weight, b));
}

// one point: a feature of any type, or eight of any but float64
struct Point {
  int64_t from, next;
  double weight;

  __device__ __forceinline__ Point(const Points& p, int64_t j) {
    from = offset(p.codebook, j);
    next = p.dither.data ? offset(p.codebook, j + 1) : 0;
    weight = p.dither.data ? read<double>(p.dither, offset(p.dither, j)) : 0;
  }
  __device__ __forceinline__ double at(const Points& p, int64_t k) const {
    const double a = read<double>(p.codebook, from + k * p.codebook.stride_feature);
    return p.dither.data ? between(weight, a, read<double>(p.codebook, next + k * p.codebook.stride_feature))
                         : a;
  }
  // kWhole: the codes are vectors and there is no dither
  template <bool kWhole = false>
  __device__ __forceinline__ void load(const Points& p, int64_t k, double* v) const {
    float a[8];
    load8<kWhole>(p.codebook, p.vector, from, k, a);
    if (!kWhole && p.dither.data) {
      float b[8];
      load8(p.codebook, p.vector, next, k, b);
#pragma unroll
      for (int q = 0; q < 8; ++q) v[q] = between(weight, a[q], b[q]);
    } else {
#pragma unroll
      for (int q = 0; q < 8; ++q) v[q] = a[q];
    }
  }
};

__device__ __forceinline__ double add_square(double total, double x, double point) {
  const double t = __dsub_rn(x, point);
  return __dadd_rn(total, __dmul_rn(t, t));
}

struct Answers {
  int64_t* indices;
  void* sq_dist;
  bool wide;

  __device__ __forceinline__ void put(int64_t row, int64_t index, double distance) const {
    indices[row] = index;
    if (wide)
      ((double*)sq_dist)[row] = distance;
    else
      ((float*)sq_dist)[row] = (float)distance;
  }
};

inline Answers answers_of(const NearestCode& a) { return {a.indices, a.sq_dist, a.wide}; }

// power of two that brings a largest element to [2^14, 2^15), the upper end of float16
__device__ __forceinline__ int scale_of(double largest) { return largest > 0 ? 14 - ilogb(largest) : 0; }

__device__ __forceinline__ int scale_of(float largest) {
  return largest >= 0x1p-126f ? 141 - (__float_as_int(largest) >> 23) : scale_of((double)largest);
}

// 2^n for -126 <= n <= 127
__device__ __forceinline__ float power_of_two(int n) { return __int_as_float((127 + n) << 23); }

__device__ __forceinline__ Reach reach_of(const Spread& s, bool scaled) {
  return {__longlong_as_double((long long)s.norm), __longlong_as_double((long long)s.lost),
          scaled ? scale_of(__longlong_as_double((long long)s.largest)) : 0};
}

// 2^(shift / 2) and 2^(shift - shift / 2): one factor of a float32 subnormal may be beyond float32
struct Scale {
  float first, second;
  __device__ __forceinline__ explicit Scale(int shift)
      : first(power_of_two(shift / 2)), second(power_of_two(shift - shift / 2)) {}
  __device__ __forceinline__ float operator()(float v) const { return v * first * second; }
};

// rows that are open, appended by any number of lanes of a warp at once
__device__ __forceinline__ unsigned int append(unsigned int* count, bool wanted) {
  const unsigned int lanes = __ballot_sync(kAll, wanted);
  const int lane = threadIdx.x & 31;
  unsigned int first = 0;
  if (lanes != 0 && lane == __ffs(lanes) - 1) first = atomicAdd(count, (unsigned int)__popc(lanes));
  first = __shfl_sync(kAll, first, lanes != 0 ? __ffs(lanes) - 1 : 0);
  return first + __popc(lanes & ((1u << lane) - 1));
}

}  // namespace vqk::cuda
