"""Rows of the comparison: all are possible, and each differs from its control in one technique."""

from dataclasses import replace

import pytest

from config import BadInput, build
from rollout import step_grid
from study import rows
from study.rows import ROWS, as_flag, reference, rows_named


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_possible(name):
    """Every row can be built; its control has the same cache (but for rows about it) and nothing else."""
    cfg, control = build("tiny", ROWS[name]), build("tiny", ROWS[reference(name)])
    assert not (control.space or control.time or control.motion)
    if control.taper != "uniform":
        assert replace(cfg, motion=0.0) == control, "about the motion term, and nothing else"
    elif name.startswith("reward_forcing-") and name != "reward_forcing-beta.5":
        sinks = {k: getattr(control, k) for k in ("sink", "sink_mode", "sink_decay")}
        assert replace(cfg, **sinks) == control, "about sinks, and nothing else"
    else:
        assert not control.beta and (cfg.window, cfg.sink_mode) == (control.window, control.sink_mode)


def test_rows_differ():
    """Catches two names for one thing."""
    made = [repr(replace(build("tiny", given), method="")) for given in ROWS.values()]
    assert len(set(made)) == len(made)


def test_controls_come_along():
    names = rows_named("windowed-guidance3-ema.95,reward_forcing-no_sink", {})
    controls = ["self_forcing", "windowed", "windowed-guidance3", "reward_forcing"]
    assert names == [*controls, "windowed-guidance3-ema.95", "reward_forcing-no_sink"]
    assert reference("stream_r1-2steps") == "windowed-2steps"
    assert reference("windowed-2steps-guidance3") == "windowed-2steps"


def test_a_typed_field_that_a_row_is_made_of_is_refused():
    with pytest.raises(BadInput, match="--beta is part of"):
        rows_named("diagonal", {"beta": 1.0})
    assert rows_named("diagonal", {"lr": 1.0}) == ["self_forcing", "windowed", "diagonal"]


def test_every_run_says_how_long_it_is():
    """Catches a comparison whose length changes with the preset's default, and typed fields that are lost."""
    for name in ROWS:
        assert rows.fields_of(name, "two", {})["steps"] == 100
    fields = rows.fields_of("diagonal", "two", {"steps": 2})
    assert (fields["steps"], fields["objects"], build("tiny", fields).motion) == (2, 2, 4.0)


def test_forwards_of_seven_chunks():
    """The arithmetic behind the published speeds: with refresh 35, without 28, tapered 20 and 17."""
    expected = {"self_forcing": 35, "diagonal-no_refresh": 28, "diagonal": 20, "diagonal-432": 17}
    for name, forwards in expected.items():
        cfg = build("tiny", ROWS[name])
        assert sum(len(step_grid(cfg, k)) + (cfg.context in ("clean", "noisy")) for k in range(7)) == forwards


@pytest.mark.parametrize("value, typed", [
    (True, "--x"), (False, "--no-x"), (0.5, "--x=0.5"), (("VQ", "MQ"), "--x=VQ,MQ"), ("ema", "--x=ema"),
])  # fmt: skip
def test_fields_as_they_are_typed(value, typed):
    assert as_flag("x", value) == typed
