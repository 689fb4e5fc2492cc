"""Finding, reading and writing pictures and videos."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mask2former.utils.media import (
    FrameSource,
    Item,
    MediaError,
    VideoSink,
    Window,
    assign_outputs,
    count_frames,
    find_inputs,
    read_picture,
    write_picture,
)

GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names(found) -> list[str]:
    return [item.source.name for item in found.items]


def test_folder_gives_images_and_videos_in_order_and_counts_the_rest(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", "clip.mp4", "notes.txt", "._a.jpg", "deeper/c.jpg")
    found = find_inputs([str(tmp_path)])
    assert names(found) == ["a.jpg", "b.PNG", "clip.mp4"]
    assert [item.kind for item in found.items] == ["image", "image", "video"]
    assert found.skipped == 2


def test_pattern_crosses_folders_and_a_file_named_twice_comes_once(tmp_path):
    touch(tmp_path, "a.jpg", "deeper/b.jpg", "deeper/b.txt")
    found = find_inputs([str(tmp_path / "deeper" / "b.jpg"), str(tmp_path / "**" / "*.*")])
    assert names(found) == ["b.jpg", "a.jpg"]
    assert found.skipped == 1


def test_file_named_outright_is_tried_whatever_its_suffix(tmp_path):
    touch(tmp_path, "photo")
    assert names(find_inputs([str(tmp_path / "photo")])) == ["photo"]


def test_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    touch(tmp_path, "a[1].jpg")
    assert names(find_inputs([str(tmp_path / "a[1].jpg")])) == ["a[1].jpg"]


def test_words_without_a_result_are_named(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(MediaError, match=r"pattern '.*\*\.jpg' \(nothing at all\)"):
        find_inputs([str(tmp_path / "*.jpg")])
    with pytest.raises(MediaError, match=r"holds no image or video \(1 other file\)"):
        find_inputs([str(tmp_path)])
    with pytest.raises(MediaError, match=r"no such file or folder: .*gone\.jpg"):
        find_inputs([str(tmp_path / "gone.jpg")])


def test_outputs_of_equal_names_stay_apart(tmp_path):
    items = [Item("image", Path(p)) for p in ("x/a.jpg", "y/a.jpg", "a.gif", "a.tif")]
    items += [Item("video", Path("a.avi")), Item("scene", 7), Item("camera", 0)]
    assign_outputs(items, str(tmp_path / "new"))
    assert [item.output.name for item in items] == [
        "a.jpg",
        "a_2.jpg",
        "a.png",
        "a.tif",
        "a.mp4",
        "scene_007.png",
        "camera_000.mp4",
    ]
    assert {item.output.parent for item in items} == {tmp_path / "new"}


@pytest.mark.parametrize(
    ("items", "output", "message"),
    [
        ([Item("scene", 0), Item("scene", 1)], "one.png", "one file, but there are 2 inputs"),
        ([Item("scene", 0)], "x.gif", r"an image is written as \.bmp"),
        ([Item("scene", 0)], "x.mp4", r"an image is written as \.bmp"),
        ([Item("camera", 0)], "x.jpg", r"a video is written as \.avi"),
        ([Item("scene", 0)], "taken", "is a file, not a folder"),
    ],
)
def test_impossible_outputs_are_refused(tmp_path, items, output, message):
    touch(tmp_path, "taken")
    with pytest.raises(MediaError, match=message):
        assign_outputs(items, str(tmp_path / output))


@pytest.mark.parametrize("output", ["", "a.jpg", "link/"])
def test_output_that_is_an_input_is_refused(tmp_path, output):
    touch(tmp_path, "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(MediaError, match=r"would overwrite the input .*a\.jpg"):
        assign_outputs([Item("image", tmp_path / "a.jpg")], str(tmp_path) + "/" + output)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_all_modes_come_as_three_channels(tmp_path, mode):
    path = save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), GRADIENT, mode)
    bgr, notes = read_picture(path)
    assert bgr.shape == (16, 16, 3) and bgr.dtype == np.uint8 and bgr.flags.c_contiguous
    assert notes == (["transparency ignored"] if "A" in mode else [])
    if mode in ("L", "RGB", "RGBA"):
        assert (bgr == GRADIENT[:, :, None]).all()


def test_channels_are_blue_green_red(tmp_path):
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    bgr, _ = read_picture(save(tmp_path / "red.png", red))
    assert bgr[0, 0].tolist() == [0, 0, 255]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    bgr, notes = read_picture(save(tmp_path / "x.png", GRADIENT.astype(np.uint16) * 257))
    assert (bgr == GRADIENT[:, :, None]).all()
    assert notes == ["16 bits scaled to 8"]


def test_floating_values_are_stretched(tmp_path):
    bgr, notes = read_picture(save(tmp_path / "x.tif", GRADIENT.astype(np.float32) / 10 - 3))
    assert (bgr == GRADIENT[:, :, None]).all()
    assert notes == ["values -3..22.5 scaled to 8 bits"]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((10, 20, 3), np.uint8)
    upright[:, :10] = 255
    bgr, _ = read_picture(save(tmp_path / "x.png", upright, exif=exif))
    assert bgr.shape == (20, 10, 3)
    assert bgr[:10].min() == 255 and bgr[10:].max() == 0


def test_animation_gives_its_first_frame_and_says_so(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    bgr, notes = read_picture(tmp_path / "x.gif")
    assert bgr.max() == 10
    assert notes == ["first of 2 frames"]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_damaged_pictures_give_a_reason(tmp_path, suffix):
    path = save(tmp_path / f"x{suffix}", np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"\w"):
        read_picture(path)
    path.write_bytes(b"no picture at all")
    with pytest.raises(MediaError, match="cannot identify image file"):
        read_picture(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff"])
def test_written_picture_is_read_back(tmp_path, suffix):
    rgb = np.dstack([np.kron(GRADIENT, np.ones((4, 4), np.uint8))] * 3)
    rgb[..., 2] = 0
    path = tmp_path / "new" / f"x{suffix}"
    write_picture(path, rgb)
    bgr, _ = read_picture(path)
    assert np.abs(bgr[:, :, ::-1].astype(int) - rgb).mean() < 4
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_write_leaves_nothing(tmp_path):
    touch(tmp_path, "file")
    with pytest.raises(MediaError, match=r"cannot write .*file/x\.png"):
        write_picture(tmp_path / "file" / "x.png", np.zeros((4, 4, 3), np.uint8))


def write_video(path: Path, frames: int, size: tuple[int, int] = (48, 64), fps: float = 10) -> Path:
    sink = VideoSink(path, fps)
    for i in range(frames):
        sink.write(np.full((*size, 3), 20 * i % 250, np.uint8))
    sink.finish()
    return path


@pytest.mark.parametrize(("suffix", "size"), [(".mp4", (48, 64)), (".mp4", (49, 65)), (".avi", (48, 64))])
def test_video_is_read_back_with_its_frames_and_rate(tmp_path, suffix, size):
    path = write_video(tmp_path / f"x{suffix}", 7, size, fps=12.5)
    assert count_frames(path) == 7
    source = FrameSource(Item("video", path))
    assert source.fps == pytest.approx(12.5)
    assert source.total == 7
    brightness = [float(frame.mean()) for frame in source]
    source.close()
    assert brightness == pytest.approx([20 * i for i in range(7)], abs=4)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_frame_of_another_size_is_resized_not_dropped(tmp_path):
    sink = VideoSink(tmp_path / "x.mp4", 10)
    sink.write(np.zeros((48, 64, 3), np.uint8))
    sink.write(np.zeros((50, 30, 3), np.uint8), times=2)
    sink.finish()
    assert count_frames(tmp_path / "x.mp4") == 3


def test_unfinished_video_is_removed(tmp_path):
    sink = VideoSink(tmp_path / "x.mp4", 10)
    sink.write(np.zeros((48, 64, 3), np.uint8))
    assert len(list(tmp_path.iterdir())) == 1
    sink.abort()
    assert list(tmp_path.iterdir()) == []


def test_video_with_missing_frames_is_reported_and_removed(tmp_path):
    sink = VideoSink(tmp_path / "x.mp4", 10)
    sink.write(np.zeros((48, 64, 3), np.uint8))
    sink.frames += 1
    with pytest.raises(MediaError, match="2 frames were written but 1 can be read"):
        sink.finish()
    assert list(tmp_path.iterdir()) == []


def test_limit_ends_a_video_early_without_an_error(tmp_path):
    source = FrameSource(Item("video", write_video(tmp_path / "x.mp4", 30)), max_frames=4)
    assert source.total == 4
    assert len(list(source)) == 4


def test_video_cut_short_is_reported(tmp_path):
    path = write_video(tmp_path / "x.avi", 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"ended after \d+ of 40 frames|cannot open"):
        list(FrameSource(Item("video", path)))


def test_sources_that_cannot_be_opened_are_named(tmp_path):
    touch(tmp_path, "x.mp4")
    with pytest.raises(MediaError, match=r"cannot open .*x\.mp4 \(damaged"):
        FrameSource(Item("video", tmp_path / "x.mp4"))
    with pytest.raises(MediaError, match=r"cannot open camera 98 \(no such camera"):
        FrameSource(Item("camera", 98))


def test_window_without_a_display_says_what_to_do(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(MediaError, match="needs a display"):
        Window("x")


def test_window_with_a_headless_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")

    def named_window(*args):
        raise cv2.error("The function is not implemented")

    monkeypatch.setattr(cv2, "namedWindow", named_window)
    with pytest.raises(MediaError, match="Install opencv-python in its place"):
        Window("x")
