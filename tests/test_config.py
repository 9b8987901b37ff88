"""Configuration and files: what a person typed is used or refused in one line, and what was written can be
read."""

import dataclasses
import importlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import config as module
from config import COMMON, METHODS, PRESETS, BadInput, Config, build, from_words, options, read_cli
from engine.checkpoint import (
    load_state,
    load_weights,
    read_header,
    save_state,
    save_weights,
    writable_folder,
    write_atomically,
)
from model import VideoDiT
from study.rows import as_flag
from world.words import understand


def refusal(call, *args, **kwargs) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(BadInput) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def from_cli(argv: list[str] | None = None, flags: type | None = None, doc: str = ""):
    """What scripts do with what is typed."""
    preset, typed, own = read_cli(argv, flags, doc)
    return build(preset, typed), own


# -- what is typed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    """Catches a preset that its own checks refuse, or that forgets its name."""
    assert PRESETS[name].preset == name
    assert from_cli([name])[0] == PRESETS[name]


def test_typed_values():
    """Catches values that are ignored or left as words."""
    cfg, flags = from_cli(
        ["small", "--steps=7", "--lr", "1e-3", "--axes=VQ,TA", "--denoise=1,0.5", "--context=none"]
    )
    assert flags is None
    typed = dict(steps=7, lr=1e-3, axes=("VQ", "TA"), denoise=(1.0, 0.5), context="none")
    assert cfg == replace(PRESETS["small"], **typed)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_methods(preset, method):
    """Catches a method whose fields are not applied."""
    cfg = build(preset, {"method": method})
    assert cfg.method == method
    for name, value in METHODS[method].items():
        assert getattr(cfg, name) == value


def test_order_of_precedence():
    """Catches a method that overrules what was typed, wherever it stands on the line."""
    for argv in (["--beta=3", "--method=reward_forcing"], ["--method=reward_forcing", "--beta=3"]):
        cfg, _ = from_cli(argv)
        assert (cfg.beta, cfg.axes, cfg.space) == (3.0, ("MQ",), False)


def test_bare_booleans():
    """Catches the trap of bool('False')."""
    assert from_cli(["--bf16", "--no-space"])[0] == replace(PRESETS["tiny"], bf16=True, space=False)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--stepz=3"], ["--stepz", "did you mean --steps"]),
        (["--step=3"], ["--step", "did you mean --steps"]),
        (["--qqqq=3"], ["--qqqq", "--help-all"]),
        (["--confg=x"], ["did you mean --config"]),
        (["--device=tpu"], ["device=tpu", "auto | cpu | cuda | mps"]),
        (["huge"], ["'huge'", "tiny | small | wan-1.3b"]),
        (["tiny", "small"], ["small"]),
        (["--method=dmd"], ["method=dmd", "self_forcing | reward_forcing"]),
        (["--steps=many"], ["--steps", "int", "'many'"]),
        (["--lr=fast"], ["--lr", "float", "'fast'"]),
        (["--bf16=maybe"], ["--bf16", "'maybe'"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--steps=0"], ["steps=0", "positive"]),
        (["--beta=-1"], ["beta=-1", "positive number or zero"]),
        (["--lr=nan"], ["lr=nan", "positive"]),
        (["--taper=543"], ["taper=543", "uniform | 5432 | 432"]),
        (["--context=dirty"], ["context=dirty", "clean | noisy | none"]),
        (["--height=36"], ["height=36", "multiple of 8"]),
        (["--frames=18"], ["frames=18", "multiple of chunk=4"]),
        (["--window=2"], ["window=2", "more than sink + 1"]),
        (["--sink=0"], ["sink=0", "sink_mode=none"]),
        (["--sink=2", "--window=5"], ["sink=2", "1 when sink_mode=ema"]),
        (["--denoise=1,0.5,0.75"], ["denoise=(1.0, 0.5, 0.75)", "falling"]),
        (["--denoise=0.9,0.5"], ["denoise=(0.9, 0.5)", "1.0"]),
        (["--t_min=0.99"], ["t_min=0.99", "t_max"]),
        (["--axes=VQ,XX"], ["axes=('VQ', 'XX')", "VQ, MQ, TA"]),
        (["--axes="], ["axes=()", "VQ, MQ, TA"]),
        (["--group=3"], ["batch=16", "group"]),
        (["--ema=1"], ["ema=1.0", "[0, 1)"]),
        (["--context_t=1"], ["context_t=1.0", "[0, 1)"]),
        (["--method=diagonal", "--denoise=1,0.5"], ["denoise=(1.0, 0.5)", "taper=5432"]),
        (["wan-1.3b", "--horizon=2"], ["horizon=2", "causal in time"]),
        (["--heads=3"], ["dim=128", "even width"]),
    ],
)
def test_refusals(argv, said):
    """Catches a typo that is ignored, and a refusal that hides the field, the value or what is allowed."""
    line = refusal(from_cli, argv)
    assert all(part in line for part in said), line


