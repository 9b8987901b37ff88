"""sample.py as people run it, on the random nets of test_train."""

import shlex
import shutil
import sys
from itertools import islice

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from runs import KEYS, in_process

import sample
import train
from config import cli


@pytest.fixture
def call(nets, monkeypatch, tmp_path):  # noqa: F811
    def run_it(*argv, out="clip.mp4"):
        student = f"--student={nets}/stream_r1.safetensors"
        monkeypatch.setattr(sys, "argv", ["sample.py", student, f"--out={tmp_path / out}", *argv])
        cli(sample.main)
        return tmp_path / out

    return run_it


def frames_of(path):
    plugin = "FFMPEG" if path.suffix == ".mp4" else "pillow"
    return iio.imread(path, index=..., plugin=plugin)[..., :3]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp"])
def test_writes_the_frames_that_were_asked_for(call, name, capsys):
    """Ten frames are two and a half chunks: the last chunk is cut, the video is enlarged to even sizes."""
    path = call("--prompt", "a red circle moving left", "--frames=10", out=name)
    assert frames_of(path).shape == (10, 256, 256, 3)
    assert path.with_suffix(".png").exists() and str(path) in capsys.readouterr().out
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")], "a temporary file was left"


def test_mp4_plays_in_a_browser(call):
    meta = iio.immeta(call("--frames=4"), plugin="FFMPEG")
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 8


def test_seed_repeats_exactly(call):
    one, two, other = (
        frames_of(call(f"--seed={s}", "--frames=8", out=f"{i}.webp")) for i, s in enumerate((1, 1, 2))
    )
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_video_to_video(call, capsys):
    """As long as the clip's whole chunks, or as --frames; at strength 1 the clip is gone, below it is not."""
    clip, prompt = call("--frames=10", "--seed=5", out="a.mp4"), ("--prompt", "a red circle still")
    plain = frames_of(call(*prompt, "--frames=8", out="plain.webp"))
    how = {s: (*prompt, f"--video={clip}", f"--strength={s}") for s in (1, 0.5)}
    over = {s: frames_of(call(*words, out=f"{s}.webp")) for s, words in how.items()}
    assert np.array_equal(over[1], plain) and over[0.5].shape == plain.shape
    assert not np.array_equal(over[0.5], plain)
    assert len(frames_of(call(*prompt, f"--video={clip}", "--frames=4", "--context=aligned"))) == 4
    long = call("--frames=69", out="long.mp4")
    assert len(frames_of(call(*prompt, f"--video={long}", "--strength=.1", out="all.webp"))) == 68


@pytest.mark.parametrize("words, said", [
    (["--strength=0"], "above 0"), (["--strength=1.5"], "above 0"), (["--init=a.png"], "without --init"),
    (["--context=aligned", "--taper=5432"], "uniform"), ([], "allowed: 4 or more"),
])  # fmt: skip
def test_what_video_to_video_refuses(call, capsys, tmp_path, words, said):
    iio.imwrite(tmp_path / "short.gif", np.zeros((3, 32, 32, 3), np.uint8), duration=125)
    with pytest.raises(SystemExit) as stopped:
        call("--prompt", "a red circle still", f"--video={tmp_path}/short.gif", *words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_prompt_switch_keeps_what_was_before_it(call):
    """The same seed: equal until the switch, different after it."""
    first = ["--prompt", "a red circle moving left slowly on a black background"]
    plain = frames_of(call(*first, "--frames=16", out="a.webp"))
    switched = frames_of(
        call(*first, "--prompt", "a blue ring still on white@8", "--frames=16", out="b.webp")
    )
    assert np.array_equal(plain[:8], switched[:8]) and not np.array_equal(plain[8:], switched[8:])


def test_steps_change_the_picture(call):
    assert not np.array_equal(frames_of(call("--frames=4", "--steps=1", out="a.webp")),
                              frames_of(call("--frames=4", "--steps=4", out="b.webp")))  # fmt: skip


@pytest.mark.parametrize("name", ["given.gif", "given.png"])
def test_goes_on_from_a_clip_or_a_picture(call, tmp_path, name):
    given = tmp_path / name
    count = 8 if name.endswith("gif") else 1
    pixels = np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3), np.uint8)
    iio.imwrite(given, pixels if count > 1 else pixels[0], plugin="pillow")
    with_init = frames_of(call(f"--init={given}", "--frames=16", out="a.mp4"))
    assert len(frames_of(call(f"--init={given}", "--frames=1", out="c.webp"))) == 1  # fewer than were given
    without = frames_of(call("--frames=16", out="b.mp4"))
    assert len(with_init) == 16 and not np.array_equal(with_init[-4:], without[-4:])


