"""
Videos in, batches out: synthetic scenes with exact truth, your own videos, and crops for models.

    Scenes          procedural video: flow, occlusion, classes, depth, boxes, tracks in closed form
    MovingSquares   squares whose colours tell their velocities, with masks and displacements
    Videos          your files: mp4, mkv, mov, avi, webm, folders of them or of jpg / png frames
    MultiCrop       a pair of frames -> dense crops, DINO's global and local crops, colours
    make_loader     ties them together: index lists in, batches on the device out

Sample i of a run is drawn on the CPU by generators seeded with (seed, i) and the like, never a
worker's or a device's: the data are the same with any number of workers and after any resume.
B clips, T frames, H W pixels. Pixel centres lie at integers. Boxes are (top, left, height, width).
"""
import argparse
import atexit
import bisect
import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import os
import pickle
import re
import signal
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from os.path import expanduser
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F

def warn(text):
    """One line on stderr, whatever the names of files in it."""
    line = text.replace("\n", " ").encode("utf-8", "backslashreplace").decode()
    print(line, file=sys.stderr, flush=True)

# ---- synthetic scenes ----------------------------------------------------------------------------
EVAL = 10**9        # added to the seed of evaluation data; those of training lie below
SHAPES = ("disc", "square", "triangle", "flower", "cross", "ring", "moon", "bar")   # classes 1..8
CELLS = 128                             # a silhouette is a table of CELLS x CELLS yes/no cells

def split_seed(seed, split):
    """The seed of a split: no clip is in both."""
    if not 0 <= seed < EVAL:
        raise ValueError(f"{seed=} must lie in 0 .. 10**9 - 1")
    return seed + {"train": 0, "eval": EVAL}[split]

@functools.cache
def silhouettes():
    """Shapes in [-1, 1]^2: tables (8, 128, 128) of 0 and 1, points with the same hull (512, 8)."""
    y, x = (np.mgrid[:CELLS, :CELLS] + 0.5) * 2 / CELLS - 1
    r = np.hypot(x, y)
    width = abs(x)
    height = abs(y)
    longer = np.maximum(width, height)
    tables = np.stack([
        r < 0.9,
        longer < 0.78,
        (y < 0.6) & (y > 1.8 * width - 0.95),
        r < 0.66 + 0.29 * np.cos(5 * np.arctan2(y, x)),
        (np.minimum(width, height) < 0.28) & (longer < 0.92),
        (r < 0.95) & (r > 0.5),
        (r < 0.95) & (np.hypot(x - 0.5, y) > 0.62),
        (width < 0.95) & (height < 0.34),
    ])
    left = tables.argmax(2)                                     # (8, 128), of each row of cells
    right = CELLS - tables[..., ::-1].argmax(2)
    upper = np.stack([left, right]) + 1j * np.arange(CELLS)
    corners = np.stack([upper, upper + 1j]) * 2 / CELLS - (1 + 1j)
    corners = corners * tables.any(2)                           # rows without cells: the middle
    hulls = torch.from_numpy(corners).mT.reshape(-1, len(SHAPES))
    return torch.from_numpy(tables).float(), hulls

def make_textures(rng, n, size, grain):
    """Periodic textures (n, 3, size + 1, size + 1): mean 0, std 1, last row = first row. Half are
    1/f clouds, folded into bands, half mosaics of patches where one of 12 clouds is the highest."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))      # cycles per pixel
    f[0, 0] = np.inf
    damp = 1 - np.exp(-(4 * grain * f) ** 2)            # our choice: little above 4 grains
    def noise(channels, slope):
        waves = np.fft.rfft2(rng.normal(size=(n, channels, size, size)))
        return np.fft.irfft2(waves * damp / f**slope, (size, size))
    clouds = noise(3, rng.uniform(1.2, 2.4, (n, 1, 1, 1)))
    clouds = clouds[:, :1] + 0.5 * clouds
    clouds = clouds / clouds.std((1, 2, 3), keepdims=True)
    textures = np.sin(rng.uniform(0.5, 3, (n, 1, 1, 1)) * clouds)
    patches = noise(12, 2.4).argmax(1)                                      # (n, S, S)
    palette = rng.normal(size=(n, 12, 1)) + 0.6 * rng.normal(size=(n, 12, 3))
    for i in range(0, n, 2):
        textures[i] = palette[i, patches[i]].transpose(2, 0, 1)
    textures = textures + 0.2 * clouds
    textures = textures - textures.mean((1, 2, 3), keepdims=True)
    textures = textures / textures.std((1, 2, 3), keepdims=True)
    textures = np.pad(textures, ((0, 0), (0, 0), (0, 1), (0, 1)), mode="wrap")
    return torch.from_numpy(textures).float()

@dataclass
class SceneOptions:
    size: int = 64              # pixels: frames are size x size
    sprites: int = 4            # K, how many
    speed: float = 5.0          # pixels per frame in mid-clip, at most, any direction
    pan: float = 1.0            # the same for the camera
    zoom: float = 0.01          # log scale per frame, at most, either sign
    roll: float = 0.01          # radians per frame, at most, either sign
    radius: tuple[float, ...] = (0.12, 0.24)    # least and most of a sprite, as a share of size
    grain: float = 8.0          # pixels: how large the things in a texture are
    textures: int = 128         # how many there are, per split
    flat: float = 0.0           # 0: textured, 1: sprites and background in one plain colour each

def similarity(scale, shift, layers, points):
    """scale p + shift in complex numbers, of points (B*n, P) or (P,), by the maps (B, n, L) of the
    layers (B*n, P) or (B*n, 1) that they belong to."""
    scale = scale.to(torch.complex64).flatten(0, 1).gather(1, layers)
    shift = shift.to(torch.complex64).flatten(0, 1).gather(1, layers)
    return (scale * points).add_(shift)                         # in place: several times faster

class Scenes:
    """Synthetic video: textured sprites fly before an endless background, seen by a moving camera.

    Layer l (0 the background, 1..K the sprites, far to near) moves by a similarity, in complex
    numbers x + i y: p = a_l(t) q + b_l(t). Its silhouette and colours depend on q only. So all
    truth is closed form: owner of a pixel = the nearest layer whose silhouette holds q; flow =
    a_l(t+1) q + b_l(t+1) - p; occluded = another layer owns the landing point, or none.
    Clip i depends on (seed, split, i) and the options alone. `batch` returns

    video     (B, T, 3, H, W)    float32 in [0, 1]; without `truth` the only entry
    flow      (B, T-1, 2, H, W)  (x, y) in pixels, from frame t to t + 1
    occluded  (B, T-1, H, W)     bool: what pixel (t, y, x) shows can't be seen in frame t + 1
    classes   (B, T, H, W)       long: 0 background, 1..8 = SHAPES
    ids       (B, T, H, W)       long: 0 background, 1..K sprites, the larger the nearer
    depth     (B, T, H, W)       1 background, 0.4 to 0.9 sprites (no unit; parallax is 1 / depth)
    boxes     (B, T, K, 4)       x1 y1 x2 y2 in pixels around the whole silhouette, seen or hidden
    tracks    (B, T, P, 2)       (x, y) in pixels of P points, at random pixels of frame 0
    visible   (B, T, P)          bool"""
    def __init__(self, frames=8, seed=0, split="train", **options):
        self.options = SceneOptions(**options)
        self.frames = frames
        self.seed = split_seed(seed, split)
        self.size = self.options.size
        self.tables, self.hulls = silhouettes()
        line = torch.arange(self.size)
        self.pixels = (line + 1j * line[:, None]).flatten()                     # (H*W,) x + i y

    @functools.cached_property
    def bank(self):
        """The textures (n, 3, S+1, S+1), made at first use."""
        rng = np.random.default_rng((self.seed, 0, 0, 1))   # no clip's: they have two words of seed
        return make_textures(rng, self.options.textures, self.size, self.options.grain)

    def _world(self, rngs):
        """Draws clips: the layers' maps p = a q + b, (B, T, L), q in pixels, and their looks."""
        o = self.options
        uniform = np.stack([rng.random((20, 1, o.sprites + 1)) for rng in rngs], 1)
        depth, radius, speed, bend, zoom, roll = uniform[:6]                # each (B, 1, L)
        kind, texture, gain, grey, *tint = uniform[6:13, :, 0]              # each (B, L)
        heading, bend_heading, pose = np.exp(2j * np.pi * uniform[13:16])
        home, offset = self.size * (uniform[16:18] + 1j * uniform[18:20])
        depth[..., 0] = 1.2                                     # the background: 1 in the end
        depth = 0.4 - 0.5 * np.sort(-depth)                     # far to near
        radius = self.size * (o.radius[0] + (o.radius[1] - o.radius[0]) * radius)
        kind = 1 + (kind * len(SHAPES)).astype(int)
        kind[:, 0] = 0
        # The background has no motion of its own; what is drawn for it is the camera's. Paths are
        # quadratic: from end to end of a clip the velocity changes by up to `fastest`.
        first = np.arange(o.sprites + 1) == 0
        fastest = np.where(first, o.pan, o.speed)               # pixels per frame
        zoom = (2 * zoom - 1) * np.where(first, o.zoom, 0.05 * o.speed / radius)
        roll = (2 * roll - 1) * np.where(first, o.roll, 0.25 * o.speed / radius)
        tau = np.arange(self.frames)[:, None] - (self.frames - 1) / 2       # (T, 1) since mid-clip
        velocity = fastest * speed * heading
        change = fastest * bend * bend_heading
        path = velocity * tau + change / max(self.frames - 1, 1) * tau**2 / 2
        warp = np.exp((zoom + 1j * roll) * tau)                             # (B, T, L)
        middle = (1 + 1j) * (self.size - 1) / 2
        own_path = np.where(first, 0, home - middle + path)
        shade = 0.4 * (grey - 0.5) + 0.3 * (np.stack(tint) - 0.5)           # (3, B, L)
        world = dict(
            a=warp[..., :1] * np.where(first, 1, warp) * pose,
            b=warp[..., :1] * own_path + path[..., :1] / depth + middle,
            radius=radius,
            offset=offset,
            kind=kind,
            depth=depth[:, 0].astype(np.float32),
            texture=(texture * o.textures).astype(int),
            gain=((1 - o.flat) * (0.12 + 0.16 * gain)).astype(np.float32),
            shade=(0.5 + (1 + o.flat) * shade).astype(np.float32),
        )
        return SimpleNamespace(**{name: torch.from_numpy(value) for name, value in world.items()})

    def _owner(self, world, points, frames=slice(None)):
        """The nearest layer (B*n, P) at points (B*n, P) or (P,) of n frames."""
        scale = 1 / (world.radius * world.a[:, frames])         # pixels -> -1 .. 1 of a silhouette
        shift = -scale * world.b[:, frames]
        B, n, L = scale.shape
        P = points.shape[-1]
        owner = torch.zeros(B * n, P)
        for k in range(1, L):                               # far to near: the larger number wins
            q = similarity(scale, shift, torch.full((B * n, 1), k), points)
            table = self.tables[world.kind[:, k, None] - 1]                 # (B, 1, 128, 128)
            grid = torch.view_as_real(q).view(B, n, P, 2)
            inside = F.grid_sample(table, grid, mode="nearest", align_corners=False)
            owner = torch.maximum(owner, k * inside.view(B * n, P))
        return owner.long()

    def _colour(self, world, owner, points):
        """What the layers owner (B*T, P) show at the points: (B, 3, T, P)."""
        S = self.size
        atlas = self.bank[world.texture]                                    # (B, L, 3, S+1, S+1)
        atlas.mul_(world.gain[..., None, None, None])
        atlas.add_(world.shade.permute(1, 2, 0)[..., None, None]).clamp_(0, 1)
        atlas = atlas.transpose(1, 2).flatten(2, 3)                         # (B, 3, L*(S+1), S+1)
        scale = 1 / world.a / S
        shift = world.offset / S - scale * world.b
        grid = torch.view_as_real(similarity(scale, shift, owner, points))  # (B*T, P, 2) in periods
        grid.sub_(grid.floor()).mul_(S)                                     # pixels of the texture
        grid[..., 1].add_(owner, alpha=S + 1)                               # ... and of the atlas
        grid.mul_(torch.tensor([2 / S, 2 / (atlas.shape[2] - 1)])).sub_(1)  # in [-1, 1]
        return F.grid_sample(atlas, grid.unflatten(0, (len(atlas), -1)), align_corners=True)

    def _move(self, world, start, end, owner, points):
        """How far the points (B*n, P) of the layers owner go from frames `start` to frames `end`,
        (B*n, P) complex, and whether they are to be seen there."""
        ratio = world.a[:, end] / world.a[:, start]
        shift = world.b[:, end] - ratio * world.b[:, start]
        step = similarity(ratio - 1, shift, owner, points)
        landed = points + step
        off = torch.view_as_real(landed - self.pixels.mean()).abs()
        within = off.amax(-1) <= self.size / 2
        return step, within & (self._owner(world, landed, end) == owner)

    def batch(self, indices, truth=False, points=32):
        """The clips of these numbers: the dictionary of the class docstring, `points` tracks."""
        rngs = [np.random.default_rng((self.seed, int(i))) for i in indices]
        world = self._world(rngs)
        B = len(rngs)
        T = self.frames
        S = self.size
        owner = self._owner(world, self.pixels)                             # (B*T, H*W)
        video = self._colour(world, owner, self.pixels).view(B, 3, T, S, S)
        video = video.transpose(1, 2).contiguous()
        if not truth:
            return dict(video=video)
        owner = owner.view(B, T, S * S)
        start = owner[:, :-1].flatten(0, 1)
        flow, seen = self._move(world, slice(-1), slice(1, None), start, self.pixels)
        chosen = torch.tensor(np.array([rng.integers(S * S, size=points) for rng in rngs]))
        start = owner[:, 0].gather(1, chosen).repeat_interleave(T, 0)       # (B*T, P)
        queries = self.pixels[chosen].repeat_interleave(T, 0)
        steps, visible = self._move(world, slice(1), slice(None), start, queries)
        hull = self.hulls[:, world.kind[:, 1:] - 1].transpose(0, 1) * world.radius[..., 1:]
        hull = world.a[:, :, None, 1:] * hull[:, None] + world.b[:, :, None, 1:]
        hull = torch.view_as_real(hull).float()                             # (B, T, 512, K, 2)
        ids = owner.flatten(1)
        return dict(
            video=video,
            flow=torch.view_as_real(flow).mT.reshape(B, T - 1, 2, S, S),
            occluded=~seen.view(B, T - 1, S, S),
            classes=world.kind.gather(1, ids).view(B, T, S, S),
            ids=ids.view(B, T, S, S),
            depth=world.depth.gather(1, ids).view(B, T, S, S),
            boxes=torch.cat([hull.amin(2), hull.amax(2)], -1),
            tracks=torch.view_as_real(queries + steps).view(B, T, points, 2),
            visible=visible.view(B, T, points),
        )