def test_a_wrong_list_is_refused_in_words():
    """Catches a refusal that names a lambda where a person needs to read what is allowed."""
    line = refusal(from_cli, ["--denoise=1,half"])
    assert "--denoise" in line and "1,half" in line and "float" in line and "lambda" not in line


def test_room_for_every_word():
    """Catches a text too short for the captions, whose last words would be cut off silently."""
    assert "text_length" in refusal(from_cli, ["--objects=2"])
    assert from_cli(["--objects=2", "--text_length=9"])[0].objects == 2


def test_bad_input_ends_a_script(monkeypatch, capsys):
    """Catches a traceback, a zero exit code and an error on stdout."""
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--stepz=3"])
    with pytest.raises(SystemExit) as caught:
        module.cli(lambda: from_cli())
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out
    assert err.startswith("train.py: unknown argument --stepz=3") and err.count("\n") == 1


@dataclass(frozen=True)
class Flags:
    out: str = ""
    prompt: list[str] = dataclasses.field(default_factory=list)
    steps: int = 25


def test_flags_of_a_script():
    """Catches flags that leak into the config, or that lose to a field of the same name."""
    cfg, flags = from_cli(["--out=here", "--prompt=a", "--prompt=b", "--steps=9", "--seed=4"], Flags)
    assert flags == Flags("here", ["a", "b"], 9)
    assert cfg == replace(PRESETS["tiny"], seed=4)


# -- help and saved settings -----------------------------------------------------------------------

STUDY = [f"study.{name}" for name in ("evaluate", "figures", "goodhart", "reliability")]
SCRIPTS = ["train", "pretrain", "sample", "bench", *STUDY, "wan.memory"]


def help_of(capsys, *argv, flags=None, doc="") -> list[str]:
    with pytest.raises(SystemExit) as caught:
        from_cli([*argv], flags, doc)
    assert not caught.value.code
    return capsys.readouterr().out.splitlines()


def about(lines: list[str], name: str) -> str:
    """What the one line of an option says of it, without [choices; default]."""
    (line,) = (x for x in lines if x.startswith((f"  --{name}=", f"  --[no-]{name} ")))
    return line[28:].partition(" [")[0].strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_help(script, capsys):
    """Catches a field of Config or of a script without a comment, and one that --help-all leaves out."""
    module = importlib.import_module(script)
    lines = help_of(capsys, "--help-all", flags=module.Flags, doc=module.__doc__)
    assert lines[0] == module.__doc__.splitlines()[0]
    for f in {f.name: f for f in (*fields(Config), *fields(module.Flags)) if f.name != "preset"}:
        assert about(lines, f), f"{script}: --{f} has no comment"


@dataclass
class Mixed:
    one: int = 1  # the first
    # others ----------------------------
    two: str = "a"
    three: bool = True  # the third  # and more


def test_a_field_without_a_comment_is_seen():
    """Catches a reader that takes the comment of another field."""
    (g1, one), (_, two), (g3, three) = options(Mixed()).values()
    assert (g1, g3) == ("", "others")
    assert "the first [default 1]" in one and "the third  # and more [default on]" in three
    assert two.split() == ["--two=WORD", "[default", "a]"]


def test_help_is_short_and_of_the_preset_that_is_named(capsys):
    """Catches a --help of eighty lines, and defaults of tiny beside another preset's or method's name."""
    short = help_of(capsys, "wan-1.3b", "--help", "--method=self_forcing", flags=Flags)
    full = help_of(capsys, "small", "-h", "--help-all")
    settings = [x for x in short if x.startswith("  --")]
    assert len(settings) < 20 and any("--help-all" in x for x in short)
    for name in set(COMMON) - {"steps"}:
        assert about(short, name)
    assert "  --[no-]bf16" in "".join(x for x in short if "default on" in x)
    assert any("--beta=" in x and "default 0.0]" in x for x in short), "the method's default is not shown"
    assert any("--steps=" in x and "default 25]" in x for x in short), "the script's own flag does not win"
    assert any("--dim=N" in x and "[default 192]" in x for x in full)
    assert any("--axes=A,B" in x and "[default VQ,MQ,TA]" in x for x in full)
    assert any("--taper=" in x and "[uniform | 5432 | 432; default uniform]" in x for x in full)
    assert full.index("transformer") < next(i for i, x in enumerate(full) if "--dim=" in x)


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_can_be_typed_back(name):
    """Catches a value that is typed in another way than it is read."""
    cfg = build(name, {"method": "reward_forcing", "bf16": False, "denoise": (1.0, 0.3)})
    argv = [as_flag(k, v) for k, v in asdict(cfg).items() if k != "preset"]
    assert from_cli([name, *argv])[0] == cfg