def test_a_switch_counts_the_given_frames(call, tmp_path):
    """Eight given frames, a new prompt at frame 12: equal up to there, different from there on."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    iio.imwrite(tmp_path / "given.webp", pixels, plugin="pillow", duration=125, lossless=True)
    first = [
        f"--init={tmp_path / 'given.webp'}",
        "--frames=20",
        "--prompt",
        "a red circle moving left slowly",
    ]
    plain = frames_of(call(*first, out="a.webp"))
    switched = frames_of(call(*first, "--prompt", "a blue ring still on white@12", out="b.webp"))
    assert np.array_equal(plain[:12], switched[:12]) and not np.array_equal(plain[12:16], switched[12:16])


BAD = {
    "wan with tiny": (["--wan=folder"], "go together"),
    "word": (["--prompt", "a red cirle"], "circle"),
    "empty": (["--prompt", ""], "empty"),
    "contradiction": (["--prompt", "a red blue circle"], "contradict"),
    "objects": (["--prompt", "a red ring and a blue ring"], "at most 1"),
    "switch": (
        ["--prompt", "a red ring", "--prompt", "a blue ring@3"],
        "where a chunk begins (4, 8, 12, ...)",
    ),
    "switch too late": (["--prompt", "a red ring", "--prompt", "a blue ring@64"], "before frame 64"),
    "switch twice": (["--prompt", "a red ring", *["--prompt", "a blue ring@8"] * 2], "after 8"),
    "ending": (["--out=clip.avi"], ".mp4"),
    "folder": (["--out=/proc/none/clip.mp4"], "cannot be written"),
    "frames": (["--frames=-1"], "frames"),
    "init": (["--init=nothing.mp4"], "nothing.mp4"),
    "student": (["--student=nothing.safetensors"], "nothing.safetensors"),
    "method": (["--method=diagonal"], "with weights of stream_r1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(call, capsys, name):
    argv, needle = BAD[name]
    with pytest.raises(SystemExit) as stopped:
        call(*argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1 and needle in error, error


def test_unwritable_output_fails_before_the_work(call, monkeypatch):
    monkeypatch.setattr(sample, "load_net", lambda *a: pytest.fail("weights were loaded first"))
    with pytest.raises(SystemExit):
        call("--out=/proc/none/clip.mp4")


def test_streams_without_keeping_the_past(nets):  # noqa: F811
    """30 chunks: the cache does not grow (for latents kept beside it see test_a_stream_does_not_grow)."""
    header = sample.read_header(nets / "stream_r1.safetensors")
    cfg = sample.student_config(header, "tiny", {"device": "cpu"}, 0)
    student = sample.load_net(nets / "stream_r1.safetensors", cfg, "student")
    from model import ListCache

    cache = ListCache(student, cfg)
    text = torch.zeros(1, cfg.text_length, cfg.text_width)
    sizes = []
    with torch.inference_mode():
        for _ in islice(sample.stream(student, text, cfg, [torch.Generator()], cache=cache), 30):
            sizes.append(sum(v.numel() for v in cache.keys if v is not None))
    assert sizes[5] == sizes[-1] and len(cache.chunks) == cfg.cached_chunks


def test_the_sheet_shows_all_of_a_clip_with_the_prompt_of_each_stretch():
    """Catches a sheet of the first sixteen frames under the first prompt."""
    plan = [("one", 0, 0), ("two", 48, 12)]
    shown = sample.stretches(plan, 96)
    assert list(shown) == ["one   (frames 0 to 47)", "two   (frames 48 to 95)"]
    one, two = shown.values()
    assert one == list(range(0, 48, 3)) and two == list(range(48, 96, 3))
    assert sample.stretches([("one", 0, 0)], 5)["one   (frames 0 to 4)"] == [0, 1, 2, 3, 4]


def test_a_student_finds_its_codec(nets, tmp_path, monkeypatch, capsys):
    """What train.py leaves is sampled by the command it prints, whatever folder the nets are in."""
    in_process(monkeypatch, train, f"--nets={nets}", f"--out={tmp_path}", *KEYS, "--steps=1")
    said = capsys.readouterr().out
    command = shlex.split(said.partition("next: python sample.py ")[2].splitlines()[0])
    in_process(monkeypatch, sample, *command, "--frames=4", f"--out={tmp_path}/clip.mp4")
    assert (tmp_path / "clip.mp4").exists() and f"student {tmp_path}" in capsys.readouterr().out


def test_a_student_without_a_codec_names_where_it_looked(nets, tmp_path, monkeypatch, capsys):
    shutil.copy(nets / "stream_r1.safetensors", tmp_path / "student.safetensors")
    with pytest.raises(SystemExit) as stopped:
        in_process(
            monkeypatch, sample, f"--student={tmp_path}/student.safetensors", f"--out={tmp_path}/a.mp4"
        )
    assert stopped.value.code == 2
    assert f"{tmp_path}/codec.safetensors" in capsys.readouterr().err


def test_a_short_prompt_says_what_it_leaves_open(call, capsys):
    call("--prompt", "red", "--frames=4")
    assert "leaves open shape and motion" in capsys.readouterr().out
    call("--prompt", "a red ring moving up", "--frames=4")
    assert "leaves open" not in capsys.readouterr().out
