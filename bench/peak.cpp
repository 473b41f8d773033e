// What one core can multiply and add at most: 1e9 operations a second, a multiplication and an addition each one, of
// independent chains in registers; a line an instruction. float16 with AVX512-FP16, of bfloat16 and int8 AMX tiles
// where there are such; int16, which int8 is multiplied as where nothing multiplies bytes, is VPMADDWD and an addition.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace {

constexpr long kRounds = 1'000'000, kShorter = 10;  // rounds of tiles are longer

// Twelve accumulators: more than latency times throughput on any x86-64 core of today.
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define KEEP(i) asm volatile("" : "+v"(a##i));
#define ZERO_512(i) __m512 a##i = _mm512_setzero_ps();
#define ZERO_256(i) __m256 a##i = _mm256_setzero_ps();
#define FMA_512(i) a##i = _mm512_fmadd_ps(x, x, a##i);
#define FMA_256(i) a##i = _mm256_fmadd_ps(x, x, a##i);
#define ZERO_INT(i) __m512i a##i = _mm512_setzero_si512();
#define ZERO_PAIRS(i) __m256i a##i = _mm256_setzero_si256();
#define ADD_PAIRS(i) asm("vpmaddwd %2, %2, %1; vpaddd %1, %0, %0" : "+x"(a##i), "=&x"(product) : "x"(x));
#define FMA_HALF(i) asm("vfmadd231ph %1, %1, %0" : "+v"(a##i) : "v"(x));
#define DOT_512(i) a##i = _mm512_dpbf16_ps(a##i, x, x);
#define DOT_INT(i) a##i = _mm512_dpbusd_epi32(a##i, x, x);
#define TIMED(zero, step)                              \
  EACH(zero)                                           \
  const auto start = std::chrono::steady_clock::now(); \
  for (long r = 0; r < kRounds; ++r) {                 \
    EACH(step) EACH(KEEP)                              \
  }                                                    \
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

__attribute__((target("avx2,fma"))) double fma256() {
  const __m256 x = _mm256_set1_ps(1.0f);
  TIMED(ZERO_256, FMA_256)
}
__attribute__((target("avx2"))) double add_pairs() {
  const __m256i x = _mm256_set1_epi16(1);
  __m256i product;
  TIMED(ZERO_PAIRS, ADD_PAIRS)
}
__attribute__((target("avx512f"))) double fma512() {
  const __m512 x = _mm512_set1_ps(1.0f);
  TIMED(ZERO_512, FMA_512)
}
__attribute__((target("avx512f"))) double fma_half() {
  const __m512i x = _mm512_set1_epi16(0x3c00);
  TIMED(ZERO_INT, FMA_HALF)
}
__attribute__((target("avx512f,avx512bf16"))) double dot512() {
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  TIMED(ZERO_512, DOT_512)
}
__attribute__((target("avx512f,avx512vnni"))) double dot_int() {
  const __m512i x = _mm512_set1_epi8(1);
  TIMED(ZERO_INT, DOT_INT)
}

bool has(unsigned features) {  // of CPUID's leaf 7, EDX
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & features) == features;
}
bool has_tiles() {  // with BF16 and INT8, and Linux grants them: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has(1u << 22 | 1u << 24 | 1u << 25) && !syscall(SYS_arch_prctl, 0x1023, 18);
}
struct alignas(64) Shapes {
  unsigned char palette = 1, rest[15] = {};
  unsigned short bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
template <class Products>
double tiles(Products four) {
  const Shapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  const auto start = std::chrono::steady_clock::now();
  for (long r = 0; r < kRounds / kShorter; ++r) four();
  const auto taken = std::chrono::steady_clock::now() - start;
  asm volatile("tilerelease");
  return kShorter * std::chrono::duration<double>(taken).count();
}
double tiles_bf16() {
  return tiles([] {
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0; tdpbf16ps %tmm7, %tmm4, %tmm1; tdpbf16ps %tmm6, %tmm5, %tmm2; tdpbf16ps %tmm7, "
        "%tmm5, %tmm3");
  });
}
double tiles_int8() {
  return tiles([] {
    asm volatile(
        "tdpbsud %tmm6, %tmm4, %tmm0; tdpbsud %tmm7, %tmm4, %tmm1; tdpbsud %tmm6, %tmm5, %tmm2; tdpbsud %tmm7, %tmm5, "
        "%tmm3");
  });
}

void report(const char* name, double (*run)(), double flops) {
  double best = run();
  for (int i = 0; i < 49; ++i) best = std::min(best, run());
  std::printf("%s %.1f\n", name, kRounds * 12 * flops / best / 1e9);
}

}  // namespace

int main() {
  if (__builtin_cpu_supports("avx512f")) report("float32", fma512, 32);
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) report("float32", fma256, 16);
  if (__builtin_cpu_supports("avx512f") && has(1u << 23)) report("float16", fma_half, 64);
  if (has_tiles()) {
    report("bfloat16", tiles_bf16, 4. / 12 * 16 * 16 * 32 * 2);
    report("int8", tiles_int8, 4. / 12 * 16 * 16 * 64 * 2);
    return 0;
  }
  if (__builtin_cpu_supports("avx512bf16")) report("bfloat16", dot512, 64);
  if (__builtin_cpu_supports("avx512vnni")) report("int8", dot_int, 128);
  else if (__builtin_cpu_supports("avx2")) report("int16", add_pairs, 32);
}
