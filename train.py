"""
The one training loop. Every model of this house trains through it; it knows them by their contract alone:
a module with PRESETS, RECIPES, Config (whose `inputs` say what the model eats) and Model(config), which has
forward(batch) -> (loss, logs), report(batch), after_step(progress) and, if it likes, before_step(progress).

    python train.py --model midway                            # without a GPU: preset tiny, synthetic scenes
    python train.py --model midway --preset vit_s --data PATH/TO/VIDEOS
    torchrun --nproc_per_node=8 train.py --model midway --data PATH     # GPUs: the paper's preset
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...
    python train.py --model midway --resume out/midway-tiny   # go on exactly where it stopped
    python train.py --model midway --no-gating                # an ablation is a flag of the model's Config
    python train.py --model midway --bench                    # 20 timed steps: speed, FLOPs, MFU, peak memory

Writes out/MODEL-PRESET/: ckpt.pt, log.jsonl, curves.png, config.json.
Ctrl-C or SIGTERM: finishes the step, saves, leaves.

Sample i of a run is a pure function of (seed, i), the random depth of a micro-batch of (seed, its number). So
a run that was interrupted and resumed ends with the same weights, bit by bit on a CPU (the kernels of a GPU
need not be deterministic); and since --batch-size is global, one GPU and eight see the same batches.
"""
import argparse
import difflib
import importlib
import inspect
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# CPU threads that wait for each other should soon sleep. Spinning on, as is OpenMP's way, stalls a run beside
# any other busy process, and alone it is no faster. OpenMP reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data

# file: class. All that is known of the models by name
MODELS = {"midway": "Midway", "moog": "MooG", "melomotion": "MeloMotion"}


@dataclass
class Options:
    model: str = ""                     # midway, moog or melomotion
    preset: str = ""                    # a preset; default: the smallest without a GPU, the paper's with one
    data: str = "scenes"                # scenes, squares (synthetic), a video, a folder of videos or frames
    out: str = ""                       # output folder; default out/MODEL-PRESET. An earlier run moves aside
    resume: str = ""                    # folder or ckpt.pt of an earlier run: go on where it stopped
    init: str = ""                      # folder or ckpt.pt of another run: start with its weights, at step 0
    steps: int = 1000                   # optimiser steps in all
    batch_size: int = 32                # samples per step, over all processes
    micro_batch: int = 0                # samples per pass and process: lower if out of memory; 0: all at once
    lr: float = 1e-3                    # peak learning rate
    min_lr: float = 1e-6                # learning rate at the end of the cosine
    warmup: float = 0.05                # share of the steps with a linear warm-up
    weight_decay: float = 0.04          # at the start; 1-D parameters have none
    weight_decay_end: float = 0.04      # at the end, by a cosine
    betas: tuple[float, ...] = (0.9, 0.999)     # AdamW's two
    clip: float = 1.0                   # largest global norm of the gradient; 0: no clipping
    seed: int = 0                       # of weights, data and random depth
    workers: int = -1                   # data processes per training process; -1: choose
    device: str = ""                    # cuda, mps or cpu; default: the first of them that is there
    dtype: str = "auto"                 # bfloat16 (autocast), float32; auto: bfloat16 on GPUs that have it
    compile: bool | None = None         # torch.compile; default: on CUDA under Linux
    log_every: int = 20                 # steps between lines of the log
    save_every: int = 500               # steps between checkpoints; one is always written at the end
    gap: tuple[float, ...] = (0.5, 1.0) # seconds between the two frames of a pair, least and most (videos)
    repeat: int = 5                     # samples drawn from a video each time it is opened (videos)
    fps: float = 30.0                   # rate in which the numbers in frame names count (folders of frames)
    stride: int = 1                     # source frames between the frames of a clip (videos, models of clips)
    colours: bool = True                # photometric augmentation of crops; off: a control
    bench: bool = False                 # time 20 steps on one batch and leave


class Stop(Exception):
    """Ends the program with one line on stderr and exit status 1."""


# ---- command line --------------------------------------------------------------------------------
def source_comments(thing):
    """{name: comment} of a class's fields or a function's arguments: help stands where the names do, once."""
    return dict(re.findall(r"^ +(\w+)(?:: [^#\n=]+)?=[^#\n]*#\s*(.+)$", inspect.getsource(thing), re.M))


