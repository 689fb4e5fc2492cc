// COCO's compressed run lengths, as rleToString in pycocotools' maskApi.c writes them.
#include "postprocess/checks.h"
#include "postprocess/postprocess.h"

namespace d2_trt::postprocess {

std::string encode_runs(
    std::int32_t const* boundaries, std::int64_t capacity, std::int64_t start, std::int64_t count, std::int64_t pixels) {
    require(
        start >= 0 && count >= 0 && start <= capacity && count <= capacity - start, "encode_runs: ", count,
        " boundaries from place ", start, " on; expected them within the ", capacity, " that there are");
    require(pixels >= 1 && pixels <= kMaxPixels, "encode_runs: ", pixels, " pixels; expected 1 to ", kMaxPixels);
    if (count > 0) check_pointer("encode_runs", "boundaries", boundaries);
    std::string text;
    text.reserve(static_cast<std::size_t>(2 * count + 8));
    std::int64_t last = 0, lengths[2] = {0, 0};  // the run two before is of the same value
    for (std::int64_t i = 0; i <= count; ++i) {
        std::int64_t end = i < count ? boundaries[start + i] : pixels;
        std::int64_t length = end - last;
        last = end;
        // From the fourth on, runs are told by their difference from the one two before.
        std::int64_t rest = i > 2 ? length - lengths[i % 2] : length;
        lengths[i % 2] = length;
        for (bool more = true; more;) {
            int digit = static_cast<int>(rest & 0x1f);
            rest >>= 5;
            more = (digit & 0x10) != 0 ? rest != -1 : rest != 0;
            text.push_back(static_cast<char>((more ? digit | 0x20 : digit) + 48));
        }
    }
    return text;
}

}  // namespace d2_trt::postprocess
