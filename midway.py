"""
Midway Network: learning representations for recognition and motion from latent dynamics
(Hoang & Ren, 2025, arXiv 2510.05558), in one file that needs nothing but torch.

Two frames of a video, up to a second apart, differ by motion. An *inverse* model looks at the
features of both and writes down what moved in a few motion latents m; a *forward* model gets the
first frame and m, and predicts the features of the second frame, token by token. Because m is
narrow, it pays to put motion into m and all else into the features. The inverse model runs top-down
("midway"): it starts at the highest level of the encoder, and each lower level refines m, looking
at the prediction that the level above has made. A DINO loss keeps the features from collapsing.

    images ──> ViT ──> z_3 z_6 z_9 z_12, then from the top down, at each level l = 9, 6, 3:
        m_l    = midway_l(m_above, [z_12, or the prediction above], [target: vt above]) + m_above
        v_l    = backward_l(z_l, v_above)                                (no + m_above at level 9)
        pred_l = forward_l([m_l, v_l])     with gated residual connections (Eq. 2)
    loss = DINO(crops) + mean over levels of || z^_l/|z^_l| - z~_l/|z~_l| ||^2   paper: Eq. 1, B.1

    B     pairs of frames                 D     encoder width
    H W   pixels                          d     width of the midway path
    h w   patch grid                      K     motion tokens (10)
    L     1 + h*w tokens, CLS first       P     DINO prototypes
    level 3, 6, 9 are predicted, 12 starts the top-down path (the paper's L is the highest level)
    z     student features (z_t)          zt    teacher (EMA) features of the target (z~_t+1)
    v     backward features               vt    the same of the target, by EMA layers
    m     motion latents                  pred  predicted target features (z^_t+1)
    backward layers: cross-attention to the level above; nothing to do with loss.backward()

Departures from the paper or from the released models are marked "our choice". Usage:

    model = Midway(Config(**PRESETS["vit_s"]))       # or load_official(PATH).train()
    batch = dict(                               # uint8, or float in [0, 1]; data.MultiCrop makes it
        motion=...,                             # (B, 2, 3, 224, 224)     one crop, the same of both
        globals=...,                            # (B, 2, 2, 3, 224, 224)  [frame, box], for DINO
        locals=...)                             # (B, 2, 8, 3, 96, 96)    [frame, box], for DINO
    loss, logs = model(batch)                   # then loss.backward(), model.before_step(progress),
                                                # optimizer.step(), model.after_step(progress)
    z3, z6, z9, z12 = model.eval().features(images)  # (B, 3, H, W) -> 4 times (B, L, D)
    low, mid, top = model.predict(frame_1, frame_2)  # Level(m, v, gates, pred, target, loss)

`python midway.py` runs a demo in seconds. MIT licence: copy this file freely.
"""
import argparse
import math
import re
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
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
    dim: int = 384                          # D, width of encoder, backward layers, forward model
    depth: int = 12                         # blocks of the encoder
    heads: int = 6                          # attention heads of the encoder
    levels: tuple[int, ...] = (3, 6, 9, 12) # tapped blocks, from 1; all but the last are predicted
    drop_path: float = 0.1                  # of the student's last block, per branch; rises from 0
    motion_tokens: int = 10                 # K, motion latents
    motion_dim: int = 192                   # d, width of the midway path         (Table 5: 96, 384)
    motion_depth: int = 4                   # blocks of the midway path per level (Table 5: 1, 2)
    motion_heads: int = 3                   # attention heads of the midway path
    forward_depth: int = 4                  # blocks of the forward model per level (Table 5: 1, 2)
    forward_heads: int = 6                  # attention heads of forward model and backward layers
    latent_dynamics: bool = True            # off: the DINO baseline                (Table 3, row 1)
    backward: bool = True                   # off: raw features instead of backward layers
    multi_level: bool = True                # off: predict at the highest level but one (9) only
    refinement: bool = True                 # off: midway path sees features, not predictions
    gating: bool = True                     # off: plain residual connections in the forward model
    dino_weight: float = 1.0                # weight of the DINO loss; 0 leaves the head out
    head_hidden: int = 2048                 # width of the DINO head's hidden layers
    head_bottleneck: int = 256              # width before the last layer
    prototypes: int = 65536                 # outputs of the DINO head
    ema: float = 0.996                      # teacher momentum at the start; follows a cosine to 1
    break_symmetry: bool = False            # our choice: an init that finds motion in minutes
    local_size: int = 96                    # pixels; our choice: as released (paper: all crops 224)
    local_crops: int = 8                    # per frame

    @property
    def inputs(self):
        """What the model expects: crops of frame pairs. blur: largest sigma in pixels, 2 at 224."""
        crops = dict(local_size=self.local_size, blur=2 * self.size / 224)
        crops["local_crops"] = self.local_crops if self.dino_weight else 0
        return dict(frames=2, size=self.size, crops=crops)

