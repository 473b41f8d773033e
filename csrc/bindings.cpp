// csam_kernels._C: the table of contents. Tensors arrive as addresses; the layer above has checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "common/philox.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using csam::kernels;
using Address = uintptr_t;
using Nogil = py::call_guard<py::gil_scoped_release>;

namespace {

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// (weight, mask, grad, out, out_mask, (rows, cols, row_stride, span, col_stride), scale)
using LayerTuple = std::tuple<Address, Address, Address, Address, Address, std::array<int64_t, 5>, double>;

struct Pass {
  std::vector<csam::MaskLayer> layers;
  csam::MaskPass pass;
  Pass(const std::vector<LayerTuple>& tuples, std::array<int, 4> dtypes, int kind, uint64_t seed, uint64_t step) {
    for (const auto& [weight, mask, grad, out, out_mask, y, scale] : tuples)
      layers.push_back({at<void>(weight),
                        at<void>(mask),
                        at<void>(grad),
                        at<void>(out),
                        at<void>(out_mask),
                        {y[0], y[1], y[2], y[3], y[4]},
                        scale});
    pass = {layers.data(), int64_t(layers.size()), dtypes[0], dtypes[1], dtypes[2], dtypes[3], kind, seed, step};
  }
};

using Window = std::array<std::array<int64_t, 2>, 4>;  // kernel, stride, padding, dilation

// (scales, shift, other_scale, zero, real)
using Integers = std::tuple<Address, float, float, int, bool>;

// (pools, in, other, out, [C, H, W], values, taps, rows, filters, bias, window, (low, high), engine, [H', W'],
// (rows of x, of out), integers)
using StepTuple =
    std::tuple<bool, int64_t, int64_t, int64_t, std::array<int64_t, 3>, Address, Address, Address, int64_t, Address,
               Window, std::array<float, 2>, int, std::array<int64_t, 2>, std::array<int64_t, 2>, Integers>;

std::unique_ptr<csam::SampleNetwork> sample_network(int dtype, std::array<int64_t, 3> image, Address mean, Address std,
                                                    std::array<float, 2> integers, const std::vector<StepTuple>& tuples,
                                                    std::array<int64_t, 4> places, bool draft) {
  std::vector<csam::SampleStep> steps;
  for (const auto& [pools, in, other, out, shape, values, taps, rows, filters, bias, window, range, engine, size, kept,
                    integers] : tuples) {
    const auto& [kernel, stride, padding, dilation] = window;
    csam::SampleStep step = {pools, {}, in, other, out};
    csam::SampleConvArgs& c = step.conv;
    c.dtype = dtype;
    c.channels = shape[0], c.height = shape[1], c.width = shape[2];
    c.values = at<float>(values), c.taps = at<int32_t>(taps), c.rows = at<int32_t>(rows), c.filters = filters;
    c.bias = at<float>(bias);
    for (int i = 0; i < 2; ++i)
      c.kernel[i] = kernel[i], c.stride[i] = stride[i], c.padding[i] = padding[i], c.dilation[i] = dilation[i];
    c.low = range[0], c.high = range[1], c.engine = engine;
    c.out_height = size[0], c.out_width = size[1], c.in_rows = kept[0], c.out_rows = kept[1];
    const auto& [scales, shift, other_scale, zero, real] = integers;
    c.scales = at<float>(scales), c.shift = shift, c.other_scale = other_scale, c.zero = zero, c.real = real;
    steps.push_back(step);
  }
  return std::unique_ptr<csam::SampleNetwork>(kernels().sample_network(
      {dtype, image[0], image[1], image[2], at<float>(mean), at<float>(std), integers[0], integers[1], steps.data(),
       int64_t(steps.size()), places[0], places[1], places[2], places[3], draft}));
}

// (columns, rest, bits)
using CellsTuple = std::tuple<Address, Address, int>;

csam::Cells cells(const CellsTuple& table) {
  const auto& [columns, rest, bits] = table;
  return {at<uint32_t>(columns), at<uint64_t>(rest), bits};
}

struct Block {
  int64_t bytes;
  void* memory;
  explicit Block(int64_t n) : bytes(n), memory(csam::take_block(n)) {}
  Block(const Block&) = delete;
  ~Block() { csam::give_block(memory, bytes); }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Torch-free CPU kernels of csam_kernels.";
  m.def("isa", [] { return std::string(kernels().name); }, "Instruction set in force.");
  m.def("isa_supported", [](const std::string& n) { return std::string(csam::isa_supported(n.c_str())); });
  m.def("set_isa", [](const std::string& n) { csam::set_isa(n.c_str()); }, "auto, generic, avx2, avx512 or amx.");
  m.def("philox4x32", [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
    const csam::Words w = csam::philox4x32({{c[0], c[1], c[2], c[3]}}, key[0], key[1]);
    return std::array<uint32_t, 4>{w.v[0], w.v[1], w.v[2], w.v[3]};
  });

