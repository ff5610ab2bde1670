"""
A checkpoint in, tables and pictures out.

    python eval.py out/moog-tiny                    # every task that the model has
    python eval.py out/moog-tiny/ckpt.pt --task tokens --data PATH/TO/VIDEOS
    python eval.py PATH/moog_backbone.npz --task tokens --data clip.mp4      # the authors' weights as well

MooG
    tokens      what each token is of: tokens.png and tokens.gif paint each pixel in the colour of the token
                that it looks at most; on scenes, how often that is still the same token one frame later

Prints the tables and writes them to results.json, with the pictures, beside the checkpoint or to --out.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np
import torch

import data
import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Stop = train.Stop


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


# ---- MooG: tokens --------------------------------------------------------------------------------
def top_tokens(model, states, size, index=None):
    """Number of the token that each pixel looks at most, mean over the heads of the last layer: (B, T, P)."""
    look = lambda piece: model.decode(states, size, piece, return_attention=True)[1].mean(2).argmax(-1)
    whole = torch.arange(size[0] * size[1])
    if model.cfg.decoder_self_attention:            # pixels that look at each other can't be parted
        return look(whole) if index is None else look(whole).gather(2, index)
    pieces = (whole if index is None else index).split(1024, -1)    # the attention of all may not fit
    return torch.cat([look(piece) for piece in pieces], -1)


@torch.no_grad()
def tokens(model, config, args, report):
    T, size = max(model.cfg.frames, 8), (model.cfg.size, model.cfg.size)
    loader = data.make_loader(args.data, dict(frames=T, size=size[0]), [range(2)], "cpu", args.seed, 0,
                              split="eval", scenes=config.get("scenes"), stride=args.stride)
    video = next(iter(loader))["video"]
    video = video / 255 if video.dtype == torch.uint8 else video
    states = model.anticipate(video[:, :-1])        # (B, T, N, D), each from the frames before its own
    prediction = model.decode(states, size).clamp(0, 1)
    top = top_tokens(model, states, size).unflatten(-1, size)               # (B, T, H, W)
    N = states.shape[2]
    hues = torch.rand(N, generator=torch.Generator().manual_seed(0))
    colours = torch.tensor(plt.get_cmap("hsv")(hues.numpy())[:, :3], dtype=torch.float32)
    values = 0.45 + 0.55 * torch.rand(N, 1, generator=torch.Generator().manual_seed(1))
    painted = (colours * values)[top].movedim(-1, 2)                        # (B, T, 3, H, W)
    blended = (0.75 * painted + 0.25 * video.mean(2, keepdim=True)).clamp(0, 1)
    rows = [(name, x[b].movedim(1, -1).numpy()) for b in range(len(video)) for name, x in
            (("frame", video), ("predicted", prediction), ("tokens", blended))]

    figure, axes = plt.subplots(len(rows), 8, figsize=(8.8, 1.12 * len(rows) + 0.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01)
    for r, (name, clip) in enumerate(rows):
        for t, axis in enumerate(axes[r]):
            axis.imshow(clip[t], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if not r:
                axis.set_title(f"t = {t}", fontsize=9)
        axes[r, 0].set_ylabel(name, fontsize=9)
    figure.savefig(report.out / "tokens.png", dpi=110)
    plt.close(figure)
    strip = np.concatenate([np.concatenate([clip for _, clip in rows[3 * b:3 * b + 3]], 2) for b in
                            range(len(video))], 1)                          # (T, B*H, 3*W, 3)
    strip = np.uint8(255 * strip).repeat(2, 1).repeat(2, 2)
    iio.imwrite(report.out / "tokens.gif", strip, duration=250, loop=0)

    if args.data == "scenes" and config.get("scenes", {}).get("sprites", 4):
        report.table(
            "share of points on sprites whose token is the same one frame later",
            ["where the point went", "where it was", "at another point"],
            [["this model", *follow(model, config, args)]])


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
    options = config.get("scenes", {}) | dict(size=cfg.size, frames=T, split="eval", seed=args.seed)
    clips = data.Scenes(**options).batch(range(1000, 1064), truth=True, points=256)
    states = torch.cat([model.anticipate(clip[:, :-1]) for clip in clips["video"].split(8)])    # (B, T, N, D)
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


# ---- command line --------------------------------------------------------------------------------
TASKS = {"moog": {"tokens": tokens}}


class Report:
    """The tables of a run: printed as they come, kept for results.json."""

    def __init__(self, out):
        self.out, self.tables = out, {}

    def table(self, title, columns, rows):
        self.tables[title] = [dict(zip(["", *columns], row)) for row in rows]
        text = [["", *columns]] + [[c if isinstance(c, str) else f"{c:.3f}" for c in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*text)]
        print(f"\n{title}\n" + "\n".join("  ".join(
            cell.rjust(width) for cell, width in zip(line, widths)) for line in text))


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="ckpt.pt of train.py or its folder, or the authors' .pth or .npz")
    parser.add_argument("--task", default="all", help="a task of the model; default: all of them")
    parser.add_argument("--data", default="scenes", help="scenes, a video, a folder of videos or frames")
    parser.add_argument("--stride", type=int, default=1, help="source frames between frames of a clip [1]")
    parser.add_argument("--out", default="", help="folder for tables and pictures; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of the clips and of the tokens' noise [0]")
    args = parser.parse_args(argv)
    model, name, config, path = load(args.checkpoint)
    tasks = TASKS.get(name, {})
    chosen = tasks if args.task == "all" else {args.task: tasks.get(args.task)}
    if not chosen or None in chosen.values():
        raise Stop(f"{name} has no task {args.task!r}: choose from {', '.join(tasks) or 'none, so far'}")
    out = Path(args.out) if args.out else path.parent
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out)
    for task in chosen.values():
        torch.manual_seed(args.seed)
        task(model, config, args, report)
    (out / "results.json").write_text(json.dumps(dict(
        command=sys.argv, checkpoint=str(path), seed=args.seed, torch=torch.__version__,
        tables=report.tables), indent=1) + "\n")
    print(f"\nwritten to {out}: results.json and pictures")


def cli(argv):
    """main(), but what the user can mend is told in one line on stderr, with exit status 1, no traceback."""
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except (Stop, ValueError, OSError) as error:
        sys.exit(f"eval.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    cli(sys.argv[1:])
