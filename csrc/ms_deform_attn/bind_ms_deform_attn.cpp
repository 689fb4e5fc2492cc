#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "common/device_memory.h"
#include "ms_deform_attn/ms_deform_attn.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

MsDeformAttnTensors tensors_of(
    std::uintptr_t value, std::uintptr_t offsets, std::uintptr_t logits, std::uintptr_t out, std::string const& value_dtype,
    std::string const& sampling_dtype) {
    MsDeformAttnTensors tensors;
    tensors.value = reinterpret_cast<void const*>(value);
    tensors.offsets = reinterpret_cast<void const*>(offsets);
    tensors.logits = reinterpret_cast<void const*>(logits);
    tensors.out = reinterpret_cast<void*>(out);
    tensors.value_type = dtype_from_name(value_dtype, "ms_deform_attn: value");
    tensors.sampling_type = dtype_from_name(sampling_dtype, "ms_deform_attn: offsets and logits");
    return tensors;
}

MsDeformAttnSizes sizes_of(
    std::int64_t batch, std::int64_t pixels, std::int64_t heads, std::int64_t dim, std::int64_t levels, std::int64_t points,
    std::int64_t offsets_stride, std::int64_t logits_stride) {
    MsDeformAttnSizes sizes;
    sizes.batch = batch;
    sizes.pixels = pixels;
    sizes.heads = heads;
    sizes.dim = dim;
    sizes.levels = levels;
    sizes.points = points;
    sizes.offsets_stride = offsets_stride;
    sizes.logits_stride = logits_stride;
    return sizes;
}

void forward(
    std::uintptr_t value, std::uintptr_t offsets, std::uintptr_t logits, std::uintptr_t out, std::string const& value_dtype,
    std::string const& sampling_dtype, std::int64_t batch, std::int64_t heads, std::int64_t dim, std::int64_t points,
    std::int64_t offsets_stride, std::int64_t logits_stride, std::vector<std::array<std::int64_t, 2>> const& level_sizes,
    std::uintptr_t stream) {
    require(
        !level_sizes.empty() && level_sizes.size() <= kMaxLevels, "ms_deform_attn: ", level_sizes.size(),
        " levels; expected 1 to ", kMaxLevels);
    std::int32_t narrow[kMaxLevels][2];
    std::int64_t pixels = 0;
    for (std::size_t i = 0; i < level_sizes.size(); ++i) {
        for (int side = 0; side < 2; ++side) {
            std::int64_t const size = level_sizes[i][side];
            require(
                size >= 0 && size <= INT32_MAX, "ms_deform_attn: level ", i, " is ", level_sizes[i][0], "x",
                level_sizes[i][1], " (height x width); expected 0 to ", INT32_MAX, " each");
            narrow[i][side] = static_cast<std::int32_t>(size);
        }
        pixels += level_sizes[i][0] * level_sizes[i][1];
        require(pixels <= INT32_MAX, "ms_deform_attn: the levels hold more than ", INT32_MAX, " pixels");
    }
    require_device_memory(
        "ms_deform_attn", {{"value", value}, {"offsets", offsets}, {"logits", logits}, {"out", out}});
    ms_deform_attn(
        tensors_of(value, offsets, logits, out, value_dtype, sampling_dtype),
        sizes_of(
            batch, pixels, heads, dim, static_cast<std::int64_t>(level_sizes.size()), points, offsets_stride, logits_stride),
        narrow, reinterpret_cast<cudaStream_t>(stream));
}

void forward_device_levels(
    std::uintptr_t value, std::uintptr_t offsets, std::uintptr_t logits, std::uintptr_t out, std::string const& value_dtype,
    std::string const& sampling_dtype, std::int64_t batch, std::int64_t pixels, std::int64_t heads, std::int64_t dim,
    std::int64_t levels, std::int64_t points, std::int64_t offsets_stride, std::int64_t logits_stride,
    std::uintptr_t level_sizes, std::uintptr_t stream) {
    require_device_memory(
        "ms_deform_attn_device_levels",
        {{"value", value}, {"offsets", offsets}, {"logits", logits}, {"out", out}, {"level_sizes", level_sizes}});
    ms_deform_attn_device_levels(
        tensors_of(value, offsets, logits, out, value_dtype, sampling_dtype),
        sizes_of(batch, pixels, heads, dim, levels, points, offsets_stride, logits_stride),
        reinterpret_cast<std::int32_t const*>(level_sizes), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_ms_deform_attn(py::module_& module) {
    module.attr("MS_DEFORM_ATTN_MAX_LEVELS") = kMaxLevels;
    module.attr("MS_DEFORM_ATTN_MAX_POINTS") = kMaxPoints;
    module.def(
        "ms_deform_attn", &forward, py::arg("value"), py::arg("offsets"), py::arg("logits"), py::arg("out"),
        py::kw_only(), py::arg("value_dtype"), py::arg("sampling_dtype"), py::arg("batch"), py::arg("heads"),
        py::arg("dim"), py::arg("points"), py::arg("offsets_stride"), py::arg("logits_stride"), py::arg("level_sizes"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Multi-scale deformable attention, see ms_deform_attn.h. Tensors are addresses on the stream's device.");
    module.def(
        "ms_deform_attn_device_levels", &forward_device_levels, py::arg("value"), py::arg("offsets"), py::arg("logits"),
        py::arg("out"), py::kw_only(), py::arg("value_dtype"), py::arg("sampling_dtype"), py::arg("batch"),
        py::arg("pixels"), py::arg("heads"), py::arg("dim"), py::arg("levels"), py::arg("points"), py::arg("offsets_stride"),
        py::arg("logits_stride"), py::arg("level_sizes"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "The same with level sizes in device memory, as the TensorRT plugin has them.");
}

}  // namespace d2_trt
