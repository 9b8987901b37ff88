"""Prose drifts, so it is tested: commands, files, names and budgets that README.md and the code promise."""

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import bench
import config
import pretrain
import sample
import train
from config import METHODS, PRESETS, Config
from study import evaluate
from study import figures as plot
from wan import memory

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PRODUCT = sorted(ROOT.glob("*.py"))
SCRIPTS = (train, sample, pretrain, evaluate, plot, bench, memory)
FLAGS = {m.__name__: {f.name for f in fields(m.Flags)} for m in SCRIPTS}
OWN = {f.name for f in fields(Config)}


def commands():
    """Every `... script.py args` line in the README's code blocks."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S):
        for line in block.splitlines():
            yield from (part.strip() for part in line.partition("#")[0].split("&&") if part.strip())


def test_every_command_names_a_script_and_flags_that_exist():
    scripts = [c for c in commands() if ".py" in c]
    assert len(scripts) > 5
    for command in scripts:
        words = shlex.split(command)
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        name = words[at].removesuffix(".py")
        assert (ROOT / words[at]).exists(), command
        for word in words[at + 1 :]:
            if word.startswith("--"):
                flag = word[2:].partition("=")[0]
                assert flag in FLAGS.get(name, set()) | OWN, f"{command}: --{flag}"
        given = [w for w in words[at + 1 :] if not w.startswith("--") and " " not in w]
        for word in given:
            assert (
                word in (*PRESETS, "curves", "saliency", "weights", "table", "methods") or "--prompt" in words
            ), f"{command}: {word}"


def test_every_file_and_picture_the_readme_names_exists():
    named = set(re.findall(r"`([\w/.-]+\.(?:py|md|txt|toml|json|safetensors|png|gif|mp4))`", README))
    named |= set(re.findall(r"\]\(((?!http)[\w/.-]+)(?:#L\d+)?\)", README))
    named |= set(re.findall(r'src="([\w/.-]+)"', README))
    made = {
        n for n in named if n.startswith("out/") or n in ("metrics.jsonl", "metadata.jsonl", "metadata.csv")
    }
    missing = {n for n in named - made if not (ROOT / n).exists()}
    assert not missing, f"README names files that are not there: {missing}"


def test_every_module_is_in_the_file_map_and_packaged():
    packaged = (ROOT / "pyproject.toml").read_text()
    for path in PRODUCT:
        assert f"`{path.name}`" in README, f"{path.name} is missing from the file map"
        assert f'"{path.stem}"' in packaged, f"{path.name} is missing from py-modules"


def test_every_function_the_readme_names_exists():
    defined = {
        n.name for p in PRODUCT for n in ast.walk(ast.parse(p.read_text())) if hasattr(n, "name") and n.name
    }
    for name in re.findall(r"`(\w+\.)?(\w+)\(\)`", README):
        assert name[1] in defined, name[1]


def test_methods_and_presets_are_described():
    for name in (*METHODS, *PRESETS):
        assert f"`{name}`" in README, name


def test_budgets():
    """Files <= 400 lines, functions <= 50, lines <= 110, nesting <= 4."""
    for path in PRODUCT:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.name}: {len(lines)} lines"
        assert max(map(len, lines)) <= 110, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"
                assert depth(node) <= 4, f"{path.name}: {node.name} nests too deeply"
    total = sum(len(p.read_text().splitlines()) for p in PRODUCT)
    assert total <= TOTAL, f"{total} lines of product code; the budget is {TOTAL}"


TOTAL = 5263


def depth(node, level=0) -> int:
    """Levels of control flow below a function."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child, level + (inside and not is_elif)))
    return deepest


def test_assets_stay_small():
    files = [p for p in (ROOT / "assets").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24 * 2**20
    assert max(p.stat().st_size for p in files) <= 16 * 2**20


@pytest.mark.parametrize("path", [p.name for p in PRODUCT])
def test_house_rules(path):
    """No getattr default, no bare except, no mutable global state."""
    text = (ROOT / path).read_text()
    assert not re.search(r"getattr\([^)]*,[^)]*,", text), "getattr with a default"
    assert not re.search(r"except:\s|^\s*global \w+$", text, re.M)


def test_nothing_imports_a_script():
    scripts = {"train", "pretrain", "sample", "evaluate"}
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not scripts & set(names), f"{path.name} imports a script"


def test_config_names_every_choice_in_its_messages():
    with pytest.raises(config.BadInput, match="uniform | 5432"):
        config.build("tiny", {"taper": "steep"})
