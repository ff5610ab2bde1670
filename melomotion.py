"""
MeloMotion: Multi-Layer Motion Prediction for Object-Centric Video Generation
(Fu, MeloLab technical report, June 2026), in one file that needs nothing but torch; run for a demo.

Given are frame 0 of a video and a mask for each object. Each object becomes a layer: a patch of
frame 0's latent, frozen, and a small network of its own that reads one velocity off the object's
colour. For frame t the patch is copied t velocities further, by whole latent cells, and the sum of
all is decoded. The report's reasons: no weight serves both moving and still objects, and nothing is
interpolated, so no edge blurs. eval.py tests the first.

    v_i = W2_i ReLU(W1_i f_i + b1_i) + b2_i         f_i: the mean colour, projected    report: Eq. 2
    F_t = F_bg + sum_i place(F_obj_i, mask_i, t v_i)                                report: Eq. 3, 4
    loss = mean |I_t - I_t^gt|  +  10 mean |t v_i - d_i(t)|^2 / t^2                 report: Eq. 5, 6

    B  N    clips, objects                  C       channels of a latent, 16
    T       frames of a clip, 0 .. T-1      H W     pixels
    K       frames that are drawn           h w     latent grid; one cell is 8 pixels
    layers  (B, N, C, h, w) F_obj: the latent of all objects' pixels, in the cells of each
    v       (B, N, 2) velocities (x, y) in frame widths per frame
    d       (B, N, T-1, 2) displacements since frame 0 in frame widths; true ones are exactly t v
    pooled  (B, N, 3 or 16) what is read off an object before anything is learnt

As d = t v, Eq. 5 is the squared error of v, whatever T ("POS"). place() rounds, so no gradient
passes from frames to velocities: in phase 1, with its frozen decoder, L1 trains nothing. So phase 1
draws nothing. Left out: segmentation, velocities that change. Departures: "our choice". Usage:

    model = MeloMotion(Config())                            # the report's model: 43,111 parameters
    loss, logs = model(dict(first_frame=..., masks=..., displacements=...))
    video = model.render(first_frame, masks, frames=32)     # (B, 32, 3, H, W) in [0, 1]
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

CELL = 8                            # pixels: height and width of a latent cell
FEATURES = 64                       # width of f_i
HIDDEN = 32                         # width of a predictor's hidden layer
POOLINGS = ("rgb", "avg", "max", "full")

@dataclass
class Config:
    size: int = 128                 # pixels: frames are size x size
    frames: int = 16                # T of the clips trained on; render() takes any number
    objects: int = 3                # N: layers, and predictors unless they are shared
    phase: int = 1                  # 1: predictors learn; 2: the decoder too; 0: it alone, before 1
    pooling: str = "rgb"            # of objects: rgb, avg, max; of all: full. report: Table 4
    shared_predictor: bool = False  # one predictor for all objects. report: Table 3
    object_index: bool = False      # control: f_i also tells which i it is
    normalize: bool = True          # off: Eq. 5 without its division by t^2
    mode: str = "differentiated"    # data: that, all-move; controls: random-mover, colour-mover
    shape: str = "square"           # data: square, disc, triangle, cross; any: each one of them
    pos_weight: float = 10.0        # of L_pos in the loss

    @property
    def inputs(self):
        """What the model expects: moving squares, drawn beyond frame 0 if frames are compared."""
        video = self.phase != 1
        return dict(
            frames=self.frames,
            size=self.size,
            held_out=4 if video else 32,    # clips
            squares=dict(objects=self.objects, mode=self.mode, shape=self.shape, video=video))

PRESETS = {
    "report": dict(),               # phase 1 as published, half a minute on a CPU
    "fast": dict(),                 # the same clips 64 at a time and a decayed rate: seconds
    "decoder": dict(phase=0),       # what comes first: a decoder of flow-warped latents, a minute
    "phase2": dict(phase=2),        # what comes after: it learns placed latents, a minute
}

# What train.py starts from, preset by preset; every entry is a flag. report: Sec. 4.1
REPORT = dict(
    data="squares", steps=12_000, batch_size=1, log_every=500, save_every=6000,
    lr=1e-2, min_lr=1e-2, warmup=0.0, clip=0.0,
    betas=(0.9, 0.95), weight_decay=1e-5, weight_decay_end=1e-5,
    dtype="float32", compile=False)         # our choice: so small a model gains nothing by either
# our choice below: the report trains no decoder and has one rate
DECODER = REPORT | dict(
    steps=1000, batch_size=8, lr=3e-3, min_lr=1e-4, log_every=100, save_every=1000)
RECIPES = {
    "report": REPORT,
    "fast": REPORT | dict(steps=188, batch_size=64, min_lr=1e-5, log_every=20),
    "decoder": DECODER,
    "phase2": DECODER | dict(lr=2e-3),
}

# ---- latents and layers --------------------------------------------------------------------------
def unit(image):
    """uint8 or float in [0, 1] -> float in [0, 1]."""
    return image / 255 if image.dtype == torch.uint8 else image

def encode_latent(image, occupancy):
    """
    Image (B, 3, H, W) and occupancy (B, 1, H, W) in [0, 1] -> latent (B, 16, h, w). Channel 0 is
    occupancy, 1-3 R G B (report: "channels 1-3"), means over a cell; 4-15 how its quarters differ.
    our choice: the report's VAE isn't public. This one, a Haar transform, has no parameters.
    """
    x = torch.cat([occupancy, image], 1)                                # (B, 4, H, W)
    x = F.avg_pool2d(x, CELL // 2)                                      # (B, 4, 2h, 2w)
    x = F.pixel_unshuffle(x, 2).unflatten(1, (4, 4))                    # (B, 4, quarters, h, w)
    a, b, c, d = x.unbind(2)                                            # a b above c d
    top = a + b
    bottom = c + d
    top_edge = a - b
    bottom_edge = c - d
    haar = [top + bottom, top_edge + bottom_edge, top - bottom, top_edge - bottom_edge]
    return torch.cat(haar, 1) / 4                                       # (B, 16, h, w)

def place(layers, displacements):
    """
    Copies layers (B, N, C, h, w) by displacements (B, N, T, 2), (x, y) in widths of the grid and
    rounded to cells, so without a gradient -> (B, N, T, C, h, w). What leaves the grid is cut off,
    what comes in is 0. Equals slicing bounding boxes. report: Eq. 4
    """
    B, N, _, h, w = layers.shape
    device = layers.device
    dx, dy = (displacements * w).round().long().split(1, -1)            # (B, N, T, 1), cells
    rows = (torch.arange(h, device=device) - dy).clamp(-1, h)           # (B, N, T, h), taken from
    cols = (torch.arange(w, device=device) - dx).clamp(-1, w)           # -1, h, w: a border of 0
    padded = F.pad(layers, (0, 1, 0, 1)).movedim(2, -1)                 # (B, N, h+1, w+1, C)
    b = torch.arange(B, device=device).view(B, 1, 1, 1, 1)
    n = torch.arange(N, device=device).view(N, 1, 1, 1)
    placed = padded[b, n, rows[..., None], cols[..., None, :]]          # (B, N, T, h, w, C)
    return placed.movedim(-1, 3)

def inpaint(x, hole):
    """x (B, C, h, w), its hole (B, 1, h, w) filled. our choice: with the mean of the rest."""
    rest = 1 - hole
    area = rest.sum((2, 3), keepdim=True).clamp(min=1)                  # (B, 1, 1, 1)
    mean = (x * rest).sum((2, 3), keepdim=True) / area                  # (B, C, 1, 1)
    return x * rest + mean * hole

def warp(x, flow):
    """Bilinear, square grids: x (B, C, h, w) at p - flow; flow (B, 2, h or 1, w or 1) in widths."""
    w = x.shape[-1]
    line = torch.arange(1 - w, w, 2, device=x.device) / w   # in (-1, 1), which is 2 widths
    rows, cols = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([cols, rows], -1)                    # (h, w, 2), (x, y)
    grid = grid - 2 * flow.permute(0, 2, 3, 1)              # (B, h, w, 2)
    return F.grid_sample(x, grid, align_corners=False)

def position_loss(v, displacements, normalize=True):
    """
    v (B, N, 2) and displacements (B, N, T-1, 2) in frames 1 .. T-1, in frame widths -> mean over
    clips, objects and frames of |t v - d(t)|^2, by default over t^2. report: Eq. 5
    """
    t = torch.arange(1, displacements.shape[2] + 1, device=v.device)[:, None]       # (T-1, 1)
    error = t * v[:, :, None] - displacements                           # (B, N, T-1, 2)
    return (error / t if normalize else error).square().sum(-1).mean()

# ---- learnt parts --------------------------------------------------------------------------------
class Predictors(nn.Module):
    """`count` networks 64 -> 32 -> 2, stacked; 2,146 parameters each. The report's text: 2,274."""

    def __init__(self, count):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(count, FEATURES, HIDDEN))
        self.b1 = nn.Parameter(torch.empty(count, 1, HIDDEN))
        self.w2 = nn.Parameter(torch.empty(count, HIDDEN, 2))
        self.b2 = nn.Parameter(torch.empty(count, 1, 2))
        for parameter, fan_in in zip(self.parameters(), (FEATURES, FEATURES, HIDDEN, HIDDEN)):
            bound = fan_in ** -0.5          # nn.Linear's
            nn.init.uniform_(parameter, -bound, bound)

    def hidden(self, f):
        """Features (B, N, 64) -> hidden units (N, B, 32), or (1, N*B, 32) if all share one."""
        count = len(self.w1)
        assert count in (1, f.shape[1]), f"{count} predictors, but masks of {f.shape[1]} objects"
        f = f.transpose(0, 1).reshape(count, -1, FEATURES)
        return torch.baddbmm(self.b1, f, self.w1).relu()

    def forward(self, f):
        """Features (B, N, 64) -> velocities (B, N, 2), frame widths per frame. report: Eq. 2"""
        v = torch.baddbmm(self.b2, self.hidden(f), self.w2)             # (N, B, 2) or (1, N*B, 2)
        return v.view(f.shape[1], -1, 2).transpose(0, 1)                # (B, N, 2)

