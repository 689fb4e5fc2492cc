"""The detectron2 wheel, what is edited for a native build, and where detectron2's sources come from."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import detectron2_wheel
import pytest
from bootstrap_console import Console, SetupError
from bootstrap_detectron2 import Detectron2Source, split_git_url

from tests.detectron2_checkout import checkout as checkout


def run_with_wheel(wheel: Path, code: str) -> str:
    """Output of `code` in a process that has only this wheel's detectron2."""
    program = f"import sys; sys.path.insert(0, {str(wheel.parent / 'site')!r})\n{code}"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_wheel_holds_package_projects_and_configs_but_no_sources_of_the_extension(checkout, tmp_path):
    wheel = detectron2_wheel.build_wheel(checkout, tmp_path / "out")
    assert wheel.name == "detectron2-0.6+purepy-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "detectron2/model_zoo/configs/Base.yaml" in names
    assert {f"detectron2/projects/{name}/__init__.py" for name in detectron2_wheel.PROJECTS} <= names
    assert not [name for name in names if "csrc" in name]


def test_wheel_is_reproducible_and_its_record_is_right(checkout, tmp_path):
    first = detectron2_wheel.build_wheel(checkout, tmp_path / "a")
    second = detectron2_wheel.build_wheel(checkout, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        record = archive.read("detectron2-0.6+purepy.dist-info/RECORD").decode().splitlines()
        listed = {line.rsplit(",", 2)[0]: line for line in record}
        assert set(listed) == set(archive.namelist())
        for name in archive.namelist():
            if not name.endswith("RECORD"):
                assert listed[name] == detectron2_wheel._record_line(name, archive.read(name))


def test_wheel_works_with_todays_numpy_pillow_and_setuptools(checkout, tmp_path):
    wheel = detectron2_wheel.build_wheel(checkout, tmp_path / "out")
    output = run_with_wheel(
        wheel,
        "import os, detectron2.data as d, detectron2.export as e\n"
        "from detectron2.model_zoo import get_config_file\n"
        "print(d.a.dtype, d.b.tolist(), d.kept, e.adapter, os.path.isfile(get_config_file('Base.yaml')))",
    )
    assert output == "bool [1] (np.True_, np.int64(3)) 1 True"


def test_missing_operator_fails_on_use_not_on_import(checkout, tmp_path):
    wheel = detectron2_wheel.build_wheel(checkout, tmp_path / "out")
    output = run_with_wheel(
        wheel,
        "import detectron2.layers as layers\n"
        "try: layers.op(1)\n"
        "except NotImplementedError as error: print(error)",
    )
    assert output.startswith("detectron2._C.op is a compiled operator")
    assert "natively built detectron2" in output


def test_model_zoo_that_uses_pkg_resources_otherwise_is_refused(checkout, tmp_path):
    path = checkout / "detectron2/model_zoo/model_zoo.py"
    path.write_text(path.read_text() + "\n\nprint(pkg_resources.working_set)\n")
    with pytest.raises(detectron2_wheel.SourceError, match=r"model_zoo\.py uses pkg_resources"):
        detectron2_wheel.build_wheel(checkout, tmp_path / "out")


def test_sdist_with_another_checksum_is_refused(checkout, tmp_path):
    sdist = tmp_path / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(checkout, "detectron2_cdo-0.5")
    with pytest.raises(detectron2_wheel.SourceError, match=detectron2_wheel.SDIST_SHA256):
        detectron2_wheel.build_wheel(sdist, tmp_path / "out")


def test_folder_that_is_not_detectron2_is_refused(tmp_path):
    with pytest.raises(detectron2_wheel.SourceError, match="not a detectron2 source tree"):
        detectron2_wheel.build_wheel(tmp_path, tmp_path / "out")


def test_native_copy_keeps_what_needs_operators_and_leaves_the_checkout_alone(checkout, tmp_path):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    copy = detectron2_wheel.edited_copy(checkout, tmp_path / "copy")
    assert "pkg_resources" not in (copy / detectron2_wheel.MODEL_ZOO).read_text()
    assert "np.bool)" not in (copy / "detectron2/data.py").read_text()
    assert "from detectron2 import _C" in (copy / detectron2_wheel.FAST_EVAL).read_text()
    assert (copy / "detectron2/layers/csrc/vision.cpp").exists()
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


# ---- where detectron2 comes from


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("git+https://host.example/a/b.git@v0.6", ("https://host.example/a/b.git", "v0.6")),
        ("https://host.example/a/b.git", ("https://host.example/a/b.git", "")),
        ("https://user@host.example/a/b.git", ("https://user@host.example/a/b.git", "")),
        ("ssh://git@host.example/a/b.git@main", ("ssh://git@host.example/a/b.git", "main")),
        ("git@host.example:a/b.git", ("git@host.example:a/b.git", "")),
        ("git@host.example:a/b.git@0f1e2d", ("git@host.example:a/b.git", "0f1e2d")),
        ("git+file:///folder/b@feature/x", ("file:///folder/b", "feature/x")),
    ],
)
def test_git_url_and_reference_are_told_apart(spec, expected):
    assert split_git_url(spec) == expected


def test_unknown_detectron2_says_what_is_allowed():
    with pytest.raises(SetupError, match=r"DETECTRON2=0\.6 is neither .* git URL"):
        Detectron2Source("0.6", native=False)


def test_native_build_of_the_release_is_refused():
    with pytest.raises(SetupError, match="no C\\+\\+ sources"):
        Detectron2Source("0.5", native=True)


def test_edited_checkout_has_another_key(checkout):
    before = Detectron2Source(str(checkout), native=False).content_key()
    assert before == Detectron2Source(str(checkout), native=False).content_key()
    (checkout / "detectron2/data.py").write_text("changed = True\n")
    assert Detectron2Source(str(checkout), native=False).content_key() != before


def test_operators_count_for_a_native_build_only(checkout):
    pure, native = (Detectron2Source(str(checkout), native).content_key() for native in (False, True))
    (checkout / "detectron2/layers/csrc/vision.cpp").write_text("int main() { return 1; }\n")
    assert Detectron2Source(str(checkout), native=False).content_key() == pure
    assert Detectron2Source(str(checkout), native=True).content_key() != native


def test_tag_of_a_git_url_is_fetched(checkout, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(checkout), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git("tag", "v1")
    (checkout / "detectron2/__init__.py").write_text('__version__ = "0.7"\n')
    git("commit", "-q", "-a", "-m", "two")
    console = Console(tmp_path / "log", io.StringIO())
    for reference, version in (("", "0.7"), ("@v1", "0.6")):
        source = Detectron2Source(f"git+file://{checkout}{reference}", native=False)
        folder = tmp_path / f"clone-{version}"
        folder.mkdir()
        tree = source.fetch(folder, pip=None, run=console.run)
        assert detectron2_wheel.read_version(tree) == version
    missing = Detectron2Source(f"git+file://{checkout}@v9", native=False)
    with pytest.raises(SetupError, match="check the address, and the tag"):
        missing.fetch(tmp_path / "clone-missing", pip=None, run=console.run)
