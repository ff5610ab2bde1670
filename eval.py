"""
A checkpoint in, tables and pictures out.

    python eval.py out/midway-tiny                      # every task that its model has, on synthetic scenes
    python eval.py out/midway-tiny --task segmentation --data PATH/TO/LABELLED
    python eval.py out/midway-tiny --task identity-bias --against out/midway-ungated
    python eval.py PATH/midway-bdd-vit-s-ep300.pth --task heatmap --data clip.mp4       # the authors' weights
    python eval.py out/moog-tiny --task points --data PATH/TO/RGBD --out out/points
    python eval.py out/melomotion-report --task tables --seeds 10 --out out/tables

Tasks of midway
    latents         do the motion latents carry motion: errors with the right latents, others, none; variance
                    and rank; on scenes also whether a linear readout can tell the camera's motion from them
    heatmap         where the forward model takes a token of the source (Fig. 6): heatmap.png
    identity-bias   on scenes, how often that is where the token came from; gated and not, with --against
    track           regions followed by heatmaps (Fig. 7), against true tracks where there are any: track.png
    segmentation    linear or UperNet readout, frozen or --finetune: mIoU and segmentation.png
    flow            DPT readout of optical flow, frozen or --finetune, large images in tiles: flow.png

    --data for segmentation: CamVid, Cityscapes, BDD100K or ADE20K as unpacked, or images/ and labels/; for
    flow: Sintel, FlyingChairs, FlyingThings3D or KITTI as unpacked, or folders with frame1.png, frame2.png
    and flow.flo; see data.py. Where flow has no training split, its readout learns on scenes and is tested on
    all pairs. For heatmap, latents and track: videos; track also takes RGB-D clips, TAP-Vid's .pkl, and a
    video with --tracks. The dynamics want frames as large as in training: others are made so.

Tasks of moog
    tokens    what each token is of: tokens.png and tokens.gif paint each pixel in the colour of the token
              that it looks at most; on scenes, how often that is still the same token one frame later.
              tokens_single.png: where four tokens are looked at; tokens_pca.png: their leading components
    points    a readout learns to follow points: TAP-Vid's metrics and points.png
    boxes     the same for boxes: intersection over union and boxes.png
    depth     a readout learns the depth of each pixel: depth.png
    unroll    PSNR of predicted frames in clips longer than those of training (scenes: 8 frames, played forth
              and back), and with other numbers of tokens: unroll.png

    Readouts learn from frozen features, with --finetune end to end, on scenes or on --data: a folder of RGB-D
    clips with tracks.npz (points, depth), a TAP-Vid .pkl (points), a folder with boxes_xyxy.txt (boxes). The
    last third of its clips, at least one, is for the test. Beside ours: the same readout on a random MooG,
    and what needs no model. No column of the paper's: its tables could not be verified.

Tasks of melomotion
    tables    all tables of the report beside ours, with the controls that it lacks; trains every ablation
              with --seeds seeds: some 2 minutes on one core for 3
    figures   Figure 1 as figure1.png, and motion.gif, twice as long: truth, prediction, their paths

Tables are printed and, with the command, the seeds and the versions, written to results.json, task by task,
beside the pictures: with the checkpoint, or in --out.
"""
import argparse
import importlib
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from copy import deepcopy
from functools import cache
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")        # as in train.py: waiting CPU threads soon sleep

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import data
import midway
import moog
import train
from melomotion import POOLINGS, Config, FlowBaseline, MeloMotion, place, position_loss, warp
from moog import psnr       # one of the metrics, for whoever imports this file

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Stop = train.UserError


# ---- checkpoints, tables -------------------------------------------------------------------------
def load(path):
    """A checkpoint of train.py, or the authors' (.pth of Midway, .npz of MooG) -> model, its name, config."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    official = {".pth": "midway", ".npz": "moog"}.get(path.suffix)
    if official and path.exists():
        return importlib.import_module(official).load_official(path), official, {}, path
    ckpt = train.read_checkpoint(path)
    name = ckpt["config"]["model"]
    try:
        module = importlib.import_module(name)
        model = getattr(module, train.MODELS[name])(module.Config(**ckpt["config"]["config"]))
        model.load_state_dict(ckpt["model"])
    except (ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Stop(f"{path} does not fit {name}.py: {' '.join(str(error).split())[:200]}") from None
    return model.eval(), name, ckpt["config"], path


class Report:
    """What a run finds out: tables are printed as they come and kept for results.json."""

    def __init__(self, out, seeds):
        self.out, self.seeds, self.tables = out, seeds, {}
        self.lessons = None             # of MooG, clips for its readouts

    def picture(self, figure, name):
        figure.savefig(self.out / name, dpi=110)
        plt.close(figure)

    def table(self, title, columns, rows):
        """Rows are a name and its cells: text, numbers, or lists of numbers, one for each seed."""
        self.tables[title] = [dict(zip(["", *columns], row)) for row in rows]
        text = [["", *columns]] + [[show(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*text)]
        tqdm.write(f"\n{title}\n" + "\n".join(
            "  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])])
            for line in text))


def show(cell):
    """A table's cell as text; of a list mean ± standard deviation."""
    if isinstance(cell, list) and not all(map(math.isfinite, cell)):
        return f"diverged, {sum(not math.isfinite(x) for x in cell)} of {len(cell)}"
    if isinstance(cell, list):
        spread = statistics.stdev(cell) if len(cell) > 1 else 0.0
        return show(statistics.fmean(cell)) + (f" ± {show(spread)}" if spread else "")
    if isinstance(cell, float):
        return f"{cell:.1e}" if 0 < abs(cell) < 1e-3 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def progress(items, what):
    return tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty())


def as_images(video):
    """(..., 3, H, W), uint8 or float -> (..., H, W, 3) for matplotlib, from any device."""
    return moog.as_float(video).movedim(-3, -1).clamp(0, 1).cpu().numpy()


# ---- metrics -------------------------------------------------------------------------------------
def as_double(*arrays):
    return [torch.as_tensor(x).cpu().double() for x in arrays]              # MPS has no float64


def flow_errors(flow, target, valid=None):
    """Lengths of the errors and of the true vectors in pixels, of all valid pixels of flows (B, 2, H, W)."""
    flow, target = as_double(flow, target)
    if flow.shape != target.shape or flow.ndim != 4 or flow.shape[1] != 2:
        raise ValueError(f"flows must both be (B, 2, H, W), not {[*flow.shape]} and {[*target.shape]}")
    valid = target.abs().amax(1) < 1e9 if valid is None else torch.as_tensor(valid).cpu().bool()
    return ((flow - target).norm(dim=1)[valid], target.norm(dim=1)[valid])


def end_point_error(flow, target, valid=None):
    """
    Mean length of the error in pixels: flows (B, 2, H, W), valid (B, H, W), by default where |target| < 1e9.
    nan if no pixel is valid. Raises ValueError if the shapes differ.
    """
    return flow_errors(flow, target, valid)[0].mean().item()


def fl_all(flow, target, valid=None):
    """Per cent of valid pixels that are off by more than 3 pixels and by more than 5 %: KITTI's outliers."""
    error, length = flow_errors(flow, target, valid)
    return 100 * ((error > 3) & (error > 0.05 * length)).double().mean().item()


def confusion(pred, target, num_classes, ignore_index=255):
    """(true class, predicted class) -> pixels, over maps of any shape without those to ignore: (K, K)."""
    pred, target = torch.as_tensor(pred).long(), torch.as_tensor(target).long()
    if pred.shape != target.shape:
        raise ValueError(f"{[*pred.shape]} predictions do not match {[*target.shape]} labels")
    counted = target != ignore_index
    for what, x in (("label", target[counted]), ("prediction", pred[counted])):
        if x.numel() and not (0 <= x.min() and x.max() < num_classes):
            raise ValueError(f"{what} {(x.max() if x.max() >= num_classes else x.min()).item()} is neither a "
                             f"class (0 to {num_classes - 1}) nor the value to ignore ({ignore_index})")
    pairs = target[counted] * num_classes + pred[counted]
    return pairs.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def iou_scores(counts):
    """mean_iou's three numbers from a confusion matrix."""
    counts = counts.cpu().double()
    hit = counts.diagonal()
    per_class = hit / (counts.sum(0) + counts.sum(1) - hit)     # 0 / 0 = nan: in neither, left out
    return per_class.nanmean().item(), per_class, (hit.sum() / counts.sum()).item()


def mean_iou(pred, target, num_classes, ignore_index=255):
    """
    Over all maps (N, H, W) together, as mmsegmentation does: mean intersection over union of the classes that
    are predicted or true somewhere, IoU of each class (K,), nan if it is nowhere, and share of pixels right.
    Raises ValueError on labels out of range.
    """
    return iou_scores(confusion(pred, target, num_classes, ignore_index))


def tracking_metrics(tracks, visible, target_tracks, target_visible, query_frames, mode="first", valid=None):
    """
    TAP-Vid's metrics, each (B,), one number per video: `average_jaccard`, `delta_avg` (share of visible
    points within 1, 2, 4, 8, 16 pixels, mean over these), `occlusion_accuracy`, and jaccard_N, delta_N.
    tracks (B, P, T, 2) in pixels of 256 x 256, visible (B, P, T) bool, query_frames (B, P). mode: "first"
    counts only frames after a point's query, "strided" all but the query's. nan where nothing is to be seen.
    valid (B, P, T): where the truth is known, by default everywhere; the rest is not counted.
    """
    if mode not in ("first", "strided"):
        raise ValueError(f"mode={mode!r} must be 'first' or 'strided'")
    tracks, target = as_double(tracks, target_tracks)
    seen, true = (torch.as_tensor(x).cpu().bool() for x in (visible, target_visible))
    t, query = torch.arange(tracks.shape[2]), torch.as_tensor(query_frames).cpu()[..., None]
    counted = (t > query if mode == "first" else t != query).expand(true.shape)
    counted = counted if valid is None else counted & torch.as_tensor(valid).cpu().bool()
    total = lambda x: (x & counted).sum((1, 2)).double()
    square = (tracks - target).square().sum(-1)
    out = dict(occlusion_accuracy=total(seen == true) / counted.sum((1, 2)))
    for n in (1, 2, 4, 8, 16):
        near = square < n ** 2
        hit = near & true
        out[f"delta_{n}"] = total(hit) / total(true)
        out[f"jaccard_{n}"] = total(hit & seen) / (total(true) + total(seen & ~hit))
    for name, of in (("average_jaccard", "jaccard"), ("delta_avg", "delta")):
        out[name] = torch.stack([out[f"{of}_{n}"] for n in (1, 2, 4, 8, 16)]).mean(0)
    return out


def average_jaccard(tracks, visible, target_tracks, target_visible, query_frames, mode="first"):
    """TAP-Vid's average Jaccard of each video, (B,): see tracking_metrics."""
    return tracking_metrics(tracks, visible, target_tracks, target_visible, query_frames,
                            mode)["average_jaccard"]


def depth_metrics(depth, target, valid=None):
    """abs_rel, rmse (in the target's unit) and delta_1.25, the share within a factor of 1.25; any shapes."""
    depth, target = as_double(depth, target)
    valid = target > 0 if valid is None else torch.as_tensor(valid).cpu().bool()
    depth, target = depth[valid], target[valid]
    ratio = torch.maximum(depth / target, target / depth)
    return {"abs_rel": ((depth - target).abs() / target).mean().item(),
            "rmse": (depth - target).square().mean().sqrt().item(),
            "delta_1.25": ((ratio < 1.25) & (depth > 0)).double().mean().item()}


def abs_rel(depth, target, valid=None):
    """Mean |depth - target| / target where valid (by default where target > 0)."""
    return depth_metrics(depth, target, valid)["abs_rel"]


def box_iou(boxes, target):
    """Intersection over union of boxes (..., 4) with (..., 4), x1 y1 x2 y2: (...), one by one."""
    boxes, target = as_double(boxes, target)
    area = lambda box: (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)
    both = area(torch.cat([torch.maximum(boxes, target)[..., :2], torch.minimum(boxes, target)[..., 2:]], -1))
    return both / (area(boxes) + area(target) - both).clamp(min=1e-12)


@cache
def colour_wheel():
    """Middlebury's 55 colours, (55, 3), 0 to 255: red, yellow, green, cyan, blue, magenta and back."""
    steps = (15, 6, 4, 11, 13, 6)
    corners = np.array([(1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0, 0)]) * 255
    return np.concatenate([a + np.sign(b - a) * np.floor(255 * np.arange(n) / n)[:, None]
                           for a, b, n in zip(corners, corners[1:], steps)])


def flow_to_color(flow, fastest=None):
    """
    Flow (2, H, W) or (H, W, 2) in Middlebury's colours, uint8 (H, W, 3): hue is direction, white is still.
    fastest: the speed of full colour, in pixels; by default the field's own largest.
    """
    flow = np.asarray(torch.as_tensor(flow).detach().cpu().double())
    u, v = flow if len(flow) == 2 else np.moveaxis(flow, -1, 0)
    wheel, speed = colour_wheel() / 255, np.hypot(u, v)
    speed = speed / ((speed.max() if fastest is None else fastest) + 1e-5)
    turn = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(turn).astype(int)
    part = (turn - low)[..., None]
    colour = (1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]
    speed = speed[..., None]
    return np.uint8(np.floor(255 * np.where(speed <= 1, 1 - speed * (1 - colour), 0.75 * colour)))