# ---- moving squares ------------------------------------------------------------------------------
STAMPS = ("square", "disc", "triangle", "cross")
MODES = ("differentiated", "all-move", "random-mover", "colour-mover")
SPEED = 0.1         # frame widths per frame: twice the largest velocity along an axis
GAP = 8             # least pixels between two objects in frame 0: no latent cell holds two

@dataclass(eq=False)
class MovingSquares:
    """The data of the MeloMotion report: coloured squares on black; colours tell the velocities.

    A mover goes v = SPEED * (red - 1/2, green - 1/2) frame widths per frame; blue, 1/2 to 1, only
    keeps it visible. Who moves: `differentiated` object 0, whatever colours the others have;
    `all-move`; `random-mover` one, and nothing in frame 0 tells which; `colour-mover` object 0, and
    the others are known by red = green = 1/2. Movers stay inside for 16 frames, then may leave.
    Drawn at whole pixels, the larger number on top.
    Clip i depends on (seed, split, i) and the options alone. `batch` returns

    first_frame    (B, 3, H, W)     uint8
    masks          (B, N, H, W)     bool, each object's pixels in frame 0
    displacements  (B, N, T-1, 2)   (x, y) since frame 0 in frame widths: exactly t v, not rounded
    video          (B, T, 3, H, W)  uint8, if `video`
    our choice: 128 of 255 counts as 1/2, so that 8 bits hold the colours, and the law, exactly."""
    size: int = 128                 # pixels: frames are size x size
    frames: int = 16                # T
    objects: int = 3                # N
    side: int = 24                  # pixels: objects fill a box of side x side
    mode: str = "differentiated"    # who moves, see MODES
    shape: str = "square"           # see STAMPS, or any: each object one of them
    video: bool = True              # False: frame 0 alone is drawn
    seed: int = 0                   # below 10**9
    split: str = "train"            # or "eval", whose clips are others

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"squares: mode={self.mode!r} must be one of {', '.join(MODES)}")
        self.seed = split_seed(self.seed, self.split)
        y, x = (np.mgrid[:self.side, :self.side] + 0.5) * 2 / self.side - 1         # in (-1, 1)
        cross = np.minimum(abs(x), abs(y)) <= 0.36
        tables = [abs(x) <= 1, np.hypot(x, y) <= 1, abs(x) <= (1 + y) / 2, cross]
        self.stamps = tables if self.shape == "any" else [tables[STAMPS.index(self.shape)]]
        self.reach = self.size * min(self.frames - 1, 15)   # pixels in 16 frames per unit of v

    def _draw(self, rng):
        """One clip's colours (N, 3) in 0..255, velocities and corners in frame 0, both (N, 2)."""
        i, j = np.triu_indices(self.objects, 1)
        for _ in range(1600):
            colours = rng.integers((0, 0, 128), 256, (self.objects, 3))
            moves = np.full(self.objects, self.mode == "all-move")
            moves[rng.integers(self.objects) if self.mode == "random-mover" else 0] = True
            if self.mode == "colour-mover":
                colours[~moves, :2] = 128
            v = SPEED * moves[:, None] * (colours[:, :2] - 128) / 255
            path = v * self.reach
            least = np.maximum(-path, 0)
            most = self.size - self.side - np.maximum(path, 0)
            corners = np.rint(rng.uniform(least, most)).astype(int)
            apart = abs(corners[i] - corners[j]).max(-1) >= self.side + GAP
            if apart.all():
                return colours, v, corners
        raise ValueError(f"squares: no room for {self.objects} objects of {self.side} pixels")

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, int(index)))
        colours, v, corners = self._draw(rng)
        S = self.size
        side = self.side
        stamps = [self.stamps[k] for k in rng.integers(len(self.stamps), size=self.objects)]
        masks = torch.zeros(self.objects, S, S, dtype=torch.bool)
        times = self.frames if self.video else 1
        video = np.zeros((times, S + 2 * side, S + 2 * side, 3), np.uint8)  # a rim for what leaves
        ticks = np.arange(times)[:, None]
        for n, (x, y) in enumerate(corners):
            masks[n, y:y + side, x:x + side] = torch.from_numpy(stamps[n])
            places = corners[n] + np.rint(v[n] * S * ticks).astype(int)
            places = np.clip(places, -side, S) + side
            for frame, (x, y) in zip(video, places):
                frame[y:y + side, x:x + side][stamps[n]] = colours[n]
        video = torch.from_numpy(video[:, side:-side, side:-side]).permute(0, 3, 1, 2).contiguous()
        displacements = v[:, None] * np.arange(1, self.frames)[:, None]
        clip = dict(
            first_frame=video[0],
            masks=masks,
            displacements=torch.from_numpy(displacements).float(),
        )
        return clip | dict(video=video) if self.video else clip

    def batch(self, indices):
        """The clips of these numbers: the dictionary in the class docstring."""
        return torch.utils.data.default_collate([self[i] for i in indices])

