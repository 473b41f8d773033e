// csam_kernels._CUDA: the table of contents of csrc/cuda. Tensors arrive as device addresses, checked by the layer
// above; every function ends with the number of multiprocessors and the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace csam::cuda;
using Address = uintptr_t;
using Nogil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MAKE_OPAQUE(std::vector<Layer>)

namespace {

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}
Device device(int multiprocessors, Address stream) {
  return {multiprocessors, at<std::remove_pointer_t<cudaStream_t>>(stream)};
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// (weight, mask, grad, out, out_mask), (rows, cols, row_stride, span, col_stride), dtypes of the first four
using LayerTuple = std::tuple<std::array<Address, 5>, std::array<int64_t, 5>, std::array<int16_t, 4>>;

std::vector<Layer> layers(const std::vector<LayerTuple>& tuples) {
  std::vector<Layer> out;
  for (const auto& [p, y, d] : tuples)
    out.push_back({at<void>(p[0]),
                   at<void>(p[1]),
                   at<void>(p[2]),
                   at<void>(p[3]),
                   at<float>(p[4]),
                   {y[0], y[1], y[2], y[3], y[4]},
                   d[0],
                   d[1],
                   d[2],
                   d[3]});
  return out;
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "Torch-free CUDA kernels of csam_kernels.";
  py::class_<std::vector<Layer>>(m, "Layers", py::module_local(), "The layers of a multi-tensor pass.")
      .def(py::init(&layers))
      .def("units", [](const std::vector<Layer>& l) { return units(l); })
      .def("gradient_room", [](const std::vector<Layer>& l) { return gradient_room(l); });

  m.def(
      "smoothing_noise",
      [](Address x, int64_t n, int64_t channels, int64_t pixels, int law, float scale, uint64_t seed, uint64_t first,
         uint32_t stream, Address out, int dtype, bool channels_last, int multiprocessors, Address on) {
        check(smoothing_noise({at<float>(x), n, channels, pixels, csam::Law(law), scale, seed, first, stream,
                               at<void>(out), dtype, channels_last},
                              device(multiprocessors, on)));
      },
      Nogil());
  m.def(
      "philox_uniform",
      [](Address out, int64_t n, int64_t k, uint64_t seed, uint64_t first, uint32_t stream, int multiprocessors,
         Address on) { check(philox_uniform(at<float>(out), n, k, seed, first, stream, device(multiprocessors, on))); },
      Nogil());
  m.def(
      "count_votes",
      [](Address logits, int64_t n, int64_t classes, int64_t stride, int dtype, Address out, int multiprocessors,
         Address on) {
        check(
            count_votes({at<void>(logits), n, classes, stride, dtype, at<int64_t>(out)}, device(multiprocessors, on)));
      },
      Nogil());
  m.def(
      "mask_step",
      [](const std::vector<Layer>& l, int kind, bool global_norm, double radius, double rho, uint64_t seed,
         uint64_t step, Address partial, Address scales, int multiprocessors, Address on) {
        check(mask_step({l, kind, global_norm, radius, rho, seed, step, at<double>(partial), at<float>(scales)},
                        device(multiprocessors, on)));
      },
      Nogil());
  m.def(
      "mask_gradients",
      [](const std::vector<Layer>& l, Address partial, Address norm, int multiprocessors, Address on) {
        check(mask_gradients({l, at<double>(partial), at<double>(norm)}, device(multiprocessors, on)));
      },
      Nogil());
  m.def("selection_room", &selection_room);
  m.def(
      "binarize",
      [](const std::vector<std::tuple<Address, Address, int64_t, int64_t, int>>& tuples, bool global, int64_t keep,
         Address scratch, int multiprocessors, Address on) {
        Selection s{{}, global, keep, at<void>(scratch)};
        for (const auto& [scores, mask, count, own, dtype] : tuples)
          s.layers.push_back({at<void>(scores), at<uint8_t>(mask), count, own, dtype});
        check(binarize(s, device(multiprocessors, on)));
      },
      Nogil());
  m.def("semantic_room", &semantic_room);
  m.def(
      "semantic_batch",
      [](Address x, int64_t n, int64_t channels, int64_t height, int64_t width, Address params, Address out,
         Address scratch, int multiprocessors, Address on) {
        check(semantic_batch(
            {at<float>(x), n, channels, height, width, at<float>(params), at<float>(out), at<void>(scratch)},
            device(multiprocessors, on)));
      },
      Nogil());
}
