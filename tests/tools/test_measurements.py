"""tools/measurements.py: files that are continued, and arguments."""

from __future__ import annotations

import pytest
from measurements import MeasurementFile, read_rows, size_pair


def test_file_of_another_tool_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="has the columns x, y; expected a, b"):
        MeasurementFile(tmp_path / "a.csv", ["a", "b"], ["a"])


def test_file_from_before_a_column_is_continued_with_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,c\n1,x\n2,y\n")
    fields = ["a", "b", "c"]
    assert read_rows(path, fields, later=["b"])[1] == {"a": "2", "b": "", "c": "y"}
    with pytest.raises(ValueError, match="has the columns a, c; expected a, b, c"):
        read_rows(path, fields, later=["c"])
    file = MeasurementFile(path, fields, ["a"], later=["b"])
    assert path.read_text() == "a,c\n1,x\n2,y\n"
    file.add({"a": 3, "b": 4, "c": "z"})
    file.add({"a": 5})
    assert path.read_text().split() == ["a,b,c", "1,,x", "2,,y", "3,4,z", "5,,"]
    assert [one.name for one in tmp_path.iterdir()] == ["a.csv"]
    assert MeasurementFile(path, fields, ["a"]).rows == file.rows


def test_last_of_equal_measurements_counts(tmp_path):
    file = MeasurementFile(tmp_path / "deep" / "a.csv", ["a", "b"], ["a"])
    file.add({"a": 1, "b": "failed"})
    file.add({"a": 2, "b": 'with "quotes", and commas'})
    file.add({"a": 1, "b": "good"})
    again = MeasurementFile(tmp_path / "deep" / "a.csv", ["a", "b"], ["a"])
    assert (
        [r["b"] for r in again.rows] == ["good", 'with "quotes", and commas'] == [r["b"] for r in file.rows]
    )
    assert again.find({"a": 3}) is None
    with pytest.raises(KeyError, match="no columns"):
        file.add({"c": 1})


def test_processes_of_one_second_have_files_of_their_own(tmp_path):
    path = tmp_path / "deep" / "a.csv"
    files = [MeasurementFile(path, ["a"], ["a"], exclusive=True) for _ in range(3)]
    for value in (1, 2):
        for file in files:
            file.add({"a": value})
    assert [file.path.name for file in files] == ["a.csv", "a-2.csv", "a-3.csv"]
    assert all(file.path.read_text().split() == ["a", "1", "2"] for file in files)


def test_sizes_are_read():
    assert size_pair("800/1333") == (800, 1333)