@pytest.fixture
def saved(tmp_path):
    """A run's config.json, as train.py writes it."""
    cfg = build("small", {"method": "diagonal", "lr": 3e-4, "motion": 1.0, "device": "cpu", "threads": 3})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(cfg) | {"torch": "2.13", "world": 1, "origin": {"nets": "x"}}))
    return cfg, path


def test_saved_settings(saved):
    """Catches settings of a run that are lost, that win over what is typed, or that pin its machine."""
    cfg, path = saved
    assert from_cli([f"--config={path}"])[0] == replace(cfg, device="auto", threads=0)
    assert from_cli(["small", f"--config={path}", "--device=cpu", "--threads=3"])[0] == cfg
    typed = from_cli(["--steps=7", f"--config={path}", "--lr=1e-3"])[0]
    assert typed == replace(cfg, device="auto", threads=0, steps=7, lr=1e-3)
    other = from_cli([f"--config={path}", "--method=self_forcing"])[0]
    assert other == build("small", {"method": "self_forcing", "lr": 3e-4, "motion": 1.0})


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[1]", "list"),
        ("{}", "preset"),
        ('{"preset": "huge"}', "unknown preset 'huge'"),
        ('{"preset": "tiny", "steps": "many"}', "str"),
        ('{"preset": "tiny", "chunk": 5}', "chunk"),
        ('{"preset": "tiny", "method": "lost"}', "method=lost"),
    ],
)
def test_bad_saved_settings(tmp_path, text, said):
    """Catches a traceback, and a file of something else that becomes a run with default settings."""
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    line = refusal(from_cli, [f"--config={path}"])
    assert str(path) in line and said in line, line


def test_saved_settings_of_another_preset(saved):
    """Catches a preset on the line that is ignored."""
    line = refusal(from_cli, ["tiny", f"--config={saved[1]}"])
    assert "'small'" in line and "'tiny'" in line


def test_config_is_frozen():
    """Catches a config that changes under a run, and one that is checked only when it is typed."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 1
    assert "chunk=5" in refusal(replace, Config(), frames=15, chunk=5, patch_time=2)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    """Catches a field that JSON cannot hold, lists that stay lists, and old files that are refused."""
    cfg = PRESETS[name]
    written = asdict(cfg)
    assert from_words(json.dumps(written)) == cfg
    del written["steps"]
    assert from_words(json.dumps(written | {"long_gone": 1})) == replace(cfg, steps=Config().steps)


# -- files -----------------------------------------------------------------------------------------


def test_weights_round_trip(tmp_path, tiny, model, build):
    """Catches a tensor that is not saved, half precision that stays, and facts that are lost."""
    path = tmp_path / "student.safetensors"
    save_weights(path, model, tiny, "student", step=12, score=0.75)
    header = read_header(path)
    assert (header["kind"], header["step"], header["score"]) == ("student", "12", "0.75")
    fresh = VideoDiT(tiny).train()
    loaded = load_weights(path, fresh, tiny, "student")
    assert loaded is fresh and not loaded.training
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-6)
    assert list(tmp_path.iterdir()) == [path]


def test_foreign_weights(tmp_path, tiny, model):
    """Catches weights that are loaded although they belong to something else."""
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_weights(good, model, tiny, "teacher")

    def load(path, cfg=tiny, net=model, kind="teacher"):
        return refusal(load_weights, path, net, cfg, kind)

    assert "no weights" in load(tmp_path / "missing.safetensors")
    assert "no weights" in load(tmp_path)
    for junk in (b"", b"junk", good.read_bytes()[:-100], b"\xff" * 1000):
        path.write_bytes(junk)
        assert "not a readable safetensors file" in load(path)
    for header in (None, {"kind": "teacher"}, {"format": "pt"}):
        save_file({"x": torch.zeros(2)}, path, header)
        assert "not written by this project" in load(path)
    assert "a student is needed" in load(good, kind="student")
    assert "chunk=2" in load(good, replace(tiny, chunk=4)) and "chunk=4" in load(good, replace(tiny, chunk=4))
    for other in (replace(tiny, dim=64), replace(tiny, layers=3), replace(tiny, ffn=100)):
        assert "does not fit" in load(good, other, VideoDiT(other))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Catches a file that is opened for writing before the new content exists, and leftovers."""
    path = tmp_path / "state.pt"
    write_atomically(path, lambda name: name.write_text("old"))

    def half(name: Path):
        name.write_text("ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o044 == 0o044, "others cannot read it"


def test_a_write_is_flushed_then_renamed(tmp_path, monkeypatch):
    """Catches a rename that reaches the disk before the content, and a temporary file elsewhere."""
    done = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("flush"), fsync(number)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (done.append((Path(a).parent, Path(b).name)), rename(a, b))
    )
    write_atomically(tmp_path / "x.pt", lambda name: name.write_text("new"))
    assert done[:2] == ["flush", (tmp_path, "x.pt")]


