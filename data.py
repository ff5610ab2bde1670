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
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F

# ---- synthetic scenes ----------------------------------------------------------------------------
EVAL = 10**9        # added to the seed of evaluation data; those of training lie below
SHAPES = ("disc", "square", "triangle", "flower", "cross", "ring", "moon", "bar")   # classes 1..8
CELLS = 128                             # a silhouette is a table of CELLS x CELLS yes/no cells

def split_seed(seed, split):
    """The seed of a split: no clip is in both."""
    if not 0 <= seed < EVAL:
        raise ValueError(f"{seed=} must lie in 0 .. 10**9 - 1 (split='eval' uses those above)")
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
    corners = torch.from_numpy(corners).mT.reshape(-1, len(SHAPES))         # (2*2*128, 8)
    return torch.from_numpy(tables).float(), corners

def make_textures(rng, n, size, grain):
    """
    Periodic textures (n, 3, size + 1, size + 1): mean 0, std 1, last row = first row. Half are 1/f
    clouds, folded into bands; half are mosaics, of patches where one of 12 clouds is the highest.
    """
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

def similarity(scale, shift, points):
    """scale p + shift in complex numbers. Added in place: in torch that is several times faster."""
    return (scale * points).add_(shift)

def of_owner(scale, shift, owner, points):
    """Points (B*n, P), mapped by the similarities (B, n, L) of their layers owner (B*n, P)."""
    scale = scale.to(torch.complex64).flatten(0, 1)
    shift = shift.to(torch.complex64).flatten(0, 1)
    return similarity(scale.gather(1, owner), shift.gather(1, owner), points)

class Scenes:
    """
    Synthetic video: textured sprites fly before an endless background, seen by a moving camera.

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
    visible   (B, T, P)          bool
    """

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
        scale = scale.to(torch.complex64).flatten(0, 1)
        shift = shift.to(torch.complex64).flatten(0, 1)
        owner = torch.zeros(B * n, points.shape[-1])
        for k in range(1, L):                               # far to near: the larger number wins
            q = similarity(scale[:, k, None], shift[:, k, None], points)
            table = self.tables[world.kind[:, k, None] - 1]                 # (B, 1, 128, 128)
            grid = torch.view_as_real(q).view(B, n, points.shape[-1], 2)
            inside = F.grid_sample(table, grid, mode="nearest", align_corners=False)
            owner = torch.maximum(owner, k * inside.view_as(owner))
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
        grid = torch.view_as_real(of_owner(scale, shift, owner, points))    # (B*T, P, 2) in periods
        grid.sub_(grid.floor()).mul_(S)                                     # pixels of the texture
        grid[..., 1].add_(owner, alpha=S + 1)                               # ... and of the atlas
        grid.mul_(torch.tensor([2 / S, 2 / (atlas.shape[2] - 1)])).sub_(1)  # in [-1, 1]
        return F.grid_sample(atlas, grid.unflatten(0, (len(atlas), -1)), align_corners=True)

    def _move(self, world, start, end, owner, points):
        """How far the points (B*n, P) of the layers owner go from frames `start` to frames `end`,
        (B*n, P) complex, and whether they are to be seen there."""
        ratio = world.a[:, end] / world.a[:, start]
        shift = world.b[:, end] - ratio * world.b[:, start]
        step = of_owner(ratio - 1, shift, owner, points)
        landed = points + step
        off = torch.view_as_real(landed - self.pixels.mean()).abs()
        within = torch.maximum(off[..., 0], off[..., 1]) <= self.size / 2
        return step, within & (self._owner(world, landed, end) == owner)

    def batch(self, indices, truth=False, points=32):
        """The clips of these numbers: the dictionary of the class docstring, `points` tracks."""
        rngs = [np.random.default_rng((self.seed, int(i))) for i in indices]
        world = self._world(rngs)
        B, T, S = len(rngs), self.frames, self.size
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

class MovingSquares:
    """
    The data of the MeloMotion report: coloured squares on black; colours tell the velocities.

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
    our choice: 128 of 255 counts as 1/2, so that 8 bits hold the colours, and the law, exactly.
    """

    def __init__(
        self,
        size=128,               # pixels: frames are size x size
        frames=16,              # T
        objects=3,              # N
        side=24,                # pixels: objects fill a box of side x side
        mode="differentiated",  # who moves, see MODES
        shape="square",         # see STAMPS, or any: each object one of them
        video=True,             # False: frame 0 alone is drawn
        seed=0,                 # below 10**9
        split="train",          # or "eval", whose clips are others
    ):
        if mode not in MODES:
            raise ValueError(f"squares: {mode=} must be one of {', '.join(MODES)}")
        self.size = size
        self.frames = frames
        self.objects = objects
        self.side = side
        self.mode = mode
        self.video = video
        self.seed = split_seed(seed, split)
        y, x = (np.mgrid[:side, :side] + 0.5) * 2 / side - 1            # in (-1, 1)
        cross = np.minimum(abs(x), abs(y)) <= 0.36
        tables = [abs(x) <= 1, np.hypot(x, y) <= 1, abs(x) <= (1 + y) / 2, cross]
        self.stamps = tables if shape == "any" else [tables[STAMPS.index(shape)]]
        self.reach = size * min(frames - 1, 15)     # pixels in 16 frames per unit of velocity
        if SPEED / 2 * self.reach > size - side:
            raise ValueError(f"squares: {side=} is too large to stay inside for 16 frames")

    def _draw(self, rng):
        """One clip's colours (N, 3) in 0..255, velocities and corners in frame 0, both (N, 2)."""
        N = self.objects
        i, j = np.triu_indices(N, 1)
        for _ in range(1600):
            colours = rng.integers((0, 0, 128), 256, (N, 3))
            moves = np.full(N, self.mode == "all-move")
            moves[rng.integers(N) if self.mode == "random-mover" else 0] = True
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
        raise ValueError(f"squares: no room for {N} objects of {self.side} pixels, {GAP} apart")

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, int(index)))
        colours, v, corners = self._draw(rng)
        stamps = [self.stamps[k] for k in rng.integers(len(self.stamps), size=self.objects)]
        S, side = self.size, self.side
        masks = np.zeros((self.objects, S, S), bool)
        for mask, stamp, (x, y) in zip(masks, stamps, corners):
            mask[y:y + side, x:x + side] = stamp
        times = self.frames if self.video else 1
        video = np.zeros((times, S + 2 * side, S + 2 * side, 3), np.uint8)  # a rim for what leaves
        for t, frame in enumerate(video):
            place = corners + np.rint(v * S * t).astype(int)
            place = np.clip(place, -side, S) + side
            for stamp, colour, (x, y) in zip(stamps, colours, place):
                frame[y:y + side, x:x + side][stamp] = colour
        video = video[:, side:-side, side:-side].transpose(0, 3, 1, 2).copy()
        displacements = v[:, None] * np.arange(1, self.frames)[:, None]
        clip = dict(
            first_frame=torch.from_numpy(video[0]),
            masks=torch.from_numpy(masks),
            displacements=torch.from_numpy(displacements).float(),
        )
        if self.video:
            clip["video"] = torch.from_numpy(video)
        return clip

    def batch(self, indices):
        """The clips of these numbers: the dictionary in the class docstring."""
        return torch.utils.data.default_collate([self[i] for i in indices])

