#include <pybind11/pybind11.h>

#include "common/device_memory.h"
#include "window_attention/window_attention.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

void forward(
    std::uintptr_t qkv, std::uintptr_t qkv_bias, std::uintptr_t bias, std::uintptr_t out, std::string const& dtype,
    std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t heads, std::int64_t dim, std::int64_t window,
    std::int64_t shift, float scale, std::uintptr_t stream) {
    require_device_memory(
        "window_attention", {{"qkv", qkv}, {"qkv_bias", qkv_bias}, {"bias", bias}, {"out", out}});
    WindowAttentionTensors t;
    t.qkv = reinterpret_cast<void const*>(qkv);
    t.qkv_bias = reinterpret_cast<float const*>(qkv_bias);
    t.bias = reinterpret_cast<float const*>(bias);
    t.out = reinterpret_cast<void*>(out);
    t.type = dtype_from_name(dtype, "window_attention: qkv");
    WindowAttentionSizes s;
    s.batch = batch;
    s.height = height;
    s.width = width;
    s.heads = heads;
    s.dim = dim;
    s.window = window;
    s.shift = shift;
    window_attention(t, s, scale, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_window_attention(py::module_& module) {
    module.def(
        "window_attention", &forward, py::arg("qkv"), py::arg("qkv_bias"), py::arg("bias"), py::arg("out"), py::kw_only(),
        py::arg("dtype"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("heads"), py::arg("dim"),
        py::arg("window"), py::arg("shift"), py::arg("scale"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Attention inside shifted windows, see window_attention.h. Tensors are addresses on the stream's device.");
}

}  // namespace d2_trt
