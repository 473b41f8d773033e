// binarize: exact selection of the `keep` largest of n scores, ties to the lowest index, without a sort.
//
// A fixed sample brackets the threshold to a few per cent of the scores; one scan (select_scan) settles all others and
// lists the candidates; a selection among those finishes. So every score is read once and every mask byte written once.
// If the bracket misses the threshold or ties crowd it, the histogram of the upper, then the lower 16 key bits finds
// the exact threshold key instead. The result is exact either way and does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels.h"

namespace csam {
namespace {

constexpr int64_t kSample = 32768;
constexpr int64_t kPart = 1 << 16;  // scores a task of the parallel scan

uint32_t key_at(const void* scores, int dtype, int64_t i) {
  if (dtype == kF32) return ordered_key(static_cast<const float*>(scores)[i]);
  const uint16_t half = static_cast<const uint16_t*>(scores)[i];
  return ordered_key(dtype == kBF16 ? from_bf16(half) : from_f16(half));
}

struct Part {
  int64_t layer, first, count, index;  // index of the part's first score in the whole selection
  int64_t found = 0, above = 0;
};

struct Selection {
  const void* const* scores;
  uint8_t* const* masks;
  int dtype, threads;
  int64_t keep, total;
  std::vector<Part> parts;

  const void* at(const Part& p) const {
    return static_cast<const char*>(scores[p.layer]) + p.first * element_size(dtype);
  }

  // Mask every part against the bracket and list its candidates in order of index.
  void scan(uint32_t low, uint32_t high, std::vector<std::vector<uint64_t>>& candidates) {
    const auto& table = kernels();
#pragma omp parallel num_threads(threads)
    {
      std::vector<uint64_t> room(kPart + 16);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < parts.size(); ++i) {
        Part& p = parts[i];
        SelectScan s{at(p), p.count, dtype, low, high, masks[p.layer] + p.first, uint32_t(p.index), room.data(), 0, 0};
        table.select_scan(s);
        p.found = s.found;
        p.above = s.above;
        candidates[i].assign(room.begin(), room.begin() + s.found);
      }
    }
  }

  // Mark the `need` largest candidates; they are in order of index, and the composite keys are all different.
  void settle(const std::vector<std::vector<uint64_t>>& candidates, int64_t need) {
    if (need <= 0) return;
    std::vector<uint64_t> all;
    for (const auto& c : candidates) all.insert(all.end(), c.begin(), c.end());
    std::nth_element(all.begin(), all.begin() + (need - 1), all.end(), std::greater<>());
    const uint64_t last = all[need - 1];
    for (size_t i = 0; i < parts.size(); ++i) {
      uint8_t* mask = masks[parts[i].layer] + parts[i].first;
      for (uint64_t c : candidates[i])
        if (c >= last) mask[uint32_t(~uint32_t(c)) - uint32_t(parts[i].index)] = 1;
    }
  }

  // The exact threshold key by two histograms of 16 bits; every part then marks its share of the ties in order.
  void exact() {
    uint32_t prefix = 0;
    int64_t need = keep;
    for (int shift : {16, 0}) {
      std::vector<int64_t> histogram(65536, 0);
#pragma omp parallel num_threads(threads)
      {
        std::vector<int64_t> own(65536, 0);
#pragma omp for schedule(static)
        for (size_t i = 0; i < parts.size(); ++i)
          for (int64_t j = 0; j < parts[i].count; ++j) {
            const uint32_t key = key_at(at(parts[i]), dtype, j);
            if (shift == 16 || (key >> 16) == (prefix >> 16)) ++own[(key >> shift) & 0xFFFF];
          }
#pragma omp critical(csam_histogram)
        for (int b = 0; b < 65536; ++b) histogram[b] += own[b];
      }
      int bin = 65535;
      while (bin > 0 && histogram[bin] < need) need -= histogram[bin--];
      prefix |= uint32_t(bin) << shift;
    }
    std::vector<int64_t> ties(parts.size() + 1, 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size_t i = 0; i < parts.size(); ++i)
      for (int64_t j = 0; j < parts[i].count; ++j) ties[i + 1] += key_at(at(parts[i]), dtype, j) == prefix;
    for (size_t i = 0; i < parts.size(); ++i) ties[i + 1] += ties[i];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size_t i = 0; i < parts.size(); ++i) {
      uint8_t* mask = masks[parts[i].layer] + parts[i].first;
      int64_t seen = ties[i];
      for (int64_t j = 0; j < parts[i].count; ++j) {
        const uint32_t key = key_at(at(parts[i]), dtype, j);
        mask[j] = key > prefix || (key == prefix && seen++ < need);
      }
    }
  }

  bool bracket(uint32_t& low, uint32_t& high) const {
    if (total < 4 * kSample) {
      low = 0, high = UINT32_MAX;
      return true;
    }
    std::vector<uint32_t> sample(kSample);
    size_t part = 0;
    for (int64_t i = 0; i < kSample; ++i) {
      const int64_t index = int64_t((__int128)total * i / kSample);
      while (index >= parts[part].index + parts[part].count) ++part;
      sample[i] = key_at(at(parts[part]), dtype, index - parts[part].index);
    }
    const double rank = double(keep) / total * kSample;  // from the top
    const int64_t margin = int64_t(4 * std::sqrt(double(kSample)) / 2) + 2;
    const int64_t top = std::max<int64_t>(0, int64_t(rank) - margin);
    const int64_t bottom = std::min<int64_t>(kSample - 1, int64_t(rank) + margin);
    std::nth_element(sample.begin(), sample.begin() + top, sample.end(), std::greater<>());
    high = top == 0 ? UINT32_MAX : sample[top];
    std::nth_element(sample.begin() + top, sample.begin() + bottom, sample.end(), std::greater<>());
    low = bottom == kSample - 1 ? 0 : sample[bottom];
    return low < high;
  }

  void run() {
    uint32_t low = 0, high = 0;
    if (!bracket(low, high)) return exact();
    std::vector<std::vector<uint64_t>> candidates(parts.size());
    scan(low, high, candidates);
    int64_t above = 0, found = 0;
    for (const Part& p : parts) above += p.above, found += p.found;
    const int64_t need = keep - above;
    if (need < 0 || need > found || (found > total / 8 && total >= 4 * kSample)) return exact();
    settle(candidates, need);
  }
};

}  // namespace

void binarize(const void* const* scores, const int64_t* sizes, int64_t count, int dtype, int64_t keep,
              uint8_t* const* masks, int threads) {
  Selection s{scores, masks, dtype, threads, keep, 0, {}};
  for (int64_t l = 0; l < count; ++l)
    for (int64_t first = 0; first < sizes[l]; first += kPart) {
      const int64_t n = std::min(kPart, sizes[l] - first);
      s.parts.push_back({l, first, n, s.total});
      s.total += n;
    }
  if (s.total) s.run();
}

}  // namespace csam
