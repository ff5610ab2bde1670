"""
Midway Network: learning representations for recognition and motion from latent dynamics
(Hoang & Ren, 2025, arXiv 2510.05558), in one file that needs nothing but torch.

The idea. Two frames of a video, up to a second apart, differ by motion. An *inverse* model looks at the
features of both and writes down what moved in a few motion latents m; a *forward* model gets the first frame
and m, and has to predict the features of the second frame, token by token. Because m is narrow, it pays to
put motion into m and everything else into the features. The inverse model runs top-down ("midway"): it starts
at the highest level of the encoder, and each lower level refines m, looking at the prediction that the level
above has already made. A DINO loss on smaller crops keeps the features from collapsing.

    loss = DINO(crops) + mean over levels l of || z^_l/|z^_l| - z~_l/|z~_l| ||^2    paper: Eq. 1, Appendix B.1

Glossary (paper's symbol where it differs)
    B       pairs of frames                 D       encoder width
    H W     pixels                          d       width of the midway path
    h w     patch grid                      K       motion tokens (10)
    L       1 + h*w tokens, CLS first       P       DINO prototypes
            (the paper's L: highest level)  level   3, 6, 9 are predicted, 12 starts the top-down path
    z       student features (z_t)          zt      teacher (EMA) features of the target (z~_t+1), no gradient
    v       backward features               vt      the same of the target, from EMA copies of the layers
    m       motion latents                  pred    predicted target features (z^_t+1)
    backward layers: top-down cross-attention from the level above; nothing to do with loss.backward()

    images ──> ViT ──> z_3 z_6 z_9 z_12, then from the top down, at each level l = 9, 6, 3:
        m_l    = midway_l(m_above, [z_12, or the prediction above], [target: vt above]) + m_above
        v_l    = backward_l(z_l, v_above)                                          (no + m_above at level 9)
        pred_l = forward_l([m_l, v_l])     with gated residual connections (Eq. 2)

Left out: the downstream heads (they belong to evaluation). Departures from the paper or from the authors'
released models are marked "our choice". Usage:

    model = Midway(Config(**PRESETS["vit_s"]))       # or: model = load_official("midway-bdd-vit-s-ep300.pth")
    model.train()
    loss, logs = model(dict(motion=..., globals=..., locals=...))
    loss.backward(); model.before_step(progress); optimizer.step(); model.after_step(progress)

    model.eval()
    with torch.no_grad():
        z3, z6, z9, z12 = model.features(images)         # images (B, 3, H, W) in [0, 1] -> 4 times (B, L, D)
        low, mid, top = model.predict(frame_1, frame_2)  # Level(m, v, gates, pred, target, loss), low to high

`python midway.py` runs a demo in seconds. MIT licence: copy this file freely.
"""
import math
import pickle
import types
import zipfile
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass
class Config:
    size: int = 224                         # pixels: motion crops and global crops are size x size
    patch: int = 16                         # pixels
    dim: int = 384                          # D, width of the encoder, backward layers and forward model
    depth: int = 12                         # blocks of the encoder
    heads: int = 6                          # attention heads of the encoder
    levels: tuple[int, ...] = (3, 6, 9, 12) # tapped blocks, counted from 1; all but the last are predicted
    drop_path: float = 0.1                  # of the student's last block, per branch; grows linearly from 0
    motion_tokens: int = 10                 # K, motion latents
    motion_dim: int = 192                   # d, width of the midway path          (Table 5: 96, 384)
    motion_depth: int = 4                   # blocks of the midway path per level  (Table 5: 1, 2)
    motion_heads: int = 3                   # attention heads of the midway path
    forward_depth: int = 4                  # blocks of the forward model per level (Table 5: 1, 2)
    forward_heads: int = 6                  # attention heads of the forward model and the backward layers
    latent_dynamics: bool = True            # off: the DINO baseline               (Table 3, row 1)
    backward: bool = True                   # off: raw features instead of backward layers
    multi_level: bool = True                # off: predict at the highest level but one (9) only
    refinement: bool = True                 # off: midway path sees v of the level above, not its prediction
    gating: bool = True                     # off: plain residual connections in the forward model
    dino_weight: float = 1.0                # weight of the DINO loss; 0 leaves the head out
    head_hidden: int = 2048                 # width of the DINO head's hidden layers
    head_bottleneck: int = 256              # width before the last layer
    prototypes: int = 65536                 # outputs of the DINO head
    ema: float = 0.996                      # teacher momentum at the start; follows a cosine to 1
    local_size: int = 96                    # pixels; our choice: as released (paper: all crops are 224)
    local_crops: int = 8                    # per frame

    @property
    def inputs(self):
        """What the model eats: crops of frame pairs. `blur`: largest sigma in pixels, DINO's 2 at 224."""
        return dict(frames=2, size=self.size, crops=dict(
            local_size=self.local_size, local_crops=self.local_crops if self.dino_weight else 0,
            blur=2 * self.size / 224))