# ---- your own videos -----------------------------------------------------------------------------
VIDEO_TYPES = (".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".ts")
IMAGE_TYPES = (".jpg", ".jpeg", ".png")
TINY = Fraction(1, 10**12)              # s: what is later than a frame by this is the next frame
TRIES = 10                              # moments drawn in a file, and files drawn in a row

def expand(path):
    return os.path.expanduser(os.fspath(path))

def warn(text):
    """One line on stderr, whatever the names of files in it."""
    line = text.replace("\n", " ").encode("utf-8", "backslashreplace").decode()
    print(line, file=sys.stderr, flush=True)

def walk(root):
    """Sorted paths of the regular files in a folder, at any depth; links yes, hidden no. Of a file
    itself."""
    root = expand(root)
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such file or folder")
    found, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:                    # a link to a folder above would never end
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if os.path.isfile(path)]
    return sorted(found)

class Reader:
    """A video and its decoder. Times are Fractions of a second after the first frame.

    Not imageio's own reader: it returns wrong frames of variable-rate mp4, ignores the turn that
    phones write, and costs twice as much. """

    step = None

    def __init__(self, path):
        self.path = expand(path)
        if not os.path.isfile(self.path):               # opening a FIFO would wait without end
            raise FileNotFoundError(f"{self.path}: no such file")
        self.end = None                                 # time of the last frame, once it is known
        self.open()

    def open(self):
        import av                                       # here: synthetic scenes need no FFmpeg
        self.container = av.open(os.path.abspath(self.path))
        streams = [stream for stream in self.container.streams.video if stream.codec_context]
        self.stream = max(streams, key=self.rank, default=None)
        if self.stream is None:
            raise ValueError(f"{self.path}: holds no video that FFmpeg can decode")
        if self.container.format.name == "avi" and self.stream.codec_context.has_b_frames:
            raise ValueError(f"{self.path}: AVI keeps no times for B-frames: frames would be too "
                             "early; convert it once: ffmpeg -i in.avi out.mkv")
        self.stream.thread_type = "SLICE"               # the loader's workers are the parallelism
        self.stream.codec_context.thread_count = 1
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(30)
        self.tick = self.stream.time_base
        self.frames = self.container.decode(self.stream)
        self.frame = self.decode()          # the first at or after `asked`, at `time`
        if self.frame is None:
            raise ValueError(f"{self.path}: holds no frame that FFmpeg can decode")
        self.start = self.frame.pts         # not the header's: that may be another stream's
        self.asked = self.time = Fraction(0)

    def rank(self, stream):
        """ffmpeg and players take no cover picture, but the default stream, the largest."""
        kinds = type(stream.disposition)
        cover = stream.disposition & kinds.attached_pic
        default = stream.disposition & kinds.default
        return not cover, bool(default), stream.width * stream.height

    def decode(self, keyframe=False):
        for frame in self.frames:
            if frame.pts is not None and (frame.key_frame or not keyframe):
                return frame

    def last(self, exact):
        """Time of the last frame, as the header promises, or by decoding the end of the file."""
        length = Fraction(self.container.duration or 0, 10**6)
        if self.stream.duration:
            length = self.stream.duration * self.tick
        if not length:
            raise ValueError(f"{self.path}: no duration; remux: ffmpeg -i in -c copy out.mkv")
        if not exact:
            return length - 1 / self.rate
        found = self.at(length) if self.end is None else None
        while found:
            found = self.at(found[1] + TINY)
        return self.end

    def at(self, t):
        """The first frame at or after t -> (frame, its time), or None behind the last."""
        if self.end is not None and t > self.end:
            return None
        if self.frame is None or t < self.asked or t > self.time and self.keyframe_before(t):
            self.seek(t)
        while self.frame and self.time < t:
            self.take(self.decode())
        self.asked = t
        return self.frame and (self.frame, self.time)

    def keyframe_before(self, t):
        """Is there one between the decoder and t? Else a seek would repeat work."""
        index = self.stream.index_entries
        wanted = self.start + math.floor(t / self.tick)
        if len(index) and index[-1].timestamp >= wanted:
            key = index.search_timestamp(wanted)
            return key >= 0 and (index[key].timestamp - self.start) * self.tick > self.time
        return t > self.time + 2        # mkv reads its index piece by piece: go by a usual distance

    def seek(self, t):
        """To a keyframe at or before t. Frames shown before it are left out: they may need earlier
        ones. Without an index (MPEG-TS) FFmpeg may land behind t: then further back."""
        back = 0
        while back < t:
            self.container.seek(self.start + math.floor((t - back) / self.tick), stream=self.stream)
            self.frames = self.container.decode(self.stream)
            key = self.decode(keyframe=True)
            if key and (key.pts - self.start) * self.tick <= t:
                self.time = -math.inf
                return self.take(key)
            back = 4 * back + 1
        self.container.close()
        self.open()

    def take(self, frame):
        """Makes a frame the current one; None: the file has ended."""
        before, self.frame = self.time, frame
        if frame is None:
            self.end = before
            return
        self.time = (frame.pts - self.start) * self.tick
        if frame.is_corrupt or self.time < before:      # painted over, in ways that vary
            raise ValueError(f"{self.path}: is damaged near {float(self.time):.2f} s")

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

def read_video(path):
    """All frames of a video file, uint8 (T, H, W, 3)."""
    reader = Reader(path)
    images = []
    found = reader.at(0)
    while found:
        images.append(reader.image(found[0]))
        found = reader.at(found[1] + TINY)
    return np.stack(images)

def read_frames(path, times):
    """The first frames at or after `times`, in seconds after the first frame; cheap if they ascend.

    Returns (list of uint8 (H, W, 3) arrays, list of their true times). Raises ValueError if the
    file ends before, av.error.FFmpegError if it is damaged. """
    reader = Reader(path)
    slack = 0.5 * min(reader.tick, 1e-3) + 1e-6     # clocks round: in mkv 1/30 s is 0.033
    found = [reader.at(max(t - slack, 0)) for t in times]
    if None in found:
        raise ValueError(f"{path}: ends at {float(reader.end):.2f} s, before the wanted times")
    return [reader.image(frame) for frame, _ in found], [float(time) for _, time in found]

