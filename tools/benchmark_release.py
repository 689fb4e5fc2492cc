"""The official release in tools/benchmark.py: a process of its own, in which `mask2former` is the release's package.

Both sides speak JSON, a line each way: {"call": name of a LocalBench method, "arguments": [...]} is answered by
{"result": ...} or {"error": message, "memory": ...}. So the release's calls can be timed between those of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from typing import Any, TextIO

from benchmark_bench import LocalBench, MeasureError

_CALLS = ("install", "uninstall", "prepare", "measure", "forget")
# Options without a meaning for the release, or that the parent has dealt with.
_OURS = ("--release", "--backend", "--compile-mode", "--output")
_CLOSE_SECONDS = 60.0


class RemoteBench:
    """LocalBench's methods, carried out by the release's process."""

    def __init__(self, script: str, args: argparse.Namespace, argv: list[str], weights: str):
        """Start the process; its errors go to this one's stderr.

        Args:
            script: benchmark.py.
            argv: of this process.
            weights: file of the weights that both are to have.

        Raises:
            MeasureError: it ended before it was ready.
        """
        own = ["--implementation", "release", "--package-root", args.release, "--serve"]
        words = without_ours(argv)
        command = [sys.executable, script, *own, *words, *([] if "--" in words else ["--"])]
        command += ["MODEL.WEIGHTS", weights]
        self._where = args.release
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.configurations = self._read()

    def install(self, index: int) -> dict[str, Any]:
        return self._ask("install", index)

    def uninstall(self, index: int) -> None:
        self._ask("uninstall", index)

    def prepare(self, index: int, case: int, batch: int) -> dict[str, Any]:
        return self._ask("prepare", index, case, batch)

    def measure(self, index: int, stage: str, samples: int, warmup: int) -> dict[str, Any]:
        return self._ask("measure", index, stage, samples, warmup)

    def forget(self, index: int) -> None:
        self._ask("forget", index)

    def close(self) -> None:
        """End the process; its standard input's end is what tells it to."""
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, call: str, *arguments) -> Any:
        try:
            self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
        except (BrokenPipeError, ValueError) as error:
            raise self._ended() from error
        return self._read()

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise MeasureError(answer["error"], memory=answer["memory"])
        return answer["result"]

    def _ended(self) -> MeasureError:
        status = self._process.wait()
        return MeasureError(
            f"the process of the release in {self._where} ended with status {status}, see above"
        )


def serve(bench: LocalBench, requests: TextIO, answers: TextIO) -> None:
    """Answer a RemoteBench until its end of the pipe is closed."""

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"result": bench.configurations})
    for line in requests:
        request = json.loads(line)
        if request["call"] not in _CALLS:
            answer({"error": f"{request['call']!r} is none of {', '.join(_CALLS)}", "memory": False})
            continue
        try:
            answer({"result": getattr(bench, request["call"])(*request["arguments"])})
        except MeasureError as error:
            answer({"error": str(error), "memory": error.memory})


def without_ours(argv: list[str]) -> list[str]:
    """A command line without the options that have no meaning for the release."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("-"):
            dropping = word.split("=")[0] in _OURS
        if not dropping:
            kept.append(word)
    return kept