# ---- your own videos -----------------------------------------------------------------------------
VIDEO_TYPES = (".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".ts")
IMAGE_TYPES = (".jpg", ".jpeg", ".png")
TINY = Fraction(1, 10**12)              # s: what is later than a frame by this is the next frame
RECENT = 32                             # decoded frames that a Reader keeps: samples overlap
TRIES = 10                              # moments drawn in a file, and files drawn in a row

def walk(root):
    """Sorted paths of the regular files in a folder, at any depth, through links but not hidden; or
    that of the file itself."""
    root = expanduser(root)
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such file or folder")
    found = []
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if name[0] != "." and real not in seen)
        if real not in seen:                # a link to a folder above would never end
            found += [os.path.join(folder, name) for name in names if name[0] != "."]
        seen.add(real)
    return sorted(filter(os.path.isfile, found))

def rank(stream):
    """ffmpeg and players take no cover picture, but the default stream, the largest."""
    flags = str(stream.disposition)
    return "attached_pic" not in flags, "default" in flags, stream.width * stream.height

class Reader:
    """A video and its decoder. Times are Fractions of a second after the first frame. (imageio's
    own reader returns wrong frames of variable-rate mp4 and ignores the turn that phones write.)"""
    step = None                             # of a FrameFolder: seconds between two frames

    def __init__(self, path):
        self.path = expanduser(path)
        if not os.path.isfile(self.path):               # opening a FIFO would wait without end
            raise FileNotFoundError(f"{self.path}: no such file")
        self.end = None                                 # time of the last frame, once it is known
        self.open()

    def open(self):
        import av                                       # here: synthetic scenes need no FFmpeg
        self.container = av.open(os.path.abspath(self.path))
        streams = [stream for stream in self.container.streams.video if stream.codec_context]
        if not streams:
            raise ValueError(f"{self.path}: holds no video that FFmpeg can decode")
        self.stream = max(streams, key=rank)
        if self.container.format.name == "avi" and self.stream.codec_context.has_b_frames:
            raise ValueError(f"{self.path}: AVI keeps no times for B-frames: frames would be too "
                             "early; convert it once: ffmpeg -i in.avi out.mkv")
        self.stream.thread_type = "SLICE"               # the loader's workers are the parallelism
        self.stream.codec_context.thread_count = 1
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(30)
        self.tick = self.stream.time_base
        self.frames = self.container.decode(self.stream)
        first = self.decode()
        if first is None:
            raise ValueError(f"{self.path}: holds no frame that FFmpeg can decode")
        self.start = first.pts              # not the header's: that may be another stream's
        self.recent = deque([(first, Fraction(0))], RECENT)     # frames in a row, with their times

    def decode(self, keyframe=False):
        for frame in self.frames:
            if frame.pts is not None and (frame.key_frame or not keyframe):
                return frame

    def keep(self, frame):
        moment = (frame.pts - self.start) * self.tick
        late = self.recent and moment < self.recent[-1][1]
        if frame.is_corrupt or late:                    # painted over, in ways that vary
            raise ValueError(f"{self.path}: is damaged near {float(moment):.2f} s")
        self.recent.append((frame, moment))

    def at(self, t):
        """The first frame at or after t -> (frame, its time), or None behind the last."""
        if self.end is not None and t > self.end:
            return None
        if not self.recent[0][1] <= t <= self.recent[-1][1] + 2:    # s: a usual way to a keyframe
            self.seek(t)
        while self.recent[-1][1] < t:
            frame = self.decode()
            if frame is None:
                self.end = self.recent[-1][1]
                return None
            self.keep(frame)
        return next(found for found in self.recent if found[1] >= t)

    def seek(self, t):
        """To a keyframe at or before t. Frames shown before it are left out: they may need earlier
        ones. Without an index (MPEG-TS) FFmpeg may land behind t: then further back."""
        back = 0
        while back < t:
            self.container.seek(self.start + math.floor((t - back) / self.tick), stream=self.stream)
            self.frames = self.container.decode(self.stream)
            key = self.decode(keyframe=True)
            if key and (key.pts - self.start) * self.tick <= t:
                self.recent.clear()
                return self.keep(key)
            back = 4 * back + 1
        self.container.close()
        self.open()

    def last(self, exact):
        """Time of the last frame, as the header promises, or by decoding the end of the file."""
        length = Fraction(self.container.duration or 0, 10**6)
        if self.stream.duration:
            length = self.stream.duration * self.tick
        if not length:
            raise ValueError(f"{self.path}: no duration; remux: ffmpeg -i in -c copy out.mkv")
        if not exact:
            return length - 1 / self.rate
        list(frames_from(self, length))                 # behind the last one at() knows the end
        return self.end

    def image(self, frame):
        """A decoded frame -> uint8 (H, W, 3), turned and mirrored as players show it."""
        image = frame.to_ndarray(format="rgb24", threads=1)     # threads would not outlive a fork
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is not None:              # shown x = a x + c y, y = b x + d y
            a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
            if abs(b) > abs(a):
                image = image.transpose(1, 0, 2)
                a, d = c, b
            image = image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
        return np.ascontiguousarray(image)

class FrameFolder:
    """Image files {number: path} with Reader's interface: number n stands n / fps seconds after the
    first. Numbers may be nanoseconds: they stay whole."""
    def __init__(self, paths, fps):
        self.paths = paths
        self.numbers = sorted(paths)
        self.path = paths[self.numbers[0]]              # of the file that was read last
        self.rate = Fraction(fps)
        steps = [b - a for a, b in itertools.pairwise(self.numbers)]
        self.step = statistics.mode(steps or [1]) / self.rate           # others are holes

    def at(self, t):
        first = self.numbers[0]
        place = bisect.bisect_left(self.numbers, first + math.ceil(t * self.rate))
        if place < len(self.numbers):
            number = self.numbers[place]
            return self.paths[number], (number - first) / self.rate

    def last(self, exact):
        return (self.numbers[-1] - self.numbers[0]) / self.rate

    def image(self, path):
        self.path = path
        return read_image(path)

def frames_from(reader, t):
    """The frames of a Reader or FrameFolder at or after t, each with its time."""
    while found := reader.at(t):
        yield found
        t = found[1] + TINY

def read_frames(path, times):
    """The first frames at or after `times`, in seconds after the first frame; cheap if they ascend:
    (list of uint8 (H, W, 3) arrays, list of their true times). Raises ValueError if the file ends
    before, av.error.FFmpegError if it is damaged."""
    reader = Reader(path)
    slack = 0.5 * min(reader.tick, 1e-3) + 1e-6     # clocks round: in mkv 1/30 s is 0.033
    found = [reader.at(max(t - slack, 0)) for t in times]
    if None in found:
        raise ValueError(f"{path}: ends at {float(reader.end):.2f} s, before the wanted times")
    return [reader.image(frame) for frame, _ in found], [float(moment) for _, moment in found]

def read_image(path):
    """An image file -> uint8 (H, W, 3), upright by its Exif tag; 16-bit grey by its high byte."""
    with iio.imopen(path, "r", plugin="pillow") as file:
        if not file.metadata(index=0, exclude_applied=False)["mode"].startswith("I"):
            return file.read(index=0, rotate=True, mode="RGB")
        grey = file.read(index=0, rotate=True)
    return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2)

