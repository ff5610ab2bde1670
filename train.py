"""
The one training loop. It knows a model by its contract alone: a module with PRESETS, RECIPES, Config (whose
`inputs` say what the model expects) and Model(config) with forward(batch) -> (loss, logs), report(batch),
after_step(progress) and, where needed, before_step(progress) and param_groups(weight_decay).

    python train.py --model midway                            # without a GPU: preset tiny, synthetic scenes
    python train.py --model midway --preset vit_s --data PATH/TO/VIDEOS
    torchrun --nproc_per_node=8 train.py --model midway --data PATH     # GPUs: the paper's preset
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...
    python train.py --model midway --resume out/midway-tiny   # go on exactly where it stopped
    python train.py --model midway --no-gating                # an ablation is a flag of the model's Config
    python train.py --model midway --bench                    # 20 timed steps: speed, FLOPs, MFU, memory
    python train.py --model midway --help                     # every flag, with the default that it has here

Writes out/MODEL-PRESET/: ckpt.pt, log.jsonl, curves.png, config.json.
Ctrl-C or SIGTERM: finishes the step, saves, leaves.

Sample i of a run is a pure function of (seed, i), the random depth of a micro-batch of (seed, its number).
So a run that was interrupted and resumed ends with the same weights, bit by bit on a CPU (the kernels of a
GPU need not be deterministic); and since --batch-size is global, one GPU and eight see the same batches.
"""
import argparse
import difflib
import importlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# CPU threads that wait for each other should soon sleep. Spinning on, as is OpenMP's way, stalls a run
# beside any other busy process, and alone it is no faster. OpenMP reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data

try:
    import fcntl
except ImportError:     # Windows: no locks
    fcntl = None

# file: class. All that is known of the models by name
MODELS = {"midway": "Midway", "moog": "MooG", "melomotion": "MeloMotion"}


@dataclass
class Options:
    model: str = ""                     # midway, moog or melomotion
    preset: str = ""                    # a preset; default: the smallest without a GPU, else the paper's
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
    betas: tuple[float, float] = (0.9, 0.999)   # AdamW's two
    clip: float = 1.0                   # largest global norm of the gradient; 0: no clipping
    seed: int = 0                       # of weights, data and random depth
    workers: int = -1                   # data processes per training process; -1: choose
    device: str = ""                    # cuda, mps or cpu; default: the first of them that is there
    dtype: str = "auto"                 # bfloat16 (autocast), float32; auto: bfloat16 on GPUs that have it
    compile: bool | None = None         # torch.compile; default: on CUDA under Linux
    log_every: int = 20                 # steps between lines of the log
    save_every: int = 500               # steps between checkpoints; one is always written at the end
    motion_colours: str = "independent"     # of a motion crop's two frames: independent, shared or none
    bench: bool = False                 # time 20 steps on one batch and leave


# Least and most of a number, in whichever group of flags the name stands
LIMITS = dict(
    steps=(1, 10**9), batch_size=(1, 10**6), micro_batch=(0, 10**6), lr=(0, 1e12), warmup=(0, 0.99),
    betas=(0, 0.999999), clip=(0, 1e12), seed=(0, 10**9 - 1), workers=(-1, 128), log_every=(1, 10**9),
    save_every=(1, 10**9), size=(1, 4096), local_size=(1, 4096), sprites=(0, 1000), textures=(1, 10**5))


class UserError(Exception):
    """Ends the program with one line on stderr and exit status 1."""


