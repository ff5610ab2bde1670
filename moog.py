"""
MooG, Moving Off-the-Grid: scene-grounded video representations
(van Steenkiste et al., 2024, arXiv 2411.05927), in one file that needs nothing but torch.

The idea. A ViT's tokens are nailed to the image grid: a token is a place, and what moves wanders from token
to token. MooG's tokens belong to no place. They start as noise, see each frame by cross-attention, and the
only task is to predict the next frame from them: a pixel asks the tokens for its colour, again by
cross-attention. To say what will be where, it pays a token to hold on to a piece of the scene and follow it.

    state s_0 = noise; for each frame t:    p_t = s_t + predictor(s_t)              self-attention only
                                            frame^_t = decoder(p_t)                 before the frame is seen
                                            s_t+1 = LN(p_t + corrector(p_t, e_t))   e_t = encoder(frame_t)
    loss = mean over all frames of |frame^_t - frame_t|^2 (frame 0, from pure noise, can only be a mean image)

Nothing is learnt per token or per frame: any number of tokens and of frames will do at test time.

Glossary
    B       clips                   N       tokens of the state (1024)      e    encoder's grid tokens
    T       frames (8)              D       their width (512)               De   their width
    H W     pixels                  P       decoded pixels of a frame       K    queries of a readout
    h w     encoder's grid: H, W over the product of the strides (4), rounded up    nh   attention heads
    predicted   p_t, what the tokens expect before they see frame t
    corrected   s_t+1, after they have seen it; the state that is carried on

How is this not just a transformer over patches? The patches (e) are only looked at; what persists, and what
is decoded, are N vectors without a place. `grid=True` puts them back on the grid: the paper's baselines.

Two variants were published, the same recurrence in another phase. The paper's (Config.released=False) decodes
the prediction p_t. The released weights (released=True) keep the state un-normalised, normalise it at the
start of each step, and are decoded from the state before: both predict a frame from the frames before it.
Sizes and details follow the authors' released code. Departures are marked "our choice". Usage:

    model = MooG(Config(**PRESETS["paper"]))        # or: model = load_official("moog_ego4d_backbone.npz")
    loss, logs = model(dict(video=video))           # video (B, T, 3, H, W), uint8 or float in [0, 1]

    states = model.unroll(video)                    # predicted, corrected (B, T, N, D); features; last
    more = model.unroll(next_frames, states.last)   # goes on as if it had been one clip
    ahead = model.anticipate(video)                 # what to decode as frames 0..T, each before it is seen
    frames, attention = model.decode(ahead, (H, W), return_attention=True)
    points = PointReadout(model.cfg.dim)(states.features.detach(), queries, query_frames)

`python moog.py` runs a demo in seconds. MIT licence: copy this file freely.
"""
import ast
import math
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    size: int = 128                         # pixels: training clips are size x size
    frames: int = 8                         # T of training clips
    tokens: int = 1024                      # N, tokens of the state in training; any number at test time
    dim: int = 512                          # D, width of a token
    channels: tuple[int, ...] = (64, 128, 128, 256, 256, 512)   # of the encoder's convolutions
    strides: tuple[int, ...] = (1, 1, 1, 2, 1, 2)               # of the same
    encoder_bases: int = 20                 # octaves of the encoder's Fourier positions
    decoder_bases: int = 16                 # octaves of the decoder's
    predictor: tuple[int, ...] = (3, 4, 256)    # layers, heads, width of q, k, v
    corrector: tuple[int, ...] = (2, 8, 512)    # layers, heads, width of q, k, v
    decoder: tuple[int, ...] = (6, 2, 128)      # layers, heads, width of q, k, v
    mlp: int = 2048                         # hidden width of all MLPs
    state_scale: float = 1e-4               # std of the noise that the tokens start from
    subsample: int = 8                      # training decodes one pixel in subsample x subsample; 1: all
    decoder_self_attention: bool = False    # pixels also look at each other: then all are decoded
    released: bool = False                  # the released weights' phase and layout
    grid: bool = False                      # baseline: the tokens stay on the encoder's grid
    recurrent: bool = True                  # with grid: off, a prediction knows the last frame only
    checkpoint: bool = False                # recompute the steps' activations in backward: less memory

    @property
    def inputs(self):
        return dict(frames=self.frames, size=self.size)


PRESETS = {
    # a laptop CPU: minutes; README has the numbers. our choice of everything
    "tiny": dict(
        size=64, frames=4, tokens=64, dim=64, channels=(32, 48, 64), strides=(2, 2, 2), encoder_bases=12,
        decoder_bases=4, predictor=(1, 4, 64), corrector=(2, 1, 64), decoder=(2, 2, 64), mlp=256,
        state_scale=1.0),
    # the paper's main model; not yet trained here
    "paper": dict(checkpoint=True),
    # one 24 GB card, by our estimate: not yet run on a GPU
    "small": dict(
        size=64, tokens=256, dim=256, channels=(32, 64, 64, 128, 128, 256), predictor=(3, 4, 256),
        corrector=(2, 4, 256), decoder=(4, 2, 128), mlp=1024),
    # the layout of the public checkpoint (trained on Ego4D, by its name)
    "released": dict(strides=(2, 1, 1, 2, 1, 1), released=True, checkpoint=True),
}

PAPER = dict(       # as in the authors' training configuration for MOVi-E; its steps are in a comment there
    steps=1_000_000, batch_size=128, lr=1e-4, min_lr=1e-7, warmup=1000 / 1_000_000, betas=(0.9, 0.95),
    weight_decay=1e-4, weight_decay_end=1e-4, clip=1.0)
