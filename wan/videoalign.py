"""VideoAlign's VideoReward, the reward for real video: Qwen2-VL, three reward tokens, a linear head.

The prompt asks for visual quality, motion quality and text alignment, one after the other; where the answers
would stand are three special tokens, and the head reads one number off each (Liu et al. 2025).

A folder is put together from what its authors publish; nothing of it is copied here:

model_config.json, checkpoint-*/model.pth    huggingface.co/KwaiVGI/VideoReward
prompt_template.py                           github.com/KwaiVGI/VideoAlign; read as text, never run
Qwen2-VL-2B-Instruct/                        config.json and the tokenizer of huggingface.co/Qwen/...
Or the name KwaiVGI/VideoReward: all is fetched but prompt_template.py, which lies where you are.

differs from what Reward Forcing and Stream-R1 release: pixels within [0, 1]; as many frames a second as the
model was trained on (10 of a five-second clip, not all 81); patches keep their place in the saliency map;
every sample is judged, not the first of a batch; one forward serves the scores and the three gradients.
"""

import ast
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from config import BadInput
from engine.checkpoint import fit
from reward import AXES
from wan.hub import extra, local
from wan.weights import read_tensors

TOKENS = tuple(f"<|{axis}_reward|>" for axis in AXES)
QWEN = "Qwen/Qwen2-VL-2B-Instruct"
PATCH, MERGE, PAIR = 14, 2, 2  # pixels a patch, patches a token and side, frames a patch
_FEWEST_PIXELS = 128 * 28 * 28  # a frame; qwen-vl-utils enlarges what is smaller
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, which Qwen2-VL was trained with
_STD = (0.26862954, 0.26130258, 0.27577711)


