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
import heapq
import io
import itertools
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


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
    """A path as the user gave it -> str, with ~ for the home folder."""
    return os.path.expanduser(os.fspath(path))


def warn(text):
    """One line on stderr, whatever the names of files in it."""
    line = text.replace("\n", " ").encode("utf-8", "backslashreplace").decode()
    print(line, file=sys.stderr, flush=True)


class Reader:
    """One open video and its decoder, for one process. Times are Fractions of a second after its
    first frame.

    Why not imageio's own reader: on a variable-rate mp4 it returns wrong frames without a word, it
    ignores the rotation that phones write, and it costs about twice as much. So imageio only brings
    PyAV along. """

    def __init__(self, path):
        self.path = expand(path)
        if not os.path.isfile(self.path):               # opening a FIFO would wait without end
            raise FileNotFoundError(f"{self.path}: no such file")
        self.end = None                                 # time of the last frame, once it is known
        self.open()

    def open(self):
        """Opens the file and decodes its first frame, at time 0."""
        import av                                       # here: synthetic scenes need no FFmpeg
        self.container = av.open(os.path.abspath(self.path))
        streams = [stream for stream in self.container.streams.video if stream.codec_context]
        if not streams:
            raise ValueError(f"{self.path}: holds no video stream that FFmpeg can decode")
        self.stream = max(streams, key=self.rank)
        if self.container.format.name == "avi" and self.stream.codec_context.has_b_frames:
            raise ValueError(f"{self.path}: AVI keeps no times for B-frames: frames would be too early; "
                             "convert it once: ffmpeg -i in.avi out.mkv")
        # One thread: the loader's workers are the parallelism; threads below them cost 10 % more
        # CPU.
        self.stream.thread_type = "SLICE"
        self.stream.codec_context.thread_count = 1
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(30)
        self.tick = self.stream.time_base
        self.frames = self.container.decode(self.stream)
        self.frame = next((frame for frame in self.frames if frame.pts is not None), None)
        if self.frame is None:
            raise ValueError(f"{self.path}: holds no frame that FFmpeg can decode")
        self.start = self.frame.pts                 # not the header's: that may be another stream's
        self.time = self.asked = Fraction(0)        # of the frame; the last time that was asked for

    def rank(self, stream):
        """Of several streams ffmpeg and players take no cover picture, the default one, the
        largest."""
        kinds = type(stream.disposition)
        cover = bool(stream.disposition & kinds.attached_pic)
        return not cover, bool(stream.disposition & kinds.default), stream.width * stream.height

    def duration(self):
        """Seconds from the first frame to the end of the last, as the header promises: it may be
        too much."""
        if self.stream.duration:
            return self.stream.duration * self.tick
        if self.container.duration:
            return Fraction(self.container.duration, 10**6)
        raise ValueError(f"{self.path}: no duration in its header; remux it: "
                         "ffmpeg -i old -c copy new.mp4")

    def last(self):
        """Time of the last frame, found by decoding the end of the file."""
        found = self.at(self.duration()) if self.end is None else None
        while found:
            found = self.at(found[1] + TINY)
        return self.end

    def at(self, t):
        """The first frame at or after t -> (frame, its time), None behind the last. Cheap if t
        ascends."""
        if self.end is not None and t > self.end:
            return None
        if self.frame is None or not self.asked <= t <= self.time:
            if self.frame is None or t < self.time or self.keyframe_between(t):
                self.seek(t)
            while self.time < t:
                frame = next((frame for frame in self.frames if frame.pts is not None), None)
                if frame is None:
                    self.end, self.frame = self.time, None
                    return None
                self.take(frame)
        self.asked = t
        return self.frame, self.time

    def keyframe_between(self, t):
        """Is there a keyframe between the decoder and t? If so a seek saves work, if not it repeats
        work."""
        index = self.stream.index_entries
        wanted = self.start + math.floor(t / self.tick)
        if len(index) and index[-1].timestamp >= wanted:
            key = index.search_timestamp(wanted)
            return key >= 0 and (index[key].timestamp - self.start) * self.tick > self.time
        return t > self.time + 2        # mkv reads its index piece by piece: go by a usual distance

    def seek(self, t):
        """Puts the decoder on a keyframe at or before t. A file without an index (MPEG-TS) may land
        behind t, or behind its last keyframe: then further back, at last at the start. Frames shown
        before the keyframe are left out: they may need earlier ones."""
        back = 0
        while t > back:
            self.container.seek(self.start + math.floor((t - back) / self.tick), stream=self.stream)
            self.frames = self.container.decode(self.stream)
            key = next((f for f in self.frames if f.key_frame and f.pts is not None), None)
            if key is not None and (key.pts - self.start) * self.tick <= t:
                self.time = -math.inf
                return self.take(key)
            back = 4 * back + 1
        self.container.close()
        self.open()

    def take(self, frame):
        """Makes a frame the current one. What FFmpeg paints over damage depends on where decoding
        began."""
        before, self.time = self.time, (frame.pts - self.start) * self.tick
        self.frame = None                   # after an error the next call has to seek
        if frame.is_corrupt or self.time < before:
            why = "is damaged" if frame.is_corrupt else "times go backwards"
            raise ValueError(f"{self.path}: {why} near {float(self.time):.2f} s")
        self.frame = frame

    def image(self, frame):
        """A decoded frame -> uint8 (H, W, 3), turned and mirrored as players show it."""
        # threads=1: the converter's own threads would not outlive a fork, and freeing it there
        # would hang.
        image = frame.to_ndarray(format="rgb24", threads=1)                     # (H, W, 3)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is not None:              # shown x = a x + c y, y = b x + d y
            (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
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
    """Frames of a video file at `times` (ascending, in seconds after its first frame).

    Returns (list of uint8 (H, W, 3) arrays, list of their true times in s). Each is the first frame
    at or after the time asked for, within the rounding of the file's clock, at variable frame rates
    too. Phone clips come upright. Raises ValueError if the file ends before, av.error.FFmpegError
    if it is damaged. """
    reader = Reader(path)
    images, true = [], []
    for t in times:
        # Half a tick is what rounding to the file's clock may cost (mkv: 1 ms, 1/30 s is 0.033
        # there).
        found = reader.at(max(t - 0.5 * min(reader.tick, 1e-3) - 1e-6, 0))
        if found is None:
            raise ValueError(f"{reader.path}: ends at {float(reader.end):.2f} s, before the wanted "
                             f"{t:.2f} s")
        images.append(reader.image(found[0]))
        true.append(float(found[1]))
    return images, true


def read_image(path):
    """First image of a file, uint8 (H, W, 3) RGB, upright by its Exif tag; 16-bit grey by its high
    byte."""
    with iio.imopen(path, "r", plugin="pillow") as file:
        deep = file.metadata(index=0, exclude_applied=False).get("mode", "").startswith("I")
        image = file.read(index=0, rotate=True, mode=None if deep else "RGB")
    return np.repeat((image >> 8).astype(np.uint8)[..., None], 3, 2) if deep else image


class FrameFolder:
    """A sequence of image files with the interface of Reader: number n stands n / fps seconds after
    the first. Numbers may be nanoseconds: they stay whole."""

    def __init__(self, paths, numbers, places, fps):
        self.paths, self.numbers = paths, numbers
        self.places = places                # in the list of all files
        self.rate = Fraction(fps)

    def at(self, t):
        place = bisect.bisect_left(self.numbers, self.numbers[0] + math.ceil(t * self.rate))
        if place == len(self.numbers):
            return None
        return place, (self.numbers[place] - self.numbers[0]) / self.rate

    def last(self):
        return (self.numbers[-1] - self.numbers[0]) / self.rate

    def duration(self):
        return self.last() + 1 / self.rate

    def image(self, place):
        try:
            return read_image(self.paths[place])
        except (ValueError, OSError, IndexError, SyntaxError) as error:     # Pillow: a damaged chunk
            raise Broken(self.places[place], error) from None


def walk(root):
    """Sorted paths of the regular files in a folder, relative to it, at any depth; links yes,
    hidden no."""
    files, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:    # a link to a folder above would never end
            below.clear()
            continue
        seen.add(real)
        # A leading dot hides a name. macOS leaves a ._x beside each x it copies: no video, in spite
        # of .mp4.
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths = [os.path.join(folder, name) for name in names if not name.startswith(".")]
        files += [os.path.relpath(path, root) for path in paths if os.path.isfile(path)]  # no FIFOs
    return sorted(files)


def find_files(root):
    """Path -> (folder, sorted names of its videos, of its images), at any depth; links yes, hidden
    no."""
    root = expand(root)
    if os.path.isfile(root):
        if not root.lower().endswith(VIDEO_TYPES):
            raise ValueError(f"{root}: neither a folder nor a video ({' '.join(VIDEO_TYPES)})")
        return os.path.dirname(root), [os.path.basename(root)], []
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such file or folder")
    videos, images, others = [], [], []
    for path in walk(root):
        kind = os.path.splitext(path)[1].lower()
        (videos if kind in VIDEO_TYPES else images if kind in IMAGE_TYPES else others).append(path)
    if others:
        kinds = sorted({os.path.splitext(path)[1] or os.path.basename(path) for path in others})
        warn(f"{root}: left out {len(others)} files of other kinds: {' '.join(kinds[:8])}")
    if not videos and not images:
        types = " ".join(VIDEO_TYPES + IMAGE_TYPES)
        raise ValueError(f"{root}: no videos and no frames in this folder or below ({types})")
    return root, videos, images


class Broken(Exception):
    """A file that cannot give its frames: (number of the file, why)."""


@dataclass
class VideoOptions:
    gap: tuple = (0.5, 1.0)     # seconds between the frames of a pair, from and to
    repeat: int = 5             # samples from each opening of a video
    fps: float = 30.0     # for folders of frames: what the numbers in their names count, per second
    stride: int = 1             # clips: every stride-th frame of the source


class Videos(torch.utils.data.Dataset):
    """Frame pairs (frames=2, `gap` seconds apart) or clips (every `stride`-th frame) from your
    videos.

        videos/any/depth/a.mp4  b.MOV ...           files (or the path of a single one)
        frames/drive1/0001.jpg  0002.jpg ...        or frames: one sequence,
        frames/drive2_0001.png  drive2_0002.png     and another

    Frames: the digits that end a name are its number, counted at `fps` per second; what stands
    before them, with the folder, is its sequence. Images without a number are left out, with one
    line on stderr. Where there are both, the videos win (the images are then thumbnails or labels).

    Sample i, for any i >= 0, depends on (seed, i) alone: not on workers, batches or where a run
    resumed. A video gives `repeat` samples in a row (in one opening, unless a batch ends between
    them), since opening costs as much as decoding ten frames, and each pass takes the videos in a
    new order. Images need no opening: a sequence gives one sample at a time, and as many in a pass
    as it has frames. Distances in time are those of the frames themselves, at variable rates too: a
    pair lies in the gap to half a frame, and what does not is drawn again. A clip never crosses a
    hole in the numbers of frames.

    A sample is transform(frames, rng), of a list of T uint8 (H, W, 3) arrays and a numpy Generator
    of its own; without a transform it is dict(video=uint8 (T, 3, H, W)).

    Broken, too short and too sparse files are named once on stderr, counted in `broken` and
    replaced by other files. Raises FileNotFoundError (no root), ValueError (nothing in it fits),
    OSError (ten in a row fail). """

    def __init__(self, root, frames=2, gap=(0.5, 1.0), stride=1, repeat=5, fps=30.0, seed=0,
                 transform=None):
        if not 0 < gap[0] <= gap[1] < math.inf:
            raise ValueError(f"{gap=}: want two rising numbers above 0")
        if min(frames, stride, repeat) < 1 or not 0 < fps < math.inf:
            raise ValueError(f"{frames=} {stride=} {repeat=} {fps=}: want fps > 0, the others from 1")
        self.frames, self.stride, self.repeat = frames, stride, repeat
        self.gap = Fraction(gap[0]), Fraction(gap[1])
        self.seed, self.transform = seed, transform
        self.root = expand(root)
        self.folder, self.files, images = find_files(root)
        self.kind = "video" if self.files else "frame"
        self.sequences = []                                 # FrameFolder
        self.starts = np.arange(len(self.files))     # what a pass goes through: videos or sequences
        if not self.files:
            self.repeat = 1
            self.sort_images(images, fps)
            lengths = [len(sequence.numbers) for sequence in self.sequences]
            self.starts = np.repeat(np.arange(len(lengths)), lengths)
        # Shared memory: the workers of a loader count together and name each broken file once.
        self.broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()
        self.order = -1, None                              # a pass, and the order of `starts` in it
        self.readers, self.pid = {}, os.getpid()            # open files, the last used at the end

    def __len__(self):
        return len(self.starts) * self.repeat

    def __iter__(self):                     # one pass; without this, `for` would go on for ever
        return (self[i] for i in range(len(self)))

    def __getstate__(self):                 # a decoder cannot go to another process
        return {**self.__dict__, "readers": {}}

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        """Sample numbers -> samples (the batched fetch of DataLoader); neighbours share an open
        video."""
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
        """The k-th opening of the run -> a list of T frames for each number (below `repeat`) in
        `picks`."""
        n = len(self.starts)
        turn, place = divmod(k, n)
        if self.order[0] != turn:
            self.order = turn, np.random.default_rng((self.seed, turn)).permutation(n)
        step = 7919 if n % 7919 else 1      # a prime, so that the tries meet different files
        for attempt in range(TRIES):  # another file, and where there are few, other moments of them
            start = self.starts[(self.order[1][place] + attempt * step) % n]
            key = (self.seed, k, attempt, 0) if attempt else (self.seed, k)
            try:
                return self.read(int(start), key, picks)
            except Broken as error:
                why = self.report(*error.args)
            if len(picks) > 1:      # half a file may be good: each sample decides as if asked alone
                return [self.opening(k, [pick])[0] for pick in picks]
        raise OSError(f"{self.root}: ten {self.kind}s tried in a row give no sample; the last: {why}")

    def report(self, file, error):
        name = self.files[file]
        why = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
        why = why.splitlines()[0].removeprefix(f"{os.path.join(self.folder, name)}: ")
        if not self.broken[file]:
            self.broken[file] = True
            warn(f"skipped broken {self.kind} {name}: {why} ({int(self.broken.sum())} so far)")
        return f"{name}: {why}"

    def reader(self, file):
        """An open Reader. Two stay open: a gain where all samples come from one long file."""
        if self.pid != os.getpid():         # after a fork both would share a place in the file
            self.readers, self.pid = {}, os.getpid()
        reader = self.readers.pop(file, None) or Reader(os.path.join(self.folder, self.files[file]))
        self.readers[file] = reader
        while len(self.readers) > 2:
            self.readers.pop(next(iter(self.readers))).container.close()
        return reader

    def read(self, start, key, picks):
        """Samples `picks` of a video or sequence, with what was drawn from `key` -> lists of T
        images."""
        if self.sequences:
            sequence = self.sequences[start]
            return self.sweep(sequence, key, picks, sequence.places[0])
        import av
        kept = start in self.readers
        try:
            return self.sweep(self.reader(start), key, picks, start)
        except (av.error.FFmpegError, ValueError, OSError, IndexError) as error:
            self.readers.pop(start, None)   # the next try begins with a fresh decoder
            if kept:                        # the old one may have run into damage on its way
                return self.read(start, key, picks)
            raise Broken(start, error) from None

    def sweep(self, reader, key, picks, file):
        """Draws samples in one sweep through a file: each asks for times, and the earliest comes
        first."""
        begin = np.sort(np.random.default_rng(key).random(self.repeat))     # about in order of time
        draw = self.draw_pair if self.frames == 2 else self.draw_clip
        heap, found = [], {}
        for r in set(picks):
            sample = draw(reader, begin[r], np.random.default_rng((*key, r, 2)))
            heap.append((next(sample), r, sample))
        heapq.heapify(heap)
        while heap:
            t, r, sample = heapq.heappop(heap)
            try:
                heapq.heappush(heap, (sample.send(reader.at(t)), r, sample))
            except StopIteration as stop:
                found[r] = stop.value
        if None in found.values():
            length = float(reader.last() + 1 / reader.rate)
            why = "sparse" if self.frames == 2 and length > self.gap[0] else "short"
            raise Broken(file, f"lasts {length:.2f} s at {float(reader.rate):.3g} frames a second, "
                               f"too {why} for {self.wish()}")
        samples = [[reader.image(frame) for frame in found[r]] for r in picks]
        if len({image.shape for images in samples for image in images}) > 1:
            raise Broken(file, "its frames change size")
        return samples

    def moments(self, reader, begin, length, rng):
        """Where samples may begin in a file, in s: TRIES of them, the first at the share `begin` of
        it.

        Headers often promise too much, so that after a miss the true end counts. (Not before, even
        if other samples have found it: a sample depends on its number alone.) The last try is from
        the start. """
        frame = 1 / reader.rate
        for attempt in range(TRIES - 1):
            last = reader.last() if attempt else reader.duration() - frame
            yield max(begin * (max(last - length, 0) + frame) - frame, 0)
            begin = rng.random()
        yield 0

    def draw_pair(self, reader, begin, rng):
        """A generator: yields a time, is sent what reader.at() finds there, and so on. Returns two
        frames, or None where no frames are `gap` apart."""
        low, high = self.gap
        longest = max(low, min(high, reader.duration() - 1 / reader.rate))
        gap = low + rng.random() * (longest - low)
        for start in self.moments(reader, begin, gap, rng):
            first = yield start
            if first is None:
                continue
            before = first[1] + max(low - Fraction(3, 2) / reader.rate, 0)
            pair, distance = None, 0
            while distance < gap:                      # the nearest to `gap` of the frames in reach
                found = yield before + TINY
                if found is None:
                    break
                half = min(1 / reader.rate, found[1] - before) / 2
                before = found[1]
                distance = before - first[1]
                nearer = pair is None or abs(distance - gap) < abs(pair[1] - gap)
                if low - half <= distance <= high + half and nearer:
                    pair = found[0], distance
            if pair:
                return [first[0], pair[0]]
        return None

    def draw_clip(self, reader, begin, rng):
        """The same for clips: every stride-th frame, whatever their times."""
        count = (self.frames - 1) * self.stride
        for start in self.moments(reader, begin, count / reader.rate, rng):
            found = yield start
            clip = []
            while found:
                clip.append(found[0])
                if len(clip) > count:
                    return clip[::self.stride]
                found = yield found[1] + TINY
        return None

    def wish(self):
        if self.frames == 2:
            return f"pairs {float(self.gap[0]):g} to {float(self.gap[1]):g} s apart"
        return f"clips of {self.frames} frames at stride {self.stride}"

    def sort_images(self, images, fps):
        """Names -> `files`, in order, and the sequences in them that give samples."""
        found, left_out = {}, []
        for name in images:
            match = re.fullmatch(r"(.*?)([0-9]+)", os.path.splitext(name)[0], re.DOTALL)
            if match:                       # x1.jpg and x1.png are one frame: the first by name
                found.setdefault((match[1], int(match[2])), name)
            else:
                left_out.append(name)
        if left_out:
            warn(f"left out {len(left_out)} images without a number, such as {left_out[0]}")
        if not found:
            raise ValueError(f"{self.root}: no image name ends in a frame number, as a_0001.jpg does")
        keys = sorted(found)
        self.files = [found[key] for key in keys]
        paths = [os.path.join(self.folder, name) for name in self.files]
        steps, longest = set(), 0
        for _, places in itertools.groupby(range(len(keys)), lambda place: keys[place][0]):
            places = list(places)
            numbers = [keys[place][1] for place in places]
            steps |= {b - a for a, b in itertools.pairwise(numbers)}
            longest = max(longest, numbers[-1] - numbers[0])
            for a, b in self.pieces(numbers, Fraction(fps)):
                piece = places[a:b]
                images = [paths[place] for place in piece]
                self.sequences.append(FrameFolder(images, numbers[a:b], piece, fps))
        if not self.sequences:
            have = "each is alone"
            if steps:
                have = (f"neighbours are {min(steps) / fps:.3g} to {max(steps) / fps:.3g} s apart, "
                        f"the longest sequence lasts {longest / fps:.3g} s")
            flags = "--gap" if self.frames == 2 else "--frames, --stride"
            raise ValueError(f"{self.root}: frames at --fps {fps:g} give no {self.wish()}: {have}; "
                             f"change {flags} or --fps")

    def pieces(self, numbers, rate):
        """The parts of a sequence that give samples, [(from, to)]: for pairs the whole, for clips
        what lies between holes, which are steps other than the usual one."""
        if self.frames == 2:
            reach = max(math.ceil(self.gap[0] * rate - Fraction(1, 2)), 1)
            most = math.floor(self.gap[1] * rate + Fraction(1, 2))
            places = [bisect.bisect_left(numbers, n + reach) for n in numbers]      # of the next in reach
            fits = any(place < len(numbers) and numbers[place] <= n + most for n, place in zip(numbers, places))
            return [(0, len(numbers))] if fits else []
        steps = [b - a for a, b in itertools.pairwise(numbers)]
        usual = Counter(steps).most_common(1)[0][0] if steps else 1
        cuts = [n + 1 for n, step in enumerate(steps) if step != usual]
        pieces = itertools.pairwise([0, *cuts, len(numbers)])
        return [(a, b) for a, b in pieces if b - a > (self.frames - 1) * self.stride]


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
        boxes, flips, params = self.draw(rng, *frames[0].shape[:2])
        crops = []
        for frame, box, size, flip in zip(self.frames, boxes, self.sizes, flips):
            crops.append(crop_uint8(frames[frame], box, size, flip))
        small = torch.stack(crops[6:]) if self.n else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return dict(
            motion=torch.stack(crops[:2]),
            globals=torch.stack(crops[2:6]).unflatten(0, (2, 2)),
            locals=small.unflatten(0, (2, self.n)),
            params=params,
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
        why = (" ".join(str(error).split()) or type(error).__name__).removeprefix(f"{path}: ")
        why = why if type(error) is ValueError else f"can't be read, is it damaged? ({why})"
        raise ValueError(f"{path}: {why}") from None


def read_bytes(path):
    path = expand(path)
    with error_prefix(path), open(path, "rb") as file:
        return file.read()


def read_one_channel(path, deep=False):
    """Numbers in an image file, (H, W), 8 bits: of a palette the places, not the colours; deep: 16
    bits."""
    with error_prefix(path), iio.imopen(path, "r", plugin="pillow") as file:
        mode = file.metadata(index=0, exclude_applied=False)["mode"]
        if mode not in (("I", "I;16", "I;16B") if deep else ("L", "P", "1")):
            bits = 16 if deep else 8
            raise ValueError(f"is of kind {mode}, but must have one channel of {bits} bits")
        numbers = file.read(index=0, mode=mode).astype(np.uint16 if deep else np.uint8)
    with open(path, "rb") as file:
        head = file.read(26)
    if mode == "L" and head[:4] == b"\x89PNG" and head[24] < 8:     # 2 or 4 bits come spread to 255
        numbers //= 255 // (2 ** head[24] - 1)
    return numbers


def read_clip(paths):
    """Image files -> uint8 (T, H, W, 3). What is known of their pixels is known of them as
    stored."""
    paths, images = list(paths), []
    for path in paths:
        with error_prefix(path):
            with Image.open(path) as file:
                if file.getexif().get(0x0112, 1) != 1:
                    raise ValueError("is turned by an EXIF tag, but its labels are not: store it "
                                     "turned, without the tag")
            images.append(read_image(path))
            if images[-1].shape != images[0].shape:
                raise ValueError(f"is not of the size of {paths[0]}")
    return np.stack(images)


def check_folder(root):
    root = expand(root)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder")
    return root


def folders_with(root, file):
    """Folders, at any depth, in which there is a file of this name: their paths, and names for
    them."""
    found = [os.path.dirname(path) for path in walk(root) if os.path.basename(path) == file]
    paths = [os.path.join(root, folder) for folder in found]
    return paths, [folder or os.path.basename(os.path.abspath(root)) for folder in found]


def numbered(folder, pattern):
    """Files of a folder whose whole name fits the pattern with one group of digits: {number:
    path}."""
    matches = [re.fullmatch(pattern, name) for name in os.listdir(folder)]
    found = {int(match[1]): os.path.join(folder, match[0]) for match in matches if match}
    return dict(sorted(found.items()))


def read_flo(path):
    """Middlebury's .flo -> flow (H, W, 2) float32 as stored: (x, y) in pixels, above 1e9 where
    unknown."""
    raw = read_bytes(path)
    if raw[:4] != b"PIEH" or len(raw) < 12:                 # the bytes of float32 202021.25
        raise ValueError(f"{path}: does not begin as a .flo file does; is it another format?")
    width, height = np.frombuffer(raw, "<i4", 2, 4).tolist()
    need = 12 + 8 * width * height
    if min(width, height) < 1 or len(raw) != need:
        raise ValueError(f"{path}: {width} x {height} pixels need {need} bytes, there are {len(raw)}: it "
                         "is damaged or cut short, get it anew")
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
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[24:26] != b"\x10\x02":
        raise ValueError(f"{path}: must be a PNG of three channels of 16 bits, as KITTI's flow is")
    with error_prefix(expand(path)):       # not by Pillow, which loses the low bytes without a word
        if b"IEND" not in raw[-12:]:        # FFmpeg would leave the missing rows black
            raise ValueError("is cut short: get it anew")
        with av.open(io.BytesIO(raw), format="png_pipe") as file:
            pixels = next(file.decode(video=0)).to_ndarray(format="rgb48le", threads=1)  # (H, W, 3)
    valid = pixels[..., 2] > 0
    return np.where(valid[..., None], (pixels[..., :2].astype(np.float32) - 2**15) / 64, 0), valid


def read_pfm(path):
    """FlyingThings3D's .pfm of three channels -> flow (H, W, 2) float32 as stored, in pixels."""
    raw = read_bytes(path)
    header = re.match(rb"PF\s+(\d+)\s+(\d+)\s+(-?)[\d.eE+-]+\s", raw)       # a minus: little endian
    if not header:
        raise ValueError(f"{path}: does not begin as a .pfm file of three channels does")
    width, height, body = int(header[1]), int(header[2]), len(raw) - header.end()
    if not width * height or body != 12 * width * height:
        raise ValueError(f"{path}: {width} x {height} pixels need {12 * width * height} bytes, there are "
                         f"{body}: it is damaged or cut short, get it anew")
    rows = np.frombuffer(raw, "<f4" if header[3] else ">f4", offset=header.end()).reshape(height, width, 3)
    return rows[::-1, :, :2].astype(np.float32)                          # stored from the bottom up


FLOW_LAYOUTS = (        # path of a flow; kinds of images; first frame, second, mask of unknown flow without
    # their suffixes (n, m: numbers of the first and the second frame); what in the path marks the
    # val split
    (r"(?P<top>.*/|)flow/(?P<scene>[^/]+)/frame_(?P<n>\d+)\.flo", ("clean", "final"),       # Sintel
     "{top}{kind}/{scene}/frame_{n:04d}", "{top}{kind}/{scene}/frame_{m:04d}",
     "{top}invalid/{scene}/frame_{n:04d}", "/temple_[23]/"),
    (r"(?P<top>.*/|)(?P<n>\d+)_flow\.flo", ("",),                                     # FlyingChairs
     "{top}{n:05d}_img1", "{top}{n:05d}_img2", "", None),
    (r"(?P<top>.*/|)optical_flow/(?P<scene>.+)/into_future/left/OpticalFlowIntoFuture_(?P<n>\d+)_L\.pfm",
     ("clean", "final"),                                                            # FlyingThings3D
     "{top}frames_{kind}pass/{scene}/left/{n:04d}", "{top}frames_{kind}pass/{scene}/left/{m:04d}",
     "", "/TEST/"),
    (r"(?P<top>.*/|)flow_occ/(?P<n>\d+)_10\.png", ("image_2", "colored_0"),                  # KITTI
     "{top}{kind}/{n:06d}_10", "{top}{kind}/{n:06d}_11", "", None),
    (r"(?P<top>.*/|)flow\.(flo|png)", ("",), "{top}frame1", "{top}frame2", "", None))        # yours


class FlowPairs(torch.utils.data.Dataset):
    """Pairs of frames with the true flow between them. `root`, or a folder below it, is laid out as
    one of

        NAME/frame1.png frame2.png flow.flo             yours, at any depth; flow.png is KITTI's kind
        clean/alley_1/frame_0001.png flow/alley_1/frame_0001.flo, final/..., invalid/...  Sintel
        data/00001_img1.ppm 00001_img2.ppm 00001_flow.flo, FlyingChairs_train_val.txt     Chairs
        frames_cleanpass/TRAIN/A/0000/left/0006.png, frames_finalpass/...                 Things
            optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm
        image_2/000000_10.png 000000_11.png flow_occ/000000_10.png; or colored_0          KITTI

    split: "train", "val" or "all". Sintel's val are temple_2 and temple_3, as in CroCo v2; KITTI,
    yours and Chairs without its list have no splits: there each split is everything. [i] is

    frames    (2, H, W, 3)  uint8
    flow      (2, H, W)     float32, (x, y) in pixels, from the first frame on; 0 where unknown
    valid     (H, W)        bool: the flow is known

    `names` are those of the folders that are yours, else of the first frames.
    """

    def __init__(self, root, split="val"):
        if split not in ("train", "val", "all"):
            raise ValueError(f"split={split!r} must be 'train', 'val' or 'all'")
        self.root = check_folder(root)
        files = [name.replace(os.sep, "/") for name in walk(self.root)]
        images = {os.path.splitext(f)[0]: f for f in files
                  if f.lower().endswith((*IMAGE_TYPES, ".ppm", ".webp"))}
        chairs = [f for f in files if os.path.basename(f) == "FlyingChairs_train_val.txt"]
        self.chairs = read_bytes(os.path.join(self.root, chairs[0])).split() if chairs else []
        found, alone = [], []
        for flow in files:
            pairs = self.pairs(flow)
            whole = [pair for pair in pairs if pair[2] in images and pair[3] in images]
            found += [(part, name, images[a], images[b], flow, images.get(mask))
                      for part, name, a, b, mask in whole]
            if pairs and not whole:
                alone.append(flow)
        if alone:                     # the last of a sequence of FlyingThings3D has no second frame
            warn(f"left out {len(alone)} flows without both frames, such as {alone[0]}")
        if not found:
            raise ValueError(f"{self.root}: no flow with its two frames: want NAME/frame1.png, "
                             "frame2.png, flow.flo, or Sintel, FlyingChairs, FlyingThings3D or KITTI "
                             "as unpacked")
        self.items = [item for item in found if split == "all" or item[0] in (split, "")]
        self.names = [item[1] for item in self.items]
        if not self.items:
            raise ValueError(f"{self.root}: no pairs of split {split!r}, only of {found[0][0]!r}")

    def pairs(self, flow):
        """A file -> [(split or "", name, first frame, second, mask)] that it may be the flow of."""
        found = []
        for pattern, kinds, first, second, mask, val in FLOW_LAYOUTS:
            match = re.fullmatch(pattern, flow)
            for kind in kinds if match else ():
                parts = match.groupdict()
                n = int(parts.get("n") or 0)
                parts.update(kind=kind, n=n, m=n + 1)
                name = first.format(**parts)
                if first == "{top}frame1":
                    name = os.path.dirname(name) or os.path.basename(os.path.abspath(self.root))
                part = ""
                if val:
                    part = "val" if re.search(val, flow) else "train"
                elif self.chairs and flow.endswith("_flow.flo"):
                    mark = self.chairs[n - 1] if 0 < n <= len(self.chairs) else b""
                    if mark not in (b"1", b"2"):
                        raise ValueError(f"{self.root}: FlyingChairs_train_val.txt has neither 1 nor 2 "
                                         f"for pair {n:05d}")
                    part = "train" if mark == b"1" else "val"
                paths = [path.format(**parts) for path in (first, second, mask)]
                found.append((part, name, *paths))
        return found

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        paths = [os.path.join(self.root, path) if path else "" for path in self.items[i][2:]]
        first, second, file, mask = paths
        frames = read_clip([first, second])                                     # (2, H, W, 3)
        if file.endswith(".png"):
            flow, valid = read_kitti_flow(file)
        else:
            flow = read_pfm(file) if file.endswith(".pfm") else read_flo(file)
            valid = (abs(flow) <= 1e9).all(-1)                                  # nan is not
        unknown = read_one_channel(mask) > 0 if mask else np.zeros_like(valid)
        if not frames.shape[1:3] == valid.shape == unknown.shape:
            raise ValueError(f"{file}: the flow is {[*valid.shape]}, its frames are "
                             f"{[*frames.shape[1:3]]}, the mask is {[*unknown.shape]}")
        valid = valid & ~unknown
        flow = np.where(valid[..., None], flow, 0).transpose(2, 0, 1)           # (2, H, W)
        return dict(frames=frames, flow=np.ascontiguousarray(flow), valid=valid)


CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
          "pedestrian", "bicyclist")
CITYSCAPES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
              "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus",
              "train", "motorcycle", "bicycle")