PRESETS = {
    # a laptop CPU: minutes; README has the numbers
    # our choice: one motion token; with ten, what is in the frame comes in beside its motion
    "tiny": dict(
        size=32, patch=4, dim=64, depth=3, heads=2, levels=(1, 3), drop_path=0.0,
        motion_tokens=1, motion_dim=48, motion_depth=2, motion_heads=1, break_symmetry=True,
        forward_depth=2, forward_heads=2,
        head_hidden=256, prototypes=256, ema=0.99, local_size=16, local_crops=2,
        head_bottleneck=1024),      # so wide that DINO starts at log(prototypes), no luck
    # as published: 66 hours on two A100 (paper); full run not reproduced here
    "vit_s": dict(),
    # as released: the dynamics keep ViT-S's heads and midway width; 27 hours on eight A6000 (paper)
    "vit_b": dict(dim=768, heads=12),
}

# What train.py starts from, preset by preset; every entry is a flag.
# paper: Table 8; the steps, 60 passes over BDD100K, and min_lr as released
PAPER = dict(
    steps=105_000, batch_size=200, lr=3.90625e-4, min_lr=1e-6,  # lr: 5e-4 per 256 pairs, as DINO's
    warmup=1 / 30, betas=(0.9, 0.999), weight_decay=0.04,
    weight_decay_end=0.4,       # our choice: of all; released: the dynamics keep 0.01, by a slip
    clip=3.0)                   # our choice: of the global norm; released: per tensor, dynamics not
SCENES = dict(size=320, speed=30.0, pan=30.0, grain=24.0, textures=32)  # for runs without --data
RECIPES = {
    # our choice: pans of up to 3 patches over rich textures, where only motion changes; for half
    # of the steps pairs are cut from one frame, and their latents learn the known shift
    "tiny": PAPER | dict(
        steps=1500, batch_size=16, lr=2e-3, min_lr=1e-5, warmup=0.05, betas=(0.9, 0.99),
        weight_decay_end=0.04, shift_warmup=0.5, motion_colours="none",
        scenes=dict(size=64, sprites=0, speed=0.0, pan=12.0, zoom=0.0, roll=0.0, grain=24.0)),
    "vit_s": PAPER | dict(scenes=SCENES),
    "vit_b": PAPER | dict(scenes=SCENES),
}

MEAN = (0.485, 0.456, 0.406)                # of ImageNet
STD = (0.229, 0.224, 0.225)

def normalize(images):
    """Images (..., 3, H, W), uint8 or float in [0, 1], to mean 0 and variance 1 per channel."""
    if images.dtype == torch.uint8:
        images = images / 255
    # channel by channel: no constants to copy to a GPU
    channels = [(images.select(-3, c) - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(channels, -3)

def fp32(x):
    """At least float32, whatever autocast made of it: for losses, gates and meters."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def no_autocast(x):
    """Context without autocast on the device of x (on the meta device there is none)."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)

# ---- blocks --------------------------------------------------------------------------------------
class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class Attention(nn.Module):
    """Tokens x (B, L, D), or the `first` of them, look at y (B, M, D), or at x: (B, L, D)."""
    def __init__(self, dim, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y=None, first=None):
        if y is None:
            q, k, v = self.qkv(x).chunk(3, -1)
            q = q[:, :first]
        else:
            to_q, to_kv = self.qkv.weight.tensor_split([x.shape[-1]])
            q = F.linear(x, to_q)
            k, v = F.linear(y, to_kv).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)           # (B, nh, L, hd)
        return self.proj(out.transpose(1, 2).flatten(2))        # (B, L, D)

class Block(nn.Module):
    """Pre-norm transformer block; the encoder's have eps 1e-6, biases and drop path, others not."""
    def __init__(self, dim, heads, eps=1e-5, bias=False, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 4 * dim)
        self.drop_path = drop_path

    def drop(self, y):
        """Stochastic depth: skip the branch for a random part of the batch."""
        if not self.training or self.drop_path == 0:
            return y
        keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
        return y * (keep / (1 - self.drop_path)).to(y.dtype)

    def forward(self, x, first=None):
        """x (B, L, D) -> (B, L, D), or the `first` tokens alone, which look at all."""
        x = x[:, :first] + self.drop(self.attn(self.norm1(x), first=first))
        return x + self.drop(self.mlp(self.norm2(x)))

class CrossBlock(Block):
    """Backward layer: tokens x look at each other and at the level above, y."""
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.norm_y = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, y):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y))
        return x + self.mlp(self.norm3(x))

