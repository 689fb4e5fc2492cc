#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "common/check.h"
#include "ms_deform_attn/ms_deform_attn.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

void forward(
    std::uintptr_t value, std::uintptr_t offsets, std::uintptr_t logits, std::uintptr_t out, std::string const& value_dtype,
    std::string const& sampling_dtype, std::int64_t batch, std::int64_t heads, std::int64_t dim, std::int64_t points,
    std::vector<std::array<std::int64_t, 2>> const& level_sizes, std::uintptr_t stream) {
    MsDeformAttnSizes sizes;
    sizes.batch = batch;
    sizes.heads = heads;
    sizes.dim = dim;
    sizes.points = points;
    sizes.levels = static_cast<std::int64_t>(level_sizes.size());
    require(
        !level_sizes.empty() && level_sizes.size() <= kMaxLevels, "ms_deform_attn: ", level_sizes.size(),
        " levels; expected 1 to ", kMaxLevels);
    std::int32_t narrow[kMaxLevels][2];
    for (std::size_t i = 0; i < level_sizes.size(); ++i) {
        for (int side = 0; side < 2; ++side) {
            std::int64_t const size = level_sizes[i][side];
            require(
                size >= 0 && size <= INT32_MAX, "ms_deform_attn: level ", i, " is ", level_sizes[i][0], "x",
                level_sizes[i][1], " (height x width); expected 0 to ", INT32_MAX, " each");
            narrow[i][side] = static_cast<std::int32_t>(size);
        }
        sizes.pixels += level_sizes[i][0] * level_sizes[i][1];
        require(sizes.pixels <= INT32_MAX, "ms_deform_attn: the levels hold more than ", INT32_MAX, " pixels");
    }
    MsDeformAttnTensors tensors;
    tensors.value = reinterpret_cast<void const*>(value);
    tensors.offsets = reinterpret_cast<void const*>(offsets);
    tensors.logits = reinterpret_cast<void const*>(logits);
    tensors.out = reinterpret_cast<void*>(out);
    tensors.value_type = dtype_from_name(value_dtype, "ms_deform_attn: value");
    tensors.sampling_type = dtype_from_name(sampling_dtype, "ms_deform_attn: offsets and logits");
    ms_deform_attn(tensors, sizes, narrow, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_ms_deform_attn(py::module_& module) {
    module.attr("MS_DEFORM_ATTN_MAX_LEVELS") = kMaxLevels;
    module.attr("MS_DEFORM_ATTN_MAX_POINTS") = kMaxPoints;
    module.def(
        "ms_deform_attn", &forward, py::arg("value"), py::arg("offsets"), py::arg("logits"), py::arg("out"),
        py::kw_only(), py::arg("value_dtype"), py::arg("sampling_dtype"), py::arg("batch"), py::arg("heads"),
        py::arg("dim"), py::arg("points"), py::arg("level_sizes"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(),
        "Multi-scale deformable attention, see ms_deform_attn.h. Tensors are addresses on the stream's device.");
}

}  // namespace d2_trt