def read_image(path):
    """An image file -> uint8 (H, W, 3), upright by its Exif tag; 16-bit grey by its high byte."""
    with iio.imopen(path, "r", plugin="pillow") as file:
        if not file.metadata(index=0, exclude_applied=False)["mode"].startswith("I"):
            return file.read(index=0, rotate=True, mode="RGB")
        grey = file.read(index=0, rotate=True)
    return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2)

class FrameFolder:
    """Image files {number: path} with Reader's interface: number n stands n / fps seconds after the
    first. Numbers may be nanoseconds: they stay whole."""

    def __init__(self, paths, fps):
        self.paths, self.numbers = paths, sorted(paths)
        self.path = paths[self.numbers[0]]          # of the file that was read last
        self.rate = Fraction(fps)
        steps = [b - a for a, b in itertools.pairwise(self.numbers)] or [1]
        self.step = Counter(steps).most_common(1)[0][0] / self.rate     # others are holes

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

@dataclass
class VideoOptions:
    gap: tuple = (0.5, 1.0)     # seconds between the frames of a pair, from and to
    repeat: int = 5             # samples from each opening of a video
    fps: float = 30.0     # for folders of frames: what the numbers in their names count, per second
    stride: int = 1             # clips: every stride-th frame of the source

class Videos(torch.utils.data.Dataset):
    """Frame pairs (frames=2), `gap` seconds apart, or clips of every `stride`-th frame.

        videos/any/depth/a.mp4  b.MOV ...           files (or the path of a single one)
        frames/drive1/0001.jpg  0002.jpg ...        or, where no video is, frames: one sequence,
        frames/drive2_0001.png  drive2_0002.png     and another

    The digits that end the name of a frame count `fps` a second; what stands before them, with the
    folder, is its sequence. Pairs lie in the gap to half a frame, at variable rates too; clips do
    not cross holes in the numbers of frames.

    Sample i, for any i >= 0, depends on (seed, i) alone. A pass takes the files in a new order,
    with `repeat` samples from each opening (of images one, and as many as there are in a pass). It
    is transform(list of T uint8 (H, W, 3), a Generator), by default dict(video=(T, 3, H, W)).

    Broken, too short and too sparse files are named once, counted in `broken` and replaced. Raises
    FileNotFoundError (no root), ValueError (nothing in it fits), OSError (ten in a row fail). """

    def __init__(self, root, frames=2, gap=(0.5, 1.0), stride=1, repeat=5, fps=30.0, seed=0,
                 transform=None):
        if not 0 < gap[0] <= gap[1] < math.inf:
            raise ValueError(f"{gap=}: want two rising numbers above 0")
        self.root, self.seed, self.transform = root, seed, transform
        self.frames, self.stride, self.repeat = frames, stride, repeat
        self.gap = Fraction(gap[0]), Fraction(gap[1])
        self.wish = f"clips of {frames} frames at stride {stride}"
        if frames == 2:
            self.wish = f"pairs {gap[0]:g} to {gap[1]:g} s apart"
        paths = walk(root)
        self.files = [path for path in paths if path.lower().endswith(VIDEO_TYPES)]
        self.sources = self.files                       # paths of videos, or FrameFolders
        self.starts = range(len(self.files))            # what a pass goes through: files, or images
        if not self.files:
            self.repeat = 1
            self.sources = self.find_sequences(paths, fps)
            lengths = [len(source.numbers) for source in self.sources]
            self.starts = np.repeat(np.arange(len(lengths)), lengths)
        left_out = sorted({*paths} - {*self.files})
        if left_out:
            kinds = " ".join(sorted({os.path.splitext(path)[1] for path in left_out}))
            warn(f"{root}: left out {len(left_out)} files ({kinds}), such as {left_out[0]}")
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
            steps = sorted(float(one.step) for one in sequences)
            apart = f"{steps[0]:.3g} to {steps[-1]:.3g} s apart"
            raise ValueError(f"{self.root}: frames at --fps {fps:g} give no {self.wish}: "
                             f"neighbours are {apart}; change --fps or --gap")
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
        for k, run in itertools.groupby(map(int, indices), lambda i: i // self.repeat):
            run = list(run)
            for i, images in zip(run, self.opening(k, [i % self.repeat for i in run])):
                if self.transform:
                    samples.append(self.transform(images, np.random.default_rng((self.seed, i, 1))))
                else:
                    video = torch.from_numpy(np.stack(images))
                    samples.append(dict(video=video.permute(0, 3, 1, 2)))
        return samples

    def opening(self, k, picks):
        """The k-th opening of the run -> a list of T images for each number in `picks`."""
        import av
        n = len(self.starts)
        turn, place = divmod(k, n)
        if self.order[0] != turn:
            self.order = turn, np.random.default_rng((self.seed, turn)).permutation(n)
        step = 7919 if n % 7919 else 1      # a prime, so that the tries meet different files
        for attempt in range(TRIES):  # another file, and where there are few, other moments of them
            start = self.starts[(self.order[1][place] + attempt * step) % n]
            source = self.sources[start]
            try:
                reader = source if isinstance(source, FrameFolder) else Reader(source)
                return [self.read(reader, (self.seed, k, attempt, r + 1)) for r in picks]
            except (av.error.FFmpegError, ValueError, OSError, IndexError, SyntaxError) as error:
                path = source if isinstance(source, str) else source.path
                why = str(error).removeprefix(f"{path}: ") or type(error).__name__
            file = self.files.index(path)
            if not self.broken[file]:
                self.broken[file] = True
                warn(f"skipped broken file {path}: {why} ({int(self.broken.sum())} so far)")
            if len(picks) > 1:      # half a file may be good: each sample decides as if asked alone
                return [self.opening(k, [pick])[0] for pick in picks]
        raise OSError(f"{self.root}: ten files in a row give no sample; the last: {path}: {why}")

    def read(self, reader, key):
        """One sample of a file or sequence, drawn with `key`, whose last number is from 1 to
        `repeat` -> a list of T images."""
        rng = np.random.default_rng(key)
        begin = (key[-1] - rng.random()) / self.repeat          # in order of time: few seeks back
        frames = self.draw(reader, begin, rng)
        if frames is None:
            length, rate = float(reader.last(exact=True)), float(reader.rate)
            raise ValueError(f"its {length:.2f} s at {rate:.3g} frames a second are too short or "
                             f"too sparse for {self.wish}")
        images = [reader.image(frame) for frame in frames]
        if len({image.shape for image in images}) > 1:
            raise ValueError("its frames change size")
        return images

    def draw(self, reader, begin, rng):
        """A pair or clip that begins at about the share `begin` of the file, or None. What does not
        fit is drawn again, the tenth time from the start. After a miss the file's true end counts.
        (Not before: a sample depends on its number alone, not on what others have found.) """
        low, high = self.gap
        frame = 1 / reader.rate
        length = (self.frames - 1) * self.stride * frame
        if self.frames == 2:
            length = low + rng.random() * max(min(high, reader.last(exact=False)) - low, 0)
        for attempt in range(TRIES):
            last = reader.last(exact=attempt > 0)
            start = max(begin * (max(last - length, 0) + frame) - frame, 0)
            first = reader.at(start if attempt < TRIES - 1 else 0)
            take = self.pair if self.frames == 2 else self.clip
            if first and (sample := take(reader, first, length)):
                return sample
            begin = rng.random()

    def pair(self, reader, first, gap):
        """The frame `first` and the one nearest to `gap` after it, of those within the bounds of
        the gap to half a frame, or None."""
        low, high = self.gap
        frame = 1 / reader.rate
        distance = max(low - Fraction(3, 2) * frame, 0)
        pair = None
        while distance < gap:
            found = reader.at(first[1] + distance + TINY)
            if found is None:
                break
            half = min(frame, found[1] - first[1] - distance) / 2
            distance = found[1] - first[1]
            miss = abs(distance - gap)
            if low - half <= distance <= high + half and (pair is None or miss < pair[1]):
                pair = found[0], miss
        return pair and [first[0], pair[0]]

    def clip(self, reader, found, _):
        """Every stride-th frame, whatever their times, but not over holes in numbers; or None."""
        clip = [found]
        while found and len(clip) <= (self.frames - 1) * self.stride:
            found = reader.at(clip[-1][1] + TINY)
            if found and reader.step not in (None, found[1] - clip[-1][1]):
                return None
            clip.append(found)
        return found and [frame for frame, _ in clip[::self.stride]]

# ---- crops and photometric augmentation ----------------------------------------------------------
def random_box(rng, height, width, scale):
    """
    Top, left, height, width by RandomResizedCrop's rule: area uniform in `scale` times the whole,
    aspect log-uniform in 3/4 .. 4/3; after 10 tries that don't fit the largest in the middle.
    """
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

def move_box(rng, box, height, width, most=1 / 3):
    """
    A box moved by up to `most` of its sides in any direction, as far as the frame goes; and how far
    that moves what it shows: (x, y) as shares of its sides.
    """
    corner, sides = box[:2], box[2:]
    turn = rng.uniform(0, 2 * np.pi)
    move = rng.uniform(0, most) * np.array([np.sin(turn), np.cos(turn)]) * sides
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
    hue = numerator / (chroma + 1e-12) + sixths + 6 * turn             # in sixths of a turn; 0: red
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
    """
    Colour jitter, grayscale, blur, solarise with torchvision's and PIL's meaning, of those crops
    that need it. x (N, 3, S, S) float in [0, 1] on any device; params on the CPU, so that the
    device is never waited for:

    order     (N, 4)  the first to the last operation of jitter, numbers of JITTER
    factors   (N, 4)  of brightness, contrast, saturation; turns of hue. NEUTRAL: not at all
    gray      (N,)    bool
    blur      (N,)    sigma in pixels; 0: not at all
    solarize  (N,)    bool
    """
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
    """
    The crops of a frame pair (paper: Sec. 4.1, B.1; what the paper leaves out: as released).

    motion   (2, 3, S, S)     one box (area 0.2-0.4 of the frame) in both frames, never flipped;
                              frame 1 gets colours T1, frame 2 T2
    globals  (2, 2, 3, S, S)  [frame, box]: two boxes (area 0.4-1) inside one initial crop (area
                              0.05-0.2 of the frame), each the same in both frames and flipped with
                              probability 0.5; box 1 gets T1, box 2 T2
    locals   (2, n, 3, s, s)  [frame, box]: n boxes per frame, all independent (area 0.05-0.4 of the
                              initial crop), flipped, T3

    blur: the largest sigma in pixels of the crop. colours=False: none at all (held-out tables).
    motion_colours of the two motion crops: "shared": frame 1's for both; "none"; our choice:
    "independent", as released, while the paper is silent.
    """

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

        N = len(boxes)
        chosen = rng.random((N, 4)) < self.chances
        order = rng.random((N, 4)).argsort(1)
        factors = rng.uniform((0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1), (N, 4))
        sigma = rng.uniform(0.1, self.blur, N)
        if self.motion_colours == "none":
            chosen[:2] = False
        if self.motion_colours == "shared":
            for drawn in (chosen, order, factors, sigma):
                drawn[1] = drawn[0]
        jitter, grayed, blurred, solarized = torch.from_numpy(chosen).T
        factors = torch.from_numpy(factors).float()
        params = dict(
            order=torch.from_numpy(order),
            factors=torch.where(jitter[:, None], factors, torch.tensor(NEUTRAL)),
            gray=grayed,
            blur=blurred * torch.from_numpy(sigma).float(),
            solarize=solarized,
        )
        return boxes, flips, params

    def __call__(self, frames, rng):
        """Two frames (H, W, 3) uint8 of one size -> uint8 crops, and `params` for finish()."""
        height, width = frames[0].shape[:2]
        boxes, flips, params = self.draw(rng, height, width)
        sources = self.frames
        extra = {}
        if self.one_frame:
            sources = [0, 0] + self.frames[2:]
            boxes[1], extra["shift"] = move_box(rng, boxes[0], height, width)
        crops = []
        for source, box, size, flip in zip(sources, boxes, self.sizes, flips):
            crops.append(crop_uint8(frames[source], box, size, flip))
        small = torch.stack(crops[6:]) if self.n else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return dict(
            motion=torch.stack(crops[:2]),
            globals=torch.stack(crops[2:6]).unflatten(0, (2, 2)),
            locals=small.unflatten(0, (2, self.n)),
            params=params,
            **extra,
        )

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
        why = " ".join(str(error).split()).removeprefix(f"{path}: ")
        why = why if type(error) is ValueError else f"can't be read, is it damaged? ({why})"
        raise ValueError(f"{path}: {why}") from None

def read_bytes(path):
    with error_prefix(expand(path)), open(expand(path), "rb") as file:
        return file.read()

def read_one_channel(path, modes=("L", "P", "1")):
    """The numbers in an image file (H, W), of 8 bits unless Pillow's modes say so; of a palette the
    places, not the colours."""
    with error_prefix(path):
        mode = iio.immeta(path, plugin="pillow", exclude_applied=False)["mode"]
        if mode not in modes:
            raise ValueError(f"must have one channel ({', '.join(modes)}), but is {mode}")
        numbers = iio.imread(path, plugin="pillow", index=0, mode=mode)
    head = read_bytes(path)[:26]
    if mode == "L" and head[:4] == b"\x89PNG" and head[24] < 8:     # 2 or 4 bits come spread to 255
        numbers = numbers // (255 // (2 ** head[24] - 1))
    return numbers.astype(np.uint16 if "I" in mode else np.uint8)

def read_clip(paths):
    """Image files -> uint8 (T, H, W, 3)."""
    images = []
    for path in paths:
        with error_prefix(path):
            meta = iio.immeta(path, plugin="pillow", exclude_applied=False)
            if meta.get("Orientation", 1) != 1:
                raise ValueError("is turned by an EXIF tag, its labels are not: store it turned")
            images.append(read_image(path))
            if images[-1].shape != images[0].shape:
                raise ValueError("is not of the size of the first image")
    return np.stack(images)

def numbered(folder, pattern):
    """{number: path} of the files in a folder whose names fit a pattern with a group of digits."""
    matches = [re.fullmatch(pattern, name) for name in os.listdir(folder)]
    found = {int(match[1]): os.path.join(folder, match[0]) for match in matches if match}
    return dict(sorted(found.items()))

def clip_folders(root, file):
    """{name of a folder: path of the file} of the folders at any depth with a file of this name."""
    root = os.path.abspath(expand(root))
    found = {}
    for path in walk(root):
        if os.path.basename(path) == file:
            name = os.path.relpath(os.path.dirname(path), root)
            found[os.path.basename(root) if name == "." else name] = path
    return found

def read_flo(path):
    """Middlebury's .flo -> flow (H, W, 2) float32, (x, y) in pixels, above 1e9 where unknown."""
    raw = read_bytes(path)
    with error_prefix(expand(path)):
        if raw[:4] != b"PIEH":                                  # the bytes of float32 202021.25
            raise ValueError("does not begin as a .flo file does")
        width, height = np.frombuffer(raw, "<u4", 2, 4).tolist()
        return np.frombuffer(raw, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)

def write_flo(path, flow):
    """Flow (H, W, 2) in pixels -> Middlebury's .flo."""
    height, width, _ = np.shape(flow)
    head = b"PIEH" + np.array([width, height], "<i4").tobytes()
    with open(expand(path), "wb") as file:
        file.write(head + np.asarray(flow, "<f4").tobytes())

def read_kitti_flow(path):
    """KITTI's PNG -> flow (H, W, 2) float32 in pixels, 0 where unknown, and valid (H, W) bool."""
    import av
    raw = read_bytes(path)
    with error_prefix(expand(path)):       # not by Pillow, which loses the low bytes without a word
        if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[24:26] != b"\x10\x02" or b"IEND" not in raw[-12:]:
            raise ValueError("must be a whole PNG of three channels of 16 bits, as KITTI's flow is")
        with av.open(io.BytesIO(raw), format="png_pipe") as file:
            pixels = next(file.decode(video=0)).to_ndarray(format="rgb48le", threads=1)  # (H, W, 3)
    valid = pixels[..., 2] > 0
    flow = (pixels[..., :2].astype(np.float32) - 2**15) / 64
    return np.where(valid[..., None], flow, 0), valid

def read_pfm(path):
    """FlyingThings3D's .pfm of three channels -> flow (H, W, 2) float32, (x, y) in pixels."""
    raw = read_bytes(path)
    with error_prefix(expand(path)):
        header = re.match(rb"PF\s+(\d+)\s+(\d+)\s+(-?)[\d.eE+-]+\s", raw)   # a minus: little endian
        if not header:
            raise ValueError("does not begin as a .pfm file of three channels does")
        numbers = np.frombuffer(raw, "<f4" if header[3] else ">f4", offset=header.end())
        rows = numbers.reshape(int(header[2]), int(header[1]), 3)
    return rows[::-1, :, :2].astype(np.float32)             # stored from the bottom up

FLOW_LAYOUTS = (    # path of a flow; kinds of images; frames n and n + 1 (n: of the flow's path, or
    # 1), without suffix; how scenes of the val split begin
    (r"(?P<top>.*/)flow/(?P<scene>[^/]+)/frame_(?P<n>\d+)\.flo", ("clean", "final"),
     "{top}{kind}/{scene}/frame_{n:04d}", ("temple_2", "temple_3")),                        # Sintel
    (r"(?P<top>.*/)(?P<scene>\d+)_flow\.flo", ("",), "{top}{scene}_img{n}", None),          # Chairs
    (r"(?P<top>.*/)optical_flow/(?P<scene>.+)/into_future/left/"
     r"OpticalFlowIntoFuture_(?P<n>\d+)_L\.pfm", ("clean", "final"),
     "{top}frames_{kind}pass/{scene}/left/{n:04d}", ("TEST/",)),                            # Things
    (r"(?P<top>.*/)flow_occ/(?P<scene>\d+)_(?P<n>10)\.png", ("image_2", "colored_0"),
     "{top}{kind}/{scene}_{n}", None),                                                      # KITTI
    (r"(?P<top>.*/)flow\.(flo|png)", ("",), "{top}frame{n}", None))                         # yours

class FlowPairs(torch.utils.data.Dataset):
    """Pairs of frames with the true flow between them. `root` holds, at any depth, Sintel,
    FlyingChairs, FlyingThings3D or KITTI as unpacked, or your folders NAME/frame1.png frame2.png
    flow.flo (or flow.png, of KITTI's kind).

    split: "train", "val" (of Sintel temple_2 and temple_3, as in CroCo v2) or "all"; KITTI, yours
    and Chairs without FlyingChairs_train_val.txt have no splits: each is everything. [i] is

    frames    (2, H, W, 3)  uint8
    flow      (2, H, W)     float32, (x, y) in pixels, from the first frame on; 0 where unknown
    valid     (H, W)        bool: the flow is known; not where Sintel's `invalid` says so
    """

    def __init__(self, root, split="val"):
        files = [path.replace(os.sep, "/") for path in walk(root)]
        lists = [path for path in files if path.endswith("/FlyingChairs_train_val.txt")]
        chairs = read_bytes(lists[0]).split() if lists else None
        images = {os.path.splitext(path)[0]: path for path in files
                  if path.lower().endswith((*IMAGE_TYPES, ".ppm", ".webp"))}
        pairs = [pair for path in files for pair in self.pairs(path, images, chairs)]
        self.items = [pair for pair in pairs if split == "all" or pair["split"] in (split, None)]
        self.names = [os.path.relpath(pair["name"], expand(root)) for pair in self.items]
        if not self.items:
            raise ValueError(f"{root}: no flow with its two frames of split {split!r}: want NAME/"
                             "frame1.png, frame2.png, flow.flo, or Sintel, FlyingChairs, "
                             "FlyingThings3D or KITTI as unpacked")

    def pairs(self, flow, images, chairs):
        """The pairs that a file is the flow of, with paths of what belongs to them."""
        found = []
        for pattern, kinds, frame, val in FLOW_LAYOUTS:
            match = re.fullmatch(pattern, flow)
            for kind in kinds if match else ():
                parts = dict(n=1) | match.groupdict()
                n = int(parts.pop("n"))
                first = frame.format(kind=kind, n=n, **parts)
                second = frame.format(kind=kind, n=n + 1, **parts)
                mask = frame.format(kind="invalid", n=n, **parts) if kind else None     # Sintel's
                split = None
                if val:
                    split = "val" if parts["scene"].startswith(val) else "train"
                elif chairs and flow.endswith("_flow.flo"):
                    split = {b"1": "train", b"2": "val"}[chairs[int(parts["scene"]) - 1]]
                if first in images and second in images:
                    frames = images[first], images[second]
                    found.append(dict(name=first.removesuffix("/frame1"), split=split, flow=flow,
                                      frames=frames, mask=images.get(mask)))
        return found

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        file = item["flow"]
        frames = read_clip(item["frames"])                                      # (2, H, W, 3)
        if file.endswith(".png"):
            flow, valid = read_kitti_flow(file)
        else:
            flow = read_pfm(file) if file.endswith(".pfm") else read_flo(file)
            valid = (abs(flow) <= 1e9).all(-1)                                  # nan is not
        if item["mask"]:
            valid &= read_one_channel(item["mask"]) == 0
        if frames.shape[1:3] != valid.shape:
            raise ValueError(f"{file}: the flow is {valid.shape}, its frames {frames.shape[1:3]}")
        flow = np.where(valid[..., None], flow, 0).transpose(2, 0, 1)           # (2, H, W)
        return dict(frames=frames, flow=np.ascontiguousarray(flow), valid=valid)

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
          "pedestrian", "bicyclist")
