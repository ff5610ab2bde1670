"""A checkpoint in, tables and pictures out.

    python eval.py out/midway-tiny          # every task that its model has, on synthetic scenes
    python eval.py PATH/midway-bdd-vit-s-ep300.pth --task heatmap --data clip.mp4

midway      latents         do the motion latents carry motion: latents.gif
            heatmap         where the forward model takes a token (Fig. 6): heatmap.png, .gif
            identity-bias   how often that is where the token came from
            track           regions followed by heatmaps (Fig. 7)
            segmentation    linear or UperNet readout: mIoU
            flow            DPT readout of optical flow, in tiles: end-point error
moog        tokens          what each token is of: tokens.png, .gif
            points, boxes, depth    a readout learns to follow points or boxes, or depth
            unroll          PSNR of long clips, with more or fewer tokens, and in open loop
melomotion  tables          the report's tables beside ours, with the controls that it lacks
            figures         Figure 1, and motion.gif, twice as long

Beside each readout stand the same on random weights, and what needs no model. --data: `scenes`, a
labelled data set (data.py) or, for heatmap, latents, track, tokens and unroll, videos. Of clips
without a split the last third is for the test; with nothing to train on, scenes serve."""
import argparse
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")    # as in train.py: waiting CPU threads soon sleep

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from tqdm import tqdm

import data
import midway
import moog
import train
from melomotion import Config, FlowBaseline, MeloMotion, place, position_loss
from train import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BAR = dict(leave=False, disable=not sys.stderr.isatty())        # of tqdm

# ---- tools ---------------------------------------------------------------------------------------
def load(path):
    """A checkpoint of train.py, or the authors' (.pth, .npz) -> model, its name, config, path."""
    path = Path(path).expanduser()
    official = {".pth": midway, ".npz": moog}.get(path.suffix)
    if official:
        return official.load_official(path), official.__name__, {}, path
    ckpt = train.read_checkpoint(path)                  # only of our three models
    config = ckpt["config"]
    name = config["model"]
    module = importlib.import_module(name)
    with train.one_line(f"{ckpt['path']} does not fit {name}.py"):
        model = getattr(module, train.MODELS[name])(module.Config(**config["config"]))
        model.load_state_dict(ckpt["model"])
    return model.eval(), name, config, ckpt["path"]

class Run:
    """What evaluations take: a model, how it was trained, the command line; and what they write."""

    def __init__(self, model, config, args, out):
        self.model = model
        self.config = config
        self.cfg = model.cfg
        self.args = args
        self.out = out
        self.on_scenes = args.data == "scenes"
        self.tables = {}

    @cached_property
    def untrained(self):
        torch.manual_seed(self.args.seed + 1)
        return type(self.model)(self.cfg).to(self.args.device).eval()

    def scenes(self, split="eval", frames=2, **changes):
        """The training's scenes, or preset tiny's. Longer clips move no farther in all."""
        recipes = sys.modules[type(self.model).__module__].RECIPES
        options = self.config.get("scenes") or recipes["tiny"]["scenes"]
        slower = min(1.0, getattr(self.cfg, "frames", 2) / frames)
        own = dict(size=self.cfg.size, speed=slower * options["speed"], pan=slower * options["pan"])
        return data.Scenes(frames, self.args.seed, split, **options | own | changes)

    def truth(self, scenes, numbers, points=1):
        """Clips of scenes with all that data.Scenes knows of them, on the run's device."""
        some = [numbers[i:i + 16] for i in range(0, len(numbers), 16)]      # few at a time: memory
        parts = [scenes.batch(part, truth=True, points=points) for part in some]
        return to_device(joined(parts), self.args.device)

    def clips(self, frames, count, stride=1):
        """Held-out clips (count, frames, 3, S, S) in [0, 1] of --data."""
        args = self.args
        numbers = [range(i, min(i + 8, count)) for i in range(0, count, 8)]
        if self.on_scenes:
            batches = map(self.scenes(frames=frames).batch, numbers)
        else:
            videos = data.VideoOptions(gap=tuple(args.gap), repeat=1, stride=stride)
            batches = data.make_loader(args.data, dict(frames=frames, size=self.cfg.size), numbers,
                                       seed=args.seed, workers=0, split="eval", videos=videos)
        return moog.as_float(joined(list(batches))["video"]).to(args.device)

    def table(self, title, columns, rows):
        """Rows are a name and its cells: text, numbers, or lists of numbers, one for each seed."""
        self.tables[title] = [dict(zip(["", *columns], row)) for row in rows]
        lines = [["", *columns], *(list(map(show, row)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        tqdm.write(f"\n{title}")
        for line in lines:
            tqdm.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths)))

    def picture(self, figure, name):
        figure.savefig(self.out / name, dpi=110)
        plt.close(figure)

    def gif(self, figures, name, duration=300):
        frames = []
        for figure in figures:
            figure.canvas.draw()
            frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3])
            plt.close(figure)
        iio.imwrite(self.out / name, np.stack(frames), duration=duration, loop=0)

def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

def to_device(batch, device):
    return {name: x.to(device) for name, x in batch.items()}

def show(cell):
    """A table's cell as text; of a list mean ± standard deviation."""
    if isinstance(cell, list):
        lost = sum(not math.isfinite(x) for x in cell)
        if lost:
            return f"diverged, {lost} of {len(cell)}"
        spread = f" ± {show(statistics.stdev(cell))}" if len(set(cell)) > 1 else ""
        return show(statistics.fmean(cell)) + spread
    if isinstance(cell, float):
        return f"{cell:.1e}" if 0 < abs(cell) < 1e-3 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell

def as_images(video):
    """(..., 3, H, W), uint8 or float -> (..., H, W, 3) for matplotlib, from any device."""
    return moog.as_float(video).movedim(-3, -1).clamp(0, 1).cpu().numpy()

def image_grid(rows, columns=(), width=1.4, note=""):
    """A figure of images (H, W, 3) in rows (label, images), a note below; and its axes."""
    most = len(rows[0][1])
    H, W = rows[0][1][0].shape[:2]
    size = (width * most + 0.3, width * H / W * len(rows) + 0.55)
    figure, axes = plt.subplots(len(rows), most, squeeze=False, layout="constrained", figsize=size)
    figure.supxlabel(note, fontsize=9)
    for axis, title in zip(axes[0], columns):
        axis.set_title(title, fontsize=9)
    for (label, images), line in zip(rows, axes):
        line[0].set_ylabel(label, fontsize=9)
        for axis, image in zip(line, images):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[], autoscale_on=False)
    return figure, axes

# ---- metrics -------------------------------------------------------------------------------------
psnr = moog.psnr

def as_double(*arrays):
    return [torch.as_tensor(x).cpu().double() for x in arrays]          # MPS has no float64

def flow_errors(flow, target, valid=None):
    """Lengths of errors and of true vectors in pixels, of flows (B, 2, H, W), where valid (B, H, W)
    is true, by default where |target| < 1e9."""
    flow, target = as_double(flow, target)
    assert flow.shape == target.shape and flow.shape[1] == 2, "want flows (B, 2, H, W)"
    valid = target.abs().amax(1) < 1e9 if valid is None else as_double(valid)[0] > 0
    return (flow - target).norm(dim=1)[valid], target.norm(dim=1)[valid]

def end_point_error(flow, target, valid=None):
    """Mean length of the error, as flow_errors takes it; nan if no pixel is valid."""
    return flow_errors(flow, target, valid)[0].mean().item()

def fl_all(flow, target, valid=None):
    """Per cent of KITTI's outliers: off by more than 3 pixels and by more than 5 %."""
    error, length = flow_errors(flow, target, valid)
    return 100 * ((error > 3) & (error > 0.05 * length)).double().mean().item()

def confusion(pred, target, num_classes, ignore_index=255):
    """(true class, predicted class) -> pixels, of maps of any shape: (K, K)."""
    pred = torch.as_tensor(pred).long()
    target = torch.as_tensor(target).long()
    counted = target != ignore_index
    pairs = torch.stack([target[counted], pred[counted]])
    assert ((pairs >= 0) & (pairs < num_classes)).all(), f"want classes 0 to {num_classes - 1}"
    number = pairs[0] * num_classes + pairs[1]
    return number.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)

def iou_scores(counts):
    """mean_iou's three numbers from a confusion matrix."""
    counts = counts.cpu().double()
    hit = counts.diagonal()
    per_class = hit / (counts.sum(0) + counts.sum(1) - hit)     # 0 / 0 = nan: in neither, left out
    return per_class.nanmean().item(), per_class, (hit.sum() / counts.sum()).item()

def mean_iou(pred, target, num_classes, ignore_index=255):
    """Of all maps together, as in mmsegmentation: mean intersection over union of the classes that
    are there or predicted, IoU of each (K,), nan if nowhere, share of pixels right."""
    return iou_scores(confusion(pred, target, num_classes, ignore_index))

def tracking_metrics(tracks, visible, target_tracks, target_visible, query_frames, mode="first",
                     valid=None):
    """TAP-Vid's metrics, each (B,), nan where nothing is to be seen. tracks (B, P, T, 2) in pixels
    of 256 x 256; visible, valid (truth is known) (B, P, T); query_frames (B, P). mode: "first"
    counts the frames after a point's query, "strided" all but the query's."""
    assert mode in ("first", "strided"), f"mode={mode!r} must be 'first' or 'strided'"
    tracks, target = as_double(tracks, target_tracks)
    predicted, true = (x > 0 for x in as_double(visible, target_visible))
    t = torch.arange(tracks.shape[2])
    query = torch.as_tensor(query_frames).cpu()[..., None]
    counted = (t > query if mode == "first" else t != query).expand(true.shape)
    if valid is not None:
        counted = counted & torch.as_tensor(valid).cpu()
    def total(x):
        return (x & counted).sum((1, 2)).double()
    square = (tracks - target).square().sum(-1)
    out = dict(occlusion_accuracy=total(predicted == true) / counted.sum((1, 2)))
    for n in (1, 2, 4, 8, 16):
        hit = (square < n ** 2) & true
        out[f"delta_{n}"] = total(hit) / total(true)
        out[f"jaccard_{n}"] = total(hit & predicted) / (total(true) + total(predicted & ~hit))
    for name, part in (("average_jaccard", "jaccard"), ("delta_avg", "delta")):
        out[name] = torch.stack([out[f"{part}_{n}"] for n in (1, 2, 4, 8, 16)]).mean(0)
    return out

