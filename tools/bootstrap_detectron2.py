"""Where detectron2 comes from: PyPI's sdist, a checkout or a git URL. Standard library only."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import detectron2_wheel
from bootstrap_console import SetupError


class Detectron2Source:
    """The detectron2 asked for: "0.5" (PyPI's sdist), a checkout's path, or a git URL, maybe with @ref."""

    URL = re.compile(r"^(git\+)?((https?|ssh|git|file)://|git@)")

    def __init__(self, spec: str, native: bool):
        self.native = native
        self.is_url = bool(self.URL.match(spec))
        self.is_release = spec == "0.5"
        if self.is_release and native:
            raise SetupError(
                "PyPI's detectron2 0.5 has no C++ sources to compile. Give DETECTRON2_NATIVE=1 "
                "(--detectron2-native) together with a checkout or a git URL in DETECTRON2."
            )
        if not self.is_url and not self.is_release:
            path = Path(spec).expanduser()
            if not path.is_dir():
                raise SetupError(
                    f"DETECTRON2={spec} is neither 0.5 nor a folder nor a git URL. 0.5 is the only release "
                    "on PyPI; for another give a checkout (DETECTRON2=/path/to/detectron2) or a URL "
                    "(DETECTRON2=git+https://github.com/facebookresearch/detectron2.git@v0.6)."
                )
            spec = str(path.resolve())
        self.spec = spec

    @property
    def label(self) -> str:
        return f"{self.spec}, {'compiled' if self.native else 'pure Python'}"

    def content_key(self) -> str:
        """Changes when a checkout's sources do. What a URL gave stays until the environment is recreated."""
        if self.is_url or self.is_release:
            return ""
        key = detectron2_wheel.fingerprint(Path(self.spec))
        if self.native:
            sources = sorted(Path(self.spec, "detectron2", "layers", "csrc").rglob("*.*"))
            key = hashlib.sha256(key.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
        return key

    def fetch(self, folder: Path, pip: Callable[..., None], run: Callable[..., str]) -> Path:
        """Bring the source into `folder` unless it is on this machine; returns the sdist's or tree's path.

        `pip` takes pip's arguments, `run` a command and its environment; both raise SetupError.
        """
        if self.is_release:
            requirement = folder / "detectron2.txt"
            pin = f"{detectron2_wheel.SDIST_REQUIREMENT} --hash=sha256:{detectron2_wheel.SDIST_SHA256}"
            requirement.write_text(pin + "\n")
            # pip checks the hash before it runs the sdist's setup.py for its metadata. That imports torch,
            # hence no build isolation.
            options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--require-hashes"]
            pip("download", *options, "--dest", str(folder), "--requirement", str(requirement))
            return next(folder.glob("detectron2*.tar.gz"))
        if self.is_url:
            return self._clone(folder / "source", run)
        return Path(self.spec)

    def _clone(self, folder: Path, run: Callable[..., str]) -> Path:
        if shutil.which("git") is None:
            raise SetupError("git is needed to fetch detectron2 from a URL: apt-get install git")
        url, reference = split_git_url(self.spec)
        env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        try:
            run(["git", "clone", "--quiet", url, str(folder)], env=env)
            if reference:
                run(["git", "-C", str(folder), "checkout", "--quiet", "--detach", reference], env=env)
        except SetupError as error:
            raise SetupError(
                f"{error}\nThis is with DETECTRON2={self.spec}: check the address, and the tag, branch or "
                "commit after the last @."
            ) from error
        return folder


def split_git_url(spec: str) -> tuple[str, str]:
    """The URL and what follows its last @, or "". The @ of git@host and of user@host belongs to the URL."""
    url = spec[len("git+") :] if spec.startswith("git+") else spec
    head, at, reference = url.rpartition("@")
    path_start = url.find("/", url.find("://") + 3) if "://" in url else url.find(":")
    if at and len(head) > path_start >= 0:
        return head, reference
    return url, ""