CITYSCAPES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
              "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
              "bus", "train", "motorcycle", "bicycle")
CITYSCAPES_IDS = [          # in labelIds.png
    7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
SPLITS = dict(train="train", training="train", val="val", validation="val", test="test",
              testing="test")
SEGMENTATION_LAYOUTS = (    # folders of images, labels; classes, first value, value ignored, names
    ("{}/", "{}annot/", 11, 0, 11, CAMVID),                                             # SegNet's
    ("leftImg8bit/{}/", "gtFine/{}/", 19, 0, 255, CITYSCAPES),
    ("images/10k/{}/", "labels/sem_seg/masks/{}/", 19, 0, 255, CITYSCAPES),             # BDD100K
    ("images/{}/", "annotations/{}/", 150, 1, 0, None),                                 # ADE20K
    ("images/{}/", "labels/{}/", None, 0, 255, None))                                   # yours

class Segmentation(torch.utils.data.Dataset):
    """Images with a class for each pixel. `root` is the folder of CamVid (SegNet's), Cityscapes,
    BDD100K or ADE20K as unpacked, or yours: images/train/ANY/NAME.jpg labels/train/ANY/NAME.png; or
    images/ANY/NAME.jpg labels/ANY/NAME.png, of which every fifth by name is val, the rest train.

    Labels are PNGs of one channel of at most 8 bits, or of a palette. split: "train", "val" or
    "test". num_classes (2 at least) and ignore_index, the value of no class, are by default what
    the data set says; yours: as many as the labels of all splits show, and 255. [i] is

    image     (H, W, 3)  uint8
    classes   (H, W)     int64: 0 .. num_classes - 1, and 255 where ignored

    `names` of the classes or None; `files`: (path of the image, of its label).
    """

    def __init__(self, root, split="train", num_classes=None, ignore_index=None):
        files = [path.replace(os.sep, "/") for path in walk(root)]
        root = expand(root).replace(os.sep, "/").rstrip("/") + "/"
        for images, labels, classes, first, ignored, names in SEGMENTATION_LAYOUTS:
            splits = dict(train=[], val=[], test=[])
            for name, part in SPLITS.items():
                folders = root + images.format(name), root + labels.format(name)
                splits[part] += self.pairs(files, *folders)
            if any(splits.values()):
                break
        else:                                                       # yours, without splits
            every = self.pairs(files, f"{root}images/", f"{root}labels/")
            splits["val"] = every[4::5]
            splits["train"] = [pair for pair in every if pair not in splits["val"]]
        self.files = splits.get(split)
        if not self.files:
            raise ValueError(f"{root}: no labelled images of split {split!r} in a known layout: "
                             f"want images/{split}/A.jpg with labels/{split}/A.png, or CamVid, "
                             "Cityscapes, BDD100K, ADE20K as unpacked")
        self.first = first
        self.ignore_index = ignored if ignore_index is None else ignore_index
        if classes is None:
            classes = self.count_classes([pair[1] for pairs in splits.values() for pair in pairs])
        self.num_classes = num_classes or classes
        self.names = list(names) if names and len(names) == self.num_classes else None
        if not 2 <= self.num_classes <= 255:
            raise ValueError(f"--classes {self.num_classes}: want 2 to 255")

    def pairs(self, files, images, labels):
        """Files in two folders -> [(image, its label)]: alike but for the data set's endings."""
        def stem(path, folder):
            name = os.path.splitext(path.removeprefix(folder))[0]
            return re.sub("_leftImg8bit$|_gtFine_label(Ids|TrainIds)$", "", name)

        truth = {stem(path, labels): path for path in files     # of Cityscapes TrainIds come last
                 if path.startswith(labels) and path.endswith(".png")}
        pictures = [path for path in files
                    if path.startswith(images) and path.lower().endswith(IMAGE_TYPES)]
        stems = {path: stem(path, images) for path in pictures}
        found = [(path, truth[stems[path]]) for path in pictures if stems[path] in truth]
        if 0 < len(found) < len(pictures):
            warn(f"{images}: left out {len(pictures) - len(found)} images without label")
        return found

    def count_classes(self, labels):
        """One more than the largest class in the files."""
        seen = set()
        for label in labels:
            seen.update(np.unique(read_one_channel(label)).tolist())
        seen.discard(self.ignore_index)
        if len(seen) < 2:                   # one class would be found by everybody: mIoU 100
            raise ValueError(f"{labels[0]}, ...: beside {self.ignore_index}, ignored, only "
                             f"{seen}: want two classes. Store masks of 0 and 255 as 0 and 1, or "
                             "set --ignore-index")
        return max(seen) + 1

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, label = self.files[i]
        table = np.full(256, -1)                       # value in the file -> class; -1: not allowed
        table[self.first:self.first + self.num_classes] = np.arange(self.num_classes)
        if label.endswith("_gtFine_labelIds.png"):          # Cityscapes: of its 34 classes 19 count
            table[:] = 255
            table[CITYSCAPES_IDS] = np.arange(19)
        table[self.ignore_index] = 255
        picture = read_clip([image])[0]
        values = read_one_channel(label)
        if picture.shape[:2] != values.shape:
            raise ValueError(f"{label}: is {values.shape}, its image {picture.shape[:2]}")
        classes = table[values]                                 # (H, W)
        if classes.min() < 0:
            raise ValueError(
                f"{label}: value {values[classes < 0].max()} is neither one of {self.num_classes} "
                f"classes nor {self.ignore_index}, to be ignored: set --classes / --ignore-index")
        return dict(image=picture, classes=classes)

class Pickled:
    """What a pickle makes an array or a dtype of: (bytes, dtype, shape, order), in new pickles at
    once, else in a state that comes later. np.asarray() makes it one, if it is of numbers."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def __array__(self, dtype=None, copy=None):
        if hasattr(self, "state"):
            _, shape, dtype, by_columns, raw = self.state
            order = "F" if by_columns else "C"
        else:
            raw, dtype, shape, order = self.args
        code = dtype.args[0]
        if not re.fullmatch("[biufS][0-9]+", code):
            raise ValueError(f"holds arrays of {code:.50}, not of numbers: refused")
        numbers = np.frombuffer(raw, dtype.state[1].strip("|=") + code)
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

class PointTracks(torch.utils.data.Dataset):
    """Videos with the paths of points. `path` is

        FOLDER/tracks.npz rgb_00.jpg ... depth_00.png ...       RGB-D clips at any depth, or one
        tapvid_davis.pkl; FOLDER/0000_of_0010.pkl ...           TAP-Vid; of Kinetics all, or one
        joints.npz, with `video`, the path of its clip          joints that people marked

    RGB-D: tracks (P, T, 2), status (P, T) of 0 visible, 1 hidden, 2 unknown, query_frame (P,);
    depth of 16 bits in millimetres. Joints: tracks (P, T, 2), annotated (P, T). Points that are
    never visible are left out, but not of RGB-D. [i] is

    video          (T, H, W, 3)  uint8
    tracks         (T, P, 2)     float32, (x, y) in pixels, centres at integers; 0 unless visible
    visible        (T, P)        bool
    valid          (T, P)        bool: it is known whether the point is visible
    query_frames   (P,)          int64, where each point is given: by default where first visible
    depth          (T, H, W)     float32 in metres, 0 where not measured; only of clips that have it

    `names` are those of the clips. RGB-D and joints are read when asked for, a .pkl as a whole.
    """

    def __init__(self, path, video=None):
        path = expand(path)
        self.video = video
        rgbd = clip_folders(path, "tracks.npz")
        self.names = list(rgbd)
        self.items = [(self.read_rgbd, file, None) for file in rgbd.values()]
        for shard in walk(path):
            if shard.endswith(".pkl"):
                with error_prefix(shard), open(shard, "rb") as file:
                    clips = NumpyOnly(file).load()
                    if not isinstance(clips, dict):
                        clips = dict(enumerate(clips, len(self.items)))
                self.names += map(str, clips)
                self.items += [(self.read_tapvid, shard, clip) for clip in clips.values()]
        if video:
            self.names = [os.path.basename(path).removesuffix(".npz")]
            self.items = [(self.read_joints, path, None)]
        if not self.items:
            raise ValueError(f"{path}: no clip in it: want CLIP/tracks.npz with rgb_00.jpg, ..., "
                             ".pkl files of TAP-Vid, or joints.npz with the path of their video")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        read, path, clip = self.items[i]
        with error_prefix(path):
            return read(path, clip)

    def sample(self, video, tracks, visible, valid, query=None, **more):
        """What is said of points (P, T) is checked against their video, and time comes first."""
        if tracks.shape != (len(visible), len(video), 2):
            raise ValueError(f"tracks (P, T, 2) {tracks.shape} do not fit {len(video)} frames")
        if query is None:
            seen = visible.any(1)
            tracks, visible, valid = tracks[seen], visible[seen], valid[seen]
            query = visible.argmax(1)
        tracks = np.where(visible[..., None], tracks, 0).astype(np.float32)
        return dict(video=video, tracks=np.ascontiguousarray(tracks.swapaxes(0, 1)),
                    visible=np.ascontiguousarray(visible.T), valid=np.ascontiguousarray(valid.T),
                    query_frames=query.astype(np.int64), **more)

    def read_rgbd(self, path, _):
        folder = os.path.dirname(path)
        arrays = np.load(path, allow_pickle=False)
        images = numbered(folder, r"rgb_(\d+)\.(?:jpg|jpeg|png)")
        depths = numbered(folder, r"depth_(\d+)\.png")
        video = read_clip(images.values())
        more = {}
        if depths:
            maps = [read_one_channel(file, ("I", "I;16", "I;16B")) for file in depths.values()]
            more["depth"] = np.stack(maps).astype(np.float32) / 1000
            if depths.keys() != images.keys() or more["depth"].shape != video.shape[:3]:
                raise ValueError("each rgb_00.jpg wants a depth_00.png of its size")
        status, query = arrays["status"], arrays["query_frame"]
        valid = (status != 2) & (np.arange(status.shape[1]) >= query[:, None])
        return self.sample(video, arrays["tracks"], (status == 0) & valid, valid, query, **more)

    def read_tapvid(self, _, clip):
        video = clip["video"] if isinstance(clip["video"], list) else np.asarray(clip["video"])
        frames = [read_image(frame) if isinstance(frame, bytes) else frame for frame in video]
        video = np.stack(frames)
        visible = ~np.asarray(clip["occluded"]).astype(bool)
        # Their (0, 0) is the upper left corner of the first pixel, ours its centre.
        tracks = np.asarray(clip["points"]) * np.array(video.shape[2:0:-1]) - 0.5
        return self.sample(video, tracks, visible, np.ones_like(visible))

    def read_joints(self, path, _):
        arrays = np.load(path, allow_pickle=False)
        annotated = arrays["annotated"]
        return self.sample(read_video(self.video), arrays["tracks"], annotated, annotated)

class BoxTracks(torch.utils.data.Dataset):
    """Clips with the box of one thing: a folder of numbered images (0001.jpg, ...) and
    boxes_xyxy.txt, whose lines are x1 y1 x2 y2 in pixels, with commas or blanks, one for each
    image; or such folders, at any depth.

    [i] is dict(video=(T, H, W, 3) uint8, boxes=(T, 4) float32); `names` are those of the folders.
    """

    def __init__(self, root):
        found = clip_folders(root, "boxes_xyxy.txt")
        self.names, self.items = list(found), list(found.values())
        if not self.items:
            raise ValueError(f"{root}: no boxes_xyxy.txt in it or below, beside images")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path = self.items[i]
        images = numbered(os.path.dirname(path), r"[^.]*?(\d+)\.(?i:jpg|jpeg|png)")
        text = read_bytes(path).decode().replace(",", " ")
        with error_prefix(path):
            boxes = np.loadtxt(text.splitlines(), np.float32, ndmin=2)
            if boxes.shape != (len(images), 4) or not (boxes[:, :2] <= boxes[:, 2:]).all():
                raise ValueError(f"want x1 y1 x2 y2, rising, for each of {len(images)} images")
        return dict(video=read_clip(images.values()), boxes=boxes)

# ---- loader --------------------------------------------------------------------------------------
class SquareClip:
    """Frames (H, W, 3) -> `video` (T, 3, size, size) uint8: a random square of the short side."""

    def __init__(self, size):
        self.size = size

    def __call__(self, frames, rng):
        height, width = frames[0].shape[:2]
        side = min(height, width)
        top, left = (rng.uniform(size=2) * (height - side + 1, width - side + 1)).astype(int)
        box = top, left, side, side
        return {"video": torch.stack([crop_uint8(frame, box, self.size) for frame in frames])}

class Batches(torch.utils.data.Dataset):
    """A list of sample numbers in, their collated batch out: what DataLoader's workers run."""

    def __init__(self, source, crops, seed, one_frame=0):
        self.source, self.crops, self.seed = source, crops, seed
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

def make_loader(source, inputs, batches, device="cpu", seed=0, workers=-1, split="train",
                scenes=None, videos=None, colours=True, motion_colours="independent",
                one_frame=0):
    """Batches on the device, in order; to be iterated over once.

    source    "scenes", "squares", or the path of a video, of a folder of videos, or of frames
    inputs    what the model expects: dict(frames=T, size=S), with crops=dict(local_size=,
              local_crops=) for pairs cut into crops, squares=dict(...) for MovingSquares' options
    batches   iterable of lists of sample numbers
    workers   processes that prepare batches; 0: in this one; -1: choose
    split     "train" or "eval": other clips; of videos other draws from the same files
    scenes    SceneOptions, whose size counts only if there are crops; by default twice the model's
    videos    VideoOptions;   colours, motion_colours: of MultiCrop
    one_frame the first samples, so many, have motion crops of one frame, and `shift`
    Raises FileNotFoundError or ValueError with what to do if the source can't be read. """
    if "squares" in inputs and source != "squares":
        raise ValueError(f"--data {source}: this model needs masks and displacements, which only "
                         "--data squares has")
    device = torch.device(device)
    size, frames = inputs["size"], inputs["frames"]
    own_seed = split_seed(seed, split)
    workers = count_workers(workers, source, device)
    crops = None
    if "crops" in inputs:
        crops = MultiCrop(size, **inputs["crops"], colours=colours, motion_colours=motion_colours)
    if source == "squares":
        squares = inputs.get("squares", {})
        canvas = 2 * size if crops else size
        dataset = MovingSquares(canvas, frames, seed=seed, split=split, **squares)
    elif source == "scenes":
        options = scenes or SceneOptions(size=2 * size)
        options = options if crops else replace(options, size=size)
        dataset = Scenes(frames=frames, seed=seed, split=split, **asdict(options))
    else:
        dataset = Videos(source, frames, seed=own_seed, transform=crops or SquareClip(size),
                         **asdict(videos or VideoOptions()))
    dataset = Batches(dataset, crops, own_seed, one_frame)
    return DeviceLoader(data_loader(dataset, workers, device, batch_size=None, sampler=batches),
                        crops, device)

def sample_loader(dataset, batches, device="cpu"):
    """A dataset's samples in batches of numbers, in order."""
    workers = min(8, max(1, cores() - 1))
    return data_loader(dataset, workers, torch.device(device), batch_sampler=batches)

def data_loader(dataset, workers, device, **options):
    """DataLoader with processes that end with this one."""
    atexit.register(end_workers)
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=start_worker,
        **options)