def state(cfg: Config, **extra) -> dict:
    return {"config": asdict(cfg), "balancer": [[1.0, 2.0]], "weights": torch.arange(1000.0)} | extra


def test_states(tmp_path, tiny):
    """Catches states that fill the disk, and a resume from an older state than the newest."""
    assert load_state(tmp_path, tiny) is None
    for step in (5, 10, 90, 100):
        save_state(tmp_path, step, state(tiny, best=step / 100))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000090.pt", "step_000100.pt"]
    loaded = load_state(tmp_path, tiny)
    assert (loaded["step"], loaded["best"], loaded["balancer"]) == (100, 1.0, [[1.0, 2.0]])
    assert torch.equal(loaded["weights"], torch.arange(1000.0))


def test_a_state_that_was_just_written_stays(tmp_path, tiny):
    """Catches a new run in an old run's folder, whose states have lower numbers and vanish at once."""
    for step in (150, 200, 50):
        path = save_state(tmp_path, step, state(tiny))
    assert path.exists()


def test_broken_states(tmp_path, tiny):
    """Catches a resume that dies with a traceback, or that starts anew over a state it cannot read."""
    save_state(tmp_path, 5, state(tiny))
    path = save_state(tmp_path, 10, state(tiny))
    whole = path.read_bytes()
    for junk in (whole[: len(whole) // 2], whole[:10], b""):
        path.write_bytes(junk)
        line = refusal(load_state, tmp_path, tiny)
        assert "step_000010.pt cannot be read" in line and "delete it" in line
    path.unlink()
    assert load_state(tmp_path, tiny)["step"] == 5


@pytest.mark.parametrize("content", [[1, 2], {"weights": 1}])
def test_foreign_states(tmp_path, tiny, content):
    """Catches a file that torch can read and that is no state of ours."""
    torch.save(content, tmp_path / "step_000010.pt")
    assert "step_000010.pt" in refusal(load_state, tmp_path, tiny)


def test_states_hold_no_code(tmp_path, tiny):
    """Catches a checkpoint that runs a stranger's code when it is loaded."""
    save_state(tmp_path, 1, state(tiny, evil=Path("/")))
    assert "cannot be read" in refusal(load_state, tmp_path, tiny)


def test_resume_needs_the_same_config(tmp_path, tiny):
    """Catches a run that goes on under other settings, and one that may not be prolonged."""
    save_state(tmp_path, 1, state(tiny))
    line = refusal(load_state, tmp_path, replace(tiny, beta=0.75), free=("steps",))
    assert f"beta={tiny.beta}" in line and "beta=0.75" in line
    assert load_state(tmp_path, replace(tiny, steps=999), free=("steps",))["step"] == 1
    assert "steps=999" in refusal(load_state, tmp_path, replace(tiny, steps=999))


def test_folders(tmp_path):
    """Catches a run that finds out after an hour that it cannot save."""
    assert writable_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    assert "file" in refusal(writable_folder, str(tmp_path / "file"))
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_prompt_that_a_preset_knows_leaves_nothing_open(preset):
    cfg = build(preset, {})
    words = understand(cfg.example, cfg, [])
    assert len(words) == 4 * cfg.objects + 1 and all(words)
    assert replace(cfg, data="clips").example == "..."
