// binarize: exact selection of the `keep` largest scores, ties to the lowest index, by radix select on ordered keys:
// three times a histogram of 11, 11 and 10 key bits and the choice of the bin that holds the threshold; where ties have
// to be told apart their number before each chunk; then the mask. All layers go through one launch of each kernel and
// nothing returns to the host. A block takes a contiguous range of chunks, counts in shared memory, equal digits of a
// warp at once, and hands its counts over when the selection changes. Integer sums are exact in any order.
#include <algorithm>

#include "device.h"

namespace csam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 3;
constexpr int kRounds = 4;  // groups of eight scores a thread takes of a chunk
constexpr int kBlock = kThreads * kGroup;
constexpr int kChunk = kBlock * kRounds;
constexpr int kBins = 2048;
constexpr int kLayers = 128;
template <int PASS>
constexpr int kShift = PASS < 0    ? 32
                       : PASS == 0 ? 21
                       : PASS == 1 ? 10
                                   : 0;  // of the digit in the key

struct Entry {
  const void* scores;
  uint8_t* mask;
  int64_t count, first_chunk;
  uint32_t keep;
  int16_t dtype;
  bool vector;
};
struct Table {
  Entry entries[kLayers];
  int64_t first_chunk, chunks;  // the table's chunks among all
  int count, first_layer;
  bool global;
};
static_assert(sizeof(Table) < 32700, "kernel parameters end at 32764 bytes");

struct State {
  uint32_t key;   // the threshold, known from the top
  uint32_t need;  // how many of the scores under this prefix are kept
  uint32_t ties;  // scores equal to the threshold
  uint32_t unused;
  __device__ bool ranked() const { return ties > need; }  // some ties are kept and some not
};

struct Scratch {
  uint32_t* bins;  // [selections, kBins], zero before and after every use
  State* states;   // [selections]
  uint32_t* ties;  // [chunks]
};

// Calls body(scores from, entry, selection, chunk among all) for every chunk of the block's share.
template <class Body>
__device__ inline void for_chunks(const Table& table, Body body) {
  const int64_t first = table.chunks * blockIdx.x / gridDim.x, last = table.chunks * (blockIdx.x + 1) / gridDim.x;
  int layer = 0;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    while (layer + 1 < table.count && chunk >= table.entries[layer + 1].first_chunk) ++layer;
    const Entry& entry = table.entries[layer];
    body((chunk - entry.first_chunk) * kChunk, entry, table.global ? 0 : table.first_layer + layer,
         table.first_chunk + chunk);
  }
}

// use(at, keys, n) for the thread's n scores of every round of a chunk in order; all loads go first.
template <class Use>
__device__ inline void for_rounds(const Entry& e, int64_t from, Use use) {
  const int64_t first = from + threadIdx.x * kGroup;
  Raw raw[kRounds];
  int count[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t left = e.count - first - r * kBlock;
    count[r] = left < 0 ? 0 : left < kGroup ? int(left) : kGroup;
    raw[r] = load_raw(e.scores, e.dtype, first + r * kBlock, count[r], e.vector && count[r] == kGroup);
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    float v[kGroup];
    uint32_t keys[kGroup];
    widen(raw[r], e.dtype, v);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) keys[i] = v[i] == v[i] ? ordered_key(v[i]) : 0;  // NaN below every number
    use(first + r * kBlock, keys, count[r]);
  }
}

__device__ inline void hand_over(unsigned* bins, uint32_t* to) {
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    if (bins[b]) atomicAdd(to + b, bins[b]);
    bins[b] = 0;
  }
  __syncthreads();
}

template <int PASS>
__global__ void __launch_bounds__(kThreads, kResident)
    histogram_kernel(const __grid_constant__ Table table, Scratch scratch) {
  __shared__ unsigned bins[kBins];
  for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  constexpr int shift = kShift<PASS>, above = kShift<PASS - 1>;
  constexpr uint32_t digits = (1u << (above - shift)) - 1;
  int current = -1;
  for_chunks(table, [&](int64_t from, const Entry& e, int selection, int64_t) {
    if (selection != current && current >= 0) hand_over(bins, scratch.bins + int64_t(current) * kBins);
    current = selection;
    const uint64_t prefix = PASS == 0 ? 0 : uint64_t(scratch.states[selection].key) >> above;
    for_rounds(e, from, [&](int64_t, const uint32_t keys[kGroup], int n) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const bool counts = i < n && uint64_t(keys[i]) >> above == prefix;
        const int digit = counts ? int((keys[i] >> shift) & digits) : -1;
        const unsigned same = __match_any_sync(kAllLanes, digit);
        if (counts && __ffs(int(same)) - 1 == int(threadIdx.x % kWarp)) atomicAdd(&bins[digit], unsigned(__popc(same)));
      }
    });
  });
  if (current >= 0) hand_over(bins, scratch.bins + int64_t(current) * kBins);
}

