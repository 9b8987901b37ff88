"""What a step costs, on the random nets."""

import pytest
from runs import KEYS, in_process

from study import cost


@pytest.mark.slow
def test_a_method_beside_plain_dmd(nets, monkeypatch, capsys):
    in_process(monkeypatch, cost, "--rounds=1", "--method=tilted", f"--nets={nets}", *KEYS)
    plain, method, _ = capsys.readouterr().out.splitlines()
    assert plain.startswith("a step of windowed: ") and "1.00 of plain" in plain and "(5 steps)" in plain
    assert method.startswith("a step of tilted: ")


@pytest.mark.parametrize("argv", [["--rounds=0"], ["--nets=/nowhere"]])
def test_bad_input(argv, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, cost, *argv)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