SCENES = dict(size=128, sprites=5)
RECIPES = {
    # our choice: small budgets want large plain things that move fast; textures come with larger presets
    "tiny": PAPER | dict(steps=2400, batch_size=16, lr=2e-3, min_lr=1e-5, warmup=0.05, scenes=dict(
        sprites=3, speed=10.0, pan=4.0, zoom=0.0, roll=0.0, radius=(0.15, 0.25), grain=24.0, flat=0.9)),
    "paper": PAPER | dict(scenes=SCENES),
    "small": PAPER | dict(steps=100_000, batch_size=32, lr=3e-4, warmup=0.01, scenes=SCENES | dict(size=64)),
    "released": PAPER | dict(scenes=SCENES),
}


def as_float(video, dtype=torch.float32):
    """uint8, or float in [0, 1], to float in [0, 1]."""
    return video.to(dtype) / 255 if video.dtype == torch.uint8 else video.to(dtype)


def full(x):
    """At least float32, whatever autocast made of it: for losses and meters."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- positions -----------------------------------------------------------------------------------
def axis_positions(n, device=None):
    """n numbers from -1 to 1, end points included (float32)."""
    # Bit by bit as the released models had them: the highest octave magnifies the last bit 500,000 times.
    s = torch.arange(n, device=device, dtype=torch.float32) * (1 / max(n - 1, 1))
    g = -(1 - s) + s
    if n > 1:
        g[-1] = 1.0
    return g


@torch.compiler.disable             # a fused multiply-add would change the last bit, see axis_positions
def grid_positions(height, width, device=None):
    """(y, x) of each place of a grid, row by row, in [-1, 1]: (height * width, 2)."""
    y, x = axis_positions(height, device), axis_positions(width, device)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)


def fourier(x, bases):
    """Coordinates (..., n) -> sin and cos of pi * 2^i * x for i < bases: (..., 2 * bases * n)."""
    x = x.float() * math.pi
    x = torch.cat([x * 2 ** i for i in range(bases)], -1)       # y, x, 2y, 2x, 4y, 4x, ...
    return torch.sin(torch.cat([x, x + math.pi / 2], -1))       # always in float32, see axis_positions


# ---- transformer ---------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys."""

    def __init__(self, dim, kv_dim, heads, width):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, width, bias=False)
        self.key = nn.Linear(kv_dim, width, bias=False)
        self.value = nn.Linear(kv_dim, width, bias=False)
        self.norm_query = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_key = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, dim)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, y, weights=False):
        """x (B, L, D) looks at y (B, M, Dkv) -> (B, L, D), and with `weights` where (B, nh, L, M)."""
        v = self.split(self.value(y))                           # (B, nh, M, hd)
        q = self.norm_query(full(self.split(self.query(x)))).to(v.dtype)        # (B, nh, L, hd)
        k = self.norm_key(full(self.split(self.key(y)))).to(v.dtype)            # (B, nh, M, hd)
        out = F.scaled_dot_product_attention(q, k, v)           # (B, nh, L, hd)
        out = self.out(out.transpose(1, 2).flatten(2))          # (B, L, D)
        if not weights:
            return out
        return out, torch.softmax(full(q) @ full(k).mT * q.shape[-1] ** -0.5, -1)


class Block(nn.Module):
    """Pre-norm block; self- and cross-attention side by side, from the same normed x. y is taken as it is."""

    def __init__(self, dim, heads, width, mlp, kv_dim=None, self_attention=True):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.self_attention = Attention(dim, dim, heads, width) if self_attention else None
        self.cross_attention = Attention(dim, kv_dim, heads, width) if kv_dim else None
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.mlp_in = nn.Linear(dim, mlp)
        self.mlp_out = nn.Linear(mlp, dim)

    def forward(self, x, y=None, weights=False):
        n, seen = self.norm_attention(x), None
        if self.self_attention is not None:
            x = x + self.self_attention(n, n)
        if self.cross_attention is not None:
            out = self.cross_attention(n, y, weights)
            out, seen = out if weights else (out, None)
            x = x + out
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))
        return (x, seen) if weights else x


class Transformer(nn.Module):
    def __init__(self, dim, spec, mlp, kv_dim=None, self_attention=True):
        super().__init__()
        layers, heads, width = spec
        self.layers = nn.ModuleList(
            Block(dim, heads, width, mlp, kv_dim, self_attention) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6, bias=False)

    def forward(self, x, y=None, weights=False):
        """x (B, L, D), y (B, M, Dkv) -> (B, L, D), with `weights` also the last layer's cross-attention."""
        for layer in self.layers[:-1]:
            x = layer(x, y)
        out = self.layers[-1](x, y, weights)
        return (self.norm(out[0]), out[1]) if weights else self.norm(out)