def add_flag(group, name, kind, default, help):
    """One flag; if it isn't given, it stays out of the namespace. kind: str(type of the field)."""
    shown = " ".join(map(str, default)) if isinstance(default, (tuple, list)) else default
    shown = f"[{shown}]" if shown not in ("", None) else ""
    flag = dict(dest=name, default=argparse.SUPPRESS, help=f"{help} {shown}".strip().replace("%", "%%"))
    if "bool" in kind:
        flag.update(action=argparse.BooleanOptionalAction)
    else:
        number = float if "float" in kind else int if "int" in kind else str
        flag.update(type=number, metavar={float: "X", int: "N", str: "TEXT"}[number])
        if "tuple" in kind:
            flag.update(nargs="+")
    group.add_argument("--" + name.replace("_", "-"), **flag)


def add_fields(group, cls, defaults):
    """A flag for each field of a dataclass, explained by the comment that stands beside the field."""
    comments = source_comments(cls)
    for f in fields(cls):
        add_flag(group, f.name, str(f.type), defaults.get(f.name, f.default), comments.get(f.name, ""))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Exit status 2; a misspelt flag gets a suggestion."""
        flags = [s for a in self._actions for s in a.option_strings]
        for word in re.findall(r"--[\w-]+", message) if "unrecognized" in message else ():
            close = difflib.get_close_matches(word, flags, 1)
            message += f": did you mean {close[0]}?" if close else " (see --help)"
        self.exit(2, f"train.py: error: {message}\n")


def scene_options():
    """{name: default} of synthetic scenes' options: the arguments of data.Scenes that models don't fix."""
    arguments = inspect.signature(data.Scenes).parameters.values()
    return {a.name: a.default for a in arguments if a.name not in ("frames", "seed", "split", "device")}


def parse(argv):
    """Command line -> Options, model's module, its Config, scenes' options, checkpoint to resume or None."""
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    first = Parser(add_help=False, allow_abbrev=False)      # these four decide which other flags there are
    for name in ("model", "preset", "resume", "device"):
        first.add_argument("--" + name, default="")
    known, _ = first.parse_known_args(argv)
    wants_help = {"-h", "--help"} & set(argv)

    ckpt = read_checkpoint(known.resume) if known.resume and not wants_help else None
    name = known.model or (ckpt["config"]["model"] if ckpt else "")
    if not name and not wants_help:
        parser.error("which model? --model " + ", ".join(MODELS))
    if name and name not in MODELS:
        parser.error(f"no model {name!r}: choose from {', '.join(MODELS)}")
    if ckpt and name != ckpt["config"]["model"]:
        raise Stop(f"{known.resume} holds a {ckpt['config']['model']} model, not {name}")
    if ckpt and known.preset not in ("", ckpt["config"]["preset"]):
        raise Stop(f"{known.resume} holds preset {ckpt['config']['preset']}, not {known.preset}")
    defaults, scenes, module = {}, scene_options(), None
    if name:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            raise Stop(f"--model {name} needs {name}.py beside train.py") from None
        small, paper = getattr(module, "DEFAULTS", list(module.PRESETS)[:2])
        preset = known.preset or (
            ckpt["config"]["preset"] if ckpt else
            paper if choose_device(known.device).type == "cuda" else small)
        if preset not in module.PRESETS:
            parser.error(f"{name} has no preset {preset!r}: choose from {', '.join(module.PRESETS)}")
        recipe = (module.RECIPES[preset] | (ckpt["config"]["options"] if ckpt else {}) |
                  dict(preset=preset, model=name))
        scenes = {} if recipe.get("data") == "squares" else (      # whose options are the model's
            scenes | recipe.pop("scenes", {}) | (ckpt["config"]["scenes"] if ckpt else {}))
        defaults = recipe | dict(resume="")
    add_fields(parser.add_argument_group("training"), Options, defaults)
    group = parser.add_argument_group("synthetic scenes, the arguments of Scenes in data.py")
    comments = source_comments(data.Scenes.__init__)
    for key, default in scenes.items():
        kind = "tuple float" if isinstance(default, (tuple, list)) else str(type(default))
        add_flag(group, "scene_" + key, kind, default, comments[key])
    if name:
        model_defaults = ckpt["config"]["config"] if ckpt else module.PRESETS[preset]
        add_fields(parser.add_argument_group(f"model: {name}, preset {preset}"),
                   module.Config, model_defaults)
    else:
        parser.epilog = "Add --model midway (or moog, melomotion) to see the flags of a model."
    given = vars(parser.parse_args(argv))

    opt = Options(**defaults | {f.name: given[f.name] for f in fields(Options) if f.name in given})
    scenes |= {key: given["scene_" + key] for key in scenes if "scene_" + key in given}
    flags = {f.name: given[f.name] for f in fields(module.Config) if f.name in given}
    for key, value in flags.items():
        if ckpt and list_like(value) != list_like(model_defaults.get(key)):
            raise Stop(f"--{key.replace('_', '-')} can't change on --resume: "
                       f"the checkpoint has {key}={model_defaults.get(key)}")
    as_tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in (model_defaults | flags).items()}
    check_options(parser, opt)
    if ckpt and "out" not in given:         # where the checkpoint lies now, not where it was written
        opt.out = os.path.dirname(ckpt["path"]) or "."
    opt.out = opt.out or f"out/{opt.model}-{opt.preset}"
    if opt.out in (".", ".."):              # a folder that can be moved aside needs its name
        opt.out = os.path.abspath(opt.out)
    if os.path.isfile(opt.out):
        raise Stop(f"--out {opt.out} is a file: name a folder")
    return opt, module, module.Config(**as_tuples), scenes, ckpt


def check_options(parser, opt):
    """Refuses impossible values by name, as wrong arguments."""
    for key in ("steps", "batch_size", "log_every", "save_every", "repeat", "stride"):
        if getattr(opt, key) < 1:
            parser.error(f"--{key.replace('_', '-')} must be at least 1, not {getattr(opt, key)}")
    for key, right in (("micro_batch", opt.micro_batch >= 0), ("clip", opt.clip >= 0), ("lr", opt.lr > 0),
                       ("warmup", 0 <= opt.warmup < 1), ("fps", opt.fps > 0),
                       ("betas", len(opt.betas) == 2 and all(0 <= b < 1 for b in opt.betas))):
        if not right:
            parser.error(f"--{key.replace('_', '-')} can't be {getattr(opt, key)}: see --help")
    if len(opt.gap) != 2 or not 0 < opt.gap[0] <= opt.gap[1]:
        parser.error("--gap wants two rising positive numbers, such as 0.5 1.0, not "
                     f"{' '.join(map(str, opt.gap))}")


def list_like(value):
    return list(value) if isinstance(value, (list, tuple)) else value


# ---- device, checkpoints -------------------------------------------------------------------------
def choose_device(name=""):
    """This process's torch.device; under torchrun the GPU of its LOCAL_RANK, before anything is allocated."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda:") and "LOCAL_RANK" in os.environ:
        raise Stop(f"--device {name} under torchrun would put every process on one GPU: leave it out")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise Stop(f"no device {name!r} here: leave out --device, or choose from cuda, mps, cpu") from None
    return device