# ---- training of readouts ------------------------------------------------------------------------
def fit(modules, loss, steps, what, lr=1e-3, weight_decay=1e-4):
    """
    AdamW on the parameters of the modules that want a gradient: `steps` of loss(i), i = 0, 1, ...; after a
    warm-up of a twentieth of the steps the learning rate follows a cosine to 0. The first module is the
    readout; others are finetuned at a tenth of its rate. All end in eval mode. our choice: one recipe for all
    readouts; mmsegmentation, CroCo v2 and TAP-Net each have their own, for far more steps.
    """
    for module in modules:
        module.train()
    groups = [dict(params=[p for p in module.parameters() if p.requires_grad], lr=lr if k == 0 else lr / 10)
              for k, module in enumerate(modules)]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    factor = lambda i: min((i + 1) / (0.05 * steps + 1), (1 + math.cos(math.pi * i / steps)) / 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for i in progress(range(steps), what):
        loss(i).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for module in modules:
        module.eval()


# ---- Midway: what the dynamics know --------------------------------------------------------------
def predicted_levels(model):
    """The numbers of the predicted levels, lowest first; Stop if the model has none."""
    if not model.cfg.latent_dynamics:
        raise Stop("this model has no latent dynamics (latent_dynamics=False): only --task segmentation fits")
    return range(len(model.predicted))


def random_init(model, args):
    """A model of the same Config that has learnt nothing."""
    torch.manual_seed(args.seed + 1)
    return type(model)(model.cfg).to(args.device).eval()


def cut_scenes(model, config, args, split="eval", points=1, **change):
    """
    Function of sample numbers: scenes like those of training, of which the model sees the middle, as large as
    its crops. video, flow, classes, tracks and visible as in data.Scenes, moved to the cut; `seen`: what is
    to be seen in the next frame too.
    """
    S, options = model.cfg.size, (config.get("scenes") or midway.SCENES) | dict(frames=2) | change
    options["size"] = max(options["size"], S)
    cut, scenes = (options["size"] - S) // 2, data.Scenes(**options, seed=args.seed, split=split)
    line = torch.arange(S, dtype=torch.float32)
    here = torch.stack(torch.meshgrid(line, line, indexing="xy"))           # (2, S, S)
    inside = lambda x, dim: ((x >= -0.5) & (x <= S - 0.5)).all(dim)

    def batch(numbers):
        whole, inner = scenes.batch(numbers, truth=True, points=points), slice(cut, cut + S)
        out = {name: whole[name][..., inner, inner] for name in ("video", "flow", "classes")}
        out["seen"] = ~whole["occluded"][..., inner, inner] & inside(out["flow"] + here, 2)
        out["tracks"] = whole["tracks"] - cut
        out["visible"] = whole["visible"] & inside(out["tracks"], -1)
        return {name: value.to(args.device) for name, value in out.items()}
    return batch


def perturb(model, i, m, v, token, draws=32, seed=0):
    """
    Forwarded feature perturbation: which predicted tokens feel it if one source token changes.
    paper: Sec. 4.4. Random vectors r are tangents of one spatial token of v each, all others zero and m held
    fixed; the forward model takes them along, and the cosine of r with each predicted token's tangent is
    averaged over the draws.
    i      level, as model.predict_forward counts them: model.predicted[0] is the lowest
    m, v   (B, K, d), (B, L, D) of that level, from model.predict
    token  (B,) long, number of the patch, 0 .. h*w - 1
    Returns heatmaps (B, h*w) over the target, without gradient.
    """
    v, place = v.contiguous(), F.one_hot(token + 1, v.shape[1])[..., None].to(v)        # (B, L, 1), after CLS
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(draws, len(v), v.shape[2], generator=generator).to(v)   # (draws, B, D)

    def heat(r):
        forward = lambda v: model.predict_forward(i, m, v)[0]
        tangent = jvp(forward, (v,), (place * r[:, None],))[1][:, 1:]       # (B, h*w, D)
        return F.cosine_similarity(r[:, None], tangent, dim=-1)
    # Forward mode has no rule for the fast attention kernels, and inference_mode would make tangents zero.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return vmap(heat, chunk_size=max(1, 2**18 // v[..., 0].numel()))(r).mean(0)


def yx(token, grid):
    """Number of a token -> its row and column (..., 2), as floats."""
    return torch.stack([token.div(grid, rounding_mode="floor"), token % grid], -1).float()


def moving_tokens(model, batch, generator, least=1.0):
    """
    Of each pair with known flow, a random token that moves by `least` patches or more and stays in sight:
    rows of the batch (n,), tokens (n,), and true landing points (n, 2) in rows and columns of the grid.
    """
    p, at = model.cfg.patch, slice(model.cfg.patch // 2, None, model.cfg.patch)
    shift = batch["flow"][:, 0, :, at, at].flatten(2).mT.flip(-1) / p       # (B, h*w, 2), down and right
    fits = batch["seen"][:, 0, at, at].flatten(1) & (shift.norm(dim=-1) >= least)
    rows = fits.any(1).nonzero()[:, 0]
    token = torch.multinomial(fits[rows].float().cpu(), 1, generator=generator)[:, 0].to(rows.device)
    # p // 2 is half a pixel after the centre of an even patch, the centre of an odd one
    off = (p // 2 + 0.5) / p - 0.5
    return rows, token, yx(token, model.cfg.size // p) + off + shift[rows, token]


def ridge_r2(x, y, tests):
    """R^2 on the last `tests` of ridge regression of y (n, 2) on x (n, features); strength chosen before."""
    x, y, n = x.cpu().double(), y.cpu().double(), len(x) - tests
    x = torch.cat([(x - x[:n].mean(0)) / x[:n].std(0).clamp(min=1e-9), torch.ones_like(x[:, :1])], 1)

    def r2(fit, test, strength):
        a = x[fit]
        dual = torch.linalg.solve(a @ a.T + strength * x.shape[1] * torch.eye(len(a)).to(a), y[fit])
        off = x[test] @ (a.T @ dual) - y[test]
        return 1 - (off.square().sum() / (y[test] - y[fit].mean(0)).square().sum()).item()
    part = n * 3 // 4
    best = max((1e-2, 1e-1, 1, 10, 100), key=lambda s: r2(slice(part), slice(part, n), s))
    return r2(slice(n), slice(n, None), best)


def camera_probe(nets, config, args, count=1024, tests=256):
    """How well a linear readout of all of a pair's latents tells its mean flow: [name, R^2] of each level."""
    first, m, flow = next(iter(nets.values())), {}, []
    for split, total in (("train", count), ("eval", tests)):
        scenes = cut_scenes(first, config, args, split)
        for i in progress(range(0, total, 32), f"camera's motion, {split}"):
            batch = scenes(range(i, i + 32))
            flow.append(batch["flow"][:, 0].mean((2, 3)))
            for who, net in nets.items():
                for k, level in enumerate(net.predict(*batch["video"].unbind(1))):
                    name = f"{who}level {net.levels[net.predicted[k]]}"
                    m.setdefault(name, []).append(level.m.flatten(1))
    return [[name, ridge_r2(torch.cat(x), torch.cat(flow), tests)] for name, x in m.items()]


@torch.no_grad()
def latents(model, config, args, report):
    """Do the motion latents carry motion? Their variance, their rank, and what exchanging them costs."""
    predicted_levels(model)
    n, steps, rows = min(args.batch_size, 32), 8, {}
    options = dict(config.get("scenes") or midway.SCENES)
    options.pop("frames", None)
    loader = list(data.make_loader(
        args.data, model.cfg.inputs, [range(i * n, i * n + n) for i in range(steps)], args.device, args.seed,
        split="eval", colours=False, scenes=data.SceneOptions(**options),
        videos=data.VideoOptions(gap=args.gap)))
    nets = {"": model, "random init, ": random_init(model, args)}
    for who, net in nets.items():
        for batch in loader:
            errors = net.report(batch)
            levels = net.both_directions(batch["motion"])[0]
            for k in predicted_levels(net):
                name, m = f"{who}level {net.levels[net.predicted[k]]}", levels[k].m.float()
                share = torch.linalg.svdvals(m)
                share = share / share.sum(1, keepdim=True)                  # (2B, K)
                rank = (-(share * share.clamp(min=1e-12).log()).sum(1)).exp().mean()
                numbers = [x.item() for x in errors[f"2-2cos, {name.removeprefix(who)}"].values()]
                rows.setdefault(name, []).append([*numbers, m.var(0).mean().item(), rank.item()])
    if args.data == "scenes":
        report.table("can the camera's motion be read off the latents? R^2 of ridge regression on held-out "
                     "scenes (0: no better than the mean)", ["R^2"], camera_probe(nets, config, args))
    report.table(
        f"motion latents of {steps * n} pairs: 2 - 2 cos of the prediction with the right latents, others, "
        "none, and of copying",
        [*next(iter(errors.values())), "variance of m", f"rank of {model.cfg.motion_tokens} tokens"],
        [[name, *(sum(x) / len(x) for x in zip(*row))] for name, row in rows.items()])


def compared(model, args):
    """{name: model}: this one, the one to hold it against, if any, and one that has learnt nothing."""
    nets = {"this model": model}
    if args.against:
        other, name, _, path = load(args.against)
        fits = lambda cfg: (cfg.latent_dynamics, cfg.size, cfg.patch)
        if name != "midway" or fits(other.cfg) != fits(model.cfg):
            raise Stop(f"--against {args.against}: want another Midway with dynamics, of this size and patch")
        nets[str(path.parent.name or path)] = other.to(args.device)
    gated = lambda net: "gated" if net.cfg.gating else "not gated"
    nets = {f"{name} ({gated(net)})": net for name, net in nets.items()}
    return nets | {"random init": random_init(model, args)}


@torch.no_grad()
def identity_bias(model, config, args, report):
    """our choice: a number for Fig. 6: how often the heatmap of a moving token peaks where the token was."""
    predicted_levels(model)
    if args.data != "scenes":
        raise Stop("identity-bias needs known motion, which only scenes have: leave out --data")
    generator, found, scenes = torch.Generator().manual_seed(args.seed), [], cut_scenes(model, config, args)
    for i in range(0, 256, 64):
        batch = scenes(range(i, i + 64))
        row, token, truth = moving_tokens(model, batch, generator)
        found.append((batch["video"][row], token, truth))
    video, token, truth = (torch.cat(x)[:128] for x in zip(*found))
    if not len(token):
        raise Stop("nothing moves by a patch or more in this checkpoint's scenes: no identity bias to see")
    grid = model.cfg.size // model.cfg.patch
    source, every = yx(token, grid), yx(torch.arange(grid * grid, device=token.device), grid)

    def scores(peak):                       # (..., n, 2)
        off, stay = (peak - truth).norm(dim=-1), (peak - source).norm(dim=-1)
        return [(stay < off).float().mean().item(), (off <= 1).float().mean().item(), off.mean().item()]

    rows = []
    for name, net in compared(model, args).items():
        for k in reversed(predicted_levels(net)):
            heat = torch.cat([perturb(net, net.predicted[k], level.m, level.v, t, args.draws, args.seed)
                              for v, t in zip(progress(video.split(32), name), token.split(32))
                              for level in [net.predict(v[:, 0], v[:, 1])[k]]])
            rows.append([f"{name}, level {net.levels[net.predicted[k]]}", *scores(yx(heat.argmax(1), grid))])
    report.table(f"identity bias: where the heatmaps of {len(token)} moving tokens peak, scenes",
                 ["nearer to the source", "within 1 patch of truth", "patches from truth"],
                 rows + [["always at the source", *scores(source)],
                         ["anywhere, by chance", *scores(every[:, None])]])


def video_pairs(model, args, count):
    """Pairs of frames from videos, squares of the model's size: (count, 2, 3, S, S) in [0, 1]."""
    loader = data.make_loader(args.data, dict(frames=2, size=model.cfg.size), [range(count)], args.device,
                              args.seed, 0, split="eval", videos=data.VideoOptions(args.gap, repeat=1))
    return next(iter(loader))["video"] / 255


def changed_tokens(z, zt, count):
    """our choice of what to look at in videos: tokens that differ most from those at their place in the other
    frame, (B, count)."""
    return F.cosine_similarity(z[:, 1:], zt[:, 1:], dim=-1).topk(count, largest=False).indices


@torch.no_grad()
def heatmap(model, config, args, report):
    """Fig. 6: where the forward model takes a token of the source, level by level."""
    levels, grid, p, each = predicted_levels(model), model.cfg.size // model.cfg.patch, model.cfg.patch, 2
    if args.data == "scenes":
        batch = cut_scenes(model, config, args)(range(32))
        generator = torch.Generator().manual_seed(args.seed)
        row, token, truth = (x[:6] for x in moving_tokens(model, batch, generator))
        video = batch["video"][row]
        if not len(token):
            raise Stop("nothing moves by a patch or more in this checkpoint's scenes: give videos as --data")
    else:
        video, truth = video_pairs(model, args, 3).repeat_interleave(each, 0), None
        z, zt = (model.features(video[::each, t])[-1] for t in (0, 1))
        token = changed_tokens(z, zt, each).flatten()
    if args.at:
        x, y = (min(int(share * grid), grid - 1) for share in args.at)
        token, truth = torch.full_like(token, y * grid + x), None
    found = model.predict(video[:, 0], video[:, 1])
    heats = {f"level {model.levels[model.predicted[k]]}": perturb(
        model, model.predicted[k], found[k].m, found[k].v, token, args.draws, args.seed) for k in levels}
    source = yx(token, grid)
    figure, axes = plt.subplots(2 + len(heats), len(token), layout="constrained", squeeze=False,
                                figsize=(1.75 * len(token), 1.8 * (2 + len(heats)) + 0.4))
    spot = lambda at: ((at + 0.5) * p - 0.5).flip(-1).tolist()              # grid -> (x, y) in pixels
    for n, column in enumerate(axes.T):
        frames = as_images(video[n])
        for axis, name in zip(column, ("source", "target", *heats)):
            axis.imshow(frames[0] if name == "source" else frames[1])
            if name in heats:
                heat = F.interpolate(heats[name][n].view(1, 1, grid, grid).cpu(), frames.shape[1:3],
                                     mode="bilinear")[0, 0]
                heat = heat.numpy()
                axis.imshow(heat, cmap="inferno", alpha=np.clip(0.2 + 0.7 * heat / heat.max(), 0, 1))
            (x, y), half = spot(source[n]), p / 2
            square = axis.add_patch(plt.Rectangle((x - half, y - half), p, p, fill=False, color="lime", lw=2))
            if truth is not None and name != "source":
                landed, = axis.plot(*spot(truth[n]), "x", color="cyan", ms=9, mew=2.5)
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("source", "target", *heats)):
        axis.set_ylabel(name + ",\nheatmap" * (name in heats), fontsize=10)
    marks = [square] + ([] if truth is None else [landed])
    figure.legend(marks, ["where the token is in the source", "where it is in the target"][:len(marks)],
                  loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    report.picture(figure, "heatmap.png")
    rows = [["to the source", *((yx(h.argmax(1), grid) - source).norm(dim=1).mean().item()
                                for h in heats.values())]]
    if truth is not None:
        rows.append(["to the true place", *((yx(h.argmax(1), grid) - truth).norm(dim=1).mean().item()
                                            for h in heats.values())])
    report.table(f"distance from the heatmap's peak in patches, mean of the {len(token)} in heatmap.png",
                 list(heats), rows)


@torch.no_grad()
def follow_tokens(model, clip, start, query, draws=32, seed=0):
    """
    Fig. 7: tokens `start` (P,) of frames `query` (P,) of a clip (T, 3, S, S), followed from frame to frame.
    Two ways, (2, T, P): of the five hottest target tokens the one with the most similar features, paper:
    Sec. 4.4, and of all target tokens the most similar one. Features: the encoder's highest level.
    """
    T, i, tokens = len(clip), model.predicted[-1], start.repeat(2, len(clip), 1)
    z = F.normalize(torch.cat([model.features(x)[-1] for x in clip.split(16)])[:, 1:], dim=-1)  # (T, h*w, D)
    for t in range(T - 1):
        top, now = model.predict(clip[t:t + 1], clip[t + 1:t + 2])[-1], tokens[:, t]
        alike = z[t][now] @ z[t + 1].T                                      # (2, P, h*w)
        heat = perturb(model, i, top.m.expand(len(start), -1, -1), top.v.expand(len(start), -1, -1), now[0],
                       draws, seed + t)
        five = heat.topk(min(5, heat.shape[1])).indices                     # (P, 5)
        best = five.gather(1, alike[0].gather(1, five).argmax(1, keepdim=True))[:, 0]
        tokens[:, t + 1] = torch.where(t < query, start, torch.stack([best, alike[1].argmax(1)]))
    return tokens


def track_clips(model, config, args):
    """
    Clips to track on: lists of (T, 3, S, S) videos, tracks (T, P, 2) in pixels and valid (T, P), or two Nones
    if nothing is known, and query frames (P,).
    """
    S, T = model.cfg.size, 8
    if args.tracks and args.data == "scenes":
        raise Stop(f"--tracks {args.tracks}: give the video that it is of as --data")
    if args.data == "scenes":
        pan = (config.get("scenes") or midway.SCENES)["pan"] / 3            # some are to stay for 8 frames
        batch = cut_scenes(model, config, args, points=64, frames=T, pan=pan)(range(16))
        for b in range(len(batch["video"])):
            some = batch["visible"][b].float().mean(0).topk(8).indices      # those that stay longest
            yield (batch["video"][b], batch["tracks"][b][:, some], batch["visible"][b][:, some],
                   torch.zeros(8, dtype=torch.long, device=args.device))
    elif args.tracks or str(args.data).endswith(".pkl") or (Path(args.data).is_dir() and
                                                            any(Path(args.data).rglob("tracks.npz"))):
        source = data.PointTracks(args.tracks or args.data, args.data if args.tracks else None)
        for clip in (source[i] for i in range(len(source))):
            every = slice(None, None, args.stride or 1)
            video = torch.from_numpy(clip["video"][every]).permute(0, 3, 1, 2)
            H, W = video.shape[2:]
            tracks, valid = (torch.from_numpy(clip[name][every]).to(args.device)
                             for name in ("tracks", "visible"))
            video = F.interpolate(video, (S, S), mode="bicubic", antialias=True)           # squashed
            video = video.to(args.device) / 255
            tracks = (tracks + 0.5) * torch.tensor([S / W, S / H], device=args.device) - 0.5
            yield video, tracks, valid, valid.int().argmax(0)
    else:
        stride = args.stride or 6                                           # of 30 frames per second: 0.2 s
        loader = data.make_loader(args.data, dict(frames=T, size=S), [range(3)], args.device, args.seed, 0,
                                  split="eval", videos=data.VideoOptions(stride=stride, repeat=1))
        for video in next(iter(loader))["video"] / 255:
            yield video, None, None, torch.zeros(4, dtype=torch.long, device=args.device)


@torch.no_grad()
def track(model, config, args, report):
    """Fig. 7: regions followed by heatmaps and by features alone, against true tracks where there are any."""
    predicted_levels(model)
    grid, p, sums, shown = model.cfg.size // model.cfg.patch, model.cfg.patch, {}, []
    untrained = random_init(model, args)
    scored = 0
    for video, tracks, valid, query in progress(track_clips(model, config, args), "track"):
        if tracks is None:
            z, zt = (model.features(video[t][None])[-1] for t in (0, -1))
            start = changed_tokens(z, zt, len(query))[0]
        elif not valid.any():
            continue
        else:
            known = valid.any(0).nonzero()[:, 0]        # a point that is never seen has no place to start
            known = known[torch.linspace(0, len(known) - 1, min(len(known), 32)).round().long()]
            tracks, valid, query = tracks[:, known], valid[:, known], query[known]
            first = tracks.gather(0, query[None, :, None].expand(1, -1, 2))[0]          # (P, 2)
            x, y = ((first + 0.5) / p).long().clamp(0, grid - 1).unbind(-1)
            start = y * grid + x
        found = follow_tokens(model, video, start, query, args.draws, args.seed)
        if len(shown) < (2 if tracks is not None else 3):
            shown.append((video, found, tracks, valid, query))
        if tracks is None:
            continue
        scored += 1
        truth = ((tracks + 0.5) / p - 0.5).flip(-1)                         # (T, P, 2), rows and columns
        counted = valid & (torch.arange(len(video), device=valid.device)[:, None] > query)
        nearest = truth.round().clamp(0, grid - 1)
        other = follow_tokens(untrained, video, start, query, args.draws, args.seed)
        ways = {f"{who}, {way}": place for who, places in (("this model", found), ("random init", other))
                for way, place in zip(("heatmap and features", "features alone"), yx(places, grid))}
        ways |= {"stays put": yx(start, grid).expand_as(truth), "best that a grid can do": nearest}
        for name, place in ways.items():
            sums.setdefault(name, []).append((place - truth).norm(dim=-1)[counted])
    if not shown:
        raise Stop(f"--data {args.data}: no point is ever to be seen in it")
    track_picture(model, shown, report)
    if sums:
        report.table(
            f"tracks of {scored} clip{'s' * (scored > 1)}: mean distance from the truth in patches "
            f"of {p} pixels, on a {grid} x {grid} grid", ["patches", "within 1 patch"],
            [[name, torch.cat(x).mean().item(), (torch.cat(x) <= 1).float().mean().item()]
             for name, x in sums.items()])


def track_picture(model, shown, report):
    """Four frames of each clip; the last frames' places are fading tails."""
    p, grid = model.cfg.patch, model.cfg.size // model.cfg.patch
    names = ["heatmap and\nfeatures", "features alone"] + ["truth"] * (shown[0][2] is not None)
    figure, axes = plt.subplots(len(shown) * len(names), 4, figsize=(7.2, 1.75 * len(shown) * len(names)),
                                layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    colours = [c for k, c in enumerate(plt.get_cmap("tab10").colors) if k != 7]     # grey is hard to see
    for c, (video, found, tracks, valid, query) in enumerate(shown):
        pixels = list(((yx(found, grid) + 0.5) * p - 0.5).flip(-1).cpu())           # (T, P, 2), x and y
        seen = [torch.arange(len(video))[:, None] >= query.cpu()] * 2
        if tracks is not None:
            pixels, seen = pixels + [tracks.cpu()], seen + [valid.cpu()]
        times = torch.linspace(0, len(video) - 1, 4).round().long().tolist()
        for r, (name, places, visible) in enumerate(zip(names, pixels, seen)):
            line = axes[c * len(names) + r]
            line[0].set_ylabel(f"clip {c + 1}, {name}", fontsize=9)
            for axis, t in zip(line, times):
                axis.imshow(as_images(video[t]))
                axis.set(xticks=[], yticks=[])
                axis.set_title("" if r else f"frame {t}", fontsize=9)
                for k in range(min(places.shape[1], 6)):
                    jitter = 0 if name == "truth" else p * 0.06 * (k - 2.5)         # tokens of several points
                    tail = [(places[s, k] + jitter).tolist() for s in range(t + 1) if visible[s, k]]
                    for age, (a, b) in enumerate(zip(tail[::-1][1:], tail[::-1])):
                        axis.plot(*zip(a, b), color=colours[k], lw=2, alpha=max(0.15, 0.9 - 0.12 * age))
                    if tail and visible[t, k]:
                        axis.plot(*tail[-1], "o", color=colours[k], ms=6, mec="white", mew=1)
    report.picture(figure, "track.png")


# ---- Midway: segmentation ------------------------------------------------------------------------
def conv_bn(ins, outs, size=3):
    return nn.Sequential(nn.Conv2d(ins, outs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outs),
                         nn.ReLU())


def resized(x, like):
    """A map (B, C, h, w) in the height and width of another, or of a (H, W)."""
    return F.interpolate(x, like if isinstance(like, tuple) else like.shape[-2:], mode="bilinear")


class Linear(nn.Module):
    """The linear readout: batch normalisation and a 1 x 1 convolution on one map (B, D, h, w)."""

    def __init__(self, dim, classes):
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, classes, 1))

    def forward(self, maps):
        return self.head(maps[-1]), None


class UperNet(nn.Module):
    """
    UperNet on four maps of a ViT (B, D, h, w), lowest first: made a pyramid, pyramid pooling on the coarsest,
    top-down sums, all fused at the finest. Also an auxiliary head on the last map. our choice: the pyramid by
    transposed convolutions, as in iBOT; for the rest mmsegmentation's, D channels wide.
    """

    def __init__(self, dim, classes, pools=(1, 2, 3, 6)):
        super().__init__()
        up = lambda: nn.ConvTranspose2d(dim, dim, 2, 2)
        self.pyramid = nn.ModuleList([nn.Sequential(up(), nn.BatchNorm2d(dim), nn.GELU(), up()), up(),
                                      nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
        self.pools, self.pooled = pools, nn.ModuleList(conv_bn(dim, dim, 1) for _ in pools)
        self.bottleneck = conv_bn(dim * (1 + len(pools)), dim)
        self.lateral = nn.ModuleList(conv_bn(dim, dim, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv_bn(dim, dim) for _ in range(3))
        self.head = nn.Sequential(conv_bn(4 * dim, dim), nn.Dropout2d(0.1), nn.Conv2d(dim, classes, 1))
        self.auxiliary = nn.Sequential(conv_bn(dim, 256), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1))

    def forward(self, maps):
        levels = [scale(x) for scale, x in zip(self.pyramid, maps)]         # 4, 2, 1 and 1/2 times h, w
        top = levels[-1]
        parts = [resized(conv(F.adaptive_avg_pool2d(top, size)), top)
                 for conv, size in zip(self.pooled, self.pools)]
        out = [self.bottleneck(torch.cat([top, *parts], 1))]
        for lateral, level in zip(reversed(self.lateral), levels[2::-1]):
            x = lateral(level)
            out.append(x + resized(out[-1], x))
        fused = [out[0]] + [smooth(x) for smooth, x in zip(self.smooth, out[1:])]
        fused = torch.cat([resized(x, out[-1]) for x in reversed(fused)], 1)
        return self.head(fused), self.auxiliary(maps[-1])


class Segmenter(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes, H, W), and those of the auxiliary head, if there is one."""

    def __init__(self, model, classes, head, features, frozen):
        super().__init__()
        self.model, self.features, self.frozen = model, features, frozen
        self.head = (UperNet if head == "upernet" else Linear)(model.cfg.dim, classes)
        self.pyramid = head == "upernet"

    def maps(self, images):
        """(B, D, h, w) each: the backward layers' lowest level, or the encoder's last or four."""
        model, depth = self.model, self.model.cfg.depth
        if self.features == "backward":
            z = model.features(images)
            v = z[-1]
            for i in reversed(model.predicted):
                v = model.student_backward[str(i)](z[i], v)
            z = [v]
        else:       # blocks 3, 6, 9, 12 of 12, whatever the dynamics tap
            taps = [depth * (k + 1) // 4 for k in range(4)] if self.pyramid else [depth]
            z = model.student(midway.normalize(images), taps)
        size = [n // model.cfg.patch for n in images.shape[-2:]]
        return [x[:, 1:].mT.unflatten(-1, size) for x in z]

    def forward(self, images):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.maps(images)
        return [None if x is None else resized(x, images) for x in self.head(maps)]


class TrainingCrops(torch.utils.data.Dataset):
    """
    Sample i of a run on a data.Segmentation: image scaled by 0.5 to 2, square crop of which no class has more
    than three quarters (if ten tries find one), flipped half of the time. Beyond the image: black, ignored.
    """

    def __init__(self, labelled, size, seed):
        self.labelled, self.size, self.seed = labelled, size, seed

    def __getitem__(self, i):
        rng, n = np.random.default_rng((self.seed, i)), self.size
        sample = self.labelled[int(rng.integers(len(self.labelled)))]
        image, classes = sample["image"], sample["classes"]
        side = round(min(classes.shape) / rng.uniform(0.5, 2))
        pad = [(0, max(0, side - length)) for length in classes.shape]
        image, classes = np.pad(image, [*pad, (0, 0)]), np.pad(classes, pad, constant_values=255)
        at = ((np.arange(n) + 0.5) * side / n).astype(int)
        for _ in range(10):
            top, left = (int(rng.integers(length - side + 1)) for length in classes.shape)
            crop = classes[top:top + side, left:left + side][at[:, None], at]
            counts = np.bincount(crop[crop != 255], minlength=1)
            if counts.max() <= 0.75 * max(counts.sum(), 1):
                break
        flip = bool(rng.random() < 0.5)
        image = data.crop_uint8(image, (top, left, side, side), n, flip)
        return image, torch.from_numpy(crop[:, ::-1].copy() if flip else crop)


def jitter(images, generator):
    """Brightness, contrast, saturation by 0.7 to 1.3, hue by 0.05 turns, for half of the images each."""
    n = len(images)
    order = torch.rand(n, 4, generator=generator).argsort(1)
    factors = torch.rand(n, 4, generator=generator) * 2 - 1                 # -1 .. 1
    factors *= (torch.rand(n, 4, generator=generator) < 0.5) * torch.tensor([0.3, 0.3, 0.3, 0.05])
    never = torch.zeros(n, dtype=torch.bool)
    return data.photometric(images, dict(
        order=order, factors=factors + torch.tensor(data.NEUTRAL), gray=never, blur=never, solarize=never))


def labelled_scenes(config, args, split):
    """numbers -> images (B, 3, S, S), classes (B, S, S) of scenes like training's, with plain sprites."""
    options = config.get("scenes") or midway.SCENES
    options = options | dict(frames=1, sprites=4, flat=0.8, radius=(0.15, 0.3))
    scenes = data.Scenes(**options, seed=args.seed, split=split)

    def batch(numbers):
        clips = scenes.batch(numbers, truth=True, points=1)
        return clips["video"][:, 0].to(args.device), clips["classes"][:, 0].to(args.device)
    return batch


def whole_images(labelled, size, patch, device):
    """Images (1, 3, h, w) in [0, 1] whose short side is `size`, their classes (1, H, W), both as tensors."""
    for n in range(len(labelled)):
        sample = labelled[n]
        H, W = sample["classes"].shape
        shape = [max(patch, round(size * length / min(H, W) / patch) * patch) for length in (H, W)]
        image = torch.from_numpy(sample["image"]).permute(2, 0, 1)[None]
        image = F.interpolate(image, shape, mode="bicubic", antialias=True)
        yield image.to(device) / 255, torch.from_numpy(sample["classes"])[None].to(device)


class SegmentationTask:
    """What segmentation needs of its data: training batches, test images, classes; scenes or a folder."""

    def __init__(self, model, config, args):
        cfg = model.cfg
        self.args, self.size = args, args.size or round(16 / 7 * cfg.size / cfg.patch) * cfg.patch
        if args.size and args.size < 2 * cfg.patch or self.size % cfg.patch:
            raise Stop(f"--size {self.size} must be 2, 3, ... times the patch size, {cfg.patch}")
        if args.data == "scenes":
            self.classes, self.names, self.steps = 9, ("background", *data.SHAPES), 250
            self.train, self.test = (labelled_scenes(config, args, s) for s in ("train", "eval"))
            self.test_batches = 8               # of 32 scenes
            return
        options = dict(num_classes=args.classes or None, ignore_index=args.ignore_index)
        self.labelled = [data.Segmentation(args.data, split, **options) for split in ("train", "val")]
        self.classes, self.names, self.steps = self.labelled[0].num_classes, self.labelled[0].names, 2000
        self.patch, self.test_batches = cfg.patch, len(self.labelled[1])

    def batches(self, steps):
        """`steps` training batches: images (B, 3, S, S) in [0, 1], classes (B, S, S)."""
        n, device = self.args.batch_size, self.args.device
        numbers = [range(i * n, i * n + n) for i in range(steps)]
        if self.args.data == "scenes":
            yield from map(self.train, numbers)
            return
        crops = TrainingCrops(self.labelled[0], self.size, self.args.seed)
        loader = data.sample_loader(crops, numbers, device)
        generator = torch.Generator().manual_seed(self.args.seed)
        for images, classes in loader:
            yield jitter(images.to(device) / 255, generator), classes.to(device)

    def tests(self):
        """Held-out images (B, 3, h, w), classes (B, H, W)."""
        if self.args.data == "scenes":
            return (self.test(range(32 * i, 32 * i + 32)) for i in range(self.test_batches))
        return whole_images(self.labelled[1], self.size, self.patch, self.args.device)


def position_prior(task, size=64):
    """The commonest class of each place: what can be said without looking. -> (1, size, size)."""
    counts = torch.zeros(task.classes, size, size)
    labels = ((classes.cpu() for _, classes in map(task.train, (range(i, i + 32) for i in range(0, 512, 32))))
              if task.args.data == "scenes" else
              (torch.from_numpy(task.labelled[0][i]["classes"])[None] for i in range(len(task.labelled[0]))))
    for classes in labels:
        small = F.interpolate(classes[:, None].float(), (size, size), mode="nearest")[:, 0].long()
        for k in range(task.classes):
            counts[k] += (small == k).sum(0)
    return counts.argmax(0, keepdim=True)


def train_segmenter(model, task, args, what):
    model = deepcopy(model) if args.finetune else model
    torch.manual_seed(args.seed)
    net = Segmenter(model, task.classes, args.head, args.features, not args.finetune).to(args.device)
    steps = args.steps or task.steps
    batches = task.batches(steps)

    def loss(i):
        images, classes = next(batches)
        each = [F.cross_entropy(x.float(), classes, ignore_index=255, reduction="sum") for x in net(images)
                if x is not None]
        return sum(w * x for w, x in zip((1, 0.4), each)) / (classes != 255).sum().clamp(min=1)
    fit([net.head] + [model] * args.finetune, loss, steps, what, args.lr)
    return net.eval()


def segmentation(model, config, args, report):
    """A linear or UperNet readout on frozen or finetuned features; against random features and no image."""
    if args.features == "backward" and not (model.cfg.latent_dynamics and model.cfg.backward):
        raise Stop("this model has no backward layers: use --features encoder")
    if args.features == "backward" and args.head == "upernet":
        raise Stop("--head upernet reads four levels of the encoder: leave out --features backward")
    if args.batch_size < 2:
        raise Stop("batch normalisation in the readouts needs a --batch-size of 2 or more")
    task = SegmentationTask(model, config, args)
    nets = {"this model": train_segmenter(model, task, args, "segmentation, this model"),
            "random init": train_segmenter(random_init(model, args), task, args, "segmentation, random init")}
    prior = position_prior(task)
    counts, shown = {name: 0 for name in (*nets, "position prior")}, []
    with torch.no_grad():
        picked = set(np.linspace(0, task.test_batches - 1, 4).round().astype(int))
        for number, (images, classes) in enumerate(progress(task.tests(), "segmentation, test")):
            said = {name: resized(net(images)[0], classes).argmax(1) for name, net in nets.items()}
            said["position prior"] = F.interpolate(prior[None].float(), classes.shape[1:]).long()[0].expand(
                len(classes), -1, -1)
            said, classes = {name: x.cpu() for name, x in said.items()}, classes.cpu()
            for name, pred in said.items():
                counts[name] = counts[name] + confusion(pred, classes, task.classes)
            if number in picked:
                shown.append([x[0].cpu() for x in (images, classes, *said.values())])
    scores = {name: iou_scores(c) for name, c in counts.items()}
    # paper: Table 1, ViT-S on BDD100K; its linear readout is of the backward layers
    comparable = not args.finetune and (args.head == "upernet" or args.features == "backward")
    paper = {"linear": 39.7, "upernet": 50.4}[args.head] if comparable else ""
    where = (f"{args.head} readout, {args.features if args.head == 'linear' else 'encoder'} features, "
             f"{'finetuned' if args.finetune else 'frozen'}, {args.steps or task.steps} steps, held-out "
             f"{'scenes' if args.data == 'scenes' else 'images'}; per cent")
    columns = [*scores, "paper, other data: ViT-S, BDD100K"]
    report.table(f"segmentation: {where}", columns, [
        ["mIoU", *(100 * s[0] for s in scores.values()), paper],
        ["pixel accuracy", *(100 * s[2] for s in scores.values()), ""],
        *([f"IoU {name}", *(100 * s[1][k].item() for s in scores.values()), ""]
          for k, name in enumerate(task.names or [f"class {k}" for k in range(task.classes)])
          if task.classes <= 20)])
    segmentation_picture(task, shown, list(said), report)


PALETTE = ("#dddddd", "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#aa4499", "#44aa99", "#882255",
           "#999933", "#e69f00", "#661100")     # Tol's muted colours, told apart by colour-blind eyes too


def segmentation_picture(task, shown, names, report):
    colours = [matplotlib.colors.to_rgb(c) for c in PALETTE]
    if task.classes > len(colours):
        colours = plt.get_cmap("turbo")(np.linspace(0, 1, task.classes))[:, :3].tolist()
    table = np.zeros((256, 3))              # what is ignored is black
    table[:task.classes] = colours[:task.classes]
    columns, shape = ["image", "truth", *names], shown[0][1].shape
    height = 2.1 * min(1.05, 1.1 * shape[0] / shape[1])
    figure, axes = plt.subplots(len(shown), len(columns), layout="constrained", squeeze=False,
                                figsize=(2.1 * len(columns), height * len(shown) + 0.6))
    for row, pick in zip(axes, shown):
        for axis, name, x in zip(row, columns, pick):
            axis.imshow(as_images(x) if name == "image" else table[x.numpy()], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, fontsize=11)
    if task.classes <= 40:
        names = task.names or [f"class {k}" for k in range(task.classes)]
        patches = [matplotlib.patches.Patch(color=colours[k], label=names[k]) for k in range(task.classes)]
        patches += [matplotlib.patches.Patch(color="black", label="ignored")] * (task.names is None or
                                                                              task.args.data != "scenes")
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=10, frameon=False)
    report.picture(figure, "segmentation.png")


# ---- Midway: optical flow ------------------------------------------------------------------------
class ConvUnit(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class DPT(nn.Module):
    """
    Dense prediction transformer head, as CroCo v2 has it: four token maps on one grid, taken to 4, 2, 1 and
    1/2 times the grid, fused from coarse to fine; 3 channels (u, v, confidence) at image size. Widths are in
    proportion to D and CroCo's at D = 384.
    """

    def __init__(self, ins, dim):
        super().__init__()
        steps, width = [dim * 2**k // 4 for k in range(4)], 2 * dim // 3
        scale = [nn.ConvTranspose2d(steps[0], steps[0], 4, 4), nn.ConvTranspose2d(steps[1], steps[1], 2, 2),
                 nn.Identity(), nn.Conv2d(steps[3], steps[3], 3, 2, 1)]
        self.assemble = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, s, 1), sc, nn.Conv2d(s, width, 3, padding=1, bias=False))
            for i, s, sc in zip(ins, steps, scale))
        self.before = nn.ModuleList(ConvUnit(width) for _ in range(3))
        self.after = nn.ModuleList(ConvUnit(width) for _ in range(4))
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))
        self.enter = nn.Conv2d(width, width // 2, 3, padding=1)
        self.leave = nn.Sequential(nn.Conv2d(width // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 1))

    def forward(self, maps, size):
        levels, x = [make(m) for make, m in zip(self.assemble, maps)], None
        for k in (3, 2, 1, 0):
            x = levels[3] if x is None else x + self.before[k](levels[k])
            x = self.after[k](x)
            x = F.interpolate(x, levels[k - 1].shape[-2:] if k else [2 * n for n in x.shape[-2:]],
                              mode="bilinear", align_corners=True)
            x = self.mix[k](x)
        # twice as large for patches of 16, as CroCo's; for others what gives the image's size
        return self.leave(F.interpolate(self.enter(x), size, mode="bilinear", align_corners=True))


class FlowNet(nn.Module):
    """Frames (B, 3, S, S), S as in training -> flow in pixels (B, 2, S, S), confidence (B, S, S)."""

    def __init__(self, model, frozen):
        super().__init__()
        D, d = model.cfg.dim, model.cfg.motion_dim
        self.model, self.frozen, self.head = model, frozen, DPT((D, d, D, D), D)

    def maps(self, source, target):
        """paper: B.4: encoder, the target's tokens after the highest midway path, predictions top and low."""
        model = self.model
        z = model.features(source)
        with torch.no_grad():
            zt = model.features(target, teacher=True)
        levels = model.dynamics(z, zt)
        tokens = model.midway_path(model.predicted[-1], None, z[-1], zt[-1])            # (B, K + 2L, d)
        target_tokens = tokens[:, model.cfg.motion_tokens + z[-1].shape[1]:]            # (B, L, d)
        grid = model.cfg.size // model.cfg.patch
        return [x[:, 1:].mT.unflatten(-1, (grid, grid))                                 # CLS is dropped
                for x in (z[-1], target_tokens, levels[-1].pred, levels[0].pred)]

    def forward(self, source, target):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.maps(source, target)
        out = self.head(maps, source.shape[-2:]).float()
        return out[:, :2], out[:, 2]


def laplacian_loss(flow, confidence, target, valid):
    """CroCo v2's: mean over valid pixels of |error|_1 / d + log d, d = 0.25 + 3.75 sigmoid(confidence)."""
    d = 0.25 + 3.75 * torch.sigmoid(confidence)                             # (B, H, W)
    each = (flow - torch.where(valid[:, None], target, 0)).abs().sum(1) / d + d.log()
    return (each * valid).sum() / valid.sum().clamp(min=1)


def tile_offsets(length, window, overlap):
    """Where tiles of `window` pixels begin so that they cover `length` and overlap by that share or more."""
    count = 1 + math.ceil((length - window) / ((1 - overlap) * window))
    return np.round(np.linspace(0, length - window, count)).astype(int).tolist()


@torch.no_grad()
def tiled_flow(net, frames, overlap):
    """
    Flow (2, H, W) of frames (2, 3, H, W) in [0, 1] of any size: means of overlapping tiles, weighted by
    confidence. Images smaller than a tile are enlarged first.
    """
    S, (H, W) = net.model.cfg.size, frames.shape[-2:]
    h, w = max(H, S), max(W, S)
    if (h, w) != (H, W):
        frames = F.interpolate(frames, (h, w), mode="bicubic").clamp(0, 1)
    corners = [(y, x) for y in tile_offsets(h, S, overlap) for x in tile_offsets(w, S, overlap)]
    total = torch.zeros(3, h, w, device=frames.device)
    for i in range(0, len(corners), 64):
        tiles = torch.stack([frames[..., y:y + S, x:x + S] for y, x in corners[i:i + 64]])
        flow, confidence = net(tiles[:, 0], tiles[:, 1])
        weight = torch.exp(-20 * (torch.sigmoid(confidence / 5) - 0.5))[:, None]        # small d: sure
        for (y, x), part in zip(corners[i:i + 64], torch.cat([weight * flow, weight], 1)):
            total[:, y:y + S, x:x + S] += part
    flow = total[:2] / total[2]
    if (h, w) != (H, W):
        scale = torch.tensor([W / w, H / h], device=flow.device).view(2, 1, 1)
        flow = F.interpolate(flow[None], (H, W), mode="bilinear")[0] * scale
    return flow


def flow_scenes(model, config, args, split, wide=False):
    """
    Function of sample numbers: frames (B, 2, 3, S, S), flow (B, 2, S, S), valid (B, S, S) of scenes like the
    checkpoint's, with sprites. S: the model's size, or wide: the scenes' own, larger than a tile.
    """
    options = config.get("scenes") or midway.SCENES
    fast = options["pan"] / 2
    options = options | dict(sprites=4, speed=fast, pan=fast, zoom=0.02, roll=0.02, frames=2)
    scenes = data.Scenes(**options, seed=args.seed, split=split)
    source = ((lambda numbers: scenes.batch(numbers, truth=True, points=1)) if wide else
              cut_scenes(model, config, args, split, **options))

    def batch(numbers):
        clips = source(numbers)
        video, flow = (clips[name].to(args.device) for name in ("video", "flow"))
        return video, flow[:, 0], torch.ones_like(flow[:, 0, 0], dtype=torch.bool)
    return batch


class FlowCrops(torch.utils.data.Dataset):
    """
    Sample i of a run on data.FlowPairs, cropped and augmented as in CroCo v2: scaled by 2^-0.2 to 2^0.5, each
    axis stretched by up to 2^0.2, flipped. our choice: flow is taken from the nearest pixel, sparse or not.
    """

    def __init__(self, pairs, size, seed):
        self.pairs, self.size, self.seed = pairs, size, seed

    def __getitem__(self, i):
        rng, n = np.random.default_rng((self.seed, i)), self.size
        sample = self.pairs[int(rng.integers(len(self.pairs)))]
        frames, flow, valid = sample["frames"], sample["flow"], sample["valid"]
        scale = 2 ** (rng.uniform(-0.2, 0.5) * (rng.random() < 0.8) +
                      rng.uniform(-0.2, 0.2, 2) * (rng.random() < 0.8))             # y, x
        h, w = (min(length, max(1, round(n / s))) for length, s in zip(valid.shape, scale))
        top, left = (int(rng.integers(length - side + 1)) for length, side in zip(valid.shape, (h, w)))
        at = [start + ((np.arange(n) + 0.5) * side / n).astype(int) for start, side in ((top, h), (left, w))]
        flow = flow[:, at[0][:, None], at[1]] * np.float32([n / w, n / h])[:, None, None]   # (2, n, n)
        valid = valid[at[0][:, None], at[1]]
        frames = torch.stack([data.crop_uint8(frame, (top, left, h, w), n) for frame in frames])
        flow, valid = torch.from_numpy(flow), torch.from_numpy(valid)
        for axis, chance in ((2, 0.5), (1, 0.1)):       # left and right, top and bottom
            if rng.random() < chance:
                frames, flow, valid = frames.flip(axis + 1), flow.flip(axis), valid.flip(axis - 1)
                flow[2 - axis] *= -1
        return frames, flow, valid


def flow_batches(model, config, args, pairs, steps):
    """`steps` training batches: frames (B, 2, 3, S, S) in [0, 1], flow (B, 2, S, S), valid (B, S, S)."""
    n = args.batch_size
    numbers = [range(i * n, i * n + n) for i in range(steps)]
    if pairs is None:
        yield from map(flow_scenes(model, config, args, "train"), numbers)
        return
    loader = data.sample_loader(FlowCrops(pairs, model.cfg.size, args.seed), numbers, args.device)
    generator = torch.Generator().manual_seed(args.seed)
    for frames, flow, valid in loader:
        frames = frames.to(args.device) / 255
        together = jitter(frames.transpose(1, 2).flatten(2, 3), generator)  # both frames above each other
        yield together.unflatten(2, (2, -1)).transpose(1, 2), flow.to(args.device), valid.to(args.device)


def train_flow(model, config, args, pairs, steps, what):
    model = deepcopy(model) if args.finetune else model
    torch.manual_seed(args.seed)
    net = FlowNet(model, not args.finetune).to(args.device)
    batches = flow_batches(model, config, args, pairs, steps)

    def loss(i):
        frames, target, valid = next(batches)
        return laplacian_loss(*net(frames[:, 0], frames[:, 1]), target, valid)
    fit([net.head] + [model] * args.finetune, loss, steps, what, args.lr)
    return net.eval()


def encoder_only(model, args):
    """The same encoders; midway paths, backward layers and forward model forget all they have learnt."""
    net = random_init(model, args)
    net.student, net.teacher = deepcopy(model.student), deepcopy(model.teacher)
    return net


def flow_pairs(args):
    """--data's pairs to train on, or None where there are none (then scenes serve), and those to test on."""
    if args.data == "scenes":
        return None, None
    test = data.FlowPairs(args.data, "val")
    try:
        training = data.FlowPairs(args.data, "train")
    except ValueError:                      # the data set is there, its training split is not
        return None, test
    training.items = [item for item in training.items if item not in test.items]    # of those without splits
    return training if training.items else None, test


def flow_tests(model, config, args, pairs):
    """Names, frames (2, 3, H, W) in [0, 1], flow (2, H, W), valid (H, W) of the pairs to test on."""
    if pairs is None:
        scenes = flow_scenes(model, config, args, "eval", wide=True)
        yield from zip((f"scene {n}" for n in range(16)), *scenes(range(16)))
    else:
        for name, pair in zip(pairs.names, (pairs[i] for i in range(len(pairs)))):
            if not pair["valid"].any():
                tqdm.write(f"left out {name}: no pixel of its flow is known")
                continue
            frames = torch.from_numpy(pair["frames"]).permute(0, 3, 1, 2) / 255
            flow, valid = torch.from_numpy(pair["flow"]), torch.from_numpy(pair["valid"])
            yield name, *(x.to(args.device) for x in (frames, flow, valid))


def flow(model, config, args, report):
    """A DPT readout of optical flow, against the encoder with dynamics that know nothing, and constants."""
    predicted_levels(model)
    train_pairs, test_pairs = flow_pairs(args)
    steps = args.steps or (250 if args.data == "scenes" else 2000)
    nets = {"encoder only": encoder_only(model, args)}
    nets = nets if args.encoder_only else {"this model": model} | nets
    nets = {name: train_flow(net, config, args, train_pairs, steps, f"flow, {name}")
            for name, net in nets.items()}
    count, rows, shown = 16 if test_pairs is None else len(test_pairs), {}, []
    picked = set(np.linspace(0, count - 1, 4).round().astype(int))
    tests = progress(flow_tests(model, config, args, test_pairs), "flow, test")
    for number, (name, frames, target, valid) in enumerate(tests):
        said = {who: tiled_flow(net, frames, args.overlap) for who, net in nets.items()}
        if number in picked:
            shown.append((name, *(x.cpu() for x in (frames[0], target, valid, next(iter(said.values()))))))
        best = target[:, valid].median(1).values.view(2, 1, 1).expand_as(target)
        for who, x in (said | {"zero": torch.zeros_like(target), "best constant": best}).items():
            error, length = flow_errors(x[None], target[None], valid[None])
            wrong = (error > 3) & (error > 0.05 * length)
            rows.setdefault(name, {})[who] = [error.sum().item(), wrong.sum().item(), len(error)]
    if not rows:
        raise Stop(f"--data {args.data}: no flow is known in any of its pairs")
    whos = list(next(iter(rows.values())))
    total = {who: [sum(x) for x in zip(*(row[who] for row in rows.values()))] for who in whos}
    pairs = [[name, *(row[who][0] / row[who][2] for who in whos), ""] for name, row in rows.items()]
    report.table(
        f"optical flow, {'finetuned' if args.finetune else 'frozen'}, {steps} steps on "
        f"{'scenes' if train_pairs is None else 'the training split'}: end-point error in pixels",
        [*whos, "paper, other data: ViT-S, Sintel final"],
        (pairs if test_pairs is not None and len(pairs) <= 30 else []) + [
            ["mean over pairs", *(sum(x) / len(x) for x in zip(*(row[1:-1] for row in pairs))), ""],
            ["mean over pixels", *(total[who][0] / total[who][2] for who in whos),
             4.9 if args.finetune else ""],
            ["per cent of outliers (Fl-all)", *(100 * total[who][1] / total[who][2] for who in whos), ""]])
    if shown:
        flow_picture(shown, report)


def flow_picture(shown, report):
    shape = max(0.4, shown[0][2].shape[1] / shown[0][2].shape[2])
    figure, axes = plt.subplots(len(shown), 5, figsize=(10.5, (2.1 * shape + 0.4) * len(shown)),
                                layout="constrained", squeeze=False, width_ratios=(1, 1, 1, 1, 0.6))
    side = np.linspace(-1, 1, 101)
    wheel = np.stack(np.meshgrid(side, side), -1)
    wheel_image = np.where((wheel ** 2).sum(-1, keepdims=True) <= 1, flow_to_color(wheel, 1.0), 255)
    for row, (name, frame, target, valid, said) in zip(axes, shown):
        target = torch.where(valid, target, 0)
        fastest = target.norm(dim=0).max().item()
        error = torch.where(valid, (said - target).norm(dim=0), math.nan)
        row[0].imshow(as_images(frame))
        row[1].imshow(flow_to_color(target, fastest))
        row[2].imshow(flow_to_color(said, fastest))
        shades = row[3].imshow(error.numpy(), cmap="cividis", vmin=0, vmax=max(fastest, 1e-3))
        figure.colorbar(shades, ax=row[3], shrink=0.8)
        row[4].imshow(wheel_image)
        row[4].set_title(f"rim: {fastest:.1f} px", fontsize=9)
        row[0].set_ylabel(name.replace("_", "\n", 1), fontsize=9)
        for axis in row:
            axis.set(xticks=[], yticks=[])
        row[4].set_frame_on(False)
    for axis, title in zip(axes[0], ("frame 1", "true flow", "predicted flow", "error, pixels")):
        axis.set_title(title, fontsize=11)
    report.picture(figure, "flow.png")


# ---- MooG: pictures ------------------------------------------------------------------------------
def film(rows, columns=None, width=1.1):
    """A figure of rows (label, images of one height), with `columns` above the first; labels may be empty."""
    most = max(len(images) for _, images in rows)
    H, W = rows[0][1][0].shape[:2]
    figure, axes = plt.subplots(len(rows), most, squeeze=False, layout="constrained",
                                figsize=(width * most + 0.3, 1.02 * width * H / W * len(rows) + 0.3))
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.03)
    for (label, images), line in zip(rows, axes):
        line[0].set_ylabel(label, fontsize=9)
        for axis, image in zip(line, images):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], columns or ()):
        axis.set_title(title, fontsize=9)
    return figure, axes


# ---- MooG: tokens --------------------------------------------------------------------------------
PCA_CLIPS = 24                          # of 12 frames, as published


def scene_options(model, config, args, frames, split="eval"):
    """Options of data.Scenes: those of the model's training; if there are none, those of preset tiny."""
    known = config.get("scenes") or moog.RECIPES["tiny"]["scenes"]
    return known | dict(size=model.cfg.size, frames=frames, split=split, seed=args.seed)


def eval_video(model, config, args, frames, count):
    """Held-out clips (count, frames, 3, H, W) in [0, 1] of --data."""
    options = scene_options(model, config, args, frames)
    options = {name: options[name] for name in options if name not in ("frames", "split", "seed")}
    numbers = [range(i, min(i + 8, count)) for i in range(0, count, 8)]
    loader = data.make_loader(args.data, dict(frames=frames, size=model.cfg.size), numbers, args.device,
                              args.seed, 0, split="eval", scenes=data.SceneOptions(**options),
                              videos=data.VideoOptions(stride=args.stride or 1))
    video = torch.cat([batch["video"] for batch in loader])
    return moog.as_float(video)


def attention_chunks(model, states, size, use, index=None):
    """
    use(attention (B, T, P, N) of pixels to tokens, mean over the heads of the last layer), whose results
    (B, T, P, ...) are joined: piece by piece, as the attention of all pixels may not fit.
    """
    look = lambda piece: model.decode(states, size, piece, return_attention=True)[1].mean(2)
    whole = torch.arange(size[0] * size[1], device=states.device)
    if model.cfg.decoder_self_attention:            # pixels that look at each other can't be parted
        seen = look(whole)
        if index is not None:
            seen = seen.gather(2, index[..., None].expand(*index.shape, seen.shape[-1]))
        return use(seen)
    pieces = (whole if index is None else index).split(1024, -1)
    return torch.cat([use(look(piece)) for piece in pieces], 2)


def top_tokens(model, states, size, index=None):
    """Number of the token that each pixel looks at most, mean over the heads of the last layer: (B, T, P)."""
    return attention_chunks(model, states, size, lambda seen: seen.argmax(-1), index)


@torch.no_grad()
def tokens(model, config, args, report):
    T, size = max(model.cfg.frames, 8), (model.cfg.size, model.cfg.size)
    video = eval_video(model, config, args, T, 2)
    states = model.predict_ahead(video[:, :-1])        # (B, T, N, D), each from the frames before its own
    prediction = model.decode(states, size)
    top = top_tokens(model, states, size).unflatten(-1, size)               # (B, T, H, W)
    N = states.shape[2]
    hues = torch.rand(N, generator=torch.Generator().manual_seed(0))
    colours = torch.tensor(plt.get_cmap("hsv")(hues.numpy())[:, :3], dtype=torch.float32)
    values = 0.45 + 0.55 * torch.rand(N, 1, generator=torch.Generator().manual_seed(1))
    painted = (colours * values).to(top.device)[top].movedim(-1, 2)         # (B, T, 3, H, W)
    blended = 0.75 * painted + 0.25 * video.mean(2, keepdim=True)
    rows = [(name, as_images(x[b])) for b in range(len(video)) for name, x in
            (("frame", video), ("predicted", prediction), ("tokens", blended))]
    times = [f"t = {t}" for t in range(8)]
    report.picture(film([(name, clip[:8]) for name, clip in rows], times)[0], "tokens.png")
    strip = np.concatenate([np.concatenate([clip for _, clip in rows[3 * b:3 * b + 3]], 2) for b in
                            range(len(video))], 1)                          # (T, B*H, 3*W, 3)
    strip = np.uint8(255 * strip).repeat(2, 1).repeat(2, 2)
    iio.imwrite(report.out / "tokens.gif", strip, duration=250, loop=0)

    # four tokens of the first clip, drawn from the twelve that most of its pixels look at
    most = top[0, 1:8].flatten().bincount(minlength=N).argsort(descending=True)[:12]
    four = most[torch.randperm(len(most), generator=torch.Generator().manual_seed(args.seed))[:4]]
    seen = attention_chunks(model, states[:1, :8], size, lambda seen: seen[..., four])[0].unflatten(1, size)
    seen = seen / seen[1:].amax((0, 1, 2)).clamp(min=1e-12)                 # t = 0 is decoded from noise
    maps = plt.get_cmap("viridis")(seen.clamp(max=1).cpu().numpy())[..., :3]
    rows = [("frame", as_images(video[0])[:8])] + [
        (f"token {n}", maps[..., i, :]) for i, n in enumerate(four.tolist())]
    report.picture(film(rows, times)[0], "tokens_single.png")
    components(model, config, args, report, times)

    if args.data == "scenes" and scene_options(model, config, args, T).get("sprites", 4):
        report.table(
            "share of points on sprites whose token is the same one frame later",
            ["where the point went", "where it was", "at another point"],
            [["this model", *follow(model, config, args)]])


def components(model, config, args, report, times):
    """tokens_pca.png: three leading components of the tokens, as RGB, fitted to PCA_CLIPS clips of 12 frames.
    A pixel shows the mean of the tokens weighted by how much it looks at them."""
    video, size = eval_video(model, config, args, 12, PCA_CLIPS), (model.cfg.size, model.cfg.size)
    states = torch.cat([model.predict_ahead(clips[:, :-1]) for clips in video.split(4)])
    flat = states.flatten(0, 2)
    centred = flat - flat.mean(0)
    variances, axes = torch.linalg.eigh((centred.mT @ centred).cpu().double())    # (D,) rising, (D, D)
    three = (centred @ axes[:, -3:].flip(-1).to(centred)).unflatten(0, states.shape[:3])
    share = variances[-3:].sum() / variances.sum()
    paint = lambda b: attention_chunks(model, states[b:b + 1, :8], size, lambda seen: seen @ three[b:b + 1, :8])
    painted = torch.cat([paint(b) for b in range(3)])                       # (B, T, H*W, 3)
    low, high = painted[:, 1:].flatten(0, 2).quantile(torch.tensor([0.02, 0.98]).to(painted), dim=0)
    painted = ((painted - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).unflatten(2, size).cpu().numpy()
    rows = [row for b in range(3) for row in
            (("frame", as_images(video[b])[:8]), ("components", painted[b]))]
    figure, _ = film(rows, times)
    figure.supxlabel(f"three leading components of the tokens: {share:.0%} of their variance", fontsize=9)
    report.picture(figure, "tokens_pca.png")


@torch.no_grad()
def follow(model, config, args):
    """
    How often the token that a sprite's point looks at most stays the same from a frame to the next: at the
    place to which the point has moved, by the scenes' true tracks, and at the place that it has left, of
    points that are visible in both and have left their place to another layer. Also how often by chance: the
    same at the place of another point of the clip.
    """
    cfg = model.cfg
    size, T = (cfg.size, cfg.size), max(cfg.frames, 8)
    scenes = data.Scenes(**scene_options(model, config, args, T))
    clips = scenes.batch(range(1000, 1064), truth=True, points=256)
    clips = {name: value.to(args.device) for name, value in clips.items()}
    states = torch.cat([model.predict_ahead(clip[:, :-1]) for clip in clips["video"].split(8)])    # (B, T, N, D)
    tracks, ids = clips["tracks"], clips["ids"].flatten(2)                  # (B, T, P, 2), (B, T, H*W)
    x, y = tracks.round().long().clamp(0, cfg.size - 1).unbind(-1)
    index = y * cfg.size + x                                                # (B, T, P)
    left = index.roll(1, 1)                                                 # where the point was at t - 1
    sprite = ids[:, :1].gather(2, index[:, :1])                             # (B, 1, P)
    visible = clips["visible"] & ((tracks >= 0) & (tracks <= cfg.size - 1)).all(-1)
    counts = (visible[:, 1:] & visible[:, :-1] & (sprite > 0) & (ids.gather(2, left) != sprite)[:, 1:])
    counts[:, 0] = False                            # frame 0 is decoded from noise
    here, there = (top_tokens(model, states, size, i) for i in (index, left))
    before, here, there = here[:, :-1], here[:, 1:], there[:, 1:]
    return [(now == before)[counts].float().mean().item() for now in (here, there, here.roll(1, 2))]


# ---- MooG: readouts ------------------------------------------------------------------------------
# our choice of all: clips to learn from, held-out ones, points of each, frames of a clip, queries of a step
POOL, TESTS, POINTS, FRAMES, QUERIES = 1024, 64, 64, 8, 32
READOUT_STEPS = dict(points=250, boxes=250, depth=150)
FIRST = 10**6                           # number of the first clip: no training of a MooG comes so far


def shares(boxes, width, height):
    """Boxes x1 y1 x2 y2 in pixels, whose centres are integers, as shares y1 x1 y2 x2 of the frame; whether
    more than half of each lies in the frame. What sticks out is cut off."""
    whole = ((boxes + 0.5) / torch.tensor([width, height] * 2).to(boxes))[..., [1, 0, 3, 2]]
    cut, area = whole.clamp(0, 1), lambda box: (box[..., 2:] - box[..., :2]).prod(-1)
    return cut, area(cut) > area(whole) / 2


def scene_clips(model, config, args, split, count):
    """
    Clips of scenes with what readouts are to say of them, places as shares of the frame's size. Their points
    are on sprites, if there are any in frame 0: nobody could follow those on a plain background.
    """
    scenes = data.Scenes(**scene_options(
        model, config, args, max(model.cfg.frames, FRAMES), split))
    generator, parts = torch.Generator().manual_seed(args.seed), []
    for i in range(0, count, 16):
        clip = scenes.batch(range(FIRST + i, FIRST + min(i + 16, count)), truth=True, points=8 * POINTS)
        clip = {name: value.to(args.device) for name, value in clip.items()}
        x, y = clip["tracks"][:, 0].long().unbind(-1)
        sprite = clip["ids"][:, 0].flatten(1).gather(1, y * scenes.size + x) > 0
        drawn = torch.multinomial(sprite.cpu() + 1e-9, POINTS, generator=generator).to(args.device)
        at = lambda x: x.gather(2, drawn[:, None].expand(-1, x.shape[1], -1))
        parts.append(dict(
            video=(255 * clip["video"]).round().byte(), boxes=clip["boxes"], depth=clip["depth"],
            tracks=torch.stack([at(x) for x in clip["tracks"].unbind(-1)], -1), visible=at(clip["visible"])))
    clips = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    clips["tracks"] = (clips["tracks"] + 0.5) / scenes.size
    clips["boxes"], clips["inside"] = shares(clips["boxes"], scenes.size, scenes.size)
    clips["valid"] = torch.ones_like(clips["visible"])
    clips["query_frames"] = torch.zeros_like(clips["visible"][:, 0], dtype=torch.long)
    return clips


def real_clip(item, size, device):
    """A clip of data.PointTracks or BoxTracks as one of scene_clips(), without its first axis: B. Frames are
    squashed to size x size, as in TAP-Vid; depth takes the nearest measurement."""
    H, W = item["video"].shape[1:3]
    video = torch.as_tensor(item["video"]).movedim(-1, 1)
    resize = lambda x, **how: F.interpolate(x, (size, size), **how)
    clip = dict(video=resize(video, mode="bilinear", antialias=True))
    if "boxes" in item:                             # one box a frame
        clip["boxes"], clip["inside"] = shares(torch.as_tensor(item["boxes"])[:, None], W, H)
    if "tracks" in item:
        clip["tracks"] = (torch.as_tensor(item["tracks"]) + 0.5) / torch.tensor([W, H])
        clip |= {name: torch.as_tensor(item[name]) for name in ("visible", "valid", "query_frames")}
    if "depth" in item:
        clip["depth"] = resize(torch.as_tensor(item["depth"])[:, None], mode="nearest-exact")[:, 0]
    return {name: x.to(device) for name, x in clip.items()}


def window(clip, frames, generator):
    """
    A random window of a real clip, every second time mirrored; its points, drawn from those that are seen in
    it, are given at a random one of the frames in which they are seen. None if nothing is to be learnt there.
    """
    T = len(clip["video"])
    draw = lambda *shape: torch.rand(*shape, generator=generator)
    start = int(draw(1) * (T - frames + 1))
    out = {name: x[start:start + frames] for name, x in clip.items() if name != "query_frames"}
    if "tracks" in clip:
        seen = (out["visible"] & out["valid"]).cpu()                        # (frames, P)
        if not seen.any():
            return None
        drawn = torch.multinomial(seen.any(0).float(), POINTS, replacement=True, generator=generator)
        at = torch.multinomial(seen[:, drawn].T.float(), 1, generator=generator)[:, 0]
        drawn = drawn.to(clip["video"].device)
        out |= {name: out[name][:, drawn] for name in ("tracks", "visible", "valid")}
        out["query_frames"] = at.to(drawn.device)
    if "boxes" in clip and not out["inside"][0].any():
        return None
    if draw(1) < 0.5:
        out["video"] = out["video"].flip(-1)
        if "tracks" in out:
            out["tracks"] = torch.stack([1 - out["tracks"][..., 0], out["tracks"][..., 1]], -1)
        if "boxes" in out:
            y1, x1, y2, x2 = out["boxes"].unbind(-1)
            out["boxes"] = torch.stack([y1, 1 - x2, y2, 1 - x1], -1)
        if "depth" in out:
            out["depth"] = out["depth"].flip(-1)
    return out


class Lessons:
    """
    What readouts learn from, and what they are tested on.

    clips       of scenes, or windows of --data: of its clips all but the last third in the order of their
                names, at least one, which are for the test; of a single one all is, and scenes are to learn
    tests       scenes in batches, or whole clips of --data one by one (boxes: in windows of 16 frames)
    models      the checkpoint's, and one of the same Config with random weights
    """

    def __init__(self, model, config, args, task):
        torch.manual_seed(args.seed)
        self.models = {"this model": model, "random init": moog.MooG(model.cfg).to(args.device).eval()}
        self.features, self.real = {}, args.data != "scenes"
        if not self.real:
            self.clips = scene_clips(model, config, args, "train", POOL)
            held_out = scene_clips(model, config, args, "eval", TESTS)
            self.tests = [{name: x[i:i + 16] for name, x in held_out.items()}
                          for i in range(0, TESTS, 16)]
            return
        items = (data.BoxTracks if task == "boxes" else data.PointTracks)(args.data)
        wanted = dict(points="tracks", boxes="boxes", depth="depth")[task]
        order = sorted(range(len(items)), key=lambda i: items.names[i])
        kept = len(order) - max(len(order) // 3, 1)
        clips = [real_clip(items[i], model.cfg.size, args.device) for i in order]
        if not all(wanted in clip for clip in clips):
            raise Stop(f"--data {args.data}: no {wanted} in it, which --task {task} needs")
        whole = lambda clip: {name: x[None] for name, x in clip.items()}
        self.tests = [whole(clip) for clip in clips[kept:]]
        if task == "boxes":
            self.tests = [{name: x[:, i:i + 16] for name, x in clip.items()} for clip in self.tests
                          for i in range(0, clip["video"].shape[1] - 1, 16)]
        if task == "depth" and not kept:
            raise Stop(f"--data {args.data}: depth is to be learnt from other clips: want two or more")
        names = ", ".join(items.names[i] for i in order[kept:])
        tqdm.write(f"\n{args.data}: trained on {f'{kept} clips' if kept else 'scenes'}, tested on {names}")
        if not kept:
            self.clips = scene_clips(model, config, args, "train", POOL)
            return
        frames = min([max(model.cfg.frames, FRAMES), *(len(clip["video"]) for clip in clips[:kept])])
        generator, found = torch.Generator().manual_seed(args.seed), []
        for i in range(4 * POOL):
            drawn = window(clips[i % kept], frames, generator)
            found += [drawn] if drawn else []
            if len(found) == max(POOL // 4, 1):      # few clips have few windows
                break
        if not found:
            raise Stop(f"--data {args.data}: nothing to be seen in the clips to train on")
        self.clips = {name: torch.stack([clip[name] for clip in found]) for name in found[0]}

    @torch.no_grad()
    def seen(self, name, at):
        """What the frozen model `name` makes of the clips `at`: computed once, if it fits into 1 GB."""
        video, model = self.clips["video"], self.models[name]
        if name not in self.features:
            first = model.unroll(video[:8]).features
            fits = first.numel() / len(first) * len(video) < 2**28
            self.features[name] = torch.cat([model.unroll(x).features for x in progress(
                video.split(8), f"features, {name}")]) if fits else None
        kept = self.features[name]
        return model.unroll(video[at]).features if kept is None else kept[at]

    def train(self, build, loss, args, task):
        """
        {name of a model: (the model, its readout)}. build() -> readout; loss(readout, features, batch of
        clips). With --finetune the models are copied, and trained together with their readouts.
        """
        out, steps = {}, args.steps or READOUT_STEPS[task]
        for name, model in self.models.items():
            torch.manual_seed(args.seed)            # both begin alike and see the same clips
            model, readout = deepcopy(model) if args.finetune else model, build().to(args.device)
            draws = torch.Generator().manual_seed(args.seed)

            def step(i, name=name, model=model, readout=readout, draws=draws):
                at = torch.randint(len(self.clips["video"]), (args.batch_size,), generator=draws)
                at = at.to(args.device)
                batch = {key: x[at] for key, x in self.clips.items()}
                features = model.unroll(batch["video"]).features if args.finetune else self.seen(name, at)
                return loss(readout, features, batch)
            fit([readout, model] if args.finetune else [readout], step, steps, f"{task}, {name}", lr=args.lr)
            out[name] = model, readout
        return out


def lessons(model, config, args, report, task):
    """Lessons; those on scenes serve all tasks."""
    if args.data != "scenes":
        return Lessons(model, config, args, task)
    report.lessons = report.lessons or Lessons(model, config, args, task)
    return report.lessons


def readout_sizes(cfg):
    """Widths in proportion to the model's: at the paper's 512, the paper's. our choice: 2 layers if small."""
    heads = max(cfg.dim // 64, 1) if cfg.dim >= 128 else 4 if cfg.dim % 4 == 0 else 1
    return dict(width=cfg.dim, transformer=(3 if cfg.dim >= 256 else 2, heads, cfg.dim), hidden=4 * cfg.dim,
                bases=cfg.decoder_bases)


def tracker(kind, cfg):
    """PointReadout or BoxReadout that begins near staying where the query is, see answers()."""
    readout = kind(cfg.dim, **readout_sizes(cfg))
    with torch.no_grad():
        readout.values[-1].weight.mul_(0.1)
    return readout


def answers(readout, features, queries, query_frames=None):
    """
    readout(...) whose values are moved: queries + 2 * values - 1. our choice: what a readout learns is how
    far things went from the query, not where they are. So it need not learn first to copy the query.
    """
    out = readout(features, queries, query_frames)
    return out._replace(values=queries[:, None] + 2 * out.values - 1)


def of_queries(x, frames):
    """x (B, T, K, ...) at each query's own frame (B, K) -> (B, K, ...)."""
    index = frames[:, None].reshape(len(x), 1, -1, *[1] * (x.ndim - 3))
    return x.gather(1, index.expand(-1, -1, -1, *x.shape[3:]))[:, 0]


def points(model, config, args, report):
    """Point tracking: a query in one frame, followed through the others."""
    school = lessons(model, config, args, report, "points")

    def loss(readout, features, batch):
        K = torch.randint(POINTS, (QUERIES,), device=features.device)
        tracks, visible, valid = (batch[name][:, :, K] for name in ("tracks", "visible", "valid"))
        frames = batch["query_frames"][:, K]
        time = torch.arange(tracks.shape[1], device=tracks.device)[:, None]
        valid = valid & (time >= frames[:, None])
        out = answers(readout, features, of_queries(tracks, frames), frames)
        return readout.loss(out, tracks, visible, valid)

    trained = school.train(lambda: tracker(moog.PointReadout, model.cfg), loss, args, "points")
    scores, shown = {name: [] for name in (*trained, "stays put")}, None
    for test in progress(school.tests, "points, test"):
        frames, tracks = test["query_frames"], test["tracks"]
        queries = of_queries(tracks, frames)
        guesses = {"stays put": (queries[:, None].expand_as(tracks), *[torch.ones_like(test["visible"])] * 2)}
        for name, (seer, readout) in trained.items():
            with torch.no_grad():
                out = answers(readout, seer.unroll(test["video"]).features, queries, frames)
            guesses[name] = out.values, out.visible, out.logits[..., 0] > 0
        for name, guess in guesses.items():
            scores[name].append(point_scores(*guess, test))
        shown = shown or (test, guesses["this model"])
    columns = list(scores)
    scores = {name: {row: torch.cat([part[row] for part in parts]).nanmean().item() for row in parts[0]}
              for name, parts in scores.items()}
    report.table(f"points, {'end to end' if args.finetune else 'frozen features'}, pixels of 256 x 256",
                 columns, [[row, *(scores[name][row] for name in columns)] for row in scores["stays put"]])
    report.picture(points_picture(*shown), "points.png")


def point_scores(tracks, visible, seen, test):
    """Rows of the table, each (B,), of tracks (B, T, P, 2), shares of the frame; seen: certain or not."""
    turn = lambda x: x.transpose(1, 2).cpu()
    tracks, target, true, valid = (turn(x) for x in (tracks, test["tracks"], test["visible"], test["valid"]))
    frames = test["query_frames"].cpu()
    sure, each = (tracking_metrics(256 * tracks, turn(x), 256 * target, true, frames, valid=valid)
                  for x in (visible, seen))
    counted = true & valid & (torch.arange(true.shape[2]) > frames[..., None])
    away = torch.where(counted, 256 * (tracks - target).norm(dim=-1), torch.nan)
    return {"average Jaccard": sure["average_jaccard"], "occlusion accuracy": sure["occlusion_accuracy"],
            "average Jaccard, certain or not": each["average_jaccard"],
            "occlusion accuracy, certain or not": each["occlusion_accuracy"],
            "delta_avg": sure["delta_avg"], "delta_16": sure["delta_16"],
            "mean distance, pixels": away.flatten(1).nanmean(1)}


def points_picture(test, guess, clips=3, most=8):
    """Rows of clips: points with the way that they came, as they went and as predicted; hollow: hidden."""
    clips, T = min(clips, len(test["video"])), test["video"].shape[1]
    times = sorted({round(i * (T - 1) / 4) for i in range(5)})
    rows = []
    for b in range(clips):
        images = as_images(test["video"][b])
        rows += [(label, [images[t] for t in times]) for label in ("truth", "this model")]
    figure, axes = film(rows, [f"t = {t}" for t in times], width=1.75)
    S = test["video"].shape[-1]
    tracks, valid, true = (test[name].cpu() for name in ("tracks", "valid", "visible"))
    frames = test["query_frames"].cpu()
    for b in range(clips):
        lasting = (true[b].float().mean(0) >= 0.6).nonzero()[:, 0]          # points that can be seen for long
        chosen = lasting[torch.linspace(0, len(lasting) - 1, min(most, len(lasting))).round().long()]
        colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(chosen)))
        for line, (places, seen) in enumerate(((tracks, true), (guess[0].cpu(), guess[2].cpu()))):
            for axis, t in zip(axes[2 * b + line], times):
                axis.set(xlim=(-0.5, S - 0.5), ylim=(S - 0.5, -0.5))
                for p, colour in zip(chosen.tolist(), colours):
                    first = int(frames[b, p])
                    if t < first or line == 0 and not valid[b, t, p]:
                        continue
                    for s in range(max(first, t - 8), t):   # older is fainter
                        if line == 0 and not (valid[b, s, p] and valid[b, s + 1, p] and
                                              true[b, s, p] and true[b, s + 1, p]):
                            continue
                        axis.plot(*(S * places[b, s:s + 2, p] - 0.5).T, color=colour, lw=1.6,
                                  alpha=max(0.15, 1 - (t - s) / 8))
                    if line == 0 and not true[b, t, p] and not bool(places[b, t, p].abs().sum() > 0):
                        continue
                    axis.scatter(*(S * places[b, t, p] - 0.5), s=22, zorder=3, linewidths=1.3,
                                 color=colour if seen[b, t, p] else "none", edgecolors=colour
                                 if not seen[b, t, p] else "black")
    figure.supxlabel("filled: said to be seen; hollow: hidden; lines: the way since the query", fontsize=9)
    return figure


def boxes(model, config, args, report):
    """Box tracking: a box in the first frame, followed through the others."""
    if args.data == "scenes" and not scene_options(model, config, args, 1).get("sprites", 4):
        raise Stop("boxes: the scenes of this checkpoint have no sprites")
    school = lessons(model, config, args, report, "boxes")

    def loss(readout, features, batch):
        valid = batch["inside"] & batch["inside"][:, :1]
        out = answers(readout, features, batch["boxes"][:, 0])
        return readout.loss(out, batch["boxes"], valid, valid)

    trained = school.train(lambda: tracker(moog.BoxReadout, model.cfg), loss, args, "boxes")
    scores, shown = {name: [] for name in (*trained, "keeps its first box")}, None
    order = [1, 0, 3, 2]                                    # box_iou wants x1 y1 x2 y2
    for test in progress(school.tests, "boxes, test"):
        target = test["boxes"]
        guesses = {"keeps its first box": target[:, :1].expand_as(target)}
        for name, (seer, readout) in trained.items():
            with torch.no_grad():
                guesses[name] = answers(readout, seer.unroll(test["video"]).features, target[:, 0]).values
        counted = (test["inside"] & test["inside"][:, :1])[:, 1:]
        for name, guess in guesses.items():
            iou = box_iou(guess[..., order], target[..., order])[:, 1:]
            scores[name].append(iou[counted].cpu())
        shown = shown or (test, guesses["this model"])
    scores = {name: torch.cat(parts) for name, parts in scores.items()}
    if not len(scores["this model"]):
        raise Stop("boxes: in no clip does more than half of a box stay in the frame from the first frame on")
    report.table(f"boxes, {'end to end' if args.finetune else 'frozen features'}: intersection over union",
                 list(scores), [["mean, frames after the query", *(x.mean().item() for x in scores.values())],
                                ["share above 1/2", *((x > 0.5).double().mean().item() for x in
                                                      scores.values())]])
    report.picture(boxes_picture(*shown), "boxes.png")


def boxes_picture(test, guess, clips=3):
    T, S, clips = test["video"].shape[1], test["video"].shape[-1], min(clips, len(test["video"]))
    times = sorted({round(i * (T - 1) / 5) for i in range(6)})
    figure, axes = film([("", list(as_images(test["video"][b, times]))) for b in range(clips)],
                        [f"t = {t}" for t in times], width=1.5)
    target, inside, guess = (x.cpu() for x in (test["boxes"], test["inside"], guess))
    for b in range(clips):
        for axis, t in zip(axes[b], times):
            axis.set(xlim=(-0.5, S - 0.5), ylim=(S - 0.5, -0.5))
            for k in range(target.shape[2]):
                if not (inside[b, 0, k] and inside[b, t, k]):
                    continue
                for box, style in ((target, dict(color="white", lw=2.4)), (guess, dict(
                        color=("#e69f00", "#d55e00", "#cc79a7", "#f0e442")[k % 4], lw=1.4, ls="--"))):
                    y1, x1, y2, x2 = (S * box[b, t, k] - 0.5).tolist()
                    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))
    figure.supxlabel("white: truth; dashed: this model, from the box at t = 0", fontsize=9)
    return figure


def depth(model, config, args, report):
    """Depth of every pixel, from the features of its frame."""
    school, cfg = lessons(model, config, args, report, "depth"), model.cfg
    measured = school.clips["depth"][::4, ::2].flatten()
    median = measured[measured > 0].median()

    def build():
        sizes = readout_sizes(cfg)
        readout = moog.DepthReadout(cfg.dim, sizes["transformer"], sizes["hidden"], sizes["bases"])
        with torch.no_grad():           # our choice: begins near the median
            readout.recon.weight.mul_(0.1)
            readout.recon.bias.fill_(median)
        return readout

    def loss(readout, features, batch):
        B, T, *size = batch["depth"].shape
        factor = next(f for f in (8, 4, 2, 1) if size[0] % f == 0)
        index = moog.subsample(size, factor, torch.randint(factor, (B, T, 2), device=features.device))
        target = moog.gather_pixels(batch["depth"][:, :, None], index).flatten(0, 1)
        return readout.loss(readout(features.flatten(0, 1), size, index.flatten(0, 1)), target, target > 0)

    trained = school.train(build, loss, args, "depth")
    scores, shown = {name: [] for name in (*trained, "median")}, []
    for test in progress(school.tests, "depth, test"):
        target = test["depth"][:, 3::4]                     # all pixels of every fourth frame
        guesses = {"median": torch.full_like(target, median)}
        for name, (seer, readout) in trained.items():
            guesses[name] = depth_of(seer, readout, test["video"])
        for name, guess in guesses.items():
            scores[name] += [depth_metrics(a.cpu(), b.cpu()) for a, b in zip(guess, target) if (b > 0).any()]
        triples = (x.flatten(0, 1) for x in (test["video"][:, 3::4], target, guesses["this model"]))
        shown += list(zip(*triples))
    columns = list(scores)
    if not scores["median"]:
        raise Stop(f"--data {args.data}: no depth is measured in every fourth frame of the clips to test on")
    report.table(f"depth, {'end to end' if args.finetune else 'frozen features'}", columns, [
        [row, *(statistics.fmean(score[key] for score in scores[name]) for name in columns)]
        for row, key in (("AbsRel", "abs_rel"), ("RMSE", "rmse"), ("delta < 1.25", "delta_1.25"))])
    report.picture(depth_picture([shown[i * len(shown) // 5] for i in range(5)]), "depth.png")


@torch.no_grad()
def depth_of(model, readout, video):
    """Depth (B, frames, H, W) of frames 3, 7, 11, ... of the videos, in pieces."""
    size = video.shape[-2:]
    features = model.unroll(video).features[:, 3::4]
    index = torch.arange(size[0] * size[1], device=video.device)
    parts = [torch.cat([readout(part, size, piece) for piece in index.split(4096)], 1)
             for part in features.flatten(0, 1).split(8)]
    return torch.cat(parts)[..., 0].view(*features.shape[:2], *size)


def depth_picture(shown):
    figure, axes = film([("frame", [as_images(frame) for frame, _, _ in shown]),
                         ("truth", [target.cpu().numpy() for _, target, _ in shown]),
                         ("this model", [guess.cpu().numpy() for *_, guess in shown])], width=1.6)
    known = torch.cat([target[target > 0] for _, target, _ in shown])
    for line in axes[1:]:
        for axis in line:
            [image] = axis.images
            image.set(cmap="cividis", clim=(known.min().item(), known.max().item()))
            values = image.get_array()
            image.set_array(np.ma.masked_where(values <= 0, values))
            axis.set_facecolor("white")
    figure.colorbar(image, ax=axes[1:], label="depth (white: not measured)", fraction=0.03, pad=0.01)
    return figure


# ---- MooG: longer clips, other numbers of tokens -------------------------------------------------
@torch.no_grad()
def unroll(model, config, args, report):
    """PSNR of predicted frames over 36 frames, with a quarter, half, once and twice training's tokens."""
    T, S, cfg = 36, model.cfg.size, model.cfg
    if args.data == "scenes":       # in longer clips sprites pass by: 8 frames, forth and back, hold them
        back = torch.tensor([min(t % 14, 14 - t % 14) for t in range(T)], device=args.device)
        video = eval_video(model, config, args, 8, 32)[:, back]
    else:
        video = eval_video(model, config, args, T, 16)
    factor = 1 if cfg.decoder_self_attention else next(f for f in (4, 2, 1) if S % f == 0)
    index = moog.subsample((S, S), factor).to(args.device).expand(len(video), T, -1)
    target, N = moog.gather_pixels(video, index), cfg.tokens
    ratio = lambda guess: -10 * (guess - target[:, 1:]).square().mean((2, 3)).clamp(min=1e-10).log10()
    curves = {"copy": ratio(target[:, :-1])}                # (clips, T - 1) in dB
    numbers = {f"{times:g}x tokens": max(round(times * N), 1) for times in (0.25, 0.5, 1, 2)}
    for name, tokens in ({"this model": None} if cfg.grid else numbers).items():
        guess = []
        for clips, pixels in zip(video.split(4), index.split(4)):
            states = model.predict_ahead(clips[:, :-1], tokens=tokens)
            guess.append(model.decode(states, (S, S), pixels)[:, 1:])
        curves[name] = ratio(torch.cat(guess))
    curves["copy"] = curves.pop("copy")                     # the last column
    curves = {name: curve.mean(0).cpu() for name, curve in curves.items()}
    parts = {"t = 1-7": slice(0, 7), "t = 8-15": slice(7, 15), "t = 16-23": slice(15, 23),
             "t = 24-35": slice(23, 35)}
    report.table(f"PSNR in dB of {len(video)} clips' frames, predicted from those before; trained on "
                 f"{cfg.frames} frames", list(curves),
                 [[row, *(curve[part].mean().item() for curve in curves.values())]
                  for row, part in parts.items()])
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    styles = {"copy": dict(color="black", ls=":")} | {
        name: dict(color=colour, marker=marker, ms=3.5) for name, colour, marker in zip(
            list(curves)[:-1], plt.get_cmap("viridis")([0.85, 0.6, 0.3, 0]), "sovD")}
    for name, curve in curves.items():
        axis.plot(range(1, T), curve, label="copying the frame before" if name == "copy" else name,
                  lw=1.5, **styles[name])
    axis.axvline(cfg.frames - 0.5, color="0.5", ls="--", lw=1)
    axis.annotate(f"training: {cfg.frames} frames", (cfg.frames - 0.5, 0), xycoords=("data", "axes fraction"),
                  xytext=(4, 4), textcoords="offset points", fontsize=9, color="0.3")
    axis.set(xlabel="t", ylabel="PSNR in dB", xlim=(0.5, T - 0.5))
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, ncols=len(curves), loc="outside upper center")
    report.picture(figure, "unroll.png")


# ==== shim: what eval.py's rebuilt shared part brings; drop when merging ====
BAR = dict(leave=False, disable=not sys.stderr.isatty())


class Run:
    def __init__(self, model, args, report):
        self.model, self.args, self.out = model, args, report.out
        self.table, self.picture = report.table, report.picture

    def gif(self, frames, name, duration=250):
        iio.imwrite(self.out / name, np.uint8(255 * np.clip(frames, 0, 1)), duration=duration, loop=0)


def rendered(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    plt.close(figure)
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def image_grid(rows, columns=(), width=1.4, note=""):
    most = max(len(images) for _, images in rows)
    H, W = rows[0][1][0].shape[:2]
    size = (width * most + 0.3, width * H / W * len(rows) + 0.55)
    figure, axes = plt.subplots(len(rows), most, squeeze=False, layout="constrained", figsize=size)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    for (label, images), line in zip(rows, axes):
        line[0].set_ylabel(label, fontsize=9)
        for axis, image in zip(line, images):
            axis.imshow(image, interpolation="nearest" if H < 100 else None)
            axis.autoscale(False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], columns):
        axis.set_title(title, fontsize=9)
    if note:
        figure.supxlabel(note, fontsize=9)
    return figure, axes


# ==== end of the shim ====


# ---- MeloMotion: many trainings at once ----------------------------------------------------------
EPOCH = 2000                            # clips, one a step. report: Sec. 4.1
ROUNDS = 7                              # of the stopwatch
DIFF, ALL, RANDOM, _ = data.MODES       # who moves: the first object, all, a random one


@cache
def pooled_clips(mode, seed, epoch, split="train"):
    """What predictors see of an epoch: {pooling: (EPOCH, N, 3 or 16)}, and displacements `d`."""
    models = {name: MeloMotion(Config(pooling=name)) for name in POOLINGS}
    squares = data.MovingSquares(mode=mode, seed=seed, split=split, video=False)
    parts = []
    for some in torch.arange(EPOCH).split(20):          # few at a time, as caches like it
        batch = squares.batch(epoch * EPOCH + some)
        layers = MeloMotion.extract(batch["first_frame"], batch["masks"])
        part = {name: model.pool(layers) for name, model in models.items()}
        parts.append(part | dict(d=batch["displacements"]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train_together(models, mode, optimizer, epochs=2, **options):
    """
    Trains R models of one Config, each as train.py would, one clip a step, model i on clips of seed
    i: AdamW and SGD treat each number by itself, so a step of stacked weights is R steps. Returns
    the mean POS of each epoch's steps, epochs x R. our choice: 2 epochs, as the claim is of two.
    """
    params, _ = stack_module_state(models)
    params = {name: p for name, p in params.items() if p.requires_grad}
    optimizer = optimizer(params.values(), **options)
    forward = vmap(lambda weights, batch: functional_call(models[0], weights, (batch,)))
    history = []
    for epoch in range(epochs):
        clips = [pooled_clips(mode, seed, epoch) for seed in range(len(models))]
        pooled = torch.stack([c[models[0].cfg.pooling] for c in clips], 1)      # (EPOCH, R, N, 3)
        d = torch.stack([c["d"] for c in clips], 1)                     # (EPOCH, R, N, T-1, 2)
        total = torch.zeros(len(models))
        for i in tqdm(range(EPOCH), f"epoch {epoch + 1} of {epochs}", **BAR):
            batch = dict(pooled=pooled[i, :, None], displacements=d[i, :, None])
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
    clips = pooled_clips(mode, 0, 0, "eval")
    d = clips["d"]                                      # (clips, N, T-1, 2)
    true = d[:, :1, 0]                                  # v of object 0, (clips, 1, 2)
    rows = []
    for model in models:
        pooled = clips[model.cfg.pooling]               # (clips, N, 3 or 16)
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
    "shared, all move": (SHARED, ALL, ADAMW),
    "shared, random mover": (SHARED, RANDOM, ADAMW),
    "shared + object index": (SHARED | dict(object_index=True), DIFF, ADAMW),
    "average": (dict(pooling="avg"), DIFF, ADAMW),
    "average of all, no masks": (dict(pooling="full"), DIFF, ADAMW),
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
         "shared + object index": "", "decoupled, all move": "", "shared, all move": "",
         "decoupled, random mover": "", "shared, random mover": ""}),
    "Table 4: pooling; features before training": (
        ["features differ by", "POS", "POS, nothing moves"],
        {"average": ".003, does not converge", "average, SGD, all move": ".003, does not converge",
         "maximum, SGD, all move": ".031, partial", "mean RGB, SGD, all move": ".045, converges",
         "decoupled": ".045, converges", "average of all, no masks": ""}),
    "Section 3.4: division by t^2": (
        ["POS", "POS, nothing moves"],
        {"decoupled, all move": "", "not divided, all move": "unstable",
         "mean RGB, SGD, all move": "", "not divided, SGD, all move": "unstable"}),
}


def melomotion_tables(run):
    """
    Every table of the report beside ours, and controls. Left out: our L1 in Table 2, flat as no
    gradient passes from frames to velocities; 225 : 1 in Section 3.4, which is a test.
    """
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
    table2(run, results)
    for title, (headings, trainings) in TABLES.items():
        rows = []
        for name, says in trainings.items():
            rows.append([name, says, *[results[name][heading] for heading in headings]])
        run.table(title, ["report", *headings], rows)
    edges(run)
    speed(run)


def table1(run):
    says = dict(predictors=6438, rgb_proj=256, camera=742, encoder=1088, decoder=34587)
    ours = {}
    for name in says:
        part = getattr(MeloMotion(Config()), name)
        ours[name] = sum(p.numel() for p in part.parameters())
    baseline = sum(p.numel() for p in FlowBaseline().parameters())      # with a decoder
    rows = [
        *[[name, number, ours[name]] for name, number in says.items()],
        ["total", 43111, sum(ours.values())],
        ["baseline's Swin", "323K", baseline - ours["decoder"]],
        ["baseline with all but predictors", "441K", baseline + ours["encoder"] + ours["camera"]]]
    run.table("Table 1: parameters", ["report", "ours"], rows)


def own_squares(model, frames, numbers):
    """Held-out clips of the kind that a model was trained on, of any length."""
    options = model.cfg.inputs["squares"] | dict(video=True)
    return data.MovingSquares(model.cfg.size, frames, split="eval", **options).batch(numbers)


@torch.no_grad()
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


def table2(run, results):
    video = data.MovingSquares(split="eval").batch(range(16))["video"]
    black = (video[:, 1:] / 255).mean().item()
    rows = [
        ["L1 of frames, report", 0.067, 0.068, 0.067, 0.068, 0.068, 0.067],
        ["L1 of black frames", *[black] * 6],
        ["POS, report", 2e-4, 1e-4, 1e-4, "< 1e-4", "< 1e-4", "< 1e-4"],
        ["POS", *results["decoupled, six epochs"]["history"]],
        ["POS, all move", *results["decoupled, all move"]["history"], "", "", "", ""]]
    run.table("Table 2: means of steps", [f"epoch {i + 1}" for i in range(6)], rows)


@torch.no_grad()
def edges(run):
    """What 15 frames do to an object's occupancy, channel 0, given its true velocity."""
    batch = data.MovingSquares(mode=ALL, split="eval", video=False).batch(range(100))
    layers = MeloMotion.extract(batch["first_frame"], batch["masks"])[:, :, :1]
    still = layers.flatten(0, 1)                                        # (objects, 1, h, w)
    v = batch["displacements"][:, :, 0].flatten(0, 1)[..., None, None]  # (objects, 2, 1, 1)
    again = still
    for _ in range(15):
        again = warp(again, v)
    ways = {"frame 0": still, "warped 15 times, as in a flow pipeline": again,
            "warped once, by 15 v": warp(still, 15 * v),
            "placed": place(layers, batch["displacements"][:, :, -1:]).flatten(0, 2)}
    rows = [[name, x.amax((1, 2, 3)).mean().item()] for name, x in ways.items()]
    run.table("Sharp edges (Sec. 1): occupancy of 300 objects, 15 frames on", ["peak"], rows)


def speed(run):
    """Sec. 4.8: forward, backward, AdamW; each way in turn, medians of the rounds."""
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
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    base, *_ = medians.values()
    rows = [[name, rate, rate / base] for name, rate in medians.items()]
    title = "Section 4.8: steps of one clip, one thread (report: 100 against 12 a second, MPS)"
    run.table(title, ["clips per CPU-second", "times the baseline"], rows)


def with_paths(videos, paths, times, width):
    """Frames `times` of {name: video}; on each, the true and the predicted paths so far."""
    rows = [(name, video[times]) for name, video in videos.items()]
    titles = [f"t = {t}" for t in times]
    figure, axes = image_grid(rows, titles, width, note="white: true paths, red: predicted")
    for line in axes:
        for axis, t in zip(line, times):
            for path, colour, thick in zip(paths, ("white", "tab:red"), (3, 1.2)):
                x, y = path[:t + 1].unbind(-1)                          # (t+1, N), a line each
                axis.plot(x, y, "o-", markevery=[t], color=colour, lw=thick, ms=2 * thick)
    return figure


@torch.no_grad()
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
    centres = [mask.nonzero().float().mean(0).flip(0) for mask in batch["masks"][0]]
    start = torch.stack(centres)                                        # (N, 2), (x, y)
    paths = [start + model.cfg.size * d[0].transpose(0, 1) for d in (true, ours)]
    run.picture(with_paths(videos, paths, [0, 3, 6, 9, 12, 15], 1.5), "figure1.png")
    frames = [rendered(with_paths(videos, paths, [t], 2.6)) for t in range(32)]
    run.gif(np.stack(frames), "motion.gif", 120)


# ---- command line --------------------------------------------------------------------------------
# model: {task: function of the model, its checkpoint's config, the arguments and a Report}
TASKS = {
    "midway": {"latents": latents, "heatmap": heatmap, "identity-bias": identity_bias, "track": track,
               "segmentation": segmentation, "flow": flow},
    "moog": {"tokens": tokens, "points": points, "boxes": boxes, "depth": depth, "unroll": unroll},
    "melomotion": {"tables": lambda m, c, a, r: melomotion_tables(Run(m, a, r)),        # shim
                   "figures": lambda m, c, a, r: figures(Run(m, a, r))}}


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="ckpt.pt of train.py or its folder, or the authors' .pth or .npz")
    add("--task", default="all", help="one of the model's tasks [all]")
    add("--out", default="", help="folder for results and pictures [the checkpoint's]")
    add("--data", default="scenes", help="scenes, or a path to what the task needs [scenes]")
    add("--seed", type=int, default=0, help="of samples, readouts and noise [0]")
    add("--seeds", type=int, default=3, help="MeloMotion: how often each ablation is trained [3]")
    add("--device", default="", help="cuda, mps or cpu [the first that is there]")
    add("--steps", type=int, default=0, help="training steps of a readout [the task's default]")
    add("--batch-size", type=int, default=16, help="samples per training step of a readout [16]")
    add("--lr", type=float, default=0.0, help="learning rate of a readout [1e-3; moog 3e-3]")
    add("--finetune", action="store_true", help="train the model together with the readout")
    add("--head", choices=("linear", "upernet"), default="linear", help="segmentation: the readout [linear]")
    add("--features", choices=("backward", "encoder"), default="encoder",
        help="linear readout: of what [encoder]; the paper's is of the backward layers")
    add("--classes", type=int, default=0, help="segmentation: how many [what the folder says]")
    add("--ignore-index", type=int, help="segmentation: label to leave out [what the folder says, or 255]")
    add("--size", type=int, default=0, help="segmentation: short side of images [16/7 of the model's size]")
    add("--encoder-only", action="store_true", help="flow: the control alone")
    add("--overlap", type=float, default=0.7, help="flow: share by which tiles overlap [0.7]")
    add("--draws", type=int, default=32, help="heatmaps: random vectors to average over [32]")
    add("--at", type=float, nargs=2, metavar=("X", "Y"), help="heatmap: where, from 0 to 1")
    add("--against", default="", help="identity-bias: another Midway checkpoint, such as one without gating")
    add("--tracks", default="", help="track: .npz with true tracks of the video in --data")
    add("--gap", type=float, nargs=2, default=(0.5, 1.0), help="videos: seconds between two frames [0.5 1]")
    add("--stride", type=int, default=0,
        help="videos: source frames from frame to frame of a clip [1; track, if no tracks are known: 6]")
    args = parser.parse_args(argv)
    for name, fits, want in (
            ("seeds", args.seeds >= 1, "1 or more"), ("draws", args.draws >= 1, "1 or more"),
            ("steps", args.steps >= 0, "0 or more"), ("batch_size", args.batch_size >= 1, "1 or more"),
            ("stride", args.stride >= 0, "1 or more"), ("size", args.size >= 0, "0 or more"),
            ("classes", args.classes >= 0, "0 or more"), ("overlap", 0 <= args.overlap < 1, "0 to below 1"),
            ("gap", 0 < args.gap[0] <= args.gap[1], "two rising numbers above 0"),
            ("lr", args.lr >= 0, "0 or more"),
            ("at", args.at is None or all(0 <= x <= 1 for x in args.at), "two numbers from 0 to 1")):
        if not fits:
            parser.error(f"--{name.replace('_', '-')} must be {want}, not {getattr(args, name)}")
    model, name, config, path = load(args.checkpoint)
    tasks = TASKS.get(name, {})
    chosen = tasks if args.task == "all" else {args.task: tasks.get(args.task)}
    if not chosen or None in chosen.values():
        raise Stop(f"{name} has no task {args.task!r}: choose from {', '.join(tasks) or 'none, so far'}")
    args.device = train.choose_device(args.device) if name != "melomotion" else torch.device("cpu")
    model.to(args.device)
    args.lr = args.lr or (3e-3 if name == "moog" else 1e-3)
    report, left_out = Report(Path(args.out) if args.out else path.parent, args.seeds), []
    report.out.mkdir(parents=True, exist_ok=True)
    misfits = Stop if args.data == "scenes" else (Stop, ValueError, OSError)
    for task, run_task in chosen.items():
        start, report.tables = time.perf_counter(), {}
        torch.manual_seed(args.seed)
        try:
            run_task(model, config, args, report)
        except misfits as error:            # of all tasks, some may have no use for this model or these data
            left_out.append(f"{task}: {one_line(error)}")
            if len(left_out) == len(chosen):
                raise
            tqdm.write(f"\nleft out: {left_out[-1]}")
            continue
        save_results(report.out / "results.json", task, dict(
            command=["eval.py", *argv], checkpoint=str(path), seed=args.seed, seeds=args.seeds,
            versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
            device=str(args.device), seconds=round(time.perf_counter() - start), tables=report.tables))
    print(f"\nresults.json and pictures are in {report.out}")


def one_line(error):
    """What an error says; of one from a data process, whose message is a traceback, the end."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = re.sub(r"^[A-Za-z]+Error: ", "", text.splitlines()[-1])
    return " ".join(text.split()) or type(error).__name__


def save_results(path, task, entry):
    """results.json is {task: entry}; entries of other tasks stay. What is not finite becomes null."""
    try:
        results = json.loads(path.read_text())
        results = {key: old for key, old in results.items() if "tables" in old}
    except (OSError, ValueError, AttributeError, TypeError):
        results = {}
    plain = lambda x: ({k: plain(v) for k, v in x.items()} if isinstance(x, dict) else
                       [plain(v) for v in x] if isinstance(x, list) else
                       None if isinstance(x, float) and not math.isfinite(x) else x)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(plain(results | {task: entry}), indent=1) + "\n")
    os.replace(temporary, path)


def cli(argv):
    """main(), but what the user can mend is told in one line on stderr, with exit status 1, no traceback."""
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("eval.py: error: out of memory: give a lower --batch-size, or --device cpu")
    except (Stop, ValueError, OSError) as error:
        sys.exit(f"eval.py: error: {one_line(error)}")


if __name__ == "__main__":
    cli(sys.argv[1:])
