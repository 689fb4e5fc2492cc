"""Set-up: the choice of Python, what is redone when, and what a failure says.

The parts of a set-up run with their commands recorded instead of run; CI's own `make lint test` is the real run.
"""

from __future__ import annotations

import ast
import fcntl
import io
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import bootstrap
import bootstrap_python
import detectron2_wheel
import pytest
import update_lock
from bootstrap_console import Console, SetupError, advice_for

from tests.detectron2_checkout import checkout as checkout

ROOT = Path(__file__).resolve().parent.parent

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


def test_lock_names_an_interpreter_that_is_absent(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["update_lock.py", "python9.9"])
    with pytest.raises(SystemExit) as error:
        update_lock.main()
    assert error.value.code == 2 and "'python9.9'. Name interpreters of Python 3.1" in capsys.readouterr().err


# ---- the CUDA kernels


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A compiler, which setup.py would find."""
    monkeypatch.delenv("D2_TRT_KERNELS", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_kernels_that_take_minutes_are_announced(project, nvcc, monkeypatch, capsys):
    project()
    assert f"its CUDA kernels by {nvcc}: minutes" in capsys.readouterr().out
    monkeypatch.setenv("D2_TRT_KERNELS", "0")
    project()
    assert "CUDA kernels" not in capsys.readouterr().out


def test_compiler_that_appears_has_the_kernels_compiled(project, nvcc):
    nvcc.rename(nvcc.with_name("later"))
    project()
    assert project() == []
    nvcc.with_name("later").rename(nvcc)
    commands = project()
    assert any("--editable" in command for command in commands)
    assert not any("download" in command for command in commands)


@pytest.mark.parametrize("places", [("CUDA_HOME", "CUDA_PATH", "PATH"), ("CUDA_PATH", "PATH"), ("PATH",), ()])
def test_announced_compiler_is_the_one_that_setup_takes(places, tmp_path, monkeypatch):
    """setup.py cannot be imported here: it installs, and needs packages that set-up has not installed yet."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "find_nvcc"]
    names = {"os": os, "shutil": shutil, "Path": Path}
    exec("from __future__ import annotations\n" + ast.unparse(function), names)
    monkeypatch.delenv("D2_TRT_KERNELS", raising=False)
    for place in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        nvcc = tmp_path / place / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        if place in places:
            nvcc.touch(0o755)
        monkeypatch.setenv(place, str(nvcc.parent if place == "PATH" else tmp_path / place))
    found = bootstrap.find_nvcc()
    assert found == str(names["find_nvcc"]() or "")
    if places:
        assert found == str(tmp_path / places[0] / "bin" / "nvcc")
