"""videoalign.py against transformers' own Qwen2-VL: tiny, with random weights, saved as VideoReward is."""

import json
import shutil

import pytest
import torch

from config import BadInput
from reward import AXES
from saliency import reward_saliency
from wan.videoalign import load_videoalign

transformers = pytest.importorskip("transformers")
import downloads  # noqa: E402
from downloads import SETTINGS, TEMPLATE, TOKENS, small_config  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return downloads.videoreward(tmp_path_factory.mktemp("videoreward"))


@pytest.fixture(scope="module")
def reward(folder):
    return load_videoalign(folder, video_fps=16)


@pytest.fixture(scope="module")
def video01():
    return torch.rand(2, 33, 3, 60, 104, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a cat runs on the red mat", "a dog"]


def merged(folder) -> tuple:
    """An oracle: PEFT's formula, transformers' whole model, one sample at a time."""
    state = torch.load(folder / "checkpoint-10" / "model.pth")
    head = state.pop("base_model.model.rm_head.weight")
    plain = {k: v for k, v in state.items() if "lora_" not in k and "lm_head" not in k}
    for name in [k for k in plain if k.endswith("base_layer.weight")]:
        stem = name.removesuffix("base_layer.weight")
        a, b = state[f"{stem}lora_A.default.weight"], state[f"{stem}lora_B.default.weight"]
        plain[name] = plain[name] + 12 / 4 * b @ a
    names = {k: k.replace("base_layer.", "").replace("base_model.model.", "") for k in plain}
    plain = {names[k].replace("model.", "language_model.", 1) if "visual" not in k else names[k]: v
             for k, v in plain.items()}  # fmt: skip
    net = transformers.Qwen2VLModel._from_config(
        small_config(len(plain["language_model.embed_tokens.weight"]))
    )
    net.load_state_dict(plain)
    return net.eval(), head


@torch.no_grad()
def test_scores_equal_transformers(folder, reward, video01):
    """Merged updates, the place of the video, positions, the head and its scale, each sample by itself."""
    net, head = merged(folder)
    tokenizer, scale = reward.tokenizer, SETTINGS["inference_config"]
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    net.config.video_token_id = video
    for i, prompt in enumerate(PROMPTS):
        rows, grid = reward.patches(video01[i : i + 1])
        asked = "<|im_start|> user <|vision_start|>" + "<|video_pad|>" * (int(grid.prod()) // 4)
        asked += f"<|vision_end|> {TEMPLATE.format(text_prompt=prompt)} <|im_end|><|im_start|> assistant"
        ids = torch.tensor([tokenizer(asked).input_ids])
        places = torch.arange(ids.shape[1]).expand(3, 1, -1)
        states = net(
            input_ids=ids, pixel_values_videos=rows, video_grid_thw=grid, position_ids=places,
            mm_token_type_ids=(ids == video) * 2,
        ).last_hidden_state[0]  # fmt: skip
        where = [int((ids[0] == tokenizer.convert_tokens_to_ids(t)).nonzero()) for t in TOKENS]
        expected = [float(states[w] @ head[s]) for s, w in enumerate(where)]
        expected = [(x - scale[f"{a}_mean"]) / scale[f"{a}_std"] for a, x in zip(AXES, expected, strict=True)]
        found = reward(video01[i : i + 1], [prompt])[0]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_batch_equals_its_samples(reward, video01):
    """Prompts of unlike length are padded; no sample may see its neighbour or its padding."""
    both = reward(video01, PROMPTS)
    alone = torch.cat([reward(video01[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
    other = reward(video01, PROMPTS[::-1])
    assert (other - both)[:, 2].abs().min() > 1e-3  # only the text's axis stands behind the text
    torch.testing.assert_close(other[:, :2], both[:, :2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_equal_the_processor(reward, video01):
    """Normalised, in blocks of 2 x 2, frames in pairs: a frame's patches as the image processor has them."""
    rows, grid = reward.patches(video01[:1])
    assert grid.tolist() == [[2, 18, 30]]  # 60 x 104 was enlarged to the fewest pixels allowed
    sharp = torch.rand(1, 33, 3, 252, 420)
    rows, grid = reward.patches(sharp)
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    frames = [f.permute(1, 2, 0).numpy() for f in sharp[0, reward.sampled(33)]]
    theirs = [
        torch.as_tensor(processor(f, do_rescale=False, return_tensors="pt").pixel_values) for f in frames
    ]
    theirs = torch.stack(theirs).unflatten(-1, (3, 2, 196))[..., 0, :]  # a picture is a frame twice: once
    pairs = torch.stack([theirs[::2], theirs[1::2]], dim=-2).flatten(-3)  # (t n 3*2*196)
    torch.testing.assert_close(rows.view_as(pairs), pairs, atol=1e-5, rtol=1e-5)


def test_frames_that_are_looked_at(reward):
    assert reward.sampled(81).tolist() == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]  # 5 s at 2 a second
    assert reward.sampled(33).tolist() == [0, 11, 21, 32] and reward.sampled(5).tolist() == [0, 1, 3, 4]
    with torch.no_grad():
        a, b = torch.rand(2, 1, 33, 3, 28, 28)
        b[:, reward.sampled(33)] = a[:, reward.sampled(33)]
        torch.testing.assert_close(reward(a, ["a cat"]), reward(b, ["a cat"]))


def test_saliency_lies_where_the_reward_looks(reward, video01):
    """Unseen frames take the map of the seen frame next to them; brightening a region moves the score as its
    gradient says."""
    scores, saliency = reward_saliency(reward, video01, PROMPTS, reward.sampled(33))
    assert saliency.shape == (2, 3, 33, 60, 104) and (saliency.sum((3, 4)) > 0).all()
    assert torch.equal(saliency[:, :, 0], saliency[:, :, 5]) and not torch.equal(
        saliency[:, :, 0], saliency[:, :, 6]
    )
    torch.testing.assert_close(scores, reward(video01, PROMPTS), atol=1e-5, rtol=1e-5)
    video = video01[:1].clone().requires_grad_()
    slope = torch.autograd.grad(reward(video, PROMPTS[:1])[0, 1], video)[0]
    step = torch.zeros_like(slope)
    step[:, 11, :, 20:30, 40:50] = 1e-3 * slope[:, 11, :, 20:30, 40:50].sign()
    with torch.no_grad():
        moved = reward((video + step).clamp(0, 1), PROMPTS[:1])[0, 1] - scores[0, 1]
    torch.testing.assert_close(moved, (slope * step).sum(), atol=2e-4, rtol=0.2)


def test_missing_and_broken_parts(folder, tmp_path):
    def refused(change, needle):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(BadInput, match=needle) as error:
            load_videoalign(copy, 16)
        assert "\n" not in str(error.value)
        shutil.rmtree(copy)

    def settings(group, key, value):
        def change(copy):
            words = json.loads(json.dumps(SETTINGS))
            words[group][key] = value
            (copy / "model_config.json").write_text(json.dumps(words))

        return change

    refused(lambda c: (c / "model_config.json").unlink(), "lacks model_config.json")
    refused(settings("inference_config", "VQ_std", None), "is not VideoReward")
    refused(settings("model_config", "reward_token", "last"), "allowed: special, uniform, detailed_special")
    refused(lambda c: (c / "prompt_template.py").unlink(), "prompt_template.py")
    refused(lambda c: (c / "prompt_template.py").write_text("A = 1"), "holds no DETAILED_PROMPT")
    short = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = 'rate {text_prompt}'"
    refused(lambda c: (c / "prompt_template.py").write_text(short), "does not ask once for each")
    refused(lambda c: [shutil.rmtree(p) for p in c.glob("checkpoint-*")], "lacks checkpoint")
    refused(lambda c: shutil.rmtree(c / "checkpoint-10"), "no Qwen2-VL with a head of 3")
    refused(lambda c: shutil.rmtree(c / "Qwen2-VL-2B-Instruct"), "lacks Qwen2-VL-2B-Instruct")


def test_prompts_and_pixels_that_cannot_be(reward):
    with pytest.raises(BadInput, match="special token"):
        reward(torch.rand(1, 5, 3, 28, 28), ["a cat <|TA_reward|>"])
    with pytest.raises(ValueError, match="must lie in"):
        reward(torch.rand(1, 5, 3, 28, 28) * 255, ["a cat"])