// Sum over the threads before this one, and over all.
__device__ inline uint32_t block_before(uint32_t v, uint32_t& total) {
  __shared__ uint32_t parts[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t up_to = v;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == kWarp - 1) parts[warp] = up_to;
  __syncthreads();
  uint32_t before = up_to - v;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    before += w < warp ? parts[w] : 0;
    total += parts[w];
  }
  __syncthreads();
  return before;
}

// Block b: the digit of selection b's threshold. A thread looks at eight bins, the first thread at the highest.
template <int PASS>
__global__ void __launch_bounds__(kThreads, kResident)
    pick_kernel(const __grid_constant__ Table table, Scratch scratch, uint32_t keep) {
  const int last = table.global ? 1 : table.count;
  for (int layer = blockIdx.x; layer < last; layer += gridDim.x) {
    const int selection = table.global ? 0 : table.first_layer + layer;
    uint32_t* bins = scratch.bins + int64_t(selection) * kBins;
    State& state = scratch.states[selection];
    const uint32_t key = PASS == 0 ? 0 : state.key;
    const uint32_t need = PASS > 0 ? state.need : table.global ? keep : table.entries[layer].keep;
    const int top = kBins - 1 - int(threadIdx.x) * kGroup;
    uint32_t counts[kGroup], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      counts[i] = bins[top - i];
      bins[top - i] = 0;
      sum += counts[i];
    }
    uint32_t before = block_before(sum, total);
    if (need == 0 && threadIdx.x == 0) state = {0xFFFFFFFFu, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (before < need && need - before <= counts[i])
        state = {key | uint32_t(top - i) << kShift<PASS>, need - before, counts[i], 0};
      before += counts[i];
    }
    __syncthreads();
  }
}

// Ties in every chunk of the selections that need to know.
__global__ void __launch_bounds__(kThreads, kResident)
    ties_kernel(const __grid_constant__ Table table, Scratch scratch) {
  for_chunks(table, [&](int64_t from, const Entry& e, int selection, int64_t chunk) {
    const State state = scratch.states[selection];
    if (!state.ranked()) return;
    uint32_t ties = 0;
    for_rounds(e, from, [&](int64_t, const uint32_t keys[kGroup], int n) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) ties += i < n && keys[i] == state.key;
    });
    ties = block_sum<kThreads>(ties);
    if (threadIdx.x == 0) scratch.ties[chunk] = ties;
  });
}

// Block b: the ties of selection b before each of its chunks.
__global__ void __launch_bounds__(kThreads, kResident)
    ranks_kernel(const __grid_constant__ Table table, Scratch scratch, int64_t all_chunks) {
  const int last = table.global ? 1 : table.count;
  for (int layer = blockIdx.x; layer < last; layer += gridDim.x) {
    if (!scratch.states[table.global ? 0 : table.first_layer + layer].ranked()) continue;
    const int64_t own = layer + 1 < table.count ? table.entries[layer + 1].first_chunk : table.chunks;
    const int64_t first = table.global ? 0 : table.first_chunk + table.entries[layer].first_chunk;
    const int64_t end = table.global ? all_chunks : table.first_chunk + own;
    uint32_t carry = 0, total;
    for (int64_t base = first; base < end; base += kThreads) {
      const int64_t chunk = base + threadIdx.x;
      const uint32_t before = block_before(chunk < end ? scratch.ties[chunk] : 0, total);
      if (chunk < end) scratch.ties[chunk] = carry + before;
      carry += total;
    }
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    mask_kernel(const __grid_constant__ Table table, Scratch scratch) {
  for_chunks(table, [&](int64_t from, const Entry& e, int selection, int64_t chunk) {
    const State state = scratch.states[selection];
    const bool ranked = state.ranked();
    uint32_t rank = ranked ? scratch.ties[chunk] : 0;
    for_rounds(e, from, [&](int64_t at, const uint32_t keys[kGroup], int n) {
      uint32_t mine = 0, total = 0;
      if (ranked) {
        uint32_t ties = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) ties += i < n && keys[i] == state.key;
        mine = rank + block_before(ties, total);
        rank += total;
      }
      uint32_t bytes[2] = {};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const bool tie = keys[i] == state.key;
        const bool kept = keys[i] > state.key || (tie && (!ranked || mine < state.need));
        mine += tie;
        bytes[i / 4] |= uint32_t(kept) << (8 * (i % 4));
      }
      if (e.vector && n == kGroup) {
        __stwb(reinterpret_cast<uint2*>(e.mask + at), make_uint2(bytes[0], bytes[1]));
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          if (i < n) e.mask[at + i] = uint8_t(bytes[i / 4] >> (8 * (i % 4)));
      }
    });
  });
}