PRESETS = {
    # a laptop CPU: minutes; README has the numbers
    "tiny": dict(
        size=48, patch=8, dim=64, depth=4, heads=2, levels=(1, 2, 4), drop_path=0.0,
        motion_dim=48, motion_depth=2, forward_depth=2, forward_heads=2,
        head_hidden=256, prototypes=256, ema=0.99, local_size=24, local_crops=2,
        head_bottleneck=1024),      # so wide that DINO starts at log(prototypes) and not below it, by luck
    # as published: 66 hours on two A100 (paper); full run not reproduced here
    "vit_s": dict(),
    # as released: the dynamics keep ViT-S's head counts and midway width; 27 hours on eight A6000 (paper)
    "vit_b": dict(dim=768, heads=12),
}

# What train.py starts from, preset by preset; every entry is a flag.
# paper: Table 8; the steps, 60 passes over BDD100K, and min_lr as released
PAPER = dict(
    steps=105_000, batch_size=200, lr=3.90625e-4, min_lr=1e-6,      # lr: 5e-4 per 256 pairs, as in DINO
    warmup=1 / 30, betas=(0.9, 0.999),
    weight_decay=0.04, weight_decay_end=0.4,    # our choice: of all; released: the dynamics keep 0.01, a slip
    clip=3.0)   # our choice: of the one global norm, as is usual; released: tensor by tensor, dynamics never
SCENES = dict(size=320, speed=30.0, pan=30.0, grain=24.0, textures=32)      # for runs without --data
RECIPES = {
    # Small budgets want camera pans of a patch or two over rich textures; sprites come with larger presets.
    "tiny": PAPER | dict(steps=500, batch_size=32, lr=2e-3, min_lr=1e-5, warmup=0.1,
                         scenes=dict(size=96, sprites=0, pan=18.0, zoom=0.0, roll=0.0)),
    "vit_s": PAPER | dict(scenes=SCENES),
    "vit_b": PAPER | dict(scenes=SCENES),
}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet


def normalize(images):
    """Images (..., 3, H, W), uint8 or float in [0, 1], to mean 0 and variance 1 per ImageNet channel."""
    images = images / 255 if images.dtype == torch.uint8 else images
    # channel by channel: no constants to copy to a GPU
    return torch.stack([(images.select(-3, c) - MEAN[c]) / STD[c] for c in range(3)], -3)


def full(x):
    """At least float32, whatever autocast made of it: for losses, gates and meters."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x):
    """Context without autocast on the device of x (on the meta device there is none)."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def interpolate_positions(pos, grid, size):
    """Position embeddings (1, grid*grid, D) of a square grid for another grid size = (h, w): (1, h*w, D)."""
    if size == (grid, grid):
        return pos
    pos = pos.view(1, grid, grid, -1).permute(0, 3, 1, 2)       # (1, D, grid, grid)
    # DINO's quirk: 0.1 patch too much, which keeps floor() from losing a row but shifts the samples a little.
    pos = F.interpolate(pos, scale_factor=tuple((n + 0.1) / grid for n in size), mode="bicubic")
    return pos.flatten(2).mT                                    # (1, h*w, D)


