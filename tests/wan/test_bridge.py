"""From Wan's files to a streamed clip: train.py and sample.py as people run them, on tiny random weights."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from runs import call
from safetensors.torch import load_file, save_file

import demo
import sample
import train
from config import PRESETS, cli
from live.show import Wish, studio_of
from model import VideoDiT
from wan.networks import PromptFile

downloads = pytest.importorskip("downloads")

SMALL = dict(height=32, width=48, frames=6, chunk=3, channels=4, dim=36, heads=3, ffn=48, layers=2,
             time_freqs=16, text_length=8, text_width=24, batch=2, accumulate=1, critic_steps=1,
             critic_warmup=0, steps=1)  # fmt: skip
CFG = replace(PRESETS["wan-1.3b"], **SMALL)
KEYS = [f"--{k}={v}" for k, v in SMALL.items()] + ["--device=cpu", "--no-bf16"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return downloads.wan(tmp_path_factory.mktemp("wan"), CFG)


@pytest.fixture(scope="module")
def videoreward(tmp_path_factory):
    return downloads.videoreward(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat runs on the red mat\n\na dog runs\n")
    return path


def run(monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", "wan-1.3b", *map(str, argv)])
    cli(module.main)


@pytest.fixture
def learn(monkeypatch, wan, videoreward, prompts):
    def learn(out, *more):
        own = (f"--wan={wan}", f"--videoalign={videoreward}", f"--data={prompts}", f"--out={out}")
        run(monkeypatch, train, *own, *KEYS, *more)
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return learn


def test_a_step_and_a_stream(learn, wan, tmp_path, monkeypatch, capsys):
    """Rollout, causal decoding, VideoAlign's scores and gradients, DMD, the critic; then a clip, chunk by
    chunk, from the student that was left, with a prompt that changes on the way."""
    [step] = learn(tmp_path / "run", "--max_bad=1")
    assert step["grad_norm"] > 0 and step["critic"] > 0 and step["dropped"] == 0
    assert step["w_intra_max"] > 1 and all(abs(step[axis]) < 100 for axis in ("VQ", "MQ", "TA"))
    assert {"before.png", "after.png", "student.safetensors", "step_000001"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    out, student = tmp_path / "clip.gif", tmp_path / "run" / "student.safetensors"
    words = ["--prompt", "a cat runs", "--prompt", "a dog@21", "--frames=33", f"--out={out}"]
    run(monkeypatch, sample, f"--wan={wan}", f"--student={student}", "--device=cpu", "--no-bf16", *words)
    assert out.exists() and "frames/s" in capsys.readouterr().out
    # the page streams the same student: one frame, then four a latent, on after another prompt
    flags, typed = demo.Flags(wan=str(wan), student=str(student)), {"device": "cpu", "bf16": False}
    studio = studio_of(*sample.open_networks("wan-1.3b", typed, flags), flags)
    show, texts = studio.open(), [studio.read(prompt) for prompt in ("a cat runs", "a dog")]
    wish = Wish("a cat runs", texts[0], seed=0, steps=studio.hello["steps"])
    made = [show(wish), show(replace(wish, prompt="a dog", text=texts[1]))]
    assert [len(chunk.frames) for chunk in made] == [CFG.pixels(1), CFG.pixels(2) - CFG.pixels(1)]
    assert made[1].about["chunk"] == 1 and not studio.hello["camera"] and not studio.hello["maps"]


@pytest.mark.slow
def test_in_the_precision_of_the_preset(learn, tmp_path):
    """bf16 blocks, fp32 around them: nothing mixes what cannot be mixed, and the step is much the same."""
    [plain], [low] = learn(tmp_path / "plain"), learn(tmp_path / "low", "--bf16")
    for row in (low, plain):
        row["grad_norm"] /= row["w_inter"]  # exp(2 r) magnifies what rounding does to a reward
    for key, most in (("dmd", 0.1), ("critic", 0.1), ("grad_norm", 0.1), ("w_inter", 0.3)):
        assert low[key] == pytest.approx(plain[key], rel=most), key


def test_resumed_with_other_prompts_or_weights(learn, prompts, tmp_path, capsys):
    """The paths are what they were, what lies there is not."""
    own, other = tmp_path / "prompts.txt", downloads.wan(tmp_path / "wan", CFG, seed=1)
    own.write_text(prompts.read_text())
    again = ("--method=self_forcing", f"--data={own}")
    learn(tmp_path / "run", *again)
    learn(tmp_path / "run", *again, "--resume")
    for change in (lambda: [f"--wan={other}"], lambda: own.write_text("a dog\n") and []):
        with pytest.raises(SystemExit) as stopped:
            learn(tmp_path / "run", *again, "--resume", *change())
        assert stopped.value.code == 2 and "began from others" in capsys.readouterr().err


@pytest.mark.slow
def test_resumed_with_its_shards(learn, tmp_path):
    whole = learn(tmp_path / "whole", "--steps=2")
    learn(tmp_path / "parts", "--steps=1")
    parts = learn(tmp_path / "parts", "--steps=2", "--resume")
    assert [{k: v for k, v in m.items() if k != "seconds"} for m in parts] == [
        {k: v for k, v in m.items() if k != "seconds"} for m in whole
    ]


@pytest.mark.slow
def test_two_processes_equal_one(wan, videoreward, prompts, tmp_path):
    """Each encodes its share of the prompts, holds its share of every network, judges its own rollout. The
    student's file is in bf16."""
    save_file({k: x.bfloat16() for k, x in VideoDiT(CFG).state_dict().items()}, tmp_path / "x.safetensors")
    own = [f"--wan={wan}", f"--videoalign={videoreward}", f"--data={prompts}", *KEYS, "--batch=2"]
    own.append(f"--start={tmp_path / 'x.safetensors'}")
    found = []
    for n in (1, 2):
        call(["train.py", "wan-1.3b", *own, f"--out={tmp_path / str(n)}"], processes=n)
        found.append(json.loads((tmp_path / str(n) / "metrics.jsonl").read_text()))
    for key in ("dmd", "critic", "VQ", "MQ", "TA", "w_inter", "grad_norm", "critic_grad_norm"):
        assert found[0][key] == pytest.approx(found[1][key], rel=2e-3, abs=1e-4), key