int64_t chunks_of(int64_t count) { return (count + kChunk - 1) / kChunk; }

template <class Run>
cudaError_t for_tables(const Selection& s, Run run) {
  Table table;
  table.first_chunk = 0;
  for (size_t first = 0; first < s.layers.size(); first += kLayers) {
    table.chunks = 0;
    table.global = s.global;
    table.first_layer = int(first);
    table.count = int(std::min(s.layers.size() - first, size_t(kLayers)));
    for (int i = 0; i < table.count; ++i) {
      const Scores& l = s.layers[first + i];
      const bool vector = aligned(l.scores) && aligned(l.mask, 8);
      table.entries[i] = {l.scores, l.mask, l.count, table.chunks, uint32_t(l.keep), int16_t(l.dtype), vector};
      table.chunks += chunks_of(l.count);
    }
    const cudaError_t error = run(table);
    if (error != cudaSuccess) return error;
    table.first_chunk += table.chunks;
  }
  return cudaSuccess;
}

template <int PASS>
cudaError_t pass(const Selection& s, const Scratch& scratch, Device device) {
  cudaError_t error = for_tables(s, [&](const Table& table) {
    return launch(histogram_kernel<PASS>, table.chunks, kThreads, kResident, device, table, scratch);
  });
  if (error != cudaSuccess) return error;
  return for_tables(s, [&](const Table& table) {
    const int blocks = !s.global ? table.count : table.first_layer == 0;
    return launch(pick_kernel<PASS>, blocks, kThreads, kResident, device, table, scratch, uint32_t(s.keep));
  });
}

}  // namespace

int64_t selection_room(const std::vector<int64_t>& counts, bool global) {
  int64_t chunks = 0;
  for (int64_t count : counts) chunks += chunks_of(count);
  const int64_t selections = global ? 1 : int64_t(counts.size());
  return selections * (kBins * sizeof(uint32_t) + sizeof(State)) + chunks * sizeof(uint32_t);
}

cudaError_t binarize(const Selection& s, Device device) {
  const int64_t selections = s.global ? 1 : int64_t(s.layers.size());
  Scratch scratch;
  scratch.bins = static_cast<uint32_t*>(s.scratch);
  scratch.states = reinterpret_cast<State*>(scratch.bins + selections * kBins);
  scratch.ties = reinterpret_cast<uint32_t*>(scratch.states + selections);
  int64_t chunks = 0;
  for (const Scores& l : s.layers) chunks += chunks_of(l.count);

  cudaError_t error = cudaMemsetAsync(scratch.bins, 0, selections * kBins * sizeof(uint32_t), device.stream);
  if (error == cudaSuccess) error = pass<0>(s, scratch, device);
  if (error == cudaSuccess) error = pass<1>(s, scratch, device);
  if (error == cudaSuccess) error = pass<2>(s, scratch, device);
  if (error != cudaSuccess) return error;
  error = for_tables(s, [&](const Table& table) {
    return launch(ties_kernel, table.chunks, kThreads, kResident, device, table, scratch);
  });
  if (error != cudaSuccess) return error;
  error = for_tables(s, [&](const Table& table) {
    const int blocks = !s.global ? table.count : table.first_layer == 0;
    return launch(ranks_kernel, blocks, kThreads, kResident, device, table, scratch, chunks);
  });
  if (error != cudaSuccess) return error;
  return for_tables(s, [&](const Table& table) {
    return launch(mask_kernel, table.chunks, kThreads, kResident, device, table, scratch);
  });
}

}  // namespace csam::cuda
