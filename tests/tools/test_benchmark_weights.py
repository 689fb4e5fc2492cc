"""Random weights that keep some queries: as many as were asked for, with regions of their own, the same each time."""

from __future__ import annotations

import pytest
import torch
from benchmark_model import Case, Subject, build_cfg
from benchmark_weights import keep_queries

from tests.tools.loading import load_tool
from tests.tools.test_benchmark import OPTS

MORE = ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "40", "MODEL.MASK_FORMER.HIDDEN_DIM", "64")
MORE += ("MODEL.SEM_SEG_HEAD.MASK_DIM", "64", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "64")


def subject(*opts: str, kept: int, mini: bool = True, config: str = "") -> Subject:
    words = ["--all-tasks", *(("--config-file", config) if config else ())]
    opts = (*(OPTS if mini else ()), *opts)
    args = load_tool("benchmark").parse_args([*words, "--", *opts])
    return Subject(build_cfg(args, "cpu"), "d2_trt", kept_queries=kept)


def results(made: Subject, size: tuple[int, int]) -> tuple[int, int]:
    """Queries that pass the panoptic threshold, and the segments of the panoptic result."""
    case = Case(made.predictor, size, resize=False)
    images = made.padded(case, 1)
    with torch.no_grad():
        outputs = made.core(images)
        (result,) = made.stages(case, 1, images, outputs)["postprocess"].call()
    best, classes = outputs[0][0].softmax(-1).max(-1)
    passed = (best > 0.8) & (classes < outputs[0].shape[-1] - 1)
    return int(passed.sum()), len(result["panoptic_seg"][1])


@pytest.mark.parametrize("size", [(128, 160), (320, 320)])
def test_queries_are_kept_and_have_segments(size):
    made = subject(*MORE, kept=12)
    assert made.weights == "random, 12 of 40 queries kept"
    passed, segments = results(made, size)
    assert 10 <= passed <= 14 and segments >= 6
    # Without, there is nothing to tell apart.
    assert results(subject(*MORE, kept=0), size)[1] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [(320, 320), (480, 640)])
def test_full_size_model_has_tens_of_segments(size):
    passed, segments = results(subject(kept=30, mini=False), size)
    assert 20 <= passed <= 40 and 20 <= segments <= 40


def test_weights_are_the_same_each_time():
    first, second = (subject(kept=5).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = subject(kept=0).model.state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], first[name])}
    assert changed and all(
        name.startswith(("sem_seg_head.predictor", "sem_seg_head.pixel_decoder.mask_features"))
        for name in changed
    )


def test_weights_are_the_same_with_other_numbers_of_threads():
    """Sums in another order: an engine in the cache would not be found again."""
    made = subject(kept=5).model.state_dict()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = subject(kept=5).model.state_dict()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_at_most_half_of_the_queries_are_kept():
    made = subject(kept=0)
    assert keep_queries(made.model, 30, torch.full((3, 64, 64), 100.0)) == 5


def test_a_checkpoint_keeps_its_weights(tmp_path):
    plain = subject(kept=0)
    path = tmp_path / "model.pth"
    torch.save({"model": plain.model.state_dict()}, path)
    made = subject("MODEL.WEIGHTS", str(path), kept=5)
    assert made.weights == "model.pth"
    wanted = plain.model.state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in made.model.state_dict().items())
