"""
MooG, Moving Off-the-Grid: scene-grounded video representations
(van Steenkiste et al., 2024, arXiv 2411.05927), in one file that needs nothing but torch.

The idea. A ViT's tokens are tied to the image grid: a token is a place, and what moves wanders from
token to token. MooG's tokens belong to no place. They start as noise, see each frame by
cross-attention, and the only task is to predict the next frame from them: a pixel asks the tokens
for its colour, again by cross-attention. To predict what will be where, it helps when a token holds
on to a part of the scene and follows it.

    state s_0 = noise; for each frame t:
        p_t      = s_t + predictor(s_t)              self-attention only
        frame^_t = decoder(p_t)                      before the frame is seen
        s_t+1    = LN(p_t + corrector(p_t, e_t))     e_t = encoder(frame_t)
    loss = mean over all frames of |frame^_t - frame_t|^2        (frame 0 can only be a mean image)

Nothing is learnt per token or per frame: any number of both will do at test time. Glossary:
    B     clips                  N     tokens of the state (1024)     e    encoder's grid tokens
    T     frames (8)             D     their width (512)              De   their width
    H W   pixels                 P     decoded pixels of a frame      K    queries of a readout
    h w   encoder's grid: H, W over the product of the strides (4), rounded up
    predicted   p_t, what the tokens expect before they see frame t
    corrected   s_t+1, after they have seen it; the state that is carried on

Two variants were published. The paper's decodes the prediction p_t. The released weights keep the
state un-normalised, normalise it at the start of each step, and are decoded from the state before:
both predict a frame from those before it. `grid=True` puts the tokens back on the grid, as the
paper's baselines. Sizes follow the authors' code; departures are marked "our choice".

    model = MooG(Config(**PRESETS["paper"]))        # or: load_official("moog_ego4d_backbone.npz")
    loss, logs = model(dict(video=video))           # video (B, T, 3, H, W), uint8, or float in 0..1

    states = model.unroll(video)                    # predicted, corrected, features, last
    more = model.unroll(next_frames, states.last)   # goes on as if it had been one clip
    ahead = model.predict_ahead(video)              # for frames 0..T, each before it is seen
    frames, attention = model.decode(ahead, (H, W), return_attention=True)
    points = PointReadout(model.cfg.dim)(states.features.detach(), queries, query_frames)

`python moog.py` runs a demo in seconds. MIT licence: copy this file freely.
"""
import math
import re
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
    tokens: int = 1024                      # N in training; any number at test time
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
    subsample: int = 8                      # training decodes 1 pixel in subsample x subsample
    decoder_self_attention: bool = False    # pixels also look at each other: then all are decoded
    released: bool = False                  # the released weights' phase and layout
    grid: bool = False                      # baseline: the tokens stay on the encoder's grid
    recurrent: bool = True                  # with grid: off, a prediction knows the last frame only
    checkpoint: bool = False                # recompute steps in backward: less memory

    @property
    def inputs(self):
        return dict(frames=self.frames, size=self.size)

PRESETS = {
    # a laptop CPU: minutes; README has the numbers. our choice of everything
    "tiny": dict(
        size=64, frames=4, tokens=64, dim=64, channels=(32, 48, 64), strides=(2, 2, 2),
        encoder_bases=12, decoder_bases=4, predictor=(1, 4, 64), corrector=(2, 1, 64),
        decoder=(2, 2, 64), mlp=256, state_scale=1.0),
    # the paper's main model; not yet trained here. our choice: checkpoint, to save memory
    "paper": dict(checkpoint=True),
    # one 24 GB card, by our estimate; not yet run. our choice of everything
    "small": dict(
        size=64, tokens=256, dim=256, channels=(32, 64, 64, 128, 128, 256), predictor=(3, 4, 256),
        corrector=(2, 4, 256), decoder=(4, 2, 128), mlp=1024),
    # the layout of the public checkpoint (trained on Ego4D, by its name)
    "released": dict(strides=(2, 1, 1, 2, 1, 1), released=True, checkpoint=True),
}

PAPER = dict(       # the authors' configuration for MOVi-E; its steps are in a comment there
    steps=1_000_000, batch_size=128, lr=1e-4, min_lr=1e-7, warmup=1000 / 1_000_000,
    betas=(0.9, 0.95), weight_decay=1e-4, weight_decay_end=1e-4, clip=1.0)
