"""wan.py against the formats that people have: diffusers' own files, original names, training checkpoints."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import PRESETS, BadInput
from model import VideoDiT
from wan import load_wan, rename, save_wan

pytest.importorskip("diffusers")
from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers  # noqa: E402


@pytest.fixture
def cfg(tiny):
    return replace(tiny, predict="v", dim=40, heads=2)


@pytest.fixture
def ours(cfg, build):
    return build(cfg)


def theirs(cfg):
    return WanTransformer3DModel(
        patch_size=(cfg.patch_time, cfg.patch, cfg.patch), num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads, in_channels=cfg.channels, out_channels=cfg.channels,
        text_dim=cfg.text_width, freq_dim=cfg.time_freqs, ffn_dim=cfg.ffn, num_layers=cfg.layers,
    )  # fmt: skip


def same(net, ours) -> bool:
    return all(torch.equal(x, ours.state_dict()[k]) for k, x in net.state_dict().items())


def wrapped(state: dict, form: str) -> dict:
    """A training checkpoint as the released trainers write it, beside other things."""
    if form == "self-forcing":
        noise = {f"model.{k}": torch.randn_like(v) for k, v in state.items()}
        return {"generator": noise, "generator_ema": {f"model.{k}": v for k, v in state.items()}}
    if form == "causvid":
        return {"generator": {f"model._fsdp_wrapped_module.{k}": v for k, v in state.items()}}
    if form == "fsdp blocks":
        return {
            "generator": {f"model.{k.replace('.', '._fsdp_wrapped_module.', 1)}": v for k, v in state.items()}
        }
    if form == "reward-forcing":
        return {f"model.{k}": v for k, v in state.items()}
    return {f"model.diffusion_model.{k}": v for k, v in state.items()}  # ComfyUI


def test_names_are_diffusers_own_at_full_size():
    """All 825 tensors of the real 1.3B: our table and diffusers' converter agree, forth and back."""
    with torch.device("meta"):
        state = VideoDiT(PRESETS["wan-1.3b"]).state_dict()
    expected = convert_wan_transformer_to_diffusers(dict(state))
    renamed = {rename(k, to_diffusers=True): v.shape for k, v in state.items()}
    assert len(renamed) == 825 and renamed == {k: v.shape for k, v in expected.items()}
    assert {rename(rename(k, True), False) for k in state} == set(state)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
@pytest.mark.parametrize("inner", ["", "transformer"])
def test_a_folder_that_diffusers_wrote(cfg, tmp_path, size, inner):
    """Whole and in shards, alone and inside a pipeline's folder; the networks then agree."""
    network = theirs(cfg).eval()
    network.save_pretrained(tmp_path / inner, max_shard_size=size)
    assert len(list(tmp_path.rglob("*.safetensors"))) > (1 if size == "20KB" else 0)
    net = load_wan(tmp_path, VideoDiT(cfg))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, cfg.frames, *cfg.latent_shape, generator=g)
    text = torch.randn(1, cfg.text_length, cfg.text_width, generator=g)
    with torch.no_grad():
        v, _ = net(x, torch.full((1, cfg.frames), 0.5), text)
        expected = network(x.transpose(1, 2), torch.tensor([500.0]), text).sample.transpose(1, 2)
    torch.testing.assert_close(v, expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("form", ["self-forcing", "causvid", "fsdp blocks", "reward-forcing", "comfy"])
@pytest.mark.parametrize("ending", [".pt", ".pth"])
def test_checkpoints_of_trainers(cfg, ours, tmp_path, form, ending):
    """Catches wrappers that stay on, and the raw weights where the averaged ones lie beside them."""
    torch.save(wrapped(ours.state_dict(), form), tmp_path / f"x{ending}")
    assert same(load_wan(tmp_path / f"x{ending}", VideoDiT(cfg)), ours)


@pytest.mark.parametrize("diffusers", [False, True])
def test_saved_and_loaded_again(cfg, ours, tmp_path, diffusers):
    """Bit for bit, and diffusers reads its format without our help."""
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_wan(path, ours, diffusers)
    assert same(load_wan(path, VideoDiT(cfg)), ours) and same(load_wan(tmp_path, VideoDiT(cfg)), ours)
    if diffusers:
        theirs(cfg).load_state_dict(load_file(path), strict=True)


def test_a_net_on_the_meta_device(cfg, ours, tmp_path):
    """Real sizes need no second copy: the tensors of the file become the network's, bf16 stays."""
    save_wan(tmp_path / "x.safetensors", ours.to(torch.bfloat16))
    with torch.device("meta"):
        net = VideoDiT(cfg)
    assert same(load_wan(tmp_path / "x.safetensors", net), ours)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_what_does_not_fit(cfg, ours, tmp_path):
    """Every tensor and every place is accounted for, by name, in one line."""

    def refused(change, needle):
        state = dict(ours.state_dict())
        change(state)
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(BadInput, match=needle) as error:
            load_wan(tmp_path / "x.safetensors", VideoDiT(cfg))
        assert "\n" not in str(error.value)

    refused(lambda s: s.pop("head.head.bias"), "lacks head.head.bias")
    refused(lambda s: s.update({"img_emb.proj.0.weight": torch.zeros(2)}), "too much: img_emb.proj.0.weight")
    refused(lambda s: s.update({"head.head.bias": torch.zeros(3)}), r"other shapes: head.head.bias \(3,\)")
    with pytest.raises(BadInput, match="and 51 more"):
        load_wan(tmp_path / "x.safetensors", VideoDiT(replace(cfg, layers=4)))


def test_unreadable(cfg, tmp_path):
    """Missing, cut short, a missing shard, a pickle that wants to run code, tensors that are none."""

    def refused(path, needle):
        with pytest.raises(BadInput, match=needle) as error:
            load_wan(path, VideoDiT(cfg))
        assert "\n" not in str(error.value)

    refused(tmp_path / "none.pt", "no weights at")
    refused(tmp_path, "lacks weights")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    refused(tmp_path / "cut.safetensors", "cannot be read")
    torch.save({"generator": print}, tmp_path / "code.pt")
    refused(tmp_path / "code.pt", "UnpicklingError")
    torch.save({"step": 3}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "holds no network")
    theirs(cfg).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    lost = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shutil.move(lost, tmp_path / "elsewhere")
    refused(tmp_path / "sharded", f"lacks {lost.name}")