def read_checkpoint(path):
    """A checkpoint of ours, from its path or its folder: plain types, nothing executed."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise Stop(f"no checkpoint at {path}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        ckpt["path"] = str(path)
        ckpt["config"]["model"], ckpt["model"], ckpt["optimizer"], ckpt["step"]
    except Exception as error:    # a truncated zip, a foreign pickle, another layout: torch raises many kinds
        raise Stop(f"{path} is damaged or no checkpoint of train.py ({type(error).__name__})") from None
    return ckpt


def save_checkpoint(path, model, optimizer, step, config):
    """To a temporary name, to disk, then renamed: whole or not there, and a full disk spares the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                            config=config), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        old = f"the earlier {path} is whole" if path.exists() else "there is no earlier one"
        raise Stop(f"could not save {path} at step {step}: {str(error).splitlines()[0]}; {old}") from None


# ---- schedules, measures, pictures ---------------------------------------------------------------
def schedule(opt, step):
    """DINO's learning rate (linear from 0, then cosine to min_lr), weight decay (cosine). paper: Table 8"""
    warm, cosine = int(opt.warmup * opt.steps), lambda x: (1 + math.cos(math.pi * x)) / 2
    if step < warm:
        lr = opt.lr * step / max(warm - 1, 1)
    else:
        lr = opt.min_lr + (opt.lr - opt.min_lr) * cosine((step - warm) / (opt.steps - warm))
    return lr, opt.weight_decay_end + (opt.weight_decay - opt.weight_decay_end) * cosine(step / opt.steps)