def average_jaccard(*inputs, **options):
    """TAP-Vid's average Jaccard of each video, (B,); arguments as in tracking_metrics."""
    return tracking_metrics(*inputs, **options)["average_jaccard"]

def abs_rel(depth, target, valid=None):
    """Mean |depth - target| / target where valid (by default where target > 0)."""
    depth, target = as_double(depth, target)
    valid = target > 0 if valid is None else as_double(valid)[0] > 0
    return ((depth - target).abs() / target)[valid].mean().item()

def box_area(box):
    return (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)

def box_iou(boxes, target):
    """Intersection over union of boxes (..., 4) with (..., 4), x1 y1 x2 y2: (...), one by one."""
    boxes, target = as_double(boxes, target)
    low = torch.maximum(boxes, target)[..., :2]
    high = torch.minimum(boxes, target)[..., 2:]
    both = box_area(torch.cat([low, high], -1))
    return both / (box_area(boxes) + box_area(target) - both).clamp(min=1e-12)

def flow_to_color(flow, fastest=None):
    """Flow (2, H, W) or (H, W, 2) as uint8 (H, W, 3): hue is direction, red right, white still,
    full colour the speed `fastest`, by default the field's largest; what is faster is darker."""
    flow = torch.as_tensor(flow).detach().cpu().double()
    u, v = flow if len(flow) == 2 else flow.movedim(-1, 0)
    speed = torch.hypot(u, v)
    speed = speed / ((speed.max() if fastest is None else fastest) + 1e-5)
    hue = torch.atan2(v, u) / (2 * math.pi) % 1
    hsv = torch.stack([hue, speed.clamp(max=1), torch.where(speed <= 1, 1.0, 0.75)], -1)
    return np.uint8(255 * matplotlib.colors.hsv_to_rgb(hsv.numpy()))

# ---- probe: one driver for every trained readout -------------------------------------------------
class Task:
    """What a readout learns and how it is scored. Batches are dicts of tensors. A subclass has also
        prepare()                       opens the data; sets `testing`, and how much: `tests`
        train_batches(steps)            yields batches
        head(model) -> readout;         features(model, batch) -> what it sees
        predict(head, features, batch); loss(prediction, batch)
        baselines(batch)                {name: prediction} of what needs no model
        measure(prediction, batch)      {name: tensor}, to be joined"""
    lr = 1e-3
    unfrozen = ()                       # parts that finetuning trains though training did not

    def __init__(self, run):
        self.run = run
        self.args = run.args
        self.prepare()

    def test_batch(self, i):
        return self.testing[i]

    def models(self):
        return {"this model": self.run.model, "random init": self.run.untrained}

    def test(self, model, head, batch):
        return self.predict(head, self.features(model, batch), batch)

    def score(self, measured):
        return {name: x.nanmean().item() for name, x in measured.items()}

    def paint(self, prediction, batch):
        """An image (H, W, 3) of the batch's first prediction, of the truth if that is None."""

@torch.enable_grad()
def train_readout(task, model, name):
    """AdamW on the readout, and with --finetune on a copy of the model at a tenth of its learning
    rate; warm-up, then a cosine to 0. our choice: one recipe; mmsegmentation, CroCo v2 and TAP-Net
    each have their own, for far more steps."""
    args = task.args
    steps = args.steps or task.steps
    lr = args.lr or task.lr
    if args.finetune:
        model = deepcopy(model).train()
        for part in task.unfrozen:
            getattr(model, part, nn.Identity()).requires_grad_(True)
    torch.manual_seed(args.seed)                        # readouts of all models begin alike
    head = task.head(model).to(args.device).train()
    groups = [dict(params=list(head.parameters()), lr=lr)]
    if args.finetune:
        groups.append(dict(params=[p for p in model.parameters() if p.requires_grad], lr=lr / 10))
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    def factor(i):
        return min((i + 1) / (0.05 * steps + 1), (1 + math.cos(math.pi * i / steps)) / 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for batch in tqdm(task.train_batches(steps), f"{task.name}, {name}", steps, **BAR):
        with torch.set_grad_enabled(args.finetune):
            features = task.features(model, batch)
        task.loss(task.predict(head, features, batch), batch).backward()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), head.eval()

def probe(run, task):
    """Trains the task's readout on each of its models: one table of scores, one picture."""
    trained = {name: train_readout(task, model, name) for name, model in task.models().items()}
    measured = {}
    shown = []
    for i in tqdm(range(task.tests), f"{task.name}, test", **BAR):
        batch = task.test_batch(i)
        predictions = {name: task.test(*models, batch) for name, models in trained.items()}
        predictions |= task.baselines(batch)
        for name, prediction in predictions.items():
            measured.setdefault(name, []).append(task.measure(prediction, batch))
        if i % math.ceil(task.tests / 4) == 0 and task.paint(None, batch) is not None:
            images = [task.paint(x, batch) for x in (None, *predictions.values())]
            shown.append(("", [as_images(batch[task.frames][0, 0]), *images]))
    scores = {name: task.score(joined(parts)) for name, parts in measured.items()}
    rows = [[row, *(score[row] for score in scores.values())] for row in scores[name]]
    how = "finetuned" if run.args.finetune else "frozen features"
    run.table(f"{task.title}; {how}, {run.args.steps or task.steps} steps", list(scores), rows)
    if shown:
        figure, _ = image_grid(shown, ["image", "truth", *predictions], 2.0)
        run.picture(figure, f"{task.name}.png")

# ---- heads of the readouts -----------------------------------------------------------------------
def conv_bn(ins, outs, size=3):
    conv = nn.Conv2d(ins, outs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outs), nn.ReLU())

def resized(x, size):
    return F.interpolate(x, size, mode="bilinear")