# ---- blocks --------------------------------------------------------------------------------------
class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 times (B, nh, L, hd)
        x = F.scaled_dot_product_attention(q, k, v)             # (B, nh, L, hd)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))    # (B, L, D)


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y):
        B, L, D = x.shape
        q, k, v = (t.view(B, -1, self.heads, D // self.heads).transpose(1, 2)
                   for t in (self.q(x), self.k(y), self.v(y)))
        x = F.scaled_dot_product_attention(q, k, v)             # (B, nh, L, hd)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))    # (B, L, D)


class Block(nn.Module):
    """Pre-norm transformer block; the encoder's with eps 1e-6, biased qkv, drop path, the others without."""

    def __init__(self, dim, heads, eps=1e-5, bias=False, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads, bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 4 * dim)
        self.drop_path = drop_path

    def drop(self, y):
        """Stochastic depth: skip the branch for a random part of the batch."""
        if not (self.training and self.drop_path):
            return y
        keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
        return y * (keep / (1 - self.drop_path)).to(y.dtype)

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class CrossBlock(nn.Module):
    """Backward layer: tokens x look at the level above, y (Ladder-style top-down and lateral connections)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.norm_y = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x, y):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y))
        return x + self.mlp(self.norm3(x))


class Gate(nn.Module):
    """g of Eq. 2: in (0, 1) per token and channel, near 1 at the start (+4 under the sigmoid, paper: B.1)."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)   # our choice: the paper has no LayerNorm here, the released models do
        self.mlp = MLP(dim, dim)

    def forward(self, x):
        return torch.sigmoid(full(self.mlp(self.norm(x))) + 4)  # near 1 bf16 has but a handful of values


class GatedBlock(Block):
    """
    Block of the forward model, h = g * x + Attention(x): a token can let go of what stood there. paper: Eq. 2
    our choice: the gate of block b is computed from the input of block b-1 and not, as Eq. 2 reads, from the
    block's own input, because that is what the released weights were trained with. So each block but the last
    makes its successor's gate.
    """

    def __init__(self, dim, heads, makes_gate):
        super().__init__(dim, heads)
        self.next_gate = Gate(dim) if makes_gate else None

    def forward(self, h, gate, K):
        """
        h (B, K + L, D): K motion tokens, never gated, then the image tokens; gate (B, L, D), or None in the
        first block. Returns the new h and the gate for the next block (None if this block makes none).
        """
        next_gate = None if self.next_gate is None else self.next_gate(h[:, K:])
        residual = h if gate is None else torch.cat([h[:, :K], h[:, K:] * gate], 1)
        h = residual + self.attn(self.norm1(h))                 # paper: Eq. 2
        return h + self.mlp(self.norm2(h)), next_gate


# ---- encoder and DINO ----------------------------------------------------------------------------
class ViT(nn.Module):
    """
    The encoder f: DINO's ViT.
    our choice: its one final LayerNorm is applied to every tapped level, as released; the paper doesn't say.
    """

    def __init__(self, cfg):
        super().__init__()
        self.patch, self.grid = cfg.patch, cfg.size // cfg.patch
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, cfg.dim))
        rates = [cfg.drop_path * i / max(cfg.depth - 1, 1) for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.heads, eps=1e-6, bias=True, drop_path=r) for r in rates)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)

    def forward(self, images, levels):
        """Normalised images (B, 3, H, W) -> list of features (B, L, D) at `levels`, counted from 1."""
        B, _, H, W = images.shape
        if H % self.patch or W % self.patch:
            raise ValueError(
                f"image size {H}x{W} is no multiple of the patch size {self.patch}: crop or resize the "
                f"images to {H // self.patch * self.patch}x{W // self.patch * self.patch}")
        x = self.patch_embed(images).flatten(2).mT              # (B, h*w, D)
        pos = interpolate_positions(self.pos_embed[:, 1:], self.grid, (H // self.patch, W // self.patch))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x + pos], 1)    # (B, L, D)
        taps = []
        for i, block in enumerate(self.blocks[:max(levels)], 1):
            x = block(x)
            if i in levels:
                taps.append(self.norm(x))
        return taps


class DINOHead(nn.Module):
    """CLS features (B, D) -> logits (B, P): 3 layers, then cosines with prototypes, times weight_g."""

    def __init__(self, cfg):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(cfg.dim, cfg.head_hidden), nn.GELU(),
                                 nn.Linear(cfg.head_hidden, cfg.head_hidden), nn.GELU(),
                                 nn.Linear(cfg.head_hidden, cfg.head_bottleneck))
        self.weight_g = nn.Parameter(torch.ones(cfg.prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(cfg.prototypes, cfg.head_bottleneck))

    def forward(self, x):
        x = self.mlp(x)                                         # (B, bottleneck)
        with full_precision(x):     # bf16 logits, divided by a temperature of 0.04, would be too coarse
            weight = self.weight_g * F.normalize(self.weight_v, dim=-1)     # (P, bottleneck)
            return F.linear(F.normalize(full(x), dim=-1), weight)           # (B, P)


class DINOLoss(nn.Module):
    """
    Cross-entropy of the teacher's assignments of 4 global crops (2 boxes, 2 frames) and the student's of all.

    Crops come in order [frame 1: box 1, box 2; frame 2: box 1, box 2; local crops of frame 1; of frame 2].
    A pair (teacher q, student v) counts unless both show the same box, in either frame: 8 global pairs, and
    each local with each q.
    our choice: pairs within one frame count too, as in the released code (paper: "crops across frames").
    """

    STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9
    TEACHER_TEMP = 0.04     # our choice: constant, as released ("as in DINO", with a warm-up, in the paper)

    def __init__(self, prototypes, local_crops=8):
        super().__init__()
        self.pairs = [(q, v) for q in range(4) for v in range(4 + 2 * local_crops) if v >= 4 or (v - q) % 2]
        mask = torch.zeros(4, 4 + 2 * local_crops)
        mask[tuple(zip(*self.pairs))] = 1 / len(self.pairs)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("center", torch.zeros(1, prototypes))
        # sum of the teacher means since the last update, and how many
        self.register_buffer("seen", torch.zeros(1, prototypes), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, student, teacher):
        """Logits of student (crops*B, P) and teacher (4*B, P), crop-major -> loss, logs."""
        with full_precision(student):
            student, teacher = full(student), full(teacher)
            p = ((teacher - self.center) / self.TEACHER_TEMP).softmax(-1).unflatten(0, (4, -1))  # (4, B, P)
            s = (student / self.STUDENT_TEMP).unflatten(0, (self.mask.shape[1], -1))        # (crops, B, P)
            # p . log softmax(s) = p . s - logsumexp(s), since p sums to 1:
            # no (pairs, B, P) tensor, not even log-probabilities
            dots = p.transpose(0, 1) @ s.permute(1, 2, 0) - s.logsumexp(-1).T[:, None]      # (B, 4, crops)
            loss = -(dots * self.mask).sum((1, 2)).mean()
            if self.training:
                self.seen.add_(teacher.mean(0, keepdim=True).detach())
                self.count.add_(1)
            mean = p.mean((0, 1))
            # in nats: of each crop's assignment, log P if it is uniform; and of the mean over the batch,
            # 0 if all crops share one prototype
            logs = dict(teacher_entropy=-(p * (p + 1e-12).log()).sum(-1).mean(),
                        batch_entropy=-(mean * (mean + 1e-12).log()).sum())
        return loss, logs

    @torch.no_grad()
    def update_center(self):
        """Moves the center towards the mean teacher output of a step's micro-batches in all processes."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.seen)
            dist.all_reduce(self.count)
        mean = self.seen / self.count.clamp(min=1)
        self.center.copy_(
            torch.where(self.count > 0, torch.lerp(mean, self.center, self.CENTER_MOMENTUM), self.center))
        self.seen.zero_()
        self.count.zero_()


# ---- the model -----------------------------------------------------------------------------------
def check(cfg):
    """Raises a ValueError that says what to change if a Config can't be built."""
    counts = ("patch", "dim", "heads", "motion_tokens", "motion_dim", "motion_depth", "motion_heads",
              "forward_depth", "forward_heads", "head_hidden", "head_bottleneck", "prototypes")
    for name in counts:
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be at least 1")
    if cfg.local_crops < 0 or not 0 <= cfg.drop_path < 1 or not 0 <= cfg.ema <= 1:
        raise ValueError(f"local_crops={cfg.local_crops}, drop_path={cfg.drop_path}, ema={cfg.ema}: "
                         "want 0 or more, 0 to below 1, 0 to 1")
    for name in ("size", "local_size"):
        pixels = getattr(cfg, name)
        if pixels < cfg.patch or pixels % cfg.patch:
            raise ValueError(f"{name}={pixels} must be a multiple of patch={cfg.patch}: "
                             f"try {max(pixels // cfg.patch, 1) * cfg.patch}")
    for width, heads in (("dim", "heads"), ("motion_dim", "motion_heads"), ("dim", "forward_heads")):
        if getattr(cfg, width) % getattr(cfg, heads):
            raise ValueError(f"{width}={getattr(cfg, width)} must be a multiple of "
                             f"{heads}={getattr(cfg, heads)}")
    if (list(cfg.levels) != sorted(set(cfg.levels)) or len(cfg.levels) < 2 or cfg.levels[0] < 1 or
            cfg.levels[-1] != cfg.depth):
        raise ValueError(f"levels={tuple(cfg.levels)} must be two or more rising block numbers that end with "
                         f"depth={cfg.depth}")
    if not (cfg.latent_dynamics or cfg.dino_weight):
        raise ValueError("nothing to train: latent_dynamics is off and dino_weight is 0")


class Level(NamedTuple):
    """What the dynamics say at one level, for B pairs."""
    m: torch.Tensor                     # (B, K, d)  motion latents that the forward model got
    v: torch.Tensor                     # (B, L, D)  backward features of the source
    gates: list                         # (B, L, D) for each forward block but the first; empty without gating
    pred: torch.Tensor                  # (B, L, D)  predicted features of the target
    target: torch.Tensor                # (B, L, D)  the teacher's features of the target
    loss: torch.Tensor                  # ()         mean of 2 - 2 cos(pred, target)


def prediction_loss(pred, target):
    """Mean over batch and tokens of the squared distance of unit vectors, 2 - 2 cos. paper: Eq. 1"""
    return (F.normalize(full(pred), dim=-1) - F.normalize(full(target), dim=-1)).square().sum(-1).mean()


class Midway(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        check(cfg)
        self.cfg = cfg
        D, d = cfg.dim, cfg.motion_dim
        self.levels = tuple(cfg.levels) if cfg.latent_dynamics else (cfg.depth,)
        n = len(self.levels) - 1            # predicted levels; level index i = 0..n-1 from the lowest
        # our choice: without multi_level the highest level stays; the paper doesn't say which
        self.predicted = list(range(n)) if cfg.multi_level else list(range(n))[-1:]

        self.student = ViT(cfg)
        if cfg.dino_weight:
            self.student_head = DINOHead(cfg)
            self.dino_loss = DINOLoss(cfg.prototypes, cfg.local_crops)
        if cfg.latent_dynamics:
            L, keys = 1 + self.student.grid ** 2, [str(i) for i in self.predicted]
            self.motion_tokens = nn.Parameter(torch.zeros(1, cfg.motion_tokens, d))
            self.motion_pos = nn.Parameter(torch.zeros(1, 2 * L, d))    # halves: source, target
            self.student_embed = nn.Linear(D, d)
            self.motion_proj = nn.Linear(d, D)
            self.motion_blocks = nn.ModuleDict({k: nn.Sequential(
                *(Block(d, cfg.motion_heads) for _ in range(cfg.motion_depth))) for k in keys})
            self.student_backward = nn.ModuleDict({
                k: CrossBlock(D, cfg.forward_heads) for k in keys if cfg.backward})
            self.forward_blocks = nn.ModuleDict({k: nn.ModuleList(
                GatedBlock(D, cfg.forward_heads, makes_gate=cfg.gating and b < cfg.forward_depth - 1)
                for b in range(cfg.forward_depth)) for k in keys})
        self.init_weights()

        # The teacher: copies without gradient that follow the student in after_step().
        self.teacher = deepcopy(self.student)
        if cfg.dino_weight:
            self.teacher_head = deepcopy(self.student_head)
        if cfg.latent_dynamics:
            self.teacher_embed = deepcopy(self.student_embed)
            # our choice: none at the lowest level, where the released code computes one and never uses it
            self.teacher_backward = deepcopy(nn.ModuleDict(list(self.student_backward.items())[1:]))
        for name in self.tied():
            getattr(self, "teacher" + name).requires_grad_(False)
        self.train()

    def init_weights(self):
        """
        Linear weights, CLS, encoder positions, prototypes    truncated normal, std 0.02
        Linear biases, motion positions                       0
        motion tokens                                         normal, std 0.02
        patch embedding, LayerNorm, weight_g                  torch's default, torch's default, 1
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.student.cls_token, std=0.02)
        nn.init.trunc_normal_(self.student.pos_embed, std=0.02)
        if self.cfg.dino_weight:
            nn.init.trunc_normal_(self.student_head.weight_v, std=0.02)
        if self.cfg.latent_dynamics:
            # our choice: the released code starts the motion tokens at zero, and then nothing ever
            # tells them apart: they stay ten copies of one token
            nn.init.normal_(self.motion_tokens, std=0.02)

    def tied(self):
        """Name endings of the modules that exist twice, as student... and teacher..., tied by the EMA."""
        return [name for name in ("", "_head", "_embed", "_backward") if hasattr(self, "student" + name)]

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()                 # no drop path in the teacher
        return self

    # -- the dynamics, top-down --
    def infer(self, i, m, source, target):
        """Inverse dynamics: refines latents m (B, K, d), None at the top, given source, target (B, L, D)."""
        K, L = self.cfg.motion_tokens, source.shape[1]
        tokens = self.motion_tokens.expand(len(source), -1, -1) if m is None else m
        source_pos, target_pos = self.positions(L)
        with torch.no_grad():
            target = self.teacher_embed(target)
        u = torch.cat([tokens, self.student_embed(source) + source_pos, target + target_pos], 1)
        u = self.motion_blocks[str(i)](u)[:, :K]                # (B, K + 2L, d) -> (B, K, d), the midway path
        # our choice: no residual at the top, as released; paper: m^l = midway(...) + m^l+1
        return u if m is None else u + m

    def positions(self, L):
        """The halves of motion_pos for source and target, each (1, L, d)."""
        halves = self.motion_pos.chunk(2, 1)
        if halves[0].shape[1] != L:
            raise ValueError(f"the dynamics were built for {halves[0].shape[1] - 1} patches and got {L - 1}: "
                             f"resize the frames to {self.cfg.size}x{self.cfg.size} pixels")
        return halves

    def predict_forward(self, i, m, v):
        """Forward dynamics at level i: latents m (B, K, d), v (B, L, D) -> prediction (B, L, D), gates."""
        K, gate, gates = self.cfg.motion_tokens, None, []
        h = torch.cat([self.motion_proj(m), v], 1)              # (B, K + L, D)
        for block in self.forward_blocks[str(i)]:
            h, gate = block(h, gate, K)
            if gate is not None:
                gates.append(gate)
        return h[:, K:], gates

    def dynamics(self, z, zt):
        """Levels z of sources, zt of targets, each (B, L, D) -> list of Level, lowest first."""
        m, v, vt = None, z[-1], zt[-1]
        source, levels = z[-1], []
        for i in reversed(self.predicted):
            # our choice: the target enters through the EMA backward layers, as released; paper: raw z~
            m = self.infer(i, m, source, vt)
            if self.cfg.backward:
                v = self.student_backward[str(i)](z[i], v)
                if i != self.predicted[0]:
                    with torch.no_grad():
                        vt = self.teacher_backward[str(i)](zt[i], vt)
            else:       # our choice: the level's own features stand for v and vt alike; the paper doesn't say
                v, vt = z[i], zt[i]
            pred, gates = self.predict_forward(i, m, v)
            # our choice: CLS is a token like the others, predicted and in the loss, as released
            levels.append(Level(m, v, gates, pred, zt[i], prediction_loss(pred, zt[i])))
            # our choice: without refinement v takes the prediction's place; paper: z, before it brings in v
            source = pred if self.cfg.refinement else v
        return levels[::-1]

    # -- training --
    def forward(self, batch):
        """
        batch: `motion` (B, 2, 3, H, W) the dense crop of both frames; `globals` (B, 2, 2, 3, H, W) [frame,
        box]; `locals` (B, 2, local_crops, 3, h, w) [frame, box]; uint8 or float in [0, 1]. Returns the loss
        and a dict of detached scalars.
        """
        loss, logs = 0.0, {}
        if self.cfg.dino_weight:
            dino, cls, meters = self.invariance(batch["globals"], batch["locals"])
            loss = self.cfg.dino_weight * dino
            logs.update(dino=dino, cls_std=full(cls).std(0).mean(), **meters)
        if self.cfg.latent_dynamics:
            levels, z = self.both_directions(batch["motion"])
            # our choice: averaged (paper); the released code sums
            dynamics = sum(level.loss for level in levels) / len(levels)
            loss = loss + dynamics
            feature_std = full(z[-1]).std(0).mean()         # over the frames, place by place
            logs = dict(dynamics=dynamics, feature_std=feature_std) | logs
            for i, level in zip(self.predicted, levels):
                name = self.levels[i]
                logs |= {f"loss_{name}": level.loss, f"m_var_{name}": full(level.m).var(0).mean()}
                if level.gates:
                    logs[f"gate_{name}"] = full(torch.stack([g.mean() for g in level.gates]).mean())
        return loss, {name: value.detach() for name, value in logs.items()}

    def both_directions(self, motion):
        """x -> y and y -> x as one batch, rows [x; y] -> [y; x]. Returns the Levels and the sources' z."""
        frames = normalize(motion).transpose(0, 1).flatten(0, 1)        # (2B, 3, H, W)
        z = self.student(frames, self.levels)
        with torch.no_grad():
            zt = [t.roll(len(motion), 0) for t in self.teacher(frames, self.levels)]
        return self.dynamics(z, zt), z

    def invariance(self, global_crops, local_crops):
        """DINO over the crops of both frames: loss, CLS features (crops*B, D), meters."""
        crops = normalize(global_crops).permute(1, 2, 0, 3, 4, 5).flatten(0, 2)   # (4B, 3, H, W), crop-major
        small = normalize(local_crops).permute(1, 2, 0, 3, 4, 5).flatten(0, 2)    # (2*local_crops*B, 3, h, w)
        last = [self.cfg.depth]
        cls = torch.cat([self.student(images, last)[0][:, 0] for images in (crops, small) if len(images)])
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(crops, last)[0][:, 0])         # (4B, P)
        loss, meters = self.dino_loss(self.student_head(cls), teacher)
        return loss, cls, meters

    def before_step(self, progress):
        """Before each optimiser step, with progress in [0, 1): the DINO head's last layer waits."""
        # our choice: for the first 5 of 300 epochs, as released; the paper doesn't say.
        # No gradient rather than a zero one: AdamW then skips the tensors, decay and moments included.
        if self.cfg.dino_weight and progress < 1 / 60:
            self.student_head.weight_g.grad = self.student_head.weight_v.grad = None

    @torch.no_grad()
    def after_step(self, progress):
        """After each optimiser step, with progress in (0, 1]: EMA of the teacher, and DINO's center."""
        # our choice: DINO's cosine to 1; the released code indexes the schedule wrongly and stays at 0.996
        momentum = 1 - (1 - self.cfg.ema) * (math.cos(math.pi * progress) + 1) / 2
        student, teacher = [], []
        for name in self.tied():
            follow = dict(getattr(self, "teacher" + name).named_parameters())
            student += [p for key, p in getattr(self, "student" + name).named_parameters() if key in follow]
            teacher += follow.values()
        get_ema_multi_avg_fn(momentum)(teacher, student, None)
        if self.cfg.dino_weight:
            self.dino_loss.update_center()

    # -- inference: after model.eval(), which switches off the drop path --
    def features(self, images, teacher=False):
        """Images (B, 3, H, W), uint8 or float in [0, 1] -> the tapped levels (B, L, D), lowest first."""
        return (self.teacher if teacher else self.student)(normalize(images), self.levels)

    def predict(self, source, target):
        """
        What the dynamics say of source -> target, frames (B, 3, H, W), uint8 or float in [0, 1]: a list of
        Level, lowest first. Source goes through the student, target through the teacher. Raises ValueError
        if the model has no dynamics.
        """
        if not self.cfg.latent_dynamics:
            raise ValueError("this model has no latent dynamics (latent_dynamics=False): it can't predict")
        with torch.no_grad():
            zt = self.features(target, teacher=True)
        return self.dynamics(self.features(source), zt)

    @torch.no_grad()
    def report(self, batch):
        """
        What predictions owe to their latents: {row: {column: scalar}} with the mean 2 - 2 cos of each level's
        prediction with its right latents, with those of another pair of the batch (same direction; none if
        there is but one pair), with zeros, and of copying the teacher's source features. Only the latents of
        the level itself are exchanged: v is the source's own, and the levels above stay as they are.
        """
        if not self.cfg.latent_dynamics:
            return {}
        rows, B = {}, len(batch["motion"])
        for i, level in zip(self.predicted, self.both_directions(batch["motion"])[0]):
            other = level.m.unflatten(0, (2, B)).roll(1, 1).flatten(0, 1)       # (2B, K, d)
            latents = dict(right=level.m, shuffled=other, zero=torch.zeros_like(level.m))
            row = {name: prediction_loss(self.predict_forward(i, m, level.v)[0], level.target)
                   for name, m in latents.items() if B > 1 or name != "shuffled"}
            row["copy"] = prediction_loss(level.target.roll(B, 0), level.target)    # rows of x <-> rows of y
            rows[f"2-2cos, level {self.levels[i]}"] = row
        rows["2-2cos, mean"] = {name: sum(r[name] for r in rows.values()) / len(rows) for name in row}
        return rows


# ---- the authors' checkpoints --------------------------------------------------------------------
PLAIN = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("torch", "Size"),
         ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")} | {
    ("builtins", t.__name__)
    for t in (set, frozenset, dict, list, tuple, int, float, complex, bool, str, bytes)}


class Nothing:
    """Stands for an object of a foreign class in a pickle: takes everything, keeps and executes nothing."""
    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = add = update = __init__


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        known = (module, name) in PLAIN or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        known = known or (module in ("torch", "torch.storage") and name.endswith("Storage"))
        return super().find_class(module, name) if known else Nothing


SAFE = types.ModuleType("safe_pickle")      # what torch.load wants to see of a pickle module
SAFE.Unpickler, SAFE.load = Unpickler, lambda file, **kwargs: Unpickler(file, **kwargs).load()

NAMES = (  # of the authors -> ours, applied in this order
    ("backbone.patch_embed.proj.", "patch_embed."), ("backbone.", ""),
    ("dino_head.last_layer.", "_head."), ("dino_head.", "_head."), ("_feature_blocks_", "_backward."),
    (".cross_attn.projq", ".cross_attn.q"), (".cross_attn.projk", ".cross_attn.k"),
    (".cross_attn.projv", ".cross_attn.v"),
    ("forward_predictor_", "forward_blocks."), ("motion_blocks_", "motion_blocks."),
    ("gating_mlps_", "forward_blocks."))


def our_name(section, key):
    """Key of a section of the authors' checkpoint -> key in Midway.state_dict()."""
    key = key.removeprefix("module.")
    gate = key.startswith("gating_mlps_")
    for theirs, ours in NAMES:
        key = key.replace(theirs, ours)
    if section == "motion_loss":
        if "_backward." in key:             # student_backward.2.0.norm1.weight: a list of one block per level
            who, level, _, rest = key.split(".", 3)
            return f"{who}.{level}.{rest}"
        if gate:                            # forward_blocks.2.0.norm_layer.weight
            level, rest = key.removeprefix("forward_blocks.").split(".", 1)
            block, rest = rest.split(".", 1)
            return f"forward_blocks.{level}.{block}.next_gate.{rest.replace('norm_layer.', 'norm.')}"
        return "motion_pos" if key == "pos_embed" else key
    return section + key if key.startswith("_head.") else f"{section}.{key}"


def read_official(path):
    """The dict in a checkpoint file; only tensors and plain containers, other objects become Nothing."""
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("constants.pkl") for name in names):   # torch.load would run it
            raise ValueError("a TorchScript program")
        ckpt = torch.load(path, map_location="cpu", pickle_module=SAFE, weights_only=False)
    except OSError:                         # no such file, a folder, no permission
        raise
    except Exception as error:              # the unpickler raises anything at all on a foreign file
        raise ValueError(f"{path}: not a checkpoint, or a damaged one "
                         f"({type(error).__name__}: {str(error)[:80]})") from None
    sections = ("student", "teacher", "motion_loss")
    missing = [s for s in sections
               if not (isinstance(ckpt, dict) and isinstance(ckpt.get(s), dict) and ckpt[s])]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of the authors' Midway Network: "
                         f"it has no {', '.join(missing)}")
    return ckpt