SCENES = dict(size=128, sprites=5)
RECIPES = {
    # our choice: small budgets want large plain things that move fast
    "tiny": PAPER | dict(
        steps=4400, batch_size=16, lr=2e-3, min_lr=1e-5, warmup=0.05,
        scenes=dict(sprites=3, speed=20.0, pan=4.0, zoom=0.0, roll=0.0, radius=(0.15, 0.25),
                    grain=24.0, flat=0.9)),
    "paper": PAPER | dict(scenes=SCENES),
    "small": PAPER | dict(      # our choice: a smaller model takes larger and fewer steps
        steps=100_000, batch_size=32, lr=3e-4, warmup=0.01, scenes=SCENES | dict(size=64)),
    "released": PAPER | dict(scenes=SCENES),    # our choice: theirs is not published
}

def as_float(video, dtype=torch.float32):
    """uint8, or float in [0, 1], to float in [0, 1]."""
    return video.to(dtype) / 255 if video.dtype == torch.uint8 else video.to(dtype)

def fp32(x):
    """At least float32, whatever autocast made of it: for losses and meters."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def chunked(function, x, size, dim=0):
    """function(x), without gradients in chunks of x along dim, to save memory."""
    if torch.is_grad_enabled():             # the graph keeps all activations anyway
        return function(x)
    return torch.cat([function(part) for part in x.split(size, dim)], dim)

# ---- positions -----------------------------------------------------------------------------------
def axis_positions(n, device=None):
    """n numbers from -1 to 1, end points included (float32)."""
    # Bit by bit as the released models: the highest octave magnifies the last bit 500,000 times.
    s = torch.arange(n, device=device, dtype=torch.float32) * (1 / max(n - 1, 1))
    g = -(1 - s) + s
    if n > 1:
        g[-1] = 1.0
    return g

@torch.compiler.disable     # a fused multiply-add would change the last bit, see axis_positions
def grid_positions(height, width, device=None):
    """(y, x) of each place of a grid, row by row, in [-1, 1]: (height * width, 2)."""
    y = axis_positions(height, device)
    x = axis_positions(width, device)
    return torch.cartesian_prod(y, x)

def fourier(x, bases):
    """Coordinates (..., n) -> sin and cos of pi * 2^i * x for i < bases: (..., 2 * bases * n)."""
    x = x.float() * math.pi                                 # always in float32, see axis_positions
    x = torch.cat([x * 2 ** i for i in range(bases)], -1)   # y, x, 2y, 2x, 4y, 4x, ...
    return torch.sin(torch.cat([x, x + math.pi / 2], -1))

# ---- transformer ---------------------------------------------------------------------------------
def mlp(inputs, hidden, outputs):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, outputs))

class Attention(nn.Module):
    """Multi-head, queries and keys RMS-normalised: x (B, L, D) looks at y (B, M, Dkv)."""
    def __init__(self, dim, kv_dim, heads, width):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, width, bias=False)
        self.key = nn.Linear(kv_dim, width, bias=False)
        self.value = nn.Linear(kv_dim, width, bias=False)
        self.norm_query = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_key = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, dim)

    def forward(self, x, y, weights=False):
        """(B, L, D), or the weights, where x looks: (B, nh, L, M), each row sums to 1."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)            # (B, nh, ., hd)
                   for t in (self.query(x), self.key(y), self.value(y)))
        q = self.norm_query(fp32(q))
        k = self.norm_key(fp32(k))
        if weights:
            return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(out.transpose(1, 2).flatten(2))

class Block(nn.Module):
    """Pre-norm; self- and cross-attention side by side, from the same normed x; y is not normed."""
    def __init__(self, dim, heads, width, hidden, kv_dim=None, self_attention=True):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.self_attention = Attention(dim, dim, heads, width) if self_attention else None
        self.cross_attention = Attention(dim, kv_dim, heads, width) if kv_dim else None
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.mlp = mlp(dim, hidden, dim)

    def forward(self, x, y=None):
        normed = self.norm_attention(x)
        if self.self_attention is not None:
            x = x + self.self_attention(normed, normed)
        if self.cross_attention is not None:
            x = x + self.cross_attention(normed, y)
        return x + self.mlp(self.norm_mlp(x))