@dataclass
class VideoOptions:
    gap: tuple = (0.5, 1.0)     # seconds between the frames of a pair, from and to
    repeat: int = 5             # samples from each opening of a video
    fps: float = 30.0     # for folders of frames: what the numbers in their names count, per second
    stride: int = 1             # clips: every stride-th frame of the source

def as_video(images, rng):
    """Frames (H, W, 3) -> `video` (T, 3, H, W)."""
    return dict(video=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))

class Videos(torch.utils.data.Dataset):
    """Frame pairs (frames=2), `gap` seconds apart to half a frame, at variable rates too, or clips
    of every `stride`-th frame. `root` is a video, a folder of them at any depth, or, if none is in
    it, of images: the digits that end their names count `fps` a second, what stands before them,
    with the folder, names the sequence. Clips do not cross holes in the numbers.

    Sample i, for any i >= 0, depends on (seed, i) alone. A pass takes the files in a new order,
    with `repeat` samples from each opening (of images one, and as many as there are in a pass). It
    is transform(list of T uint8 (H, W, 3), a Generator), by default dict(video=(T, 3, H, W)).

    Broken, too short and too sparse files are named once, counted in `broken` and replaced. Raises
    FileNotFoundError (no root), ValueError (nothing in it fits), OSError (ten in a row fail)."""
    def __init__(self, root, frames=2, gap=(0.5, 1.0), stride=1, repeat=5, fps=30.0, seed=0,
                 transform=as_video):
        self.root = root
        self.frames = frames
        self.low = Fraction(gap[0])
        self.high = Fraction(gap[1])
        self.stride = stride
        self.repeat = repeat
        self.seed = seed
        self.transform = transform
        paths = walk(root)
        self.files = [path for path in paths if path.lower().endswith(VIDEO_TYPES)]
        self.sources = self.files                       # paths of videos, or FrameFolders
        self.starts = range(len(self.files))            # what a pass goes through: files, or images
        if not self.files:
            self.repeat = 1
            self.sources = self.find_sequences(paths, fps)
            lengths = [len(source.numbers) for source in self.sources]
            self.starts = np.repeat(np.arange(len(lengths)), lengths)
        other = sorted({*paths} - {*self.files})
        if other:
            kinds = " ".join(sorted({os.path.splitext(path)[1] for path in other}))
            warn(f"{root}: left out {len(other)} files ({kinds}), such as {other[0]}")
        # Shared memory: the workers of a loader count together and name each broken file once.
        self.broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()
        self.order = -1, None                           # a pass, and the order of `starts` in it

    def find_sequences(self, paths, fps):
        """Paths of images -> FrameFolders, those that give samples."""
        found = {}
        for path in paths:
            match = re.fullmatch(r"(.*?)([0-9]+)\.(?i:jpe?g|png)", path, re.DOTALL)
            if match:                       # x1.jpg and x1.png are one frame: the first by name
                found.setdefault(match[1], {}).setdefault(int(match[2]), path)
        if not found:
            raise ValueError(f"{self.root}: no videos and no frames: want {' '.join(VIDEO_TYPES)}, "
                             "or images whose names end in a frame number, as a_0001.jpg does")
        self.files = [path for sequence in found.values() for path in sequence.values()]
        sequences = [FrameFolder(sequence, fps) for sequence in found.values()]
        good = [one for one in sequences if self.draw(one, 0.5, np.random.default_rng(0))]
        if not good:
            raise ValueError(f"{self.root}: too few or too sparse frames for --gap or --stride: at "
                             f"--fps {fps:g} neighbours are {float(sequences[0].step):.3g} s apart")
        return good

    def __len__(self):
        return len(self.starts) * self.repeat

    def __iter__(self):                     # one pass; without this, `for` would go on for ever
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        """Sample numbers -> samples; neighbours share an opening."""
        samples = []
        reader = None
        for i in map(int, indices):
            images, reader = self.read(i, reader)
            samples.append(self.transform(images, np.random.default_rng((self.seed, i, 1))))
        return samples

    def read(self, i, reader=None):
        """The T images of sample i, and their Reader: `reader`, if that has the right file open."""
        n = len(self.starts)
        k, pick = divmod(i, self.repeat)                # the k-th opening of the run
        turn, place = divmod(k, n)
        if self.order[0] != turn:
            self.order = turn, np.random.default_rng((self.seed, turn)).permutation(n)
        for attempt in range(TRIES):  # another file, and where there are few, other moments of them
            start = self.order[1][(place + attempt) % n]
            source = self.sources[self.starts[start]]
            known = reader and source in (reader, reader.path)
            try:
                if not known:
                    reader = Reader(source) if isinstance(source, str) else source
                return self.images(reader, pick, (self.seed, k, attempt, pick + 1)), reader
            except Exception as error:      # a damaged file can raise anything
                path = source if isinstance(source, str) else source.path
                why = str(error).removeprefix(f"{path}: ") or type(error).__name__
            if known:                       # half a file may be good: decide as if asked alone
                return self.read(i)
            reader = None
            file = self.files.index(path)
            if not self.broken[file]:
                self.broken[file] = True
                warn(f"skipped broken file {path}: {why} ({int(self.broken.sum())} so far)")
        raise OSError(f"{self.root}: ten files in a row give no sample; the last: {path}: {why}")

    def images(self, reader, pick, key):
        """The images of sample number `pick` of an opening, drawn with `key`."""
        rng = np.random.default_rng(key)
        begin = (pick + 1 - rng.random()) / self.repeat         # in order of time: few seeks back
        frames = self.draw(reader, begin, rng)
        if frames is None:
            raise ValueError(f"{float(reader.last(exact=True)):.2f} s at {float(reader.rate):.3g} "
                             "frames a second are too short or too sparse for --gap or --stride")
        images = [reader.image(frame) for frame in frames]
        if len({image.shape for image in images}) > 1:
            raise ValueError("its frames change size")
        return images

    def draw(self, reader, begin, rng):
        """A pair or clip that begins at about the share `begin` of the file, or None. What does not
        fit is drawn again, the tenth time from the start. After a miss the file's true end counts.
        (Not before: a sample depends on its number alone, not on what others have found.)"""
        frame = 1 / reader.rate
        length = (self.frames - 1) * self.stride * frame
        if self.frames == 2:
            most = min(self.high, reader.last(exact=False))
            length = self.low + rng.random() * max(most - self.low, 0)
        for attempt in range(TRIES):
            room = max(reader.last(exact=attempt > 0) - length, 0) + frame
            start = max(begin * room - frame, 0)
            first = reader.at(start if attempt < TRIES - 1 else 0)
            take = self.pair if self.frames == 2 else self.clip
            sample = first and take(reader, first, length)
            if sample:
                return sample
            begin = rng.random()

    def pair(self, reader, first, gap):
        """The frame `first` and the one nearest to `gap` after it, of those within the bounds of
        the gap to half a local frame, or None."""
        frame = 1 / reader.rate
        distance = max(self.low - Fraction(3, 2) * frame, 0)
        misses = {}                                             # {how far from `gap`: frame}
        for found, moment in frames_from(reader, first[1] + distance + TINY):
            half = min(frame, moment - first[1] - distance) / 2
            distance = moment - first[1]
            if self.low - half <= distance <= self.high + half:
                misses.setdefault(abs(distance - gap), found)
            if distance >= gap:
                break
        return misses and [first[0], misses[min(misses)]]

    def clip(self, reader, first, _):
        """Every stride-th frame, whatever their times, but not over holes in numbers; or None."""
        count = (self.frames - 1) * self.stride + 1
        found = list(itertools.islice(frames_from(reader, first[1]), count))
        steps = {b - a for (_, a), (_, b) in itertools.pairwise(found)}
        if len(found) == count and (reader.step is None or steps <= {reader.step}):
            return [frame for frame, _ in found[::self.stride]]

# ---- crops and photometric augmentation ----------------------------------------------------------
def random_box(rng, height, width, scale):
    """Top, left, height, width by RandomResizedCrop's rule: area uniform in `scale` times the
    whole, aspect log-uniform in 3/4 .. 4/3; after 10 tries the largest in the middle."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w

def move_box(rng, box, height, width):
    """A box moved by up to a third of its sides in any direction, as far as the frame goes; and how
    far that moves what it shows: (x, y) as shares of its sides."""
    corner = box[:2]
    sides = box[2:]
    turn = rng.uniform(0, 2 * np.pi)
    move = rng.uniform(0, 1 / 3) * np.array([np.sin(turn), np.cos(turn)]) * sides
    moved = np.clip(np.rint(corner + move), 0, (height, width) - sides).astype(int)
    shift = (corner - moved) / sides
    return np.concatenate([moved, sides]), torch.tensor(shift[::-1].copy(), dtype=torch.float32)

def crop_uint8(frame, box, size, flip=False):
    """Frame (H, W, 3) -> its box (3, size, size), both uint8. Antialiased bicubic, as PIL's."""
    top, left, h, w = box
    crop = torch.from_numpy(frame[top:top + h, left:left + w])
    crop = crop.permute(2, 0, 1)[None]              # (1, 3, h, w), channels last: torch's fast path
    crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if flip else crop

def luma(x):
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b

