"""Images on their way to the GPU: through pinned memory, which is used again while copies may be under way."""

import pytest
import torch

from mask2former import maskformer_model
from tests.golden import MINI_MODELS, mini_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models():
    """One model on the CPU, one on the GPU."""
    return mini_model(MINI_MODELS[0]).cpu(), mini_model(MINI_MODELS[0]).cuda()


def picture(seed: int, dtype=torch.float32, height=600, width=830):
    """(3, H, W) as DefaultPredictor makes it: the memory's order is height, width, channels."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8).to(dtype)
    assert image.numel() * image.element_size() >= maskformer_model.STAGED_BYTES
    return image.permute(2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [830, 832])
def test_images_arrive_as_they_are(models, dtype, batch, width):
    cpu, gpu = models
    # 608x832 is a multiple of the padding: such an image takes a way of its own.
    height = 608 if width == 832 else 600
    inputs = [{"image": picture(i, dtype, height, width)} for i in range(batch)]
    expected, *sizes = cpu.preprocess(inputs)
    images, *told = gpu.preprocess(inputs)
    assert images.dtype == torch.float32 and torch.equal(images.cpu(), expected) and told == sizes


def test_pinned_memory_is_not_written_while_it_is_read(models):
    _, gpu = models
    images = [picture(i) for i in range(12)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the copies wait behind it, all of them under way
        arrived = [gpu.preprocess([{"image": image}])[0] for image in images]
    stream.synchronize()
    for image, padded in zip(images, arrived):
        assert torch.equal(padded[0, :, :600, :830].cpu(), image)


def test_nothing_waits_for_the_gpu(models):
    _, gpu = models
    inputs = [{"image": picture(0)}]
    gpu.preprocess(inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2_000_000_000)
        gpu.preprocess(inputs)
        assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(models, bad):
    image = picture(0).clone()
    image[1, 5, 7] = bad
    with pytest.raises(ValueError, match="image 1 of the batch holds NaN or infinite values"):
        models[1].preprocess([{"image": picture(1)}, {"image": image}])