CITYSCAPES_IDS = (          # in labelIds.png
    7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SPLITS = dict(train="train", training="train", val="val", validation="val", test="test",
              testing="test")
SEGMENTATION_LAYOUTS = (    # folders of images, of labels; classes, first value, value ignored; names
    ("{}", "{}annot", 11, 0, 11, CAMVID),
    ("leftImg8bit/{}", "gtFine/{}", 19, 0, 255, CITYSCAPES),
    ("images/10k/{}", "labels/sem_seg/masks/{}", 19, 0, 255, CITYSCAPES),               # BDD100K
    ("images/{}", "labels/sem_seg/masks/{}", 19, 0, 255, CITYSCAPES),
    ("images/10k/{}", "labels/{}", 19, 0, 255, CITYSCAPES),
    ("images/{}", "annotations/{}", 150, 1, 0, None),                                   # ADE20K
    ("images/{}", "labels/{}", None, 0, 255, None),                                     # yours
    ("images", "labels", None, 0, 255, None))


class Segmentation(torch.utils.data.Dataset):
    """Images with a class for each pixel, from what lies in the folder `root`:

        train/NAME.png trainannot/NAME.png                                    CamVid, SegNet's
        leftImg8bit/train/CITY/X_leftImg8bit.png gtFine/train/CITY/X_gtFine_labelTrainIds.png, or
        labelIds
        images/10k/train/NAME.jpg labels/sem_seg/masks/train/NAME.png         BDD100K
        images/training/NAME.jpg annotations/training/NAME.png                ADE20K
        images/train/ANY/NAME.jpg labels/train/ANY/NAME.png                   yours
        images/ANY/NAME.jpg labels/ANY/NAME.png     yours: every fifth by name is val, the rest train

    Labels are PNGs of 8 bits or fewer and one channel; a palette's numbers count, not its colours.
    split: "train", "val" or "test". num_classes and ignore_index: how many classes (2 at least),
    and what value in the files is none of them; by default what the data set says; yours: as many
    as the labels of all splits show (they are read through once), and 255. [i] is

    image     (H, W, 3)  uint8
    classes   (H, W)     int64: 0 .. num_classes - 1, and 255 where ignored

    `names` of the classes or None; `files`: (path of the image, of its label).
    """

    def __init__(self, root, split="train", num_classes=None, ignore_index=None):
        self.root = check_folder(root)
        for images, labels, classes, first, ignored, names in SEGMENTATION_LAYOUTS:
            splits = self.find_splits(images, labels)
            if splits:
                break
        else:
            raise ValueError(f"{self.root}: no labelled images in a known layout: want "
                             "images/train/A.jpg with labels/train/A.png, or CamVid, Cityscapes, "
                             "BDD100K, ADE20K as unpacked")
        if split not in splits:
            raise ValueError(f"{self.root}: has no split {split!r}, only {', '.join(splits)}")
        self.files = self.pairs(*splits[split])
        self.first = first
        self.ignore_index = ignored if ignore_index is None else ignore_index
        self.num_classes = num_classes or classes
        if classes is None:
            counted = self.count_classes(splits)
            self.num_classes = num_classes or counted
        self.names = list(names) if names and len(names) == self.num_classes else None
        if not (2 <= self.num_classes <= 255 and 0 <= self.ignore_index <= 255):
            raise ValueError(f"{self.root}: --classes {self.num_classes} --ignore-index "
                             f"{self.ignore_index}: want 2 to 255 classes, an index from 0 to 255")
        if "{}" not in images:
            self.files = [f for i, f in enumerate(self.files) if (i % 5 == 4) == (split == "val")]
            if not self.files:
                raise ValueError(f"{self.root}: too few images for a val split of every fifth")

    def find_splits(self, images, labels):
        """Patterns of two folders -> {split: (folder of images, of labels)} of those that exist."""
        found = {}
        for name in SPLITS if "{}" in images else ("train", "val"):
            folders = [os.path.join(self.root, path.format(name)) for path in (images, labels)]
            if os.path.isdir(folders[0]) and os.path.isdir(folders[1]):
                found[SPLITS[name]] = folders
        return found

    def pairs(self, images, labels):
        """Folders -> [(image, its label)]: those whose paths are alike but for the data set's
        endings."""
        def key(name):
            stem = os.path.splitext(name)[0]
            return re.sub("_leftImg8bit$|_gtFine_label(Ids|TrainIds)$", "", stem)

        pictures = [name for name in walk(images) if name.lower().endswith(IMAGE_TYPES)]
        truth = {key(name): name for name in walk(labels)           # of Cityscapes TrainIds come last
                 if name.endswith(".png")}
        found = [(os.path.join(images, name), os.path.join(labels, truth[key(name)]))
                 for name in pictures if key(name) in truth]
        if not found:
            raise ValueError(f"{images}: none of its {len(pictures)} images has a label of the same "
                             f"name, .png, in {labels}")
        if len(found) < len(pictures):
            alone = next(name for name in pictures if key(name) not in truth)
            warn(f"left out {len(pictures) - len(found)} images without label in {images}, such as "
                 f"{alone}")
        return found

    def count_classes(self, splits):
        """One more than the largest class in the labels of all splits."""
        seen = np.zeros(256, bool)
        for folders in splits.values():
            for _, label in self.pairs(*folders):
                seen[np.unique(read_one_channel(label))] = True
        seen[self.ignore_index] = False
        if seen.sum() < 2:                  # one class would be found by everybody: mIoU 100
            raise ValueError(f"{self.root}: beside {self.ignore_index}, which is ignored, the labels "
                             f"hold only {seen.nonzero()[0].tolist()}: want two classes. Store masks "
                             "of 0 and 255 as 0 and 1, or set --ignore-index")
        return int(seen.nonzero()[0].max()) + 1

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, label = self.files[i]
        table = np.full(256, -1)                       # value in the file -> class; -1: not allowed
        table[self.first:self.first + self.num_classes] = np.arange(self.num_classes)
        if label.endswith("_gtFine_labelIds.png"):          # Cityscapes: of its 34 classes 19 count
            table[:34] = 255
            table[255] = 255
            table[list(CITYSCAPES_IDS)] = np.arange(19)
        table[self.ignore_index] = 255
        picture = read_clip([image])[0]
        values = read_one_channel(label)
        if picture.shape[:2] != values.shape:
            raise ValueError(f"{label}: is {[*values.shape]}, its image is {[*picture.shape[:2]]}")
        classes = table[values]                                 # (H, W)
        if classes.min() < 0:
            raise ValueError(
                f"{label}: value {values[classes < 0].max()} is neither a class ({self.first} to "
                f"{self.first + self.num_classes - 1}) nor the value to ignore ({self.ignore_index}): set "
                "--classes / --ignore-index")
        return dict(image=picture, classes=classes)


class PickledDtype:
    """A stand-in for a dtype: pickles set its byte order after they made it."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or np.dtype(code).kind not in "biufS":
            raise ValueError(f"holds arrays of {code!r:.50}, not of numbers: refused")
        self.code = code

    def __setstate__(self, state):
        self.code = state[1].strip("|=") + self.code


class PickledArray:
    """A stand-in for an array, of which pickles set shape, dtype and bytes; np.asarray() makes it
    one."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, dtype, by_columns, raw = state
        self.array = pickled_buffer(raw, dtype, shape, "F" if by_columns else "C")

    def __array__(self, dtype=None, copy=None):
        return self.array


def pickled_buffer(raw, dtype, shape, order):
    return np.frombuffer(raw, dtype.code).reshape(shape, order=order)


def pickled_bytes(text, encoding):
    return text.encode("latin1")            # how protocol 2 writes bytes


class NumpyOnly(pickle.Unpickler):
    """Reads pickles of plain containers and arrays of numbers or bytes. A pickle may name any
    function to be called: here it gets stand-ins for the few that rebuild arrays, and an error for
    all others."""

    CALLS = dict(_reconstruct=PickledArray, ndarray=None, dtype=PickledDtype,
                 _frombuffer=pickled_buffer, encode=pickled_bytes)

    def find_class(self, module, name):
        package = "_codecs" if name == "encode" else "numpy"
        if name in self.CALLS and module.split(".")[0] == package:
            return self.CALLS[name]
        raise ValueError(f"wants {module}.{name} to be called: refused, arrays have no need of it")


def read_arrays(path, *names):
    """Arrays of these names from an .npz."""
    with error_prefix(path), np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"has no array {missing[0]!r}, only {', '.join(arrays)}")
        return [arrays[name] for name in names]