def default_groups(model, weight_decay):
    """All trained parameters; 1-D ones (biases, norms) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p for p in trained if p.ndim > 1], weight_decay=weight_decay, decayed=True),
            dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0, decayed=False)]


# Dense bf16 FLOP/s by the data sheets; the first name that fits counts
PEAK_BF16 = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100 80GB HBM3": 989e12, "H200": 989e12,
             "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device):
    """Dense bf16 FLOP/s of this GPU, None if we don't know it: no MFU rather than a wrong one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def count_flops(module, model_class, cfg, batch):
    """FLOPs (2 per multiply-add) of forward and backward for one sample, counted on the meta device."""
    with torch.device("meta"):
        model = getattr(module, model_class)(cfg)
    sample = {key: value[:1].to("meta") for key, value in batch.items()}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(sample)[0].backward()
    return counter.get_total_flops()


def draw_curves(out):
    """curves.png: a small panel for each number in log.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    names = [n for n in lines[-1] if n not in ("step", "held_out") and isinstance(lines[-1][n], (int, float))]
    rows = math.ceil(len(names) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(13, 2.3 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points), lw=1.3, marker="." if len(points) < 3 else None)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    figure.supxlabel("step", fontsize=10)
    figure.savefig(out / "curves.png", dpi=90)
    plt.close(figure)


# ---- the loop ------------------------------------------------------------------------------------
class Run:
    """Where this process stands among the others. No process group for one process."""

    def __init__(self, device_name):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = choose_device(device_name)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def any(self, condition):
        """Whether the condition is true in any process."""
        if self.world == 1:
            return bool(condition)
        flag = torch.tensor(float(bool(condition)), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0

    def mean(self, values):
        """Mean over processes of a 1-D tensor, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world


def batches(opt, run, start, accum, micro):
    """Samples of this process's micro-batches, from step `start` on: consecutive numbers, never random."""
    for step in range(start, opt.steps):
        for a in range(accum):
            first = step * opt.batch_size + (a * run.world + run.rank) * micro
            yield range(first, first + micro)