# ---- encoder and decoder -------------------------------------------------------------------------
class Encoder(nn.Module):
    """Convolutions, plus Fourier positions: frames to grid tokens, one frame at a time."""

    def __init__(self, cfg):
        super().__init__()
        sizes, out, pe = (3, *cfg.channels), cfg.channels[-1], 4 * cfg.encoder_bases
        self.bases, self.concat = cfg.encoder_bases, cfg.released
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride) for a, b, stride in zip(sizes, sizes[1:], cfg.strides))
        self.norm_convs = nn.LayerNorm(out, eps=1e-6, bias=False)
        # positions are added after a projection; in the released weights they stand beside the features
        self.positions = None if self.concat else nn.Linear(pe, out)
        self.dim = out + pe if self.concat else cfg.dim         # De
        self.proj_in = nn.Linear(out + pe if self.concat else out, cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6, bias=False)
        self.proj_out = nn.Linear(cfg.dim, self.dim) if self.concat else nn.Identity()

    def convolve(self, x):
        """(B, 3, H, W) -> (B, C, h, w), sizes rounded up. Padded as `SAME`: what is odd goes to the end."""
        for i, conv in enumerate(self.convs):
            pad = []
            for n, stride in zip(x.shape[:1:-1], conv.stride[::-1]):
                total = max((math.ceil(n / stride) - 1) * stride + 3 - n, 0)
                pad += [total // 2, total - total // 2]
            x = conv(F.pad(x, pad))
            x = F.gelu(x, approximate="tanh") if i + 1 < len(self.convs) else x
        return x

    def forward(self, frames):
        """(B, 3, H, W) in [0, 1] -> (B, h*w, De)"""
        x = self.convolve(frames)                               # (B, C, h, w)
        pe = fourier(grid_positions(*x.shape[2:], x.device), self.bases).to(x.dtype)    # (h*w, 4 * bases)
        x = self.norm_convs(x.flatten(2).mT)                    # (B, h*w, C)
        x = torch.cat([x, pe.expand(len(x), -1, -1)], -1) if self.concat else x + self.positions(pe)
        return self.proj_out(self.norm(self.proj_in(x)))


class Decoder(nn.Module):
    """A pixel's coordinates look at the tokens and come back as its colour. As in SRT."""

    def __init__(self, dim, spec, mlp, bases=16, channels=3, self_attention=False):
        super().__init__()
        self.dim, self.bases = dim, bases
        self.transformer = Transformer(dim + 4 * bases, spec, mlp, kv_dim=dim, self_attention=self_attention)
        self.recon = nn.Linear(dim + 4 * bases, channels)

    def forward(self, states, size, index=None, weights=False):
        """
        States (B, N, D) -> (B, P, channels), and with `weights` the last layer's attention (B, nh, P, N).
        index: numbers of the wanted pixels, y * W + x, (B, P) or, for all frames alike, (P,); None: all.
        """
        pe = fourier(grid_positions(*size, states.device), self.bases).to(states.dtype)
        pe = pe if index is None else pe[index]                 # ([B,] P, 4 * bases)
        pe = pe.expand(len(states), -1, -1)
        query = F.pad(pe, (self.dim, 0))                        # (B, P, D + 4 * bases), zeros first
        out = self.transformer(query, states, weights)
        return (self.recon(out[0]), out[1]) if weights else self.recon(out)


def subsample(size, factor, offsets=None):
    """
    Numbers y * W + x of one pixel in each factor x factor: at the middle of each square, or, with offsets
    (..., 2) of y and x, rolled by these: (..., H/factor * W/factor). Raises ValueError if it doesn't divide.
    """
    H, W = size
    if H % factor or W % factor:
        raise ValueError(f"frames of {H}x{W} pixels can't be subsampled by {factor}: choose a size that "
                         f"{factor} divides, or subsample=1")
    offsets = torch.zeros(2, dtype=torch.long) if offsets is None else offsets
    steps = [torch.arange(n // factor, device=offsets.device) * factor + factor // 2 for n in size]
    y, x = ((s - offsets[..., i, None]) % n for i, (s, n) in enumerate(zip(steps, size)))
    return (y[..., :, None] * W + x[..., None, :]).flatten(-2)


def pick(video, index):
    """Pixels of a video (B, T, C, H, W) at index (B, T, P) -> (B, T, P, C)."""
    B, T, C = video.shape[:3]
    return video.flatten(3).gather(3, index[:, :, None].expand(B, T, C, -1)).mT


def psnr(prediction, target):
    """Peak signal-to-noise ratio in dB of each frame (B, T, P, C), colours in [0, 1], averaged; up to 100."""
    error = (full(prediction) - target).square().mean((-2, -1)).clamp(min=1e-10)
    return (-10 * error.log10()).mean()


# ---- the model -----------------------------------------------------------------------------------
PIECE = 2 ** 16     # pixels decoded at once where nothing is to be differentiated


class States(NamedTuple):
    predicted: torch.Tensor     # (B, T, N, D) before frame t is seen
    corrected: torch.Tensor     # (B, T, N, D) after; un-normalised in the released variant
    features: torch.Tensor      # (B, T, M, D) what readouts look at: both, M = 2N; released: corrected, M = N
    last: torch.Tensor          # (B, N, D) give it back to unroll() to go on


def check(cfg):
    """Raises a ValueError that says what to change if a Config can't be built."""
    for name in ("predictor", "corrector", "decoder"):
        spec = tuple(getattr(cfg, name))
        if len(spec) != 3 or min(spec) < 1 or spec[2] % spec[1]:
            raise ValueError(f"{name}={spec}: want layers, heads, and a multiple of the heads as width")
    if not cfg.channels or len(cfg.channels) != len(cfg.strides):
        raise ValueError(f"{len(cfg.channels)} channels but {len(cfg.strides)} strides: want one per layer")
    least = dict(size=1, frames=2, tokens=1, dim=1, encoder_bases=1, decoder_bases=1, mlp=1, subsample=1)
    for name, number in least.items():
        if getattr(cfg, name) < number:
            raise ValueError(f"{name}={getattr(cfg, name)} must be at least {number}")
    if min(*cfg.channels, *cfg.strides) < 1 or cfg.state_scale <= 0:
        raise ValueError("channels, strides and state_scale must be positive")
    if cfg.size % cfg.subsample:
        raise ValueError(f"size={cfg.size} must be a multiple of subsample={cfg.subsample}")
    if cfg.grid and cfg.released:
        raise ValueError("grid=True is a baseline of the paper's model: leave out released=True")
    if not (cfg.grid or cfg.recurrent):
        raise ValueError("recurrent=False needs grid=True: without a grid the state is all there is")


class MooG(nn.Module):
    """Encoder, predictor, corrector, decoder. Raises ValueError if the Config can't be built."""

    def __init__(self, cfg):
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.predictor = Transformer(cfg.dim, cfg.predictor, cfg.mlp)
        self.corrector = Transformer(cfg.dim, cfg.corrector, cfg.mlp, kv_dim=self.encoder.dim)
        self.state_norm = nn.LayerNorm(cfg.dim, eps=1e-4, bias=False)
        self.decoder = Decoder(cfg.dim, cfg.decoder, cfg.mlp, cfg.decoder_bases,
                               self_attention=cfg.decoder_self_attention)
        self.apply(init_weights)
        # our choice: predictions start near grey; the authors' kernels make noise of variance 1 at first
        with torch.no_grad():
            self.decoder.recon.weight.mul_(0.1)
            self.decoder.recon.bias.fill_(0.5)

    def compile(self, *args, **kwargs):
        """torch.compile of the parts that a step calls, not of the unrolled loop: much less to compile."""
        for module in (self.encoder, self.predictor, self.corrector, self.decoder.transformer):
            module.compile(*args, **kwargs)

    # -- the recurrence --
    def initial_state(self, B, tokens):
        """Noise (B, tokens, D)."""
        weight = self.state_norm.weight
        state = self.cfg.state_scale * torch.randn(B, tokens, self.cfg.dim, device=weight.device,
                                                   dtype=weight.dtype)
        return state if self.cfg.released else self.state_norm(state)

    def predict(self, state):
        """What the tokens (B, N, D) expect of the next frame, before they see it."""
        state = self.state_norm(state) if self.cfg.released else state
        return state + self.predictor(state)

    def step(self, state, e):
        """One frame. state (B, N, D), e (B, h*w, De) -> predicted, corrected (B, N, D)."""
        p = self.predict(state)
        x, y = (p, e)                       # tokens look at the frame
        if self.cfg.grid:                   # our choice: the frame's features stay, and look at the tokens
            x, y = (e, p if self.cfg.recurrent else e)
        c = x + self.corrector(x, y)
        return p, c if self.cfg.released else self.state_norm(c)

    def recurrence(self, video, state=None, tokens=None):
        """Video (B, T, 3, H, W) -> predicted, corrected (B, T, N, D), and the initial state (B, N, D)."""
        if video.ndim != 5 or video.shape[2] != 3 or not video.shape[1]:
            raise ValueError(f"a video of shape {tuple(video.shape)}: want (B, T, 3, H, W), T at least 1")
        B, T = video.shape[:2]
        frames = as_float(video, self.state_norm.weight.dtype).flatten(0, 1)    # (B*T, 3, H, W)
        # all frames at once; without gradients in pieces, so that a long video fits
        pieces = [frames] if torch.is_grad_enabled() else frames.split(64)
        e = torch.cat([self.encoder(piece) for piece in pieces]).unflatten(0, (B, T))   # (B, T, h*w, De)
        places = e.shape[2] if self.cfg.grid else None
        N = next(n for n in (tokens, places, self.cfg.tokens) if n is not None)
        state = self.initial_state(B, N) if state is None else state
        if not 0 < N == (state.shape[1] if tokens else N) or places and not N == places == state.shape[1]:
            raise ValueError(f"tokens={tokens}, but the given state has {state.shape[1]}" if not places else
                             f"the grid has {places} places: no other number of tokens will do")
        recompute = self.cfg.checkpoint and self.training and torch.is_grad_enabled()
        start, predicted, corrected = state, [], []
        for t in range(T):
            p, state = (checkpoint(self.step, state, e[:, t], use_reentrant=False, preserve_rng_state=False)
                        if recompute else self.step(state, e[:, t]))
            predicted.append(p)
            corrected.append(state)
        return torch.stack(predicted, 1), torch.stack(corrected, 1), start

    def anticipate(self, video, state=None, tokens=None):
        """
        Video (B, T, 3, H, W) -> the states to decode as its frames and as the one after, each knowing the
        frames before it alone: (B, T + 1, N, D). Arguments as in unroll().
        """
        predicted, corrected, start = self.recurrence(video, state, tokens)
        if self.cfg.released:
            return torch.cat([start[:, None], corrected], 1)
        return torch.cat([predicted, self.predict(corrected[:, -1])[:, None]], 1)

    def unroll(self, video, state=None, tokens=None):
        """
        Video (B, T, 3, H, W), uint8 or float in [0, 1], any T, H and W -> States. state: `last` of an earlier
        chunk, to go on with; else the tokens start as noise, `tokens` of them (default: as in training).
        """
        predicted, corrected, _ = self.recurrence(video, state, tokens)
        features = corrected if self.cfg.released else torch.cat([predicted, corrected], 2)
        return States(predicted, corrected, features, corrected[:, -1])

    def decode(self, states, size, index=None, return_attention=False):
        """
        States (B, T, N, D), of anticipate() -> frames (B, T, 3, H, W) of size = (H, W), or, with index
        (B, T, P) or (P,) of pixels y * W + x, their colours (B, T, P, 3). Colours can overshoot [0, 1].
        return_attention: also the last layer's cross-attention (B, T, nh, P, N). All frames are decoded in
        one call; without gradients, and if pixels don't look at each other, in pieces, to save memory.
        """
        if states.ndim != 4 or index is not None and index.shape[:-1] not in ((), states.shape[:2]):
            raise ValueError(f"states of shape {tuple(states.shape)}: want (B, T, N, D); index, if given, "
                             "(B, T, P) or (P,)")
        B, T = states.shape[:2]
        P, whole = size[0] * size[1], index is None
        index = torch.arange(P, device=states.device) if whole else index
        index = index.flatten(0, 1) if index.ndim == 3 else index
        bounded = not (torch.is_grad_enabled() or self.cfg.decoder_self_attention)
        pieces = index.split(max(PIECE // (B * T), 1), -1) if bounded else [index]
        outs = [self.decoder(states.flatten(0, 1), size, piece, return_attention) for piece in pieces]
        colours = torch.cat([out[0] if return_attention else out for out in outs], 1)   # (B*T, P, 3)
        colours = colours.unflatten(0, (B, T))
        colours = colours.mT.unflatten(-1, size) if whole else colours
        if not return_attention:
            return colours
        return colours, torch.cat([out[1] for out in outs], 2).unflatten(0, (B, T))

    # -- training --
    def forward(self, batch):
        """batch: `video` (B, T, 3, H, W), uint8 or float in [0, 1]. Returns the loss and detached scalars."""
        video = as_float(batch["video"])
        B, T, _, *size = video.shape
        states = self.anticipate(video[:, :-1])                 # (B, T, N, D); the last frame is never seen
        factor = 1 if self.cfg.decoder_self_attention else self.cfg.subsample
        index = subsample(size, factor, torch.randint(factor, (B, T, 2), device=video.device))  # (B, T, P)
        prediction, target = full(self.decode(states, size, index)), pick(video, index)
        loss = F.mse_loss(prediction, target)
        with torch.no_grad():
            logs = dict(
                psnr=psnr(prediction[:, 1:], target[:, 1:]),
                copy_psnr=psnr(pick(video[:, :-1], index[:, 1:]), target[:, 1:]),
                tokens_used=self.tokens_used(states[:1].detach(), size, index[:1]),
                state_norm=full(states).norm(dim=-1).mean())    # of the decoded states
        return loss, {name: value.detach() for name, value in logs.items()}

    def tokens_used(self, states, size, index):
        """Share of the tokens that some decoded pixel of a clip looks at most; at most T * P / N."""
        _, attention = self.decode(states, size, index, return_attention=True)
        top = attention.mean(2).argmax(-1)                      # (B, T, P)
        used = torch.zeros(len(states), states.shape[2], device=top.device)
        return used.scatter_(1, top.flatten(1), 1.0).mean()

    def after_step(self, progress):
        """After each optimiser step: nothing to do."""

    def param_groups(self, weight_decay):
        """All parameters are decayed, norms and biases too, as in the authors' configuration."""
        return [dict(params=list(self.parameters()), weight_decay=weight_decay)]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")       # other numbers of tokens: not worth compiling for
    def report(self, batch):
        """
        {row: {column: scalar}}: PSNR in dB of predicting frame t from those before it, also with half and
        twice the tokens, and of copying the frame before.
        """
        video = as_float(batch["video"])
        B, T, _, *size = video.shape
        factor = 1 if self.cfg.decoder_self_attention else next(
            f for f in (4, 2, 1) if size[0] % f == size[1] % f == 0)
        index = subsample(size, factor).to(video.device).expand(B, T, -1)
        target, N = pick(video, index), self.cfg.tokens
        guesses = {"copy": pick(video[:, :-1], index[:, 1:])}
        numbers = {"predicted": N} | ({} if self.cfg.grid else {"N/2": max(N // 2, 1), "2N": 2 * N})
        for name, tokens in numbers.items():
            states = self.anticipate(video[:, :-1], tokens=tokens)
            guesses[name] = self.decode(states, size, index)[:, 1:]
        rows = {"t >= 1": slice(1, T), "t = 1": slice(1, 2), f"t = {T - 1}": slice(T - 1, T)}
        return {f"PSNR in dB, {row}": {
            name: psnr(guess[:, t.start - 1:t.stop - 1], target[:, t]) for name, guess in guesses.items()}
            for row, t in rows.items()}


def init_weights(module):
    """Kernels as in the authors' code: truncated normal of variance 1 / fan-in, biases zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        std = module.weight[0].numel() ** -0.5 / 0.87962566103423978    # of what the cut leaves
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- readouts ------------------------------------------------------------------------------------
class Readout(NamedTuple):
    values: torch.Tensor            # (B, T, K, C) points x y or boxes y1 x1 y2 x2, shares of the frame's size
    logits: torch.Tensor | None     # (B, T, K, 2) of being visible, of being certain; not of released boxes
    visible: torch.Tensor | None    # (B, T, K) bool: visible and certain; not of released boxes
    state: torch.Tensor | None      # (B, K, width) to go on with; not of released heads


def visible_and_certain(logits):
    return torch.sigmoid(full(logits)).prod(-1) > 0.5


def mlp(*sizes):
    a, b, c = sizes
    return nn.Sequential(nn.Linear(a, b), nn.GELU(approximate="tanh"), nn.Linear(b, c))


class PointReadout(nn.Module):
    """
    Recurrent readout: a query becomes a state, which looks at each frame's features.       paper: Sec. 3.2
    Give it features that are detached (frozen) or not (end to end).
    """
    coordinates = 2

    def __init__(self, dim=512, width=512, transformer=(3, 8, 512), hidden=2048, bases=16):
        """dim: width of the features; width: of the states; transformer: layers, heads, width of q, k, v."""
        super().__init__()
        self.bases = bases
        self.initializer = mlp(2 * bases * self.coordinates, width, width)
        self.proj_in = nn.Linear(width, width)
        self.transformer = Transformer(width, transformer, hidden, kv_dim=dim, self_attention=False)
        self.proj_out = nn.Linear(width, width)
        self.predictor = mlp(width, width, width)
        self.state_norm = nn.LayerNorm(width, eps=1e-4, bias=False)
        self.values = mlp(width, width, self.coordinates)
        self.logits = mlp(width, width, 2)
        self.apply(init_weights)

    def forward(self, features, queries, query_frames=None, state=None):
        """
        features (B, T, M, D); queries (B, K, coordinates) as shares of the frame's size, at query_frames
        (B, K), counted from this chunk's first frame (None: all at its start). state: of an earlier chunk, to
        go on with. Returns a Readout; what it says of frames before the query's is meaningless.
        """
        if queries.shape[-1] != self.coordinates:
            raise ValueError(f"queries have {queries.shape[-1]} coordinates, not {self.coordinates}")
        start = fourier(queries, self.bases).to(self.proj_in.weight.dtype)
        start = self.initializer(start)                         # (B, K, width)
        state, corrected = start if state is None else state, []
        for t in range(features.shape[1]):
            if query_frames is not None:
                state = torch.where((query_frames == t)[..., None], start.to(state.dtype), state)
            c = state + self.proj_out(self.transformer(self.proj_in(state), features[:, t]))
            state = self.state_norm(c + self.predictor(c))
            corrected.append(c)
        c = torch.stack(corrected, 1)                           # (B, T, K, width)
        logits = self.logits(c)
        return Readout(torch.sigmoid(full(self.values(c))), logits, visible_and_certain(logits), state)

    def error(self, values, target):
        """Huber loss of each point (B, T, K), and whether it is near enough to be called certain."""
        distance = 256 * ((values - target).square().sum(-1) + 1e-12).sqrt()
        error = F.huber_loss(distance, torch.zeros_like(distance), delta=4.0, reduction="none")
        return 0.05 * error, distance < 6

    def loss(self, out, target, visible, valid=None):
        """
        target (B, T, K, coordinates), visible (B, T, K) bool, valid (B, T, K) bool: which to count, None for
        all; leave out the frames before the query. our choice: a loss like TAP-Net's, since MooG's is not
        published: Huber of the distance with delta 4 pixels of 256, times 0.05, where visible; cross-entropy
        of visible; and of certain (where visible), which a point less than 6 pixels off should be.
        """
        visible = visible.bool()
        valid = torch.ones_like(visible) if valid is None else valid.bool()
        hidden = ~(valid & visible)[..., None]                  # what stands there may be nan
        error, near = self.error(out.values, torch.where(hidden, out.values.detach(), target))
        bce = lambda logit, yes: F.binary_cross_entropy_with_logits(
            full(logit), yes.to(full(logit).dtype), reduction="none")
        seen = (valid & visible).to(error.dtype)
        each = bce(out.logits[..., 0], visible) * valid + (error + bce(out.logits[..., 1], near)) * seen
        return each.sum() / valid.sum().clamp(min=1)


class BoxReadout(PointReadout):
    """
    The same for boxes (y1, x1, y2, x2). our choice of head and loss, as none is published: the mean Huber of
    the four coordinates; certain means an intersection over union above 1/2.
    """
    coordinates = 4

    def error(self, values, target):
        error = F.huber_loss(256 * values, 256 * target, delta=4.0, reduction="none").mean(-1)
        area = lambda box: (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)
        both = torch.cat([torch.maximum(values, target)[..., :2], torch.minimum(values, target)[..., 2:]], -1)
        return 0.05 * error, area(both) > (area(values) + area(target)) / 3     # both / (sum - both) > 1/2


class DepthReadout(Decoder):
    """Dense readout: features (B * T, M, D) of frames -> depth (B * T, P, 1), decoded as colours are."""

    def __init__(self, dim=512, transformer=(3, 8, 512), hidden=2048, bases=16):
        super().__init__(dim, transformer, hidden, bases, channels=1)
        self.apply(init_weights)

    def loss(self, values, target, valid):
        """Mean |value - target| over the valid ones, (..., P, 1) each. our choice: none is published."""
        values, valid = full(values), valid.bool()
        error = (values - torch.where(valid, target, values.detach())).abs()    # invalid targets may be inf
        return error.sum() / valid.sum().clamp(min=1)


class AttentionReadout(nn.Module):
    """The released heads: each query looks once at all tokens of exactly `frames` frames. Points or boxes."""

    def __init__(self, coordinates=2, dim=512, width=1024, heads=8, frames=16, copies=8, hidden=4096,
                 bases=16):
        """
        copies: each query is asked so often, each time for frames / copies frames. Released: points with 8
        copies and heads, boxes with 1 copy and 4 heads.
        """
        super().__init__()
        self.coordinates, self.heads, self.frames, self.bases = coordinates, heads, frames, bases
        self.initializer = mlp(2 * bases * coordinates, dim, dim)
        self.copies = nn.Parameter(torch.zeros(copies, dim)) if copies > 1 else None
        self.times = nn.Parameter(torch.zeros(frames, 1, dim))
        self.norm_features = nn.LayerNorm(dim, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(dim, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, hidden, width)
        self.values = nn.Linear(width, 4 * frames // copies)
        self.apply(init_weights)

    def forward(self, features, queries):
        """
        features (B, frames, N, D) of a released model; queries (B, K, coordinates) in frame 0, as shares of
        the frame's size. Returns a Readout without state.
        """
        B, T, N, _ = features.shape
        if T != self.frames:
            raise ValueError(f"this head takes exactly {self.frames} frames, not {T}")
        x = (self.norm_features(features) + self.times).flatten(1, 2)           # (B, T*N, D)
        q = self.initializer(fourier(queries, self.bases).to(x.dtype))          # (B, K, D)
        if self.copies is not None:
            q = (q[:, :, None] + self.copies).flatten(1, 2)                     # (B, K * copies, D)
        q = self.query(q)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(split(q), split(self.key(x)), split(self.value(x)))
        o = q + self.out(seen.transpose(1, 2).flatten(2))
        o = self.values(o + self.mlp(self.norm(o)))             # (B, K * copies, 4 * T / copies)
        o = full(o).view(B, queries.shape[1], T, 4).transpose(1, 2)             # (B, T, K, 4)
        if self.coordinates == 4:
            return Readout(o, None, None, None)
        return Readout(torch.sigmoid(o[..., :2]), o[..., 2:], visible_and_certain(o[..., 2:]), None)


# ---- the authors' checkpoints --------------------------------------------------------------------
NAMES = tuple((re.compile(theirs), ours) for theirs, ours in (  # applied in this order
    (r"^pretrained_model/", ""), ("/", "."), (r"\.(kernel|scale|embeddings)$", ".weight"),
    # backbone
    (r"^predictor_sa\.", "predictor."), (r"^predictor_ca\.", "corrector."),
    (r"^(state|correction)_layer_norm", "state_norm"),
    (r"^encoder\.backbone\.Conv_", "encoder.convs."),
    (r"^encoder\.backbone\.LayerNorm_0", "encoder.norm_convs"),
    (r"^encoder\.pos_embedding\.dense_pe", "encoder.positions"),
    (r"^encoder\.transformer\.Dense_0", "encoder.proj_in"),
    (r"^encoder\.transformer\.Dense_1", "encoder.proj_out"),
    (r"^encoder\.transformer", "encoder"),
    # blocks
    (r"layer_(\d)", r"layers.\1"), (r"\.norm_encoder\.", ".norm."), (r"\.norm_q\.", ".norm_attention."),
    (r"\.norm_attn\.", ".norm_mlp."), (r"MLP_(in|out)", r"mlp_\1"),
    (r"(self|cross)_att\.", r"\1_attention."), (r"\.dense_(\w+)", r".\1"),
    # readouts
    (r"^backbone\.transformer\.Dense_0", "proj_in"), (r"^backbone\.transformer\.Dense_1", "proj_out"),
    (r"^backbone\.", ""), (r"^output_", ""), (r"^(query_)?initializer\.layers_1\.", "initializer."),
    (r"^(initializer|predictor|values|logits)\.Dense_0", r"\1.0"),
    (r"^(initializer|predictor|values|logits)\.Dense_1", r"\1.2"),
    (r"^temporal_tile_posenc\.weight", "copies"), (r"^attention_readout\.temporal_posenc\.weight", "times"),
    (r"^attention_readout\.MLP_0\.Dense_0", "mlp.0"), (r"^attention_readout\.MLP_0\.Dense_1", "mlp.2"),
    (r"^attention_readout\.LayerNorm_0", "norm_features"), (r"^attention_readout\.LayerNorm_1", "norm"),
    (r"^attention_readout\.(key|value)_embedding", r"\1"), (r"^attention_readout\.Dense_0", "query"),
    (r"^attention_readout\.Dense_1", "out"), (r"^attention_readout\.Dense_2", "values")))


def convert(arrays):
    """{name: tensor} of the authors (flax) -> state dict of ours: other names, kernels turned around."""
    state = {}
    for name, x in arrays.items():
        key = name
        for theirs, ours in NAMES:
            key = theirs.sub(ours, key)
        if name.endswith("/kernel"):
            if x.ndim == 4:                                     # convolution (kh, kw, in, out)
                x = x.permute(3, 2, 0, 1)
            else:                                               # (in, out), (in, nh, hd) or (nh, hd, out)
                x = (x.flatten(0, -2) if "dense_out" in name else x.flatten(1)).T
        elif name.endswith("/bias"):
            x = x.flatten()                                     # (nh, hd) of the heads' keys and values
        state[key] = x.contiguous()
    return state


def read_npz(path):
    """{name: float32 tensor} of the little-endian float arrays in a .npz; anything else in it is left out."""
    kinds = {"<f2": (torch.float16, 2), "<f4": (torch.float32, 4), "<f8": (torch.float64, 8)}
    arrays = {}
    with open(path, "rb") as raw:           # no such file, a folder, no permission: OSError
        try:
            for item in zipfile.ZipFile(raw).infolist():
                if not item.filename.endswith(".npy"):
                    continue
                with zipfile.ZipFile(raw).open(item) as file:
                    magic = file.read(8)
                    width, form = (2, "<H") if magic[6:7] == b"\x01" else (4, "<I")
                    head = file.read(struct.unpack(form, file.read(width))[0])
                    head = ast.literal_eval(head.decode("latin1"))      # literals only: executes nothing
                    if magic[:6] != b"\x93NUMPY" or str(head["descr"]) not in kinds:
                        continue
                    dtype, size = kinds[head["descr"]]
                    shape, count = head["shape"], math.prod(head["shape"])
                    x = torch.zeros(0)
                    if count:
                        x = torch.frombuffer(bytearray(file.read(count * size)), dtype=dtype, count=count)
                x = x.view(shape[::-1] if head["fortran_order"] else shape)
                x = x.permute(*range(x.ndim)[::-1]) if head["fortran_order"] else x
                arrays[item.filename.removesuffix(".npy")] = x.float()
        except Exception as error:          # a foreign or damaged file: anything can happen
            raise ValueError(f"{path}: not a .npz of arrays, or a damaged one "
                             f"({type(error).__name__}: {str(error)[:80]})") from None
    return arrays


def load(path, what, build):
    """build(state dict) -> module, with the weights of the file; ValueError that says why not."""
    arrays = read_npz(path)
    try:
        state = convert(arrays)
        module = build(state)
        own = module.state_dict()
        lacks = [key for key in own if key not in state]
        if lacks:
            raise ValueError(f"{len(lacks)} tensors are missing, such as {lacks[0]}")
        module.load_state_dict({key: state[key] for key in own})    # what else is in the file is ignored
    except (KeyError, IndexError, TypeError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a checkpoint of the authors' MooG {what}: {reason}") from None
    return module.eval()


def load_official(path):
    """
    MooG from the authors' backbone checkpoint (.npz), or one of their training library's: with or without
    `pretrained_model/` before each name, the decoder with or without self-attention. In eval mode. Raises
    OSError if the file can't be read, ValueError that says why it isn't such a checkpoint.
    """
    def build(state):
        if "values.weight" in state:
            raise ValueError("this is a head; use load_official_head")
        shape = lambda key: state[key].shape
        layers = lambda part: len({key.split(".layers.")[1].split(".")[0] for key in state
                                   if key.startswith(part + ".layers.")})

        def spec(part, attention):
            width = shape(f"{part}.layers.0.{attention}.query.weight")[0]
            return layers(part), width // shape(f"{part}.layers.0.{attention}.norm_query.weight")[0], width

        released = "encoder.proj_out.weight" in state
        pixels_meet = "decoder.transformer.layers.0.self_attention.query.weight" in state
        channels = tuple(shape(f"encoder.convs.{i}.weight")[0] for i in range(6))
        dim = shape("state_norm.weight")[0]
        positions = (shape("encoder.proj_in.weight")[1] - channels[-1] if released
                     else shape("encoder.positions.weight")[1])
        return MooG(Config(
            dim=dim, channels=channels, released=released,
            strides=PRESETS["released"]["strides"] if released else Config.strides,
            encoder_bases=positions // 4, decoder_bases=(shape("decoder.recon.weight")[1] - dim) // 4,
            predictor=spec("predictor", "self_attention"), corrector=spec("corrector", "cross_attention"),
            decoder=spec("decoder.transformer", "cross_attention"),
            mlp=shape("predictor.layers.0.mlp_in.weight")[0],
            decoder_self_attention=pixels_meet))
    return load(path, "backbone", build)


def load_official_head(path):
    """AttentionReadout from the authors' point or box head (.npz). In eval mode. Raises as load_official."""
    def build(state):
        if "decoder.recon.weight" in state or "predictor.norm.weight" in state:
            raise ValueError("this is a backbone; use load_official")
        shape = lambda key: state[key].shape
        inputs, (frames, _, dim) = shape("initializer.0.weight")[1], shape("times")
        outputs, width = shape("values.weight")
        copies, coordinates = 4 * frames // outputs, 2 if "copies" in state else 4
        # head counts aren't in the tensors, once converted: points were released with 8, boxes with 4
        return AttentionReadout(coordinates, dim, width, 8 if coordinates == 2 else 4, frames, copies,
                                shape("mlp.0.weight")[0], inputs // (2 * coordinates))
    return load(path, "point or box head", build)


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    model, B = MooG(Config(**PRESETS["tiny"])), 2
    video = torch.rand(B, model.cfg.frames, 3, model.cfg.size, model.cfg.size)
    start = time.perf_counter()
    loss, logs = model(dict(video=video))
    loss.backward()
    print(f"one step of {B} clips: loss {loss:.3f}, {time.perf_counter() - start:.2f} s")
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}",
          {name: f"{sum(p.numel() for p in part.parameters()):,}" for name, part in model.named_children()})
    model.eval()
    with torch.no_grad():
        states = model.unroll(video)
        frames, attention = model.decode(states.predicted, video.shape[-2:], return_attention=True)
        more = model.unroll(video[:, :3], states.last)
        points = PointReadout(model.cfg.dim, width=64, transformer=(1, 4, 64), hidden=128)(
            states.features, torch.rand(B, 5, 2), torch.zeros(B, 5, dtype=torch.long))
    print("predicted", tuple(states.predicted.shape), "features", tuple(states.features.shape),
          "frames", tuple(frames.shape), "attention", tuple(attention.shape))
    print("three frames more", tuple(more.predicted.shape), "points", tuple(points.values.shape))
    print({name: round(value.item(), 3) for name, value in logs.items()})
