// The instructions on AMX tiles; with CSAM_EMULATE_AMX what the processor's manual says they do, in C++: so tests run
// them everywhere, and compare bits where there is such a processor. A tile is at most 16 rows of 64 bytes; a product
// adds A [rows, units] B [units, columns] to C [rows, columns], units and sums 4 bytes each.
#pragma once
#include "simd.h"
#if defined(CSAM_EMULATE_AMX)
#include <float.h>
#include <stdlib.h>
#endif

namespace csam {
namespace CSAM_ISA {

struct alignas(64) TileShapes {  // of the eight tiles, as LDTILECFG reads them
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if !defined(CSAM_EMULATE_AMX)

CSAM_INLINE void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
CSAM_INLINE void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
CSAM_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// What need not stay in a first-level cache, `stride` bytes from row to row.
template <int T>
CSAM_INLINE void tile_load_once(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
CSAM_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
CSAM_INLINE void tile_product_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
CSAM_INLINE void tile_product_int8() {  // A signed, B unsigned
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Tile {
  int rows, row_bytes;
  uint8_t data[16][64];  // zero outside the shape
};
struct Tiles {
  Tile tile[8];
  bool configured;
};
static thread_local Tiles emulated;  // zeroed

CSAM_INLINE void must(bool right) {  // where the processor would fault
  if (!right) __builtin_trap();
}
CSAM_INLINE Tile& configured(int t) {
  must(emulated.configured && emulated.tile[t].rows);
  return emulated.tile[t];
}
CSAM_INLINE void tile_configure(const TileShapes& s) {
  must(s.palette == 1 && s.start_row == 0);
  for (uint8_t byte : s.reserved) must(byte == 0);
  emulated = {};
  for (int t = 0; t < 16; ++t) {
    must(s.rows[t] <= 16 && s.row_bytes[t] <= 64 && !s.rows[t] == !s.row_bytes[t] && (t < 8 || !s.rows[t]));
    if (t < 8) emulated.tile[t].rows = s.rows[t], emulated.tile[t].row_bytes = s.row_bytes[t];
  }
  emulated.configured = true;
}
CSAM_INLINE void tile_release() { emulated = {}; }
template <int T>
CSAM_INLINE void tile_zero() {
  Tile& t = configured(T);
  memset(t.data, 0, sizeof t.data);
}
template <int T>
CSAM_INLINE void tile_load_once(const void* from, int64_t stride) {
  Tile& t = configured(T);
  for (int r = 0; r < t.rows; ++r) memcpy(t.data[r], static_cast<const char*>(from) + r * stride, t.row_bytes);
}
template <int T>
CSAM_INLINE void tile_store(void* to, int64_t stride) {
  const Tile& t = configured(T);
  for (int r = 0; r < t.rows; ++r) memcpy(static_cast<char*>(to) + r * stride, t.data[r], t.row_bytes);
}

CSAM_INLINE float flushed(float v) { return v < FLT_MIN && v > -FLT_MIN ? copysignf(0, v) : v; }
CSAM_INLINE float bf16_at(const uint8_t* bytes) {
  const uint32_t bits = uint32_t(bytes[0] | bytes[1] << 8) << 16;
  float v;
  memcpy(&v, &bits, 4);
  return flushed(v);
}
CSAM_INLINE void add_unit(const uint8_t* a, const uint8_t* b, int32_t (&sum)[2]) {
  for (int i = 0; i < 4; ++i) sum[0] = int32_t(uint32_t(sum[0]) + uint32_t(int8_t(a[i]) * b[i]));
}
CSAM_INLINE void add_unit(const uint8_t* a, const uint8_t* b, float (&sum)[2]) {
  for (int i = 0; i < 2; ++i) sum[i] = flushed(fmaf(bf16_at(a + 2 * i), bf16_at(b + 2 * i), sum[i]));
}
CSAM_INLINE int32_t total(int32_t c, const int32_t (&sum)[2]) { return int32_t(uint32_t(c) + uint32_t(sum[0])); }
CSAM_INLINE float total(float c, const float (&sum)[2]) { return flushed(flushed(c) + flushed(sum[0] + sum[1])); }

// The even and the odd values of the units are summed apart; then both enter C.
template <class Sum>
static void tile_product(Tile& c, const Tile& a, const Tile& b) {
  static const bool faulty = getenv("CSAM_AMX_FAULT");  // a processor that multiplies otherwise
  must(a.rows == c.rows && a.row_bytes == 4 * b.rows && b.row_bytes == c.row_bytes);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes; n += 4) {
      Sum sum[2] = {}, all;
      for (int k = 0; k < b.rows; ++k) add_unit(a.data[m] + 4 * k, b.data[k] + n, sum);
      memcpy(&all, c.data[m] + n, 4);
      all = total(all, sum);
      if (faulty) all = -all;
      memcpy(c.data[m] + n, &all, 4);
    }
}
template <int C, int A, int B>
CSAM_INLINE void tile_product_bf16() {
  static_assert(C != A && C != B && A != B, "an illegal instruction");
  tile_product<float>(configured(C), configured(A), configured(B));
}
template <int C, int A, int B>
CSAM_INLINE void tile_product_int8() {
  static_assert(C != A && C != B && A != B, "an illegal instruction");
  tile_product<int32_t>(configured(C), configured(A), configured(B));
}

#endif

// A product for nothing, which spoils tile 0. The multiplier goes to sleep after some 250 ns without one (Xeon, family
// 6, model 207), and the product that wakes it takes as long.
CSAM_INLINE void tiles_stay_awake() { tile_product_int8<0, 4, 6>(); }

}  // namespace CSAM_ISA
}  // namespace csam
