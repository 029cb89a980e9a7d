from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export.device.pictures
from mnif.data.batches import evenly_spaced
from mnif.utils import errors
from mnif.utils.errors import UserError
from mnif.utils.pixels import as_axes, save_animation, to_uint8


def test_a_board_rounds_values_to_the_same_pixels() -> None:
    values = torch.cat([torch.linspace(-1.5, 1.5, 4001), torch.arange(-255, 256, 2) / 255]).reshape(-1, 3)
    np.testing.assert_array_equal(export.device.pictures.to_uint8(values.numpy()), to_uint8(values))


def test_one_number_stands_for_all_axes() -> None:
    assert as_axes(4, 3) == as_axes([4], 3) == (4, 4, 4)
    assert as_axes([4, 6], 2) == (4, 6)


def test_evenly_spaced_rows_begin_with_the_first_and_end_with_the_last() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(3, 4).tolist() == [0, 1, 2]
    assert not len(evenly_spaced(0, 4))


@pytest.fixture
def frames() -> np.ndarray:
    """A grey ramp with a red square that moves along it, [12, 31, 45, 3]."""
    ramp = np.linspace(0, 255, 45).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None], (12, 31, 45, 3)).copy()
    for index, frame in enumerate(frames):
        frame[10:20, 2 * index : 2 * index + 10] = [200, 30, 20]
    return frames


def read_gif(path: Path) -> tuple[np.ndarray, list[int], dict]:
    """Frames, their durations in milliseconds, and what the file says of itself."""
    with Image.open(path) as image:
        pictures, durations = [], []
        for index in range(image.n_frames):
            image.seek(index)
            pictures.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
        return np.stack(pictures), durations, image.info


def test_gif_keeps_few_colours_exactly(frames: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "folder/turn.gif"
    save_animation(path, frames, frames_per_second=10)
    read, durations, info = read_gif(path)
    np.testing.assert_array_equal(read, frames)
    assert durations == [100] * 12
    assert info["loop"] == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["turn.gif"]


def test_gif_keeps_its_speed_on_average(frames: np.ndarray, tmp_path: Path) -> None:
    save_animation(tmp_path / "a.gif", frames, frames_per_second=15)
    _, durations, _ = read_gif(tmp_path / "a.gif")
    assert sum(durations) == 800
    assert set(durations) == {60, 70}


def test_gif_of_many_colours_is_near(tmp_path: Path) -> None:
    """A smooth ramp over 64 × 64 × 8 colours; 256 of them leave an error of some steps."""
    rows, columns = np.mgrid[0:64, 0:64] * 4
    frames = np.stack([np.stack([rows, columns, np.full((64, 64), 20 * i)], axis=-1) for i in range(8)])
    save_animation(tmp_path / "a.gif", frames.astype(np.uint8))
    read, _, _ = read_gif(tmp_path / "a.gif")
    assert np.sqrt(np.square(read.astype(float) - frames).sum(axis=-1).mean()) < 20
    save_animation(tmp_path / "b.gif", frames.astype(np.uint8))
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_gif_of_one_frame(frames: np.ndarray, tmp_path: Path) -> None:
    save_animation(tmp_path / "a.gif", frames[:1])
    with Image.open(tmp_path / "a.gif") as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), frames[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its reader leaves pipes open
def test_mp4_is_read_back(frames: np.ndarray, tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "folder/turn.mp4"
    save_animation(path, frames, frames_per_second=12)
    assert [entry.name for entry in path.parent.iterdir()] == ["turn.mp4"]
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    assert about["size"] == (46, 32)  # 45 × 31 made even
    assert about["fps"] == 12
    assert about["codec"].startswith("h264")
    assert about["pix_fmt"].startswith("yuv420p")
    read = np.stack([np.frombuffer(frame, np.uint8).reshape(32, 46, 3) for frame in reader])
    assert read.shape == (12, 32, 46, 3)
    assert np.abs(read[:, :31, :45].astype(int) - frames).mean() < 6
    assert np.abs(read[:, 31].astype(int) - read[:, 30]).mean() < 6


def test_mp4_that_fails_leaves_the_old_file(
    frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "false")  # ends with status 1 and no words
    path = tmp_path / "a.mp4"
    path.write_text("old")
    with pytest.raises(OSError, match="ffmpeg: exit status 1"):
        save_animation(path, frames)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_mp4_without_its_package_names_it(frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r'"imageio-ffmpeg" is missing; run: pip install "mnif-diffusion\[video\]"'):
        save_animation(tmp_path / "a.mp4", frames)


def test_what_is_no_animation_is_refused(frames: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.webm: an animation is written as \.gif or \.mp4"):
        save_animation(tmp_path / "a.webm", frames)
    for wrong in (frames.astype(np.float32), frames[0], frames[:0], frames[..., :1]):
        with pytest.raises(UserError, match=r"\[N, H, W, 3\] uint8 is needed"):
            save_animation(tmp_path / "a.gif", wrong)
    for speed in (0, -1, 51, float("nan")):
        with pytest.raises(UserError, match="frames per second"):
            save_animation(tmp_path / "a.gif", frames, speed)
    assert not list(tmp_path.iterdir())