def block(width, out):
    conv = nn.Conv2d(width, out, 3, padding=1)
    norm = nn.GroupNorm(1, out)             # finer groups lose how bright a colour is
    return nn.Sequential(conv, norm, nn.SiLU())

class Decoder(nn.Sequential):
    """
    Latents (B, T, 16, h, w) -> frames (B, T, 3, 8h, 8w) in (0, 1). our choice: the report says only
    that it has 34,587 parameters; of 3 x 3 chains that never widen one has. Wide layers come first.
    """

    def __init__(self):
        super().__init__(
            block(16, 64), block(64, 32),                               # (B*T, 32, h, w)
            nn.Upsample(scale_factor=2), block(32, 16),                 # (B*T, 16, 2h, 2w)
            nn.Upsample(scale_factor=2), block(16, 8), block(8, 8),     # (B*T, 8, 4h, 4w)
            nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1), nn.Sigmoid())

    def forward(self, latents):
        # (B*T, 16, h, w), twice as fast on a CPU
        x = latents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return super().forward(x).unflatten(0, latents.shape[:2])

# ---- the model -----------------------------------------------------------------------------------
class MeloMotion(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        assert cfg.pooling in POOLINGS, f"pooling={cfg.pooling}: choose from {POOLINGS}"
        self.cfg = cfg
        count = 1 if cfg.shared_predictor else cfg.objects
        width = 3 + cfg.objects if cfg.object_index else 3
        self.predictors = Predictors(count)         # 6,438 parameters
        self.rgb_proj = nn.Linear(width, FEATURES)  # 256
        # 742. our choice: the report counts a camera head, but neither describes nor trains it
        self.camera = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))
        self.encoder = nn.Linear(16, FEATURES)      # 1,088, for pooling other than rgb
        self.decoder = Decoder()                    # 34,587

        features = self.rgb_proj if cfg.pooling == "rgb" else self.encoder
        motion = [self.predictors, features]
        trained = {0: [self.decoder], 1: motion, 2: [*motion, self.decoder]}
        self.requires_grad_(False)                  # report: Sec. 3.4
        for module in trained[cfg.phase]:
            module.requires_grad_(True)

    @staticmethod
    def extract(first_frame, masks):
        """Frame 0 (B, 3, H, W), uint8 or float, masks (B, N, H, W) -> layers. report: Eq. 1"""
        H, W = masks.shape[-2:]
        assert H % CELL == W % CELL == 0, f"{H}x{W} pixels: want multiples of {CELL}"
        masks = masks.float()
        occupied = masks.amax(1, keepdim=True)                          # (B, 1, H, W)
        latent = encode_latent(unit(first_frame) * occupied, occupied)  # (B, 16, h, w)
        cells = F.max_pool2d(masks, CELL)                               # (B, N, h, w)
        return latent[:, None] * cells[:, :, None]

    def pool(self, layers):
        """Layers -> pooled: (B, N, 3) mean colours or (B, N, 16). Without parameters."""
        if self.cfg.pooling == "rgb":
            sums = layers[:, :, :4].sum((-2, -1))                       # (B, N, 4)
            # our choice: over occupancy; over cells, many half empty, colours would be pale
            return sums[..., 1:] / sums[..., :1].clamp(min=1e-6)
        if self.cfg.pooling == "max":
            return layers.amax((-2, -1))
        if self.cfg.pooling == "full":      # our choice: the report's "full latent", not masked
            layers = layers.sum(1, keepdim=True).expand_as(layers)
        return layers.mean((-2, -1))

    def features(self, pooled):
        """What the predictors see: pooled (B, N, 3 or 16) -> f (B, N, 64)."""
        if self.cfg.object_index:           # with pooling rgb only
            B, N, _ = pooled.shape
            index = torch.eye(N, device=pooled.device)
            pooled = torch.cat([pooled, index.expand(B, N, N)], -1)     # (B, N, 3 + N)
        if self.cfg.pooling == "rgb":
            return self.rgb_proj(pooled)
        return self.encoder(pooled)

    def velocities(self, pooled):
        """Pooled (B, N, 3 or 16) -> v (B, N, 2), frame widths per frame, the same in each frame."""
        return self.predictors(self.features(pooled))

    def draw(self, first_frame, masks, v, t):
        """Frames t (B, K) of clips whose objects move v (B, N, 2) per frame: (B, K, 3, H, W)."""
        d = t[:, None, :, None] * v[:, :, None]                         # (B, N, K, 2) report: Eq. 3
        layers = place(self.extract(first_frame, masks), d)             # (B, N, K, 16, h, w)
        hole = masks.float().amax(1, keepdim=True)                      # (B, 1, H, W)
        background = encode_latent(unit(first_frame), torch.zeros_like(hole))
        background = inpaint(background, F.max_pool2d(hole, CELL))      # (B, 16, h, w)
        return self.decoder(background[:, None] + layers.sum(1))        # report: Eq. 4

    def warped(self, first_frame, masks, v, t):
        """draw() by warping from frame to frame, as flow pipelines do: what phase 0 learns from."""
        layers = self.extract(first_frame, masks).flatten(0, 1)         # (B*N, 16, h, w)
        flow = v.flatten(0, 1)[..., None, None]                         # (B*N, 2, 1, 1)
        frames = []
        for _ in range(1, self.cfg.frames):
            layers = warp(layers, flow)
            frames.append(layers)                                       # frame 1 comes first
        latents = torch.stack(frames, 1).unflatten(0, v.shape[:2])      # (B, N, T-1, 16, h, w)
        latents = latents.sum(1)                                        # (B, T-1, 16, h, w)
        return self.decoder(torch.stack([x[some - 1] for x, some in zip(latents, t)]))

    @torch.no_grad()
    def render(self, first_frame, masks, frames=16):
        """Frame 0 and masks, as extract() takes them -> video (B, frames, 3, H, W) in [0, 1]."""
        t = torch.arange(frames, device=masks.device)
        t = t.expand(len(masks), -1)                                    # (B, frames)
        pooled = self.pool(self.extract(first_frame, masks))
        return self.draw(first_frame, masks, self.velocities(pooled), t)

    def motion(self, batch):
        """Velocities (B, N, 2); in phase 0, where only the decoder learns, the true ones."""
        if self.cfg.phase == 0:
            return batch["displacements"][:, :, 0]
        pooled = batch.get("pooled")
        if pooled is None:
            pooled = self.pool(self.extract(batch["first_frame"], batch["masks"]))
        return self.velocities(pooled)

    def l1(self, batch, v, one=False):
        """Mean L1 of frames 1 .. T-1, or of a random one of each clip. report: Eq. 6"""
        B, T = batch["video"].shape[:2]
        t = torch.arange(1, T, device=v.device).expand(B, -1)           # (B, K)
        if one:
            t = torch.randint(1, T, (B, 1), device=v.device)
        draw = self.warped if self.cfg.phase == 0 else self.draw
        frames = draw(batch["first_frame"], batch["masks"], v, t)       # (B, K, 3, H, W)
        true = torch.stack([x[some] for x, some in zip(batch["video"], t)])
        return (frames - unit(true)).abs().mean()

    def forward(self, batch):
        """
        batch: `first_frame` and `masks` as extract() takes them, or `pooled` as pool() gives it;
        `displacements` (B, N, T-1, 2); `video` (B, T, 3, H, W), or L1 is left out -> loss, logs.
        """
        cfg = self.cfg
        d = batch["displacements"]                                      # (B, N, T-1, 2)
        v = self.motion(batch)                                          # (B, N, 2)
        loss = cfg.pos_weight * position_loss(v, d, cfg.normalize)
        logs = {}
        if cfg.phase:
            logs["pos"] = position_loss(v, d)
            spread = v.amax(1) - v.amin(1)  # of the objects; 0 if a predictor has collapsed
            logs["spread"] = spread.amax(-1).mean()
        if "video" in batch:
            # our choice: one frame a clip where the decoder learns; its neighbours teach no more
            logs["l1"] = self.l1(batch, v, one=cfg.phase != 1)
            loss = loss + logs["l1"]
        return loss, {name: value.detach() for name, value in logs.items()}

    def after_step(self, progress):
        """Nothing to do."""

    @torch.no_grad()
    def report(self, batch):
        """How well motion is predicted, beside "nothing moves": {row: {column: scalar}}."""
        d = batch["displacements"]                                      # (B, N, T-1, 2)
        v = self.motion(batch)                                          # (B, N, 2)
        rows = {}
        if self.cfg.phase:
            errors = dict(model=position_loss(v, d), zero=position_loss(0 * v, d))
            rows["POS: squared error of v"] = errors
        if "video" in batch:
            black = unit(batch["video"][:, 1:]).mean()
            rows["L1 of frames"] = dict(model=self.l1(batch, v), black=black)
        return rows

