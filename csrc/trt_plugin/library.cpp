// What the library has beside its creators: the log, and the TensorRT that it was compiled for.
#include <atomic>
#include <cstdio>

#include "trt_plugin/plugin.h"

namespace {
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
}

namespace d2_trt::plugin {

void log_error(std::string const& what) noexcept {
    try {
        nvinfer1::ILoggerFinder* const finder = logger_finder.load();
        nvinfer1::ILogger* const logger = finder ? finder->findLogger() : nullptr;
        if (logger != nullptr) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, what.c_str());
        } else {
            std::fprintf(stderr, "[d2_trt] %s\n", what.c_str());
        }
    } catch (...) {  // nobody left to tell
    }
}

}  // namespace d2_trt::plugin

// Called by TensorRT when it loads the library.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    logger_finder.store(finder);
}

// 80600 for 8.6.0: d2_trt/plugin.py compares it with the TensorRT in use before that loads the library.
extern "C" __attribute__((visibility("default"))) std::int32_t d2_trt_tensorrt_version() {
    return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}
