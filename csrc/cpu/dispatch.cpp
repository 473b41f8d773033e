// Which kernel table is in force: the widest that the processor has, or the one asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

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

const Kernels* table(const std::string& name) {
  const char* why = isa_supported(name.c_str());
  if (*why) throw std::invalid_argument("isa " + name + ": " + why);
#if defined(CSAM_X86)
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
  return "must be one of auto, generic, avx2, avx512";
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
