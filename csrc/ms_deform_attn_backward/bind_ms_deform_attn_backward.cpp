#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/device_memory.h"
#include "ms_deform_attn/ms_deform_attn.h"
#include "ms_deform_attn_backward/ms_deform_attn_backward.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

void backward(
    std::uintptr_t grad, std::uintptr_t value, std::uintptr_t offsets, std::uintptr_t logits, std::uintptr_t grad_value,
    std::uintptr_t grad_offsets, std::uintptr_t grad_logits, std::int64_t batch, std::int64_t pixels, std::int64_t heads,
    std::int64_t dim, std::int64_t points, std::vector<std::array<std::int32_t, 2>> const& level_sizes, std::uintptr_t stream) {
    std::int64_t const levels = static_cast<std::int64_t>(level_sizes.size());
    require(
        levels >= 1 && levels <= kMaxLevels, "ms_deform_attn_backward: ", levels, " levels; expected 1 to ", kMaxLevels);
    require_device_memory(
        "ms_deform_attn_backward", {{"grad", grad}, {"value", value}, {"offsets", offsets}, {"logits", logits},
                                    {"grad_value", grad_value}, {"grad_offsets", grad_offsets}, {"grad_logits", grad_logits}});
    std::int32_t sizes[kMaxLevels][2];
    for (std::int64_t i = 0; i < levels; ++i) sizes[i][0] = level_sizes[i][0], sizes[i][1] = level_sizes[i][1];
    MsDeformAttnBackwardTensors tensors;
    tensors.grad = reinterpret_cast<float const*>(grad);
    tensors.value = reinterpret_cast<float const*>(value);
    tensors.offsets = reinterpret_cast<float const*>(offsets);
    tensors.logits = reinterpret_cast<float const*>(logits);
    tensors.grad_value = reinterpret_cast<float*>(grad_value);
    tensors.grad_offsets = reinterpret_cast<float*>(grad_offsets);
    tensors.grad_logits = reinterpret_cast<float*>(grad_logits);
    ms_deform_attn_backward(
        tensors, {batch, pixels, heads, dim, levels, points}, sizes, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_ms_deform_attn_backward(py::module_& module) {
    module.def(
        "ms_deform_attn_backward", &backward, py::kw_only(), py::arg("grad"), py::arg("value"), py::arg("offsets"),
        py::arg("logits"), py::arg("grad_value"), py::arg("grad_offsets"), py::arg("grad_logits"), py::arg("batch"),
        py::arg("pixels"), py::arg("heads"), py::arg("dim"), py::arg("points"), py::arg("level_sizes"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(),
        "Gradients of ms_deform_attn in float32, see ms_deform_attn_backward.h. Tensors are addresses on the stream's device.");
}

}  // namespace d2_trt
