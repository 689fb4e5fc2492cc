// The Python module mask2former._kernels. Pointers, sizes and a stream go in, never tensors: one build serves every
// PyTorch. mask2former/kernels.py and the modules beside it check tensors and call these.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace d2_trt {
void bind_attention(py::module_& module);
void bind_mlp(py::module_& module);
void bind_ms_deform_attn(py::module_& module);
void bind_ms_deform_attn_backward(py::module_& module);
void bind_normalization(py::module_& module);
void bind_postprocess(py::module_& module);
void bind_preprocess(py::module_& module);
void bind_window_attention(py::module_& module);
}  // namespace d2_trt

PYBIND11_MODULE(_kernels, module) {
    module.doc() = "CUDA kernels of d2_trt; see csrc/.";
    // Goes up where functions or their arguments change; mask2former/kernels.py takes no other.
    module.attr("INTERFACE") = 3;
    d2_trt::bind_attention(module);
    d2_trt::bind_mlp(module);
    d2_trt::bind_ms_deform_attn(module);
    d2_trt::bind_ms_deform_attn_backward(module);
    d2_trt::bind_normalization(module);
    d2_trt::bind_postprocess(module);
    d2_trt::bind_preprocess(module);
    d2_trt::bind_window_attention(module);
}