def official_config(state):
    """Config from the shapes of a converted state dict."""
    dim, _, _, patch = state["student.patch_embed.weight"].shape
    count = lambda prefix: len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})
    depth, n = count("student.blocks."), count("motion_blocks.")
    head = dict(dino_weight=0.0)
    if "student_head.weight_v" in state:
        prototypes, bottleneck = state["student_head.weight_v"].shape
        head = dict(prototypes=prototypes, head_bottleneck=bottleneck,
                    head_hidden=len(state["student_head.mlp.0.bias"]))
    # head counts aren't in the tensors: DINO's are 64 wide, and the dynamics have the released 3 and 6
    return Config(
        size=math.isqrt(state["student.pos_embed"].shape[1] - 1) * patch, patch=patch, dim=dim, depth=depth,
        heads=max(dim // 64, 3), levels=tuple(depth * (i + 1) // (n + 1) for i in range(n + 1)),
        motion_tokens=state["motion_tokens"].shape[1], motion_dim=state["motion_tokens"].shape[2],
        motion_depth=count("motion_blocks.0."), forward_depth=count("forward_blocks.0."),
        backward="student_backward.0.norm1.weight" in state,
        gating="forward_blocks.0.0.next_gate.norm.weight" in state, **head)


def load_official(path):
    """
    Midway from a checkpoint (.pth) of the authors. A missing DINO head, center or optimiser state is said and
    does no harm. Comes in eval mode: model.train() to go on training. Never executes what the file holds.
    Raises OSError if the file can't be read, ValueError that says why it isn't such a checkpoint.
    """
    ckpt = read_official(path)
    state = {our_name(section, key): value for section in ("student", "teacher", "motion_loss")
             for key, value in ckpt[section].items() if isinstance(value, torch.Tensor)}
    heads = [f"{who}_head.weight_v" in state for who in ("student", "teacher")]
    if not all(heads):
        state = {key: value for key, value in state.items() if "_head." not in key}
    center = (ckpt.get("dino_loss") or {}).get("center")
    missing = (["DINO head"] * (not all(heads)) + ["center"] * (center is None) +
               ["optimizer"] * (not ckpt.get("optimizer")))
    if missing:
        print(f"{path}: no {', no '.join(missing)} in this file; the features and the dynamics are complete")
    try:
        cfg = official_config(state)
        if cfg.dino_weight and center is not None:
            state["dino_loss.center"] = center
        state = {key: value for key, value in state.items()
                 if not key.startswith("teacher_backward.0.")}  # never used
        model = Midway(cfg)
        lacks, extra = model.load_state_dict(state, strict=False)
        lacks = [key for key in lacks if not key.endswith(".center")]
        if lacks or extra:
            raise ValueError(f"{len(lacks)} tensors are missing and {len(extra)} unknown, "
                             f"such as {(lacks + extra)[0]}")
    except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of the authors' Midway Network: "
                         f"{' '.join(str(error).split())[:200]}") from None
    return model.eval()


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    model, B = Midway(Config(**PRESETS["tiny"])), 4
    size, small, n = model.cfg.size, model.cfg.local_size, model.cfg.local_crops
    batch = dict(motion=torch.rand(B, 2, 3, size, size), globals=torch.rand(B, 2, 2, 3, size, size),
                 locals=torch.rand(B, 2, n, 3, small, small))
    start = time.perf_counter()
    loss, logs = model(batch)
    loss.backward()
    model.after_step(0.5)
    model.eval()
    print(f"one step of {B} pairs: loss {loss:.3f}, {time.perf_counter() - start:.2f} s")
    trained = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)
    encoder, head, total = trained(model.student), trained(model.student_head), trained(model)
    print(f"trained parameters: encoder {encoder:,}, dynamics {total - encoder - head:,}, DINO head {head:,}")
    print("features:", [tuple(z.shape) for z in model.features(batch["motion"][:, 0])])
    level = model.predict(batch["motion"][:, 0], batch["motion"][:, 1])[-1]
    print(f"top level: m {tuple(level.m.shape)}, v {tuple(level.v.shape)}, pred {tuple(level.pred.shape)}, "
          f"loss {level.loss:.3f}")
    print({name: round(value.item(), 3) for name, value in logs.items()})