def held_out(opt, run, model, scenes, autocast):
    """
    Means of model.report over 8 batches, shared out: {row: {column: number}}. Scenes are none that training
    sees; of videos these are other draws from the same files.
    """
    n = model.cfg.inputs.get("held_out", min(opt.batch_size, 32))
    each = -(-8 // run.world)                                   # batches for each process, rounded up
    share = [range(i * n, (i + 1) * n) for i in range(run.rank, each * run.world, run.world)]
    loader = data.make_loader(
        opt.data, model.cfg.inputs, share, run.device, opt.seed, split="eval", colours=False,
        scenes=data.SceneOptions(**scenes), videos=data.VideoOptions(opt.gap, opt.repeat, opt.fps, opt.stride))
    reports = []
    model.eval()
    for batch in loader:
        with autocast:
            reports.append(model.report(batch))
    model.train()
    cells = [(row, column) for row in reports[0] for column in reports[0][row]]
    if not cells:
        return {}
    sums = run.mean(torch.stack([
        sum(r[row][column].float() for r in reports) / len(reports) for row, column in cells])).tolist()
    table = {}
    for (row, column), value in zip(cells, sums):
        table.setdefault(row, {})[column] = value
    return table


def show_table(table, title):
    columns = list(dict.fromkeys(c for row in table.values() for c in row))
    width = max(map(len, [title, *table]))
    lines = [f"{title:<{width}}" + "".join(f"{c:>11}" for c in columns)]
    return "\n".join(lines + [
        f"{r:<{width}}" + "".join(f"{number(row[c]) if c in row else '':>11}" for c in columns)
        for r, row in table.items()])


def number(x):
    """Three decimals, or if those would show nothing, powers of ten."""
    return f"{x:.1e}" if 0 < abs(x) < 0.001 else f"{x:.3f}"


def main(argv):
    opt, module, cfg, scenes, ckpt = parse(argv)
    run = Run(opt.device)
    device, out = run.device, Path(opt.out)

    # ---- batch sizes: the user says the global one
    micro = opt.micro_batch or opt.batch_size // run.world
    accum, rest = divmod(opt.batch_size, max(micro * run.world, 1))
    if not accum or rest:
        piece = max(micro, 1) * run.world
        raise Stop(f"batch_size={opt.batch_size} must be a multiple of micro_batch x processes = "
                   f"{micro} x {run.world}: try --batch-size {max(round(opt.batch_size / piece), 1) * piece}")

    # ---- precision. our choice: bf16 autocast, which needs no loss scaling; paper: fp16
    torch.set_float32_matmul_precision("high")      # TF32 for what autocast leaves in float32
    bf16_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if opt.dtype not in ("auto", "bfloat16", "float32"):
        raise Stop(f"--dtype {opt.dtype}: choose from auto, bfloat16, float32")
    bf16 = opt.dtype == "bfloat16" or (opt.dtype == "auto" and bf16_gpu)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    use_compile = opt.compile if opt.compile is not None else (
        device.type == "cuda" and platform.system() == "Linux")

    # ---- model, optimiser
    torch.manual_seed(opt.seed)
    model_class = MODELS[opt.model]
    model = getattr(module, model_class)(cfg).to(device)
    groups = getattr(model, "param_groups", lambda decay: default_groups(model, decay))(opt.weight_decay)
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(groups, lr=opt.lr, betas=opt.betas, fused=fused)
    trained = [p for group in groups for p in group["params"]]
    start, in_place = 0, False
    if opt.init and not ckpt:
        other = read_checkpoint(opt.init)
        if other["config"]["model"] != opt.model:
            raise Stop(f"{other['path']} holds a {other['config']['model']} model, not {opt.model}")
        try:
            model.load_state_dict(other["model"])
        except RuntimeError as error:
            raise Stop(f"{other['path']} does not fit this model: "
                       f"{' '.join(str(error).split())[:200]}") from None
    if ckpt:
        in_place = Path(ckpt["path"]).resolve() == (out / "ckpt.pt").resolve()
        try:
            model.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise Stop(f"{ckpt['path']} does not fit this model: {str(error).splitlines()[0]}") from None
        start = ckpt["step"]
        if start >= opt.steps:
            raise Stop(f"{ckpt['path']} is at step {start} already: to go on, give more --steps than that")
        for group in optimizer.param_groups:
            group.update(betas=opt.betas, fused=fused)  # of this run and device, not of the earlier one
        del ckpt["model"], ckpt["optimizer"]            # a copy of all weights and moments
    if use_compile:
        model.compile(dynamic=False)                # in place, so the keys of the state dict stay clean
    wrapped = model
    if run.world > 1:                   # buffers: each process keeps its own; after_step() makes them agree
        renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters       # in torch 2.13
        wrapped = DDP(model, device_ids=[device.index] if device.type == "cuda" else None,
                      **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})

    # ---- data: opened before the output folder is touched, so that a wrong path leaves no trace
    loader = data.make_loader(
        opt.data, cfg.inputs, batches(opt, run, start, accum, micro), device, opt.seed, opt.workers,
        colours=opt.colours, scenes=data.SceneOptions(**scenes),
        videos=data.VideoOptions(opt.gap, opt.repeat, opt.fps, opt.stride))
    run.say(f"{opt.model} {opt.preset} on {opt.data}: "
            f"{sum(p.numel() for p in trained) / 1e6:.2f} M trained parameters, {run.world} x "
            f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, "
            f"{'bfloat16 autocast' if bf16 else 'float32'}, compile {'on' if use_compile else 'off'}, "
            f"batch {opt.batch_size} = {accum} x {run.world} x {micro}, torch {torch.__version__}")
    if opt.bench:
        bench(opt, run, module, model_class, cfg, wrapped, optimizer, trained, loader, micro, autocast)
        return

    # ---- output folder
    config = dict(model=opt.model, preset=opt.preset, options=asdict(opt), config=asdict(cfg), scenes=scenes)
    if run.rank == 0:
        prepare_folder(out, start, in_place)
        (out / "config.json").write_text(
            json.dumps(dict(config, torch=torch.__version__, command=sys.argv), indent=1) + "\n")

    # ---- signals: finish the step, save, leave; a second Ctrl-C leaves at once
    caught = []
    def on_signal(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    # ---- train
    window, clock = [], time.perf_counter()     # meters since the last line of the log, still on the device
    good = f"{out / 'ckpt.pt'} (step {start})" if ckpt else "none yet"
    before_step = getattr(model, "before_step", lambda progress: None)
    bar = tqdm(total=opt.steps, initial=start, disable=run.rank > 0 or not sys.stderr.isatty(),
               dynamic_ncols=True, unit="step")
    samples = iter(loader)
    for step in range(start, opt.steps):
        lr, decay = schedule(opt, step)
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=decay if group.get("decayed", True) else 0.0)

        meters = {}
        for a in range(accum):
            batch = next(samples)
            torch.manual_seed((opt.seed << 32) + (step * accum + a) * run.world + run.rank)     # random depth
            last_micro = run.world == 1 or a == accum - 1
            with nullcontext() if last_micro else wrapped.no_sync():    # gradients travel once a step
                with autocast:
                    loss, logs = wrapped(batch)
                (loss / accum).backward()
            for name, value in dict(loss=loss.detach(), **logs).items():
                meters[name] = meters.get(name, 0) + value / accum
        meters["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, opt.clip or math.inf, foreach=True)
        before_step(step / opt.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step((step + 1) / opt.steps)
        window.append(meters)
        bar.update()

        # ---- log and save; nothing above waits for the device
        halt = run.any(caught) if run.world == 1 or step % 10 == 0 else False   # all processes leave together
        done = halt or step + 1 == opt.steps
        save = done or (step + 1) % opt.save_every == 0
        if device.type == "cpu":                # reading costs nothing here, so a bad step is noticed at once
            check_finite(opt, window[-1:], step, good)
        if not (save or step == start or (step + 1) % opt.log_every == 0):
            continue
        check_finite(opt, window, step, good)
        names = list(window[0])
        means = run.mean(torch.stack([
            torch.stack([m[n].float() for n in names]) for m in window]).mean(0)).tolist()
        seconds = (time.perf_counter() - clock) / len(window)
        line = dict(step=step + 1, **dict(zip(names, means)), lr=lr, weight_decay=decay, ms=1000 * seconds,
                    samples_per_s=opt.batch_size / seconds)
        if save and run.rank == 0:
            save_checkpoint(out / "ckpt.pt", model, optimizer, step + 1, config)
        good = f"{out / 'ckpt.pt'} (step {step + 1})" if save else good
        if done and not halt:
            line["held_out"] = held_out(opt, run, model, scenes, autocast)
        if run.rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if save:
                draw_curves(out)
        run.say(show_line(line, opt, device, first=step == start))
        window, clock = [], time.perf_counter()
        if halt:
            break

    bar.close()
    if halt:
        run.say(f"stopped by {signal.Signals(caught[0]).name if caught else 'a signal'} after step "
                f"{step + 1}; saved. Go on with: python train.py --resume {out}")
    else:
        title = ("other draws from these videos" if opt.data not in ("scenes", "squares") else
                 f"{opt.data} never seen in training")
        run.say("\n" + show_table(line["held_out"], title) + "\n" if line["held_out"] else "")
        run.say(f"written: {out}/ckpt.pt, log.jsonl, curves.png, config.json")
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if halt:
        sys.exit(128 + (caught[0] if caught else signal.SIGTERM))


def prepare_folder(out, start, resuming):
    """A new run moves an earlier one aside; a resumed run forgets the log of steps that it will do again."""
    log = out / "log.jsonl"
    if (out / "ckpt.pt").exists() and not resuming:
        aside = next(p for p in (out.with_name(f"{out.name}.{i}") for i in range(1, 10_000))
                     if not p.exists())
        out.rename(aside)
        tqdm.write(f"an earlier run in {out} is now in {aside}")
    out.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines() if log.exists() and resuming else []
    log.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= start))


