#include <pybind11/pybind11.h>

#include "common/device_memory.h"
#include "normalization/normalization.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

void bound_layer_norm(
    std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out,
    std::string const& x_dtype, std::string const& residual_dtype, std::string const& out_dtype, std::int64_t rows,
    std::int64_t channels, float epsilon, std::uintptr_t stream, std::uintptr_t position, std::uintptr_t sum,
    std::string const& position_dtype, std::int64_t position_rows) {
    require_device_memory(
        "layer_norm", {{"x", x}, {"residual", residual}, {"weight", weight}, {"bias", bias}, {"out", out},
                       {"position", position}, {"sum", sum}});
    LayerNormTensors t;
    t.x = reinterpret_cast<void const*>(x);
    t.residual = reinterpret_cast<void const*>(residual);
    t.weight = reinterpret_cast<float const*>(weight);
    t.bias = reinterpret_cast<float const*>(bias);
    t.out = reinterpret_cast<void*>(out);
    t.x_type = dtype_from_name(x_dtype, "layer_norm: x");
    t.residual_type = dtype_from_name(residual_dtype, "layer_norm: residual");
    t.out_type = dtype_from_name(out_dtype, "layer_norm: out");
    t.position = reinterpret_cast<void const*>(position);
    t.sum = reinterpret_cast<void*>(sum);
    t.position_type = dtype_from_name(position_dtype, "layer_norm: position");
    t.position_rows = position_rows;
    layer_norm(t, rows, channels, epsilon, reinterpret_cast<cudaStream_t>(stream));
}

GroupNormSizes sizes_of(std::int64_t batch, std::int64_t channels, std::int64_t pixels, std::int64_t groups) {
    GroupNormSizes sizes;
    sizes.batch = batch;
    sizes.channels = channels;
    sizes.pixels = pixels;
    sizes.groups = groups;
    return sizes;
}

MapLayout layout_of(bool channels_last) { return channels_last ? MapLayout::kChannelsLast : MapLayout::kPlanar; }

void bound_group_norm(
    std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out, std::uintptr_t workspace,
    std::string const& x_dtype, std::string const& out_dtype, std::int64_t batch, std::int64_t channels, std::int64_t pixels,
    std::int64_t groups, float epsilon, bool relu, bool channels_last, std::uintptr_t stream) {
    require_device_memory(
        "group_norm", {{"x", x}, {"weight", weight}, {"bias", bias}, {"out", out}, {"workspace", workspace}});
    GroupNormTensors t;
    t.x = reinterpret_cast<void const*>(x);
    t.weight = reinterpret_cast<float const*>(weight);
    t.bias = reinterpret_cast<float const*>(bias);
    t.out = reinterpret_cast<void*>(out);
    t.workspace = reinterpret_cast<void*>(workspace);
    t.x_type = dtype_from_name(x_dtype, "group_norm: x");
    t.out_type = dtype_from_name(out_dtype, "group_norm: out");
    t.layout = layout_of(channels_last);
    group_norm(t, sizes_of(batch, channels, pixels, groups), epsilon, relu, reinterpret_cast<cudaStream_t>(stream));
}

void bound_normalize_images(
    std::uintptr_t images, std::uintptr_t mean, std::uintptr_t std, std::uintptr_t out, std::string const& out_dtype,
    std::int64_t batch, std::int64_t channels, std::int64_t pixels, std::int64_t pixel_stride, std::uintptr_t stream) {
    require_device_memory("normalize_images", {{"images", images}, {"mean", mean}, {"std", std}, {"out", out}});
    NormalizeImagesTensors t;
    t.images = reinterpret_cast<float const*>(images);
    t.mean = reinterpret_cast<float const*>(mean);
    t.std = reinterpret_cast<float const*>(std);
    t.out = reinterpret_cast<void*>(out);
    t.out_type = dtype_from_name(out_dtype, "normalize_images: out");
    ImageSizes sizes;
    sizes.batch = batch;
    sizes.channels = channels;
    sizes.pixels = pixels;
    sizes.pixel_stride = pixel_stride;
    normalize_images(t, sizes, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_normalization(py::module_& module) {
    module.def(
        "layer_norm", &bound_layer_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
        py::arg("out"), py::kw_only(), py::arg("x_dtype"), py::arg("residual_dtype"), py::arg("out_dtype"), py::arg("rows"),
        py::arg("channels"), py::arg("epsilon"), py::arg("stream"), py::arg("position") = 0, py::arg("sum") = 0,
        py::arg("position_dtype") = "float32", py::arg("position_rows") = 0, py::call_guard<py::gil_scoped_release>(),
        "LayerNorm of rows, see normalization.h. Tensors are addresses on the stream's device; residual, position and sum may "
        "be 0.");
    module.def(
        "group_norm_workspace",
        [](std::int64_t batch, std::int64_t channels, std::int64_t pixels, std::int64_t groups, bool channels_last) {
            return group_norm_workspace(sizes_of(batch, channels, pixels, groups), layout_of(channels_last));
        },
        py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("groups"), py::arg("channels_last"),
        "Bytes of scratch memory that group_norm needs.");
    module.def(
        "group_norm", &bound_group_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("workspace"), py::kw_only(), py::arg("x_dtype"), py::arg("out_dtype"), py::arg("batch"), py::arg("channels"),
        py::arg("pixels"), py::arg("groups"), py::arg("epsilon"), py::arg("relu"), py::arg("channels_last"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "GroupNorm of maps, see normalization.h. Tensors are addresses on the stream's device.");
    module.def(
        "normalize_images", &bound_normalize_images, py::arg("images"), py::arg("mean"), py::arg("std"), py::arg("out"),
        py::kw_only(), py::arg("out_dtype"), py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("pixel_stride"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Images less their mean, over their standard deviation, see normalization.h. Tensors are addresses on the stream's "
        "device.");
}

}  // namespace d2_trt