def rotate_hue(x, turn):
    """Moves the hue of (N, 3, H, W) in [0, 1] by (N, 1, 1, 1) turns; keeps saturation and value."""
    r, g, b = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(r, g), b)
    chroma = high - torch.minimum(torch.minimum(r, g), b)
    numerator = torch.where(r == high, g - b, torch.where(g == high, b - r, r - g))
    sixths = torch.where(r == high, 0.0, torch.where(g == high, 2.0, 4.0))
    hue = numerator / (chroma + 1e-12) + sixths + 6 * turn              # in sixths; 0: red
    k = hue + torch.tensor([5, 3, 1], device=x.device).view(3, 1, 1)    # of red, green, blue
    k = k - 6 * (k / 6).floor()                                         # (N, 3, H, W) in [0, 6)
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

def blur(x, sigma):
    """Gaussian blur of square crops (N, 3, S, S), sigma (N, 1, 1, 1) pixels: two products with a
    band matrix, whose rows are normalised: borders are not darkened."""
    line = torch.arange(x.shape[-1], device=x.device)
    weights = torch.exp(-((line[:, None] - line) / sigma) ** 2 / 2)     # (N, 1, S, S)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ x @ weights.mT

OPERATIONS = {                          # of crops (N, 3, S, S), with amounts (N, 1, 1, 1)
    "brightness": lambda x, factor: (factor * x).clamp(0, 1),
    "contrast": lambda x, factor: luma(x).mean((2, 3), keepdim=True).lerp(x, factor).clamp(0, 1),
    "saturation": lambda x, factor: luma(x).lerp(x, factor).clamp(0, 1),
    "hue": rotate_hue,
    "gray": lambda x, _: luma(x).expand_as(x),
    "blur": blur,
    "solarize": lambda x, _: torch.where(x >= 0.5, 1 - x, x),
}
JITTER = ("brightness", "contrast", "saturation", "hue")
NEUTRAL = (1.0, 1.0, 1.0, 0.0)          # factors that change nothing

def photometric(x, params):
    """Colour jitter, grayscale, blur, solarise with torchvision's and PIL's meaning, of those crops
    x (N, 3, S, S) in [0, 1] that need it. params, on the CPU: the device is never waited for:

    order     (N, 4)  the first to the last operation of jitter, numbers of JITTER
    factors   (N, 4)  of brightness, contrast, saturation; turns of hue. NEUTRAL: not at all
    gray, solarize    (N,) bool;   blur (N,)  sigma in pixels; 0: not at all"""
    x = x.clone()

    def apply(name, chosen, amounts):
        index = chosen.nonzero()[:, 0]
        if len(index):
            amounts = amounts[index].to(x.device, non_blocking=True).view(-1, 1, 1, 1)
            index = index.to(x.device, non_blocking=True)
            x.index_copy_(0, index, OPERATIONS[name](x[index], amounts))

    for turn in params["order"].T:          # the first, second ... operation of every crop
        for number, name in enumerate(JITTER):
            factors = params["factors"][:, number]
            apply(name, (turn == number) & (factors != NEUTRAL[number]), factors)
    for name in ("gray", "blur", "solarize"):
        apply(name, params[name] > 0, params[name])
    return x

class MultiCrop:
    """The crops of a frame pair (paper: Sec. 4.1, B.1; what the paper leaves out: as released).

    motion   (2, 3, S, S)     one box (area 0.2-0.4 of the frame) in both frames, never flipped;
                              frame 1 gets colours T1, frame 2 T2
    globals  (2, 2, 3, S, S)  [frame, box]: two boxes (area 0.4-1 of an initial crop, of 0.05-0.2 of
                              the frame), alike in both frames, half of them flipped; T1 and T2
    locals   (2, n, 3, s, s)  [frame, box]: n boxes per frame, all independent (area 0.05-0.4 of the
                              initial crop), flipped, T3

    blur: the largest sigma in pixels of the crop. colours=False: none at all (held-out tables).
    motion_colours of the two motion crops: "shared": frame 1's for both; "none"; our choice:
    "independent", as released, while the paper is silent."""
    def __init__(self, size, local_size, local_crops, blur=2.0, colours=True,
                 motion_colours="independent"):
        if motion_colours not in ("independent", "shared", "none"):
            raise ValueError(f"{motion_colours=} must be independent, shared or none")
        n = local_crops
        self.n = n
        self.blur = blur
        self.colours = colours
        self.motion_colours = motion_colours
        self.one_frame = False      # both motion crops from frame 1; `shift` (2,): how far apart
        # of the 6 + 2n crops: motion of both frames, globals [frame, box], locals [frame, box]
        self.frames = [0, 1] + [0, 0, 1, 1] + n * [0] + n * [1]
        self.sizes = 6 * [size] + 2 * n * [local_size]
        t1 = [0.8, 0.2, 1.0, 0.0]                   # chances of jitter, gray, blur, solarise
        t2 = [0.8, 0.2, 0.1, 0.2]
        t3 = [0.8, 0.2, 0.5, 0.0]
        self.chances = [t1, t2] + [t1, t2, t1, t2] + 2 * n * [t3]

    def draw(self, rng, height, width):
        """Boxes (6 + 2n, 4), flips (6 + 2n,) and parameters of `photometric` of a pair's crops."""
        motion = random_box(rng, height, width, (0.2, 0.4))
        top, left, h, w = random_box(rng, height, width, (0.05, 0.2))
        large = [random_box(rng, h, w, (0.4, 1.0)) for _ in range(2)]
        small = [random_box(rng, h, w, (0.05, 0.4)) for _ in range(2 * self.n)]
        boxes = np.array([motion, motion] + large + large + small)
        boxes[2:, :2] += (top, left)
        flips = rng.random(len(boxes)) < 0.5
        flips[:2] = False
        flips[4:6] = flips[2:4]
        shape = len(boxes), 4
        chosen = rng.random(shape) < self.chances
        order = rng.random(shape).argsort(1)
        factors = rng.uniform((0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1), shape)
        sigma = rng.uniform(0.1, self.blur, len(boxes))
        if self.motion_colours == "none":
            chosen[:2] = False
        if self.motion_colours == "shared":
            for drawn in (chosen, order, factors, sigma):
                drawn[1] = drawn[0]
        jitter, gray, blurred, solarize = chosen.T
        params = dict(
            order=order,
            factors=np.where(jitter[:, None], factors, NEUTRAL).astype(np.float32),
            gray=gray,
            blur=(blurred * sigma).astype(np.float32),
            solarize=solarize,
        )
        return boxes, flips, {name: torch.from_numpy(x) for name, x in params.items()}

    def __call__(self, frames, rng):
        """Two frames (H, W, 3) uint8 of one size -> uint8 crops, and `params` for finish()."""
        height, width, _ = frames[0].shape
        boxes, flips, params = self.draw(rng, height, width)
        sources = list(self.frames)
        out = dict(params=params)
        if self.one_frame:
            sources[1] = 0
            boxes[1], out["shift"] = move_box(rng, boxes[0], height, width)
        crops = []
        for source, box, size, flip in zip(sources, boxes, self.sizes, flips):
            crops.append(crop_uint8(frames[source], box, size, flip))
        small = torch.stack(crops[6:]) if self.n else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        out["motion"] = torch.stack(crops[:2])
        out["globals"] = torch.stack(crops[2:6]).unflatten(0, (2, 2))
        out["locals"] = small.unflatten(0, (2, self.n))
        return out

    def finish(self, batch):
        """Colours: uint8 crops and their `params`, on the CPU -> float crops in [0, 1]."""
        params = batch.pop("params")
        parts = dict(motion=slice(0, 2), globals=slice(2, 6), locals=slice(6, None))
        for name, part in parts.items():
            crops = batch[name] / 255
            if self.colours:
                own = {key: value[:, part].flatten(0, 1) for key, value in params.items()}
                crops = photometric(crops.flatten(0, -4), own).view(crops.shape)
            batch[name] = crops
        return batch

# ---- labelled data for evaluation ----------------------------------------------------------------
@contextlib.contextmanager
def error_prefix(path):
    """Whatever a file does wrong inside becomes one line that begins with its path."""
    if not os.path.isfile(path):            # neither missing, nor a FIFO, which would be waited for
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except Exception as error:              # a damaged file can raise anything, SyntaxError too
        why = " ".join(str(error).split())
        why = why if type(error) is ValueError else f"can't be read, is it damaged? ({why})"
        raise ValueError(f"{path}: {why}") from None

def read_one_channel(path, modes=("L", "P", "1")):
    """The numbers in an image file (H, W), of 8 bits unless Pillow's modes say so; of a palette the
    places, not the colours."""
    with error_prefix(path), open(path, "rb") as file:
        head = file.read(26)
        mode = iio.immeta(path, plugin="pillow", exclude_applied=False)["mode"]
        if mode not in modes:
            raise ValueError(f"must have one channel ({', '.join(modes)}), but is {mode}")
        numbers = iio.imread(path, plugin="pillow", index=0, mode=mode)
    if mode == "L" and head[:4] == b"\x89PNG" and head[24] < 8:     # 2 or 4 bits come spread to 255
        numbers = numbers // (255 // (2 ** head[24] - 1))
    return numbers.astype(np.uint16 if "I" in mode else np.uint8)