class Transformer(nn.Module):
    """x (B, L, D), y (B, M, Dkv) -> (B, L, D). spec: layers, heads, width of q, k, v."""
    def __init__(self, dim, spec, hidden, kv_dim=None, self_attention=True):
        super().__init__()
        layers, *spec = spec
        self.layers = nn.ModuleList(
            Block(dim, *spec, hidden, kv_dim, self_attention) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6, bias=False)

    def forward(self, x, y=None):
        for layer in self.layers:
            x = layer(x, y)
        return self.norm(x)

    def attention(self, x, y):
        """Where x looks at y in the last layer: (B, nh, L, M)."""
        *others, last = self.layers
        for layer in others:
            x = layer(x, y)
        return last.cross_attention(last.norm_attention(x), y, weights=True)

def init_weights(module):
    """As the authors: kernels truncated normal of variance 1 / fan-in, biases zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        std = module.weight[0].numel() ** -0.5 / 0.87962566103423978    # of what the cut leaves
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

# ---- encoder and decoder -------------------------------------------------------------------------
def pad_same(x, stride):
    """Pads (B, C, H, W) for a 3 x 3 convolution; sizes / stride rounded up; odd one last."""
    pads = []
    for n in (x.shape[3], x.shape[2]):                      # left, right, top, bottom
        total = max((math.ceil(n / stride) - 1) * stride + 3 - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)

class Encoder(nn.Module):
    """Convolutions, plus Fourier positions: frames (B, 3, H, W) -> grid tokens (B, h*w, De)."""
    def __init__(self, cfg):
        super().__init__()
        last = cfg.channels[-1]
        positions = 4 * cfg.encoder_bases
        self.bases = cfg.encoder_bases
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, s) for a, b, s in zip((3, *cfg.channels), cfg.channels, cfg.strides))
        self.norm_convs = nn.LayerNorm(last, eps=1e-6, bias=False)
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6, bias=False)
        if cfg.released:                    # positions stand beside the features, to the end
            self.dim = last + positions                     # De
            self.positions = None
            self.proj_in = nn.Linear(self.dim, cfg.dim)
            self.proj_out = nn.Linear(cfg.dim, self.dim)
        else:                               # positions are projected and added
            self.dim = cfg.dim                              # De
            self.positions = nn.Linear(positions, last)
            self.proj_in = nn.Linear(last, cfg.dim)
            self.proj_out = nn.Identity()

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = F.gelu(x, approximate="tanh") if i else x
            x = conv(pad_same(x, conv.stride[0]))                       # at last (B, C, h, w)
        grid = grid_positions(*x.shape[2:], x.device)                   # (h*w, 2)
        positions = fourier(grid, self.bases).to(x.dtype)               # (h*w, 4 * bases)
        x = self.norm_convs(x.flatten(2).mT)                            # (B, h*w, C)
        if self.positions is None:
            x = torch.cat([x, positions.expand(len(x), -1, -1)], -1)
        else:
            x = x + self.positions(positions)
        return self.proj_out(self.norm(self.proj_in(x)))

class Decoder(nn.Module):
    """A pixel's coordinates look at the tokens and come back as its colour (SRT). States (B, N, D);
    size (H, W); index: numbers y * W + x of the wanted pixels (B, P), None for all."""
    def __init__(self, dim, spec, mlp, bases=16, channels=3, self_attention=False):
        super().__init__()
        width = dim + 4 * bases
        self.dim = dim
        self.bases = bases
        self.transformer = Transformer(width, spec, mlp, dim, self_attention)
        self.recon = nn.Linear(width, channels)

    def forward(self, states, size, index=None, attention=False):
        """Colours (B, P, channels); or where each pixel looks in the last layer, (B, P, nh, N)."""
        positions = fourier(grid_positions(*size, states.device), self.bases).to(states.dtype)
        if index is not None:
            positions = positions[index]                                # (B, P, 4 * bases)
        queries = F.pad(positions.expand(len(states), -1, -1), (self.dim, 0))
        if attention:
            return self.transformer.attention(queries, states).transpose(1, 2)
        return self.recon(self.transformer(queries, states))

def subsample(size, factor, offsets=None):
    """Numbers y * W + x of one pixel in each factor x factor, (..., H/factor * W/factor): the
    middle of each square, or, with offsets (..., 2) of y and x, rolled by these."""
    H, W = size
    if H % factor or W % factor:
        raise ValueError(f"frames of {H}x{W}: {factor} must divide both, or take subsample=1")
    if offsets is None:
        offsets = torch.zeros(2, dtype=torch.long)
    rows = torch.arange(factor // 2, H, factor, device=offsets.device)
    columns = torch.arange(factor // 2, W, factor, device=offsets.device)
    y = (rows - offsets[..., :1]) % H                       # (..., H/factor)
    x = (columns - offsets[..., 1:]) % W                    # (..., W/factor)
    return (y[..., :, None] * W + x[..., None, :]).flatten(-2)

def gather_pixels(video, index):
    """Pixels of a video (B, T, C, H, W) at index (B, T, P) -> (B, T, P, C)."""
    index = index[:, :, None].expand(-1, -1, video.shape[2], -1)        # (B, T, C, P)
    return video.flatten(3).gather(3, index).mT

def psnr(prediction, target):
    """Peak signal-to-noise ratio in dB of frames (B, T, P, C) in [0, 1], averaged; at most 100."""
    error = (fp32(prediction) - target).square().mean((-2, -1)).clamp(min=1e-10)
    return (-10 * error.log10()).mean()

# ---- the model -----------------------------------------------------------------------------------
DECODE_CHUNK = 2 ** 16      # pixels decoded at once where nothing is to be differentiated

class States(NamedTuple):
    predicted: torch.Tensor     # (B, T, N, D) before frame t is seen
    corrected: torch.Tensor     # (B, T, N, D) after; un-normalised in the released variant
    features: torch.Tensor      # (B, T, M, D) for readouts: both, M = 2N; released: corrected
    last: torch.Tensor          # (B, N, D) give it back to unroll() to go on

def check(cfg):
    """Says what to change if a Config can't be built."""
    assert len(cfg.channels) == len(cfg.strides), "channels and strides: one of each a convolution"
    for layers, heads, width in (cfg.predictor, cfg.corrector, cfg.decoder):
        assert width % heads == 0, f"width {width} must be a multiple of its {heads} heads"
    assert cfg.size % cfg.subsample == 0, (
        f"size={cfg.size} must be a multiple of subsample={cfg.subsample}")
    assert not (cfg.grid and cfg.released), "grid=True is of the paper's model, not released"
    assert cfg.grid or cfg.recurrent, "recurrent=False needs grid=True: its state is all a MooG has"