  m.def(
      "philox_uniform",
      [](Address out, int64_t n, int64_t k, uint64_t seed, uint64_t first, uint32_t stream) {
        kernels().philox_uniform(at<float>(out), n, k, seed, first, stream);
      },
      Nogil());
  m.def(
      "smoothing_noise",
      [](Address x, int64_t n, int64_t channels, int64_t pixels, int law, float scale, uint64_t seed, uint64_t first,
         uint32_t stream, Address out, int dtype, bool channels_last, int threads) {
        kernels().smoothing_noise({at<float>(x), n, channels, pixels, csam::Law(law), scale, seed, first, stream,
                                   at<void>(out), dtype, channels_last, nullptr},
                                  threads);
      },
      Nogil());
  m.def(
      "grid_noise",
      [](Address x, int64_t n, int64_t channels, int64_t pixels, const CellsTuple& table, float grid, uint64_t seed,
         uint64_t first, uint32_t stream, Address out, int dtype, bool channels_last, int threads) {
        const csam::Cells c = cells(table);
        kernels().smoothing_noise({at<float>(x), n, channels, pixels, csam::Law::kCells, grid, seed, first, stream,
                                   at<void>(out), dtype, channels_last, &c},
                                  threads);
      },
      Nogil());
  m.def(
      "effective_weights",
      [](const std::vector<LayerTuple>& l, std::array<int, 4> d, int kind, uint64_t seed, uint64_t step, int threads) {
        kernels().effective_weights(Pass(l, d, kind, seed, step).pass, threads);
      },
      Nogil());
  m.def(
      "perturb_masks",
      [](const std::vector<LayerTuple>& l, std::array<int, 4> d, int kind, uint64_t seed, uint64_t step, int threads) {
        kernels().perturb_masks(Pass(l, d, kind, seed, step).pass, threads);
      },
      Nogil());
  m.def(
      "mask_gradients",
      [](const std::vector<LayerTuple>& l, std::array<int, 4> d, int threads) {
        return kernels().mask_gradients(Pass(l, d, csam::kPlain, 0, 0).pass, threads);
      },
      Nogil());
  m.def(
      "squared_norm",
      [](Address g, int64_t n, int dtype, int threads) { return csam::squared_norm(at<void>(g), n, dtype, threads); },
      Nogil());
  m.def(
      "binarize",
      [](const std::vector<Address>& scores, const std::vector<int64_t>& sizes, int dtype, int64_t keep,
         const std::vector<Address>& masks, int threads) {
        csam::binarize(reinterpret_cast<const void* const*>(scores.data()), sizes.data(), int64_t(sizes.size()), dtype,
                       keep, reinterpret_cast<uint8_t* const*>(masks.data()), threads);
      },
      Nogil());
  m.def(
      "percentile_init",
      [](Address w, int64_t n, int dtype, double tau, Address out) {
        csam::percentile_init(at<void>(w), n, dtype, tau, at<void>(out));
      },
      Nogil());
  m.def(
      "count_votes",
      [](Address logits, int64_t n, int64_t classes, int64_t stride, int dtype, Address out, int threads) {
        kernels().count_votes({at<void>(logits), n, classes, stride, dtype, at<int64_t>(out)}, threads);
      },
      Nogil());
  m.def(
      "discrepancy",
      [](Address clean, Address logits, int64_t n, int64_t classes, int64_t stride, int dtype, Address out,
         Address changed, int threads) {
        kernels().discrepancy(
            {at<double>(clean), at<void>(logits), n, classes, stride, dtype, at<double>(out), at<bool>(changed)},
            threads);
      },
      Nogil());
  m.def(
      "semantic_batch",
      [](Address x, int64_t n, int64_t channels, int64_t height, int64_t width, Address params, Address out,
         int threads) {
        kernels().semantic_batch({at<float>(x), n, channels, height, width, at<float>(params), at<float>(out)},
                                 threads);
      },
      Nogil());
  m.def(
      "sample_conv2d",
      [](Address x, int dtype, std::array<int64_t, 4> shape, Address values, Address taps, Address rows,
         int64_t filters, Address bias, Address other, Window window, bool relu, bool dense, Address out,
         std::array<int64_t, 2> out_size, int threads) {
        const auto& [kernel, stride, padding, dilation] = window;
        kernels().sample_conv2d({at<void>(x),
                                 dtype,
                                 shape[0],
                                 shape[1],
                                 shape[2],
                                 shape[3],
                                 at<float>(values),
                                 at<int32_t>(taps),
                                 at<int32_t>(rows),
                                 filters,
                                 at<float>(bias),
                                 at<void>(other),
                                 {kernel[0], kernel[1]},
                                 {stride[0], stride[1]},
                                 {padding[0], padding[1]},
                                 {dilation[0], dilation[1]},
                                 relu ? 0 : -INFINITY,
                                 INFINITY,
                                 dense ? csam::kDense : csam::kSparse,
                                 nullptr,
                                 0,
                                 0,
                                 0,
                                 false,
                                 at<void>(out),
                                 out_size[0],
                                 out_size[1]},
                                threads);
      },
      Nogil());
  py::class_<csam::SampleNetwork>(m, "SampleNetwork", py::module_local(),
                                  "A network on samples that lie innermost; copies its weights.")
      .def(py::init(&sample_network))
      .def_property_readonly("format", &csam::SampleNetwork::format)
      .def_property_readonly("lanes", &csam::SampleNetwork::lanes)
      .def_property_readonly("memory", &csam::SampleNetwork::memory)
      .def(
          "votes",
          [](const csam::SampleNetwork& s, Address x, int law, float scale, uint64_t seed, uint32_t stream,
             uint64_t first, int64_t n, Address out) {
            s.votes(at<float>(x), csam::Law(law), scale, nullptr, seed, stream, first, n, at<int64_t>(out));
          },
          Nogil())
      .def(
          "grid_votes",
          [](const csam::SampleNetwork& s, Address x, const CellsTuple& table, float grid, uint64_t seed,
             uint32_t stream, uint64_t first, int64_t n, Address out) {
            const csam::Cells c = cells(table);
            s.votes(at<float>(x), csam::Law::kCells, grid, &c, seed, stream, first, n, at<int64_t>(out));
          },
          Nogil())
      .def(
          "costs", [](const csam::SampleNetwork& s, Address vectors) { s.costs(at<double>(vectors)); }, Nogil())
      .def(
          "times",
          [](const csam::SampleNetwork& s, int64_t rounds, Address seconds) { s.times(rounds, at<double>(seconds)); },
          Nogil())
      .def(
          "logits",
          [](const csam::SampleNetwork& s, Address x, int64_t n, Address out) {
            s.logits(at<void>(x), n, at<float>(out));
          },
          Nogil());
  py::class_<Block>(m, "Block", py::buffer_protocol(), py::module_local(),
                    "Memory of a large result; torch.frombuffer makes a tensor of it.")
      .def(py::init<int64_t>())
      .def_buffer([](Block& b) { return py::buffer_info(static_cast<uint8_t*>(b.memory), b.bytes); });
}