def read_clip(paths):
    """Image files -> uint8 (T, H, W, 3)."""
    images = []
    for path in paths:
        with error_prefix(path):
            images.append(read_image(path))
            meta = iio.immeta(path, plugin="pillow", exclude_applied=False)
            if meta.get("Orientation", 1) != 1:
                raise ValueError("is turned by an EXIF tag, its labels are not: store it turned")
            if images[-1].shape != images[0].shape:
                raise ValueError("is not of the size of the first image")
    return np.stack(images)

def numbered(folder, pattern):
    """{number: path} of the files in a folder whose names fit a pattern with a group of digits."""
    matches = [re.fullmatch(pattern, name) for name in os.listdir(folder)]
    found = {int(match[1]): os.path.join(folder, match[0]) for match in matches if match}
    return dict(sorted(found.items()))

def relative_paths(root):
    """{path below root, with /: path} of the files in a folder."""
    root = expanduser(root)
    return {os.path.relpath(path, root).replace(os.sep, "/"): path for path in walk(root)}

def clip_folders(root, file):
    """{name of a folder: path of the file} of the folders at any depth with a file of this name."""
    here = os.path.basename(os.path.abspath(expanduser(root)))
    return {os.path.dirname(name) or here: path for name, path in relative_paths(root).items()
            if os.path.basename(name) == file}

def read_flo(path):
    """Middlebury's .flo -> flow (H, W, 2) float32, (x, y) in pixels, above 1e9 where unknown."""
    numbers = np.fromfile(expanduser(path), "<f4")
    if numbers[0] != 202021.25:
        raise ValueError("does not begin as a .flo file does")
    width, height = numbers[1:3].view("<u4").tolist()
    return numbers[3:].reshape(height, width, 2)

def write_flo(path, flow):
    """Flow (H, W, 2) in pixels -> Middlebury's .flo."""
    height, width, _ = np.shape(flow)
    with open(expanduser(path), "wb") as file:
        file.write(b"PIEH" + np.array([width, height], "<u4").tobytes())    # float32 202021.25
        file.write(np.asarray(flow, "<f4").tobytes())

def read_kitti_flow(path):
    """KITTI's PNG -> flow (H, W, 2) float32 in pixels, 0 where unknown, and valid (H, W) bool."""
    import av                               # Pillow loses the low bytes without a word
    with open(path, "rb") as file:
        raw = file.read()
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[24:26] != b"\x10\x02" or b"IEND" not in raw[-12:]:
        raise ValueError("must be a whole PNG of three channels of 16 bits, as KITTI's flow is")
    with av.open(io.BytesIO(raw), format="png_pipe") as file:
        pixels = next(file.decode(video=0)).to_ndarray(format="rgb48le", threads=1)     # (H, W, 3)
    valid = pixels[..., 2] > 0
    flow = (pixels[..., :2].astype(np.float32) - 2**15) / 64
    return np.where(valid[..., None], flow, 0), valid

def read_pfm(path):
    """FlyingThings3D's .pfm of three channels -> flow (H, W, 2) float32, (x, y) in pixels."""
    with open(expanduser(path), "rb") as file:
        raw = file.read()
    head = re.match(rb"PF\s+(\d+)\s+(\d+)\s+(-?)[\d.eE+-]+\s", raw)         # minus: little endian
    if not head:
        raise ValueError("does not begin as a .pfm file of three channels does")
    numbers = np.frombuffer(raw, "<f4" if head[3] else ">f4", offset=head.end())
    rows = numbers.reshape(int(head[2]), int(head[1]), 3)
    return rows[::-1, :, :2].astype(np.float32)             # stored from the bottom up

SINTEL = r"(.*)flow/([^/]+)/frame_(?P<n>\d+)\.flo"
THINGS = r"(.*)optical_flow/(.+)/into_future/left/OpticalFlowIntoFuture_(?P<n>\d+)_L\.pfm"
KITTI = r"(.*)flow_occ/(\d+)_(?P<n>10)\.png"
FLOW_LAYOUTS = (    # path of a flow; of frames n and n + 1, or 1 and 2, without suffix; val split
    (SINTEL, "{0}clean/{1}/frame_{n:04d}", "/temple_[23]/"),            # as in CroCo v2
    (SINTEL, "{0}final/{1}/frame_{n:04d}", "/temple_[23]/"),
    (THINGS, "{0}frames_cleanpass/{1}/left/{n:04d}", "(^|/)optical_flow/TEST/"),
    (THINGS, "{0}frames_finalpass/{1}/left/{n:04d}", "(^|/)optical_flow/TEST/"),
    (KITTI, "{0}image_2/{1}_{n}", None),
    (KITTI, "{0}colored_0/{1}_{n}", None),
    (r"(.*?)(\d+)_flow\.flo", "{0}{1}_img{n}", None),                   # FlyingChairs
    (r"(.*?)flow\.(flo|png)", "{0}frame{n}", None))                     # yours

class FlowPairs(torch.utils.data.Dataset):
    """Pairs of frames with the true flow between them. `root` holds, at any depth, Sintel,
    FlyingChairs, FlyingThings3D or KITTI as unpacked, or your folders NAME/frame1.png frame2.png
    flow.flo (or flow.png, of KITTI's kind). split: "train", "val" or "all"; KITTI, yours and Chairs
    without FlyingChairs_train_val.txt have no splits: each is everything. [i] is

    frames    (2, H, W, 3)  uint8
    flow      (2, H, W)     float32, (x, y) in pixels, from the first frame on; 0 where unknown
    valid     (H, W)        bool: the flow is known; not where Sintel's `invalid` says so"""
    def __init__(self, root, split="val"):
        self.files = relative_paths(root)
        stems = {os.path.splitext(name)[0]: path for name, path in self.files.items()
                 if name.lower().endswith((*IMAGE_TYPES, ".ppm", ".webp"))}
        chairs = []                             # 1 where a pair is for training
        for path in self.files.values():
            if path.endswith("FlyingChairs_train_val.txt"):
                chairs = np.loadtxt(path, int, ndmin=1)
        self.names = []
        self.items = []                         # (name of a flow's file, paths of its two frames)
        for flow, (pattern, frame, val) in itertools.product(self.files, FLOW_LAYOUTS):
            match = re.fullmatch(pattern, flow)
            if not match:
                continue
            n = int(match.groupdict().get("n", 1))
            first = frame.format(*match.groups(), n=n)
            second = frame.format(*match.groups(), n=n + 1)
            if first not in stems or second not in stems:
                continue
            part = split
            if val:
                part = "val" if re.search(val, flow) else "train"
            elif flow.endswith("_flow.flo") and len(chairs):
                part = "train" if chairs[int(match[2]) - 1] == 1 else "val"
            if split in (part, "all"):
                self.names.append(first.removesuffix("/frame1"))
                self.items.append((flow, [stems[first], stems[second]]))
        if not self.items:
            raise ValueError(f"{root}: no flow with its two frames of split {split!r}: want NAME/"
                             "frame1.png, frame2.png, flow.flo or a known data set as unpacked")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        name, paths = self.items[i]
        path = self.files[name]
        frames = read_clip(paths)                                               # (2, H, W, 3)
        with error_prefix(path):
            if path.endswith(".png"):
                flow, valid = read_kitti_flow(path)
            else:
                flow = read_pfm(path) if path.endswith(".pfm") else read_flo(path)
                valid = (abs(flow) <= 1e9).all(-1)                              # nan is not
            if frames.shape[1:3] != valid.shape:
                raise ValueError(f"the flow is {valid.shape}, its frames {frames.shape[1:3]}")
        invalid = re.sub(r"(^|/)flow/(.*)\.flo", r"\1invalid/\2.png", name)
        if invalid != name and invalid in self.files:
            valid &= read_one_channel(self.files[invalid]) == 0
        flow = np.where(valid[..., None], flow, 0).transpose(2, 0, 1)           # (2, H, W)
        return dict(frames=frames, flow=np.ascontiguousarray(flow), valid=valid)

CAMVID = "sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist"
CITYSCAPES = ("road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, "
              "vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, "
              "bicycle")
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
SEGMENTATION_LAYOUTS = (    # image without suffix, label; classes, first and ignored values, names
    ("<split>/<name>", "{split}annot/{name}.png", 11, 0, 11, CAMVID),                   # SegNet's
    ("leftImg8bit/<split>/<name>_leftImg8bit", "gtFine/{split}/{name}_gtFine_labelTrainIds.png",
     19, 0, 255, CITYSCAPES),
    ("leftImg8bit/<split>/<name>_leftImg8bit", "gtFine/{split}/{name}_gtFine_labelIds.png",
     19, 0, 255, CITYSCAPES),
    ("images/10k/<split>/<name>", "labels/sem_seg/masks/{split}/{name}.png",
     19, 0, 255, CITYSCAPES),                                                           # BDD100K
    ("images/<split>/<name>", "annotations/{split}/{name}.png", 150, 1, 0, None),       # ADE20K
    ("images/<split>/<name>", "labels/{split}/{name}.png", None, 0, 255, None),         # yours
    ("images/<name>", "labels/{name}.png", None, 0, 255, None))