# ---- command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Exit status 2; a misspelt flag gets a suggestion."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        for word in unknown:
            close = difflib.get_close_matches(word, flags, 1)
            message += f": did you mean {close[0]}?" if close else " (see --help)"
        self.exit(2, f"train.py: error: {message}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is, and defaults as they are when --help is printed."""


def finite(text):
    """The type of a flag for real numbers: neither nan nor inf."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


def flag_name(part, field):
    return f"scene_{field}" if part == "scenes" else field


def add_flags(parser, part, cls, title):
    """A flag for each field of a dataclass, explained by the comment that stands beside the field."""
    comments = dict(re.findall(r"^ +(\w+): [^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    group = parser.add_argument_group(title)
    for field in fields(cls):
        name = flag_name(part, field.name)
        kind = str(field.type)
        flag = dict(help=comments.get(field.name, " ").replace("%", "%%"))
        if "bool" in kind:
            flag.update(action=argparse.BooleanOptionalAction)
        elif "float" in kind:
            flag.update(type=finite, metavar="X")
        elif "int" in kind:
            flag.update(type=int, metavar="N")
        else:
            flag.update(metavar="TEXT")
        if "tuple" in kind:
            flag.update(nargs="+" if "..." in kind else len(field.default))
        group.add_argument("--" + name.replace("_", "-"), **flag)
        parser.set_defaults(**{name: field.default})


def parse(argv):
    """
    Command line -> what a run is made of, {"options": Options, "scenes": SceneOptions, "videos": VideoOptions,
    "config": the model's Config}, the model's module, and the checkpoint to resume or None.
    """
    parser = Parser(prog="train.py", description=__doc__, formatter_class=HelpFormatter,
                    allow_abbrev=False, add_help=False)
    parts = dict(options=Options, scenes=data.SceneOptions, videos=data.VideoOptions)
    add_flags(parser, "options", Options, "training")
    add_flags(parser, "scenes", data.SceneOptions, "synthetic scenes (--data scenes)")
    add_flags(parser, "videos", data.VideoOptions, "videos and folders of frames (--data PATH)")

    # model, preset or checkpoint: what other flags and defaults there are
    first, _ = parser.parse_known_args(argv)
    parser.add_argument("-h", "--help", action="help", help="show this; with --model also its presets and flags")
    ckpt = read_checkpoint(first.resume) if first.resume else None
    saved = ckpt["config"] if ckpt else dict(model="", preset="")
    name = first.model or saved["model"]
    if not name:
        parser.parse_args(argv)                 # --help
    if name not in MODELS:
        parser.error(f"--model {name}: which one? {', '.join(MODELS)}")
    module = importlib.import_module(name)
    preset = first.preset or saved["preset"]
    if not preset:
        small, paper = getattr(module, "DEFAULTS", list(module.PRESETS)[:2])
        preset = paper if choose_device(first.device).type == "cuda" else small
    if preset not in module.PRESETS:
        parser.error(f"{name} has no preset {preset!r}: choose from {', '.join(module.PRESETS)}")
    if ckpt and (name, preset) != (saved["model"], saved["preset"]):
        raise UserError(f"{ckpt['path']} holds a {saved['model']} model, preset {saved['preset']}, "
                        f"not {name} {preset}")
    parts["config"] = module.Config
    title = f"model {name}, preset {preset} (presets: {', '.join(module.PRESETS)})"
    add_flags(parser, "config", module.Config, title)

    recipe = dict(module.RECIPES[preset])
    defaults = dict(scenes=recipe.pop("scenes", {}), videos={}, options=recipe, config=module.PRESETS[preset])
    for part, cls in parts.items():
        values = saved_part(ckpt, part, cls) if ckpt else defaults[part]
        parser.set_defaults(**{flag_name(part, field): value for field, value in values.items()})
    parser.set_defaults(model=name, preset=preset, out=f"out/{name}-{preset}")
    if ckpt:                                # where the checkpoint lies now, not where it was written
        parser.set_defaults(out=os.path.dirname(ckpt["path"]) or ".")
    given = parser.parse_args(argv)
    check_limits(parser, given)
    made = {}
    for part, cls in parts.items():
        values = {field.name: getattr(given, flag_name(part, field.name)) for field in fields(cls)}
        made[part] = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    for key, value in asdict(made["config"]).items():
        if ckpt and value != saved["config"][key]:
            raise UserError(f"--{key.replace('_', '-')} can't change on --resume: "
                            f"the checkpoint has {key}={saved['config'][key]}")
    opt = made["options"]
    for key in ("data", "out", "resume", "init"):
        setattr(opt, key, os.path.expanduser(getattr(opt, key)))
    if opt.out in (".", ".."):              # a folder that can be moved aside needs its name
        opt.out = os.path.abspath(opt.out)
    return made, module, ckpt


def check_limits(parser, given):
    """Refuses impossible numbers by name, as wrong arguments."""
    for name, value in vars(given).items():
        least, most = LIMITS.get(name.removeprefix("scene_"), (-math.inf, math.inf))
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(number, (int, float)) and not least <= number <= most:
                parser.error(f"--{name.replace('_', '-')} {number} must lie in {least:,} .. {most:,}")


# ---- processes -----------------------------------------------------------------------------------
def choose_device(name=""):
    """This process's torch.device; under torchrun the GPU of its LOCAL_RANK, before anything is allocated."""
    if not name:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda:") and "LOCAL_RANK" in os.environ:
        raise UserError(f"--device {name} under torchrun would put every process on one GPU: leave it out")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"no device {name!r} here: leave out --device, or choose from cuda, mps, cpu") from None
    return device


class Run:
    """Where this process stands among the others. No process group for one process."""

    def __init__(self, device_name):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = choose_device(device_name)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def print0(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def mean(self, values):
        """Mean over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world


def catch_signals(rank):
    """A list that holds the signal once one has come. The second one of a kind ends the process at once."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        if rank == 0:
            os.write(2, b"\nfinishing the step, then saving; again to leave now\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return caught


# ---- checkpoints ---------------------------------------------------------------------------------
def read_checkpoint(path):
    """A checkpoint of ours, from its path or its folder: plain types of the right kind, nothing executed."""
    path = Path(path).expanduser()
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # a truncated zip, a foreign pickle: torch raises many kinds
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None
    check_kinds(path, ckpt, dict(model=dict, optimizer=dict, step=int, config=dict))
    check_kinds(path, ckpt["config"], dict(model=str, preset=str, config=dict))
    if ckpt["config"]["model"] not in MODELS or ckpt["step"] < 0:
        raise UserError(f"{path} holds no model of this repository: {ckpt['config']['model']!r:.60} "
                        f"at step {ckpt['step']}")
    return ckpt | dict(path=str(path))


def check_kinds(path, values, kinds):
    for key, kind in kinds.items():
        if not isinstance(values, dict) or not isinstance(values.get(key), kind):
            raise UserError(f"{path} is no checkpoint of this train.py: its {key!r} is missing or no {kind.__name__}")


def has_kind(value, default):
    """Whether a saved value may stand where this default stands."""
    if default is None or isinstance(default, bool):
        return isinstance(value, bool) or value is default
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is type(default)


def saved_part(ckpt, part, cls):
    """The values of a dataclass from a checkpoint, if they are this version's: the same names and kinds."""
    check_kinds(ckpt["path"], ckpt["config"], {part: dict})
    values = ckpt["config"][part]
    unlike = values.keys() ^ {field.name for field in fields(cls)}
    for field in fields(cls):
        value = values.get(field.name)
        default = field.default
        if isinstance(default, tuple):
            length = len(value) if isinstance(value, (tuple, list)) else 0
            fits = length == len(default) or ("..." in str(field.type) and length)
            fits = fits and all(has_kind(item, default[0]) for item in value)
        else:
            fits = has_kind(value, default)
        if not fits:
            unlike.add(field.name)
    if unlike:
        names = ", ".join(sorted(f"{name!r:.40}" for name in unlike))
        raise UserError(f"{ckpt['path']} is of another version; what doesn't fit in its {part}: {names}")
    return values


def load_weights(model, ckpt):
    try:
        model.load_state_dict(ckpt["model"])
    except Exception as error:          # whatever may be in the file
        message = " ".join(str(error).split())
        raise UserError(f"{ckpt['path']} does not fit this model: {message:.200}") from None


def load_optimizer(optimizer, ckpt):
    """
    AdamW's moments, copied into memory of each parameter's own shape, type and device: torch itself compares
    no shapes, and its fused update would write beyond smaller tensors. All else in the groups is this run's.
    """
    saved = ckpt["optimizer"]
    groups = optimizer.state_dict()["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    try:
        assert [g["params"] for g in saved["param_groups"]] == [g["params"] for g in groups], "other groups"
        for i, moments in saved["state"].items():
            assert i in range(len(params)), f"no parameter {i}"
            state[i] = dict(step=torch.tensor(float(moments["step"])))
            for name in ("exp_avg", "exp_avg_sq"):
                shape = tuple(moments[name].shape)
                assert shape == params[i].shape, f"{name} {i} has shape {shape}, not {tuple(params[i].shape)}"
                state[i][name] = torch.empty_like(params[i]).copy_(moments[name])
    except Exception as error:          # whatever may be in the file
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{ckpt['path']}: its optimiser does not fit this model: {message:.200}") from None
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


def save_checkpoint(path, model, optimizer, step, config):
    """To a temporary name, to disk, then renamed: whole or not there, and a full disk spares the old one."""
    temporary = path.with_name(path.name + ".tmp")
    content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, config=config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        old = f"the earlier {path} is whole" if path.exists() else "there is no earlier one"
        raise UserError(f"could not save {path} at step {step}: {str(error).splitlines()[0]}; {old}") from None


def try_weights(model, trained, batch, autocast):
    """
    (loss, norm) of the weights after an update, so that a checkpoint that can't go on never replaces one that
    can. norm: of the gradient and the parameters. Leaves no trace in gradients or buffers.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with autocast:
        loss, _ = model(batch)
    gradient = torch.autograd.grad(loss, trained, allow_unused=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    norm = torch.nn.utils.get_total_norm([*trained, *(g for g in gradient if g is not None)])
    return torch.stack([loss.detach().float(), norm.detach().float()])


def check_finite(opt, values, step, good):
    """values (steps, 2), the loss and the norm of the gradient from `step` on: stops at the first bad one."""
    broken = (~values.isfinite()).any(1).nonzero()[:, 0].tolist()
    if broken:
        loss, norm = values[broken[0]].tolist()
        step += broken[0]
        raise UserError(
            f"step {step + 1}: the loss is {loss:g} and the gradient norm {norm:g}, at lr "
            f"{schedule(opt, step)[0]:.3g}; last good checkpoint: {good}. Go on, or start again, "
            f"with a lower --lr, or a smaller --clip (now {opt.clip:g})")


# ---- the output folder ---------------------------------------------------------------------------
LOCK = []       # the folder that this process writes to, as an open file: locked as long as that is open


def lock_folder(out):
    """Refuses a folder that another run writes to. The lock ends with this process, however it ends."""
    while LOCK:
        os.close(LOCK.pop())
    out.mkdir(parents=True, exist_ok=True)
    if fcntl:
        LOCK.append(os.open(out, os.O_RDONLY))
        try:
            fcntl.flock(LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {out}: wait, or name another --out") from None
        except OSError:                     # a file system without locks
            pass


def prepare_folder(out, start, resuming):
    """A new run moves an earlier one aside; a resumed run forgets the log of steps that it will do again."""
    lock_folder(out)
    if (out / "ckpt.pt").exists() and not resuming:
        names = (out.with_name(f"{out.name}.{i}") for i in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        out.rename(aside)
        tqdm.write(f"an earlier run in {out} is now in {aside}")
        lock_folder(out)
    log = out / "log.jsonl"
    with only_warn(log):
        lines = read_log(log) if resuming and log.exists() else []
        log.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))


@contextmanager
def only_warn(path):
    """What stands beside the checkpoint stops no run: a failure becomes a line on stderr."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        tqdm.write(f"warning: {path}: {message[:200]}", file=sys.stderr)


def read_log(path):
    """The lines of a log.jsonl as dicts; what can't be read is dropped."""
    lines = []
    texts = path.read_text(errors="replace").splitlines()
    for text in texts:
        try:
            line = json.loads(text)
            if isinstance(line["step"], int):
                lines.append(line)
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
    if len(lines) < len(texts):
        tqdm.write(f"{path}: {len(texts) - len(lines)} damaged lines dropped", file=sys.stderr)
    return lines


def draw_curves(out):
    """
    curves.png: what log.jsonl says, without what never changes. loss_1, loss_2 ... share a panel, psnr and
    copy_psnr too; values that span decades get a logarithmic axis.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = {}
    for line in read_log(out / "log.jsonl"):
        for name, value in line.items():
            if name not in ("step", "ms") and isinstance(value, (int, float)):
                curves.setdefault(name, {})[line["step"]] = value
    panels = {}
    for name, curve in curves.items():
        if len({*curve.values()}) > 1:
            family = re.sub(r"_\d+$", "_*", name.removeprefix("copy_"))
            panels.setdefault(family, {})[name] = curve
    rows = max(1, math.ceil(len(panels) / 4))
    figure = plt.figure(figsize=(13, 2.3 * rows), layout="constrained")
    for number, (family, members) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, 4, number)
        axis.set_title(family, fontsize=10)
        for name, curve in members.items():
            axis.plot(curve.keys(), curve.values(), lw=1.3, label=name)
        values = [value for curve in members.values() for value in curve.values()]
        if min(values) > 0 and max(values) > 30 * min(values):
            axis.set_yscale("log")
        if len(members) > 1:
            axis.legend(fontsize=7)
    figure.supxlabel("step", fontsize=10)
    figure.savefig(out / "curves.png", dpi=90)
    plt.close(figure)


def show_number(x):
    """Three decimals, or if those would show nothing, powers of ten."""
    return f"{x:.1e}" if 0 < abs(x) < 0.001 else f"{x:.3f}"


def show_line(line, opt, device, first):
    """A line of the log in at most 100 columns, with as many of the model's meters as fit."""
    loop = ("step", "loss", "grad_norm", "lr", "weight_decay", "ms", "samples_per_s", "held_out")
    meters = [f"{name} {show_number(value)}" for name, value in line.items() if name not in loop][:3]
    head = [f"step {line['step']}/{opt.steps}", f"loss {line['loss']:.4f}"]
    tail = [f"lr {line['lr']:.1e}", f"gnorm {line['grad_norm']:.2f}", f"{line['ms']:.0f} ms",
            f"{line['samples_per_s']:.1f} samples/s"]
    if device.type == "cuda":
        tail.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB")
    if not first:                       # the first step starts processes and compiles
        minutes = (opt.steps - line["step"]) * line["ms"] / 60_000
        tail.append(f"eta {minutes / 60:.1f}h" if minutes > 90 else f"eta {minutes:.1f}m")
    while meters and len(" | ".join(head + meters + tail)) > 100:
        meters.pop()
    return " | ".join(head + meters + tail)


def show_table(table, title):
    """{row: {column: number}} as aligned text."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    width = max(map(len, [title, *table]))
    lines = [title.ljust(width) + "".join(column.rjust(11) for column in columns)]
    for name, row in table.items():
        cells = [show_number(row[column]) if column in row else "" for column in columns]
        lines.append(name.ljust(width) + "".join(cell.rjust(11) for cell in cells))
    return "\n".join(lines)


# ---- schedules, batches, measures ----------------------------------------------------------------
def cosine(progress):
    """From 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def schedule(opt, step):
    """DINO's learning rate (linear from 0, then cosine to min_lr), weight decay (cosine). paper: Table 8"""
    warm = int(opt.warmup * opt.steps)
    if step < warm:
        lr = opt.lr * step / max(warm - 1, 1)
    else:
        lr = opt.min_lr + (opt.lr - opt.min_lr) * cosine((step - warm) / (opt.steps - warm))
    decay = opt.weight_decay_end + (opt.weight_decay - opt.weight_decay_end) * cosine(step / opt.steps)
    return lr, decay


def default_groups(model, weight_decay):
    """All trained parameters; 1-D ones (biases, norms) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p for p in trained if p.ndim > 1], weight_decay=weight_decay, decayed=True),
            dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0, decayed=False)]


def batches(opt, run, start, accum, micro):
    """Samples of this process's micro-batches, from step `start` on: consecutive numbers, never random."""
    for step in range(start, opt.steps):
        for a in range(accum):
            first = step * opt.batch_size + (a * run.world + run.rank) * micro
            yield range(first, first + micro)


def held_out(parts, run, model, autocast):
    """
    Means of model.report over 8 batches, shared out: {row: {column: number}}. Scenes are none that training
    sees; of videos these are other draws from the same files.
    """
    opt = parts["options"]
    n = model.cfg.inputs.get("held_out", min(opt.batch_size, 32))
    each = math.ceil(8 / run.world)
    share = [range(i * n, (i + 1) * n) for i in range(run.rank, each * run.world, run.world)]
    loader = data.make_loader(
        opt.data, model.cfg.inputs, share, run.device, opt.seed, split="eval", colours=False,
        scenes=parts["scenes"], videos=parts["videos"])
    sums = {}
    model.eval()
    for batch in loader:
        with autocast:
            report = model.report(batch)
        for row, columns in report.items():
            for column, value in columns.items():
                sums[row, column] = sums.get((row, column), 0) + value.float()
    model.train()
    table = {}
    if sums:
        means = run.mean(torch.stack(list(sums.values())) / each).tolist()
        for (row, column), value in zip(sums, means):
            table.setdefault(row, {})[column] = value
    return table


# Dense bf16 FLOP/s by the data sheets; the first name that fits counts. Others: no MFU, not a wrong one
PEAK_BF16 = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100 80GB HBM3": 989e12, "H200": 989e12,
             "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def count_flops(model_class, cfg, batch):
    """FLOPs (2 per multiply-add) of forward and backward for one sample, counted on the meta device."""
    if hasattr(cfg, "checkpoint"):
        cfg = replace(cfg, checkpoint=False)        # what is computed twice isn't the model's work twice
    with torch.device("meta"):
        model = model_class(cfg)
    sample = {key: value[:1].to("meta") for key, value in batch.items()}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(sample)[0].backward()
    return counter.get_total_flops()


def bench_line(run, hardware, ticks, micro, flops):
    """What the clock at the start and after each of 23 steps says; the first three warm up and compile."""
    times = [after - before for before, after in itertools.pairwise(ticks)][3:]
    rate = micro / statistics.median(times)         # of each process
    peak = next((peak for name, peak in PEAK_BF16.items() if name in hardware), None)
    mfu = f"{100 * rate * flops / peak:.1f} % of bf16 peak" if peak else "n/a"
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device) / 2**30
    else:
        import resource                             # not on Windows
        unit = 2**30 if platform.system() == "Darwin" else 2**20
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return (f"bench: {1000 * statistics.median(times):.1f} ms a step (median of 20; {1000 * min(times):.1f} to "
            f"{1000 * max(times):.1f}), micro batch {micro} x {run.world}, {rate * run.world:.2f} samples/s, "
            f"{flops / 1e9:.1f} GFLOP a sample (forward and backward), {rate * flops / 1e12:.2f} TFLOP/s each, "
            f"MFU {mfu}, peak memory {memory:.1f} GB")


# ---- the loop ------------------------------------------------------------------------------------
def build(parts, module, ckpt, run):
    """Model and optimiser, new or from the checkpoint, and the step that comes next."""
    opt = parts["options"]
    torch.manual_seed(opt.seed)
    try:
        model = getattr(module, MODELS[opt.model])(parts["config"]).to(run.device)
    except Exception as error:
        if ckpt and not isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"{ckpt['path']} does not fit {opt.model}.py: {error!r:.200}") from None
        if isinstance(error, (AssertionError, ValueError)):
            raise UserError(str(error)) from None
        raise
    if hasattr(model, "param_groups"):
        groups = model.param_groups(opt.weight_decay)
    else:
        groups = default_groups(model, opt.weight_decay)
    fused = run.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(groups, lr=opt.lr, betas=opt.betas, fused=fused)
    if not ckpt:
        if opt.init:
            other = read_checkpoint(opt.init)
            if other["config"]["model"] != opt.model:
                raise UserError(f"{other['path']} holds a {other['config']['model']} model, not {opt.model}")
            load_weights(model, other)
        return model, optimizer, 0
    start = ckpt["step"]
    if start >= opt.steps and not opt.bench:
        raise UserError(f"{ckpt['path']} is at step {start} already: to go on, give more --steps than that")
    load_weights(model, ckpt)
    load_optimizer(optimizer, ckpt)
    before = replace(opt, steps=ckpt["config"]["options"]["steps"])
    if schedule(before, start) != schedule(opt, start):
        run.print0(f"--steps {before.steps} -> {opt.steps} stretches the cosine: at step {start + 1} the learning "
                   f"rate goes from {schedule(before, start)[0]:.3g} to {schedule(opt, start)[0]:.3g}")
    del ckpt["model"], ckpt["optimizer"]                # a copy of all weights and moments
    return model, optimizer, start


def main(argv):
    parts, module, ckpt = parse(argv)
    opt, cfg = parts["options"], parts["config"]
    run = Run(opt.device)
    device = run.device
    out = Path(opt.out)

    # ---- batch sizes: the user says the global one
    micro = opt.micro_batch or max(opt.batch_size // run.world, 1)
    if opt.bench:
        opt.batch_size = micro * run.world
    accum, rest = divmod(opt.batch_size, micro * run.world)
    if not accum or rest:
        near = max(round(opt.batch_size / (micro * run.world)), 1) * micro * run.world
        raise UserError(f"batch_size={opt.batch_size} must be a multiple of micro_batch x processes = "
                        f"{micro} x {run.world}: try --batch-size {near}")

    # ---- precision. our choice: bf16 autocast, which needs no loss scaling; paper: fp16
    torch.set_float32_matmul_precision("high")      # TF32 for what autocast leaves in float32
    if opt.dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"--dtype {opt.dtype}: choose from auto, bfloat16, float32")
    bf16 = opt.dtype == "bfloat16"
    if opt.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    # ---- model, optimiser
    model, optimizer, start = build(parts, module, ckpt, run)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    use_compile = opt.compile
    if use_compile is None:
        use_compile = device.type == "cuda" and platform.system() == "Linux"
    if use_compile:
        model.compile(dynamic=False)                # in place, so the keys of the state dict stay clean
    wrapped = model
    if run.world > 1:                   # buffers: each process keeps its own; after_step() makes them agree
        renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters       # in torch 2.13
        buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        wrapped = DDP(model, device_ids=[device.index] if device.type == "cuda" else None, **buffers)

    # ---- data: opened before the output folder is touched, so that a wrong path leaves no trace
    if opt.bench:
        opt.steps = start + 23
    samples = iter(data.make_loader(
        opt.data, cfg.inputs, batches(opt, run, start, accum, micro), device, opt.seed, opt.workers,
        scenes=parts["scenes"], videos=parts["videos"], motion_colours=opt.motion_colours))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    run.print0(
        f"{opt.model} {opt.preset} on {opt.data}: {sum(p.numel() for p in trained) / 1e6:.2f} M trained "
        f"parameters, {run.world} x {hardware}, {'bfloat16 autocast' if bf16 else 'float32'}, compile "
        f"{'on' if use_compile else 'off'}, batch {opt.batch_size} = {accum} x {run.world} x {micro}, "
        f"torch {torch.__version__}")
    if opt.bench:                       # the time of a step without that of loading
        batch = next(samples)
        samples = itertools.repeat(batch)
        flops = count_flops(type(model), cfg, batch)

    # ---- output folder
    config = dict(model=opt.model, preset=opt.preset, **{part: asdict(it) for part, it in parts.items()})
    if run.rank == 0 and not opt.bench:
        resuming = bool(ckpt) and Path(ckpt["path"]).resolve() == (out / "ckpt.pt").resolve()
        prepare_folder(out, start, resuming)
        text = json.dumps(dict(config, torch=torch.__version__, command=sys.argv), indent=1)
        (out / "config.json").write_text(text + "\n")

    # ---- train
    caught = catch_signals(run.rank)
    before_step = getattr(model, "before_step", lambda progress: None)
    good = f"{out / 'ckpt.pt'} (step {start})" if ckpt else "none yet"
    bar = tqdm(total=opt.steps, initial=start, disable=run.rank > 0 or not sys.stderr.isatty(),
               dynamic_ncols=True, unit="step")
    window = []                         # meters since the last line of the log, still on the device
    clock = time.perf_counter()
    ticks = [clock]                     # of --bench
    for step in range(start, opt.steps):
        lr, decay = schedule(opt, step)
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=decay if group.get("decayed", True) else 0.0)

        meters = {}
        for a in range(accum):
            batch = next(samples)
            number = (step * accum + a) * run.world + run.rank
            torch.manual_seed((opt.seed << 32) + number)            # random depth
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
        bar.update()
        if opt.bench:
            if device.type != "cpu":
                torch.accelerator.synchronize()
            ticks.append(time.perf_counter())
            continue

        # ---- log and save; nothing above waits for the device
        window.append(meters)
        halt = bool(caught)
        if run.world > 1:                       # all leave together; asked for every tenth step
            halt = step % 10 == 0 and run.mean(torch.tensor(float(halt), device=device)).item() > 0
        done = halt or step + 1 == opt.steps
        save = done or (step + 1) % opt.save_every == 0
        if device.type == "cpu":                # reading costs nothing here: a bad step is noticed at once
            check_finite(opt, torch.stack([meters["loss"], meters["grad_norm"]])[None], step, good)
        if not (save or step == start or (step + 1) % opt.log_every == 0):
            continue
        rows = torch.stack([torch.stack([x.float() for x in values.values()]) for values in window])
        check_finite(opt, rows[:, [0, -1]].cpu(), step + 1 - len(window), good)
        means = dict(zip(meters, run.mean(rows.mean(0)).tolist()))
        seconds = (time.perf_counter() - clock) / len(window)
        line = dict(step=step + 1, **means, lr=lr, weight_decay=decay, ms=1000 * seconds,
                    samples_per_s=opt.batch_size / seconds)
        if save:
            tried = run.mean(try_weights(model, trained, batch, autocast))
            check_finite(opt, tried[None].cpu(), step + 1, good)
            if run.rank == 0:
                save_checkpoint(out / "ckpt.pt", model, optimizer, step + 1, config)
            good = f"{out / 'ckpt.pt'} (step {step + 1})"
        if done and not halt:
            line["held_out"] = held_out(parts, run, model, autocast)
        if run.rank == 0:
            with only_warn(out / "log.jsonl"), open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        if run.rank == 0 and save:
            with only_warn(out / "curves.png"):
                draw_curves(out)
        run.print0(show_line(line, opt, device, first=step == start))
        window = []
        clock = time.perf_counter()
        if halt:
            break

    # ---- the end
    bar.close()
    if opt.bench:
        run.print0(bench_line(run, hardware, ticks, micro, flops))
    elif halt:
        name = signal.Signals(caught[0]).name if caught else "a signal"
        run.print0(f"stopped by {name} after step {step + 1}; saved. Go on with: "
                   f"python train.py --resume {out}")
    else:
        synthetic = opt.data in ("scenes", "squares")
        title = f"{opt.data} never seen in training" if synthetic else "other draws from these videos"
        if line["held_out"]:
            run.print0("\n" + show_table(line["held_out"], title) + "\n")
        run.print0(f"written: {out}/ckpt.pt, log.jsonl, curves.png, config.json")
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if not opt.bench and halt:
        sys.exit(128 + (caught[0] if caught else signal.SIGTERM))


def cli(argv):
    """main(), but what the user can mend is told in one line on stderr, with exit status 1, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a path that the terminal's encoding lacks ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
    except KeyboardInterrupt:                       # before the signals are caught
        sys.exit(130)
    except (UserError, ValueError, OSError, RuntimeError) as error:
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
