"""What a person would download, with random weights and tiny: Wan2.1 in diffusers' format, VideoReward."""

import json
from pathlib import Path

import pytest
import torch

from wan.videoalign import TOKENS

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402


def transformer(cfg) -> torch.nn.Module:
    """diffusers' class in cfg's size."""
    return diffusers.WanTransformer3DModel(
        patch_size=(cfg.patch_time, cfg.patch, cfg.patch), num_attention_heads=cfg.heads,
        attention_head_dim=cfg.dim // cfg.heads, in_channels=cfg.channels, out_channels=cfg.channels,
        text_dim=cfg.text_width, freq_dim=cfg.time_freqs, ffn_dim=cfg.ffn, num_layers=cfg.layers,
    )  # fmt: skip


def vae(**more) -> torch.nn.Module:
    """4 of 16 channels, their own means and deviations."""
    torch.manual_seed(0)
    stats = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.5, 1.0, 0.5]}
    return diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **stats, **more).eval()


def umt5(folder: Path) -> Path:
    """A text encoder and a tokenizer of a dozen words."""
    words = ["<pad>", "</s>", "<unk>", *"a cat dog runs on the red mat &".split()]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **marks)
    fast.save_pretrained(folder / "tokenizer")
    sizes = dict(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    torch.manual_seed(0)
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes, dropout_rate=0.0)).eval()
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def wan(folder: Path, cfg, seed: int = 0) -> Path:
    """The whole folder: transformer, vae, text encoder, tokenizer."""
    torch.manual_seed(seed)
    transformer(cfg).save_pretrained(folder / "transformer")
    vae().save_pretrained(folder / "vae")
    return umt5(folder)


WORDS = "rate how it looks moves and fits a cat dog runs on the red mat : user assistant".split()
TEMPLATE = f"rate how it looks {TOKENS[0]} moves {TOKENS[1]} and fits : {{text_prompt}} {TOKENS[2]}"
CHAT = """{% for message in messages %}<|im_start|> {{ message.role }} {% for part in message.content %}\
{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|> {% else %}{{ part.text }} \
{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant\
{% endif %}"""
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
SETTINGS = {
    "data_config": {"fps": 2.0, "max_frame_pixels": 200704, "sample_type": "uniform"}
    | {"prompt_template_type": "detailed_special"},
    "model_config": {"reward_token": "special"},
    "peft_lora_config": {"lora_r": 4, "lora_alpha": 12, "use_rslora": False},
    "inference_config": {"VQ_mean": 0.1, "VQ_std": 2.0, "MQ_mean": -0.3, "MQ_std": 0.5}
    | {"TA_mean": 0.2, "TA_std": 1.5},
}  # fmt: skip


def small_config(vocabulary: int):
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=512)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


def videoreward(folder: Path) -> Path:
    """VideoReward: low-rank updates of the text model beside its weights, under PEFT's old names."""
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")
    fast.add_tokens(MARKS, special_tokens=True)
    fast.chat_template = CHAT
    fast.save_pretrained(folder / "Qwen2-VL-2B-Instruct")
    small_config(500).save_pretrained(folder / "Qwen2-VL-2B-Instruct")
    torch.manual_seed(0)
    net = transformers.Qwen2VLModel._from_config(small_config(len(fast) + len(TOKENS)))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim > 1 else 1.0)
    state = {"base_model.model.rm_head.weight": torch.randn(3, 32)}
    for name, x in net.state_dict().items():
        name = "base_model.model." + name.replace("language_model.", "model.")
        if "_proj" in name and "visual" not in name and name.endswith("weight"):
            stem = name.removesuffix("weight")
            state[f"{stem}lora_A.default.weight"] = torch.randn(4, x.shape[1]) / 10
            state[f"{stem}lora_B.default.weight"] = torch.randn(x.shape[0], 4) / 10
        layered = "_proj" in name and "visual" not in name
        state[name.replace("_proj.", "_proj.base_layer.") if layered else name] = x
    state["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    for step in (9, 10):  # the newer one counts, by number and not by spelling
        (folder / f"checkpoint-{step}").mkdir()
        torch.save(state if step == 10 else {}, folder / f"checkpoint-{step}" / "model.pth")
    (folder / "model_config.json").write_text(json.dumps(SETTINGS))
    source = f"raise SystemExit('run, not read')\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n"
    (folder / "prompt_template.py").write_text(source)
    return folder