class MooG(nn.Module):
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
        # our choice: predictions start near grey, not as noise of variance 1 (the authors')
        with torch.no_grad():
            self.decoder.recon.weight.mul_(0.1)
            self.decoder.recon.bias.fill_(0.5)

    def compile(self, *args, **kwargs):
        """torch.compile of what a step calls, not of the unrolled loop: much less to compile."""
        for module in (self.encoder, self.predictor, self.corrector, self.decoder.transformer):
            module.compile(*args, **kwargs)

    # -- the recurrence --
    def initial_state(self, B, tokens):
        """Noise (B, tokens, D)."""
        like = self.state_norm.weight.expand(B, tokens, -1)
        state = self.cfg.state_scale * torch.randn_like(like)
        return state if self.cfg.released else self.state_norm(state)

    def predict(self, state):
        """What the tokens (B, N, D) expect of the next frame, before they see it."""
        if self.cfg.released:
            state = self.state_norm(state)
        return state + self.predictor(state)

    def correct(self, p, e):
        """The tokens p (B, N, D) after they have seen a frame's grid tokens e (B, h*w, De)."""
        if not self.cfg.grid:
            c = p + self.corrector(p, e)
        elif self.cfg.recurrent:    # our choice: the frame's features stay, and look at the tokens
            c = e + self.corrector(e, p)
        else:                       # our choice: as large a model, with nothing else to look at
            c = e + self.corrector(e, e)
        return c if self.cfg.released else self.state_norm(c)

    def run(self, function, *tensors):
        """function(*tensors), with cfg.checkpoint once more in backward, to save memory."""
        if not self.cfg.checkpoint:
            return function(*tensors)
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)

    def recurrence(self, video, state=None, tokens=None):
        """Video (B, T, 3, H, W) -> predicted, corrected (B, T, N, D), initial state (B, N, D)."""
        B, T = video.shape[:2]
        frames = as_float(video, self.state_norm.weight.dtype).flatten(0, 1)    # (B*T, 3, H, W)
        e = chunked(self.encoder, frames, 64).unflatten(0, (B, T))              # (B, T, h*w, De)
        if state is None:
            N = e.shape[2] if self.cfg.grid else tokens or self.cfg.tokens
            state = self.initial_state(B, N)
        states = [state]
        predicted = []
        for t in range(T):
            predicted.append(self.run(self.predict, states[t]))
            states.append(self.run(self.correct, predicted[t], e[:, t]))
        return torch.stack(predicted, 1), torch.stack(states[1:], 1), state

    def predict_ahead(self, video, state=None, tokens=None):
        """As unroll(), -> states (B, T + 1, N, D) of frames 0..T, each from those before it."""
        predicted, corrected, start = self.recurrence(video, state, tokens)
        if self.cfg.released:
            return torch.cat([start[:, None], corrected], 1)
        return torch.cat([predicted, self.predict(corrected[:, -1])[:, None]], 1)

    def unroll(self, video, state=None, tokens=None):
        """Video (B, T, 3, H, W), uint8 or float in [0, 1] -> States. state: `last` of an earlier
        chunk; None: `tokens` of noise, None: as in training (with grid, one for each place)."""
        predicted, corrected, _ = self.recurrence(video, state, tokens)
        features = corrected if self.cfg.released else torch.cat([predicted, corrected], 2)
        return States(predicted, corrected, features, corrected[:, -1])

    # -- decoding --
    def per_pixel(self, states, size, index, attention=False):
        """The decoder's output for all frames in one call: (B, T, P, ...)."""
        B, T = states.shape[:2]
        if index is None:
            index = torch.arange(size[0] * size[1], device=states.device)
        index = index.expand(B, T, -1).flatten(0, 1)                    # (B*T, P)
        states = states.flatten(0, 1)                                   # (B*T, N, D)

        def decode(pixels):
            return self.decoder(states, size, pixels, attention)

        if self.cfg.decoder_self_attention:
            out = decode(index)                     # all at once: the pixels look at each other
        else:
            out = chunked(decode, index, max(DECODE_CHUNK // (B * T), 1), dim=1)
        return out.unflatten(0, (B, T))

    def decode(self, states, size, index=None, return_attention=False):
        """States (B, T, N, D), of predict_ahead() -> frames (B, T, 3, H, W) of size (H, W), or,
        with index (B, T, P) or (P,) of pixels y * W + x, their colours (B, T, P, 3); both can leave
        [0, 1]. return_attention: also where they look in the last layer (B, T, nh, P, N)."""
        colours = self.per_pixel(states, size, index)                   # (B, T, P, 3)
        if index is None:
            colours = colours.mT.unflatten(-1, size)                    # (B, T, 3, H, W)
        if not return_attention:
            return colours
        return colours, self.per_pixel(states, size, index, attention=True).transpose(2, 3)

    def tokens_used(self, states, size, index):
        """Share of the tokens that some decoded pixel looks at most; at most T * P / N."""
        attention = self.per_pixel(states, size, index, attention=True)     # (B, T, P, nh, N)
        top = attention.mean(3).argmax(-1)                                  # (B, T, P)
        used = torch.zeros(len(states), states.shape[2], device=top.device)
        return used.scatter(1, top.flatten(1), 1.0).mean()

    # -- training --
    def forward(self, batch):
        """batch: `video` (B, T, 3, H, W), uint8 or float in [0, 1] -> loss, detached scalars."""
        video = as_float(batch["video"])
        B, T, _, *size = video.shape
        states = self.predict_ahead(video[:, :-1])              # (B, T, N, D)
        factor = 1 if self.cfg.decoder_self_attention else self.cfg.subsample
        offsets = torch.randint(factor, (B, T, 2), device=video.device)
        index = subsample(size, factor, offsets)                # (B, T, P)
        prediction = fp32(self.decode(states, size, index))     # (B, T, P, 3)
        target = gather_pixels(video, index)
        loss = F.mse_loss(prediction, target)
        with torch.no_grad():
            copied = gather_pixels(video[:, :-1], index[:, 1:])
            logs = dict(
                psnr=psnr(prediction[:, 1:], target[:, 1:]),
                copy_psnr=psnr(copied, target[:, 1:]),
                tokens_used=self.tokens_used(states[:1].detach(), size, index[:1]),
                state_norm=fp32(states).norm(dim=-1).mean())    # of the decoded states
        return loss, logs

    def after_step(self, progress):
        """After each optimiser step: nothing to do."""
    def param_groups(self, weight_decay):
        """All parameters are decayed, norms and biases too, as in the authors' configuration."""
        return [dict(params=list(self.parameters()), weight_decay=weight_decay)]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")       # other numbers of pixels: not worth compiling
    def report(self, batch):
        """PSNR of predicting a frame from those before it, and of copying: {row: {column: x}}."""
        video = as_float(batch["video"])
        B, T, _, *size = video.shape
        factor = 1 if self.cfg.decoder_self_attention else math.gcd(4, *size)
        index = subsample(size, factor).to(video.device).expand(B, T, -1)
        states = self.predict_ahead(video[:, :-1])
        predicted = self.decode(states, size, index)            # (B, T, P, 3)
        pixels = gather_pixels(video, index)
        table = {}
        for name, t in (("t >= 1", 1), (f"t = {T - 1}", T - 1)):
            table[f"PSNR in dB, {name}"] = dict(
                predicted=psnr(predicted[:, t:], pixels[:, t:]),
                copy=psnr(pixels[:, t - 1:-1], pixels[:, t:]))
        return table

# ---- readouts ------------------------------------------------------------------------------------
class Readout(NamedTuple):
    values: torch.Tensor                    # (B, T, K, C) points x y, boxes y1 x1 y2 x2, in [0, 1]
    logits: torch.Tensor | None = None      # (B, T, K, 2) visible, certain; not of released boxes
    state: torch.Tensor | None = None       # (B, K, width) to go on with; not of released heads

    @property
    def visible(self):
        """Visible and certain: (B, T, K) bool."""
        return torch.sigmoid(fp32(self.logits)).prod(-1) > 0.5

class PointReadout(nn.Module):
    """Recurrent: a query becomes a state and looks at each frame's features. paper: Sec. 3.2"""
    coordinates = 2

    def __init__(self, dim=512, width=512, transformer=(3, 8, 512), hidden=2048, bases=16):
        """dim: of the features; width: of the states; transformer: layers, heads, width of qkv."""
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
        """features (B, T, M, D); queries (B, K, coordinates) in [0, 1], at query_frames (B, K),
        None: 0; what it says of frames before is meaningless. state: of an earlier chunk."""
        positions = fourier(queries, self.bases).to(self.proj_in.weight.dtype)
        start = self.initializer(positions)                     # (B, K, width)
        if state is None:
            state = start
        corrected = []
        for t in range(features.shape[1]):
            if query_frames is not None:
                begins = (query_frames == t)[..., None]         # (B, K, 1)
                state = torch.where(begins, start.to(state.dtype), state)
            c = state + self.proj_out(self.transformer(self.proj_in(state), features[:, t]))
            state = self.state_norm(c + self.predictor(c))
            corrected.append(c)
        c = torch.stack(corrected, 1)                           # (B, T, K, width)
        return Readout(torch.sigmoid(fp32(self.values(c))), self.logits(c), state)

    def error(self, values, target):
        """Huber loss of each point (B, T, K), and whether it is near enough to be certain."""
        distance = 256 * ((values - target).square().sum(-1) + 1e-12).sqrt()
        error = F.huber_loss(distance, torch.zeros_like(distance), delta=4.0, reduction="none")
        return 0.05 * error, distance < 6

    def loss(self, out, target, visible, valid=None):
        """target (B, T, K, coordinates); visible (B, T, K) bool; valid, likewise: which count, not
        those before the query; None: all. our choice, none is published: like TAP-Net's, Huber
        (delta 4 pixels of 256) x 0.05 where visible; cross-entropy of visible, there of certain."""
        visible = visible.bool()
        valid = torch.ones_like(visible) if valid is None else valid.bool()
        seen = valid & visible
        target = torch.where(seen[..., None], target, out.values.detach())  # may be nan
        error, near = self.error(out.values, target)
        logits = fp32(out.logits)
        truth = torch.stack([visible, near], -1).to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")   # (B, T, K, 2)
        each = valid * bce[..., 0] + seen * (error + bce[..., 1])
        return each.sum() / valid.sum().clamp(min=1)

class BoxReadout(PointReadout):
    """The same for boxes y1 x1 y2 x2. our choice of head and loss, as none is published: the mean
    Huber of the coordinates; certain means an intersection over union above 1/2."""
    coordinates = 4

    def error(self, values, target):
        error = F.huber_loss(256 * values, 256 * target, delta=4.0, reduction="none").mean(-1)
        start = torch.maximum(values, target)[..., :2]
        end = torch.minimum(values, target)[..., 2:]
        boxes = torch.stack([torch.cat([start, end], -1), values, target])      # (3, B, T, K, 4)
        both, a, b = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)    # areas
        return 0.05 * error, both > (a + b - both) / 2

class DepthReadout(Decoder):
    """Features (B * T, M, D) of frames -> depth (B * T, P, 1), decoded as colours are."""
    def __init__(self, dim=512, transformer=(3, 8, 512), hidden=2048, bases=16):
        super().__init__(dim, transformer, hidden, bases, channels=1)
        self.apply(init_weights)

    def loss(self, values, target, valid):
        """Mean (value - target)^2 over the valid ones, (..., P, 1)."""
        # our choice: none is published; absolute errors stayed at the median for hundreds of steps
        values = fp32(values)
        target = torch.where(valid.bool(), target, values.detach())     # invalid ones may be inf
        return (values - target).square().sum() / valid.bool().sum().clamp(min=1)

class AttentionReadout(nn.Module):
    """The released heads: each query looks once at all tokens of exactly `frames` frames; it is
    asked `copies` times, each for frames / copies. Boxes as released: 4 heads, 1 copy."""
    def __init__(self, coordinates=2, dim=512, width=1024, heads=8, frames=16, copies=8,
                 hidden=4096, bases=16):
        super().__init__()
        self.coordinates = coordinates
        self.heads = heads
        self.bases = bases
        self.initializer = mlp(2 * bases * coordinates, dim, dim)
        # our choice: both start at zero; how the authors' began is not published
        self.copies = nn.Parameter(torch.zeros(copies, dim)) if copies > 1 else None
        self.times = nn.Parameter(torch.zeros(frames, 1, dim))
        self.norm_features = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, width)
        self.key = nn.Linear(dim, width)
        self.value = nn.Linear(dim, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, hidden, width)
        self.values = nn.Linear(width, 4 * frames // copies)
        self.apply(init_weights)

    def forward(self, features, queries):
        """features (B, frames, N, D); queries (B, K, coordinates) in [0, 1], at frame 0."""
        T = features.shape[1]
        x = (self.norm_features(features) + self.times).flatten(1, 2)           # (B, T*N, D)
        q = self.initializer(fourier(queries, self.bases).to(x.dtype))          # (B, K, D)
        if self.copies is not None:
            q = (q[:, :, None] + self.copies).flatten(1, 2)                     # (B, K * copies, D)
        q = self.query(q)
        qkv = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
               for y in (q, self.key(x), self.value(x)))
        seen = F.scaled_dot_product_attention(*qkv)
        o = q + self.out(seen.transpose(1, 2).flatten(2))
        o = self.values(o + self.mlp(self.norm(o)))             # (B, K * copies, T / copies * 4)
        o = fp32(o).unflatten(1, (queries.shape[1], -1))        # (B, K, copies, T / copies * 4)
        o = o.flatten(2).unflatten(2, (T, 4)).transpose(1, 2)   # (B, T, K, 4)
        if self.coordinates == 4:
            return Readout(o)
        return Readout(torch.sigmoid(o[..., :2]), o[..., 2:])