class Gate(nn.Module):
    """g of Eq. 2: in (0, 1) per token and channel, near 1 at the start (paper: B.1, + 4)."""
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)   # our choice: as released; the paper has no LayerNorm here
        self.mlp = MLP(dim, dim)

    def forward(self, x):
        return torch.sigmoid(fp32(self.mlp(self.norm(x))) + 4)  # near 1 bf16 has few values

class GatedBlock(Block):
    """Block of the forward model, h = g * x + Attention(x): a token can let go of what stood there.
    our choice: a block's gate comes from the input of the block before and not, as in Eq. 2, from
    its own, as the released weights were trained so. All but the last make the next one's gate."""
    def __init__(self, dim, heads, makes_gate):
        super().__init__(dim, heads)
        self.next_gate = Gate(dim) if makes_gate else None

    def forward(self, h, gate, K):
        """h (B, K + L, D), K motion tokens first; gate (B, L, D) or None -> h, the next gate."""
        next_gate = self.next_gate(h[:, K:]) if self.next_gate else None
        # the motion tokens are never gated, nor is the first block
        residual = h if gate is None else torch.cat([h[:, :K], h[:, K:] * gate], 1)
        h = residual + self.attn(self.norm1(h))                 # paper: Eq. 2
        return h + self.mlp(self.norm2(h)), next_gate

# ---- encoder and DINO ----------------------------------------------------------------------------
def interpolate_positions(pos, grid, size):
    """Position embeddings (1, grid*grid, D) for another grid, size = (h, w): (1, h*w, D)."""
    if size == (grid, grid):
        return pos
    pos = pos.view(1, grid, grid, -1).permute(0, 3, 1, 2)       # (1, D, grid, grid)
    # DINO's quirk: 0.1 patch too much keeps floor() from losing a row, but shifts a little
    scale = [(n + 0.1) / grid for n in size]
    pos = F.interpolate(pos, scale_factor=scale, mode="bicubic")
    return pos.flatten(2).mT                                    # (1, h*w, D)

class ViT(nn.Module):
    """The encoder: DINO's ViT."""
    def __init__(self, cfg):
        super().__init__()
        self.patch = cfg.patch
        self.grid = cfg.size // cfg.patch
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, cfg.dim))
        self.blocks = nn.ModuleList()
        for i in range(cfg.depth):
            rate = cfg.drop_path * i / max(cfg.depth - 1, 1)
            self.blocks.append(Block(cfg.dim, cfg.heads, eps=1e-6, bias=True, drop_path=rate))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6)

    def forward(self, images, levels, first=None):
        """Normalised images (B, 3, H, W) -> (B, L, D) per level, the last level (B, first, D)."""
        H, W = images.shape[-2:]
        if H % self.patch or W % self.patch:
            raise ValueError(f"image size {H}x{W} is no multiple of the patch size {self.patch}")
        x = self.patch_embed(images).flatten(2).mT              # (B, h*w, D)
        size = (H // self.patch, W // self.patch)               # h, w
        x = x + interpolate_positions(self.pos_embed[:, 1:], self.grid, size)
        cls = self.cls_token + self.pos_embed[:, :1]            # (1, 1, D)
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)       # (B, L, D)
        taps = []
        last = max(levels)
        for i, block in enumerate(self.blocks[:last], 1):
            x = block(x, first if i == last else None)
            if i in levels:
                taps.append(self.norm(x))       # our choice: at every level, as released
        return taps

