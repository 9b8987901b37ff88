"""Prose and structure drift, so they are tested: what README and docs name exists, arrows run one way, files
stay small."""

import ast
import importlib
import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from symptoms import SICK

from config import METHODS, PRESETS, ROOT, BadInput, Config, build, read_cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "family/README.md"]
README = PAGES[0].read_text(encoding="utf-8")
WINGS = {
    "engine": 700,
    "world": 600,
    "wan": 950,
    "study": 1300,
    "family": 1400,
    "live": 600,
    "web": 200,
    "examples": 250,
}  # lines
CORE = sorted(ROOT.glob("*.py"))
PRODUCT = CORE + [path for wing in WINGS for path in sorted((ROOT / wing).glob("*.py"))]
CORE_NAMES = {path.stem for path in CORE}
SCRIPTS = {"train", "pretrain", "sample", "bench", "demo", "hubconf"}
OWN = {f.name for f in fields(Config)}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module(path): path for path in PRODUCT}


def imports(path: Path, at_import_time: bool = False) -> set[str]:
    """This project's modules that a file imports, anywhere in it or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.iter_child_nodes(tree) if at_import_time else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found & MODULES.keys()


# -- structure ----------------------------------------
_NETS = {"config", "model", "codec", "reward", "world", "engine"}
ALLOWED = {
    "config": set(), "model": {"config"}, "rollout": {"config", "model", "engine.rng"},
    "dmd": {"config", "model"}, "reward": {"config", "model"}, "saliency": {"config", "model"},
    "codec": _NETS, "data": _NETS, "networks": _NETS, "engine": {"config", "engine"},
    "world": {"config", "engine", "world"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_arrows_run_one_way(name):
    """The core imports as the table says, scripts import no script but sample.py, for its stream, nothing but
    study imports study, nothing imports family, whose files know the core, its step and not each other."""
    wing = name.partition(".")[0]
    for other in imports(MODULES[name]):
        home = other.partition(".")[0]
        allowed = ALLOWED.get(name, ALLOWED.get(wing))
        if allowed is not None:
            assert {other, home} & allowed, f"{name} imports {other}"
        if wing != "study":
            assert home != "study", f"{name} imports {other}"
        fine = (
            name in ("hubconf", "demo")
            or wing in ("study", "examples")
            or (wing, other) == ("family", "train")
        )
        assert other not in SCRIPTS or fine, f"{name} imports the script {other}"
        if home == "family" or wing == "family":
            assert home in CORE_NAMES | {"world", "engine"}, f"{name} imports {other}"
    if wing not in ("wan", "study", "examples"):
        wan = {m for m in imports(MODULES[name], at_import_time=True) if m.startswith("wan.")}
        assert not wan, f"{name} imports {wan} before anybody has asked for Wan"


def test_no_circle_of_imports():
    left = {name: imports(path) - {name} for name, path in MODULES.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_budgets():
    """Files <= 400 lines, functions <= 50, lines <= 110, nesting <= 4; the core <= 3,200 in 16 files."""
    for path in PRODUCT:
        lines = path.read_text(encoding="utf-8").splitlines()
        most = 150 if path.parent.name == "family" else 400
        assert len(lines) <= most, f"{path.name}: {len(lines)} lines"
        assert max(map(len, lines), default=0) <= 110, path.name
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"
                assert depth(node) <= 4, f"{path.name}: {node.name} nests too deeply"
    size = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    core = sum(size[path] for path in CORE)
    assert core <= 3200 and len(CORE) <= 16, f"{core} lines in {len(CORE)} files"
    for wing, most in WINGS.items():
        lines = sum(size[path] for path in PRODUCT if path.parent.name == wing)
        assert lines <= most, f"{wing}: {lines} lines; its budget is {most}"


def depth(node, level=0) -> int:
    """Levels of control flow below a function."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child, level + (inside and not is_elif)))
    return deepest