class PointTracks(torch.utils.data.Dataset):
    """Videos with the paths of points. `path` is

        FOLDER/tracks.npz rgb_00.jpg rgb_01.jpg ... depth_00.png ...    RGB-D clips at any depth, or one
        tapvid_davis.pkl                                                TAP-Vid: DAVIS, RGB-Stacking
        FOLDER/0000_of_0010.pkl ...                                     TAP-Vid: Kinetics, or one of them
        joints.npz, with `video`, the path of its clip                  joints that people marked

    RGB-D: tracks (P, T, 2), status (P, T) of 0 visible, 1 hidden, 2 unknown, query_frame (P,);
    depth of 16 bits in millimetres. Joints: tracks (P, T, 2) in pixels, annotated (P, T). Points
    that are never visible are left out there and of TAP-Vid. [i] is

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
        self.video = expand(video) if video else None
        self.names, self.items = [], []
        shards = [path] if path.endswith(".pkl") else []
        if os.path.isdir(path):
            self.read = self.read_rgbd
            self.items, self.names = folders_with(path, "tracks.npz")
            if not self.items:
                shards = [os.path.join(path, name) for name in walk(path) if name.endswith(".pkl")]
                if not shards:
                    raise ValueError(f"{path}: no clip in it or below: want CLIP/tracks.npz with "
                                     "rgb_00.jpg, ..., or the .pkl files of TAP-Vid")
        elif not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file or folder")
        elif path.endswith(".npz"):
            if not video:
                raise ValueError(f"{path}: its points need the path of their clip: give video")
            self.read = self.read_joints
            self.items, self.names = [path], [os.path.splitext(os.path.basename(path))[0]]
        elif not shards:
            raise ValueError(f"{path}: neither a folder of clips nor a .pkl of TAP-Vid nor an .npz")
        for shard in shards:
            self.read = self.read_tapvid
            with error_prefix(shard), open(shard, "rb") as file:
                clips = NumpyOnly(file).load()
                if not isinstance(clips, dict):
                    clips = dict(enumerate(clips, len(self.items)))
                wanted = {"video", "points", "occluded"}
                if not clips or not all(wanted <= {*clip} for clip in clips.values()):
                    raise ValueError("does not hold TAP-Vid's video, points and occluded")
            self.names += map(str, clips)
            self.items += [(shard, clip) for clip in clips.values()]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.read(self.items[i])

    def sample(self, video, tracks, visible, valid, query=None, **more):
        """What is said of points (P, T) is checked against their video, and time comes first."""
        if video.ndim != 4 or visible.ndim != 2 or tracks.shape != (*visible.shape, 2):
            raise ValueError(f"tracks {[*tracks.shape]}, visibility {[*visible.shape]} and video "
                             f"{[*video.shape]} do not fit: want (P, T, 2), (P, T) and (T, H, W, 3)")
        if len(video) != visible.shape[1]:
            raise ValueError(f"points are tracked through {visible.shape[1]} frames, but the video "
                             f"has {len(video)}: is it the right one?")
        if query is None:
            seen = visible.any(1)
            tracks, visible, valid = tracks[seen], visible[seen], valid[seen]
            query = visible.argmax(1)
        tracks = np.where(visible[..., None], tracks, 0).astype(np.float32)
        return dict(video=video, tracks=np.ascontiguousarray(tracks.swapaxes(0, 1)),
                    visible=np.ascontiguousarray(visible.T), valid=np.ascontiguousarray(valid.T),
                    query_frames=query.astype(np.int64), **more)

    def read_rgbd(self, folder):
        path = os.path.join(folder, "tracks.npz")
        tracks, status, query = read_arrays(path, "tracks", "status", "query_frame")
        images = numbered(folder, r"rgb_(\d+)\.(?:jpg|jpeg|png)")
        depths = numbered(folder, r"depth_(\d+)\.png")
        with error_prefix(path):
            if not images or depths and images.keys() != depths.keys():
                raise ValueError(f"beside it are {len(images)} images rgb_00.jpg, ... and "
                                 f"{len(depths)} depth_00.png, ...: want the same numbers")
        video = read_clip(images.values())
        more = {}
        if depths:
            depth = np.stack([read_one_channel(file, deep=True) for file in depths.values()])
            if depth.shape != video.shape[:3]:
                raise ValueError(f"{folder}: depth {[*depth.shape]} does not fit the images "
                                 f"{[*video.shape[:3]]}")
            more["depth"] = depth.astype(np.float32) / 1000
        with error_prefix(path):
            valid = (status != 2) & (np.arange(status.shape[1]) >= query[:, None])
            return self.sample(video, tracks, (status == 0) & valid, valid, query, **more)

    def read_tapvid(self, item):
        path, clip = item
        with error_prefix(path):
            video = clip["video"] if isinstance(clip["video"], list) else np.asarray(clip["video"])
            frames = [read_image(f) if isinstance(f, bytes) else f for f in video]      # or JPEGs
            video = np.stack(frames)
            visible = ~np.asarray(clip["occluded"]).astype(bool)
            # Their (0, 0) is the upper left corner of the first pixel, ours its centre.
            tracks = np.asarray(clip["points"]) * np.array(video.shape[2:0:-1]) - 0.5
            return self.sample(video, tracks, visible, np.ones_like(visible))

    def read_joints(self, path):
        tracks, annotated = read_arrays(path, "tracks", "annotated")
        with error_prefix(self.video):
            video = read_video(self.video)
        with error_prefix(path):
            return self.sample(video, tracks, annotated, annotated)


class BoxTracks(torch.utils.data.Dataset):
    """Clips with the box of one thing: a folder of numbered images (0001.jpg, ...) and
    boxes_xyxy.txt, whose lines are x1 y1 x2 y2 in pixels, with commas or blanks, one for each
    image; or such folders, at any depth.

    [i] is dict(video=(T, H, W, 3) uint8, boxes=(T, 4) float32); `names` are those of the folders.
    """

    def __init__(self, root):
        root = check_folder(root)
        self.items, self.names = folders_with(root, "boxes_xyxy.txt")
        if not self.items:
            raise ValueError(f"{root}: no boxes_xyxy.txt in it or below, beside images")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path = os.path.join(self.items[i], "boxes_xyxy.txt")
        images = numbered(self.items[i], r"[^.]*?(\d+)\.(?i:jpg|jpeg|png)")
        boxes = []
        lines = read_bytes(path).decode("utf-8", "replace").rstrip().splitlines()
        with error_prefix(path):
            for number, line in enumerate(lines, 1):
                box = [float(x) for x in line.replace(",", " ").split()]
                if len(box) != 4 or not (box[0] <= box[2] and box[1] <= box[3]):
                    raise ValueError(f"line {number} is not x1 y1 x2 y2, rising: {line!r}")
                boxes.append(box)
            if len(images) != len(boxes) or not boxes:
                raise ValueError(f"has {len(boxes)} boxes for {len(images)} images")
        return dict(video=read_clip(images.values()), boxes=np.array(boxes, np.float32))


# ---- loader --------------------------------------------------------------------------------------
class SquareClip:
    """Frames (H, W, 3) -> `video` (T, 3, size, size), uint8: one random square of the short side,
    resized."""

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

    def __init__(self, source, crops, seed):
        self.source, self.crops, self.seed = source, crops, seed

    def __getitem__(self, numbers):
        if isinstance(self.source, Videos):
            samples = self.source.__getitems__(numbers)
        else:
            clips = self.source.batch(numbers)
            if self.crops is None:
                return clips
            video = clips["video"].permute(0, 1, 3, 4, 2)                       # (B, 2, H, W, 3)
            video = ((video * 255).round() if video.is_floating_point() else video).byte().numpy()
            samples = [self.crops(list(pair), np.random.default_rng((self.seed, i, 1)))
                       for pair, i in zip(video, numbers)]
        return torch.utils.data.default_collate(samples)


def make_loader(source, inputs, batches, device="cpu", seed=0, workers=-1, split="train",
                scenes=None, videos=None, colours=True, motion_colours="independent"):
    """
    Batches on the device, in order; to be iterated over once.

    source    "scenes", "squares", or the path of a video, of a folder of videos, or of frames
    inputs    what the model expects: dict(frames=T, size=S), with crops=dict(local_size=,
              local_crops=) for pairs cut into crops, with squares=dict(...), options of
              MovingSquares, for their masks and displacements
    batches   iterable of lists of sample numbers
    workers   processes that prepare batches; 0: in this one; -1: choose
    split     "train" or "eval": for scenes other clips with other textures; for videos other draws
              from the same files, so most of what "eval" shows was seen in training
    scenes    SceneOptions; their `size` counts if there are crops, else frames are rendered as the
              model expects them; by default twice the model's size
    videos    VideoOptions
    colours, motion_colours    of MultiCrop
    Raises FileNotFoundError or ValueError with what to do if the source can't be read.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r} must be 'train' or 'eval'")
    if "squares" in inputs and source != "squares":
        raise ValueError(f"--data {source}: this model needs masks and displacements, which only "
                         "--data squares has")
    device = torch.device(device)
    size, frames = inputs["size"], inputs["frames"]
    crops = None
    if "crops" in inputs:
        crops = MultiCrop(size, **inputs["crops"], colours=colours, motion_colours=motion_colours)
    eval_seed = seed + EVAL * (split == "eval")
    if source == "squares":
        dataset = MovingSquares(size * (2 if crops else 1), frames, seed=seed, split=split,
                                **inputs.get("squares", {}))
    elif source == "scenes":
        options = scenes or SceneOptions(size=2 * size)
        options = options if crops else replace(options, size=size)
        dataset = Scenes(frames=frames, seed=seed, split=split, **asdict(options))
    else:
        dataset = Videos(source, frames, seed=eval_seed, transform=crops or SquareClip(size),
                         **asdict(videos or VideoOptions()))
    workers = count_workers(workers, source, device)
    loader = torch.utils.data.DataLoader(
        Batches(dataset, crops, eval_seed), batch_size=None, sampler=batches, num_workers=workers,
        pin_memory=device.type == "cuda", prefetch_factor=2 if workers else None,
        worker_init_fn=start_worker)
    if workers:
        atexit.register(end_workers)
    return DeviceLoader(loader, crops, device)


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers(workers, source, device):
    """-1: as many as there are cores for each process; squares are drawn sooner than they are sent,
    and on a CPU, which training keeps busy, one process renders scenes."""
    most = 8 * cores()
    if workers > most:
        raise ValueError(f"--workers {workers}: at most {most} on {cores()} cores")
    if workers >= 0:
        return workers
    if source == "squares":
        return 0
    share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return 1 if source == "scenes" and device.type == "cpu" else share


