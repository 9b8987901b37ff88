"""Tokens with an order: what each is made from, what each stage changes, what a prior can know."""

import copy

import pytest
import torch

from config import cli
from engine.rng import rng_for
from family import nativetok
from family.nativetok import ARMS, BASE, CODES, LEVELS, Prior, Tokenizer, descend, quantise, train_tokenizer

X = torch.randn(64, 192, generator=rng_for("latents"))


def made(arm: str, tokens: int = 5) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(arm, tokens)


@pytest.mark.parametrize("arm", ARMS)
def test_a_token_depends_on_those_before_it_alone(arm):
    """Another expert j, and so another token j, leaves tokens before it; those after it see the change,
    unless they see nothing but the frame."""
    net, j = made(arm), 2
    _, codes, _ = net(X, 5)
    net.experts[j][-1].weight.data.mul_(-40)
    _, after, _ = net(X, 5)
    assert torch.equal(codes[:, :j], after[:, :j]) and not torch.equal(codes[:, j], after[:, j])
    assert torch.equal(codes[:, j + 1 :], after[:, j + 1 :]) == (arm == "flat")


@pytest.mark.parametrize("arm", ["native", "causal"])
def test_experts_see_codes_but_in_causal_what_was_not_rounded(arm):
    net = made(arm, 2)
    seen = []
    net.experts[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    _, codes, _ = net(X, 2)
    assert torch.equal(seen[0][:, 256:259], codes[:, 0]) == (arm == "native")
    assert (seen[0][:, 256:259] - codes[:, 0]).abs().max() < 0.3


def test_one_expert_makes_one_token():
    net, calls = made("native"), []
    for i, expert in enumerate(net.experts):
        expert.register_forward_hook(lambda *_, i=i: calls.append(i))
    x, codes, numbers = net(X, 3)
    assert (
        calls == [0, 1, 2] and codes.shape == (64, 3, 3) and numbers.shape == (64, 3) and x.shape == X.shape
    )
    sizes = {sum(p.numel() for p in made(arm).parameters()) for arm in ARMS}
    assert len(sizes) == 1  # the arms differ in nothing else


def test_stages_train_few_then_new_then_all(monkeypatch):
    net, stages = made("native", 4), []

    def spy(parameters, x, loss_of, steps, what):
        before = copy.deepcopy(net.state_dict())
        descend(parameters, x, loss_of, steps, what)
        stages.append({k for k, v in net.state_dict().items() if not torch.equal(v, before[k])})

    monkeypatch.setattr(nativetok, "descend", spy)
    train_tokenizer(net, X, 12, "test")
    of = [{k for k in net.state_dict() if k.startswith(f"experts.{i}.")} for i in range(4)]
    rest = {k for k in net.state_dict() if k.startswith("mit.")}
    decoder = {k for k in net.state_dict() if k.startswith("decoder.")}
    assert stages[0] == of[0] | of[1] | rest | decoder
    assert stages[1] == of[2] | of[3] | decoder
    assert stages[2] == set(net.state_dict())


def test_codes_and_numbers():
    """240 of them, each number one code; the gradient is that of what was rounded."""
    number = torch.arange(CODES)
    grid = number[:, None] // BASE % LEVELS / (LEVELS - 1)  # in [0, 1]
    codes, back = quantise(grid.logit(eps=1e-4))
    assert torch.equal(back, number) and torch.allclose(codes, 2 * grid - 1, atol=1e-6)
    z = torch.randn(9, 3, generator=rng_for("z")).requires_grad_()
    quantise(z)[0].sum().backward()
    slope = torch.autograd.functional.jacobian(lambda z: (2 * z.sigmoid() - 1).sum(), z.detach())
    assert torch.allclose(z.grad, slope, atol=1e-6)
    assert len(quantise(torch.randn(20000, 3, generator=rng_for("many")) * 3)[1].unique()) == CODES


def trained_bits(copied: bool, steps: int) -> torch.Tensor:
    """As shares of log2 240, of two tokens."""
    numbers = torch.randint(CODES, (22000, 2), generator=rng_for("uniform"))
    numbers[:, 1] = numbers[:, 1 - copied]
    torch.manual_seed(0)
    prior = Prior()
    descend(prior.parameters(), numbers[:20000], lambda batch: prior(batch).mean(), steps, "test")
    with torch.no_grad():
        return prior(numbers[20000:]).mean(0) / torch.tensor(float(CODES)).log2()


def test_a_prior_knows_nothing_of_independent_codes():
    assert (trained_bits(copied=False, steps=20) - 1).abs().max() < 0.01


@pytest.mark.slow
def test_a_prior_knows_a_copied_token():
    first, second = trained_bits(copied=True, steps=150)
    assert abs(first - 1) < 0.02 and second < 0.02


@pytest.mark.parametrize("words", ["--tokens=1", "--tokens=-1", "--arms=natives", "--seeds=9", "--frames=9",
                                   "--steps=3", "--beta=1"])  # fmt: skip
def test_bad_input_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nativetok.py", words])
    with pytest.raises(SystemExit, match="2"):
        cli(nativetok.main)
    assert "allowed" in (err := capsys.readouterr().err) and err.count("\n") == 1