class Segmentation(torch.utils.data.Dataset):
    """Images with a class for each pixel. `root` is the folder of CamVid (SegNet's), Cityscapes,
    BDD100K or ADE20K as unpacked, or yours: images/train/ANY/NAME.jpg
    labels/train/ANY/NAME.png; without splits every fifth image by name is val, the rest train.
    Labels are PNGs of one channel of at most 8 bits, or of a palette. num_classes (2 at least) and
    ignore_index, the value of no class, are by default what the data set says; yours: as many as
    the labels of all splits show, and 255. [i] is

    image     (H, W, 3)  uint8
    classes   (H, W)     int64: 0 .. num_classes - 1, and 255 where ignored

    `names` of the classes or None; `files`: (path of the image, of its label)."""
    def __init__(self, root, split="train", num_classes=None, ignore_index=None):
        files = relative_paths(root)
        for image, label, classes, first, ignored, names in SEGMENTATION_LAYOUTS:
            splits = self.pairs(files, image, label)
            if splits:
                break
        if None in splits:
            pairs = splits[None]
            splits = dict(val=pairs[4::5], tra=[pair for i, pair in enumerate(pairs) if i % 5 < 4])
        self.files = splits.get(split[:3])
        if not self.files:
            raise ValueError(f"{root}: no labelled images of split {split!r}: want images/{split}/"
                             f"A.jpg and labels/{split}/A.png, or a known data set as unpacked")
        self.first = first
        self.ignore_index = ignored if ignore_index is None else ignore_index
        if classes is None:
            classes = self.count_classes([label for pairs in splits.values() for _, label in pairs])
        self.num_classes = num_classes or classes
        if not 2 <= self.num_classes <= 255:
            raise ValueError(f"--classes {self.num_classes}: want 2 to 255")
        self.names = names.split(", ") if names and self.num_classes == classes else None

    def pairs(self, files, image, label):
        """{start of a split's name, or None: [(path of an image, of its label)]} of a layout."""
        splits = "(?P<split>train(ing)?|val(idation)?|test(ing)?)"
        pattern = image.replace("<split>", splits).replace("<name>", "(?P<name>.+)")
        found = {}
        left_out = 0
        for path in files:
            match = re.fullmatch(pattern + r"\.(jpg|jpeg|png)", path, re.IGNORECASE)
            truth = match and label.format(**match.groupdict())
            if truth in files:
                split = match["split"][:3] if "<split>" in image else None
                found.setdefault(split, []).append((files[path], files[truth]))
            elif match:
                left_out += 1
        if found and left_out:
            warn(f"{image}: left out {left_out} images without label")
        return found

    def count_classes(self, labels):
        """One more than the largest class in the files."""
        seen = set()
        for label in labels:
            seen.update(np.unique(read_one_channel(label)).tolist())
        seen.discard(self.ignore_index)
        if len(seen) < 2:                   # one class would be found by everybody: mIoU 100
            raise ValueError(f"{labels[0]}, ...: beside {self.ignore_index}, ignored, only {seen}: "
                             "want two classes. Store 0 and 255 as 0 and 1, or --ignore-index")
        return max(seen) + 1

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, label = self.files[i]
        table = np.full(256, -1)                       # value in the file -> class; -1: not allowed
        table[self.first:self.first + self.num_classes] = np.arange(self.num_classes)
        if label.endswith("_gtFine_labelIds.png"):      # Cityscapes' own: of 34 classes 19 count
            table[:] = 255
            table[CITYSCAPES_IDS] = np.arange(19)
        table[self.ignore_index] = 255
        picture = read_clip([image])[0]
        values = read_one_channel(label)
        if picture.shape[:2] != values.shape:
            raise ValueError(f"{label}: is {values.shape}, its image {picture.shape[:2]}")
        classes = table[values]                                 # (H, W)
        if classes.min() < 0:
            raise ValueError(f"{label}: value {values[classes < 0].max()} is no class and not "
                             f"{self.ignore_index}, to be ignored: set --classes / --ignore-index")
        return dict(image=picture, classes=classes)

class Pickled:
    """Stands for an array or a dtype of a pickle, which would call a function to rebuild it: keeps
    (bytes, dtype, shape, order). np.asarray() makes it an array, if it is of numbers."""
    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state
        if len(state) == 5:                                     # of an array, before protocol 5
            _, shape, dtype, by_columns, raw = state
            self.args = raw, dtype, shape, "F" if by_columns else "C"

    def __array__(self, dtype=None, copy=None):
        raw, kind, shape, order = self.args
        code = kind.args[0]
        if not re.fullmatch("[biufS][0-9]+", code):
            raise ValueError(f"holds arrays of {code:.50}, not of numbers: refused")
        numbers = np.frombuffer(raw, kind.state[1].strip("|=") + code)
        return numbers.reshape(shape, order=order)

class NumpyOnly(pickle.Unpickler):
    """Reads plain containers and arrays of numbers or bytes. A pickle may name any function to be
    called: here it gets stand-ins for those that rebuild arrays, and else an error."""
    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):             # how protocol 2 writes bytes
            return lambda text, encoding: text.encode("latin1")
        arrays = "_reconstruct", "ndarray", "dtype", "_frombuffer"
        if module.split(".")[0] == "numpy" and name in arrays:
            return Pickled
        raise ValueError(f"wants {module}.{name} to be called: refused, arrays have no need of it")

def point_clip(video, tracks, visible, valid, query, **more):
    """What PointTracks returns, of points (P, T) that are checked against their video."""
    if tracks.shape != (len(visible), len(video), 2):
        raise ValueError(f"tracks (P, T, 2) {tracks.shape} do not fit {len(video)} frames")
    tracks = np.where(visible[..., None], tracks, 0).astype(np.float32)
    return dict(
        video=video,
        tracks=np.ascontiguousarray(tracks.swapaxes(0, 1)),
        visible=np.ascontiguousarray(visible.T),
        valid=np.ascontiguousarray(valid.T),
        query_frames=query.astype(np.int64),
        **more,
    )

def read_rgbd(path):
    arrays = np.load(path, allow_pickle=False)
    images = numbered(os.path.dirname(path), r"rgb_(\d+)\.(?:jpg|jpeg|png)")
    depths = numbered(os.path.dirname(path), r"depth_(\d+)\.png")
    video = read_clip(images.values())
    more = {}
    if depths:
        maps = [read_one_channel(file, ("I", "I;16", "I;16B")) for file in depths.values()]
        more["depth"] = np.stack(maps).astype(np.float32) / 1000
        if depths.keys() != images.keys() or more["depth"].shape != video.shape[:3]:
            raise ValueError("each rgb_00.jpg wants a depth_00.png of its size")
    status = arrays["status"]
    query = arrays["query_frame"]
    valid = (status != 2) & (np.arange(status.shape[1]) >= query[:, None])
    return point_clip(video, arrays["tracks"], (status == 0) & valid, valid, query, **more)

def read_tapvid(clip):
    video = clip["video"] if isinstance(clip["video"], list) else np.asarray(clip["video"])
    video = np.stack([read_image(frame) if isinstance(frame, bytes) else frame for frame in video])
    visible = ~np.asarray(clip["occluded"]).astype(bool)
    # Their (0, 0) is the upper left corner of the first pixel, ours its centre.
    tracks = np.asarray(clip["points"]) * np.array(video.shape[2:0:-1]) - 0.5
    seen = visible.any(1)
    visible = visible[seen]
    return point_clip(video, tracks[seen], visible, np.ones_like(visible), visible.argmax(1))

class PointTracks(torch.utils.data.Dataset):
    """Videos with the paths of points: `path` is a .pkl of TAP-Vid or a folder, at any depth, of
    such and of RGB-D clips: rgb_00.jpg ..., depth_00.png ... (16 bits, millimetres), tracks.npz
    with tracks (P, T, 2), status (P, T) of 0 visible, 1 hidden, 2 unknown, query_frame (P,). [i] is

    video          (T, H, W, 3)  uint8
    tracks         (T, P, 2)     float32, (x, y) in pixels, centres at integers; 0 unless visible
    visible        (T, P)        bool
    valid          (T, P)        bool: it is known whether the point is visible
    query_frames   (P,)          int64, where each point is given; of TAP-Vid where first visible
    depth          (T, H, W)     float32 in metres, 0 where not measured; only of clips that have it

    `names` are those of the clips. TAP-Vid's points that are never visible are left out."""
    def __init__(self, path):
        rgbd = clip_folders(path, "tracks.npz")
        self.names = list(rgbd)
        self.items = [(file, read_rgbd, file) for file in rgbd.values()]
        for shard in walk(path):
            if shard.endswith(".pkl"):
                with error_prefix(shard), open(shard, "rb") as file:
                    clips = NumpyOnly(file).load()
                    if not isinstance(clips, dict):
                        clips = dict(enumerate(clips, len(self.items)))
                self.names += map(str, clips)
                self.items += [(shard, read_tapvid, clip) for clip in clips.values()]
        if not self.items:
            raise ValueError(f"{path}: no clip in it: want CLIP/tracks.npz or TAP-Vid's .pkl")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, read, clip = self.items[i]
        with error_prefix(path):
            return read(clip)

