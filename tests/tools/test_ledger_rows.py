"""What tools/accuracy_ledger.py makes of rows that are there: limits that they keep within or not, and the table."""

from __future__ import annotations

import accuracy_ledger
import ledger_markdown
import pytest
from ledger_join import beyond_limits


def row_of(backend="tensorrt", precision="fp16", **values) -> dict[str, str]:
    return {
        **dict.fromkeys(accuracy_ledger.FIELDS, ""),
        "backend": backend,
        "precision": precision,
        "status": "ok",
        **values,
    }


@pytest.mark.parametrize(
    "precision, value, good",
    [
        ("fp32", "50.05", True),
        ("fp32", "50.06", False),
        ("tf32", "49.94", False),
        ("fp16", "50.09", True),
        ("fp16", "49.89", False),
        ("bf16", "", False),
    ],
)
def test_limits_are_those_of_the_precision(precision, value, good):
    rows = [row_of("torch", "fp32", PQ="50.0"), row_of(precision=precision, PQ=value)]
    assert (beyond_limits(rows, ["PQ"]) == []) is (beyond_limits(rows) == []) is good


def test_limits_need_an_engine_that_was_measured():
    torch_rows = [row_of("torch", p, PQ="50.0", AP="9", mIoU="7") for p in ("fp32", "tf32")]
    failed = row_of(status="failed: no memory")
    for rows in ([], torch_rows, [*torch_rows, failed]):
        for metrics in ([], ["PQ"]):
            assert beyond_limits(rows, metrics) == [
                "no limits were checked: there is no row of an engine that was measured"
            ]


@pytest.mark.parametrize(
    "names, metrics, lacking",
    [
        (("PQ",), [], ""),  # of a config with one task
        (("PQ",), ["PQ"], ""),
        (("PQ",), ["PQ", "AP"], "AP"),
        (("PQ", "mIoU"), ["AP", "AP50"], "AP, AP50"),
        (("SQ",), [], "PQ, AP, mIoU"),
        ((), [], "PQ, AP, mIoU"),
    ],
)
def test_limits_need_metrics_that_were_measured(names, metrics, lacking):
    values = dict.fromkeys(names, "50.0")
    every = {**dict.fromkeys(("PQ", "AP", "AP50", "mIoU"), "50.0"), "batch": "4"}
    rows = [row_of("torch", "fp32", **values), row_of(**values)]
    # Another engine that has them all does not speak for this one.
    rows += [row_of("torch", "fp32", **every), row_of(**every)]
    told = beyond_limits(rows, metrics)
    assert len(told) == bool(lacking)
    if lacking:
        assert told[0].endswith(f"nothing to compare, neither it nor PyTorch has {lacking}")


def test_only_what_was_compared_is_within_the_limits(tmp_path, capsys):
    def checked(*rows, limits=()) -> tuple[int, str]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        file = accuracy_ledger.MeasurementFile(path, accuracy_ledger.FIELDS, ())
        for row in rows:
            file.add({**row, "min_size": "64", "max_size": "80", "batch": "1"})
        status = accuracy_ledger.main(["--from-csv", str(path), "--work", str(tmp_path), "--limits", *limits])
        printed = capsys.readouterr()
        return status, next((line for line in printed.out.splitlines() if "within" in line), printed.err)

    reference = row_of("torch", "fp32", PQ="50", SQ="60", RQ="70")
    engine = row_of(PQ="50", SQ="60", RQ="70")
    assert checked(reference, engine) == (0, "within the limits: PQ")
    assert checked(reference, engine, limits=["SQ", "PQ"]) == (0, "within the limits: SQ, PQ")
    for rows, limits in (((reference,), ()), ((reference, engine), ["AP"])):
        status, told = checked(*rows, limits=limits)
        assert status == 1 and told.startswith("accuracy_ledger.py: ")


def test_row_without_a_reference_is_not_within_the_limits():
    other = row_of("torch", "fp32", PQ="50.0", batch="4")
    assert "no reference" in beyond_limits([other, row_of(PQ="50.0", batch="1")], ["PQ"])[0]


def test_rows_of_other_overrides_have_another_note():
    rows = [
        row_of(overrides=words, status="failed", min_size="1", max_size="2", batch="1")
        for words in ("", "MODEL.TENSORRT.MSDA plugin", "")
    ]
    lines = ledger_markdown.table(rows).splitlines()
    assert [line.rstrip("| ")[-1] for line in lines[2:5]] == ["1", "2", "1"]
    assert "with" not in lines[6] and "with `MODEL.TENSORRT.MSDA plugin`, checkpoint" in lines[7]


def test_reason_with_a_bar_does_not_break_the_table():
    rows = [
        row_of(status="failed: a | b\nc", min_size="1", max_size="2", batch="1"),
        row_of("torch", PQ="1"),
    ]
    lines = ledger_markdown.table(rows).splitlines()
    assert "failed: a \\| b c" in lines[2]
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1
