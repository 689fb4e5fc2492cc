"""Pillow's bilinear resize, reproduced: its arithmetic on the CPU, its kernels on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from mask2former import kernels
from mask2former.data import gpu_resize
from mask2former.data.gpu_resize import PRECISION_BITS, axis_table, resize_bilinear

# Height and width, in and out: larger, smaller, mixed, unchanged along one axis or both, single pixels, odd sizes.
SIZES = [
    ((48, 64), (80, 107)),
    ((48, 64), (48, 64)),
    ((48, 64), (48, 107)),
    ((48, 64), (80, 64)),
    ((97, 131), (13, 17)),
    ((97, 131), (211, 17)),
    ((1, 1), (5, 7)),
    ((9, 1), (3, 4)),
    ((1, 9), (4, 3)),
    ((33, 65), (1, 1)),
    ((400, 3), (37, 2)),
    ((2, 1000), (3, 999)),
    ((121, 37), (40, 30)),  # the vertical pass first, since Pillow 13
    ((120, 36), (41, 30)),
]


def needs_kernels():
    if not kernels.available():
        pytest.skip(f"the CUDA kernels are not built: {kernels.BUILD_HINT}")


def pixels(size, channels=3, seed=0) -> np.ndarray:
    """Noise, with areas of black and white, where rounding and clipping show."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
    image[: size[0] // 3] = 255
    image[:, : size[1] // 4] = 0
    return image


def pillow(image: np.ndarray, size) -> np.ndarray:
    """(H, W, C) -> (C, height, width)."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = np.asarray(picture.resize((size[1], size[0]), Image.BILINEAR))
    return resized.reshape(*size, image.shape[2]).transpose(2, 0, 1)


def one_pass(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """What a kernel does along the last axis, in its integers."""
    first, count, weights = table[0], table[1], table[2:]
    total = np.full((*image.shape[:-1], table.shape[1]), 1 << (PRECISION_BITS - 1), dtype=np.int32)
    for tap in range(len(weights)):
        read = tap < count
        pixel = image[..., np.where(read, first + tap, 0)].astype(np.int32)
        total += np.where(read, pixel * weights[tap], 0).astype(np.int32)
    return np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8)


def emulate(image: np.ndarray, size) -> np.ndarray:
    planes = image.transpose(2, 0, 1)
    vertical_first = gpu_resize._pass_order()(image.shape[:2], size)
    for axis in (1, 2) if vertical_first else (2, 1):
        table = axis_table(planes.shape[axis], size[axis - 1])
        planes = one_pass(planes.swapaxes(axis, 2), table).swapaxes(axis, 2)
    return planes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_arithmetic_is_pillows(before, after, channels):
    image = pixels(before, channels)
    assert np.array_equal(emulate(image, after), pillow(image, after))


def test_arithmetic_is_pillows_at_random_sizes():
    rng = np.random.default_rng(1)
    for seed in range(60):
        before, after = (tuple(int(n) for n in rng.integers(1, 160, 2)) for _ in range(2))
        image = pixels(before, seed=seed)
        assert np.array_equal(emulate(image, after), pillow(image, after)), (before, after)


def test_arithmetic_is_pillows_for_a_photographs_size():
    image = pixels((480, 640))
    assert np.array_equal(emulate(image, (800, 1067)), pillow(image, (800, 1067)))


@pytest.mark.parametrize(("before", "after"), [(640, 1067), (4000, 800), (5, 5), (1, 30), (30, 1), (7, 6)])
def test_table_reads_within_the_image_and_sums_to_one(before, after):
    table = axis_table(before, after)
    first, count, weights = table[0], table[1], table[2:].astype(np.int64)
    assert table.dtype == np.int32 and table.shape[1] == after
    assert (first >= 0).all() and (count >= 1).all()
    assert (first + count <= before).all() and (count <= len(weights)).all()
    assert (abs(weights.sum(0) - (1 << PRECISION_BITS)) <= len(weights)).all()
    assert all((weights[n:, i] == 0).all() for i, n in enumerate(count))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_empty_axis_is_refused(sizes):
    with pytest.raises(ValueError, match=r"at least 1"):
        axis_table(*sizes)


def test_tables_are_kept_and_bounded():
    tables = gpu_resize._Tables(limit=2)
    cpu = torch.device("cpu")
    first = tables.get(4, 8, cpu)
    assert tables.get(4, 8, cpu) is first
    tables.get(5, 8, cpu)
    assert tables.get(4, 8, cpu) is first  # now the most recently used
    tables.get(6, 8, cpu)
    assert len(tables) == 2 and tables.get(4, 8, cpu) is first


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), "ndarray"),
        (torch.zeros(4, 4, 3), "float32"),
        (torch.zeros(4, 4, dtype=torch.uint8), "uint8 tensor"),
        (torch.zeros(4, 4, 2, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(0, 4, 3, dtype=torch.uint8), "at least 1"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "on cpu"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_image_that_is_not_taken_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        resize_bilinear(image, (8, 8))


def test_order_of_passes_is_the_installed_pillows():
    assert gpu_resize._pass_order() is not None, PIL.__version__
    first = [gpu_resize._pass_order()(*probe) for probe in gpu_resize._PROBES]
    # what its source says
    release = tuple(int(n) for n in PIL.__version__.split(".")[:2])
    assert any(first) == (release >= (12, 2)) and not all(first)


def test_probes_tell_the_orders_apart():
    for before, after in gpu_resize._PROBES:
        image = Image.fromarray(pixels(before, 1)[:, :, 0])
        rows_last = gpu_resize._resize_pillow(image, (before[0], after[1]), after)
        assert rows_last != gpu_resize._resize_pillow(image, (after[0], before[1]), after), (before, after)
    decisions = {tuple(rule(*p) for p in gpu_resize._PROBES) for rule in gpu_resize._ORDERS.values()}
    assert len(decisions) == len(gpu_resize._ORDERS)


def test_pillow_of_another_order_is_refused(monkeypatch):
    monkeypatch.setattr(gpu_resize, "_ORDERS", {"always": lambda before, after: True})
    monkeypatch.setattr(kernels, "available", lambda: True)
    gpu_resize._pass_order.cache_clear()
    try:
        assert PIL.__version__ in gpu_resize.why_not()
    finally:
        gpu_resize._pass_order.cache_clear()


def test_missing_kernels_are_named(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert kernels.BUILD_HINT in gpu_resize.why_not()


HOST_PROGRAM = r"""
#include "preprocess/resize_math.h"
using namespace d2_trt::preprocess;
using Bytes = std::uint8_t*;
template <int C>
void horizontal(Bytes pixels, long rows, long width, AxisTable x, Bytes out, long stride) {
    for (long row = 0; row < rows; ++row)
        for (long i = 0; i < x.size; ++i) {
            std::uint8_t p[C];
            resample_row<C>(pixels + row * width * C, x, i, p);
            for (int c = 0; c < C; ++c) out[(c * rows + row) * stride + i] = p[c];
        }
}
template <bool Aligned>
void vertical(Bytes planes, int count, long rows, long width, long stride, AxisTable y, Bytes out) {
    for (int c = 0; c < count; ++c)
        for (long row = 0; row < y.size; ++row)
            for (long i = 0; i < width; i += 4) {
                std::uint8_t four[4];
                resample_columns<Aligned>(planes + c * rows * stride, stride, y, row, i, width - i, four);
                for (int k = 0; k < 4 && i + k < width; ++k) out[(c * y.size + row) * width + i + k] = four[k];
            }
}
template <int C>
void run(Bytes image, long h, long w, bool vertical_first, AxisTable x, AxisTable y, Bytes scratch, Bytes out) {
    long const stride = (x.size + 3) / 4 * 4;
    if (vertical_first) {
        vertical<false>(image, 1, h, w * C, w * C, y, scratch);
        horizontal<C>(scratch, y.size, w, x, out, x.size);
    } else {
        horizontal<C>(image, h, w, x, scratch, stride);
        vertical<true>(scratch, C, h, x.size, stride, y, out);
    }
}
extern "C" void resize(Bytes image, long h, long w, int channels, bool vertical_first, int const* xt, long xs,
                       int const* yt, long ys, Bytes scratch, Bytes out) {
    AxisTable x{xt, xs}, y{yt, ys};
    channels == 3 ? run<3>(image, h, w, vertical_first, x, y, scratch, out)
                  : run<1>(image, h, w, vertical_first, x, y, scratch, out);
}
"""


@pytest.fixture(scope="module")
def host_resize(tmp_path_factory, repo_root):
    """The kernels' per-pixel functions, compiled for the CPU."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++ or c++) on the PATH")
    folder = tmp_path_factory.mktemp("host")
    (folder / "resize.cpp").write_text(HOST_PROGRAM)
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{repo_root / 'csrc'}",
    ]
    subprocess.run([*command, str(folder / "resize.cpp"), "-o", str(folder / "resize.so")], check=True)
    library = ctypes.CDLL(str(folder / "resize.so"))

    def resize(image: np.ndarray, size) -> np.ndarray:
        x, y = axis_table(image.shape[1], size[1]), axis_table(image.shape[0], size[0])
        height, width, channels = image.shape
        scratch = np.zeros(channels * max(height * (size[1] + 3), size[0] * width), np.uint8)
        out = np.zeros((channels, *size), np.uint8)

        def at(array):
            return array.ctypes.data_as(ctypes.c_void_p)

        def long(number):
            return ctypes.c_long(number)

        order = gpu_resize._pass_order()((height, width), size)
        tables = (at(x), long(size[1]), at(y), long(size[0]))
        library.resize(at(image), long(height), long(width), channels, order, *tables, at(scratch), at(out))
        return out

    return resize


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_kernels_pixel_functions_are_pillows(host_resize, before, after, channels):
    image = pixels(before, channels)
    assert np.array_equal(host_resize(image, after), pillow(image, after))


def on_gpu(image: np.ndarray, size, **options) -> np.ndarray:
    return resize_bilinear(torch.from_numpy(image).cuda(), size, **options).cpu().numpy()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("before", "after"),
    [*SIZES, ((480, 640), (800, 1067)), ((1501, 2001), (799, 1065)), ((2600, 701), (1333, 359))],
)
def test_gpu_gives_pillows_bytes(before, after, channels):
    needs_kernels()
    image = pixels(before, channels)
    assert np.array_equal(on_gpu(image, after), pillow(image, after))