def sample_loader(dataset, batches, device="cpu"):
    """Loads a dataset's samples in batches of numbers, in order, by processes that end with this
    one."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=min(8, max(1, cores() - 1)),
        pin_memory=torch.device(device).type == "cuda", worker_init_fn=start_worker)
    atexit.register(end_workers)
    return loader


def start_worker(number):
    torch.set_num_threads(1)                # workers are the parallelism
    # A signal goes to the whole group: the main process, which still wants its batch, says when to leave.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
        for batch in self.loader:   # `params` stay on the CPU: finish() reads which crop needs what
            batch = {name: value if name == "params" else value.to(self.device, non_blocking=True)
                     for name, value in batch.items()}
            yield self.crops.finish(batch) if self.crops else batch


# ---- look at your data ---------------------------------------------------------------------------
def show(source, path, videos=None):
    """Writes a picture: scenes with their ground truth (not of videos), and crops like those of
    training."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []                               # lists of (title, image)
    if source == "scenes":
        clip = Scenes(size=96, frames=2, pan=4.0, radius=(0.15, 0.3)).batch(range(2), truth=True)
        for b in range(2):
            first, second = clip["video"][b].permute(0, 2, 3, 1)
            u, v = clip["flow"][b, 0]
            rows.append([("frame 1", first), ("frame 2", second), ("flow, x", u), ("flow, y", v),
                         ("occluded in frame 2", clip["occluded"][b, 0]),
                         ("class", clip["classes"][b, 0]), ("depth", clip["depth"][b, 0])])
    inputs = dict(frames=2, size=96, crops=dict(local_size=48, local_crops=2, blur=1.0))
    scenes = SceneOptions(size=192, pan=12.0)
    loader = make_loader(source, inputs, [range(2)], workers=0, scenes=scenes, videos=videos)
    batch = next(iter(loader))
    for b in range(2):
        row = []
        for f in range(2):
            row += [(f"motion, frame {f + 1}", batch["motion"][b, f]),
                    (f"global 1, frame {f + 1}", batch["globals"][b, f, 0]),
                    (f"global 2, frame {f + 1}", batch["globals"][b, f, 1]),
                    (f"local, frame {f + 1}", batch["locals"][b, f, 0])]
        rows.append([(title, image.permute(1, 2, 0)) for title, image in row])
    size = 12.4, 1.75 * len(rows)
    figure, axes = plt.subplots(len(rows), 8, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for row, axis_row in zip(rows, axes):
        for (title, image), axis in zip(row, axis_row):
            axis.imshow(image)
            axis.set_title(title, fontsize=8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes out/data.png: scenes with truth, and crops.")
    parser.add_argument("data", nargs="?", default="scenes", help="a video, or a folder")
    parser.add_argument("--fps", type=float, default=30.0, help="rate of numbers in frame names")
    parser.add_argument("--gap", type=float, nargs=2, default=(0.5, 1.0), help="s between two frames")
    args = parser.parse_args()
    try:
        show(args.data, "out/data.png", VideoOptions(gap=args.gap, fps=args.fps))
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: error: {error}")
    print("written: out/data.png")
