// A network on a tile of samples that lie innermost. Every linear step is a convolution of surviving weights; noise is
// drawn straight into that layout, and the votes are counted where the logits end. A tile is as many samples as a
// packed vector holds: one thread takes it through all steps.
#include <time.h>

#include "random.h"
#include "sample_depthwise.h"
#include "sample_pool.h"
#include "sample_tiles.h"
#include "sample_winograd.h"

namespace csam {
namespace CSAM_ISA {

template <class Format>
class Network final : public SampleNetwork {
  using Element = typename Format::Element;
  static constexpr int64_t S = Format::kLanes;
  static constexpr bool kTransforms = !kTiled<Format>;  // AMX multiplies faster what is not
  using Transforming = Winograd<Element>;

 public:
  explicit Network(const SampleNetworkArgs& args) : a(args), mean(a.channels), spread(a.channels), steps(args.count) {
    for (int64_t c = 0; c < a.channels; ++c) {
      mean[c] = a.mean ? a.mean[c] : 0;
      spread[c] = a.std ? a.std[c] : 1;
    }
    try {
      for (int64_t i = 0; i < a.count; ++i) {
        steps[i].what = a.steps[i];
        make_ready(steps[i]);
      }
    } catch (...) {  // no memory
      release();
      throw;
    }
  }
  ~Network() override { release(); }

  const char* format() const override { return Format::kName; }
  int64_t lanes() const override { return S; }
  int64_t memory() const override {
    return Array<Element>::taken(a.arena * S) + sizes.bytes() + Array<int64_t>::taken(a.count);
  }

  void votes(const float* x, Law law, float scale, const Cells* cells, uint64_t seed, uint32_t stream, uint64_t first,
             int64_t n, int64_t* out) const override {
    Arena arena(*this);
    const auto draws = law == Law::kUniform   ? &Network::draw<Law::kUniform>
                       : law == Law::kLaplace ? &Network::draw<Law::kLaplace>
                       : law == Law::kCells   ? &Network::draw<Law::kCells>
                                              : &Network::draw<Law::kGaussian>;
    for (int64_t done = 0; done < n; done += S) {
      (this->*draws)(x, scale, cells, seed, stream, first + done, arena.at(a.in));
      run(arena);
      count(arena.at(a.out), n - done < S ? n - done : S, out);
    }
  }

  void logits(const void* x, int64_t n, float* out) const override {
    Arena arena(*this);
    const int64_t elements = a.channels * a.height * a.width;
    for (int64_t done = 0; done < n; done += S) {
      const int64_t here = n - done < S ? n - done : S;
      Element* to = arena.at(a.in);
      for (int64_t s = 0; s < here; ++s) {
        const auto* from = static_cast<const typename Format::Image*>(x) + (done + s) * elements;
        for (int64_t e = 0; e < elements; ++e) {
          const int64_t c = e / (a.height * a.width);
          Element all[W];
          Format::put(splat(scaled((Format::widen(from[e]) - mean[c]) / spread[c])), all);
          to[e * S + s] = all[0];
        }
      }
      for (int64_t s = here; s < S; ++s)
        for (int64_t e = 0; e < elements; ++e) to[e * S + s] = 0;
      run(arena);
      const auto* from = reinterpret_cast<const typename Format::Logit*>(arena.at(a.out));
      for (int64_t s = 0; s < here; ++s)
        for (int64_t k = 0; k < a.classes; ++k) out[(done + s) * a.classes + k] = Format::widen(from[k * S + s]);
    }
  }

  void costs(double* vectors) const override {
    for (int64_t i = 0; i < a.count; ++i) {
      if (steps[i].convolution) vectors[i] = steps[i].convolution->cost / S;
      if (steps[i].pooling) vectors[i] = steps[i].pooling->cost / S;
      if (steps[i].depthwise) vectors[i] = steps[i].depthwise->cost / S;
      if constexpr (kTiled<Format>)
        if (steps[i].tiled) vectors[i] = steps[i].tiled->cost / S;
      if constexpr (kTransforms)
        if (steps[i].winograd) vectors[i] = steps[i].winograd->cost / S;
    }
  }

