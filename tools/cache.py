#!/usr/bin/env python3
"""Look into the cache of TensorRT engines, check it, and clear it.

    python tools/cache.py list                          # what is there, the most recently used first
    python tools/cache.py verify                        # read every engine and compare it with its checksum
    python tools/cache.py prune --max-gb 5 --dry-run    # what would go, least recently used first
    python tools/cache.py prune --older-than 30d        # what was not used for 30 days; also damaged entries
    python tools/cache.py prune --all                   # every engine, and the builder's timing caches
    python tools/cache.py path [KEY]                    # the folder, or one engine's file

Engines that a running process has loaded, or builds, are never removed.

Exit status: 0, all is well; 1, damaged engines were found, or some that were to go are in use; 2, the command could
not be carried out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from datetime import datetime

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tabulate import tabulate

from d2_trt.cache import EngineCache, EntryInfo
from d2_trt.cache_timing import timing_caches
from d2_trt.errors import D2TRTError
from d2_trt.options import default_cache_dir

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def build_parser() -> argparse.ArgumentParser:
    where = argparse.ArgumentParser(add_help=False)
    # SUPPRESS: given before the command, it must not be undone by the command's own default.
    where.add_argument(
        "--dir",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="default: $XDG_CACHE_HOME/d2_trt, else ~/.cache/d2_trt, as MODEL.TENSORRT.CACHE.DIR",
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[where]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", parents=[where], help="what is there")
    listing.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    verify = commands.add_parser("verify", parents=[where], help="check every engine")
    verify.add_argument("--remove", action="store_true", help="remove the damaged ones")
    prune = commands.add_parser("prune", parents=[where], help="remove engines")
    prune.add_argument("--max-gb", type=_gigabytes, metavar="X", help="keep at most X GB (10^9 bytes)")
    prune.add_argument(
        "--older-than",
        type=_duration,
        metavar="AGE",
        help="not used for AGE: 30d, 12h, 90m; days without a unit",
    )
    prune.add_argument("--all", action="store_true", help="every engine and timing cache")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    path = commands.add_parser("path", parents=[where], help="where they are")
    path.add_argument("key", nargs="?", metavar="KEY", help="an engine's key, or how it begins")
    return parser


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GB of at least 0")
    return value * 1e9


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age such as 30d, 12h or 90m")
    return float(match[1]) * _UNITS[match[2] or "d"]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        # An age or a size asked for here has nothing to do with the limit in a config.
        cache = EngineCache(getattr(args, "dir", None) or default_cache_dir(), mode="readwrite")
        return {"list": show, "verify": verify, "prune": prune, "path": path}[args.command](cache, args)
    except (D2TRTError, OSError) as error:
        print(f"cache.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def show(cache: EngineCache, args: argparse.Namespace) -> int:
    entries = cache.list()
    if args.json:
        print(json.dumps([_as_json(cache, e) for e in entries], indent=2))
        return 0
    timing = timing_caches(cache.directory)
    if entries:
        print(_table(entries))
        print()
    print(f"{_count(entries)}, {_size(sum(e.size for e in entries))}, in {cache.directory}")
    if timing:
        print(f"{len(timing)} timing cache{_s(timing)}, {_size(sum(p.stat().st_size for p in timing))}")
    return 0


def verify(cache: EngineCache, args: argparse.Namespace) -> int:
    entries = cache.verify()
    damaged = [e for e in entries if e.problem]
    if damaged:
        print(_table(damaged))
        print()
    print(f"{_count(entries)} checked in {cache.directory}: {len(damaged)} damaged")
    if damaged and args.remove:
        gone = [e for e in damaged if cache.remove(e.key)]
        print(f"Removed {_count(gone)}")
    elif damaged:
        print(
            "Damaged engines are built again when they are needed; `cache.py verify --remove` removes them now."
        )
    return 1 if damaged else 0


def prune(cache: EngineCache, args: argparse.Namespace) -> int:
    gone = cache.prune(
        max_bytes=math.inf if args.max_gb is None else args.max_gb,
        older_than=args.older_than,
        everything=args.all,
        dry_run=args.dry_run,
    )
    if gone:
        print(_table(gone))
        print()
    print(
        f"{'Would remove' if args.dry_run else 'Removed'} {_count(gone)}, {_size(sum(e.size for e in gone))}, "
        f"from {cache.directory}"
    )
    if args.all:
        timing = timing_caches(cache.directory)
        for file in [] if args.dry_run else timing:
            file.unlink(missing_ok=True)
        print(f"{'Would remove' if args.dry_run else 'Removed'} {len(timing)} timing cache{_s(timing)}")
    taken = {e.key for e in gone} if args.dry_run else set()
    kept = [e for e in cache.list() if e.key not in taken]
    over = args.max_gb is not None and sum(e.size for e in kept) > args.max_gb
    if kept and (args.all or over):
        used = [e for e in kept if e.in_use]
        print(
            f"{_count(kept)} remain{'' if len(kept) > 1 else 's'}, {len(used)} of them in use",
            file=sys.stderr,
        )
        return 1
    return 0


def path(cache: EngineCache, args: argparse.Namespace) -> int:
    if args.key is None:
        print(cache.directory)
        return 0
    keys = [e.key for e in cache.list() if e.key.startswith(args.key.lower())]
    if len(keys) != 1:
        what = f"{len(keys)} engines' keys begin" if keys else "no engine's key begins"
        print(f"cache.py: {what} with {args.key!r} in {cache.directory}", file=sys.stderr)
        return 2
    print(cache.directory / f"{keys[0]}.engine")
    return 0


def _table(entries: list[EntryInfo]) -> str:
    rows = []
    for entry in entries:
        made_from = (entry.sidecar or {}).get("ingredients", {})
        shapes, options = made_from.get("shapes") or {}, made_from.get("options") or {}
        rows.append(
            {
                "key": entry.key[:12],
                "size": _size(entry.size),
                "last used": datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M"),
                "GPU": made_from.get("gpu", "?"),
                "TensorRT": made_from.get("tensorrt", "?"),
                "precision": options.get("precision", "?"),
                "batch": _span(shapes, 0),
                "H": _span(shapes, 1),
                "W": _span(shapes, 2),
                "state": entry.problem or ("in use" if entry.in_use else "ok"),
            }
        )
    return tabulate(rows, headers="keys", disable_numparse=True)


def _span(shapes: dict, axis: int) -> str:
    try:
        low, high = shapes["min"][axis], shapes["max"][axis]
    except (KeyError, IndexError, TypeError):
        return "?"
    return str(low) if low == high else f"{low}..{high}"


def _as_json(cache: EngineCache, entry: EntryInfo) -> dict:
    return {
        "key": entry.key,
        "path": str(cache.directory / f"{entry.key}.engine"),
        "size": entry.size,
        "last_used": entry.last_used,
        "age_seconds": max(time.time() - entry.last_used, 0.0),
        "problem": entry.problem,
        "in_use": entry.in_use,
        "sidecar": entry.sidecar,
    }


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _count(entries: list) -> str:
    return f"{len(entries)} engine{_s(entries)}"


def _s(things: list) -> str:
    return "" if len(things) == 1 else "s"


if __name__ == "__main__":
    sys.exit(main())
