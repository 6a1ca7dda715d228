"""Frames come from the exact time asked for, upright, whatever the file is like; bad files are told apart."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lego_pipeline.curation.video import Video, VideoError, upright
from tests.curation.videos import cut, number_of, numbered, patch, turn, write_video

FRAMES = [numbered(i) for i in range(60)]


def shown(video: Video, start: float, stop: float) -> list[tuple[int, float]]:
    """(number, time) of the frames of a window."""
    return [(number_of(still.image), round(still.time, 4)) for still in video.window(start, stop)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_every_window_gives_its_frames_with_b_frames_and_in_any_order(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"küche 1.{suffix}", FRAMES)
    with Video(path) as video:
        for start in (1.5, 0.0, 0.3, 1.9, 0.9):
            first = round(start * 30)
            stills = video.window(start, start + 2 / 30)
            assert [number_of(still.image) for still in stills] == [i for i in range(first, first + 3) if i < 60]
            assert all(abs(still.time * 30 - i) < 0.02 for i, still in enumerate(stills, start=first))


def test_times_are_timestamps_where_the_frame_rate_varies(tmp_path: Path) -> None:
    base = Fraction(1001, 30000)
    pts = np.cumsum([0] + [(1, 2, 3)[i % 3] for i in range(59)]).tolist()
    path = write_video(tmp_path / "vfr.mp4", FRAMES, pts=pts, time_base=base)
    times = [float(number * base) for number in pts]
    average = len(pts) / (times[-1] + float(base))
    assert max(abs(i / average - time) for i, time in enumerate(times)) > 0.03  # what counting would get wrong
    with Video(path) as video:
        for i in (40, 3, 59, 21):
            assert shown(video, times[i] - 0.01, times[i] + 0.01) == [(i, round(times[i], 4))]


def test_the_clock_starts_at_the_first_frame_and_the_pts_are_those_of_the_stream(tmp_path: Path) -> None:
    pts = [15 + i for i in range(60)]
    path = write_video(tmp_path / "late.mkv", FRAMES, pts=pts)
    with Video(path) as video:
        (still,) = video.window(0.99, 1.01)
        assert number_of(still.image) == 30
        assert float(still.pts * Fraction(video.time_base)) == pytest.approx(1.5, abs=0.002)


def test_an_edit_list_that_cuts_the_start_off_is_followed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "edited.mp4", FRAMES, bf="0")
    content = path.read_bytes()
    # elst version 0: flags, count, segment duration, media time (ISO/IEC 14496-12, 8.6.6)
    (media_time,) = struct.unpack_from(">i", content, content.index(b"elst") + 4 + 12)
    (ticks,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 4 + 12)
    patch(path, b"elst", 12, struct.pack(">i", media_time + 8 * ticks // 30))
    with Video(path) as video:
        assert shown(video, 0.0, 0.01) == [(8, 0.0)]
        assert [number for number, _ in shown(video, 0.99, 1.01)] == [38]


STRIPE = np.zeros((48, 64, 3), np.uint8)
STRIPE[:12, :32] = 255  # white at the left of the top edge


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0), np.rot90(STRIPE, -1)),
        ((-1, 0, 0, -1), np.rot90(STRIPE, 2)),
        ((0, -1, 1, 0), np.rot90(STRIPE)),
        ((-1, 0, 0, 1), STRIPE[:, ::-1]),
        ((1, 0, 0, 1), STRIPE),
    ],
    ids=["quarter turn", "half turn", "three quarters", "mirror", "none"],
)
def test_the_display_matrix_is_applied(
    tmp_path: Path, matrix: tuple[int, int, int, int], expected: np.ndarray
) -> None:
    path = write_video(tmp_path / "turned.mp4", [STRIPE] * 3)
    turn(path, *matrix)
    with Video(path) as video:
        pixels = np.asarray(video.window(0, 0.05)[0].image)
        assert video.is_turned == (matrix != (1, 0, 0, 1))
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 8


def test_a_slanted_matrix_is_taken_to_the_nearest_turn() -> None:
    assert np.array_equal(upright(STRIPE, (100, 65536, -65536, 100)), np.rot90(STRIPE, -1))


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_pixel_formats_become_the_same_colours(tmp_path: Path, pixels: str) -> None:
    frame = np.full((48, 64, 3), (200, 30, 60), np.uint8)
    path = write_video(tmp_path / "colour.mp4", [frame] * 2, pixels=pixels)
    with Video(path) as video:
        mean = np.asarray(video.window(0, 0)[0].image).mean((0, 1))
    assert np.abs(mean - (200, 30, 60)).max() < 6


def test_pixels_are_made_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wide.mkv", [STRIPE] * 2, aspect=Fraction(3, 2))
    with Video(path) as video:
        assert video.window(0, 0)[0].image.size == (96, 48)


def reason_at(path: Path, start: float) -> tuple[str, str]:
    with pytest.raises(VideoError) as caught, Video(path) as video:
        video.window(start, start + 0.01)
    return caught.value.reason, str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert reason_at(tmp_path / "none.mp4", 0)[0] == "missing video"


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100], ids=["empty", "text"])
def test_a_file_that_is_no_video_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.mp4"
    path.write_bytes(content)
    assert reason_at(path, 0)[0] == "unreadable video"


def test_a_file_with_sound_alone_is_told(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert reason_at(path, 0) == ("unreadable video", "sound.mp4 has no video stream that can be decoded")


def test_an_mp4_without_its_index_is_unreadable(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", FRAMES)
    cut(path, 0.6)
    assert reason_at(path, 0)[0] == "unreadable video"


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_truncated_file_gives_what_it_has_and_says_where_it_breaks_off(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    frames = [np.maximum(frame, rng.integers(0, 90, frame.shape, np.uint8)) for frame in FRAMES]
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = write_video(tmp_path / f"cut.{suffix}", frames, container_options=options)
    cut(path, 0.6)
    with Video(path) as video:
        assert [number_of(still.image) for still in video.window(0.3, 0.3)] == [9]
    reason, detail = reason_at(path, 1.9)
    assert reason == "truncated video"
    assert "1.900 s is wanted" in detail


def test_a_time_after_the_end_is_outside(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", FRAMES)
    reason, detail = reason_at(path, 60.0)
    assert (reason, detail) == ("outside the video", "60.000 s is wanted, the video ends at 2.000 s")


def test_a_hole_in_the_timestamps_is_a_gap(tmp_path: Path) -> None:
    pts = [i if i < 30 else i + 60 for i in range(60)]
    path = write_video(tmp_path / "hole.mp4", FRAMES, pts=pts)
    assert reason_at(path, 1.5)[0] == "gap in the video"
    with Video(path) as video:
        assert [number for number, _ in shown(video, 3.0, 3.0)] == [30]


def test_between_two_frames_and_at_the_end_the_frame_that_is_shown_counts(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", FRAMES)
    with Video(path) as video:
        assert [number for number, _ in shown(video, 0.51, 0.51)] == [15]
        assert [number for number, _ in shown(video, 1.99, 2.2)] == [59]


def test_a_codec_that_is_not_known_is_told(tmp_path: Path) -> None:
    path = write_video(tmp_path / "odd.mp4", FRAMES)
    path.write_bytes(path.read_bytes().replace(b"avc1\0\0\0\0", b"zzzz\0\0\0\0"))
    assert reason_at(path, 0) == ("unreadable video", "odd.mp4 has no video stream that can be decoded")


def test_of_two_streams_the_larger_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        for side in (16, 64):
            stream = container.add_stream("libx264", rate=30)
            stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        for stream in container.streams.video:
            for i in range(4):
                frame = av.VideoFrame.from_ndarray(numbered(i, stream.width, stream.height), format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with Video(path) as video:
        assert video.window(0, 0)[0].image.size == (64, 64)