# ---- the authors' checkpoints --------------------------------------------------------------------
NAMES = (       # (pattern of theirs, ours), applied in this order
    (r"^(pretrained_model/|backbone/|attention_readout/|output_)", ""), ("/", "."),
    (r"\.(kernel|scale|embeddings)$", ".weight"),
    # backbone
    (r"^predictor_sa\.", "predictor."), (r"^predictor_ca\.", "corrector."),
    (r"^(state|correction)_layer_norm", "state_norm"),
    (r"^encoder\.backbone\.Conv_", "encoder.convs."),
    (r"^encoder\.backbone\.LayerNorm_0", "encoder.norm_convs"),
    (r"^encoder\.pos_embedding\.dense_pe", "encoder.positions"),
    (r"^(encoder\.)?transformer\.Dense_0", r"\1proj_in"),
    (r"^(encoder\.)?transformer\.Dense_1", r"\1proj_out"), (r"^encoder\.transformer", "encoder"),
    # blocks
    (r"layer_(\d)", r"layers.\1"), (r"\.norm_encoder\.", ".norm."),
    (r"\.norm_q\.", ".norm_attention."), (r"\.norm_attn\.", ".norm_mlp."),
    (r"MLP_in", "mlp.0"), (r"MLP_out", "mlp.2"), (r"(self|cross)_att\.", r"\1_attention."),
    (r"\.dense_(\w+)", r".\1"),
    # readouts
    (r"^(query_)?initializer\.layers_1\.", "initializer."), (r"^MLP_0\.", "mlp."),
    (r"^(\w+)\.Dense_0", r"\1.0"), (r"^(\w+)\.Dense_1", r"\1.2"),
    (r"^LayerNorm_0", "norm_features"), (r"^LayerNorm_1", "norm"),
    (r"^temporal_tile_posenc\.weight", "copies"), (r"^temporal_posenc\.weight", "times"),
    (r"^Dense_0", "query"), (r"^(key|value)_embedding", r"\1"), (r"^Dense_1", "out"),
    (r"^Dense_2", "values"))