# ---- the baseline --------------------------------------------------------------------------------
GRID = 16                           # cells: height and width of the latents that it takes
WINDOW = 8                          # cells: height and width of an attention window, of two heads

class SwinBlock(nn.Module):
    """Cells (B, 256, 64) attend in windows, moved by `shift`, with relative position bias."""

    def __init__(self, shift):
        super().__init__()
        D = FEATURES
        self.norm1 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        side = 2 * WINDOW - 1               # offsets along an axis
        self.bias = nn.Parameter(0.02 * torch.randn(side * side, 2))
        cells = torch.arange(GRID * GRID).view(GRID, GRID).roll((-shift, -shift), (0, 1))
        windows = cells.unfold(0, WINDOW, WINDOW).unfold(1, WINDOW, WINDOW)
        windows = windows.reshape(-1, WINDOW * WINDOW)                  # (4, 64), numbers of cells
        place = torch.stack([windows // GRID, windows % GRID], -1)      # (4, 64, 2), (y, x)
        offset = place[:, :, None] - place[:, None]                     # (4, 64, 64, 2)
        near = (offset.abs() < WINDOW).all(-1)          # not rolled in from the other side
        offset = (offset + WINDOW - 1) @ torch.tensor([side, 1])        # a number for each offset
        self.register_buffer("windows", windows, persistent=False)
        self.register_buffer("home", windows.flatten().argsort(), persistent=False)
        self.register_buffer("near", near[:, None], persistent=False)
        self.register_buffer("offset", offset * near, persistent=False)

    def forward(self, x):
        y = self.norm1(x)[:, self.windows]                              # (B, 4, 64, D)
        qkv = self.qkv(y).unflatten(-1, (3, 2, -1))                 # (B, 4, 64, 3, nh, hd)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                         # (B, 4, nh, 64, hd)
        bias = self.bias[self.offset].movedim(-1, 1)                    # (4, nh, 64, 64)
        bias = bias.masked_fill(~self.near, -1e4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = self.proj(y.transpose(2, 3).flatten(3))                     # (B, 4, 64, D)
        x = x + y.flatten(1, 2)[:, self.home]
        return x + self.mlp(self.norm2(x))

class FlowBaseline(nn.Module):
    """
    A Swin of 322,862 parameters (our choice: plainest for "323K") predicts a flow that warps the
    latent, then another from the warped one, and so on. Control, `one_shot`: one flow, times t.
    """

    def __init__(self, one_shot=False):
        super().__init__()
        self.one_shot = one_shot
        self.embed = nn.Conv2d(16, FEATURES, 1)
        self.blocks = nn.Sequential(*(SwinBlock(shift) for shift in (0, 4, 0, 4, 0, 4)))
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Sequential(
            nn.Conv2d(FEATURES, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 2, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)        # no motion at the start
        nn.init.zeros_(self.head[-1].bias)
        self.decoder = Decoder().requires_grad_(False)

    def flow(self, latent):
        """Latent (B, 16, h, w) -> flow (B, 2, h, w): how far each next cell has come, in widths."""
        x = self.embed(latent).flatten(2).mT                            # (B, 256, 64)
        x = self.norm(self.blocks(x))
        return self.head(x.mT.unflatten(2, (GRID, GRID)))               # (B, 2, h, w)

    def forward(self, batch):
        """batch: `first_frame`, `masks`, `video` as for MeloMotion -> L1 of frames; logs."""
        video = unit(batch["video"])                                    # (B, T, 3, H, W)
        first = MeloMotion.extract(batch["first_frame"], batch["masks"]).sum(1)
        flow = self.flow(first)
        latents = [warp(first, flow)]
        for t in range(2, video.shape[1]):
            if self.one_shot:
                latents.append(warp(first, t * flow))
            else:
                latents.append(warp(latents[-1], self.flow(latents[-1])))
        frames = self.decoder(torch.stack(latents, 1))                  # (B, T-1, 3, H, W)
        loss = (frames - video[:, 1:]).abs().mean()
        return loss, dict(l1=loss.detach())

if __name__ == "__main__":
    torch.manual_seed(0)
    model = MeloMotion(Config())
    colours = torch.rand(64, 3, 3)                          # (B, N, 3)
    v = 0.1 * (colours[..., :2] - 0.5)                      # red tells x, green y
    v[:, 1:] = 0                                            # of the first object; the others stay
    d = torch.arange(1, 16)[:, None] * v[:, :, None]        # (B, N, T-1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(301):
        loss, logs = model(dict(pooled=colours, displacements=d))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: POS {logs['pos']:.1e}")