def check_finite(opt, window, step, good):
    """Stops at the window's first step whose loss or gradient isn't finite, before anything bad is saved."""
    values = torch.stack([torch.stack([m["loss"].float(), m["grad_norm"].float()])
                          for m in window]).cpu()               # (steps, 2)
    broken = (~values.isfinite()).any(1).nonzero()[:, 0].tolist()
    if broken:
        loss, norm = values[broken[0]].tolist()
        step = step + 1 - len(window) + broken[0]
        raise Stop(f"step {step + 1}: the loss is {loss:g} and the gradient norm {norm:g}, "
                   f"at lr {schedule(opt, step)[0]:.3g}; last good checkpoint: {good}. "
                   f"Go on, or start again, with a lower --lr, or a smaller --clip (now {opt.clip:g})")


def show_line(line, opt, device, first):
    shown = [n for n in line if n not in (
        "step", "loss", "grad_norm", "lr", "weight_decay", "ms", "samples_per_s", "held_out")][:3]
    parts = [f"step {line['step']}/{opt.steps}", f"loss {line['loss']:.4f}",
             *(f"{n} {number(line[n])}" for n in shown), f"lr {line['lr']:.1e}",
             f"gnorm {line['grad_norm']:.2f}",
             f"{line['ms']:.0f} ms", f"{line['samples_per_s']:.1f} samples/s"]
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB")
    left = (opt.steps - line["step"]) * line["ms"] / 1000
    if not first:                       # the first step starts processes and compiles
        parts.append(f"eta {left / 3600:.1f}h" if left > 5400 else f"eta {left / 60:.1f}m")
    return " | ".join(parts)


