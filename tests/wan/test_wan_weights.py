"""wan.py against the formats that people have: diffusers' own files, original names, training checkpoints."""

import json
import re
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import PRESETS, BadInput
from engine.checkpoint import save_weights
from model import VideoDiT
from wan import memory
from wan import weights as wan
from wan.videoalign import load_videoalign
from wan.weights import WanCodec, load_text, load_vae, names_in_diffusers, open_wan

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import downloads  # noqa: E402

from examples.export import export, main  # noqa: E402


@pytest.fixture
def cfg(tiny):
    return replace(tiny, predict="v", dim=40, heads=2)


@pytest.fixture
def ours(cfg, build):
    return build(cfg)


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


def test_names_are_diffusers_own():
    """Of two of the real 1.3B's blocks; each tensor has the same shape there. All its blocks: 825 tensors."""
    cfg = replace(PRESETS["wan-1.3b"], layers=2)
    with torch.device("meta"):
        state, theirs = VideoDiT(cfg).state_dict(), downloads.transformer(cfg).state_dict()
    names = names_in_diffusers(2)
    assert {names[k]: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}
    assert len(names) == len(state) == 825 - 28 * 27


@pytest.mark.parametrize("size", ["10GB", "20KB"])
@pytest.mark.parametrize("inner", ["", "transformer"])
def test_a_folder_that_diffusers_wrote(cfg, tmp_path, size, inner):
    """Whole and in shards, alone and inside a pipeline's folder; the networks then agree."""
    network = downloads.transformer(cfg).eval()
    network.save_pretrained(tmp_path / inner, max_shard_size=size)
    assert len(list(tmp_path.rglob("*.safetensors"))) > (1 if size == "20KB" else 0)
    net = open_wan(tmp_path, cfg)
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
    assert same(open_wan(tmp_path / f"x{ending}", cfg), ours)


def test_a_student_in_diffusers_format(cfg, ours, tmp_path, monkeypatch, capsys):
    """The folder opens here and there with the file's numbers; its card tells what it is. One that differs
    from the student has no card; one of the small presets is no Wan."""
    cfg, student = replace(cfg, time_stride=4, horizon=1, data="p.txt"), tmp_path / "student.safetensors"
    save_weights(student, ours, cfg, "student", step=7, command="train.py wan-1.3b --steps=7")
    monkeypatch.setattr(sys, "argv", ["export.py", f"--student={student}", f"--out={tmp_path / 'out'}"])
    main()
    apart = float(re.search(r"by (\S+);", capsys.readouterr().out)[1])
    assert apart < 1e-5 and same(open_wan(tmp_path / "out", cfg), ours.half())
    card = (tmp_path / "out/README.md").read_text()
    assert all(word in card for word in ("license: apache-2.0", "--steps=7", "`p.txt`", '"dim": 40'))
    monkeypatch.setattr("examples.export.in_diffusers", lambda net, cfg: downloads.transformer(cfg))
    with pytest.raises(BadInput, match="is not the student"):
        export(student, tmp_path / "other")
    assert not (tmp_path / "other/README.md").exists()
    save_weights(student, ours, replace(cfg, time_stride=1), "student")
    with pytest.raises(BadInput, match="allowed: one of train.py --wan"):
        export(student, tmp_path / "small")


def test_a_file_in_bf16(cfg, ours, tmp_path):
    """Real sizes need no second copy: the tensors of the file become the network's, bf16 stays."""
    save_file(ours.to(torch.bfloat16).state_dict(), tmp_path / "x.safetensors")
    net = open_wan(tmp_path / "x.safetensors", cfg)
    assert same(net, ours)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")