class VideoAlignReward(nn.Module):
    """`reward(video01, prompts)`: (b F 3 H W) in [0, 1], b strings → (b s), differentiable in the pixels.

    net: transformers' Qwen2VLModel; head: (s, width); settings: `read_settings`; video_fps: of the clips that
    will be judged.
    """

    reads = "prompts"

    def __init__(self, net: nn.Module, head: Tensor, tokenizer, template: str, settings: dict, video_fps):
        super().__init__()
        self.net, self.tokenizer, self.template = net.eval().requires_grad_(False), tokenizer, template
        self.settings, self.video_fps = settings, video_fps
        self.ids = tokenizer.convert_tokens_to_ids(list(TOKENS))
        for name, values in (("mean", settings["mean"]), ("std", settings["std"])):
            self.register_buffer(name, torch.tensor(values))
        self.register_buffer("head", head)
        for name, values in (("pixel_mean", _MEAN), ("pixel_std", _STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, video01: Tensor, prompts: list[str]) -> Tensor:
        rows, grid = self.patches(video01)
        seen = self.net.visual(rows, grid_thw=grid.expand(len(video01), -1)).pooler_output  # (b*n width)
        ids = self.tokens(prompts, int(grid.prod()) // MERGE**2).to(video01.device)
        x = self.net.language_model.embed_tokens(ids)
        place = (ids == self.tokenizer.convert_tokens_to_ids("<|video_pad|>"))[..., None].expand_as(x)
        x = x.masked_scatter(place, seen.to(x.dtype))
        # plain positions, as these weights were trained with; padding comes last, where no answer sees it
        states = self.net.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
        answers = torch.stack([states[ids == i] for i in self.ids], dim=1)  # (b s width)
        scores = (answers.float() * self.head.float()).sum(-1)
        return (scores - self.mean) / self.std

    def sampled(self, frames: int) -> Tensor:
        """Which of a clip's frames are looked at (n,): evenly spread, an even number, four or more."""
        count = max(frames / self.video_fps * self.settings["fps"], 4)
        count = min(round(count / PAIR), frames // PAIR) * PAIR
        return torch.linspace(0, frames - 1, count).round().long()

    def patches(self, video01: Tensor) -> tuple[Tensor, Tensor]:
        """(b F 3 H W) → the vision tower's rows (b*t*h*w, 3*2*14*14), blocks of 2 x 2 patches together as
        Qwen2-VL merges them, and how many there are (t h w). Raises ValueError outside [0, 1]."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        low, high = video01.detach().aminmax()
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(f"video01 must lie in [0, 1]; it spans [{low:.3f}, {high:.3f}]")
        x = video01[:, self.sampled(video01.shape[1]).to(video01.device)].float()
        size = smart_resize(*x.shape[-2:], PATCH * MERGE, _FEWEST_PIXELS, self.settings["pixels"])
        x = F.interpolate(x.flatten(0, 1), size, mode="bicubic", antialias=True).clamp(0, 1)
        x = ((x - self.pixel_mean) / self.pixel_std).unflatten(0, (len(video01), -1))
        grid = torch.tensor([[x.shape[1] // PAIR, size[0] // PATCH, size[1] // PATCH]], device=x.device)
        sizes = dict(r=PAIR, m=MERGE, n=MERGE, p=PATCH, q=PATCH)
        rows = rearrange(x, "b (t r) c (h m p) (w n q) -> (b t h w m n) (c r p q)", **sizes)
        return rows.to(self.net.dtype), grid

    def tokens(self, prompts: list[str], video_tokens: int) -> Tensor:
        """The whole question, one row a prompt (b l), padded at its end. Raises BadInput."""
        refuse_marks(prompts)
        rows = []
        for prompt in prompts:
            question = {"type": "text", "text": self.template.format(text_prompt=prompt)}
            chat = [{"role": "user", "content": [{"type": "video"}, question]}]
            words = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            words = words.replace("<|video_pad|>", "<|video_pad|>" * video_tokens)
            rows.append(torch.tensor(self.tokenizer(words).input_ids))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def refuse_marks(prompts: list[str]) -> None:
    """Raises BadInput for a prompt that would be taken for more than words."""
    for prompt in prompts:
        if "<|" in prompt:
            raise BadInput(f"the prompt {prompt[:60]!r} holds the mark of a special token, '<|'")


def load_videoalign(folder: str | Path, video_fps: float) -> VideoAlignReward:
    """See the top of this file for what belongs into the folder. Raises BadInput for what is missing."""
    transformers = extra("transformers")
    given, folder = Path(folder), Path(local(str(folder), ("model_config.json", "checkpoint-*/model.pth")))
    fetched = given != folder
    settings, lora_scale = read_settings(folder / "model_config.json")
    template = read_template(("" if fetched else folder) / Path("prompt_template.py"))
    if any(template.count(token) != 1 for token in TOKENS):
        raise BadInput(f"prompt_template.py of {folder} does not ask once for each of {' '.join(TOKENS)}")
    weights = sorted(folder.glob("checkpoint-*/model.pth"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not weights:
        raise BadInput(f"{folder} lacks checkpoint-*/model.pth of VideoReward")
    tensors = plain_weights(read_tensors(weights[-1]), lora_scale)
    try:
        qwen = local(QWEN, ("*.json", "*.txt", "*.jinja")) if fetched else folder / QWEN.partition("/")[2]
        tokenizer = transformers.AutoTokenizer.from_pretrained(qwen, local_files_only=True)
        made = transformers.Qwen2VLConfig.from_pretrained(qwen, local_files_only=True)
    except (OSError, ValueError) as error:
        what = f"{folder} lacks Qwen2-VL-2B-Instruct/ with config.json and tokenizer"
        raise BadInput(f"{what}: {str(error).splitlines()[0]}") from error
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    head, embedding = (tensors.get(k) for k in ("rm_head.weight", "language_model.embed_tokens.weight"))
    if head is None or embedding is None or len(head) != len(TOKENS) or len(embedding) < len(tokenizer):
        raise BadInput(f"{weights[-1]} holds no Qwen2-VL with a head of {len(TOKENS)} rewards")
    made.text_config.vocab_size = len(embedding)
    net = transformers.Qwen2VLModel._from_config(made, dtype=embedding.dtype)
    fit(net, {k: v for k, v in tensors.items() if k != "rm_head.weight"}, weights[-1])
    return VideoAlignReward(net, head, tokenizer, template, settings, video_fps)


def read_settings(path: Path) -> tuple[dict, float]:
    """model_config.json → frames looked at a second, largest frame in pixels, mean and deviation of the raw
    scores on each axis; and how much the low-rank updates count. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"{path.parent} lacks model_config.json of VideoReward")
    try:
        words = json.loads(path.read_text())
        data, scale, lora = words["data_config"], words["inference_config"], words["peft_lora_config"]
        mean, std = (tuple(float(scale[f"{axis}_{what}"]) for axis in AXES) for what in ("mean", "std"))
        settings = dict(fps=float(data["fps"]), pixels=int(data["max_frame_pixels"]), mean=mean, std=std)
        kinds = words["model_config"]["reward_token"], data["sample_type"], data["prompt_template_type"]
        rank = lora["lora_r"] ** 0.5 if lora["use_rslora"] else lora["lora_r"]
        strength = lora["lora_alpha"] / rank
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not VideoReward's: {type(error).__name__} {error}") from error
    if kinds != ("special", "uniform", "detailed_special"):
        raise BadInput(f"{path}: {kinds} is not possible; allowed: special, uniform, detailed_special")
    return settings, strength


def read_template(path: Path) -> str:
    """The question, from the assignment that holds it: the file is read, not run. Raises BadInput."""
    name = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return ast.literal_eval(node.value)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"{path} cannot be read as VideoAlign's prompt_template.py: {error!r}") from error
    raise BadInput(f"{path} holds no {name}; needed: prompt_template.py of github.com/KwaiVGI/VideoAlign")


def plain_weights(tensors: dict[str, Tensor], lora_scale: float) -> dict[str, Tensor]:
    """PEFT's names and low-rank updates → today's names of transformers, updates added in."""
    plain = {}
    for name, x in tensors.items():
        if ".lora_" in name or name.endswith("lm_head.weight"):
            continue
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            down, up = (tensors[f"{stem}lora_{part}.default.weight"].float() for part in "AB")
            x = (x.float() + lora_scale * up @ down).to(x.dtype)
        name = re.sub(r"^(base_model\.|model\.)+", "", name).replace(".base_layer.", ".")
        known = name.startswith(("visual.", "language_model.", "rm_head."))
        plain[name if known else f"language_model.{name}"] = x
    return plain
