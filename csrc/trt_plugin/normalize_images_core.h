// The TensorRT plugin of the images' normalisation: (images - mean) / std.
//
// Inputs: images (B, C, H, W), mean (C) and std (C), float32, LINEAR: TensorRT's plugins take no bytes. Output: (B, C, H, W)
// of out_type, in whatever layout the first convolution likes, so that no reformat follows: LINEAR; channels last as in
// GroupNorm's plugin (kHWC8 of 16-bit types, kHWC of float32), for up to 8 channels; float16 of up to 4 channels also kCHW4,
// which is half as large. Channels that pad a pixel are zeros.
#pragma once

#include "normalization/normalization.h"
#include "trt_plugin/plugin.h"

namespace d2_trt::plugin {

struct NormalizeImagesPlugin {
    static constexpr char const* kName = "D2TRTNormalizeImages";
    static constexpr char const* kVersion = "1";
    enum Tensor : int { kImages = 0, kMean = 1, kStd = 2, kOut = 3 };

    std::int32_t out_type = 0;
    std::int32_t channels = 0;

    static std::array<Field<NormalizeImagesPlugin>, 2> fields() {
        return {{{"out_type", &NormalizeImagesPlugin::out_type}, {"channels", &NormalizeImagesPlugin::channels}}};
    }

    void check() const {
        check_type("out_type", out_type);
        require(channels >= 1 && channels <= 1 << 10, "channels is ", channels, "; expected 1 to 2^10");
    }

    int inputs() const { return 3; }
    int outputs() const { return 1; }
    nvinfer1::DataType output_type(int) const { return trt_type(out_type); }

    // Elements from pixel to pixel in a format; 0: planar, -1: not of ours.
    int pixel_stride(nvinfer1::TensorFormat format) const {
        DType const type = static_cast<DType>(out_type);
        switch (format) {
            case nvinfer1::TensorFormat::kLINEAR: return 0;
            case nvinfer1::TensorFormat::kHWC8: return type == DType::kFloat32 ? -1 : 8;
            case nvinfer1::TensorFormat::kCHW4: return type == DType::kFloat16 ? 4 : -1;
            case nvinfer1::TensorFormat::kHWC: return type == DType::kFloat32 ? channels : -1;
            default: return -1;
        }
    }

    bool supports(int at, nvinfer1::PluginTensorDesc const* tensors) const {
        if (at >= kImages && at < kOut) return is_linear(tensors[at], nvinfer1::DataType::kFLOAT);
        if (at != kOut || tensors[at].type != trt_type(out_type)) return false;
        int const stride = pixel_stride(tensors[at].format);
        return stride >= 0 && normalize_images_takes_stride(channels, stride);
    }

    void check_ranks(nvinfer1::Dims const* in) const {
        constexpr std::int32_t kRanks[] = {4, 1, 1};
        constexpr char const* kNames[] = {"images", "mean", "std"};
        for (int i = 0; i < 3; ++i) {
            require(in[i].nbDims == kRanks[i], kNames[i], " has ", in[i].nbDims, " dimensions; expected ", kRanks[i]);
        }
    }

    void output_dims(nvinfer1::DimsExprs const* in, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder&) const {
        *out = in[kImages];
    }

    std::size_t workspace(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*) const { return 0; }

    void enqueue(
        nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out, void const* const* inputs,
        void* const* outputs, void*, cudaStream_t stream) const {
        nvinfer1::Dims const dims[] = {in[0].dims, in[1].dims, in[2].dims};
        check_ranks(dims);
        for (int i = 0; i < 3; ++i) {
            std::int64_t const given = dims[i].d[i == kImages ? 1 : 0];
            require(given == channels, i == kImages ? "images" : "mean or std", " of ", given, " channels; expected ", channels);
        }
        ImageSizes sizes;
        sizes.batch = dims[kImages].d[0];
        sizes.channels = channels;
        sizes.pixels = static_cast<std::int64_t>(dims[kImages].d[2]) * dims[kImages].d[3];
        sizes.pixel_stride = pixel_stride(out[0].format);
        NormalizeImagesTensors t;
        t.images = static_cast<float const*>(inputs[kImages]);
        t.mean = static_cast<float const*>(inputs[kMean]);
        t.std = static_cast<float const*>(inputs[kStd]);
        t.out = outputs[0];
        t.out_type = static_cast<DType>(out_type);
        normalize_images(t, sizes, stream);
    }
};

}  // namespace d2_trt::plugin