def test_weights_are_mapped(cfg, tmp_path):
    """Three networks of one file, read to the end, take no memory but the file's own pages, which other
    processes share. Catches a copy on the way."""
    cfg = replace(cfg, dim=512, ffn=2048, heads=4)
    save_file(VideoDiT(cfg).state_dict(), tmp_path / "x.safetensors")

    def memory() -> dict[str, int]:
        lines = [line.split() for line in open("/proc/self/smaps_rollup")]
        return {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("Rss:", "Anonymous:")}

    before, size = memory(), (tmp_path / "x.safetensors").stat().st_size
    nets = [open_wan(tmp_path / "x.safetensors", cfg).float() for _ in range(3)]
    assert all(p.isfinite().all() for net in nets for p in net.parameters())
    after = memory()
    assert after["Rss:"] - before["Rss:"] > 2.5 * size  # read they were
    assert after["Anonymous:"] - before["Anonymous:"] < 0.5 * size


def test_what_does_not_fit(cfg, ours, tmp_path):
    """Every tensor and every place is accounted for, by name, in one line."""

    def refused(change, needle):
        state = dict(ours.state_dict())
        change(state)
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(BadInput, match=needle) as error:
            open_wan(tmp_path / "x.safetensors", cfg)
        assert "\n" not in str(error.value)

    refused(lambda s: s.pop("head.head.bias"), "Missing key.*head.head.bias")
    refused(
        lambda s: s.update({"img_emb.proj.0.weight": torch.zeros(2)}), "Unexpected key.*img_emb.proj.0.weight"
    )
    refused(
        lambda s: s.update({"head.head.bias": torch.zeros(3)}), r"size mismatch for head.head.bias.*\[3\]"
    )
    with pytest.raises(BadInput, match="blocks.2.modulation"):
        open_wan(tmp_path / "x.safetensors", replace(cfg, layers=4))


def test_unreadable(cfg, tmp_path):
    """Missing, cut short, a missing shard, a pickle that wants to run code, tensors that are none."""

    def refused(path, needle):
        with pytest.raises(BadInput, match=needle) as error:
            open_wan(path, cfg)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none.pt", "no weights at")
    refused(tmp_path, "lacks weights")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    refused(tmp_path / "cut.safetensors", "cannot be read")
    torch.save({"generator": print}, tmp_path / "code.pt")
    refused(tmp_path / "code.pt", "UnpicklingError")
    torch.save({"step": 3}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "holds no network")
    downloads.transformer(cfg).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    lost = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shutil.move(lost, tmp_path / "elsewhere")
    refused(tmp_path / "sharded", f"no weights at .*{lost.name}")


# -- the video codec ----------------------------------------


@pytest.fixture(scope="module")
def vae():
    return downloads.vae()


