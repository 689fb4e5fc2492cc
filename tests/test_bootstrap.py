"""Set-up: the detectron2 wheel, the choice of Python, what is redone when, and what a failure says.

The parts of a set-up run with their commands recorded instead of run; CI's own `make lint test` is the real run.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import bootstrap
import bootstrap_python
import detectron2_wheel
import pytest
import update_lock
from bootstrap_console import Console, SetupError, advice_for
from bootstrap_detectron2 import Detectron2Source, split_git_url

ROOT = Path(__file__).resolve().parent.parent

MODEL_ZOO_SOURCE = """import os
import pkg_resources


def get_config_file(config_path):
    cfg_file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
    return cfg_file
"""


@pytest.fixture
def checkout(tmp_path):
    """A tiny tree with detectron2's layout."""
    files = {
        "setup.py": "",
        "LICENSE": "Apache",
        "configs/Base.yaml": "A: 1\n",
        "detectron2/__init__.py": '__version__ = "0.6"\n',
        "detectron2/model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
        "detectron2/model_zoo/model_zoo.py": MODEL_ZOO_SOURCE,
        "detectron2/evaluation/__init__.py": "",
        "detectron2/evaluation/fast_eval_api.py": "from detectron2 import _C\n",
        "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import adapter\n",
        "detectron2/export/api.py": "from caffe2.proto import caffe2_pb2\n",
        "detectron2/export/flatten.py": "adapter = 1\n",
        "detectron2/layers/__init__.py": "from detectron2 import _C\n\n\ndef op(x):\n    return _C.op(x)\n",
        "detectron2/layers/csrc/vision.cpp": "int main() {}\n",
        "detectron2/data.py": (
            "import numpy as np\nfrom PIL import Image\n"
            "a = np.zeros(2, dtype=np.bool)\nb = np.array([1.5]).astype(np.int)\n"
            "kept = np.bool_(1), np.int64(3)\nmode = Image.LINEAR\n"
        ),
    }
    for folder in detectron2_wheel.PROJECTS.values():
        files[f"{folder}/__init__.py"] = f"source = {folder!r}\n"
    root = tmp_path / "checkout"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def run_with_wheel(wheel: Path, code: str) -> str:
    """Output of `code` in a process that has only this wheel's detectron2."""
    program = f"import sys; sys.path.insert(0, {str(wheel.parent / 'site')!r})\n{code}"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ---- the wheel


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


# ---- which Python


