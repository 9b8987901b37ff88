# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Stream-R1 in one hour
#
# Seven small experiments, each with the same four moves: **predict** what will happen, **run** it, **break** it, **mend**
# it. Every cell is short and calls the functions that training uses, so what you see is what `train.py` does. No GPU is
# needed.
#
# To open it: clone the repository, `pip install -c constraints.txt -e ".[study]" jupyterlab`, then `jupyter lab
# docs/one_hour.ipynb`. In Colab, upload the notebook, then clone the repository in its first cell.

# %%
import os
import sys

if not os.path.exists("model.py"):  # a notebook starts in its own folder
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import matplotlib.pyplot as plt
import torch

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## 1. Flow matching in one dimension
# Data are two narrow bumps, noise is one wide bump. A network learns the velocity `ε - x` at every point between them.
#
# **Predict:** with 50 small Euler steps from noise, what does the histogram look like? And with 1 step?

# %%
from model import add_noise

layers = [torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU()]
net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))
opt = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(1500):
    x = (torch.randint(2, (512, 1)) * 2 - 1) + 0.1 * torch.randn(512, 1)  # data: bumps at -1 and +1
    noise, t = torch.randn(512, 1), torch.rand(512, 1)
    xt = add_noise(x.view(-1, 1, 1, 1, 1), noise.view(-1, 1, 1, 1, 1), t).view(-1, 1)
    loss = (net(torch.cat([xt, t], 1)) - (noise - x)).square().mean()
    opt.zero_grad(), loss.backward(), opt.step()


# %%
@torch.no_grad()
def euler(steps):
    x = torch.randn(4000, 1)
    for i in range(steps):
        t = torch.full((4000, 1), 1 - i / steps)
        x = x - net(torch.cat([x, t], 1)) / steps
    return x.flatten()


for steps in (50, 1):  # break it: one step instead of fifty
    plt.hist(euler(steps), 80, range=(-2, 2), alpha=0.6, label=f"{steps} steps")
plt.legend(), plt.title("samples of a flow"), plt.show()

# %% [markdown]
# Fifty steps find both bumps. One step lands in the middle, on the mean of all data: the velocity at pure noise points to
# the average of what may come. A few-step student must learn to do better than this, and that is what distillation is for.

# %% [markdown]
# ## 2. Distribution matching: two Gaussians
# The student is `x = θ + z`, the teacher is a Gaussian around 1. DMD noises a sample, asks critic (the student's own
# distribution) and teacher for their clean estimates, and moves the sample along the difference. Here both estimates are
# exact formulas.
#
# **Predict:** where does θ end? What if the sign of the difference is wrong?

# %%
from dmd import dmd_loss

start = -2.0  # @param {type:"slider", min:-3, max:3, step:0.5}


def clean_estimate(xt, t, mean):  # of a Gaussian with variance 1
    a = 1 - t
    return mean + a / (a**2 + t**2) * (xt - a * mean)


# %%


def distil(sign, weight=lambda x: torch.ones_like(x), steps=200):
    theta, path = torch.tensor(start, requires_grad=True), []
    for _ in range(steps):
        x = (theta + torch.randn(256)).view(-1, 1, 1, 1, 1)
        t = torch.rand(256, 1)
        xt = add_noise(x.detach(), torch.randn_like(x), t)
        t = t.view(-1, 1, 1, 1, 1)
        g = clean_estimate(xt, t, theta.detach()) - clean_estimate(xt, t, 1.0)  # critic - teacher
        (grad,) = torch.autograd.grad(dmd_loss(x, sign * g, weight(x.detach())), theta)
        theta = (theta - 0.1 * grad).detach().requires_grad_()
        path.append(theta.item())
    return path


# %%
plt.plot(distil(+1), label="critic - teacher")
plt.plot(distil(-1, steps=40), label="teacher - critic: broken")
plt.axhline(1, color="grey"), plt.ylim(-6, 3), plt.xlabel("step"), plt.ylabel("θ"), plt.legend(), plt.show()

# %% [markdown]
# θ goes to 1 and stays there, because the difference is zero once both distributions agree. With the wrong sign the
# student flees from its teacher faster and faster. Try `weight=lambda x: (2 * x).exp()` in `distil(+1, ...)`: the way is
# another one, the end is nearly the same.

# %% [markdown]
# ## 3. A chunk remembers: the cache
# The student makes a video in chunks of four frames. It knows the past only through keys and values in a cache.
#
# **Predict:** what happens to a moving circle if the cache is emptied after every chunk?

# %%
from itertools import islice

from config import ROOT, build, from_words
from engine.checkpoint import read_header
from engine.rng import rng_for
from model import ListCache
from networks import load_net
from rollout import rollout, stream
from world.words import parse, tokenize

# %%
nets = ROOT / "assets/tiny"
cfg = from_words(read_header(nets / "stream_r1.safetensors")["config"], {"device": "cpu"})
student, codec, reward = (
    load_net(nets / f"{file}.safetensors", cfg, kind)
    for file, kind in (("stream_r1", "student"), ("codec", "codec"), ("reward", "reward"))
)