def convert(arrays):
    """{name: tensor} of the authors -> our state dict: other names, kernels transposed."""
    state = {}
    for name, x in arrays.items():
        key = name
        for pattern, ours in NAMES:
            key = re.sub(pattern, ours, key)
        if name.endswith("/bias"):
            x = x.flatten()                         # (nh, hd) of the heads' keys and values
        elif name.endswith("/kernel") and x.ndim == 4:
            x = x.permute(3, 2, 0, 1)               # convolution (kh, kw, in, out)
        elif name.endswith("dense_out/kernel"):
            x = x.flatten(0, -2).T                  # (nh, hd, out)
        elif name.endswith("/kernel"):
            x = x.flatten(1).T                      # (in, out) or (in, nh, hd)
        state[key] = x
    return state

def load(path, what, build):
    """build(state dict) -> module with the weights of the file, in eval mode."""
    import numpy as np
    with open(path, "rb") as file:                  # no such file, no permission: OSError
        try:
            with np.load(file, allow_pickle=False) as arrays:   # nothing is executed
                state = convert({name: torch.from_numpy(x) for name, x in arrays.items()})
            module = build(state)
            module.load_state_dict({name: state[name] for name in module.state_dict()})
        except Exception as error:                  # a foreign or damaged file: anything can happen
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{path}: not a {what} of MooG's authors ({reason})") from None
    return module.eval()