class DINOHead(nn.Module):
    """CLS features (B, D) -> logits (B, P): 3 layers, then cosines with prototypes x weight_g."""
    def __init__(self, cfg):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(cfg.dim, cfg.head_hidden), nn.GELU(),
            nn.Linear(cfg.head_hidden, cfg.head_hidden), nn.GELU(),
            nn.Linear(cfg.head_hidden, cfg.head_bottleneck))
        self.weight_g = nn.Parameter(torch.ones(cfg.prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(cfg.prototypes, cfg.head_bottleneck))

    def forward(self, x):
        x = self.mlp(x)                                         # (B, bottleneck)
        with no_autocast(x):        # bf16 logits, divided by a temperature of 0.04, are too coarse
            x = F.normalize(fp32(x), dim=-1)
            weight = self.weight_g * F.normalize(self.weight_v, dim=-1)     # (P, bottleneck)
            return F.linear(x, weight)                          # (B, P)

class DINOLoss(nn.Module):
    """Cross-entropy of the teacher's assignments of 4 global crops and the student's of all. Order:
    [frame 1: box 1, box 2; frame 2: box 1, box 2; locals of frame 1; of frame 2]. A pair counts
    unless both show the same box, in either frame. our choice: pairs within one frame count, as
    released (paper: "crops across frames")."""
    STUDENT_TEMP = 0.1
    TEACHER_TEMP = 0.04     # our choice: constant, as released (paper: as in DINO, with a warm-up)
    CENTER_MOMENTUM = 0.9

    def __init__(self, prototypes, local_crops=8):
        super().__init__()
        mask = torch.ones(4, 4 + 2 * local_crops)               # teacher's crop, student's crop
        for q in range(4):
            mask[q, q % 2:4:2] = 0                              # the same box
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("center", torch.zeros(1, prototypes))
        # sum of the teacher means since the last update, and how many
        self.register_buffer("seen", torch.zeros(1, prototypes), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, student, teacher):
        """Logits of student (crops*B, P) and teacher (4*B, P), crop-major -> loss, logs."""
        with no_autocast(student):
            teacher = fp32(teacher)
            p = ((teacher - self.center) / self.TEACHER_TEMP).softmax(-1)
            p = p.unflatten(0, (4, -1))                                         # (4, B, P)
            s = fp32(student) / self.STUDENT_TEMP
            s = s.unflatten(0, (self.mask.shape[1], -1))                        # (crops, B, P)
            # p . log softmax(s) = p . s - logsumexp(s), since p sums to 1: no (pairs, B, P) tensor
            dots = p.transpose(0, 1) @ s.permute(1, 2, 0)                       # (B, 4, crops)
            dots = dots - s.logsumexp(-1).T[:, None]
            loss = -(dots * self.mask).sum((1, 2)).mean() / self.mask.sum()
            if self.training:
                self.seen.add_(teacher.mean(0, keepdim=True).detach())
                self.count.add_(1)
            # of a crop's assignment: log P if uniform; of their mean: 0 if all share a prototype
            logs = dict(teacher_entropy=torch.special.entr(p).sum(-1).mean(),
                        batch_entropy=torch.special.entr(p.mean((0, 1))).sum())
        return loss, logs

    @torch.no_grad()
    def update_center(self):
        """Moves the center towards the mean teacher output of a step, of all processes."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.seen)
            dist.all_reduce(self.count)
        self.center.lerp_(self.seen / self.count, 1 - self.CENTER_MOMENTUM)
        self.seen.zero_()
        self.count.zero_()

# ---- the model -----------------------------------------------------------------------------------
def check(cfg):
    """Says what to change if a Config can't be built."""
    for name, unit in (("size", "patch"), ("local_size", "patch"), ("dim", "heads"),
                       ("dim", "forward_heads"), ("motion_dim", "motion_heads")):
        a = getattr(cfg, name)
        b = getattr(cfg, unit)
        assert b > 0 and a % b == 0, f"{name}={a} must be a multiple of {unit}={b}"
    rising = all(a < b for a, b in zip((0, *cfg.levels), cfg.levels))
    assert rising and len(cfg.levels) > 1 and cfg.levels[-1] == cfg.depth, (
        f"levels={cfg.levels} must be two or more rising numbers that end with depth={cfg.depth}")
    assert cfg.latent_dynamics or cfg.dino_weight, "no loss: latent_dynamics off, dino_weight 0"

class Level(NamedTuple):
    m: torch.Tensor                     # (B, K, d)  motion latents that the forward model got
    v: torch.Tensor                     # (B, L, D)  backward features of the source
    gates: list                         # (B, L, D)  of all forward blocks but the first; or []
    pred: torch.Tensor                  # (B, L, D)  predicted features of the target
    target: torch.Tensor                # (B, L, D)  the teacher's features of the target
    loss: torch.Tensor                  # ()         mean of 2 - 2 cos(pred, target)

def prediction_loss(pred, target):
    """Mean over batch and tokens of 2 - 2 cos, both (B, L, D). paper: Eq. 1"""
    pred = F.normalize(fp32(pred), dim=-1)
    target = F.normalize(fp32(target), dim=-1)
    return (pred - target).square().sum(-1).mean()

def sincos_positions(grid, dim):
    """(1, 1 + grid*grid, dim): 0 for CLS, then sines and cosines of row and column."""
    octaves = 2 ** torch.linspace(0, 2, dim // 4)
    angle = torch.outer(torch.arange(grid), octaves * math.pi / grid)
    line = torch.cat([angle.sin(), angle.cos()], 1)             # (grid, dim/2)
    rows = line[:, None].expand(-1, grid, -1)
    pos = torch.cat([rows, rows.transpose(0, 1)], -1).flatten(0, 1)
    return torch.cat([torch.zeros(1, dim), pos])[None]

class Midway(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.levels = tuple(cfg.levels) if cfg.latent_dynamics else (cfg.depth,)
        # by index, 0 is the lowest; the last level is not predicted
        self.predicted = list(range(len(self.levels) - 1))
        if not cfg.multi_level:         # our choice: the highest stays; the paper doesn't say which
            self.predicted = self.predicted[-1:]
        self.student = ViT(cfg)
        if cfg.dino_weight:
            self.student_head = DINOHead(cfg)
            self.dino_loss = DINOLoss(cfg.prototypes, cfg.local_crops)
        if cfg.latent_dynamics:
            self.build_dynamics(cfg.dim, cfg.motion_dim)
        self.init_weights()
        # the teacher: copies without gradient that follow the student in after_step()
        for name in ("", "_head", "_embed", "_backward"):
            if hasattr(self, "student" + name):
                copy = deepcopy(getattr(self, "student" + name)).requires_grad_(False)
                setattr(self, "teacher" + name, copy)
        # our choice: none at the lowest level, where the released one is computed, never used
        if cfg.latent_dynamics and cfg.backward:
            del self.teacher_backward[str(self.predicted[0])]
        for block in self.teacher.blocks:
            block.drop_path = 0.0       # all of the teacher, always

    def build_dynamics(self, D, d):
        cfg = self.cfg
        self.motion_tokens = nn.Parameter(torch.zeros(1, cfg.motion_tokens, d))
        self.motion_pos = nn.Parameter(torch.zeros(1, 2 + 2 * self.student.grid ** 2, d))
        self.student_embed = nn.Linear(D, d)
        self.motion_proj = nn.Linear(d, D)
        self.motion_blocks = nn.ModuleDict()                            # one per predicted level
        self.student_backward = nn.ModuleDict()
        self.forward_blocks = nn.ModuleDict()
        for i in map(str, self.predicted):
            motion = [Block(d, cfg.motion_heads) for _ in range(cfg.motion_depth)]
            self.motion_blocks[i] = nn.ModuleList(motion)
            if cfg.backward:
                self.student_backward[i] = CrossBlock(D, cfg.forward_heads)
            self.forward_blocks[i] = nn.ModuleList()
            for b in range(1, 1 + cfg.forward_depth):
                makes_gate = cfg.gating and b < cfg.forward_depth
                self.forward_blocks[i].append(GatedBlock(D, cfg.forward_heads, makes_gate))

    def init_weights(self):
        """As in DINO: std 0.02, biases 0; patch embedding and LayerNorm as torch makes them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.student.cls_token, std=0.02)
        nn.init.trunc_normal_(self.student.pos_embed, std=0.02)
        if self.cfg.dino_weight:        # our choice: as Linear weights; the paper doesn't say
            nn.init.trunc_normal_(self.student_head.weight_v, std=0.02)
        if self.cfg.latent_dynamics:    # our choice: from zero, as released, they never differ
            nn.init.normal_(self.motion_tokens, std=0.02)
            if self.cfg.break_symmetry:
                self.break_symmetry()

    @torch.no_grad()
    def break_symmetry(self):
        """our choice, for small budgets: the midway path begins by comparing the frames. In DINO's
        init source and target enter alike, what they say of motion cancels in m, and even labels
        teach it nothing in 600 steps. Here places have sin-cos positions, offsets +c and -c tell
        the frames apart, motion tokens start along c, and a token attends to its like in the other
        frame: keys are as queries, but for the sign of c. The forward model begins by copying what
        it attends to, through half-open gates: else heatmaps stay at the source."""
        d = self.cfg.motion_dim
        grid = self.student.grid
        self.student.pos_embed.copy_(0.3 * sincos_positions(grid, self.cfg.dim))
        c = F.normalize(torch.randn(d), dim=0)
        source_pos, target_pos = self.motion_pos.chunk(2, 1)    # views
        source_pos.copy_(sincos_positions(grid, d) + 0.5 * d ** 0.5 * c)
        target_pos.copy_(sincos_positions(grid, d) - 0.5 * d ** 0.5 * c)
        self.motion_tokens.add_(d ** 0.5 * c)
        nn.init.orthogonal_(self.student_embed.weight)
        for block in chain(*self.motion_blocks.values()):
            query, key, value = block.attn.qkv.weight.chunk(3)  # views
            nn.init.orthogonal_(query)
            key.copy_(query - 2 * torch.outer(query @ c, c))
            mlp = block.mlp
            for weight in (value, block.attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for block in chain(*self.forward_blocks.values()):
            query, key, value = block.attn.qkv.weight.chunk(3)  # views
            nn.init.orthogonal_(query)
            key.copy_(query)
            nn.init.orthogonal_(value)
            block.attn.proj.weight.copy_(value.T)
            for weight in (block.mlp.fc1.weight, block.mlp.fc2.weight):
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
            if block.next_gate:
                block.next_gate.mlp.fc2.bias.fill_(-4)
        nn.init.normal_(self.motion_proj.weight, std=d ** -0.5)

    # -- the dynamics, top-down --
    def midway_path(self, i, m, source, target, first=None):
        """m (B, K, d) or None; two frames (B, L, D) -> tokens (B, K + 2L, d), or the `first`."""
        if m is None:
            m = self.motion_tokens.expand(len(source), -1, -1)
        source_pos, target_pos = self.motion_pos.chunk(2, 1)    # (1, L, d) each
        if source.shape[1] != source_pos.shape[1]:
            raise ValueError(f"the dynamics want frames of {self.cfg.size}x{self.cfg.size} pixels")
        source = self.student_embed(source) + source_pos
        target = self.teacher_embed(target) + target_pos
        x = torch.cat([m, source, target], 1)                   # (B, K + 2L, d)
        *blocks, last = self.motion_blocks[str(i)]
        for block in blocks:
            x = block(x)
        return last(x, first)

    def infer(self, i, m, source, target):
        """Inverse dynamics: latents m (B, K, d), None at the top -> refined ones (B, K, d)."""
        u = self.midway_path(i, m, source, target, first=self.cfg.motion_tokens)
        # our choice: no residual at the top, as released; paper: m^l = midway(...) + m^l+1
        return u if m is None else u + m

    def predict_forward(self, i, m, v):
        """Forward dynamics: latents m (B, K, d), v (B, L, D) -> prediction (B, L, D), gates."""
        K = self.cfg.motion_tokens
        h = torch.cat([self.motion_proj(m), v], 1)              # (B, K + L, D)
        gate = None
        gates = []
        for block in self.forward_blocks[str(i)]:
            h, gate = block(h, gate, K)
            if gate is not None:
                gates.append(gate)
        return h[:, K:], gates

    def dynamics(self, z, zt, detach=False):
        """Levels z of sources, zt of targets, each (B, L, D) -> list of Level, lowest first."""
        m = None
        source = v = z[-1]
        vt = zt[-1]
        levels = []
        for i in reversed(self.predicted):
            # our choice: the target enters through the EMA backward layers, as released; paper: z~
            m = self.infer(i, m, source, vt)
            if self.cfg.backward:
                v = self.student_backward[str(i)](z[i], v)
                if i != self.predicted[0]:
                    vt = self.teacher_backward[str(i)](zt[i], vt)
            else:       # our choice: the level's own features, as v and vt; the paper doesn't say
                v = z[i]
                vt = zt[i]
            # detach: predictions teach m nothing
            pred, gates = self.predict_forward(i, m.detach() if detach else m, v)
            # our choice: CLS is a token like the others, predicted and in the loss, as released
            levels.append(Level(m, v, gates, pred, zt[i], prediction_loss(pred, zt[i])))
            # our choice: else z_l; paper: predictions go in "instead of the features z_l"
            source = pred if self.cfg.refinement else z[i - 1]
        return levels[::-1]

    # -- training --
    def forward(self, batch):
        """Batch: see the usage at the top of the file. Returns the loss and a dict of scalars."""
        loss = 0.0
        logs = {}
        if self.cfg.latent_dynamics:
            dynamics, meters = self.dynamics_term(batch["motion"], batch.get("shift"))
            loss = loss + dynamics
            logs.update(meters)
        if self.cfg.dino_weight:
            dino, meters = self.dino_term(batch["globals"], batch["locals"])
            loss = loss + self.cfg.dino_weight * dino
            logs.update(meters)
        return loss, {name: value.detach() for name, value in logs.items()}

    def dynamics_term(self, motion, shift):
        """Motion crops (B, 2, 3, H, W); known shifts (B, 2) in parts of the crop, or None."""
        levels, z = self.both_directions(motion, detach=shift is not None)
        # our choice: averaged (paper); the released code sums
        loss = sum(level.loss for level in levels) / len(levels)
        logs = dict(dynamics=loss)
        if shift is not None:       # our choice: a warm-up on pairs cut from one frame
            shift = self.student.grid * torch.cat([shift, -shift])      # (2B, 2) patches, both ways
            m = torch.stack([fp32(level.m).mean(1) for level in levels])    # (levels, 2B, d)
            logs["shift"] = F.mse_loss(m[..., :2], shift.expand(len(m), -1, -1))
            # content would come in by the other numbers: they are to stay still over the batch
            loss = loss + logs["shift"] + 0.03 * m[..., 2:].var(1, correction=0).mean()
        logs["feature_std"] = fp32(z[-1]).std(0).mean()         # over the frames, place by place
        for i, level in zip(self.predicted, levels):
            name = self.levels[i]
            logs[f"loss_{name}"] = level.loss
            logs[f"m_var_{name}"] = fp32(level.m).var(0).mean()
            if level.gates:
                logs[f"gate_{name}"] = torch.stack(level.gates).mean()
        return loss, logs

    def both_directions(self, motion, detach=False):
        """Motion crops (B, 2, 3, H, W), in both directions -> Levels and z of 2B rows."""
        # our choice: rows [x; y] -> [y; x], as released; paper: B.1 calls only DINO symmetrical
        frames = normalize(motion).transpose(0, 1).flatten(0, 1)        # (2B, 3, H, W)
        z = self.student(frames, self.levels)
        with torch.no_grad():
            zt = [level.roll(len(motion), 0) for level in self.teacher(frames, self.levels)]
        return self.dynamics(z, zt, detach), z

    def dino_term(self, global_crops, local_crops):
        """Crops of both frames, see the usage at the top -> DINO loss, meters."""
        n = self.cfg.local_crops
        assert (global_crops.shape[1:3], local_crops.shape[1:3]) == ((2, 2), (2, n)), (
            f"globals must be (B, 2 frames, 2 boxes, ...) and locals (B, 2 frames, {n} boxes, ...)")
        last = [self.cfg.depth]
        crops = normalize(global_crops).movedim(0, 2).flatten(0, 2)     # (4B, 3, H, W), crop-major
        small = normalize(local_crops).movedim(0, 2).flatten(0, 2)      # (2nB, 3, H, W)
        cls = self.student(crops, last, first=1)[0][:, 0]               # (4B, D)
        if n:
            cls = torch.cat([cls, self.student(small, last, first=1)[0][:, 0]])     # (crops*B, D)
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(crops, last, first=1)[0][:, 0])    # (4B, P)
        loss, meters = self.dino_loss(self.student_head(cls), teacher)
        return loss, dict(dino=loss, cls_std=fp32(cls).std(0).mean()) | meters

    def before_step(self, progress):
        """Before each optimiser step, with progress in [0, 1): the DINO head's last layer waits."""
        # our choice: for 5 of 300 epochs, as released; the paper doesn't say. Without a gradient
        # AdamW skips the tensors, decay and moments included.
        if self.cfg.dino_weight and progress < 1 / 60:
            self.student_head.weight_g.grad = None
            self.student_head.weight_v.grad = None

    @torch.no_grad()
    def after_step(self, progress):
        """After each optimiser step, with progress in (0, 1]: EMA of the teacher, DINO's center."""
        # our choice: DINO's cosine to 1; the released code by a slip stays at 0.996
        momentum = 1 - (1 - self.cfg.ema) * (math.cos(math.pi * progress) + 1) / 2
        parameters = dict(self.named_parameters())
        teachers = [name for name in parameters if name.startswith("teacher")]
        students = [parameters[name.replace("teacher", "student", 1)] for name in teachers]
        get_ema_multi_avg_fn(momentum)([parameters[name] for name in teachers], students, None)
        if self.cfg.dino_weight:
            self.dino_loss.update_center()

    # -- inference: after model.eval(), which switches off the drop path --
    def features(self, images, teacher=False):
        """Images (B, 3, H, W), uint8 or float in [0, 1] -> levels (B, L, D), lowest first."""
        # our choice: readouts see the student, which the dynamics use; the paper doesn't say
        return (self.teacher if teacher else self.student)(normalize(images), self.levels)

    def predict(self, source, target):
        """Frames (B, 3, H, W); student sees source, teacher target -> Levels, lowest first."""
        assert self.cfg.latent_dynamics, "this model has no latent dynamics: it can't predict"
        with torch.no_grad():
            zt = self.features(target, teacher=True)
        return self.dynamics(self.features(source), zt)

    @torch.no_grad()
    def report(self, batch):
        """{row: {column: mean 2 - 2 cos}} of each level's prediction with its right latents, those
        of another pair in the same direction, and zeros; and of copying the source's features."""
        if not self.cfg.latent_dynamics:
            return {}
        B = len(batch["motion"])
        levels, _ = self.both_directions(batch["motion"])
        table = {}
        for i, level in zip(self.predicted, levels):
            other = level.m.unflatten(0, (2, B)).roll(1, 1).flatten(0, 1)       # (2B, K, d)
            latents = dict(right=level.m, shuffled=other, zero=torch.zeros_like(level.m))
            if B == 1:
                del latents["shuffled"]             # there is no other pair
            preds = {name: self.predict_forward(i, m, level.v)[0] for name, m in latents.items()}
            preds["copy"] = level.target.roll(B, 0)                             # x <-> y
            row = {name: prediction_loss(pred, level.target) for name, pred in preds.items()}
            table[f"2-2cos, level {self.levels[i]}"] = row
        mean = {}
        for name in row:
            mean[name] = sum(row[name] for row in table.values()) / len(table)
        return table | {"2-2cos, mean": mean}

# ---- the authors' checkpoints --------------------------------------------------------------------
NAMES = (   # (the authors', ours), regular expressions, applied in this order
    (r"^module\.", ""),
    (r"^pos_embed$", "motion_pos"),
    (r"^backbone\.", "."),
    (r"\.patch_embed\.proj\.", ".patch_embed."),
    (r"^dino_head\.(last_layer\.)?", "_head."),
    (r"_feature_blocks_(\d+)\.0\.", r"_backward.\1."),
    (r"^motion_blocks_", "motion_blocks."),
    (r"^forward_predictor_", "forward_blocks."),
    (r"^gating_mlps_(\d+)\.(\d+)\.", r"forward_blocks.\1.\2.next_gate."),
    (r"\.norm_layer\.", ".norm."),
)

def convert(ckpt):
    """State dict of Midway from the three sections of a checkpoint of the authors."""
    state = {}
    for section in ("student", "teacher", "motion_loss"):
        for key, value in ckpt[section].items():
            for theirs, ours in NAMES:
                key = re.sub(theirs, ours, key)
            state[key if section == "motion_loss" else section + key] = value
    for key in list(state):
        if ".projq." in key:                # cross-attention: three matrices are one of ours
            parts = [state.pop(key.replace("projq", name)) for name in ("projq", "projk", "projv")]
            state[key.replace("projq", "qkv")] = torch.cat(parts)
    return {key: value for key, value in state.items() if not key.startswith("teacher_backward.0.")}

def official_config(state):
    """Config from the shapes of a converted state dict; depths are as published."""
    dim, _, _, patch = state["student.patch_embed.weight"].shape
    cfg = Config(
        size=patch * math.isqrt(state["student.pos_embed"].shape[1] - 1), patch=patch, dim=dim,
        heads=max(dim // 64, 3),    # no tensor tells: DINO's are 64 wide; the dynamics have 3 and 6
        motion_dim=state["motion_tokens"].shape[2], dino_weight=0.0)
    if "student_head.weight_v" in state:
        cfg.dino_weight = 1.0
        cfg.prototypes, cfg.head_bottleneck = state["student_head.weight_v"].shape
        cfg.head_hidden = len(state["student_head.mlp.0.bias"])
    return cfg

def load_official(path):
    """Midway in eval mode from a checkpoint (.pth) of the authors; says if DINO head or center
    lack. OSError: can't be read; ValueError: isn't such a checkpoint. Nothing is executed: any
    class but argparse.Namespace is refused (if you trust it, save it again without `args`)."""
    with open(path, "rb") as file:              # no such file, no permission: OSError
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                ckpt = torch.load(file, map_location="cpu", weights_only=True)
            state = convert(ckpt)
            center = ckpt.get("dino_loss", {}).get("center")
            if center is None or "student_head.weight_v" not in state:
                print(f"{path}: no DINO head or center in it; features and dynamics are whole")
                state = {key: value for key, value in state.items() if "_head." not in key}
            else:
                state["dino_loss.center"] = center
            model = Midway(official_config(state))
            model.load_state_dict(state)
        except Exception as error:              # a foreign or damaged file: anything can happen
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{path}: no checkpoint of Midway's authors ({reason})") from None
    return model.eval()

if __name__ == "__main__":
    model = Midway(Config(**PRESETS["tiny"]))
    batch = dict(
        motion=torch.rand(4, 2, 3, 32, 32),             # (B, frame, channel, height, width)
        globals=torch.rand(4, 2, 2, 3, 32, 32),         # (B, frame, box, channel, height, width)
        locals=torch.rand(4, 2, 2, 3, 16, 16))
    loss, logs = model(batch)
    print(f"loss {loss:.3f}:", {name: round(value.item(), 3) for name, value in logs.items()})
    for level in model.eval().predict(*batch["motion"].unbind(1)):
        print(f"m {tuple(level.m.shape)}, pred {tuple(level.pred.shape)}, loss {level.loss:.3f}")
