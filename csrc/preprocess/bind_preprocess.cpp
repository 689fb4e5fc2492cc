// The Python door of the pre-processing kernels. mask2former/data/gpu_resize.py checks the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/device_memory.h"
#include "preprocess/preprocess.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

using namespace preprocess;
using Address = std::uintptr_t;
using Size = std::pair<std::int64_t, std::int64_t>;  // height, width

}  // namespace

void bind_preprocess(py::module_& parent) {
    py::module_ module = parent.def_submodule("preprocess", "Pre-processing on the GPU; see csrc/preprocess/.");
    module.attr("PRECISION_BITS") = int{kPrecisionBits};

    // Bytes of scratch for an image of a size (height, width) and channels, resized to out_size.
    module.def("scratch_bytes", [](Size const& size, int channels, Size const& out_size, bool vertical_first) {
        ResizeArgs args{};
        args.height = size.first;
        args.width = size.second;
        args.channels = channels;
        args.vertical_first = vertical_first;
        args.horizontal.size = out_size.second;
        args.vertical.size = out_size.first;
        return preprocess::scratch_bytes(args);
    });

    module.def(
        "resize_bilinear",
        [](Address image, Size const& size, int channels, bool reverse_channels, bool vertical_first,
           Address horizontal, Address vertical, Address scratch, std::int64_t scratch_size, Address out,
           Size const& out_size, Address stream) {
            ResizeArgs args{reinterpret_cast<std::uint8_t const*>(image),
                            size.first,
                            size.second,
                            channels,
                            reverse_channels,
                            vertical_first,
                            AxisTable{reinterpret_cast<std::int32_t const*>(horizontal), out_size.second},
                            AxisTable{reinterpret_cast<std::int32_t const*>(vertical), out_size.first},
                            reinterpret_cast<std::uint8_t*>(scratch),
                            reinterpret_cast<std::uint8_t*>(out)};
            require_device_memory(
                "resize_bilinear", {{"image", image}, {"horizontal", horizontal}, {"vertical", vertical},
                                    {"scratch", scratch}, {"out", out}});
            preprocess::resize_bilinear(args, scratch_size, reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("image"), py::arg("size"), py::arg("channels"), py::arg("reverse_channels"), py::arg("vertical_first"),
        py::arg("horizontal"), py::arg("vertical"), py::arg("scratch"), py::arg("scratch_size"), py::arg("out"),
        py::arg("out_size"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace d2_trt
