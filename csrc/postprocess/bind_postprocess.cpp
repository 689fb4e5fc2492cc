// The Python door of the post-processing kernels. mask2former/postprocessing_cuda.py checks the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/device_memory.h"
#include "postprocess/checks.h"
#include "postprocess/postprocess.h"

namespace py = pybind11;

namespace d2_trt {
namespace {

using namespace postprocess;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address handle) { return reinterpret_cast<cudaStream_t>(handle); }

ThingClasses thing_classes(std::vector<int> const& ids) {
    ThingClasses things{};
    for (int id : ids) {
        require(id >= 0 && id < kMaxClasses, "thing class ", id, " is outside 0 to ", kMaxClasses - 1);
        things.words[id / 32] |= 1u << (id % 32);
    }
    return things;
}

Masks masks_of(Address data, std::string const& dtype, std::int64_t query_stride) {
    return {pointer<void>(data), dtype_from_name(dtype, "pred_masks"), query_stride};
}

}  // namespace

void bind_postprocess(py::module_& parent) {
    py::module_ module = parent.def_submodule("postprocess", "Post-processing on the GPU; see csrc/postprocess/.");
    using release_gil = py::call_guard<py::gil_scoped_release>;

    module.attr("MAX_QUERIES") = int{kMaxQueries};
    module.attr("MAX_CLASSES") = int{kMaxClasses};

    py::class_<Geometry>(module, "Geometry")
        .def(py::init([](std::pair<int, int> mask, std::pair<int, int> padded, std::pair<int, int> image,
                         std::pair<int, int> out) {
            require(padded.first > 0 && padded.second > 0 && image.first <= padded.first &&
                        image.second <= padded.second,
                    "Geometry: an image of ", image.first, "x", image.second, " in a padded one of ", padded.first, "x",
                    padded.second, " (height x width); expected it to fit");
            Geometry g = make_geometry(mask.first, mask.second, padded.first, padded.second, image.first, image.second,
                                       out.first, out.second);
            check_geometry("Geometry", g);
            return g;
        }), py::arg("mask_size"), py::arg("padded_size"), py::arg("image_size"), py::arg("output_size"))
        .def_property_readonly("mask_tiles", [](Geometry const& g) { return mask_tiles(g); });

    py::class_<ThingClasses>(module, "ThingClasses").def(py::init(&thing_classes), py::arg("ids"));

    module.def("work_words", [](int queries) {
        check_queries("work_words", queries);
        return WorkLayout{queries}.words();
    });
    module.def("semantic_weights_bytes", &semantic_weights_bytes, py::arg("queries"), py::arg("classes"));
    // Offsets in an image's report, in words.
    module.def("report_layout", [](int queries, int topk) {
        check_queries("report_layout", queries);
        check_topk("report_layout", topk, 0, queries);
        ReportLayout at{queries, topk};
        py::dict places;
        places["slots"] = at.slots();
        places["instances"] = at.instances();
        places["segments"] = at.segments();
        places["runs"] = at.runs();
        places["segment_classes"] = at.segment_classes();
        places["instance_slots"] = at.instance_slots();
        places["run_starts"] = at.run_starts();
        places["run_counts"] = at.run_counts();
        places["words"] = at.words();
        return places;
    });

    module.def(
        "top_pairs",
        [](Address probs, int batch, int queries, int classes, int topk, Address pair_scores, Address pairs,
           Address stream) {
            require_device_memory("top_pairs", {{"probs", probs}, {"pair_scores", pair_scores}, {"pairs", pairs}});
            postprocess::top_pairs(pointer<float>(probs), batch, queries, classes, topk, pointer<float>(pair_scores),
                                   pointer<std::int64_t>(pairs), stream_of(stream));
        },
        release_gil());

    module.def(
        "select",
        [](Address probs, Address pair_scores, Address pairs, int batch, int queries, int classes, int topk,
           bool panoptic, bool things_only, float score_threshold, Address work, Address report,
           Address instance_scores, Address instance_labels, ThingClasses const& things, Address stream) {
            require_device_memory(
                "select", {{"probs", probs}, {"pair_scores", pair_scores}, {"pairs", pairs}, {"work", work},
                           {"report", report}, {"instance_scores", instance_scores}, {"instance_labels", instance_labels}});
            SelectArgs args{pointer<float>(probs), pointer<float>(pair_scores), pointer<std::int64_t>(pairs), batch,
                            queries, classes, topk, panoptic, things_only, score_threshold,
                            pointer<std::int32_t>(work), pointer<std::int32_t>(report),
                            pointer<float>(instance_scores), pointer<std::int64_t>(instance_labels)};
            postprocess::select(args, things, stream_of(stream));
        },
        release_gil());

    module.def(
        "mask_pass",
        [](Address masks, std::string const& dtype, std::int64_t query_stride, Geometry const& geometry, int queries,
           int topk, Address work, Address report, Address segment_map, Address bits, Address partial_counts,
           Address partial_sums, Address stream) {
            require_device_memory(
                "mask_pass", {{"pred_masks", masks}, {"work", work}, {"report", report}, {"segment_map", segment_map},
                              {"bits", bits}, {"partial_counts", partial_counts}, {"partial_sums", partial_sums}});
            MaskArgs args{masks_of(masks, dtype, query_stride), geometry, queries, topk, pointer<std::int32_t>(work),
                          pointer<std::int32_t>(report), pointer<std::int32_t>(segment_map),
                          pointer<std::uint32_t>(bits), pointer<std::int32_t>(partial_counts),
                          pointer<std::uint64_t>(partial_sums)};
            postprocess::mask_pass(args, stream_of(stream));
        },
        release_gil());

    module.def(
        "decide",
        [](Address work, Address report, Address instance_scores, int batch, int queries, int topk, bool panoptic,
           double overlap_threshold, ThingClasses const& things, Address stream) {
            require_device_memory(
                "decide", {{"work", work}, {"report", report}, {"instance_scores", instance_scores}});
            postprocess::decide(pointer<std::int32_t>(work), pointer<std::int32_t>(report),
                                pointer<float>(instance_scores), batch, queries, topk, panoptic, overlap_threshold,
                                things, stream_of(stream));
        },
        release_gil());

    module.def(
        "assign_ids",
        [](Address segment_map, std::int64_t pixels, Address work, int queries, Address stream) {
            require_device_memory("assign_ids", {{"segment_map", segment_map}, {"work", work}});
            postprocess::assign_ids(pointer<std::int32_t>(segment_map), pixels, pointer<std::int32_t>(work), queries,
                                    stream_of(stream));
        },
        release_gil());

    module.def(
        "expand_masks",
        [](Address bits, Address report, int instances, int height, int width, int queries, int topk, Address masks,
           Address stream) {
            require_device_memory("expand_masks", {{"bits", bits}, {"report", report}, {"masks", masks}});
            postprocess::expand_masks(pointer<std::uint32_t>(bits), pointer<std::int32_t>(report), instances, height,
                                      width, queries, topk, pointer<std::uint8_t>(masks), stream_of(stream));
        },
        release_gil());

    module.def(
        "mask_boxes",
        [](Address bits, Address report, int height, int width, int queries, int topk, Address boxes, Address stream) {
            require_device_memory("mask_boxes", {{"bits", bits}, {"report", report}, {"boxes", boxes}});
            postprocess::mask_boxes(pointer<std::uint32_t>(bits), pointer<std::int32_t>(report), height, width, queries,
                                    topk, pointer<float>(boxes), stream_of(stream));
        },
        release_gil());

    module.def(
        "mask_runs",
        [](Address bits, Address work, Address report, Address total_runs, int height, int width, int queries, int topk,
           Address boundaries, std::int64_t capacity, Address stream) {
            require_device_memory(
                "mask_runs", {{"bits", bits}, {"work", work}, {"report", report}, {"total_runs", total_runs},
                              {"boundaries", boundaries}});
            postprocess::mask_runs(pointer<std::uint32_t>(bits), pointer<std::int32_t>(work),
                                   pointer<std::int32_t>(report), pointer<std::int32_t>(total_runs), height, width,
                                   queries, topk, pointer<std::int32_t>(boundaries), capacity, stream_of(stream));
        },
        release_gil());

    module.def(
        "semantic",
        [](Address masks, std::string const& dtype, std::int64_t query_stride, Geometry const& geometry, Address probs,
           int queries, int classes, Address scores, Address labels, Address weights, Address stream) {
            require_device_memory(
                "semantic", {{"pred_masks", masks}, {"probs", probs}, {"scores", scores}, {"labels", labels},
                             {"weights", weights}});
            SemanticArgs args{masks_of(masks, dtype, query_stride), geometry, pointer<float>(probs), queries, classes,
                              pointer<float>(scores), pointer<std::int64_t>(labels), pointer<uint4>(weights)};
            postprocess::semantic(args, stream_of(stream));
        },
        release_gil());

    // Host memory: boundaries (capacity,) int32 and, for each mask, where its own start and how many they are.
    module.def("encode_runs", [](Address boundaries, std::int64_t capacity, std::vector<std::int64_t> const& starts,
                                 std::vector<std::int64_t> const& counts, std::int64_t pixels) {
        require(
            starts.size() == counts.size(), "encode_runs: ", starts.size(), " starts and ", counts.size(),
            " counts of boundaries; expected as many");
        std::vector<std::string> texts(starts.size());
        {
            py::gil_scoped_release release;
            for (std::size_t i = 0; i < starts.size(); ++i) {
                texts[i] = encode_runs(pointer<std::int32_t>(boundaries), capacity, starts[i], counts[i], pixels);
            }
        }
        py::list encoded;
        for (std::string const& text : texts) encoded.append(py::bytes(text));
        return encoded;
    });
}

}  // namespace d2_trt