class UperNet(nn.Module):
    """UperNet on four maps (B, D, h, w) of a ViT. our choice: the pyramid by transposed
    convolutions, as in iBOT; else mmsegmentation's, D channels wide, without auxiliary head."""

    def __init__(self, dim, classes):
        super().__init__()
        twice = nn.ConvTranspose2d(dim, dim, 2, 2)
        four_times = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim),
                                   nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2))
        self.pyramid = nn.ModuleList([four_times, twice, nn.Identity(),
                                      nn.MaxPool2d(2, ceil_mode=True)])
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), conv_bn(dim, dim, 1)) for n in (1, 2, 3, 6))
        self.bottleneck = conv_bn(5 * dim, dim)
        self.lateral = nn.ModuleList(conv_bn(dim, dim, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv_bn(dim, dim) for _ in range(3))
        self.head = nn.Sequential(conv_bn(4 * dim, dim), nn.Dropout2d(0.1),
                                  nn.Conv2d(dim, classes, 1))

    def forward(self, maps):
        levels = [scale(x) for scale, x in zip(self.pyramid, maps)]     # 4, 2, 1 and 1/2 times h, w
        top = levels[-1]
        pooled = [resized(pool(top), top.shape[-2:]) for pool in self.pools]
        x = self.bottleneck(torch.cat([top, *pooled], 1))
        fused = [x]                                                     # coarsest first
        for lateral, smooth, level in zip(self.lateral, self.smooth, levels[2::-1]):
            x = lateral(level) + resized(x, level.shape[-2:])
            fused.append(smooth(x))
        finest = fused[-1].shape[-2:]
        return self.head(torch.cat([resized(x, finest) for x in fused], 1))

class ConvUnit(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
                         nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + super().forward(x)

class DPT(nn.Module):
    """CroCo v2's dense prediction transformer head: four token maps on one grid -> u, v, confidence
    at image size. Widths are in proportion to D, CroCo's at D = 384."""

    def __init__(self, ins, dim):
        super().__init__()
        steps = [dim * 2**k // 4 for k in range(4)]
        width = 2 * dim // 3
        scales = [nn.ConvTranspose2d(steps[0], steps[0], 4, 4),
                  nn.ConvTranspose2d(steps[1], steps[1], 2, 2),
                  nn.Identity(), nn.Conv2d(steps[3], steps[3], 3, 2, 1)]
        self.assemble = nn.ModuleList()
        for channels, step, scale in zip(ins, steps, scales):
            out = nn.Conv2d(step, width, 3, padding=1, bias=False)
            self.assemble.append(nn.Sequential(nn.Conv2d(channels, step, 1), scale, out))
        self.before = nn.ModuleList(ConvUnit(width) for _ in range(3))
        self.after = nn.ModuleList(ConvUnit(width) for _ in range(4))
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))
        self.enter = nn.Conv2d(width, width // 2, 3, padding=1)
        self.leave = nn.Sequential(nn.Conv2d(width // 2, 32, 3, padding=1), nn.ReLU(),
                                   nn.Conv2d(32, 3, 1))

    def forward(self, maps, size):
        levels = [assemble(x) for assemble, x in zip(self.assemble, maps)]
        x = levels[3]
        for k in (3, 2, 1, 0):
            if k < 3:
                x = x + self.before[k](levels[k])
            x = self.after[k](x)
            finer = levels[k - 1].shape[-2:] if k else [2 * n for n in x.shape[-2:]]
            x = self.mix[k](F.interpolate(x, finer, mode="bilinear", align_corners=True))
        # twice as large for patches of 16, as CroCo's; for others what gives the image's size
        return self.leave(F.interpolate(self.enter(x), size, mode="bilinear", align_corners=True))

def laplacian_loss(flow, confidence, target, valid):
    """CroCo v2's: mean of |error|_1 / d + log d, d = 0.25 + 3.75 sigmoid(confidence)."""
    d = 0.25 + 3.75 * torch.sigmoid(confidence)                         # (B, H, W)
    error = (flow - torch.where(valid[:, None], target, 0)).abs().sum(1)
    return ((error / d + d.log()) * valid).sum() / valid.sum().clamp(min=1)

OVERLAP = 0.7       # of tiles. our choice: CroCo v2's in validation; its test takes 0.9

def tile_offsets(length, window, overlap):
    """Where tiles of `window` pixels begin to cover `length` and overlap by that share or more."""
    count = 1 + math.ceil((length - window) / ((1 - overlap) * window))
    return np.round(np.linspace(0, length - window, count)).astype(int).tolist()

def tiled_flow(predict, frames, window, overlap):
    """Flow (2, H, W) of frames (2, 3, H, W): means of overlapping tiles, weighted by confidence.
    predict(tiles (B, 2, 3, S, S)) -> flow (B, 2, S, S), confidence (B, S, S), S = window."""
    H, W = frames.shape[-2:]
    total = torch.zeros(3, H, W, device=frames.device)
    for y in tile_offsets(H, window, overlap):
        columns = tile_offsets(W, window, overlap)
        tiles = torch.stack([frames[..., y:y + window, x:x + window] for x in columns])
        flow, confidence = predict(tiles)
        weight = torch.exp(-20 * (torch.sigmoid(confidence / 5) - 0.5))[:, None]    # small d: sure
        for x, part in zip(columns, torch.cat([weight * flow, weight], 1)):
            total[:, y:y + window, x:x + window] += part
    return total[:2] / total[2]

# ---- Midway: segmentation and flow ---------------------------------------------------------------
class ImageTask(Task):
    """Dense readouts of images (B, T, 3, H, W) in [0, 1], which learn from `scenes`, {split:
    data.Scenes}, or from crops of `size` of a data set, `training`. A subclass has
        from_scenes(clips) -> batch;    read(sample of a data set) -> the same of a single one
        side(H, W, rng) -> of a random crop"""
    frames = "image"                                    # in a batch
    training = testing = None
    many = 1                                            # scenes of a test batch

    def scene_batch(self, split, numbers):
        return self.from_scenes(self.run.truth(self.scenes[split], numbers))

    def crop(self, number):
        """A random square of a sample, mirrored half of the time. our choice: mmsegmentation's and
        CroCo v2's range of scales, but no stretching, no padding, no colour jitter."""
        rng = np.random.default_rng((self.args.seed, number))
        sample = self.read(self.training[int(rng.integers(len(self.training)))])
        H, W = sample["image"].shape[-2:]
        side = min(round(self.side(H, W, rng)), H, W)
        top = int(rng.integers(H - side + 1))
        left = int(rng.integers(W - side + 1))
        nearest = ((torch.arange(self.size) + 0.5) * side / self.size).long()
        cut = {name: x[..., top:top + side, left:left + side] for name, x in sample.items()}
        out = {name: x[..., nearest[:, None], nearest] for name, x in cut.items()}
        out["image"] = F.interpolate(cut["image"], self.size, mode="bilinear", antialias=True)
        sign = rng.choice([-1, 1])
        if "flow" in out:
            out["flow"] = out["flow"] * torch.tensor([sign, 1]).view(2, 1, 1) * self.size / side
        return out if sign > 0 else {name: x.flip(-1) for name, x in out.items()}

    def train_batches(self, steps):
        n = self.args.batch_size
        with ThreadPoolExecutor(8) as threads:                      # that read files
            for i in range(0, n * steps, n):
                if self.training is None:
                    yield self.scene_batch("train", range(i, i + n))
                else:
                    samples = threads.map(self.crop, range(i, i + n))
                    yield to_device(default_collate(list(samples)), self.args.device)

    def test_batch(self, i):
        if self.testing is None:
            return self.scene_batch("eval", range(self.many * i, self.many * (i + 1)))
        sample = self.read(self.testing[i])
        return to_device({name: x[None] for name, x in sample.items()}, self.args.device)

    def as_maps(self, levels, images):
        """Tokens (B, L, C) of images (B, ..., H, W) -> maps (B, C, h, w). CLS is dropped."""
        grid = [n // self.run.cfg.patch for n in images.shape[-2:]]
        return [tokens[:, 1:].mT.unflatten(-1, grid) for tokens in levels]

class Segmentation(ImageTask):
    name = "segmentation"
    many = 32

    def prepare(self):
        args = self.args
        cfg = self.run.cfg
        backward = cfg.latent_dynamics and cfg.backward and args.head == "linear"
        if args.features == "backward" and not backward:
            raise UserError("--features backward: for the linear readout of a model that has them")
        self.size = round(16 / 7 * cfg.size / cfg.patch) * cfg.patch    # paper: 512 for 224
        if self.run.on_scenes:
            plain = dict(frames=1, size=self.size, sprites=4, flat=0.8, radius=(0.15, 0.3))
            self.scenes = {split: self.run.scenes(split, **plain) for split in ("train", "eval")}
            self.classes = 1 + len(data.SHAPES)
        else:
            options = dict(num_classes=args.classes or None, ignore_index=args.ignore_index)
            self.training = data.Segmentation(args.data, "train", **options)
            self.testing = data.Segmentation(args.data, "val", **options)
            self.classes = self.testing.num_classes
        self.tests = len(self.testing or range(8))
        self.steps = 2000 if self.training else 250
        self.title = f"segmentation in per cent; {args.head} readout, {args.features} features"

    def from_scenes(self, clips):
        return dict(image=clips["video"], classes=clips["classes"][:, 0])

    def read(self, sample):
        image = torch.from_numpy(sample["image"]).movedim(-1, 0)[None] / 255
        return dict(image=image, classes=torch.from_numpy(sample["classes"]))

    def side(self, H, W, rng):
        return min(H, W) / rng.uniform(0.5, 2)

    def head(self, model):
        D = model.cfg.dim
        if self.args.head == "upernet":
            return UperNet(D, self.classes)
        return nn.Sequential(nn.BatchNorm2d(D), nn.Conv2d(D, self.classes, 1))

    def features(self, model, batch):
        """(B, D, h, w): the backward layers' lowest level (paper: its linear readout's), or the
        encoder's last, or four. our choice: the student's; the paper doesn't say."""
        image = batch["image"][:, 0]
        patch = model.cfg.patch
        sides = image.shape[-2:]
        shape = [round(self.size * side / min(sides) / patch) * patch for side in sides]
        if shape != list(sides):
            image = F.interpolate(image, shape, mode="bicubic", antialias=True).clamp(0, 1)
        if self.args.features == "backward":
            z = model.features(image)
            v = z[-1]
            for i in reversed(model.predicted):
                v = model.student_backward[str(i)](z[i], v)
            return self.as_maps([v], image)[0]
        quarters = [model.cfg.depth * k // 4 for k in (1, 2, 3, 4)]
        maps = self.as_maps(model.student(midway.normalize(image), quarters), image)
        return maps[-1] if self.args.head == "linear" else maps

    def predict(self, head, features, batch):
        return resized(head(features).float(), batch["classes"].shape[-2:])

    def loss(self, prediction, batch):
        classes = batch["classes"]
        total = F.cross_entropy(prediction, classes, ignore_index=255, reduction="sum")
        return total / (classes != 255).sum().clamp(min=1)

    def test(self, model, head, batch):
        return super().test(model, head, batch).argmax(1)

    @cached_property
    def prior(self):
        counts = torch.zeros(self.classes, 64, 64)
        for i in range(len(self.training or range(512))):
            known = self.read(self.training[i]) if self.training else self.scene_batch("train", [i])
            small = F.interpolate(known["classes"].view(1, 1, *known["image"].shape[-2:]).float(),
                                  (64, 64)).cpu()
            counts += small[0] == torch.arange(self.classes).view(-1, 1, 1)
        return counts.argmax(0)[None, None].float()             # the commonest class of each place

    def baselines(self, batch):
        classes = batch["classes"]
        prior = F.interpolate(self.prior, classes.shape[-2:]).long()[0]
        return {"position prior": prior.expand_as(classes)}

    def measure(self, prediction, batch):
        return dict(counts=confusion(prediction.cpu(), batch["classes"].cpu(), self.classes)[None])

    def score(self, measured):
        miou, _, accuracy = iou_scores(measured["counts"].sum(0))
        return {"mIoU": 100 * miou, "pixel accuracy": 100 * accuracy}

    def paint(self, prediction, batch):
        classes = (batch["classes"] if prediction is None else prediction)[0].cpu().numpy()
        colours = plt.get_cmap("turbo")(classes / (self.classes - 1))[..., :3]
        return np.where(classes[..., None] == 255, 0, colours)              # ignored: black

class Flow(ImageTask):
    """paper: B.4. A DPT readout of the encoder's last level, the target's tokens after the highest
    midway path, and the predictions of the highest and of the lowest level. our choice: learning
    rate 1e-3 (CroCo v2: 2e-5, for a million steps)."""
    name = "flow"
    unfrozen = ("teacher_embed", "teacher_backward")        # the target's branch, as in CroCo v2

    def prepare(self):
        run = self.run
        self.size = run.cfg.size
        pan = run.scenes().options.pan / 2
        moving = dict(sprites=4, speed=pan, pan=pan, zoom=0.02, roll=0.02)
        self.scenes = dict(train=run.scenes("train", **moving),
                           eval=run.scenes("eval", size=2 * self.size, **moving))
        if not run.on_scenes:
            self.testing = data.FlowPairs(self.args.data, "val")
            self.training = data.FlowPairs(self.args.data, "train")
            if self.training.items == self.testing.items:   # no splits: each is everything
                self.training = None
        self.tests = len(self.testing or range(16))
        self.steps = 2000 if self.training else 250
        where = "the training split" if self.training else "scenes"
        self.title = f"optical flow, learnt on {where}; end-point error in pixels, mean over pairs"

    def models(self):
        """Beside the model, as paper: its encoder with random dynamics."""
        model = self.run.model
        torch.manual_seed(self.args.seed + 1)
        alone = midway.Midway(replace(model.cfg, latent_dynamics=True)).to(self.args.device).eval()
        alone.student = deepcopy(model.student)
        alone.teacher = deepcopy(model.teacher)
        trained = {"this model": model} if model.cfg.latent_dynamics else {}
        return trained | {"encoder only": alone}

    def from_scenes(self, clips):
        flow = clips["flow"][:, 0]
        return dict(image=clips["video"], flow=flow, valid=torch.ones_like(flow[:, 0]).bool())

    def read(self, sample):
        return dict(image=torch.from_numpy(sample["frames"]).movedim(-1, 1) / 255,  # (2, 3, H, W)
                    flow=torch.from_numpy(sample["flow"]), valid=torch.from_numpy(sample["valid"]))

    def side(self, H, W, rng):
        return self.size / 2 ** rng.uniform(-0.2, 0.5)

    def head(self, model):
        D = model.cfg.dim
        return DPT((D, model.cfg.motion_dim, D, D), D)

    def features(self, model, batch):
        """Four maps. Finetuned, the target takes the student's encoder: all is trained."""
        source, target = batch["image"].unbind(1)
        z = model.features(source)
        zt = model.features(target, teacher=not self.args.finetune)
        levels = model.dynamics(z, zt)
        tokens = model.midway_path(model.predicted[-1], None, z[-1], zt[-1])    # (B, K + 2L, d)
        target_tokens = tokens[:, -z[-1].shape[1]:]                             # (B, L, d)
        return self.as_maps([z[-1], target_tokens, levels[-1].pred, levels[0].pred], source)

    def predict(self, head, features, batch):
        out = head(features, batch["image"].shape[-2:]).float()
        return out[:, :2], out[:, 2]

    def loss(self, prediction, batch):
        return laplacian_loss(*prediction, batch["flow"], batch["valid"])

    def test(self, model, head, batch):
        def predict(tiles):
            return Task.test(self, model, head, dict(image=tiles))
        return tiled_flow(predict, batch["image"][0], self.size, OVERLAP)[None]

    def baselines(self, batch):
        flow = batch["flow"]
        known = flow[0][:, batch["valid"][0]]                                   # (2, pixels)
        median = known.median(1).values if known.numel() else flow.new_zeros(2)
        return {"zero": 0 * flow, "best constant": median.view(1, 2, 1, 1).expand_as(flow)}

    def measure(self, prediction, batch):
        pair = (prediction, batch["flow"], batch["valid"])
        return {"end-point error": torch.tensor([end_point_error(*pair)]),
                "per cent of outliers (Fl-all)": torch.tensor([fl_all(*pair)])}

    def paint(self, prediction, batch):
        target = torch.where(batch["valid"], batch["flow"], 0)[0]
        flow = target if prediction is None else prediction[0]
        return flow_to_color(flow, target.norm(dim=0).max().item())         # the truth's scale

# ---- Midway: what the dynamics know --------------------------------------------------------------
DRAWS = 32          # random vectors that heatmaps are averaged over

def perturb(model, i, m, v, token, draws=32, seed=0):
    """Forwarded feature perturbation, paper: Sec. 4.4. Random vectors r are tangents of one token
    (B,) of v each; the cosine of r with each predicted token's tangent is averaged over the draws.
    m, v (B, K, d), (B, L, D) of level i, one of model.predicted -> heatmaps (B, h*w)."""
    v = v.contiguous()
    place = F.one_hot(token + 1, v.shape[1])[..., None].to(v)               # (B, L, 1), after CLS
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(draws, len(v), v.shape[2], generator=generator).to(v)   # (draws, B, D)
    def forward(v):
        return model.predict_forward(i, m, v)[0]
    def heat(r):
        _, tangent = jvp(forward, (v,), (place * r[:, None],))              # (B, L, D)
        return F.cosine_similarity(r[:, None], tangent[:, 1:], dim=-1)      # (B, h*w)
    # Forward mode has no rule for the fast attention kernels. Attention fills the memory.
    tokens = v.shape[1] + m.shape[1]
    chunk = max(1, 2**25 // (len(v) * model.cfg.forward_heads * tokens**2))
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(heat, chunk_size=chunk)(r).mean(0)

def level_names(model):
    if not model.cfg.latent_dynamics:
        raise UserError("this model has no latent dynamics: only --task segmentation and flow fit")
    return [f"level {model.levels[i]}" for i in model.predicted]

def heatmaps(run, model, pairs, token):
    """Heatmaps (n, h*w) of a token (n,) of each pair's source, for each level, lowest first."""
    return [perturb(model, i, level.m, level.v, token, DRAWS, run.args.seed)
            for i, level in zip(model.predicted, model.predict(*pairs.unbind(1)))]

def yx(token, grid):
    """Number of a token -> its row and column (..., 2), as floats."""
    return torch.stack([token.div(grid, rounding_mode="floor"), token % grid], -1).float()

def moving_tokens(run, count, scenes):
    """Up to `count` pairs of scenes (n, 2, 3, S, S), a token (n,) of each that moves by a patch or
    more and stays in sight, and where it lands (n, 2), in rows and columns."""
    p = run.cfg.patch
    batch = run.truth(run.scenes(), range(scenes))
    at = slice(p // 2, None, p)
    flow = batch["flow"][:, 0, :, at, at].flatten(2).mT                 # (B, h*w, 2)
    shift = flow.flip(-1) / p                                           # down and right
    fits = ~batch["occluded"][:, 0, at, at].flatten(1) & (shift.norm(dim=-1) >= 1)
    rows = fits.any(1).nonzero()[:, 0]
    if not len(rows):
        raise UserError("nothing moves by a patch or more in this model's scenes")
    generator = torch.Generator().manual_seed(run.args.seed)
    token = torch.multinomial(fits[rows].float().cpu(), 1, generator=generator)
    token = token[:, 0].to(rows.device)
    # p // 2 is half a pixel after the centre of an even patch, the centre of an odd one
    off = (p // 2 + 0.5) / p - 0.5
    truth = yx(token, run.cfg.size // p) + off + shift[rows, token]
    return batch["video"][rows[:count]], token[:count], truth[:count]

def ridge(x, y, tests):
    """Ridge regression of y (n, k) on x (n, d): R^2 on the last `tests`, predictions there."""
    x, y = as_double(x, y)
    n = len(x) - tests
    x = (x - x[:n].mean(0)) / x[:n].std(0).clamp(min=1e-9)
    x = F.pad(x, (0, 1), value=1)
    def score(train, test, strength):
        a = x[:train]
        gram = a @ a.T + strength * x.shape[1] * torch.eye(train)
        predicted = x[train:test] @ (a.T @ torch.linalg.solve(gram, y[:train]))
        truth = y[train:test]
        error = (predicted - truth).square().sum() / (truth - y[:train].mean(0)).square().sum()
        return 1 - error.item(), predicted
    best = max((1e-2, 1e-1, 1, 10, 100), key=lambda s: score(n * 3 // 4, n, s)[0])
    return score(n, len(x), best)

def latent_errors(model, i, m, v, target, motion=None):
    """2 - 2 cos of level i's predictions with other latents of it alone."""
    others = {"right": m, "shuffled": m.roll(1, 0), "none": torch.zeros_like(m)}
    if motion is not None:
        distance = torch.cdist(motion, motion).fill_diagonal_(math.inf)
        others["same motion"] = m[distance.argmin(1)]
    return {name: midway.prediction_loss(model.predict_forward(i, x, v)[0], target).item()
            for name, x in others.items()}

def shifted_pairs(run, count):
    """Pairs (count, 2, 3, S, S) of crops of one frame each, shifts (count, 2) between them."""
    crops = run.cfg.inputs["crops"] | dict(local_crops=0)
    numbers = [range(i, i + 16) for i in range(0, count, 16)]
    batches = data.make_loader(
        run.args.data, run.cfg.inputs | dict(crops=crops), numbers, seed=run.args.seed, workers=0,
        split="eval", colours=False, one_frame=count,
        videos=data.VideoOptions(gap=tuple(run.args.gap)))
    batch = to_device(joined(list(batches)), run.args.device)
    return batch["motion"], batch["shift"]

def latents(run, tests=256, fits=1024):
    """Do the motion latents carry motion? Content makes the right latents better than another
    pair's too; only motion makes those of another scene with the same motion as good."""
    names = level_names(run.model)
    motion = None
    if run.on_scenes:
        clips = joined([run.truth(run.scenes("train"), range(fits)),
                        run.truth(run.scenes("eval"), range(tests))])
        video = clips["video"]
        flow = clips["flow"][:, 0].mean((2, 3))                             # (n, 2)
        truths = {"camera's motion": flow, "colours": video[:, 1].mean((2, 3))}
        motion = flow[-tests:]
    else:
        pairs, shift = shifted_pairs(run, 2 * tests)
        video = torch.cat([pairs, run.clips(2, tests)])
        truths = {"shifts within a frame": shift}
    rows = []
    readings = []                               # what the latents say of the camera's motion
    for who, model in (("", run.model), ("random init, ", run.untrained)):
        copies = model.features(video[-tests:, 0], teacher=True)
        for name, i, level in zip(names, model.predicted, model.predict(*video.unbind(1))):
            m, v, target = (x[-tests:] for x in (level.m, level.v, level.target))
            row = latent_errors(model, i, m, v, target, motion)
            row["copying"] = midway.prediction_loss(copies[i], target).item()
            row["variance of m"] = m.var(0).mean().item()
            for what, truth in truths.items():
                row[f"R2 of {what}"], reading = ridge(level.m[:len(truth)].flatten(1), truth, tests)
                readings.append(reading)
            rows.append([who + name, *row.values()])
    run.table(f"motion latents of {tests} pairs: 2 - 2 cos of the prediction with latents that are "
              "right, ...; R2 of what a linear readout of them tells", list(row), rows)
    if not run.on_scenes:
        return
    middle = run.cfg.size / 2 - 0.5
    note = "the camera's motion: white true, orange read off the latents"
    figures = []
    for k in (motion.norm(dim=1) > run.cfg.size / 10).nonzero()[:12, 0].tolist():
        pair = as_images(video[k - tests])
        figure, axes = image_grid([("", pair)], ["frame 1", "frame 2"], 2.2, note)
        for shift, colour, width in ((motion, "white", 0.05), (readings[0], "#ff6600", 0.02)):
            axes[0, 0].quiver(middle, middle, *shift[k].tolist(), color=colour, width=width,
                              angles="xy", scale_units="xy", scale=1)
        figures.append(figure)
    if figures:
        run.gif(figures, "latents.gif", 900)

def identity_bias(run):
    """our choice, a number for Fig. 6: how often heatmaps of moving tokens stay behind."""
    if not run.on_scenes:
        raise UserError("identity-bias needs known motion, that of scenes: leave out --data")
    models = {"this model": run.model}
    if run.args.against:
        other, _, _, path = load(run.args.against)
        if not isinstance(other, midway.Midway) or (other.cfg.size, other.cfg.patch) != (
                run.cfg.size, run.cfg.patch):
            raise UserError(f"--against {path}: no Midway of this size and patch")
        models[path.parent.name] = other.to(run.args.device)
    models["random init"] = run.untrained
    pairs, token, truth = moving_tokens(run, 128, scenes=256)
    grid = run.cfg.size // run.cfg.patch
    peaks = {"anywhere, by chance": torch.arange(grid * grid, device=token.device)[:, None]}
    for name, model in models.items():
        for level, heat in zip(level_names(model), heatmaps(run, model, pairs, token)):
            peaks[f"{name}, {level}"] = heat.argmax(1)
    rows = []
    for name, peak in peaks.items():
        off, stay = ((yx(peak, grid) - place).norm(dim=-1) for place in (truth, yx(token, grid)))
        rows.append([name, (stay < off).float().mean().item(), off.mean().item()])
    run.table(f"identity bias: where the heatmaps of {len(token)} moving tokens peak, scenes",
              ["nearer to the source", "patches from truth"], rows)

def changed_tokens(model, pairs, count):
    """our choice: the tokens (n, count) whose features change most from source to target."""
    z, zt = (model.features(x)[-1][:, 1:] for x in pairs.unbind(1))
    return F.cosine_similarity(z, zt, dim=-1).topk(count, largest=False).indices

def model_view(frame):
    """The central square of a frame (H, W, 3), a box for crop_uint8."""
    H, W = frame.shape[:2]
    side = min(H, W)
    return (H - side) // 2, (W - side) // 2, side, side

def look(run, frames, token=None, truth=None):
    """Fig. 6 of [(source, target)], (H, W, 3) uint8: a figure, the tokens (n,), their heatmaps.
    White: the model's view; green: the token; cross: the truth."""
    grid = run.cfg.size // run.cfg.patch
    views = [data.crop_uint8(x, model_view(x), run.cfg.size) / 255 for pair in frames for x in pair]
    pairs = torch.stack(views).unflatten(0, (-1, 2)).to(run.args.device)
    if token is None:
        token = changed_tokens(run.model, pairs, 1)[:, 0]
    if run.args.at:
        x, y = (min(int(share * grid), grid - 1) for share in run.args.at)
        token = torch.full_like(token, y * grid + x)
        truth = None
    heats = heatmaps(run, run.model, pairs, token)
    rows = [("", [source, target] + [target] * len(heats)) for source, target in frames]
    names = [f"heatmap, {name}" for name in level_names(run.model)]
    figure, axes = image_grid(rows, ["source", "target", *names], width=1.9)
    for b, line in enumerate(axes):
        sides = np.array(frames[b][0].shape[:2])
        y, x = grid / 2 * (1 - sides / sides.min())     # the frame's corner, in patches of the view
        extent = (x, grid - x, grid - y, y)
        y, x = yx(token[b], grid).tolist()
        for axis in line:
            axis.images[0].set_extent(extent)
            axis.set(xlim=extent[:2], ylim=extent[2:])
            axis.add_patch(plt.Rectangle((0, 0), grid, grid, fill=False, color="white"))
            axis.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, color="lime", lw=1.5))
        for axis, heat in zip(line[2:], heats):
            heat = heat[b].view(grid, grid).clamp(min=0).cpu().numpy()
            heat = heat / max(heat.max(), 1e-9)
            axis.imshow(heat, "inferno", alpha=0.15 + 0.7 * heat, interpolation="bilinear",
                        extent=(0, grid, grid, 0))
            if truth is not None:
                axis.plot(*(truth[b].flip(0) + 0.5).tolist(), "xc", mew=2)
    return figure, token, heats

def heatmap(run):
    """Fig. 6: where the forward model takes a token (green); and the same over time."""
    args = run.args
    names = level_names(run.model)
    token = truth = None
    if run.on_scenes:
        pairs, token, truth = moving_tokens(run, 6, scenes=32)
        frames = np.uint8(255 * as_images(pairs))
    elif args.time is not None:
        frames = [data.read_frames(args.data, [args.time, args.time + args.gap[0]])[0]]
    else:
        videos = data.Videos(args.data, gap=tuple(args.gap), repeat=1, seed=args.seed,
                             transform=lambda frames, rng: frames)
        frames = [videos[i] for i in range(6)]
    figure, token, heats = look(run, frames, token, truth)
    run.picture(figure, "heatmap.png")
    grid = run.cfg.size // run.cfg.patch
    off = [(yx(heat.argmax(1), grid) - yx(token, grid)).norm(dim=1).mean().item() for heat in heats]
    run.table(f"heatmap.png, mean of {len(token)}, in patches", names,
              [["distance of the peak from the source (0: identity)", *off]])
    first, *later = np.uint8(255 * as_images(run.clips(9, 1)[0]))
    token = None
    figures = []
    for frame in later:
        figure, token, _ = look(run, [(first, frame)], token)
        figures.append(figure)
    run.gif(figures, "heatmap.gif")

def follow_tokens(model, clip, start, draws=32, seed=0):
    """Fig. 7: tokens `start` (P,) of a clip (T, 3, S, S), followed in two ways (2, T, P): of the
    five hottest target tokens, paper: Sec. 4.4, or of all, the most similar one."""
    tokens = start.repeat(2, len(clip), 1)
    z = torch.cat([model.features(x)[-1] for x in clip.split(16)])[:, 1:]
    z = F.normalize(z, dim=-1)                                              # (T, h*w, D)
    for t in range(len(clip) - 1):
        top = model.predict(clip[t:t + 1], clip[t + 1:t + 2])[-1]
        now = tokens[:, t]                                                  # (2, P)
        alike = z[t][now] @ z[t + 1].T                                      # (2, P, h*w)
        m, v = (x.expand(len(start), -1, -1) for x in (top.m, top.v))
        heat = perturb(model, model.predicted[-1], m, v, now[0], draws, seed + t)
        five = heat.topk(min(5, heat.shape[1])).indices                     # (P, 5)
        best = alike[0].gather(1, five).argmax(1, keepdim=True)
        tokens[0, t + 1] = five.gather(1, best)[:, 0]
        tokens[1, t + 1] = alike[1].argmax(1)
    return tokens

def track(run):
    """Fig. 7: regions followed by heatmaps and by features alone, and how far from true tracks."""
    level_names(run.model)
    p = run.cfg.patch
    grid = run.cfg.size // p
    if run.on_scenes:
        clips = run.truth(run.scenes("eval", 8), range(16), points=8)
    else:
        clips = dict(video=run.clips(8, 3, stride=6))           # of 30 frames a second: 0.2 s
    off = {}
    shown = []
    for b, video in enumerate(clips["video"]):
        if run.on_scenes:
            hidden = ~clips["visible"][b]                                   # (T, P)
            truth = clips["tracks"][b].masked_fill(hidden[..., None], math.nan)
            x, y = (truth[0] / p).long().unbind(-1)
            start = y * grid + x
        else:
            start = changed_tokens(run.model, video[None, [0, -1]], 4)[0]
        both = yx(follow_tokens(run.model, video, start, DRAWS, run.args.seed), grid)
        both = ((both + 0.5) * p - 0.5).flip(-1)                            # pixels, x and y
        ways = {"heatmap and features": both[0], "features alone": both[1]}
        if run.on_scenes:
            still = both[0, :1].expand_as(truth)
            for name, way in (ways | {"stays put": still}).items():
                off.setdefault(name, []).append((way - truth)[1:].norm(dim=-1).flatten() / p)
            ways["truth"] = truth
        shown.append(("", [as_images(video[-1])] * len(ways), ways))
    figure, axes = image_grid([row[:2] for row in shown[:4]], list(ways), width=2.2)
    for line, (*_, ways) in zip(axes, shown):
        for axis, way in zip(line, ways.values()):
            x, y = way[:, :5].permute(2, 0, 1).cpu().numpy()                # of five points
            axis.plot(x, y, "o-", markevery=[len(x) - 1])
    run.picture(figure, "track.png")
    if off:
        rows = [[name, torch.cat(parts).nanmean().item()] for name, parts in off.items()]
        run.table(f"tracks: mean distance from the truth, patches of {p} pixels, {grid} x {grid}",
                  ["patches"], rows)

# ---- MooG: points, boxes, depth ------------------------------------------------------------------
POOL = 1024         # our choice: clips that readouts learn from
TESTS = 64          # held-out ones
POINTS = 16         # of a clip
FRAMES = 8

def square_clip(item, size, device):
    """A sample of data.PointTracks or BoxTracks, squashed as in TAP-Vid, places as shares of the
    frame: video (T, 3, S, S), depth (T, S, S), tracks (T, P, 2), boxes y1 x1 y2 x2 (T, K, 4) cut
    off at the rim, `inside` (T, K): more than half of a box is in the frame."""
    clip = to_device({name: torch.as_tensor(x) for name, x in item.items()}, device)
    T, H, W, _ = clip["video"].shape
    sides = torch.tensor([W, H], device=device)
    video = clip["video"].movedim(-1, 1)
    clip["video"] = F.interpolate(video, (size, size), mode="bilinear", antialias=True)
    if "tracks" in clip:
        clip["tracks"] = (clip["tracks"] + 0.5) / sides         # pixels' centres are integers
    if "depth" in clip:
        clip["depth"] = F.interpolate(clip["depth"][None], (size, size), mode="nearest-exact")[0]
    if "boxes" in clip:
        boxes = (clip["boxes"].view(T, -1, 4) + 0.5) / sides.repeat(2)
        boxes = boxes[..., [1, 0, 3, 2]]
        clip["boxes"] = boxes.clamp(0, 1)
        clip["inside"] = box_area(clip["boxes"]) > box_area(boxes) / 2
    return clip

def random_window(clip, frames, generator):
    """A random window of a clip, a batch of one, with POINTS points of those that are seen in it,
    each given where it is seen first; none counts if none is seen."""
    start = torch.randint(len(clip["video"]) - frames + 1, (1,), generator=generator).item()
    out = {name: x[start:start + frames] for name, x in clip.items() if name != "query_frames"}
    if "tracks" in clip:
        seen = out["visible"] & out["valid"]                                # (frames, P)
        weight = seen.any(0).float().cpu() + 1e-9
        drawn = torch.multinomial(weight, POINTS, replacement=True, generator=generator)
        for name in ("tracks", "visible", "valid"):
            out[name] = out[name][:, drawn.to(seen.device)]
        seen = out["visible"] & out["valid"]
        out["valid"] &= seen.any(0)
        out["query_frames"] = seen.int().argmax(0)
    return {name: x[None] for name, x in out.items()}

def scene_clips(run, split, count):
    """Scenes as random_window's. Points are on sprites: plain ground can't be followed."""
    scenes = run.scenes(split, max(run.cfg.frames, FRAMES))
    generator = torch.Generator().manual_seed(run.args.seed)
    clips = []
    for i in tqdm(range(count), f"clips, {split}", **BAR):
        number = 10**6 + i                  # far from those that small presets learn from
        scene = {name: x[0] for name, x in scenes.batch([number], True, 8 * POINTS).items()}
        x, y = scene["tracks"][0].long().unbind(-1)
        sprite = scene["ids"][0, y, x] > 0                                  # (P,)
        chosen = sprite if sprite.any() else ~sprite
        visible = scene["visible"][:, chosen]
        clip = dict(depth=scene["depth"], boxes=scene["boxes"], tracks=scene["tracks"][:, chosen],
                    video=(255 * scene["video"]).round().byte().movedim(1, -1), visible=visible,
                    valid=torch.ones_like(visible))
        clip = square_clip(clip, run.cfg.size, run.args.device)
        clips.append(random_window(clip, scenes.frames, generator))
    return clips

@cache
def scene_pool(run):
    """What readouts learn from, a place for features, what they are tested on."""
    tests = scene_clips(run, "eval", TESTS)
    tests = [joined(tests[i:i + 16]) for i in range(0, TESTS, 16)]
    return joined(scene_clips(run, "train", POOL)), {}, tests

class ClipTask(Task):
    """Readouts of MooG learn from a pool of clips, whose frozen features are kept."""
    steps = 800
    lr = 3e-3
    frames = "video"                        # in a batch
    wanted = ""                             # what the clips must hold

    def prepare(self):
        """Of real clips the last third, at least one, is for the test; scenes if none is left."""
        run = self.run
        if run.on_scenes:
            self.title = f"{self.name} in held-out scenes"
            self.pool, self.features_of, self.testing = scene_pool(run)     # serves all tasks
            self.tests = len(self.testing)
            return
        items = (data.BoxTracks if self.wanted == "boxes" else data.PointTracks)(run.args.data)
        clips = [square_clip(item, run.cfg.size, run.args.device) for item in items]
        self.tests = max(len(clips) // 3, 1)
        learnt = clips[:-self.tests]
        if self.wanted not in clips[0] or self.wanted == "depth" and not learnt:
            raise UserError(f"--data {run.args.data}: --task {self.name} wants clips with "
                            f"{self.wanted}; of depth, two or more")
        generator = torch.Generator().manual_seed(run.args.seed)
        frames = min([max(run.cfg.frames, FRAMES), *(len(clip["video"]) for clip in learnt)])
        rounds = (learnt * POOL)[:POOL // 4]
        windows = [random_window(clip, frames, generator) for clip in rounds]
        self.pool = joined(windows or scene_clips(run, "train", POOL))
        self.features_of = {}
        self.testing = [{name: x[None] for name, x in clip.items()} for clip in clips[-self.tests:]]
        where = f"{len(learnt)} clips, perhaps of the same shot" if learnt else "scenes"
        names = ", ".join(items.names[-self.tests:])
        self.title = f"{self.name}; trained on {where}, tested on {names}"

    def train_batches(self, steps):
        generator = torch.Generator().manual_seed(self.args.seed)
        size = (steps, self.args.batch_size)
        pool = len(self.pool["video"])
        for at in torch.randint(pool, size, generator=generator).to(self.args.device):
            yield {name: x[at] for name, x in self.pool.items()} | dict(at=at)

    def features(self, model, batch):
        if "at" not in batch or self.args.finetune:
            return model.unroll(batch["video"]).features                    # (B, T, M, D)
        if model not in self.features_of:
            parts = [model.unroll(some).features.half() for some in self.pool["video"].split(8)]
            self.features_of[model] = torch.cat(parts)
        return self.features_of[model][batch["at"]].float()

    def head(self, model):
        dim = model.cfg.dim         # our choice: the paper's at 512, narrower and 2 layers if small
        heads = max(dim // 64, 1) if dim >= 128 else math.gcd(dim, 4)
        spec = (3 if dim >= 256 else 2, heads, dim)
        return self.readout(dim, dim, spec, 4 * dim, model.cfg.decoder_bases)

    def loss(self, prediction, batch):
        return prediction[-1]

class Points(ClipTask):
    name = "points"
    wanted = "tracks"
    readout = moog.PointReadout

    def queries(self, batch):
        """Frames that queries are given in (B, K); what they say (B, K, 2 or 4)."""
        target = batch[self.wanted]                                         # (B, T, K, 2 or 4)
        boxes = self.wanted == "boxes"
        frames = 0 * batch["inside"][:, 0].long() if boxes else batch["query_frames"]
        rows = torch.arange(len(target), device=target.device)[:, None]
        return frames, target[rows, frames, torch.arange(target.shape[2], device=target.device)]

    def counted(self, batch):
        """Where points are visible, and where that counts, as for TAP-Vid: (B, T, K)."""
        time = torch.arange(batch["visible"].shape[1], device=self.args.device)[:, None]
        return batch["visible"], batch["valid"] & (time > batch["query_frames"][:, None])

    def predict(self, head, features, batch):
        frames, given = self.queries(batch)
        out = head(features, given, frames)
        return out.values, out.visible, head.loss(out, batch[self.wanted], *self.counted(batch))

    def baselines(self, batch):
        start = self.queries(batch)[1][:, None].expand_as(batch[self.wanted])
        return {"stays put": (start, torch.ones_like(start[..., 0]))}

    def measure(self, prediction, batch):
        tracks, visible = prediction[:2]
        true, valid = self.counted(batch)
        away = 256 * (tracks - batch["tracks"]).norm(dim=-1).where(true & valid, torch.nan)
        inputs = [256 * tracks, visible, 256 * batch["tracks"], true, valid]
        *inputs, valid = (x.transpose(1, 2) for x in inputs)                # (B, K, T, ...)
        metrics = tracking_metrics(*inputs, batch["query_frames"], valid=valid)
        return {"mean distance, pixels of 256": away.flatten(1).nanmean(1),
                "delta_avg": metrics["delta_avg"], "average Jaccard": metrics["average_jaccard"]}

class Boxes(Points):
    name = "boxes"
    wanted = "boxes"
    readout = moog.BoxReadout

    def counted(self, batch):
        """Boxes of which more than half lies in the frame, now and in frame 0."""
        inside = batch["inside"] & batch["inside"][:, :1]
        return inside, inside

    def measure(self, prediction, batch):
        order = [1, 0, 3, 2]                        # box_iou wants x1 y1 x2 y2
        iou = box_iou(prediction[0][..., order], batch["boxes"][..., order])
        return {"mean intersection over union": iou[:, 1:][self.counted(batch)[0][:, 1:].cpu()]}

class Depth(ClipTask):
    """Depth of every pixel. our choice: the readout begins as the model's own decoder, with the
    median as its answer, and has a squared loss; else it stayed at the median."""
    name = "depth"
    wanted = "depth"
    steps = 300

    def prepare(self):
        super().prepare()
        measured = self.pool["depth"][::4, ::2]
        self.median = measured[measured > 0].median()

    def head(self, model):
        cfg = model.cfg
        readout = moog.DepthReadout(cfg.dim, cfg.decoder, cfg.mlp, cfg.decoder_bases)
        readout.transformer.load_state_dict(model.decoder.transformer.state_dict())
        readout.recon.weight.data *= 0.1
        readout.recon.bias.data.fill_(self.median)
        return readout

    def train_batches(self, steps):
        for batch in super().train_batches(steps):
            B, T, *size = batch["depth"].shape
            factor = math.gcd(size[0], 8)
            offsets = torch.randint(factor, (B, T, 2), device=self.args.device)
            yield batch | dict(index=moog.subsample(size, factor, offsets))         # (B, T, P)

    def predict(self, head, features, batch):
        index = batch["index"].flatten(0, 1)
        out = head(features.flatten(0, 1), batch["depth"].shape[-2:], index)
        return out.unflatten(0, features.shape[:2])

    def loss(self, prediction, batch):
        target = moog.gather_pixels(batch["depth"][:, :, None], batch["index"])
        error = torch.where(target > 0, prediction - target, 0).square()
        return error.sum() / (target > 0).sum().clamp(min=1)

    def test(self, model, head, batch):
        size = batch["depth"].shape[-2:]
        pixels = torch.arange(size.numel(), device=self.args.device)
        frames = self.features(model, batch).flatten(0, 1).split(1)         # memory: one by one
        return torch.cat([head(some, size, pixels) for some in frames]).view_as(batch["depth"])

    def baselines(self, batch):
        return {"median": torch.full_like(batch["depth"], self.median)}

    def measure(self, prediction, batch):
        return dict(abs_rel=torch.tensor(list(map(abs_rel, prediction, batch["depth"]))))

    def paint(self, prediction, batch):
        true = batch["depth"][0, 0].cpu().numpy()
        depth = true if prediction is None else prediction[0, 0].cpu().numpy()
        nearest = true[true > 0].min()
        colours = plt.get_cmap("cividis_r")((depth - nearest) / (true.max() - nearest))[..., :3]
        return np.where(depth[..., None] > 0, colours, 0)                   # not measured: black

# ---- MooG: tokens, long clips --------------------------------------------------------------------
def attention(model, states):
    """Of pixels to tokens (B, T, N, D), mean over the last layer's heads: (B, T, H*W, N)."""
    size = (model.cfg.size, model.cfg.size)
    seen = [model.decode(state[None, None], size, return_attention=True)[1][0, 0].mean(0)
            for state in states.flatten(0, 1)]                              # memory: one by one
    return torch.stack(seen).unflatten(0, states.shape[:2])

def tokens(run):
    model = run.model
    S = run.cfg.size
    video = run.clips(12, 4)
    states = model.predict_ahead(video[:, :-1])[:2, :8]                     # (2, 8, N, D)
    N = states.shape[2]
    frames = as_images(video[:2, :8])                                       # (2, 8, S, S, 3)
    seen = attention(model, states)                                         # (2, 8, S*S, N)
    top = seen.argmax(-1).cpu()
    generator = torch.Generator().manual_seed(run.args.seed)
    colours = plt.get_cmap("hsv")(torch.rand(N, generator=generator).numpy())[:, :3]
    colours *= 0.45 + 0.55 * torch.rand(N, 1, generator=generator).numpy()
    painted = colours[top].reshape(frames.shape)
    kinds = {"frame": frames, "predicted": as_images(model.decode(states, (S, S))),
             "tokens": 0.75 * painted + 0.25 * frames.mean(-1, keepdims=True)}
    rows = [(name, images[0]) for name, images in kinds.items()]
    rows += [(name, images[1]) for name, images in kinds.items()]
    run.picture(image_grid(rows, [f"t = {t}" for t in range(8)], 1.1)[0], "tokens.png")
    frames = np.stack(list(kinds.values()), 2)                              # (2, 8, 3, S, S, 3)
    rows = [[(f"t = {t}", frames[0, t]), (f"t = {t}", frames[1, t])] for t in range(8)]
    run.gif((image_grid(both, list(kinds))[0] for both in rows), "tokens.gif")
    seen = seen[:, 1:]                                          # frame 0 is decoded from noise
    entropy = -(seen * seen.clamp(min=1e-12).log()).sum(-1).mean().item()
    rows = {"entropy of a pixel's attention, share of log N (1: all tokens alike)":
            entropy / math.log(N),
            "share of tokens that some pixel looks at most": len(top[:, 1:].unique()) / N}
    if run.on_scenes and run.scenes().options.sprites:
        rows |= follow_tracks(run)
    run.table("tokens", ["this model"], list(rows.items()))

def follow_tracks(run):
    """How often the token that a sprite's point looks at most stays the same from frame to frame:
    where it went, at the place that it has left to another layer, and at another point's."""
    model = run.model
    S = run.cfg.size
    clips = run.truth(run.scenes("eval", max(model.cfg.frames, 8)), range(1000, 1032), points=256)
    states = [model.predict_ahead(clip[:, :-1]) for clip in clips["video"].split(4)]
    top = torch.cat([attention(model, some).argmax(-1) for some in states])     # (B, T, H*W)
    tracks = clips["tracks"]                                                # (B, T, P, 2)
    ids = clips["ids"].flatten(2)                                           # (B, T, H*W)
    x, y = tracks.round().long().clamp(0, S - 1).unbind(-1)
    index = y * S + x                                                       # (B, T, P)
    left = index[:, :-1]                                        # where the point was at t - 1
    sprite = ids[:, :1].gather(2, index[:, :1])                             # (B, 1, P)
    visible = clips["visible"] & ((tracks >= 0) & (tracks <= S - 1)).all(-1)
    counts = visible[:, 1:] & visible[:, :-1] & (sprite > 0)
    counts &= ids[:, 1:].gather(2, left) != sprite
    counts[:, 0] = False                                        # frame 0 is decoded from noise
    went = top[:, 1:].gather(2, index[:, 1:])
    places = {"where it went": went, "where it was": top[:, 1:].gather(2, left),
              "at another point": went.roll(1, 2)}
    kept = {name: (x == top[:, :-1].gather(2, left))[counts] for name, x in places.items()}
    return {f"a sprite's point keeps its token, {name}": x.float().mean().item()
            for name, x in kept.items()}

def predict_open_loop(model, video, ahead):
    """The states of `ahead` frames after a video (B, T, 3, H, W), by the predictor alone."""
    state = model.unroll(video).last
    states = []
    for _ in range(ahead):
        predicted = model.predict(state)
        states.append(state if model.cfg.released else predicted)
        state = predicted if model.cfg.released else model.state_norm(predicted)
    return torch.stack(states, 1)                                           # (B, ahead, N, D)

def unroll(run, T=36):
    """PSNR of long clips with more or fewer tokens, and of 1 to 8 frames in open loop."""
    model = run.model
    cfg = run.cfg
    size = (cfg.size, cfg.size)
    factor = 1 if cfg.decoder_self_attention else math.gcd(cfg.size, 4)
    index = moog.subsample(size, factor).to(run.args.device)
    def pixels(video):
        return moog.gather_pixels(video, index.expand(*video.shape[:2], -1))    # (B, T, P, 3)
    def curve(guess, target):
        error = (guess - target).square().mean((2, 3)).clamp(min=1e-10)
        return (-10 * error.log10()).mean(0).tolist()
    def decoded(video, predict):
        return torch.cat([model.decode(predict(some), size, index) for some in video.split(4)])
    if run.on_scenes:       # in longer clips sprites pass by: 8 frames, forth and back, hold them
        video = run.clips(8, 32)[:, [min(t % 14, 14 - t % 14) for t in range(T)]]
    else:
        video = run.clips(T, 16)
    true = pixels(video)
    curves = {}
    for share in (1,) if cfg.grid else (0.25, 0.5, 1, 2):
        tokens = max(round(share * cfg.tokens), 1)
        guess = decoded(video, lambda some: model.predict_ahead(some[:, :-1], tokens=tokens))
        curves[f"{share:g}x tokens"] = curve(guess[:, 1:], true[:, 1:])
    curves["copy"] = curve(true[:, :-1], true[:, 1:])
    rows = [[f"t = {a}-{b}", *(statistics.fmean(x[a - 1:b]) for x in curves.values())]
            for a, b in ((1, 7), (8, 15), (16, 23), (24, 35))]
    run.table(f"PSNR in dB of {len(video)} clips' frames, predicted from those before; trained on "
              f"{cfg.frames} frames", list(curves), rows)
    video = run.clips(cfg.frames + 8, 64)
    true = pixels(video)
    blind = decoded(video, lambda some: predict_open_loop(model, some[:, :-8], 8))
    loop = curve(blind, true[:, -8:])
    copy = curve(true[:, -9:-8], true[:, -8:])
    rows = [[f"frame {t} after it", loop[t - 1], copy[t - 1]] for t in (1, 2, 4, 8)]
    run.table(f"open loop: PSNR in dB after {cfg.frames} frames, without seeing more",
              ["blind prediction", "copying the last frame seen"], rows)

# ---- MeloMotion: many trainings at once ----------------------------------------------------------
EPOCH = 2000                            # clips, one a step. report: Sec. 4.1
ROUNDS = 7                              # of the stopwatch
DIFF, ALL, RANDOM, _ = data.MODES       # who moves: the first object, all, a random one

@cache
def pooled_clips(pooling, mode, seed, epoch, split="train"):
    """What predictors see of an epoch: `pooled` (EPOCH, N, 3 or 16), and `displacements`."""
    model = MeloMotion(Config(pooling=pooling))
    squares = data.MovingSquares(mode=mode, seed=seed, split=split, video=False)
    parts = []
    for some in torch.arange(EPOCH).split(20):          # few at a time, as caches like it
        batch = squares.batch(epoch * EPOCH + some)
        pooled = model.pool(model.extract(batch["first_frame"], batch["masks"]))
        parts.append(dict(pooled=pooled, displacements=batch["displacements"]))
    return joined(parts)

@torch.enable_grad()
def train_together(models, mode, optimizer, epochs=2, **options):
    """Trains R models of one Config, one clip a step, model i on clips of seed i -> mean POS of the
    epochs, epochs x R. AdamW and SGD treat each number by itself, so a step of stacked weights is
    R steps. our choice: 2 epochs, as the claim is of two."""
    params = {name: p for name, p in stack_module_state(models)[0].items() if p.requires_grad}
    optimizer = optimizer(params.values(), **options)
    forward = vmap(lambda weights, batch: functional_call(models[0], weights, (batch,)))
    history = []
    for epoch in range(epochs):
        clips = [pooled_clips(model.cfg.pooling, mode, i, epoch) for i, model in enumerate(models)]
        clips = {name: torch.stack([c[name] for c in clips], 1) for name in clips[0]}
        total = torch.zeros(len(models))
        for i in tqdm(range(EPOCH), f"epoch {epoch + 1} of {epochs}", **BAR):
            batch = {name: x[i, :, None] for name, x in clips.items()}      # (R, 1, N, ...)
            loss, logs = forward(params, batch)
            loss.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            total += logs["pos"]
        history.append((total / EPOCH).tolist())
    for i, model in enumerate(models):
        model.load_state_dict({name: p[i] for name, p in params.items()}, strict=False)
    return history

@torch.no_grad()
def measure(models, mode):
    """What TABLES show, on clips never seen in training: {heading: [a number for each model]}."""
    clips = pooled_clips(models[0].cfg.pooling, mode, 0, 0, "eval")
    pooled = clips["pooled"]                            # (clips, N, 3 or 16)
    d = clips["displacements"]                          # (clips, N, T-1, 2)
    true = d[:, :1, 0]                                  # v of object 0, (clips, 1, 2)
    rows = []
    for model in models:
        f = model.features(pooled)                      # (clips, N, 64)
        v = model.predictors(f)                         # (clips, N, 2)
        hidden = model.predictors.hidden(f)             # (N, clips, 32), or (1, N * clips, 32)
        others = model.velocities(pooled.roll(1, 1))    # what each says of its neighbour
        rows.append({
            "POS": position_loss(v, d),
            "POS, nothing moves": position_loss(torch.zeros_like(v), d),
            "POS, objects permuted": position_loss(others, d.roll(1, 1)),
            "features differ by": (f - f.roll(1, 1)).abs().mean(),      # of the three pairs
            "outputs differ": (v.amax(1) - v.amin(1)).max() > 1e-6,     # 1: yes
            "dead units": (hidden.amax(1) <= 0).float().mean(),         # no clip wakes them
            "object 0, slope of v on truth": (v[:, :1] * true).sum() / true.square().sum(),
            "others, mean |v|": v[:, 1:].abs().mean()})
    return {name: [float(row[name]) for row in rows] for name in rows[0]}

# ---- MeloMotion: tables --------------------------------------------------------------------------
ADAMW = dict(optimizer=torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=1e-5)
SGD = dict(optimizer=torch.optim.SGD, lr=1e-2)
SHARED = dict(shared_predictor=True)
TRAININGS = {                           # name: changes of Config, who moves, how it is trained
    "decoupled, six epochs": ({}, DIFF, ADAMW | dict(epochs=6)),        # report: Sec. 4.1
    "decoupled": ({}, DIFF, ADAMW),
    "decoupled, all move": ({}, ALL, ADAMW),
    "decoupled, random mover": ({}, RANDOM, ADAMW),
    "shared": (SHARED, DIFF, ADAMW),
    "shared, rate 1e-3": (SHARED, DIFF, ADAMW | dict(lr=1e-3)),
    "shared, random mover": (SHARED, RANDOM, ADAMW),
    "shared + object index": (SHARED | dict(object_index=True), DIFF, ADAMW),
    "average, SGD, all move": (dict(pooling="avg"), ALL, SGD),
    "maximum, SGD, all move": (dict(pooling="max"), ALL, SGD),
    "mean RGB, SGD, all move": ({}, ALL, SGD),
    "not divided, all move": (dict(normalize=False), ALL, ADAMW),
    "not divided, SGD, all move": (dict(normalize=False), ALL, SGD),
}
TABLES = {                              # title: headings, {training: what the report says of it}
    "Section 4.4: who moves": (
        ["object 0, slope of v on truth", "others, mean |v|"],
        {"decoupled, six epochs": "others <= .001"}),
    "Table 3: one predictor or three": (
        ["outputs differ", "dead units", "POS", "POS, nothing moves", "POS, objects permuted"],
        {"decoupled": "outputs differ", "shared": "they don't", "shared, rate 1e-3": "",
         "shared + object index": "", "decoupled, random mover": "", "shared, random mover": ""}),
    "Table 4: pooling; features before training": (
        ["features differ by", "POS", "POS, nothing moves"],
        {"average, SGD, all move": ".003, does not converge",
         "maximum, SGD, all move": ".031, partial", "mean RGB, SGD, all move": ".045, converges",
         "decoupled": ".045, converges"}),
    "Section 3.4: division by t^2": (
        ["POS", "POS, nothing moves"],
        {"decoupled, all move": "", "not divided, all move": "unstable",
         "mean RGB, SGD, all move": "", "not divided, SGD, all move": "unstable"}),
}

def melomotion_tables(run):
    """The report's tables beside ours. Left out: L1 in Table 2, flat as no gradient passes from
    frames to velocities; 225 : 1 in Section 3.4, which is a test."""
    torch.set_num_threads(1)            # small tensors; and Sec. 4.8 counts seconds of one core
    table1(run)
    this_checkpoint(run)
    results = {}
    for name, (change, mode, options) in TRAININGS.items():
        models = []
        for seed in range(run.args.seeds):
            torch.manual_seed(seed)
            models.append(MeloMotion(Config(**change)))
        before = measure(models, mode)
        history = train_together(models, mode, **options)
        results[name] = measure(models, mode) | dict(history=history)
        results[name]["features differ by"] = before["features differ by"]
    rows = [["report", 2e-4, 1e-4, 1e-4, "< 1e-4", "< 1e-4", "< 1e-4"],
            ["ours", *results["decoupled, six epochs"]["history"]],
            ["all move", *results["decoupled, all move"]["history"], "", "", "", ""]]
    run.table("Table 2: POS, means of steps", [f"epoch {i + 1}" for i in range(6)], rows)
    for title, (headings, trainings) in TABLES.items():
        rows = []
        for name, says in trainings.items():
            rows.append([name, says, *[results[name][heading] for heading in headings]])
        run.table(title, ["report", *headings], rows)
    speed(run)

def table1(run):
    report = dict(predictors=6438, rgb_proj=256, camera=742, encoder=1088, decoder=34587)
    def count(part):
        return sum(p.numel() for p in part.parameters())
    ours = {name: count(getattr(MeloMotion(Config()), name)) for name in report}
    baseline = count(FlowBaseline())                                    # with a decoder
    run.table("Table 1: parameters", ["report", "ours"], [
        *([name, number, ours[name]] for name, number in report.items()),
        ["total", 43111, sum(ours.values())],
        ["baseline's Swin", "323K", baseline - ours["decoder"]],
        ["baseline with all but predictors", "441K", baseline + ours["encoder"] + ours["camera"]]])

def own_squares(model, frames, numbers):
    """Held-out clips of the kind that a model was trained on, of any length."""
    options = model.cfg.inputs["squares"] | dict(video=True)
    return data.MovingSquares(model.cfg.size, frames, split="eval", **options).batch(numbers)

def this_checkpoint(run):
    model = run.model
    batch = own_squares(model, 64, range(50))
    d = batch["displacements"]                                          # (B, N, 63, 2)
    v = model.motion(batch)                                             # (B, N, 2)
    rows = [["POS", position_loss(v, d).item(), position_loss(0 * v, d).item()]]
    for t in (15, 31, 63):
        true = d[:, :, t - 1]
        pixels = [model.cfg.size * x.norm(dim=-1).mean().item() for x in (t * v - true, true)]
        rows.append([f"pixels off at t = {t}", *pixels])
    run.table(f"This checkpoint, held out, {model.cfg.mode}", ["model", "nothing moves"], rows)

@torch.enable_grad()
def speed(run):
    """Sec. 4.8: steps of training, each way in turn, medians of the rounds."""
    clip = data.MovingSquares().batch([0])
    bare = data.MovingSquares(video=False).batch([0])
    ways = {                            # name: model, batch, steps of a round
        "flow baseline: 15 times Swin and warp, decoder": (FlowBaseline(), clip, 1),
        "flow baseline, one-shot: Swin, 15 warps, decoder": (FlowBaseline(one_shot=True), clip, 4),
        "MeloMotion, frames drawn": (MeloMotion(Config()), clip, 10),
        "MeloMotion, nothing drawn": (MeloMotion(Config()), bare, 200)}
    rates = {name: [] for name in ways}
    for _ in tqdm(range(ROUNDS), "Section 4.8", **BAR):
        for name, (model, batch, steps) in ways.items():
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            begin = time.process_time()
            for _ in range(steps):
                loss, _ = model(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            rates[name].append(steps / (time.process_time() - begin))
    base, *_ = medians = [statistics.median(rate) for rate in rates.values()]
    rows = [[name, rate, rate / base] for name, rate in zip(ways, medians)]
    run.table("Section 4.8: steps of one clip, one thread (report: 100 against 12 a second, MPS)",
              ["clips per CPU-second", "times the baseline"], rows)

def with_paths(videos, paths, times, width):
    """Frames `times` of {name: video}; on each, the true and the predicted paths so far."""
    rows = [(name, video[times]) for name, video in videos.items()]
    figure, axes = image_grid(rows, [f"t = {t}" for t in times], width,
                              note="white: true paths, red: predicted")
    for line in axes:
        for axis, t in zip(line, times):
            for path, colour, thick in zip(paths, ("white", "tab:red"), (3, 1.2)):
                x, y = path[:t + 1].unbind(-1)                          # (t+1, N), a line each
                axis.plot(x, y, "o-", markevery=[t], color=colour, lw=thick, ms=2 * thick)
    return figure

def figures(run):
    """figure1.png, the report's Figure 1, and motion.gif, twice as long."""
    model = run.model
    batch = own_squares(model, 32, [29])
    t = torch.arange(32)[:, None]
    true = t * batch["displacements"][:, :, :1]                         # (1, N, T, 2)
    ours = t * model.motion(batch)[:, :, None]
    # our choice: pixels are placed, not latents, as phase 1 has no trained decoder
    objects = batch["first_frame"][:, None] / 255 * batch["masks"][:, :, None]    # (1, N, 3, H, W)
    drawn = place(objects, ours)[0].amax(0)                             # (T, 3, H, W)
    videos = dict(truth=as_images(batch["video"][0]), prediction=as_images(drawn))
    start = torch.stack([mask.nonzero().float().mean(0).flip(0) for mask in batch["masks"][0]])
    paths = [start + model.cfg.size * d[0].transpose(0, 1) for d in (true, ours)]
    run.picture(with_paths(videos, paths, [0, 3, 6, 9, 12, 15], 1.5), "figure1.png")
    run.gif((with_paths(videos, paths, [t], 2.6) for t in range(32)), "motion.gif", 120)

# ---- command line --------------------------------------------------------------------------------
# model: {task: function of a Run, or the Task of a readout}
TASKS = {
    "midway": {"latents": latents, "heatmap": heatmap, "identity-bias": identity_bias,
               "track": track, "segmentation": Segmentation, "flow": Flow},
    "moog": {"tokens": tokens, "points": Points, "boxes": Boxes, "depth": Depth, "unroll": unroll},
    "melomotion": {"tables": melomotion_tables, "figures": figures}}

def parse(argv):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    path = os.path.expanduser
    add("checkpoint", help="ckpt.pt of train.py or its folder, or the authors' .pth or .npz")
    add("--task", default="all", help="one of the model's tasks [all]")
    add("--out", default="", type=path, help="folder for results and pictures [the checkpoint's]")
    add("--data", default="scenes", type=path, help="scenes, or a path [scenes]")
    add("--seed", type=int, default=0, help="of samples, readouts and noise [0]")
    add("--seeds", type=int, default=3, help="MeloMotion: how often each ablation is trained [3]")
    add("--device", default="", help="cuda, mps or cpu [the first that is there]")
    add("--steps", type=int, default=0, help="training steps of a readout [the task's default]")
    add("--batch-size", type=int, default=16, help="samples per training step of a readout [16]")
    add("--lr", type=float, default=0.0, help="learning rate of a readout [1e-3; moog 3e-3]")
    add("--finetune", action="store_true", help="train the model together with the readout")
    add("--head", choices=("linear", "upernet"), default="linear", help="of segmentation [linear]")
    add("--features", choices=("backward", "encoder"), default="encoder", help="paper: backward")
    add("--classes", type=int, default=0, help="segmentation: how many [what the folder says]")
    add("--ignore-index", type=int, help="segmentation: label to leave out [the folder's, or 255]")
    add("--at", type=float, nargs=2, metavar=("X", "Y"), help="heatmap: where, from 0 to 1")
    add("--time", type=float, help="heatmap: seconds at which the pair of a video begins")
    add("--against", default="", type=path, help="identity-bias: another Midway")
    add("--gap", type=float, nargs=2, default=(0.5, 1.0), help="seconds between frames [0.5 1]")
    return parser.parse_args(argv)

@torch.no_grad()                    # readouts ask for gradients where they learn
def main(argv):
    args = parse(argv)
    model, name, config, path = load(args.checkpoint)
    tasks = TASKS[name]
    if args.task not in ("all", *tasks):
        raise UserError(f"{name} has no task {args.task!r}: choose from {', '.join(tasks)}")
    args.device = train.choose_device(args.device if name != "melomotion" else "cpu")
    out = Path(args.out) if args.out else path.parent
    out.mkdir(parents=True, exist_ok=True)
    run = Run(model.to(args.device), config, args, out)
    for task in tasks if args.task == "all" else [args.task]:
        start = time.perf_counter()
        run.tables = {}
        torch.manual_seed(args.seed)
        try:
            result = tasks[task](run)
            if isinstance(result, Task):
                probe(run, result)
        except (UserError, ValueError, OSError) as error:
            if args.task != "all":
                raise
            tqdm.write(f"\nleft out: {task}: {error}")    # no use for model or data
            continue
        results = out / "results.json"                                  # other tasks' stay
        entries = json.loads(results.read_text()) if results.exists() else {}
        entries[task] = dict(
            command=["eval.py", *argv], checkpoint=str(path), seed=args.seed, seeds=args.seeds,
            versions=dict(python=platform.python_version(), torch=torch.__version__),
            device=str(args.device), seconds=round(time.perf_counter() - start), tables=run.tables)
        results.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"\nresults.json and pictures are in {out}")

def cli(argv):
    """main(), but what the user can mend is told in one line."""
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("eval.py: error: out of memory: lower --batch-size, or --device cpu")
    except (UserError, AssertionError, ValueError, OSError) as error:
        sys.exit("eval.py: error: " + " ".join(str(error).split()))

if __name__ == "__main__":
    cli(sys.argv[1:])
