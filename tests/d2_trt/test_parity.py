"""The parity gate: what passes, what is refused and what it says, and that PyTorch's settings are left alone."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from d2_trt.errors import ParityError
from d2_trt.options import VERIFY_DEFAULTS, VerifyOptions
from d2_trt.parity import Comparison, compare, exact_float32, verify

EXACT = VerifyOptions(**VERIFY_DEFAULTS["fp32"])
HALF = VerifyOptions(**VERIFY_DEFAULTS["fp16"])
UNCHECKED = VerifyOptions()


def outputs_of(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, 10, 4) and masks (B, 10, H, W) that depend on the images."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(len(images), 10, 4, generator=rng) + images.mean()
    masks = torch.randn(len(images), 10, *images.shape[2:], generator=rng)
    return logits, masks


def batches(*sizes):
    return [torch.rand(1, 3, *size) for size in sizes or [(8, 12)]]


def test_equal_outputs_pass_with_numbers_for_every_size():
    report = verify(outputs_of, outputs_of, batches((8, 12), (16, 8)), EXACT)
    assert [row["images"] for row in report["sizes"]] == ["1x3x8x12", "1x3x16x8"]
    for row in report["sizes"]:
        assert (row["logit_error"], row["mask_error"]) == (0, 0)
        assert (row["sign_agreement"], row["class_agreement"]) == (1, 1)


def test_numbers_are_what_they_are_called():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0]]])
    masks = torch.tensor([3.0, -4.0, 1.0, -1.0, 2.0]).view(1, 1, 1, 5)
    other_logits, other_masks = logits.clone(), masks.clone()
    other_logits[0, 0] = torch.tensor([0.0, 1.0])
    other_masks[..., 2] = -1.0
    numbers = compare((other_logits, other_masks), (logits, masks))
    assert numbers["class_agreement"] == 3 / 4 and numbers["sign_agreement"] == pytest.approx(4 / 5)
    assert numbers["logit_error"] == pytest.approx((2 / 15) ** 0.5)
    assert numbers["mask_error"] == pytest.approx((4 / 31) ** 0.5)
    zeros = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4, 4)
    assert compare(zeros, zeros)["mask_error"] == 0


def test_batches_are_weighed_by_what_they_hold():
    """As if all pixels were in one: not the mean of the batches' figures."""
    rng = torch.Generator().manual_seed(1)
    expected = [(torch.randn(1, 4, 3, generator=rng), torch.randn(1, 4, n, n, generator=rng)) for n in (2, 9)]
    actual = [(logits + 0.3, masks * (-1 if i else 1)) for i, (logits, masks) in enumerate(expected)]
    together = Comparison()
    for one, other in zip(actual, expected):
        together.add(one, other)
    numbers = together.numbers()
    assert numbers["sign_agreement"] == pytest.approx(4 / 85)
    flat = [torch.cat([masks.flatten() for _, masks in outputs]) for outputs in (actual, expected)]
    assert numbers["mask_error"] == pytest.approx(float((flat[0] - flat[1]).norm() / flat[1].norm()))
    assert numbers["class_agreement"] == 1


def disturbed(size, logits=0.0, masks=0.0, flip_class=False):
    """An engine that is wrong at one size."""

    def engine(images):
        a, b = outputs_of(images)
        if tuple(images.shape[2:]) == size:
            a, b = a + logits * a.abs().mean(), b + masks
            a = a.flip(-1) if flip_class else a
        return a, b

    return engine


@pytest.mark.parametrize(
    "wrong, tensor, key",
    [
        ({"logits": 0.5}, "pred_logits: logit error is", "MODEL.TENSORRT.VERIFY.MAX_LOGIT_ERROR"),
        ({"masks": 0.5}, "pred_masks: mask error is", "MODEL.TENSORRT.VERIFY.MAX_MASK_ERROR"),
        ({"masks": 0.5}, "pred_masks: sign agreement is", "MODEL.TENSORRT.VERIFY.MIN_SIGN_AGREEMENT"),
        (
            {"flip_class": True},
            "pred_logits: class agreement is",
            "MODEL.TENSORRT.VERIFY.MIN_CLASS_AGREEMENT",
        ),
    ],
)
def test_disagreement_names_tensor_size_and_key(wrong, tensor, key):
    with pytest.raises(ParityError) as error:
        verify(disturbed((16, 8), **wrong), outputs_of, batches((8, 12), (16, 8)), EXACT)
    message = str(error.value)
    assert f"at 1x3x16x8: {tensor}" in message and key in message
    assert "1x3x8x12" not in message  # where it agrees
    assert "MODEL.TENSORRT.FP32_MODULES" in message and "MODEL.TENSORRT.PRECISION" in message
    assert "python tools/precision_search.py" in message