def load_official(path):
    """MooG from a backbone checkpoint (.npz) of the authors; OSError or ValueError say why not."""
    return load(path, "backbone", build_model)

def load_official_head(path):
    """AttentionReadout from the authors' point or box head (.npz); errors likewise."""
    return load(path, "point or box head", build_head)

def transformer_spec(state, part, attention):
    """Layers, heads, width of q, k, v of a transformer, from the shapes in a state dict."""
    layers = [key for key in state if re.match(rf"{part}\.layers\.\d+\.norm_mlp", key)]
    width = len(state[f"{part}.layers.0.{attention}.query.weight"])
    head = len(state[f"{part}.layers.0.{attention}.norm_query.weight"])
    return len(layers), width // head, width

def build_model(state):
    """A MooG of the sizes in a state dict."""
    dim = len(state["state_norm.weight"])
    channels = tuple(len(state[f"encoder.convs.{i}.weight"]) for i in range(6))
    released = "encoder.proj_out.weight" in state
    if released:
        positions = state["encoder.proj_in.weight"].shape[1] - channels[-1]
    else:
        positions = state["encoder.positions.weight"].shape[1]
    return MooG(Config(
        dim=dim, channels=channels, released=released,
        strides=PRESETS["released"]["strides"] if released else Config.strides,
        encoder_bases=positions // 4,
        decoder_bases=(state["decoder.recon.weight"].shape[1] - dim) // 4,
        predictor=transformer_spec(state, "predictor", "self_attention"),
        corrector=transformer_spec(state, "corrector", "cross_attention"),
        decoder=transformer_spec(state, "decoder.transformer", "cross_attention"),
        mlp=len(state["predictor.layers.0.mlp.0.weight"]),
        decoder_self_attention="decoder.transformer.layers.0.self_attention.query.weight" in state))

def build_head(state):
    """An AttentionReadout of the sizes in a state dict; heads as released: no shape tells."""
    coordinates = 2 if "copies" in state else 4
    frames, _, dim = state["times"].shape
    outputs, width = state["values.weight"].shape
    return AttentionReadout(
        coordinates, dim, width, heads=8 if coordinates == 2 else 4, frames=frames,
        copies=4 * frames // outputs, hidden=len(state["mlp.0.weight"]),
        bases=state["initializer.0.weight"].shape[1] // (2 * coordinates))

if __name__ == "__main__":
    model = MooG(Config(**PRESETS["tiny"]))
    video = torch.rand(2, 4, 3, 64, 64)
    loss, logs = model(dict(video=video))
    print(f"one step: loss {loss:.3f}, psnr {logs['psnr']:.1f} dB")
    states = model.unroll(video)
    frames = model.decode(states.predicted, (64, 64))
    points = PointReadout(model.cfg.dim)(states.features, queries=torch.rand(2, 5, 2))
    print("states", states.predicted.shape, "frames", frames.shape, "points", points.values.shape)
