#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/device_memory.h"
#include "mlp/mlp.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

MlpSizes sizes_of(std::vector<std::int64_t> const& widths, bool after) {
    require(
        widths.size() >= 2 && widths.size() <= kMaxMlpLayers + 1, "mlp: ", widths.size(), " widths; expected 2 to ",
        kMaxMlpLayers + 1);
    MlpSizes s;
    s.layers = static_cast<std::int32_t>(widths.size()) - 1;
    for (std::size_t i = 0; i < widths.size(); ++i) {
        require(widths[i] >= 1 && widths[i] <= kMaxMlpWidth, "mlp: a width of ", widths[i], "; expected 1 to ", kMaxMlpWidth);
        s.widths[i] = static_cast<std::int32_t>(widths[i]);
    }
    s.after = after;
    return s;
}

bool takes(std::vector<std::int64_t> const& widths, bool after, std::string const& dtype) {
    return mlp_takes(sizes_of(widths, after), dtype_from_name(dtype, "mlp: type"));
}

void forward(
    std::uintptr_t x, std::uintptr_t weights, std::uintptr_t biases, std::uintptr_t norm, std::uintptr_t residual,
    std::uintptr_t out, std::uintptr_t normed, std::string const& dtype, std::string const& x_dtype,
    std::string const& residual_dtype, std::string const& out_dtype, std::string const& normed_dtype, std::int64_t rows,
    std::vector<std::int64_t> const& widths, bool after, float epsilon, std::uintptr_t stream) {
    require_device_memory(
        "mlp", {{"x", x}, {"weights", weights}, {"biases", biases}, {"norm", norm}, {"residual", residual}, {"out", out},
                {"normed", normed}});
    MlpTensors t;
    t.x = reinterpret_cast<void const*>(x);
    t.weights = reinterpret_cast<void const*>(weights);
    t.biases = reinterpret_cast<float const*>(biases);
    t.norm = reinterpret_cast<float const*>(norm);
    t.residual = reinterpret_cast<void const*>(residual);
    t.out = reinterpret_cast<void*>(out);
    t.normed = reinterpret_cast<void*>(normed);
    t.type = dtype_from_name(dtype, "mlp: type");
    t.x_type = dtype_from_name(x_dtype, "mlp: x");
    t.residual_type = dtype_from_name(residual_dtype, "mlp: residual");
    t.out_type = dtype_from_name(out_dtype, "mlp: out");
    t.normed_type = dtype_from_name(normed_dtype, "mlp: normed");
    MlpSizes s = sizes_of(widths, after);
    s.rows = rows;
    mlp(t, s, epsilon, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_mlp(py::module_& module) {
    module.def(
        "mlp", &forward, py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("norm"),
        py::arg("residual"), py::arg("out"), py::arg("normed"), py::kw_only(), py::arg("dtype"), py::arg("x_dtype"),
        py::arg("residual_dtype"), py::arg("out_dtype"), py::arg("normed_dtype"), py::arg("rows"), py::arg("widths"),
        py::arg("after"), py::arg("epsilon"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Linear layers with LayerNorm before or after them, see mlp.h. Tensors are addresses on the stream's device.");
    module.def(
        "mlp_takes", &takes, py::arg("widths"), py::kw_only(), py::arg("after"), py::arg("dtype"),
        "Whether there is code for layers of these widths.");
}

}  // namespace d2_trt
