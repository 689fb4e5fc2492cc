#include <pybind11/pybind11.h>

#include <string>

#include "attention/attention.h"
#include "attention/mask_features.h"
#include "common/device_memory.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

AttentionSizes sizes_of(
    std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t dim,
    std::int64_t mask_dim) {
    AttentionSizes sizes;
    sizes.batch = batch;
    sizes.queries = queries;
    sizes.keys = keys;
    sizes.heads = heads;
    sizes.dim = dim;
    sizes.mask_dim = mask_dim;
    sizes.q_stride = sizes.k_stride = sizes.v_stride = heads * dim;
    return sizes;
}

std::size_t workspace(
    std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t dim,
    std::int64_t mask_dim) {
    return attention_workspace(sizes_of(batch, queries, keys, heads, dim, mask_dim));
}

void forward(
    std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out, std::uintptr_t q_pos, std::uintptr_t k_pos,
    std::uintptr_t mask_embed, std::uintptr_t features, std::uintptr_t workspace, std::string const& dtype,
    std::int64_t batch, std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t dim, std::int64_t mask_dim,
    std::int64_t q_stride, std::int64_t k_stride, std::int64_t v_stride, std::int64_t pos_stride, std::uintptr_t stream) {
    require_device_memory(
        "attention", {{"q", q}, {"k", k}, {"v", v}, {"out", out}, {"q_pos", q_pos}, {"k_pos", k_pos},
                      {"mask_embed", mask_embed}, {"features", features}, {"workspace", workspace}});
    AttentionSizes sizes = sizes_of(batch, queries, keys, heads, dim, mask_dim);
    sizes.q_stride = q_stride;
    sizes.k_stride = k_stride;
    sizes.v_stride = v_stride;
    sizes.pos_stride = pos_stride;
    AttentionTensors tensors;
    tensors.q = reinterpret_cast<void const*>(q);
    tensors.k = reinterpret_cast<void const*>(k);
    tensors.v = reinterpret_cast<void const*>(v);
    tensors.out = reinterpret_cast<void*>(out);
    tensors.q_pos = reinterpret_cast<void const*>(q_pos);
    tensors.k_pos = reinterpret_cast<void const*>(k_pos);
    tensors.mask_embed = reinterpret_cast<float const*>(mask_embed);
    tensors.features = reinterpret_cast<void const*>(features);
    tensors.workspace = reinterpret_cast<void*>(workspace);
    tensors.type = dtype_from_name(dtype, "attention: q, k and v");
    attention(tensors, sizes, reinterpret_cast<cudaStream_t>(stream));
}

void product(
    std::uintptr_t embed, std::uintptr_t features, std::uintptr_t logits, std::string const& dtype, std::int64_t batch,
    std::int64_t queries, std::int64_t pixels, std::int64_t channels, std::uintptr_t stream) {
    require_device_memory("mask_product", {{"embed", embed}, {"features", features}, {"logits", logits}});
    mask_product(
        reinterpret_cast<float const*>(embed), reinterpret_cast<void const*>(features), reinterpret_cast<float*>(logits),
        dtype_from_name(dtype, "mask_product: features"), batch, queries, pixels, channels,
        reinterpret_cast<cudaStream_t>(stream));
}

void resize(
    std::uintptr_t features, std::uintptr_t out, std::string const& dtype, std::int64_t batch, std::int64_t height,
    std::int64_t width, std::int64_t channels, std::int64_t out_height, std::int64_t out_width, std::uintptr_t stream) {
    require_device_memory("resize_mask_features", {{"features", features}, {"out", out}});
    ResizeSizes sizes;
    sizes.batch = batch;
    sizes.channels = channels;
    sizes.height = height;
    sizes.width = width;
    sizes.out_height = out_height;
    sizes.out_width = out_width;
    resize_mask_features(
        reinterpret_cast<void const*>(features), reinterpret_cast<void*>(out),
        dtype_from_name(dtype, "resize_mask_features: features"), sizes, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_attention(py::module_& module) {
    module.def(
        "attention_workspace", &workspace, py::kw_only(), py::arg("batch"), py::arg("queries"), py::arg("keys"),
        py::arg("heads"), py::arg("dim"), py::arg("mask_dim"),
        "Bytes of workspace that attention needs at most, on the current device.");
    module.def(
        "attention", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::kw_only(),
        py::arg("q_pos") = 0, py::arg("k_pos") = 0, py::arg("mask_embed") = 0, py::arg("features") = 0,
        py::arg("workspace") = 0, py::arg("dtype"), py::arg("batch"), py::arg("queries"), py::arg("keys"), py::arg("heads"),
        py::arg("dim"), py::arg("mask_dim") = 0, py::arg("q_stride"), py::arg("k_stride"), py::arg("v_stride"),
        py::arg("pos_stride") = 0, py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Attention with masked attention's mask or none, see attention.h. Tensors are addresses on the stream's device.");
    module.def(
        "mask_product", &product, py::arg("embed"), py::arg("features"), py::arg("logits"), py::kw_only(), py::arg("dtype"),
        py::arg("batch"), py::arg("queries"), py::arg("pixels"), py::arg("channels"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(),
        "Mask logits, see mask_features.h. Tensors are addresses on the stream's device.");
    module.def(
        "resize_mask_features", &resize, py::arg("features"), py::arg("out"), py::kw_only(), py::arg("dtype"),
        py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("channels"), py::arg("out_height"),
        py::arg("out_width"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
        "Mask features of a level, see mask_features.h. Tensors are addresses on the stream's device.");
}

}  // namespace d2_trt