@pytest.fixture(scope="module")
def video01():
    return torch.rand(2, 13, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_codec_equals_diffusers(vae, video01):
    """Catches pixels in the wrong range, statistics on the wrong side, swapped axes."""
    codec = WanCodec(vae)
    x = codec.encode(video01)
    z = vae.encode(video01.transpose(1, 2) * 2 - 1).latent_dist.mode()
    stats = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (vae.config.latents_mean, vae.config.latents_std))
    mean, std = stats
    torch.testing.assert_close(x.transpose(1, 2), (z - mean) / std)
    assert x.shape == (2, 4, 4, 4, 6)
    expected = vae.decode(z).sample.transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(codec.decode(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_codec_streams(vae, video01, parts):
    """Part after part = all at once, exactly: 1 + 4 k frames from the first part, 4 a latent after it."""
    codec = WanCodec(vae)
    x = codec.encode(video01)
    decode = codec.stream()
    pieces = [decode(part) for part in x.split(parts, dim=1)]
    assert [p.shape[1] for p in pieces] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(parts)]
    torch.testing.assert_close(torch.cat(pieces, 1), codec.decode(x), atol=1e-6, rtol=1e-6)
    again = codec.stream()(x[:, :1])
    torch.testing.assert_close(again, pieces[0][:, :1], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_codec_in_bf16(vae, video01):
    """Catches latents that are standardised, or pixels that are scaled, in bf16."""
    exact, rough = (WanCodec(net) for net in (vae, deepcopy(vae).bfloat16()))
    x = exact.encode(video01)
    assert rough.encode(video01).dtype == rough.decode(x).dtype == torch.float32
    torch.testing.assert_close(rough.encode(video01), x, atol=0.05, rtol=0.05)
    torch.testing.assert_close(rough.decode(x), exact.decode(x), atol=0.05, rtol=0)


def test_codec_is_differentiable(vae, video01):
    """Time runs forwards only; computed twice, the gradient is that of diffusers' own decoding."""
    codec = WanCodec(vae)
    x = codec.encode(video01).detach().requires_grad_()
    codec.decode(x)[:, 1:5].sum().backward()
    reached = x.grad.abs().sum((0, 2, 3, 4))
    assert (reached[:2] > 0).all() and (reached[2:] == 0).all()
    z = (x.detach() * codec.std + codec.mean).transpose(1, 2).requires_grad_()
    (vae.decode(z).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1)[:, 1:5].sum().backward()
    torch.testing.assert_close(x.grad, z.grad.transpose(1, 2) * codec.std, atol=1e-5, rtol=1e-4)


def test_codec_refuses(vae, video01, tmp_path):
    with pytest.raises(ValueError, match="12 frames"):
        WanCodec(vae).encode(video01[:, :12])
    with pytest.raises(BadInput, match="no Wan VAE"):
        load_vae(tmp_path)
    torch.save({"decoder.x": torch.zeros(2)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(BadInput, match="does not fit"):
        load_vae(tmp_path / "Wan2.1_VAE.pth")


@torch.no_grad()
@pytest.mark.parametrize("inner", ["", "vae"])
def test_codec_from_a_folder(vae, video01, tmp_path, inner):
    vae.save_pretrained(tmp_path / inner)
    x = load_vae(tmp_path).encode(video01)
    torch.testing.assert_close(x, WanCodec(vae).encode(video01))


# -- text ----------------------------------------


@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    return downloads.umt5(tmp_path_factory.mktemp("umt5"))


@torch.no_grad()
def test_text_equals_transformers(umt5):
    """A batch padded and masked by transformers gives the same states; after the end are exact zeros."""
    text = load_text(umt5)
    text.length = 12
    prompts = ["a cat runs on the red mat", "a   dog"]
    ours = text(prompts)
    padded = text.tokenizer(prompts, padding="max_length", max_length=12, return_tensors="pt")
    expected = text.encoder(padded.input_ids, padded.attention_mask).last_hidden_state
    expected = expected * padded.attention_mask[..., None]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert padded.attention_mask.sum(1).tolist() == [8, 3] and (ours[1, 3:] == 0).all()
    assert torch.equal(text(["a cat &amp; the dog"]), text(["a cat & the dog"]))


def test_text_is_cut_at_its_length(umt5):
    text = load_text(umt5)
    text.length = 4
    assert text(["a cat runs on the red mat"]).shape == (1, 4, 24)


def test_text_is_kept(umt5, tmp_path, monkeypatch):
    """The second time the encoder is not asked; another prompt is another file."""
    text = load_text(umt5, cache=tmp_path / "cache")
    first = text(["a cat", "a dog"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(text.encoder, "forward", lambda **k: pytest.fail("asked again"))
    assert torch.equal(text(["a dog", " a  cat"]), first.flip(0))


def test_text_that_is_not_there(tmp_path, umt5):
    with pytest.raises(BadInput, match="tokenizer cannot be read"):
        load_text(tmp_path)
    shutil.copytree(umt5 / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(BadInput, match="text_encoder cannot be read"):
        load_text(tmp_path)(["a cat"])


def test_tensors_that_are_lacking(tmp_path):
    """diffusers and transformers would go on with random ones. The published encoder has its embedding once,
    and a config that says otherwise: that is complete."""
    text = downloads.umt5(tmp_path)
    whole = load_text(text)(["a cat"])
    path, config = text / "text_encoder" / "model.safetensors", text / "text_encoder" / "config.json"
    state = {k: v for k, v in load_file(path).items() if k != "encoder.embed_tokens.weight"}
    save_file(state, path, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    assert torch.equal(load_text(text)(["a cat"]), whole)
    save_file({k: v for k, v in state.items() if "block.1.layer.0" not in k}, path, {"format": "pt"})
    with pytest.raises(BadInput, match="lacks .* tensors: encoder.block.1.layer.0"):
        load_text(text)(["a cat"])
    downloads.vae().save_pretrained(tmp_path / "vae")
    path = next((tmp_path / "vae").glob("*.safetensors"))
    state = load_file(path)
    state.pop("decoder.conv_in.weight")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(BadInput, match="lacks 1 tensors: decoder.conv_in.weight"):
        load_vae(tmp_path)


def test_prompts_are_cleaned_as_wan_cleans_them(tmp_path):
    text = load_text(downloads.umt5(tmp_path))
    assert torch.equal(text(["a\u00a0cat &amp;amp; \uff44og"]), text(["a cat & dog"]))


# -- at real sizes, and without the extra ----------------------------------------


@pytest.mark.parametrize("size, count", [("1.3b", 1_418_996_800), ("14b", 14_288_491_584)])
def test_real_sizes_without_memory(monkeypatch, size, count):
    """A wrapped checkpoint under diffusers' names, all of it on the meta device: the size is read off it."""
    cfg = replace(PRESETS["wan-1.3b"], **memory.WAN_SIZES[size])
    with torch.device("meta"):
        state = VideoDiT(cfg).state_dict()
    names = names_in_diffusers(cfg.layers)
    renamed = {names[name]: x for name, x in state.items()}
    monkeypatch.setattr(wan, "read_tensors", lambda path: renamed)
    net = open_wan("somewhere", PRESETS["wan-1.3b"], exact=False)
    assert sum(p.numel() for p in net.parameters()) == count
    if size == "14b":
        with pytest.raises(BadInput, match="somewhere does not fit the network"):
            open_wan("somewhere", PRESETS["wan-1.3b"])


@pytest.mark.parametrize(
    "load, package", [("vae", "diffusers"), ("text", "transformers"), ("reward", "transformers")]
)
def test_a_missing_extra_is_named(monkeypatch, tmp_path, load, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=r"pip install 'stream-r1\[wan\]'"):
        {"vae": load_vae, "text": load_text, "reward": partial(load_videoalign, video_fps=16)}[load](tmp_path)


def test_shards_of_an_older_save_beside_the_index(cfg, ours, tmp_path):
    """Catches a folder that is read whole where its index names the newer half of it."""
    downloads.transformer(cfg).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = open_wan(tmp_path, cfg)
    part = max(tmp_path.glob("*.safetensors"))
    old = {k: x + 1 for k, x in load_file(part).items()}
    save_file(old, tmp_path / "diffusion_pytorch_model-00099-of-00099.safetensors")
    assert same(open_wan(tmp_path, cfg), expected)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(BadInput, match="twice, also in diffusion_pytorch_model-00099"):
        open_wan(tmp_path, cfg)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    with pytest.raises(BadInput, match="no index of shards"):
        open_wan(tmp_path, cfg)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "pipe.dit.", "pipe.dit._orig_mod.", "blocks."])
def test_names_behind_other_wrappers(cfg, ours, tmp_path, prefix):
    """torch.compile's, of a network and of its blocks, and DiffSynth's."""
    if prefix == "blocks.":
        named = {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", k): x for k, x in ours.state_dict().items()}
    else:
        named = {prefix + k: x for k, x in ours.state_dict().items()}
    save_file(named, tmp_path / "x.safetensors")
    assert same(open_wan(tmp_path / "x.safetensors", cfg), ours)


@pytest.mark.parametrize("part", ["lora_A", "lora_down"])
def test_a_lora_file_says_what_it_is(cfg, tmp_path, part):
    name = f"diffusion_model.blocks.0.self_attn.q.{part}.weight"
    save_file({name: torch.ones(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="holds LoRA factors"):
        open_wan(tmp_path / "x.safetensors", cfg)


def test_what_does_not_fit_says_what_the_file_holds(cfg, tmp_path):
    save_file({"unet.conv_in.weight": torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="Unexpected.*unet.conv_in.weight"):
        open_wan(tmp_path / "x.safetensors", cfg)