def fake_python(folder: Path, name: str, version: str, missing: str = "") -> Path:
    path = folder / name
    lines = "\n".join([str(path), version, *missing.split()])
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only_these_pythons(tmp_path, monkeypatch):
    """A PATH with nothing but what the test puts there, `cat` and `sh`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "sh"):
        (folder / name).symlink_to(Path("/bin", name))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(bootstrap_python.sys, "executable", str(folder / "none"))
    return folder


def test_python_311_is_preferred_then_310_then_312(only_these_pythons):
    fake_python(only_these_pythons, "python3", "3.12.4")
    assert bootstrap_python.find_interpreter("").version == "3.12.4"
    fake_python(only_these_pythons, "python3.10", "3.10.9")
    assert bootstrap_python.find_interpreter("").version == "3.10.9"
    fake_python(only_these_pythons, "python3.11", "3.11.2")
    assert bootstrap_python.find_interpreter("").version == "3.11.2"


def test_python_without_venv_names_the_debian_package(only_these_pythons):
    fake_python(only_these_pythons, "python3.11", "3.11.2", missing="ensurepip")
    with pytest.raises(
        SetupError, match=r"python3\.11: 3\.11\.2, its venv .* apt-get install python3\.11-venv"
    ):
        bootstrap_python.find_interpreter("")


def test_too_old_and_too_new_pythons_are_listed(only_these_pythons):
    fake_python(only_these_pythons, "python3", "3.14.0")
    with pytest.raises(SetupError) as error:
        bootstrap_python.find_interpreter("")
    assert "python3: 3.14.0, not one of 3.10, 3.11, 3.12" in str(error.value)
    assert "python3.11: not found" in str(error.value)
    assert "apt-get install python3 python3-venv" in str(error.value)


def test_shim_that_does_not_run_is_passed_over(only_these_pythons):
    broken = only_these_pythons / "python3.11"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    fake_python(only_these_pythons, "python3", "3.10.1")
    assert bootstrap_python.find_interpreter("").version == "3.10.1"


def test_interpreter_of_a_virtual_environment_leads_to_the_one_that_made_it():
    found = bootstrap_python.probe(sys.executable)
    assert found.version == "{}.{}.{}".format(*sys.version_info[:3])
    assert Path(found.path).resolve() == Path(sys._base_executable).resolve()


# ---- the parts of a set-up


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the files set-up reads, with commands recorded instead of run. Yields a function that runs it."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("requirements.lock", "requirements-nodeps.lock", "setup.py", "pyproject.toml"):
        (root / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(bootstrap, "ROOT", root)
    monkeypatch.setattr(detectron2_wheel, "build_wheel", lambda source, folder: folder / "detectron2.whl")
    state = {"root": root, "commands": [], "fail": None}

    def record(console, command, env=None, keep_open=()):
        state["commands"].append(" ".join(command))
        if state["fail"] and re.search(state["fail"], state["commands"][-1]):
            raise KeyboardInterrupt
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(exist_ok=True)
            (Path(command[-1]) / "bin" / "python").symlink_to(sys.executable)
            site = "lib/python{}.{}/site-packages".format(*sys.version_info)
            (Path(command[-1]) / site).mkdir(parents=True, exist_ok=True)
        if "download" in command:
            Path(command[command.index("--dest") + 1], "detectron2_cdo-0.5.tar.gz").touch()
        return "READY test\n"

    monkeypatch.setattr(Console, "run", record)

    def run(*arguments: str, fail: str | None = None) -> list[str]:
        state["commands"].clear()
        state["fail"] = fail
        state["status"] = bootstrap.main(
            ["--venv", str(root / ".venv"), "--python", sys.executable, *arguments]
        )
        return list(state["commands"])

    run.state = state
    run.root = root
    run.venv = root / ".venv"
    return run


def test_first_run_does_all_parts_and_the_second_none(project):
    commands = project()
    assert project.state["status"] == 0
    assert [
        bool(re.search(pattern, "\n".join(commands))) for pattern in ("-m venv", "download", "--editable")
    ]
    assert set(json.loads((project.venv / bootstrap.STATE).read_text())) == set(bootstrap.PARTS)
    assert project() == []
    assert project.state["status"] == 0


def test_sdist_is_downloaded_with_its_hash_and_before_anything_of_it_runs(project):
    download = next(command for command in project() if " download " in command)
    assert "--require-hashes" in download


@pytest.mark.parametrize(
    "part", ["-m venv", "pip install --progress-bar raw --no-build", "download", "--editable"]
)
def test_interrupted_run_is_never_taken_for_good(project, part):
    project(fail=part)
    assert project.state["status"] == 130
    commands = project()
    assert project.state["status"] == 0
    assert any(part in command for command in commands)
    assert project() == []


def test_interruption_in_a_later_part_keeps_the_base(project):
    project(fail="--editable")
    commands = project()
    assert not any("-m venv" in command or "download" in command for command in commands)


def test_interrupted_rebuild_does_not_leave_the_old_state(project, monkeypatch):
    project()

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, "remove_environment", interrupt)
    project("--recreate")
    monkeypatch.undo()
    assert json.loads((project.venv / bootstrap.STATE).read_text()) == {}


def test_changed_lock_rebuilds_everything(project):
    project()
    with open(project.root / "requirements.lock", "a") as lock:
        lock.write("another-package==1.0\n")
    assert any("-m venv" in command for command in project())


def test_changed_comment_in_a_lock_rebuilds_nothing(project):
    project()
    with open(project.root / "requirements.lock", "a") as lock:
        lock.write("# a remark\n")
    assert project() == []


def test_another_detectron2_leaves_the_packages_alone(project, checkout):
    project()
    commands = project("--detectron2", str(checkout))
    assert any("--force-reinstall" in command for command in commands)
    assert not any("-m venv" in command or " -r " in command for command in commands)
    assert project("--detectron2", str(checkout)) == []
    (checkout / "detectron2/data.py").write_text("changed = True\n")
    assert any("--force-reinstall" in command for command in project("--detectron2", str(checkout)))


def test_native_detectron2_is_compiled_by_pip_from_a_copy(project, checkout):
    commands = project("--detectron2", str(checkout), "--detectron2-native")
    install = next(command for command in commands if "--force-reinstall" in command)
    assert install.endswith("/native")


def test_native_copy_keeps_what_needs_operators_and_leaves_the_checkout_alone(checkout, tmp_path):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    copy = detectron2_wheel.edited_copy(checkout, tmp_path / "copy")
    assert "pkg_resources" not in (copy / detectron2_wheel.MODEL_ZOO).read_text()
    assert "np.bool)" not in (copy / "detectron2/data.py").read_text()
    assert "from detectron2 import _C" in (copy / detectron2_wheel.FAST_EVAL).read_text()
    assert (copy / "detectron2/layers/csrc/vision.cpp").exists()
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_chosen_torch_pair_replaces_the_pins(project, monkeypatch):
    seen = []
    original = bootstrap.replace_pin

    def spy(lines, name, version):
        seen.append(
            [line for line in original(lines, name, version) if bootstrap.requirement_name(line) == name]
        )
        return original(lines, name, version)

    monkeypatch.setattr(bootstrap, "replace_pin", spy)
    project("--torch", "2.11.0", "--torchvision", "0.26.0")
    assert seen == [["torch==2.11.0"], ["torchvision==0.26.0"]]


def test_pinned_torchvision_is_kept_quiet_and_a_chosen_one_is_not(project):
    project()
    assert len(list(project.venv.glob(f"lib/*/*/{bootstrap.QUIET_PTH}"))) == 1
    project("--recreate", "--torchvision", "0.29.1")
    assert list(project.venv.glob(f"lib/*/*/{bootstrap.QUIET_PTH}")) == []


def test_damaged_state_file_is_rebuilt(project):
    project()
    (project.venv / bootstrap.STATE).write_text('{"base": "abc')
    assert any("-m venv" in command for command in project())


def test_environment_of_somebody_else_is_left_alone(project, capsys):
    project.venv.mkdir()
    (project.venv / "precious").touch()
    assert project() == []
    assert project.state["status"] == 1
    assert "was not made by tools/bootstrap.py" in capsys.readouterr().out
    assert (project.venv / "precious").exists()


def test_full_disk_is_noticed_before_anything_is_done(project, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1.2e9}))
    assert project() == []
    assert project.state["status"] == 1
    assert "1.2 GB are free" in capsys.readouterr().out


def test_moved_environment_is_rebuilt(project, tmp_path):
    project()
    project.venv.rename(tmp_path / "elsewhere")
    assert any("-m venv" in command for command in project("--venv", str(tmp_path / "elsewhere")))


def test_second_run_waits_for_the_first(tmp_path):
    stream = io.StringIO()
    console = Console(tmp_path / "log", stream)
    holder = os.open(tmp_path / ".venv.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    entered = threading.Event()

    def second():
        with bootstrap.exclusive(tmp_path / ".venv", console):
            entered.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not entered.wait(0.3)
    os.close(holder)
    assert entered.wait(10)
    thread.join()
    assert "waiting for another set-up" in stream.getvalue()


# ---- what is shown


def test_failed_command_shows_its_end_the_log_and_advice(tmp_path):
    console = Console(tmp_path / "log", io.StringIO())
    program = "print('first'); print('OSError: [Errno 28] No space left on device'); raise SystemExit(3)"
    with pytest.raises(SetupError) as error:
        console.run([sys.executable, "-c", program])
    message = str(error.value)
    assert "exit status 3" in message
    assert "No space left on device" in message
    assert str(tmp_path / "log") in message
    assert "The disk is full" in message
    assert "first" in (tmp_path / "log").read_text()


def test_command_that_does_not_exist_is_an_error_with_its_name(tmp_path):
    with pytest.raises(SetupError, match="cannot run no-such-program"):
        Console(tmp_path / "log", io.StringIO()).run(["no-such-program"])


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("Temporary failure in name resolution", "could not be reached"),
        (
            "ERROR: Could not find a version that satisfies pip==26.0 (from versions: none)",
            "could not be reached",
        ),
        ("[SSL: CERTIFICATE_VERIFY_FAILED]", "ca-certificates"),
        ("ERROR: No matching distribution found for torch==9", "no such version"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "not the pinned release"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("error: command 'g++' failed: No such file or directory", "build-essential"),
        ("something else", ""),
    ],
)
def test_advice_fits_the_failure(output, advice):
    assert advice in advice_for(output)
    assert bool(advice) == bool(advice_for(output))


def test_progress_names_package_and_bytes_and_keeps_the_log_free_of_them(tmp_path):
    stream = io.StringIO()
    console = Console(tmp_path / "log", stream)
    console.QUIET_INTERVAL_S = 0.0
    console.begin(1)
    console.stage("packages")
    lines = [
        "Collecting torch==2.13.0",
        "Downloading torch-2.13.0.whl (190 MB)",
        "Progress 95000000 of 190000000",
    ]
    (tmp_path / "output").write_text("\n".join(lines))
    console.run(["cat", str(tmp_path / "output")])
    assert "[1/1] packages" in stream.getvalue()
    assert "downloading torch-2.13.0.whl 95/190 MB" in stream.getvalue()
    assert "Progress" not in (tmp_path / "log").read_text()


# ---- the lock


def test_every_requirement_is_pinned_for_every_python():
    lines = bootstrap.read_lock(ROOT / "requirements.lock")
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][^ ;+]*(; .+)?", line) for line in lines), lines
    for line in bootstrap.read_lock(ROOT / "requirements.in"):
        assert update_lock.canonical(bootstrap.requirement_name(line)) in {
            bootstrap.requirement_name(pin) for pin in lines
        }
        if "==" in line:
            pinned = line.split(";")[0].strip()
            assert any(pin.split(";")[0] == pinned for pin in lines), pinned


def test_lock_lines_carry_markers_only_where_pythons_differ():
    resolved = {
        "3.10": {"a": "1", "b": "1", "old": "3"},
        "3.11": {"a": "1", "b": "2"},
        "3.12": {"a": "1", "b": "2"},
    }
    assert update_lock.merge(resolved) == [
        "a==1",
        'b==1; python_version == "3.10"',
        'b==2; python_version == "3.11" or python_version == "3.12"',
        'old==3; python_version == "3.10"',
    ]