class BoxTracks(torch.utils.data.Dataset):
    """Clips with the box of one thing: folders, at any depth, of numbered images (0001.jpg, ...)
    and boxes_xyxy.txt, whose lines are x1 y1 x2 y2 in pixels, with commas or blanks, one for each
    image. [i] is dict(video=(T, H, W, 3) uint8, boxes=(T, 4) float32); `names` are the folders'."""
    def __init__(self, root):
        found = clip_folders(root, "boxes_xyxy.txt")
        self.names = list(found)
        self.items = list(found.values())
        if not found:
            raise ValueError(f"{root}: no boxes_xyxy.txt in it or below, beside images")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path = self.items[i]
        images = numbered(os.path.dirname(path), r"[^.]*?(\d+)\.(?i:jpg|jpeg|png)")
        with error_prefix(path), open(path) as file:
            lines = file.read().replace(",", " ").splitlines()
            boxes = np.loadtxt(lines, np.float32, ndmin=2)
            if boxes.shape != (len(images), 4) or not (boxes[:, :2] <= boxes[:, 2:]).all():
                raise ValueError(f"want x1 y1 x2 y2, rising, for each of {len(images)} images")
        return dict(video=read_clip(images.values()), boxes=boxes)

# ---- loader --------------------------------------------------------------------------------------
def square_clip(frames, rng, size):
    """Frames (H, W, 3) -> `video` (T, 3, size, size) uint8: a random square of the short side."""
    height, width, _ = frames[0].shape
    side = min(height, width)
    top, left = (rng.uniform(size=2) * (height - side + 1, width - side + 1)).astype(int)
    box = top, left, side, side
    return {"video": torch.stack([crop_uint8(frame, box, size) for frame in frames])}

class Batches(torch.utils.data.Dataset):
    """A list of sample numbers in, their collated batch out: what DataLoader's workers run."""
    def __init__(self, source, crops, seed, one_frame=0):
        self.source = source
        self.crops = crops
        self.seed = seed
        self.one_frame = one_frame

    def __getitem__(self, numbers):
        if self.one_frame:                  # Videos have the same crops as their transform
            self.crops.one_frame = numbers[0] < self.one_frame
        if isinstance(self.source, Videos):
            return torch.utils.data.default_collate(self.source.__getitems__(numbers))
        clips = self.source.batch(numbers)
        if self.crops is None:
            return clips
        samples = []
        for i, clip in zip(numbers, clips["video"]):
            clip = (clip * 255).round().byte() if clip.is_floating_point() else clip
            frames = list(clip.permute(0, 2, 3, 1).numpy())                     # of (H, W, 3)
            samples.append(self.crops(frames, np.random.default_rng((self.seed, i, 1))))
        return torch.utils.data.default_collate(samples)

class DeviceLoader:
    """Iterates over a DataLoader's batches on the device, colours applied there."""
    def __init__(self, dataset, device, crops=None, **options):
        atexit.register(end_workers)
        self.loader = torch.utils.data.DataLoader(
            dataset, pin_memory=device.type == "cuda", worker_init_fn=start_worker, **options)
        self.device = device
        self.crops = crops

    def __iter__(self):
        for batch in self.loader:
            for name in batch.keys() - {"params"}:      # of crops: finish() reads them on the CPU
                batch[name] = batch[name].to(self.device, non_blocking=True)
            yield self.crops.finish(batch) if self.crops else batch

def make_loader(source, inputs, batches, device="cpu", seed=0, workers=-1, split="train",
                scenes=None, videos=None, colours=True, motion_colours="independent", one_frame=0):
    """Batches on the device, in order; to be iterated over once.

    source    "scenes", "squares", or the path of a video, of a folder of videos, or of frames
    inputs    what the model expects: dict(frames=T, size=S), with crops=dict(local_size=,
              local_crops=) for pairs cut into crops, squares=dict(...) for MovingSquares' options
    batches   iterable of lists of sample numbers
    workers   processes that prepare batches; 0: in this one; -1: as many as there are cores for
              each process; none for squares; one for scenes on a CPU, which training keeps busy
    split     "train" or "eval": other clips; of videos other draws from the same files
    scenes    SceneOptions, by default of twice the model's size; without crops always of its size
    one_frame the first samples, so many, have motion crops of one frame, and `shift`
    Raises FileNotFoundError or ValueError if the source can't be read."""
    if "squares" in inputs and source != "squares":
        raise ValueError(f"--data {source}: this model needs --data squares")
    if workers > 8 * cores():
        raise ValueError(f"--workers {workers}: at most {8 * cores()} on {cores()} cores")
    device = torch.device(device)
    size = inputs["size"]
    frames = inputs["frames"]
    own_seed = split_seed(seed, split)
    share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    crops = None
    if "crops" in inputs:
        crops = MultiCrop(size, **inputs["crops"], colours=colours, motion_colours=motion_colours)
    if source == "squares":
        share = 0
        canvas = 2 * size if crops else size
        dataset = MovingSquares(canvas, frames, seed=seed, split=split, **inputs.get("squares", {}))
    elif source == "scenes":
        share = 1 if device.type == "cpu" else share
        options = scenes or SceneOptions(size=2 * size)
        options = options if crops else replace(options, size=size)
        dataset = Scenes(frames=frames, seed=seed, split=split, **asdict(options))
    else:
        transform = crops or functools.partial(square_clip, size=size)
        options = videos or VideoOptions()
        dataset = Videos(source, frames, seed=own_seed, transform=transform, **asdict(options))
    return DeviceLoader(Batches(dataset, crops, own_seed, one_frame), device, crops,
                        num_workers=share if workers < 0 else workers,
                        batch_size=None, sampler=batches)

def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def start_worker(number):
    torch.set_num_threads(1)                # workers are the parallelism
    for number in (signal.SIGINT, signal.SIGTERM):      # they go to the whole group: the main
        signal.signal(number, signal.SIG_IGN)           # process still wants its batch

def end_workers():
    """At exit, after an error: workers that ignore SIGTERM would be waited for without end."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # DataLoader's would call it a failure
    for process in multiprocessing.active_children():
        process.kill()

# ---- look at your data ---------------------------------------------------------------------------
def show(source, path, videos=None):
    """Writes a picture: a scene with its truth, if it is one, and crops as in training."""
    import matplotlib.pyplot as plt
    plt.switch_backend("agg")
    inputs = dict(frames=2, size=96, crops=dict(local_size=48, local_crops=2, blur=1.0))
    scenes = SceneOptions(size=192, pan=12.0)
    loader = make_loader(source, inputs, [range(3)], workers=0, videos=videos, scenes=scenes)
    rows = [{}, {}, {}]                     # of {title: image}
    for name, crops in next(iter(loader)).items():
        for row, images in zip(rows, crops.flatten(1, -4)):
            for n, image in enumerate(images):
                row[f"{name} {n}"] = image.permute(1, 2, 0).clamp(0, 1)
    if source == "scenes":
        clip = Scenes(size=96, frames=2, pan=4.0, radius=(0.15, 0.3)).batch([0], truth=True)
        first, second = clip["video"][0].permute(0, 2, 3, 1)
        u, v = clip["flow"][0, 0]
        rows[0] = {"frame 0": first, "frame 1": second, "flow, x": u, "flow, y": v}
        rows[0] |= {name: clip[name][0, 0] for name in ("classes", "ids", "depth", "occluded")}
    figure, axes = plt.subplots(3, 10, figsize=(15.5, 5.2), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(rows, axes):
        for (title, image), axis in zip(row.items(), line):
            axis.imshow(image)
            axis.set_title(title, fontsize=8)
    figure.supxlabel("crops as in training, a pair a row: those of frame 0 come first", fontsize=9)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"written: {path}")

def bench(source):
    """Prints what clips of scenes, or pairs of frames from videos, cost in CPU time."""
    torch.set_num_threads(1)
    read = Scenes().batch if source == "scenes" else Videos(source).__getitems__
    read([0])                               # draws the textures
    start = time.process_time()
    for i in range(0, 80, 8):
        read(range(i, i + 8))
    each = (time.process_time() - start) / 80
    print(f"{source}: {each:.4f} CPU-seconds a clip or pair, {1 / each:.0f} per CPU-second")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes out/data.png: scenes, truth and crops.")
    parser.add_argument("data", nargs="?", default="scenes", help="a video, or a folder")
    parser.add_argument("--fps", type=float, default=30.0, help="rate of numbers in frame names")
    parser.add_argument("--gap", type=float, nargs=2, default=(0.5, 1.0), help="s between frames")
    parser.add_argument("--bench", action="store_true", help="measure the CPU time instead")
    args = parser.parse_args()
    try:
        if args.bench:
            bench(args.data)
        else:
            show(args.data, "out/data.png", VideoOptions(gap=args.gap, fps=args.fps))
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: error: {error}")
