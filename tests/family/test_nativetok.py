"""Tokens with an order: what each is made from, what each stage changes, what a prior can know."""

import copy

import pytest
import torch
from runs import in_process

from engine.rng import rng_for
from family import nativetok
from family.nativetok import ARMS, BASE, CODES, LEVELS, Prior, Tokenizer, descend, quantise, train_tokenizer

BAD = "--seeds=1 --steps=3 --seed=1"
X = torch.randn(64, 192, generator=rng_for("latents"))


def made(arm: str, tokens: int = 5) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(arm, tokens)


@pytest.mark.parametrize("arm", ARMS)
def test_a_token_depends_on_those_before_it_alone(arm):
    """Another expert j, so another token j, changes no token before it, and those after it unless `flat`."""
    net, j = made(arm), 2
    _, codes, _ = net(X, 5)
    net.experts[j][-1].weight.data.mul_(-40)
    _, after, _ = net(X, 5)
    assert torch.equal(codes[:, :j], after[:, :j]) and not torch.equal(codes[:, j], after[:, j])
    assert torch.equal(codes[:, j + 1 :], after[:, j + 1 :]) == (arm == "flat")


@pytest.mark.parametrize("arm", ["native", "causal"])
def test_experts_see_codes_but_in_causal_what_was_not_rounded(arm):
    net, seen = made(arm, 2), []
    net.experts[1].register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 256:259]))
    own = net(X, 2)[1][:, 0]
    assert torch.equal(seen[0], own) == (arm == "native") and (seen[0] - own).abs().max() < 0.3


def test_one_expert_makes_one_token():
    net, calls = made("native"), []
    for i, expert in enumerate(net.experts):
        expert.register_forward_hook(lambda *_, i=i: calls.append(i))
    assert [z.shape for z in net(X, 3)] == [(64, 192), (64, 3, 3), (64, 3)] and calls == [0, 1, 2]
    # the arms differ in nothing else
    assert len({sum(p.numel() for p in made(arm).parameters()) for arm in ARMS}) == 1


def test_stages_train_few_then_new_then_all(monkeypatch):
    net, stages = made("native", 4), []

    def spy(parameters, x, loss_of, steps, what):
        before = copy.deepcopy(net.state_dict())
        descend(parameters, x, loss_of, steps, what)
        stages.append({k for k, v in net.state_dict().items() if not torch.equal(v, before[k])})

    monkeypatch.setattr(nativetok, "descend", spy)
    train_tokenizer(net, X, 12, "test")
    of = [{k for k in net.state_dict() if k.startswith(f"experts.{i}.")} for i in range(4)]
    decoder = {k for k in net.state_dict() if k.startswith("decoder.")}
    assert stages == [set(net.state_dict()) - of[2] - of[3], of[2] | of[3] | decoder, set(net.state_dict())]


def test_codes_and_numbers():
    grid = torch.arange(CODES)[:, None] // BASE % LEVELS / (LEVELS - 1)  # in [0, 1]
    codes, back = quantise(grid.logit(eps=1e-4))
    assert torch.equal(back, torch.arange(CODES)) and torch.allclose(codes, 2 * grid - 1, atol=1e-6)
    z = torch.randn(9, 3, generator=rng_for("z")).requires_grad_()
    quantise(z)[0].sum().backward()
    assert torch.allclose(z.grad, 2 * z.sigmoid() * (1 - z.sigmoid()), atol=1e-6)  # of what was rounded
    assert len(quantise(torch.randn(20000, 3, generator=rng_for("many")) * 3)[1].unique()) == CODES


def trained_bits(copied: bool, steps: int) -> torch.Tensor:
    """Of three tokens, as shares of log2 240; the last one may be a copy of the one before it."""
    numbers = torch.randint(CODES, (22000, 3), generator=rng_for("uniform"))
    numbers[:, 2] = numbers[:, 2 - copied]
    torch.manual_seed(0)
    prior = Prior()
    descend(prior.parameters(), numbers[:20000], lambda batch: prior(batch).mean(), steps, "test")
    with torch.no_grad():
        return prior(numbers[20000:]).mean(0) / torch.tensor(float(CODES)).log2()


def test_a_prior_knows_nothing_of_independent_codes():
    assert (trained_bits(copied=False, steps=20) - 1).abs().max() < 0.01


@pytest.mark.slow
def test_a_prior_knows_a_copied_token():
    *free, copy = trained_bits(copied=True, steps=150)
    assert abs(min(free) - 1) < 0.02 and copy < 0.02


@pytest.mark.parametrize("words", BAD.split())
def test_bad_input_is_one_line(words, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        in_process(monkeypatch, nativetok, words)
    assert "allowed" in (err := capsys.readouterr().err) and err.count("\n") == 1