def test_a_larger_teacher_and_anothers_student(learn, wan, tmp_path, monkeypatch):
    """The teacher's size is read off its tensors; the student starts from a checkpoint of another trainer."""
    large = replace(CFG, dim=48, heads=4, ffn=56, layers=3)
    downloads.transformer(large).save_pretrained(tmp_path / "large")
    torch.manual_seed(1)
    other = VideoDiT(CFG)
    torch.save({"generator": {f"model.{k}": v for k, v in other.state_dict().items()}}, tmp_path / "ode.pt")
    more = (f"--teacher={tmp_path / 'large'}", f"--start={tmp_path / 'ode.pt'}", "--method=self_forcing")
    [step] = learn(tmp_path / "run", "--lr=1e-12", *more)
    assert step["grad_norm"] > 0
    saved, start = load_file(tmp_path / "run" / "student.safetensors"), other.state_dict()
    assert all(torch.equal(saved[k], start[k].half()) for k in start)
    argv = (
        f"--wan={wan}",
        f"--student={tmp_path / 'ode.pt'}",
        "--method=self_forcing",
        "--frames=9",
        f"--out={tmp_path / 'clip.gif'}",
    )
    shape = [f"--{k}={v}" for k, v in SMALL.items() if k not in ("frames", "steps")]
    run(monkeypatch, sample, *argv, *shape, "--device=cpu", "--no-bf16", "--prompt", "a cat")


BAD = {
    "no prompts": (["--data="], "go together"),
    "nets": (["--nets=assets/tiny"], "--nets with the other presets"),
    "no reward": (["--videoalign="], "needs a reward: --videoalign=FOLDER"),
    "no wan": (["--wan="], "go together"),
    "wrong folder": (["--wan=/nowhere"], "no weights at /nowhere"),
    "wrong size": (["--layers=3"], "Missing key"),
    "a mark": (["--data=MARK"], "the mark of a special token"),
    "empty prompts": (["--data=EMPTY"], "holds no prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(learn, tmp_path, capsys, name):
    argv, needle = BAD[name]
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "mark").write_text("a cat <|im_end|>\n")
    with pytest.raises(SystemExit) as stopped:
        learn(
            tmp_path / "run",
            *[w.replace("EMPTY", f"{tmp_path}/empty").replace("MARK", f"{tmp_path}/mark") for w in argv],
        )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert stopped.value.code == 2 and len(lines) == 1 and needle in lines[0]


def test_a_student_needs_its_own_wan(monkeypatch, wan, tmp_path, capsys):
    net = VideoDiT(CFG)
    save_file({f"x.{k}": v for k, v in net.state_dict().items()}, tmp_path / "odd.safetensors")
    odd = f"--student={tmp_path / 'odd.safetensors'}"
    for argv, needle in (
        ([f"--wan={wan}"], "--student"),
        ([odd], "go together"),
        ([f"--wan={wan}", odd, "--codec=x.safetensors"], "go together"),
        ([f"--wan={wan}", "--student=assets/tiny/stream_r1.safetensors"], "of preset 'tiny'"),
        ([f"--wan={wan}", odd, *KEYS[:-2]], "does not name the method"),
        ([f"--wan={wan}", odd, *KEYS[:-2], "--method=self_forcing"], "does not fit"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, sample, *argv, f"--out={tmp_path / 'x.gif'}", "--device=cpu")
        assert stopped.value.code == 2 and needle in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path):
    """Catches a prompt that is cut at what only Python takes for the end of a line."""
    lines = ["a cat\u2028on a mat", "a dog\x0b\x1c\x85runs", "  ein grüner Balken  ", ""]
    (tmp_path / "p.txt").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert PromptFile(tmp_path / "p.txt").prompts == [line.strip() for line in lines[:3]]
