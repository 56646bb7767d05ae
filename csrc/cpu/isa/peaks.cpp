// Multiply-adds that touch registers alone: what no search of this instruction set can exceed.
#include "../kernels.h"
#include "simd.h"

#if defined(__x86_64__)
#define VQK_REGISTER "+v"
#elif defined(__aarch64__)
#define VQK_REGISTER "+w"
#else
#define VQK_REGISTER "+m"
#endif

namespace vqk {
namespace {

// chains that do not wait for each other: two units of up to six cycles, and registers for their operands
constexpr int kChains = 12;
constexpr int64_t kSteps = 64;

// the operands pass for unknown, and one for another at every step, or the compiler would multiply once
#define VQK_TURNS(Vector, step)                                  \
  Vector sums[kChains] = {}, a = {}, b = {};                     \
  __asm__ volatile("" : VQK_REGISTER(b));                        \
  for (int64_t turn = 0; turn < turns * kSteps; ++turn)          \
    VQK_UNROLLED for (int chain = 0; chain < kChains; ++chain) { \
      __asm__ volatile("" : VQK_REGISTER(a));                    \
      sums[chain] = (Vector)(step);                              \
    }                                                            \
  for (int chain = 0; chain < kChains; ++chain) __asm__ volatile("" : VQK_REGISTER(sums[chain]))
#define VQK_UNROLLED _Pragma("GCC unroll 12")

bool always() { return true; }

void float32(int64_t turns) {
#if defined(__AVX512F__)
  VQK_TURNS(vfloat, _mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sums[chain]));
#elif defined(__AVX2__)
  VQK_TURNS(vfloat, _mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sums[chain]));
#else
  VQK_TURNS(vfloat, a * b + sums[chain]);
#endif
}

#if defined(__SSE2__)
void int16(int64_t turns) {
#if defined(__AVX512VNNI__)
  VQK_TURNS(vint, _mm512_dpwssd_epi32((__m512i)sums[chain], (__m512i)a, (__m512i)b));
#elif defined(__AVX512BW__)
  VQK_TURNS(vint, _mm512_add_epi32((__m512i)sums[chain], _mm512_madd_epi16((__m512i)a, (__m512i)b)));
#elif defined(__AVX2__)
  VQK_TURNS(vint, _mm256_add_epi32((__m256i)sums[chain], _mm256_madd_epi16((__m256i)a, (__m256i)b)));
#else
  VQK_TURNS(vint, _mm_add_epi32((__m128i)sums[chain], _mm_madd_epi16((__m128i)a, (__m128i)b)));
#endif
}
#endif

#if defined(__AVX512F__)
// no instruction set of ours has it, but what it reaches is what others are compared with
bool has_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }

__attribute__((target("avx512bf16"))) void bfloat16(int64_t turns) {
  VQK_TURNS(vfloat, _mm512_dpbf16_ps((__m512)sums[chain], (__m512bh)a, (__m512bh)b));
}
#endif

// a multiply-add is two operations
constexpr int64_t kFloats = 2 * kSteps * kChains * kWidth;

const Peak kinds[] = {
    {"float32", kFloats, always, float32},
#if defined(__SSE2__)
    {"int16", 2 * kFloats, always, int16},
#endif
#if defined(__AVX512F__)
    {"bfloat16", 2 * kFloats, has_bfloat16, bfloat16},
#endif
};

}  // namespace

namespace VQK_ISA {
extern const PeakKernels peaks;
const PeakKernels peaks = {kinds, sizeof(kinds) / sizeof(kinds[0])};
}  // namespace VQK_ISA

}  // namespace vqk