# %%
def read(prompt):
    return tokenize([parse(prompt, cfg.objects)], cfg.text_length, cfg.text_width)


def show(video01, title, every=2):  # (F 3 H W)
    frames = torch.nn.functional.pad(video01[::every].clamp(0, 1), (0, 1), value=1)
    plt.figure(figsize=(12, 1.6))
    plt.imshow(torch.cat(list(frames.permute(0, 2, 3, 1)), 1)), plt.axis("off"), plt.title(title), plt.show()


# %%
class Forgets(ListCache):
    def commit(self, kv):
        self.reset()


text = read("a red circle moving left quickly on a black background")
with torch.no_grad():
    for cache in (ListCache, Forgets):
        chunks = islice(stream(student, text, cfg, [rng_for(0, "demo")], cache=cache(student, cfg)), 4)
        show(codec.decode(torch.cat(list(chunks), 1))[0], cache.__name__)

# %% [markdown]
# With the cache the circle goes on where it was. Without it every chunk is a first chunk, and the circle jumps to a new
# place every four frames.

# %% [markdown]
# ## 4. A rollout: four steps a chunk
# Each chunk starts as noise and is denoised at four noise levels; between them the prediction is noised again. Training
# stops a rollout at one random level, its *exit*.
#
# **Predict:** how good is a clip after one of the four steps?

# %%
with torch.no_grad():
    for exit in range(4):
        x = rollout(student, text, cfg, [rng_for(0, "demo")], exit=exit)
        show(codec.decode(x)[0], f"exit {exit}: {exit + 1} of 4 steps a chunk, latent {tuple(x.shape)}")

# %% [markdown]
# One step shows where something red may be; the second makes it a circle, the others sharpen it. All exits share their
# noise, so exits 1 to 3 show the same clip.

# %% [markdown]
# ## 5. How much does a rollout count? exp(β r)
# The reward has three axes: visual quality, motion quality, text alignment. Stream-R1 weighs a rollout by exp(β r).
#
# **Predict:** of eight clips the best one is made to run backwards. What is its weight now? What does a larger β do to the
# others?

# %%
from reward import effective_share, rollout_weight

texts = text.expand(8, -1, -1)
with torch.no_grad():
    clips = codec.decode(rollout(student, texts, cfg, [rng_for(i, "demo") for i in range(8)]))
    best = reward(clips, texts).mean(1).argmax()
    clips[best] = clips[best].flip(0)  # break it: the best clip runs backwards
    r = reward(clips, texts).mean(1)
for i, beta in enumerate((0.5, 2.0, 8.0)):
    w = rollout_weight(r, build("tiny", {"beta": beta}))
    plt.bar(
        torch.arange(8) + 0.25 * i, w / w.mean(), 0.25, label=f"β = {beta:g}, ess {effective_share(w):.2f}"
    )
plt.xlabel(f"clip; {best} runs backwards"), plt.ylabel("weight / mean"), plt.legend(), plt.show()

# %% [markdown]
# The clip that was best weighs less than the mean now, at β = 8 next to nothing. With a large β a few clips take it all: the effective sample size
# `ess` says which share of the batch is left.

# %% [markdown]
# ## 6. Where does the reward look? Saliency
# The gradient of each axis with respect to pixels says where the score reacts. Stream-R1 turns it into weights over frames
# and latent cells.
#
# **Predict:** one frame gets a bright square where nothing should be. Where does the weight go?

# %%
from saliency import intra_weight, reward_saliency, to_latent_grid

whole = clips[(best + 1) % 8][None]
spoilt = whole.clone()
spoilt[:, 8:10, :, 2:8, 24:30] = 1.0  # break it: a square in the corner of two frames
for video01, name in ((whole, "as it was"), (spoilt, "with a square")):
    scores, pixels = reward_saliency(reward, video01, text)
    w = intra_weight(to_latent_grid(pixels, *cfg.latent_shape[1:]), scores, cfg)[0]  # (f 1 h w)
    show(
        w.repeat_interleave(8, -1).repeat_interleave(8, -2).expand(-1, 3, -1, -1) / w.max(),
        f"W_intra, {name}",
    )
    print(name, "scores", [round(s, 2) for s in scores[0].tolist()])

# %% [markdown]
# The scores of motion and text fall, and the weight goes to the corner with the square. The mean weight stays 1: attention moves, the size of
# the loss does not.

# %% [markdown]
# ## 7. A stream that changes its mind
# `stream` never ends. A dictionary of prompts changes the prompt on the way: the cache is rebuilt with the new words.
#
# **Predict:** does the object stay where it is when its colour changes?

# %%
texts = {0: text, 3: read("a blue circle moving left quickly on a black background")}
with torch.no_grad():
    chunks = list(islice(stream(student, texts, cfg, [rng_for(0, "demo")]), 7))
    show(codec.decode(torch.cat(chunks, 1))[0], "red, then blue from chunk 3", every=2)

# %% [markdown]
# The circle goes on along its way and turns blue. To go on: `python train.py` distils this student anew in minutes, and
# [symptoms.md](symptoms.md) shows what defects look like.