@pytest.mark.parametrize("path", PRODUCT, ids=module)
def test_house_rules(path):
    """No getattr default, no bare except, no mutable global state."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"getattr\([^)]*,[^)]*,", text), "getattr with a default"
    assert not re.search(r"except:\s|^\s*global \w+$", text, re.M)


def test_assets_stay_small():
    files = [p for p in (ROOT / "assets").rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) <= 16 * 2**20
    assert (ROOT / "assets/live.webp").stat().st_size <= 400 * 2**10


# -- prose ----------------------------------------
def commands():
    """Every `... script.py args` or `python -m wing.module args` in code blocks and spans of all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
            for line in block.splitlines()
        ]
        lines += re.findall(r"`((?:python|torchrun) [^`]+)`", text)
        for line in lines:
            for part in line.partition("#")[0].split("&&"):
                if re.search(r"\w\.py\b| -m (study|wan|web|family|examples)\.", part) and "…" not in part:
                    yield page.name, part.strip()


def test_every_command_names_a_script_and_flags_that_exist():
    found = list(commands())
    assert len(found) > 15
    for page, command in found:
        words = shlex.split(command.replace("\n", " "))
        at = (
            words.index("-m") + 1
            if "-m" in words
            else next(i for i, w in enumerate(words) if w.endswith(".py"))
        )
        name = words[at].removesuffix(".py").replace(".ci/step", "train")  # whose flags it has
        own = words[at] == "tests/campaign.py" or name.startswith("examples.")
        assert name in MODULES or own, f"{page}: {command}"
        flags = {f.name for f in fields(importlib.import_module(name).Flags)} | OWN
        for word in words[at + 1 :]:
            if word.startswith("--"):
                flag = word[2:].partition("=")[0].removeprefix("no-").replace("help-all", "help_all")
                assert flag in flags | {"help", "help_all", "config"}, f"{page}: {command}: {word}"


def test_every_defect_has_its_place_in_the_code():
    """Catches one of tests/symptoms.py that could not be made any more, since its lines have changed."""
    changes = [change for _, changes in SICK.values() for change in changes]
    assert [(file, old) for file, old, _ in changes if (ROOT / file).read_text("utf-8").count(old) != 1] == []


def test_the_slurm_script(tmp_path):
    """Its own command, with Slurm's programs played by echo: fresh, and where a run has saved something."""
    for name, says in {"scontrol": "echo node1", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"}
    env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "run")}
    for resumed in (False, True):
        words = subprocess.run(["bash", ROOT / "examples/slurm.sh"], env=env, capture_output=True, text=True)
        words = words.stdout.split()
        assert words[:3] == ["torchrun", "--nnodes=2", "--nproc_per_node=8"]
        own = words[words.index("train.py") + 1 :]
        preset, typed, flags = read_cli(own, importlib.import_module("train").Flags, "")
        assert build(preset, typed).batch % (16 * typed["accumulate"]) == 0 and flags.resume == resumed
        (tmp_path / "run/step_000025").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_links_to_exists(page):
    """Files, pictures, and `[function](file.py#L12)`: that line defines the function."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\[([^\]]*)\]\(((?!http)[^)#\s]+)(?:#L(\d+))?(?:#[\w-]+)?\)", text)
    links += [("", src, "") for src in re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    for words, target, line in links:
        path = (page.parent / target).resolve()
        assert path.exists(), f"{page.name} links to {target}"
        if line:
            names = re.findall(r"\w+", words)
            defined = path.read_text(encoding="utf-8").splitlines()[int(line) - 1]
            assert any(re.match(rf"\s*(def|class) {n}\b", defined) for n in names), (
                f"{words}: {target}#L{line}"
            )


def test_every_module_is_in_the_file_map():
    for path in CORE:
        assert path.name in README, f"{path.name} is missing from the file map"
    for wing in WINGS:
        assert f"{wing}/" in README, f"{wing}/ is missing from the file map"


def test_the_readme_stays_a_door():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1500, f"{len(README.split())} words"
    tables = re.findall(r"(?:^\|.*\n)+", README, re.M)
    assert all(len(table.splitlines()) <= 2 + 16 for table in tables)


def test_methods_and_presets_are_described():
    prose = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in (*METHODS, *PRESETS):
        assert f"`{name}`" in prose, name


def test_config_names_every_choice_in_its_messages():
    with pytest.raises(BadInput, match="uniform | 5432"):
        build("tiny", {"taper": "steep"})
