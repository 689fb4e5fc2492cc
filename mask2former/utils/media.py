"""Pictures and videos: which inputs are meant, reading them, and writing results whole or not at all."""

from __future__ import annotations

import glob
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps

WRITABLE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {".gif", ".ppm", ".pgm", ".jp2", ".avif"}
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
VIDEO_CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
# Of a source that does not tell its frame rate.
DEFAULT_FPS = 25.0


class MediaError(Exception):
    """An input or output that cannot be used; the message says which and why."""


@dataclass
class Item:
    """One thing to run on. `source` is a path, a camera's index or a scene's seed, by kind."""

    kind: str  # "image", "video", "camera" or "scene"
    source: Path | int
    output: Path | None = None

    @property
    def name(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"{self.kind} {self.source}"

    @property
    def is_stream(self) -> bool:
        return self.kind in ("video", "camera")


@dataclass
class Found:
    """Items of the command line, and how many files of folders and patterns are neither image nor video."""

    items: list[Item] = field(default_factory=list)
    skipped: int = 0


def find_inputs(words: Sequence[str]) -> Found:
    """Files, folders (not their subfolders) and patterns ("**" crosses folders), each file once, in order.

    Raises:
        MediaError: a word that names nothing, or a folder or pattern without an image or video.
    """
    found = Found()
    seen: set[Path] = set()
    for word in words:
        path = Path(word).expanduser()
        if path.is_file():
            # Named outright: tried even where its suffix says nothing.
            found_here, skipped = [path], 0
        elif path.is_dir():
            found_here, skipped = _usable(sorted(path.iterdir()))
            if not found_here:
                raise MediaError(f"the folder {word} holds no image or video ({_other(skipped)}); {_KNOWN}")
        elif glob.has_magic(word):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            found_here, skipped = _usable(matches)
            if not found_here:
                raise MediaError(
                    f"no image or video matches the pattern '{word}' ({_other(skipped)}); {_KNOWN}"
                )
        else:
            raise MediaError(f"no such file or folder: {word}")
        found.skipped += skipped
        for file in found_here:
            key = file.resolve()
            if key not in seen:
                seen.add(key)
                found.items.append(Item("video" if file.suffix.lower() in VIDEO_SUFFIXES else "image", file))
    return found


_KNOWN = f"images are {' '.join(sorted(IMAGE_SUFFIXES))}, videos {' '.join(sorted(VIDEO_SUFFIXES))}"


def _usable(paths: Sequence[Path]) -> tuple[list[Path], int]:
    files = [path for path in paths if path.is_file()]
    # Hidden files: a "._photo.jpg" is macOS's metadata, not a photo.
    usable = [
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not path.name.startswith(".")
    ]
    return usable, len(files) - len(usable)


def _other(count: int) -> str:
    return "nothing at all" if count == 0 else f"{count} other file{'s' if count > 1 else ''}"


def assign_outputs(items: Sequence[Item], output: str) -> None:
    """Give each item its output path: the file `output` itself, or one in the folder `output`.

    A folder is what exists as one, ends with a slash or has no suffix. The second item of a name gets "_2".

    Raises:
        MediaError: several items for one file, a suffix that cannot be written, an output that is an input.
    """
    path = Path(output).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir() or output.endswith(("/", os.sep)) or not suffix:
        if path.exists() and not path.is_dir():
            raise MediaError(
                f"--output {output} is a file, not a folder, and has no suffix that says what to write"
            )
        taken: set[str] = set()
        for item in items:
            item.output = path / _free_name(item, taken)
    else:
        if len(items) > 1:
            raise MediaError(
                f"--output {output} is one file, but there are {len(items)} inputs; name a folder, such as "
                f"{path.with_suffix('')}/"
            )
        stream = items[0].is_stream
        allowed = set(VIDEO_CODECS) if stream else WRITABLE_SUFFIXES
        if suffix not in allowed:
            what = "a video" if stream else "an image"
            raise MediaError(
                f"--output {output}: {what} is written as {' '.join(sorted(allowed))}; for a folder of that "
                "name add a slash"
            )
        items[0].output = path
    inputs = {item.source.resolve(): item.source for item in items if isinstance(item.source, Path)}
    for item in items:
        same = inputs.get(item.output.resolve())
        if same is not None:
            raise MediaError(
                f"the result of {item.name} would overwrite the input {same}; choose another --output"
            )


def _free_name(item: Item, taken: set[str]) -> str:
    if isinstance(item.source, Path):
        stem, suffix = item.source.stem, item.source.suffix.lower()
        if item.is_stream:
            suffix = ".mp4"
        elif suffix not in WRITABLE_SUFFIXES:
            suffix = ".png"
    else:
        stem, suffix = f"{item.kind}_{item.source:03d}", ".mp4" if item.is_stream else ".png"
    name, nth = f"{stem}{suffix}", 1
    while name in taken:
        nth += 1
        name = f"{stem}_{nth}{suffix}"
    taken.add(name)
    return name


def read_picture(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read an image as detectron2 does, EXIF orientation applied; 16 and 32 bits, which it spoils, too.

    Returns:
        (H, W, 3) uint8 BGR, and notes on what was left out or changed.

    Raises:
        MediaError: missing, damaged, not an image, or larger than Pillow's limit, with the reason.
    """
    notes = []
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, and raises at twice that size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                mode, frames = image.mode, getattr(image, "n_frames", 1)
                transparent = "A" in image.getbands() or "transparency" in image.info
                if mode[0] in "IF":
                    gray, note = _to_8_bits(np.asarray(ImageOps.exif_transpose(image)))
                    bgr = np.repeat(gray[:, :, None], 3, axis=2)
                    notes.append(note)
                else:
                    bgr = read_image(str(path), format="BGR")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise all of these for damaged files.
        raise MediaError(str(error) or type(error).__name__) from error
    if frames > 1:
        notes.append(f"first of {frames} frames")
    if transparent:
        notes.append("transparency ignored")
    return np.ascontiguousarray(bgr), notes


def _to_8_bits(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Integers up to 65535 are 16 bits; other values are stretched from their least to their greatest."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("the image holds NaN or infinite values")
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        if high <= 255:
            return values.astype(np.uint8), "16 bits with values of 8"
        return (values.astype(np.float64) / 257 + 0.5).astype(np.uint8), "16 bits scaled to 8"
    scaled = (values.astype(np.float64) - low) * (255 / (high - low or 1.0))
    return (scaled + 0.5).astype(np.uint8), f"values {low:g}..{high:g} scaled to 8 bits"


def write_picture(path: Path, rgb: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the path's suffix; a failure leaves nothing behind.

    Raises:
        MediaError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    quality = {"quality": 92} if suffix in (".jpg", ".jpeg", ".webp") else {}
    part = _part_of(path)
    _make_folder_of(path)
    try:
        Image.fromarray(rgb).save(part, **quality)
        os.replace(part, path)
    except OSError as error:
        raise MediaError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _make_folder_of(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"cannot write {path}: {error}") from error


def _part_of(path: Path) -> Path:
    # Hidden, beside the result; keeps the suffix, from which the writers take the format.
    return path.with_name(f".{path.stem}.part{path.suffix}")


class FrameSource:
    """Frames of a video file or a camera, as (H, W, 3) uint8 BGR.

    Raises:
        MediaError: it cannot be opened, gives no frame, or is a file that ends well before its stated end.
    """

    def __init__(self, item: Item, max_frames: int | None = None):
        self._item, self._max_frames = item, max_frames
        camera = item.kind == "camera"
        self._capture = cv2.VideoCapture(item.source if camera else str(item.source))
        if not self._capture.isOpened():
            hint = (
                "no such camera, or another program holds it"
                if camera
                else "damaged, or a codec OpenCV lacks"
            )
            raise MediaError(f"OpenCV cannot open {item.name} ({hint})")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        # Some containers state 0, NaN or their time base.
        self.fps = fps if 1 <= fps <= 240 else DEFAULT_FPS
        stated = 0 if camera else int(max(0, self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self._stated = stated
        limits = [n for n in (stated, max_frames) if n]
        self.total: int | None = min(limits) if limits else None

    def __iter__(self) -> Iterator[np.ndarray]:
        count = 0
        while self._max_frames is None or count < self._max_frames:
            good, frame = self._capture.read()
            if not good:
                break
            count += 1
            yield frame
        # The stated number is an estimate in some containers.
        if count == 0:
            raise MediaError(f"{self._item.name} gives no frame")
        expected = min(n for n in (self._stated, self._max_frames or self._stated))
        if count < 0.95 * expected - 2:
            raise MediaError(
                f"{self._item.name} ended after {count} of {self._stated} frames; it may be damaged"
            )

    def close(self) -> None:
        self._capture.release()


class VideoSink:
    """Writes a video into a hidden file beside `path`, which appears when `finish` has found it whole."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.frames = path, fps, 0
        self._part = _part_of(path)
        self._writer = None
        self._size = (0, 0)

    def write(self, rgb: np.ndarray, times: int = 1) -> None:
        """Append a frame (H, W, 3) uint8 RGB; the first one sets the size. Raises MediaError."""
        if self._writer is None:
            self._open(rgb.shape[1], rgb.shape[0])
        if (rgb.shape[1], rgb.shape[0]) != self._size:
            # OpenCV drops frames of another size without a word.
            rgb = cv2.resize(rgb, self._size, interpolation=cv2.INTER_AREA)
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        for _ in range(times):
            self._writer.write(bgr)
            self.frames += 1

    def _open(self, width: int, height: int) -> None:
        codec = VIDEO_CODECS[self.path.suffix.lower()]
        _make_folder_of(self.path)
        self._writer = cv2.VideoWriter(
            str(self._part), cv2.VideoWriter_fourcc(*codec), self.fps, (width, height)
        )
        if not self._writer.isOpened():
            raise MediaError(
                f"OpenCV cannot write {self.path} (codec {codec}, {width}x{height}); try another suffix"
            )
        self._size = (width, height)

    def finish(self) -> None:
        """Close the file and count its frames. Raises MediaError, and removes it, where some are missing."""
        if self._writer is None:
            return
        try:
            self._writer.release()
            readable = count_frames(self._part)
            if readable != self.frames:
                raise MediaError(
                    f"{self.path}: {self.frames} frames were written but {readable} can be read (disk full?)"
                )
            os.replace(self._part, self.path)
        finally:
            self.abort()

    def abort(self) -> None:
        """Close and remove what is not finished."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
            self._part.unlink(missing_ok=True)


def count_frames(path: Path) -> int:
    """Frames of a video file that can be decoded."""
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.grab():
        count += 1
    capture.release()
    return count


class Window:
    """An OpenCV window.

    Raises:
        MediaError: no display, or an OpenCV built without windows.
    """

    def __init__(self, title: str):
        # Asked first: OpenCV's GUI toolkits end the process where there is no display.
        if sys.platform.startswith("linux") and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            raise MediaError(
                "--window needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set; use --output"
            )
        self._title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise MediaError(
                "--window needs an OpenCV with a GUI, and this one has none (opencv-python-headless). "
                "Install opencv-python in its place, or use --output"
            ) from error

    def show(self, rgb: np.ndarray, until_key: bool) -> bool:
        """Show a picture, and wait for a key where asked. False after q, Escape or a closed window."""
        cv2.imshow(self._title, rgb[:, :, ::-1])
        while True:
            # In steps, since a window that the user closes sends no key.
            key = cv2.waitKey(50 if until_key else 1)
            if key & 0xFF in (27, ord("q")) or cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
                return False
            if key != -1 or not until_key:
                return True

    def close(self) -> None:
        cv2.destroyAllWindows()