def test_every_size_is_compared_before_it_fails():
    with pytest.raises(ParityError) as error:
        verify(lambda x: [-t for t in outputs_of(x)], outputs_of, batches((8, 12), (16, 8)), EXACT)
    assert "1x3x16x8" in str(error.value) and "1x3x8x12" in str(error.value)


@pytest.mark.parametrize("options", [EXACT, HALF, UNCHECKED], ids=["fp32", "fp16", "unchecked"])
@pytest.mark.parametrize("which", [0, 1], ids=["pred_logits", "pred_masks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_is_refused(options, which, value):
    def engine(images):
        outputs = outputs_of(images)
        outputs[which].view(-1)[0] = value
        return outputs

    with pytest.raises(ParityError, match=("pred_logits", "pred_masks")[which]):
        verify(engine, outputs_of, batches(), options)


def test_half_precision_is_judged_by_its_decisions():
    def engine(images):
        logits, masks = outputs_of(images)
        return logits * 1.1, masks * 1.1

    assert verify(engine, outputs_of, batches(), HALF)["sizes"][0]["mask_error"] == pytest.approx(0.1)
    with pytest.raises(ParityError, match="MAX_MASK_ERROR"):
        verify(engine, outputs_of, batches(), EXACT)


def test_threshold_of_none_is_not_checked():
    def engine(images):
        return [-t for t in outputs_of(images)]

    row = verify(engine, outputs_of, batches(), UNCHECKED)["sizes"][0]
    assert row["mask_error"] == pytest.approx(2) and row["sign_agreement"] == 0
    for name in ("min_sign_agreement", "min_class_agreement", "max_logit_error", "max_mask_error"):
        one = dataclasses.replace(UNCHECKED, **{name: 0.5})
        with pytest.raises(ParityError) as error:
            verify(engine, outputs_of, batches(), one)
        assert str(error.value).count("(MODEL.TENSORRT.VERIFY.") == 1 and name.upper() in str(error.value)


def test_other_shapes_are_refused():
    with pytest.raises(ParityError, match=r"pred_masks: shape is \(1, 10, 4, 12\), must be \(1, 10, 8, 12\)"):
        verify(lambda x: (outputs_of(x)[0], outputs_of(x)[1][:, :, ::2]), outputs_of, batches(), EXACT)


def float32_settings() -> tuple:
    backends = torch.backends
    return tuple(s.fp32_precision for s in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn))


@pytest.fixture
def restore_settings():
    precision = torch.get_float32_matmul_precision()
    yield
    for owner in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        owner.fp32_precision = "none"
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("matmul, cudnn", [(True, True), (False, True), (True, False), (False, False)])
def test_reference_runs_in_float32_and_tf32_is_as_before(restore_settings, matmul, cudnn):
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    seen = []

    def reference(images):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        seen.append((images[0, 0] @ images[0, 0].T).dtype)
        seen.append(torch.is_grad_enabled())
        return outputs_of(images)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        verify(outputs_of, reference, batches(), EXACT)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False), torch.float32, False]
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (matmul, cudnn)


def test_settings_are_restored_after_an_error(restore_settings):
    torch.backends.cudnn.allow_tf32 = True
    with pytest.raises(RuntimeError, match="broken"), exact_float32():
        raise RuntimeError("broken")
    assert torch.backends.cudnn.allow_tf32 is True


def test_matmul_precision_medium_survives(restore_settings):
    torch.set_float32_matmul_precision("medium")
    with exact_float32():
        assert float32_settings()[0] == "ieee"
    assert torch.get_float32_matmul_precision() == "medium"


def test_newer_switches_survive(restore_settings):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    before = float32_settings()
    with exact_float32():
        assert float32_settings() == ("ieee", "ieee", "ieee")
    assert float32_settings() == before


def test_threads_that_compare_at_once_leave_tf32_as_it_was():
    matmul = torch.backends.cuda.matmul
    inside, going_on, seen = threading.Event(), threading.Event(), []

    def second():
        with exact_float32():
            inside.set()
            assert going_on.wait(10)
            seen.append(matmul.allow_tf32)

    thread = threading.Thread(target=second)
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with exact_float32():
            thread.start()
            assert inside.wait(10)
        going_on.set()
        thread.join(10)
        assert seen == [False] and matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
