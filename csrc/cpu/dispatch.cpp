// Which kernel table is in force: the widest that the processor has, or the one asked for.
#if defined(CSAM_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace csam {
namespace {

bool has_avx2() {
#if defined(CSAM_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}
bool has_avx512() {
#if defined(CSAM_X86)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

#if defined(CSAM_X86)
const char* ask_for_amx() {
  if (!has_avx512() || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni"))
    return "the processor lacks AVX-512 BF16 or VNNI";
#if !defined(CSAM_EMULATE_AMX)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kFp16 = 1u << 23;
  constexpr unsigned kAll = kBf16 | kTile | kInt8 | kFp16;
  unsigned a, b, c, d, state, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll)
    return "the processor lacks AMX with BF16 and INT8, or AVX-512 FP16";
  asm volatile("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of this process
  if ((state >> 17 & 3) != 3 || syscall(SYS_arch_prctl, kRequest, kTileData)) return "the kernel grants no tile memory";
#endif
  return "";
}

// Whether tiles give what AVX-512 gives: logits of a dense layer of small whole numbers, whose sums are exact.
bool tiles_agree(int dtype) {
  constexpr int64_t kChannels = 70, kFilters = 53, kTaps = 9 * kChannels, kSamples = 70;
  std::vector<float> values(kFilters * kTaps), ones(kFilters, 1), bias(kFilters), found[2];
  std::vector<int32_t> taps(kFilters * kTaps), rows(kFilters + 1);
  std::vector<uint32_t> x(kSamples * kTaps);
  for (int64_t i = 0; i < kFilters * kTaps; ++i) values[i] = float(i * 5 % 7 - 3), taps[i] = int32_t(i % kTaps);
  for (int64_t i = 0; i <= kFilters; ++i) rows[i] = int32_t(i * kTaps);
  for (int64_t i = 0; i < kFilters; ++i) bias[i] = float(i - 20);
  for (int64_t i = 0; i < kSamples * kTaps; ++i) {
    const uint32_t bits = float_bits(float(i * 11 % 13 * 19));
    if (dtype == kBF16) reinterpret_cast<uint16_t*>(x.data())[i] = uint16_t(bits >> 16);
    else x[i] = bits;
  }
  SampleStep step = {false, {}, 0, -1, kTaps};
  step.conv = {nullptr,  dtype,       kChannels, 3,      3,      kSamples, values.data(), taps.data(), rows.data(),
               kFilters, bias.data(), nullptr,   {3, 3}, {1, 1}, {0, 0},   {1, 1},        -1e9f,       1e9f,
               kDense,   ones.data(), 0,         0,      0,      true,     nullptr,       1,           1};
  step.conv.real = dtype == kInt8;
  const int64_t arena = kTaps + 4 * kFilters;
  const SampleNetworkArgs args = {dtype, kChannels, 3, 3, nullptr, nullptr, 1, 0, &step, 1, arena, 0, kTaps, kFilters};
  for (int i = 0; i < 2; ++i) {
    const std::unique_ptr<SampleNetwork> made((i ? amx_kernels : avx512_kernels).sample_network(args));
    found[i].resize(kSamples * kFilters);
    made->logits(x.data(), kSamples, found[i].data());
  }
  return found[0] == found[1];
}

// Tiles are taken unasked only where they compute what they should.
bool trusts_amx() {
  static const bool agree = [] {
    if (*isa_supported("amx")) return false;
    if (tiles_agree(kBF16) && tiles_agree(kInt8)) return true;
    fprintf(stderr, "csam_kernels: AMX computes otherwise than AVX-512 here and is left out; please report this\n");
    return false;
  }();
  return agree;
}
#endif

const Kernels* table(const std::string& name) {
  const char* why = isa_supported(name.c_str());
  if (*why) throw std::invalid_argument("isa " + name + ": " + why);
#if defined(CSAM_X86)
  if (name == "amx" || (name == "auto" && trusts_amx())) return &amx_kernels;
  if (name == "avx512" || (name == "auto" && has_avx512())) return &avx512_kernels;
  if (name == "avx2" || (name == "auto" && has_avx2())) return &avx2_kernels;
#endif
  return &generic_kernels;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const char* isa_supported(const char* name) {
  const std::string isa = name;
  if (isa == "auto" || isa == "generic") return "";
  if (isa == "avx2") return has_avx2() ? "" : "the processor lacks AVX2, FMA or F16C";
  if (isa == "avx512") return has_avx512() ? "" : "the processor lacks AVX-512 F, BW, DQ or VL";
#if defined(CSAM_X86)
  static const char* const no_amx = ask_for_amx();
  if (isa == "amx") return no_amx;
#else
  if (isa == "amx") return "the processor lacks AMX";
#endif
  return "must be one of auto, generic, avx2, avx512, amx";
}

void set_isa(const char* name) { current = table(name); }

const Kernels& kernels() {
  const Kernels* k = current;
  if (!k) {
    const char* wanted = std::getenv("CSAM_ISA");
    current = k = table(wanted && *wanted ? wanted : "auto");
  }
  return *k;
}

}  // namespace csam