  void times(int64_t rounds, double* seconds) const override {
    Arena arena(*this);
    Array<float> x(a.channels * a.height * a.width);
    draw<Law::kGaussian>(x.data, 1, nullptr, 0, 0, 0, arena.at(a.in));
    for (int64_t round = 0; round < rounds; ++round)
      for (int64_t i = 0; i < a.count; ++i) {
        const double start = now();
        run(arena, steps[i]);
        const double taken = now() - start;
        if (!round || taken < seconds[i]) seconds[i] = taken;
      }
  }

 private:
  static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  struct Step {  // one of the layers, or a maximum
    SampleStep what;
    Convolution<Format>* convolution;
    Depthwise<Format>* depthwise;
    Pooling<Format>* pooling;
    Transforming* winograd;
    TiledConvolution<Format>* tiled;
  };
  void make_ready(Step& step) {
    const SampleConvArgs& layer = step.what.conv;
    const auto ready = [&](auto* made) {
      made->claim(sizes);
      if (!a.draft) made->lay();
    };
    if (step.what.pools) return (step.pooling = new Pooling<Format>(layer))->claim(sizes);
    if constexpr (kTransforms)
      if (layer.engine == kWinograd)
        if ((step.winograd = winograd_of<Format>(layer))) return ready(step.winograd);
    if constexpr (kTiled<Format>)
      if (layer.engine != kSparse) return ready(step.tiled = new TiledConvolution<Format>(layer));
    if (Depthwise<Format>::serves(layer)) return ready(step.depthwise = new Depthwise<Format>(layer));
    ready(step.convolution = new Convolution<Format>(layer));
  }
  void release() {
    for (int64_t i = 0; i < a.count; ++i) {
      delete steps[i].convolution;
      delete steps[i].depthwise;
      delete steps[i].pooling;
      if constexpr (kTiled<Format>) delete steps[i].tiled;
      if constexpr (kTransforms) delete steps[i].winograd;
    }
  }
  struct Arena {  // of one thread
    Array<Element> memory;
    Scratch scratch;
    Array<int64_t> made;  // rows of each step that runs together with others
    explicit Arena(const Network& n) : memory(n.a.arena * S), scratch(n.sizes.make()), made(n.a.count) {}
    Element* at(int64_t place) const { return memory.data + place * S; }
  };

  SampleNetworkArgs a;
  Array<float> mean, spread;
  Array<Step> steps;
  Sizes sizes;

  // Noisy pixels, rounded, then normalised and rounded again.
  template <Law law>
  void draw(const float* x, float scale, const Cells* cells, uint64_t seed, uint32_t stream, uint64_t first,
            Element* out) const {
    const int64_t pixels = a.height * a.width, elements = a.channels * pixels;
    for (int64_t quad = 0; quad * 4 < elements; ++quad)
      for (int64_t v = 0; v < S; v += W) {
        const WordVectors w = philox_samples(uint32_t(quad), first + v, stream, seed);
        vf noise[4];
        const auto after = [&](int j, int lane) {
          return bits_after(seed, first + uint64_t(v + lane), stream, uint64_t(quad * 4 + j));
        };
        deviates<law>(w, cells, after, noise);
        for (int64_t j = 0, e = quad * 4; j < 4 && e < elements; ++j, ++e) {
          const int64_t c = e / pixels;
          const vf pixel = Format::rounded(noisy<law>(noise[j], splat(x[e]), splat(scale)));
          Format::put(scaled((pixel - splat(mean[c])) / splat(spread[c])), out + e * S + v);
        }
      }
  }

  template <class V>
  V scaled(V v) const {
    return sizeof(Element) == 1 ? v * a.scale + a.shift : v;
  }