def bench(opt, run, module, model_class, cfg, wrapped, optimizer, trained, loader, micro, autocast):
    """20 timed steps on one batch of this process, after 3 to warm up and compile: without data loading."""
    batch, device, times = next(iter(loader)), run.device, []
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    warm = time.perf_counter()
    for i in range(23):
        sync()
        begin = time.perf_counter()
        with autocast:
            loss, _ = wrapped(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, opt.clip or math.inf, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        (wrapped.module if run.world > 1 else wrapped).after_step(0.5)
        sync()
        times.append(time.perf_counter() - begin)
    median, flops = statistics.median(times[3:]), count_flops(module, model_class, cfg, batch)
    rate, peak = micro * run.world / median, peak_flops(device)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        import resource                         # POSIX; a GPU-less Windows has no peak to show
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**30 if platform.system() == "Darwin" else 2**20)
    run.say(
        f"bench: {1000 * median:.1f} ms a step (median of 20; {1000 * min(times[3:]):.1f} to "
        f"{1000 * max(times[3:]):.1f}; first {times[0]:.1f} s), micro batch {micro} x {run.world}, "
        f"{rate:.2f} samples/s, {flops / 1e9:.1f} GFLOP a sample (forward and backward), "
        f"{rate * flops / 1e12 / run.world:.2f} TFLOP/s each, MFU "
        f"{f'{100 * rate * flops / run.world / peak:.1f} % of bf16 peak' if peak else 'n/a'}, "
        f"peak memory {memory:.1f} GB")
    if run.world > 1:
        dist.destroy_process_group()


def cli(argv):
    """main(), but what the user can mend is told in one line on stderr, with exit status 1, no traceback."""
    try:
        main(argv)
    except KeyboardInterrupt:                       # before the signals are caught
        sys.exit(130)
    except (Stop, ValueError, OSError, RuntimeError) as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            last = "out of memory: give a --micro-batch below --batch-size / processes; same run, less memory"
        elif isinstance(error, RuntimeError):
            raise                                   # a bug, not the user's doing
        last = re.sub(r"^[A-Za-z]+Error: ", "", last)       # a data process's error ends in "ValueError: ..."
        sys.stderr.write(f"train.py: error: {last}\n")
        sys.exit(1)


if __name__ == "__main__":
    cli(sys.argv[1:])