def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def count_workers(workers, source, device):
    """-1: as many as there are cores for each process; squares are drawn sooner than they are sent,
    and on a CPU, which training keeps busy, one process renders scenes."""
    if workers > 8 * cores():
        raise ValueError(f"--workers {workers}: at most {8 * cores()} on {cores()} cores")
    if workers >= 0:
        return workers
    share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    cheap = {"squares": 0, "scenes": 1 if device.type == "cpu" else share}
    return cheap.get(source, share)

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

class DeviceLoader:
    """Iterates over a loader's batches on the device, colours applied there."""

    def __init__(self, loader, crops, device):
        self.loader, self.crops, self.device = loader, crops, device

    def __iter__(self):
        for batch in self.loader:
            for name in batch.keys() - {"params"}:      # of crops: finish() reads them on the CPU
                batch[name] = batch[name].to(self.device, non_blocking=True)
            yield self.crops.finish(batch) if self.crops else batch

# ---- look at your data ---------------------------------------------------------------------------
def show(source, path, videos=None):
    """Writes a picture: scenes with their truth (not of videos), and crops as in training."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import hsv_to_rgb

    plt.switch_backend("agg")
    rows = []                               # of {title: image}
    for b in range(2 if source == "scenes" else 0):
        scenes = Scenes(size=96, frames=2, pan=4.0, radius=(0.15, 0.3))
        clip = {name: x[0] for name, x in scenes.batch([b], truth=True).items()}
        first, second = clip["video"].permute(0, 2, 3, 1)
        u, v = clip["flow"][0]
        hue = torch.atan2(v, u) / (2 * math.pi) % 1
        speed = torch.hypot(u, v)
        flow = hsv_to_rgb(torch.stack([hue, speed / speed.max(), torch.ones_like(hue)], -1))
        rows.append({"frame 1": first, "frame 2": second, "flow": flow, "class": clip["classes"][0],
                     "occluded in frame 2": clip["occluded"][0], "depth": clip["depth"][0]})
    inputs = dict(frames=2, size=96, crops=dict(local_size=48, local_crops=2, blur=1.0))
    loader = make_loader(source, inputs, [range(2)], workers=0, videos=videos,
                         scenes=SceneOptions(size=192, pan=12.0))
    for motion, boxes, small in zip(*next(iter(loader)).values()):
        row = {}
        for f in range(2):
            for name, image in zip(("motion", "global 1", "global 2", "local"),
                                   (motion[f], *boxes[f], small[f, 0])):
                row[f"{name}, frame {f + 1}"] = image.permute(1, 2, 0).clamp(0, 1)
        rows.append(row)
    size = 12.4, 1.75 * len(rows)
    figure, axes = plt.subplots(len(rows), 8, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(rows, axes):
        for (title, image), axis in zip(row.items(), line):
            axis.imshow(image)
            axis.set_title(title, fontsize=8)
    figure.supxlabel("flow: hue is its direction (red: right), saturation its speed", fontsize=8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=90)

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
            print("written: out/data.png")
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: error: {error}")
