"""What tools/bootstrap.py shows while it works and says when a command fails. Standard library only."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

# What a failed command printed, and the advice for it; the first match counts.
ADVICE = (
    (
        r"No space left on device|Errno 28|Disk quota exceeded",
        "The disk is full. Free some space (torch's CUDA build needs about 10 GB): `pip cache purge` "
        "empties pip's cache, and TMPDIR=/some/big/disk moves its temporary files.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "The package index's certificate is not trusted here: apt-get install ca-certificates, or point "
        "PIP_CERT at your network's certificate.",
    ),
    (
        r"Temporary failure in name resolution|Name or service not known|NewConnectionError"
        r"|ConnectTimeoutError|ProxyError|Network is unreachable|Read timed out|from versions: none"
        r"|Connection (refused|reset|aborted)",
        "The package index could not be reached. Check the network; behind a proxy set HTTPS_PROXY, for a "
        "mirror PIP_INDEX_URL. Then run the same command again: what was downloaded is in pip's cache.",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "The package index served a file that is not the pinned release. Try PyPI itself or another mirror.",
    ),
    (
        r"Could not find a version that satisfies|No matching distribution found|ResolutionImpossible",
        "The package index has no such version for this Python and platform (tested: Python 3.11 on "
        "x86-64 Linux). Check `pip config list` for a mirror or constraints that hide it.",
    ),
    (
        r"Python\.h: No such file",
        "Python's headers are missing: apt-get install python3-dev (python3.11-dev for python3.11).",
    ),
    (
        r"(gcc|g\+\+|cc|c\+\+|clang)['\"]?: (command not found|No such file)|unable to execute"
        r"|command '?(gcc|g\+\+|cc|c\+\+)'? failed: No such file",
        "A C++ compiler is needed here: apt-get install build-essential.",
    ),
    (
        r"ensurepip is not available|No module named '?(venv|ensurepip)",
        "Python's venv module is incomplete: apt-get install python3-venv (python3.11-venv for python3.11).",
    ),
)


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do about it."""


def advice_for(output: str) -> str:
    for pattern, text in ADVICE:
        if re.search(pattern, output):
            return text
    return ""


class Console:
    """Numbered stages with elapsed times. On a terminal one line is rewritten; elsewhere lines are sparse."""

    QUIET_INTERVAL_S = 10.0

    def __init__(self, log_path: Path, stream=None):
        self.log_path = log_path
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.stage_started = self.started
        self.last_detail = self.started
        self.stage_count = 0
        self.stage_index = 0
        self.live_line = False

    def say(self, text: str) -> None:
        self._clear_live_line()
        print(text, file=self.stream, flush=True)

    def begin(self, stage_count: int) -> None:
        self.stage_count = stage_count
        self.log_path.write_text("")

    def stage(self, title: str) -> None:
        self.stage_index += 1
        self.stage_started = self.last_detail = time.monotonic()
        self.say(f"[{self.stage_index}/{self.stage_count}] {title}")
        self.log(f"\n=== [{self.stage_index}/{self.stage_count}] {title}\n")

    def done(self, text: str = "done") -> None:
        self.say(f"      {text} ({self._since(self.stage_started)})")

    def total(self) -> str:
        return self._since(self.started)

    def detail(self, text: str) -> None:
        """Show what the stage does now: in place on a terminal, else every QUIET_INTERVAL_S seconds."""
        now = time.monotonic()
        line = f"      {self._since(self.stage_started):>6}  {text}"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + line[:width], end="", file=self.stream, flush=True)
            self.live_line = True
        elif now - self.last_detail >= self.QUIET_INTERVAL_S:
            self.last_detail = now
            print(line, file=self.stream, flush=True)

    def log(self, text: str) -> None:
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(text)

    def run(
        self, command: list[str], env: dict[str, str] | None = None, keep_open: tuple[int, ...] = ()
    ) -> str:
        """Run `command`, show its progress, log and return its output.

        `keep_open` are file descriptors the command inherits. Raises SetupError with the end of the output
        and advice when the command fails. When this process is interrupted, the command is ended with its
        children.
        """
        self.log(f"\n$ {' '.join(command)}\n")
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=env,
                pass_fds=keep_open,
                start_new_session=True,
            )
        except OSError as error:
            raise SetupError(f"cannot run {command[0]}: {error}") from error
        try:
            output = self._follow(process)
        except BaseException:
            _end_group(process)
            raise
        if process.wait() != 0:
            raise SetupError(self._failure(command, process.returncode, output))
        return output

    def _follow(self, process: subprocess.Popen) -> str:
        lines: queue.Queue[str | None] = queue.Queue()

        def read():
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        summary = PipSummary()
        kept = []
        while True:
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                self.detail(summary.text)
                continue
            if line is None:
                self._clear_live_line()
                return "".join(kept)
            if summary.feed(line):
                self.detail(summary.text)
            if not line.startswith(PipSummary.PROGRESS):
                kept.append(line)
                self.log(line)

    def _failure(self, command: list[str], code: int, output: str) -> str:
        tail = [line for line in output.splitlines() if line.strip()][-12:]
        message = [f"this command failed (exit status {code}):", "    " + " ".join(command), ""]
        message += [f"    {line[:300]}" for line in tail]
        message += ["", f"All of its output is in {self.log_path}."]
        if code < 0:
            name = signal.Signals(-code).name
            message.append(f"It was ended by {name}; SIGKILL often means too little memory.")
        advice = advice_for(output)
        if advice:
            message.append(advice)
        return "\n".join(message)

    def _clear_live_line(self) -> None:
        if self.live_line:
            print("\r\x1b[K", end="", file=self.stream, flush=True)
            self.live_line = False

    @staticmethod
    def _since(start: float) -> str:
        seconds = time.monotonic() - start
        return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


class PipSummary:
    """Turns pip's output into one line that says what it is doing; other commands' output passes as it is."""

    PROGRESS = "Progress "  # `--progress-bar raw` prints "Progress BYTES of BYTES"

    def __init__(self):
        self.action = "working"
        self.bytes_text = ""

    @property
    def text(self) -> str:
        return f"{self.action} {self.bytes_text}".rstrip()

    def feed(self, line: str) -> bool:
        """Take one line of output; True when there is something new to show."""
        line = line.strip()
        if line.startswith(self.PROGRESS):
            match = re.match(r"Progress (\d+) of (\d+)", line)
            if match:
                self.bytes_text = f"{int(match.group(1)) / 1e6:.0f}/{int(match.group(2)) / 1e6:.0f} MB"
            return bool(match)
        if not line or line.startswith(("WARNING:", "Requirement already", "Looking in", "Ignoring ")):
            return False
        self.bytes_text = ""
        match = re.match(r"(Downloading|Using cached|Processing|Collecting) (\S+)", line)
        if match:
            name = match.group(2).rsplit("/", 1)[-1]
            self.action = f"{match.group(1).lower()} {name}"
        elif line.startswith("Installing collected packages:"):
            self.action = f"installing {line.count(',') + 1} packages"
        else:
            self.action = line
        return True


def _end_group(process: subprocess.Popen) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(timeout=5)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