@pytest.mark.gpu
def test_gpu_gives_pillows_bytes_at_random_sizes():
    needs_kernels()
    rng = np.random.default_rng(2)
    for seed in range(100):
        before, after = (tuple(int(n) for n in rng.integers(1, 300, 2)) for _ in range(2))
        image = pixels(before, seed=seed)
        assert np.array_equal(on_gpu(image, after), pillow(image, after)), (before, after)


@pytest.mark.gpu
def test_gpu_reaches_rows_beyond_a_grids_limit():
    needs_kernels()
    image = pixels((70001, 2), 1)
    assert np.array_equal(on_gpu(image, (70003, 3)), pillow(image, (70003, 3)))


@pytest.mark.gpu
def test_gpu_reverses_channels():
    needs_kernels()
    image = pixels((48, 64))
    expected = pillow(np.ascontiguousarray(image[:, :, ::-1]), (80, 107))
    assert np.array_equal(on_gpu(image, (80, 107), reverse_channels=True), expected)


@pytest.mark.gpu
def test_gpu_and_python_agree_on_the_precision():
    needs_kernels()
    assert kernels.load().preprocess.PRECISION_BITS == PRECISION_BITS


@pytest.mark.gpu
def test_gpu_threads_on_their_own_streams_get_pillows_bytes(monkeypatch):
    needs_kernels()
    monkeypatch.setattr(gpu_resize, "_tables", gpu_resize._Tables(limit=2))  # tables go while others use them
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                size = tuple(int(n) for n in rng.integers(100, 400, 2))
                image = pixels((120, 90), seed=seed)
                if not np.array_equal(on_gpu(image, size), pillow(image, size)):
                    wrong.append(f"thread {seed} at {size}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


@pytest.mark.gpu
def test_gpu_refuses_strided_images():
    needs_kernels()
    with pytest.raises(ValueError, match="strided"):
        resize_bilinear(torch.zeros(8, 8, 3, dtype=torch.uint8, device="cuda")[:, ::2], (4, 4))