  void run(const Arena& arena) const {
    for (int64_t i = 0, end; i < a.count; i = end) {
      for (end = i + 1; end < a.count && steps[end - 1].what.conv.out_rows; ++end) {
      }
      if (end == i + 1) run(arena, steps[i]);
      else make(arena, i, end - 1, steps[end - 1].what.conv.out_height);
      for (int64_t k = i; k < end; ++k) arena.made[k] = 0;
    }
  }

  // Results of step `last` up to a row, and as much of the steps from `first` on as they need.
  void make(const Arena& arena, int64_t first, int64_t last, int64_t rows) const {
    const Step& step = steps[last];
    visit(step, [&](const auto& layer) {
      const int64_t height = step.what.conv.out_height, each = layer.together_rows();
      const int64_t jobs = layer.jobs(S) / tiles(height, each);
      for (int64_t& made = arena.made[last]; made < rows; made += each) {
        if (last > first) make(arena, first, last - 1, layer.reach(made, each < height - made ? each : height - made));
        for (int64_t job = 0; job < jobs; ++job) job_of(layer, arena, step, made / each * jobs + job);
      }
    });
  }

  template <class Kind>
  static void job_of(const Kind& layer, const Arena& arena, const Step& step, int64_t job) {
    const Element* other = step.what.other < 0 ? nullptr : arena.at(step.what.other);
    layer.run(job, arena.at(step.what.in), other, arena.at(step.what.out), S, arena.scratch);
  }

  template <class Use>
  static void visit(const Step& step, const Use& use) {
    if (step.depthwise) return use(*step.depthwise);
    if constexpr (kTiled<Format>)
      if (step.tiled) return use(*step.tiled);
    use(*step.convolution);
  }

  void run(const Arena& arena, const Step& step) const {
    const Element* in = arena.at(step.what.in);
    Element* out = arena.at(step.what.out);
    if (step.pooling) return step.pooling->run(in, out, arena.scratch);
    if constexpr (kTransforms)
      if (const Transforming* w = step.winograd) {
        const Element* other = step.what.other < 0 ? nullptr : arena.at(step.what.other);
        for (int64_t job = 0; job < w->jobs(); ++job) w->run(job, in, other, out, arena.scratch);
        return;
      }
    visit(step, [&](const auto& layer) {
      for (int64_t job = 0; job < layer.jobs(S); ++job) job_of(layer, arena, step, job);
    });
  }

  void count(const Element* place, int64_t n, int64_t* out) const {
    const auto* logits = reinterpret_cast<const typename Format::Logit*>(place);
    for (int64_t s = 0; s < n; ++s) {
      float best = Format::widen(logits[s]);
      int64_t winner = 0;
      bool nan = best != best;
      for (int64_t k = 1; k < a.classes; ++k) {
        const float v = Format::widen(logits[k * S + s]);
        nan |= v != v;
        if (v > best) best = v, winner = k;
      }
      if (!nan) ++out[winner];
    }
  }
};

SampleNetwork* sample_network(const SampleNetworkArgs& a) {
  if (a.dtype == kF32) return new Network<Float32>(a);
#if defined(__AVX512F__)
  const bool multiplies_integers = __builtin_cpu_supports("avx512vnni");
  if (a.dtype == kInt8 && multiplies_integers) return new Network<Int8Quads>(a);
  if (a.dtype == kBF16 && multiplies_integers && __builtin_cpu_supports("avx512bf16"))
    return new Network<Bfloat16Pairs>(a);
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (a.dtype == kInt8) return new Network<Int8Pairs>(a);
#else
  if (a.dtype == kInt8) return new Network<Int8>(a);
#endif
  return new Network<Bfloat16>(a);
}

#if defined(__AVX512F__)
SampleNetwork* sample_network_tiles(const SampleNetworkArgs& a) {
  if (a.dtype == kF32) return new Network<Float32>(a);
  if (a.dtype == kInt8) return new Network<Int8Tiles>(a);
  return new Network<Bfloat16Tiles>(a);
}
#endif

}  // namespace CSAM_ISA
}  // namespace csam
