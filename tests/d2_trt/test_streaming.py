"""predictor.stream: order, batches, back-pressure and errors."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2_trt import TensorRTPredictor, streaming
from d2_trt.errors import ImageError
from tests.d2_trt.predictor_helpers import assert_equal, make, picture
from tests.d2_trt.streaming_helpers import flat, same, threads
from tests.d2_trt.streaming_helpers import predictor as predictor
from tests.d2_trt.streaming_helpers import shared as shared


def test_stream_of_arrays_and_paths_equals_calls(tmp_path):
    predictor = make(TensorRTPredictor)
    images = [picture(size, seed=i) for i, size in enumerate([(48, 60), (60, 48), (48, 60)])]
    path = tmp_path / "image.png"
    Image.fromarray(images[1][:, :, ::-1].copy()).save(path)
    sources = [images[0], path, str(path), images[2]]
    expected = [predictor(images[i]) for i in (0, 1, 1, 2)]
    results = list(predictor.stream(sources))
    assert len(results) == 4
    for actual, wanted in zip(results, expected):
        assert_equal(actual, wanted)
    assert threads() == []


def test_results_come_in_order_whatever_decoding_takes(predictor, monkeypatch):
    def decode(path):
        time.sleep(0.05 if path == "0" else 0)
        return flat(int(path))

    monkeypatch.setattr(streaming, "_decode", decode)
    results = list(predictor.stream([str(n) for n in range(20)], workers=4))
    assert len(results) == 20
    assert all(same(result, predictor(flat(n))) for n, result in enumerate(results))


def test_files_are_decoded_side_by_side(predictor, monkeypatch):
    together = threading.Barrier(3)

    def decode(path):
        together.wait(10)  # passes only with three at a time
        return flat(int(path))

    monkeypatch.setattr(streaming, "_decode", decode)
    assert len(list(predictor.stream(list("123456"), workers=3))) == 6


def test_consecutive_images_of_one_padded_size_run_together(predictor):
    sizes = [(32, 32)] * 5 + [(32, 64)] * 2 + [(32, 32)]
    images = [flat(10 * n, size) for n, size in enumerate(sizes)]
    results = list(predictor.stream(images, batch_size=3))
    assert [shape[0] for shape in predictor.model.backend.batches] == [3, 2, 2, 1]
    assert all(same(result, predictor(image)) for result, image in zip(results, images, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_more_is_read_than_prefetch_allows(predictor, batch_size):
    read = []

    def source():
        for n in range(30):
            read.append(n)
            yield flat(n)

    stream = predictor.stream(source(), prefetch=4, batch_size=batch_size)
    time.sleep(0.1)
    assert read == []  # nothing starts by itself
    for taken in range(1, 31):
        next(stream)
        time.sleep(0.01)
        assert len(read) <= taken + 4
    assert list(stream) == [] and len(read) == 30


def test_images_are_read_ahead_while_the_caller_works(predictor):
    read, ahead = [], threading.Event()

    def source():
        for n in range(6):
            read.append(n)
            if n == 4:
                ahead.set()
            yield flat(n)

    stream = predictor.stream(source(), prefetch=4)
    next(stream)
    assert ahead.wait(10)
    stream.close()


def test_network_runs_ahead_of_the_caller(predictor):
    stream = predictor.stream((flat(n) for n in range(5)), prefetch=4)
    next(stream)
    for _ in range(500):
        if len(predictor.model.backend.batches) == 5:
            break
        time.sleep(0.01)
    assert len(predictor.model.backend.batches) == 5
    stream.close()


def test_file_that_is_missing_is_named_and_ends_the_stream(predictor, tmp_path):
    missing = tmp_path / "missing.png"
    stream = predictor.stream([flat(1), missing, flat(2)])
    next(stream)
    with pytest.raises(
        ImageError, match=r"image 1 \(.*missing\.png\) of the stream: FileNotFoundError"
    ) as caught:
        next(stream)
    assert caught.value.index == 1 and isinstance(caught.value.__cause__, FileNotFoundError)
    assert next(stream, None) is None
    assert threads() == []


def test_errors_are_returned_in_their_place(predictor, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    sources = [flat(1), broken, flat(2), 7, flat(3, (32, 32))[:, :, 0], flat(4)]
    results = list(predictor.stream(sources, on_error="return", batch_size=2))
    kinds = [type(r.__cause__).__name__ if isinstance(r, ImageError) else "result" for r in results]
    assert kinds == ["result", "UnidentifiedImageError", "result", "TypeError", "ValueError", "result"]
    assert [r.index for r in results if isinstance(r, ImageError)] == [1, 3, 4]
    for n, value in ((0, 1), (2, 2), (5, 4)):
        assert same(results[n], predictor(flat(value)))


def test_file_of_16_bits_is_refused_where_it_would_be_white(predictor, tmp_path):
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(deep)
    results = list(predictor.stream([flat(1), deep, flat(2)], on_error="return"))
    assert [isinstance(r, ImageError) for r in results] == [False, True, False]
    assert "deep.png) of the stream: ValueError: its values go up to 3000; allowed: 8 bits" in str(results[1])


def test_network_that_fails_is_blamed_on_its_image_alone(predictor):
    predictor.model.backend.fail_at = 20.0
    images = [flat(value) for value in (10, 20, 30, 40)]
    results = list(predictor.stream(images, batch_size=4, on_error="return"))
    assert [isinstance(r, ImageError) for r in results] == [False, True, False, False]
    assert "does not like" in str(results[1])
    assert [shape[0] for shape in predictor.model.backend.batches] == [4, 1, 1, 1, 1]


def test_errors_hold_no_images(predictor):
    """Neither those that are kept, nor that of a batch while its images run one by one: memory may be what it is about."""
    backend = predictor.model.backend
    seen: list[weakref.ref] = []
    alive = []

    def fail(images):
        alive.append(sum(image() is not None for image in seen))
        seen.append(weakref.ref(images))
        raise RuntimeError("out of memory")

    predictor.model.backend = fail
    gc.disable()  # no collection is needed for it
    try:
        errors = list(predictor.stream([flat(n) for n in range(4)], batch_size=4, on_error="return"))
        assert len(seen) == 5 and alive == [0] * 5
        assert threads() == [] and all(image() is None for image in seen)
    finally:
        gc.enable()
        predictor.model.backend = backend
    for error in errors:
        assert error.__cause__.__context__ is None  # the batch's says nothing of an image
        assert traceback.extract_tb(error.__cause__.__traceback__)[-1].name == "fail"


@pytest.fixture
def tall_fails(predictor, monkeypatch):
    """A predictor whose post-processing fails for images of 64x32; for the network all are of 32x32, to share batches."""
    postprocess, load = streaming.postprocess, predictor.load

    def postprocess_some(*args, **kwargs):
        if (64, 32) in kwargs["output_sizes"]:
            raise ValueError("no room")
        return postprocess(*args, **kwargs)

    def load_part(image, ring=None):
        return {**load(image[:32, :32], ring), "height": image.shape[0], "width": image.shape[1]}

    monkeypatch.setattr(streaming, "postprocess", postprocess_some)
    monkeypatch.setattr(predictor, "load", load_part)
    return predictor


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_postprocessing_that_fails_is_blamed_on_its_image_alone(tall_fails, batch_size):
    sizes = [(32, 32), (32, 32), (64, 64), (64, 32), (32, 32)]
    images = [flat(10 * n, size) for n, size in enumerate(sizes)]
    results = list(tall_fails.stream(images, batch_size=batch_size, on_error="return"))
    assert tall_fails.model.backend.batches[0][0] == batch_size
    assert [isinstance(r, ImageError) for r in results] == [False, False, False, True, False]
    assert results[3].index == 3 and isinstance(results[3].__cause__, ValueError)
    for n in (0, 1, 2, 4):
        assert results[n]["sem_seg"].shape[-2:] == sizes[n] and same(results[n], tall_fails(images[n]))


def test_images_before_one_whose_postprocessing_fails_come_first(tall_fails):
    stream = tall_fails.stream([flat(1), flat(2, (64, 32)), flat(3)], batch_size=3)
    assert same(next(stream), tall_fails(flat(1)))
    with pytest.raises(ImageError, match=r"image 1 of the stream: ValueError: no room"):
        next(stream)


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_source_that_raises_ends_the_stream_after_its_images(predictor, on_error):
    def source():
        yield flat(1)
        yield flat(2)
        raise OSError("the camera is gone")

    results = []
    try:
        for result in predictor.stream(source(), batch_size=2, on_error=on_error):
            results.append(result)
    except ImageError as error:
        assert on_error == "raise"
        results.append(error)
    assert len(results) == 3 and "the camera is gone" in str(results[2])
    assert results[2].index == 2


def test_exit_of_the_source_is_no_images_error(predictor):
    def source():
        yield flat(1)
        raise SystemExit(3)

    stream = predictor.stream(source(), on_error="return")
    next(stream)
    with pytest.raises(SystemExit):
        next(stream)


def test_empty_stream_ends(predictor):
    assert list(predictor.stream([])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefetch": True}, "prefetch is True"),
        ({"workers": -1}, "workers is -1"),
        ({"batch_size": 9}, "prefetch is 8, batch_size 9"),
        ({"on_error": "skip"}, "on_error is 'skip'; expected 'raise' or 'return'"),
    ],
)
def test_arguments_are_checked_at_once(predictor, arguments, message):
    with pytest.raises(ValueError, match=message):
        predictor.stream([], **arguments)


def test_batches_beyond_the_engines_are_refused_at_once(predictor):
    class Shapes:
        max = (2, 1344, 1344)

    class Options:
        shapes = Shapes

    predictor.model.backend.options = Options
    with pytest.raises(ValueError, match=r"1 to 2\. .*MODEL\.TENSORRT\.MAX_BATCH_SIZE"):
        predictor.stream([], batch_size=3)


def test_model_in_training_is_refused(predictor):
    predictor.model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            predictor.stream([])
    finally:
        predictor.model.eval()


def test_what_is_not_iterable_is_refused_at_once(predictor):
    with pytest.raises(TypeError):
        predictor.stream(7)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 4])
def test_gpu_stream_equals_calls(predictor, batch_size):
    """Uploads, network and results on three streams: a race would mix images."""
    images = [flat(n % 250, ((32, 32), (64, 32), (320, 320))[n // 40 % 3]) for n in range(300)]
    results = predictor.stream(images, batch_size=batch_size)
    for image, result in zip(images, results, strict=True):  # the GPU sums batches in another order
        torch.testing.assert_close(result["sem_seg"], predictor(image)["sem_seg"], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_results_belong_to_the_callers_stream(predictor):
    images = [flat(n) for n in range(60)]
    with torch.cuda.stream(torch.cuda.Stream()):
        results = [r["sem_seg"].clone() for r in predictor.stream(images)]
        expected = [predictor(image)["sem_seg"] for image in images]
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_gpu_memory_does_not_grow_with_the_stream(predictor):
    def run(count: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        for _ in predictor.stream(flat(n % 250, (96, 96)) for n in range(count)):
            pass
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    run(20)
    few = run(40)
    assert run(400) < few * 1.2 + (1 << 20)


@pytest.mark.gpu
def test_gpu_stream_of_real_network_equals_calls(tmp_path):
    predictor = make(TensorRTPredictor)
    images = [picture((48 + 16 * (n % 3), 60), seed=n) for n in range(9)]
    paths: list[Path] = []
    for n, image in enumerate(images):
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(image[:, :, ::-1].copy()).save(paths[-1])
    for image, result in zip(images, predictor.stream(paths), strict=True):
        expected = predictor(image)
        torch.testing.assert_close(result["sem_seg"], expected["sem_seg"], rtol=1e-3, atol=1e-4)
