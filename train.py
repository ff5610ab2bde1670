"""
The one training loop. It knows a model by its contract alone: a module with PRESETS, RECIPES,
Config (its `inputs`: what the model expects) and Model(config) with forward(batch) -> (loss, logs),
report(batch), after_step(progress), and, where needed, before_step and param_groups.

    python train.py --model midway                          # no GPU: preset tiny, synthetic scenes
    python train.py --model midway --preset vit_s --data PATH/TO/VIDEOS
    torchrun --nproc_per_node=8 train.py --model midway --data PATH     # GPUs: the paper's preset
    python train.py --resume out/midway-tiny                # go on exactly where it stopped
    python train.py --model midway --no-gating              # an ablation is a flag of the Config
    python train.py --model midway --bench                  # 20 timed steps: FLOPs, MFU, memory
    python train.py --model midway --help                   # every flag, with its default here

Writes out/MODEL-PRESET/: ckpt.pt, log.jsonl, curves.png, config.json. Sample i depends on (seed, i)
alone, the random depth of a micro-batch on (seed, its number): a resumed run ends with the weights
of a whole one, bit by bit on a CPU, and one GPU and eight see the same batches.
"""
import argparse
import difflib
import importlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# CPU threads that wait should soon sleep: OpenMP's spinning stalls a run beside other processes
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["MPLBACKEND"] = "agg"        # curves.png needs no screen

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode

import data

MODELS = {"midway": "Midway", "moog": "MooG", "melomotion": "MeloMotion"}       # file: class
RANK = int(os.environ.get("RANK", 0))               # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))

@dataclass
class Options:
    model: str = ""             # midway, moog or melomotion
    preset: str = ""            # a preset; default: the smallest without a GPU, else the paper's
    data: str = "scenes"        # scenes, squares (synthetic), a video, a folder of videos or frames
    out: str = ""               # output folder. An earlier run in it moves aside
    resume: str = ""            # folder or ckpt.pt of an earlier run: go on where it stopped
    init: str = ""              # folder or ckpt.pt of another run: start with its weights
    steps: int = 1000           # optimiser steps in all
    batch_size: int = 32        # samples per step, over all processes
    micro_batch: int = 0        # samples per pass and process: lower if out of memory; 0: all
    lr: float = 1e-3            # peak learning rate
    min_lr: float = 1e-6        # learning rate at the end of the cosine
    warmup: float = 0.05        # share of the steps with a linear warm-up
    weight_decay: float = 0.04      # at the start; 1-D parameters have none
    weight_decay_end: float = 0.04  # at the end, by a cosine
    betas: tuple[float, float] = (0.9, 0.999)   # AdamW's two
    clip: float = 1.0           # largest global norm of the gradient; 0: no clipping
    seed: int = 0               # of weights, data and random depth
    workers: int = -1           # data processes per training process; -1: choose
    device: str = ""            # cuda, mps or cpu; default: the first of them that is there
    dtype: str = "auto"         # bfloat16 (autocast), float32; auto: bfloat16 on GPUs that have it
    compile: bool | None = None     # torch.compile; default: on CUDA under Linux
    log_every: int = 20         # steps between lines of the log
    save_every: int = 500       # steps between checkpoints; one is always written at the end
    motion_colours: str = "independent"     # of a motion crop's frames: independent, shared, none
    shift_warmup: float = 0.0               # midway: share of steps that teach known shifts
    bench: bool = False         # time 20 steps on one batch and leave

# Least and most of a number, in whichever group of flags the name stands; of others 0 and 1e12
LIMITS = dict(
    steps=(1, 1e9), batch_size=(1, 1e6), warmup=(0, 0.99), betas=(0, 0.999999), seed=(0, 1e9),
    workers=(-1, 128), log_every=(1, 1e9), save_every=(1, 1e9), size=(1, 4096),
    local_size=(1, 4096), sprites=(0, 1e3), textures=(1, 1e5))

class UserError(Exception):
    """Ends the program with one line on stderr and exit status 1."""

@contextmanager
def one_line(what, warn=False):
    """Any failure inside becomes one line, an error or a mere warning, if `what` isn't empty."""
    try:
        yield
    except Exception as error:
        if not what or isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        text = " ".join(f"{what}: {type(error).__name__}: {error}".split())[:300]
        if not warn:
            raise UserError(text) from None
        print(f"warning: {text}", file=sys.stderr)

# ---- command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: error: {message}\n")

def kind_of(field):
    """bool, int, float or str: of a field of a dataclass, or of the items of its tuple."""
    default = field.default
    example = default[0] if isinstance(default, tuple) else default
    return bool if example is None else type(example)

def add_flags(parser, part, cls, defaults):
    """A flag for each field of a dataclass, explained by the comment that stands beside it."""
    assert defaults.keys() == {field.name for field in fields(cls)}, f"other {part}"
    comments = dict(re.findall(r"^ +(\w+): [^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    group = parser.add_argument_group(part)
    for field in fields(cls):
        kind = kind_of(field)
        flag = dict(type=kind, metavar=kind.__name__)
        if kind is bool:
            flag = dict(action=argparse.BooleanOptionalAction)
        if isinstance(field.default, tuple):
            flag["nargs"] = "+" if "..." in str(field.type) else len(field.default)
        text = comments.get(field.name, "").replace("%", "%%")
        group.add_argument(
            ("--scene-" if part == "scenes" else "--") + field.name.replace("_", "-"), **flag,
            dest=f"{part}.{field.name}", default=defaults[field.name], help=f"{text} (%(default)s)")

def make_part(part, cls, given):
    """The dataclass, if each flag is of its default's kind and within LIMITS; else ValueError."""
    values = {}
    for field in fields(cls):
        kind = kind_of(field)
        value = getattr(given, f"{part}.{field.name}")
        values[field.name] = tuple(value) if isinstance(field.default, tuple) else value
        least, most = LIMITS.get(field.name, (0, 1e12))
        for item in value if isinstance(field.default, tuple) else [value]:
            fits = isinstance(item, kind) or item is field.default
            if kind in (int, float):
                fits = isinstance(item, (int, kind)) and least <= item <= most
            if not fits:
                raise ValueError(f"{part}: {field.name} {item!r:.40}: want {kind.__name__}, "
                                 f"numbers from {least:g} to {most:g}")
    return cls(**values)

def parse(argv):
    """Command line -> {part: dataclass}, the model's module, the checkpoint to resume or None."""
    first = Parser(add_help=False, allow_abbrev=False)
    for name in ("model", "preset", "resume", "device"):
        first.add_argument(f"--{name}", default="")
    first, _ = first.parse_known_args(argv)
    ckpt = None
    name = first.model
    if first.resume:
        ckpt = read_checkpoint(first.resume, first.model, first.preset)
        name = ckpt["config"]["model"]
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parts = dict(options=Options, scenes=data.SceneOptions, videos=data.VideoOptions)
    presets = {}
    if name in MODELS:
        module = importlib.import_module(name)
        parts["config"] = module.Config
        parser.epilog = f"presets of {name}: {', '.join(module.PRESETS)}"
        small, paper = getattr(module, "DEFAULTS", list(module.PRESETS)[:2])
        on_gpu = choose_device(first.device).type == "cuda"
        preset = first.preset or (paper if on_gpu else small)
        if preset not in module.PRESETS:
            parser.error(f"--preset {preset}: choose from {', '.join(module.PRESETS)}")
        recipe = dict(module.RECIPES[preset], model=name, preset=preset, out=f"out/{name}-{preset}")
        presets = dict(scenes=recipe.pop("scenes", {}), options=recipe,
                       config=module.PRESETS[preset])
    with one_line(ckpt and f"{ckpt['path']} does not fit this version"):
        for part, cls in parts.items():
            defaults = asdict(cls()) | presets.get(part, {})
            if ckpt:
                defaults = ckpt["config"][part]
            if ckpt and cls is Options:
                defaults["out"] = str(ckpt["path"].parent)          # where it lies now
            add_flags(parser, part, cls, defaults)
        given, unknown = parser.parse_known_args(argv)              # --help ends here
        if name not in MODELS:
            parser.error(f"--model {name}: which one? {', '.join(MODELS)}")
        if unknown:
            close = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1)
            parser.error(f"no flag {unknown[0]}: did you mean {' '.join(close) or '--help'}?")
        made = {part: make_part(part, cls, given) for part, cls in parts.items()}
    opt = made["options"]
    opt.data = os.path.expanduser(opt.data)
    opt.out = os.path.expanduser(opt.out)
    return made, module, ckpt

# ---- processes -----------------------------------------------------------------------------------
def print0(text):
    if RANK == 0:
        print(text, flush=True)

def mean_of_all(values):
    """Mean of a tensor over the processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values / WORLD

def choose_device(name=""):
    """This process's torch.device; under torchrun the GPU of its LOCAL_RANK."""
    if not name:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with one_line("--device: choose from cuda, mps, cpu"):
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(name)
        return torch.empty(1, device=name).device

CAUGHT = []     # signals that came

def on_signal(number, frame):
    """The step ends, then the run; a second signal ends it at once."""
    CAUGHT.append(number)
    signal.signal(number, signal.SIG_DFL)
    if RANK == 0:
        os.write(2, b"\nfinishing the step, then saving; again to leave now\n")

# ---- checkpoints ---------------------------------------------------------------------------------
def read_checkpoint(path, model="", preset=""):
    """A checkpoint of ours, from its path or its folder. Nothing in the file is executed."""
    path = Path(path).expanduser()
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    with one_line(f"{path} is damaged or no checkpoint"):
        ckpt = dict(torch.load(path, map_location="cpu", weights_only=True))
        name = ckpt["config"]["model"]
        its_preset = ckpt["config"]["preset"]
        ckpt.setdefault("log", [])
        assert name in MODELS and ckpt["step"] >= 0, "of no model of this repository"
        assert type(ckpt["step"]) is int and type(ckpt["log"]) is list
    if model not in ("", name) or preset not in ("", its_preset):
        raise UserError(f"{path} holds a {name} model, preset {its_preset}")
    return ckpt | dict(path=path)

def load_moments(optimizer, saved):
    """
    AdamW's moments, copied into memory like the parameters': torch compares no shapes, and its
    fused update would write beyond smaller tensors. All else in the groups is this run's.
    """
    new = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for mine, other in zip(new["param_groups"], saved["param_groups"], strict=True):
        assert mine["params"] == other["params"], "other groups of parameters"
    for i, moments in saved["state"].items():
        new["state"][i] = dict(step=torch.tensor(float(moments["step"])))
        for name in ("exp_avg", "exp_avg_sq"):
            assert moments[name].shape == params[i].shape, f"shape of {name} {i}"
            new["state"][i][name] = torch.empty_like(params[i]).copy_(moments[name])
    optimizer.load_state_dict(new)

def save_checkpoint(path, content):
    """To a temporary name, to disk, then renamed: a full disk spares the old one."""
    temporary = path.with_name("ckpt.pt.tmp")
    with one_line(f"can't save {path} (an earlier one is whole)"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

def try_weights(model, trained, batch, autocast):
    """(loss, norm of the gradient) after an update. Leaves no trace in gradients or buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with autocast:
        loss, _ = model(batch)
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return torch.stack([loss.detach().float(), norm.float()])

def check_finite(opt, values, step, good):
    """values (steps, meters): loss first, norm of the gradient last. Stops at a bad one."""
    for number, (loss, *_, norm) in enumerate(values.tolist(), step):
        if not math.isfinite(loss + norm):
            raise UserError(
                f"step {number + 1}: loss {loss:g}, gradient norm {norm:g} at lr "
                f"{schedule(opt, number)[0]:.3g}; last good checkpoint: {good}. "
                f"Go on, or start again, with a lower --lr or --clip (now {opt.clip:g})")

# ---- the output folder ---------------------------------------------------------------------------
LOCK = []       # the folder that this process writes to, opened: locked as long as it is open

def prepare_folder(out, resuming):
    """Locks the folder until this process ends; a new run moves an earlier one aside."""
    while LOCK:
        os.close(LOCK.pop())
    out.mkdir(parents=True, exist_ok=True)
    if os.name == "posix":
        import fcntl
        LOCK.append(os.open(out, os.O_RDONLY))
        try:
            fcntl.flock(LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {out}: wait, or change --out") from None
        except OSError:                 # a file system without locks
            pass
    if (out / "ckpt.pt").exists() and not resuming:
        number = next(i for i in itertools.count(1) if not os.path.exists(f"{out}.{i}"))
        out.rename(f"{out}.{number}")
        print(f"an earlier run in {out} is now in {out}.{number}")
        prepare_folder(out, resuming)

def write_log(out, lines, mode):
    with one_line(out / "log.jsonl", warn=True), open(out / "log.jsonl", mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

def draw_curves(lines, path):
    """What changes in the log: loss_1, loss_2 ... in one panel, psnr and copy_psnr too."""
    import matplotlib.pyplot as plt
    panels = {}
    for name in dict.fromkeys(itertools.chain(*lines)):
        points = {line["step"]: line[name] for line in lines if name in line}
        if name not in ("step", "ms", "eta_min", "held_out") and len({*points.values()}) > 1:
            family = re.sub(r"_\d+$", "_*", name.removeprefix("copy_"))
            panels.setdefault(family, {})[name] = points
    rows = math.ceil((len(panels) or 1) / 4)
    figure = plt.figure(figsize=(13, 2.3 * rows), layout="constrained")
    for number, (family, curves) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, 4, number, title=family)
        for name, points in curves.items():
            axis.plot(points.keys(), points.values(), label=name)
        low, high = axis.dataLim.intervaly
        if low > 0 and high > 30 * low:             # decades
            axis.set_yscale("log")
        if len(curves) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)

# ---- schedules, batches, measures ----------------------------------------------------------------
def cosine(start, end, progress):
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

def schedule(opt, step):
    """DINO's learning rate (linear from 0, then cosine), weight decay (cosine). paper: Table 8"""
    warm = int(opt.warmup * opt.steps)
    lr = cosine(opt.lr, opt.min_lr, (step - warm) / (opt.steps - warm))
    if step < warm:
        lr = opt.lr * step / max(warm - 1, 1)
    return lr, cosine(opt.weight_decay, opt.weight_decay_end, step / opt.steps)

def batches(opt, start, accum, micro):
    """Sample numbers of this process's micro-batches, from step `start` on: never random."""
    for step in range(start, opt.steps):
        for a in range(accum):
            first = step * opt.batch_size + (a * WORLD + RANK) * micro
            yield range(first, first + micro)

def held_out(parts, device, model, autocast):
    """
    Means of model.report over 8 batches: {row: {column: number}}. Scenes are none that training
    sees; of videos these are other draws from the same files.
    """
    opt = parts["options"]
    inputs = parts["config"].inputs
    n = inputs.get("held_out", min(opt.batch_size, 32))
    numbers = [range(i * n, (i + 1) * n) for i in range(8)]
    table = {}
    model.eval()
    for batch in data.make_loader(
            opt.data, inputs, numbers, device, opt.seed, split="eval", colours=False,
            scenes=parts["scenes"], videos=parts["videos"]):
        with autocast:
            report = model.report(batch)
        for row, columns in report.items():
            cells = table.setdefault(row, dict.fromkeys(columns, 0.0))
            for column, value in columns.items():
                cells[column] += value.item() / 8
    model.train()
    return table

# Dense bf16 FLOP/s by the data sheets; the first name that fits counts. Others: no MFU
PEAK_BF16 = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100 80GB HBM3": 989e12, "H200": 989e12,
             "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}

def count_flops(model_class, cfg, batch):
    """FLOPs (2 per multiply-add) of forward and backward for one sample, on the meta device."""
    if hasattr(cfg, "checkpoint"):
        cfg = replace(cfg, checkpoint=False)        # what is computed twice isn't twice the work
    with torch.device("meta"):
        model = model_class(cfg)
    sample = {key: value[:1].to("meta") for key, value in batch.items()}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(sample)[0].backward()
    return counter.get_total_flops()

def bench_line(device, ticks, micro, flops):
    """ticks: the clock at the start and after each of 23 steps, of which three warm up."""
    times = [after - before for before, after in itertools.pairwise(ticks)]
    seconds = statistics.median(times[3:])
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((peak for name, peak in PEAK_BF16.items() if name in hardware), math.nan)
    speed = micro * flops / seconds                 # of each process
    return (f"bench on {hardware}: {1000 * seconds:.1f} ms a step (median of 20), "
            f"{micro * WORLD / seconds:.2f} samples/s, {flops / 1e9:.1f} GFLOP a sample (forward "
            f"and backward), {speed / 1e12:.2f} TFLOP/s a process, MFU {100 * speed / peak:.1f} % "
            f"of bf16 peak, {torch.cuda.max_memory_allocated() / 2**30:.1f} GB of GPU memory")

# ---- the loop ------------------------------------------------------------------------------------
def build(parts, module, ckpt, device):
    """Model, the same for calls, optimiser: new or as the checkpoint has them."""
    opt = parts["options"]
    torch.manual_seed(opt.seed)
    source = ckpt or (opt.init and read_checkpoint(opt.init, opt.model))
    with one_line(source and f"{source['path']} does not fit this version"):
        model = getattr(module, MODELS[opt.model])(parts["config"]).to(device)
        if hasattr(model, "param_groups"):
            groups = model.param_groups(opt.weight_decay)
        else:                                       # 1-D parameters are not decayed
            trained = [p for p in model.parameters() if p.requires_grad]
            groups = [dict(params=[p for p in trained if p.ndim > 1]),
                      dict(params=[p for p in trained if p.ndim <= 1], decayed=False)]
        optimizer = torch.optim.AdamW(groups, opt.lr, opt.betas, fused=device.type != "mps")
        if source:
            model.load_state_dict(source.pop("model"))
        if ckpt:
            load_moments(optimizer, ckpt.pop("optimizer"))
    if opt.compile is None:
        opt.compile = device.type == "cuda" and sys.platform == "linux"
    if opt.compile:
        model.compile(dynamic=False)                # in place, so state dict keys stay clean
    wrapped = model
    if WORLD > 1:               # buffers: each process keeps its own; after_step() makes them agree
        renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters   # in torch 2.13
        buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        devices = [device.index] if device.type == "cuda" else None
        wrapped = DDP(model, device_ids=devices, **buffers)
    return model, wrapped, optimizer

def main(argv):
    parts, module, ckpt = parse(argv)
    opt = parts["options"]
    out = Path(opt.out)
    start = ckpt["step"] if ckpt else 0
    device = choose_device(opt.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # ---- sizes: the user says the global one
    micro = opt.micro_batch or max(opt.batch_size // WORLD, 1)
    if opt.bench:
        opt.batch_size = micro * WORLD
        opt.steps = start + 23
    accum, rest = divmod(opt.batch_size, micro * WORLD)
    if rest:
        raise UserError(f"--batch-size must be a multiple of micro batch x processes, {micro} x "
                        f"{WORLD}: try {opt.batch_size - rest or micro * WORLD}")
    if start >= opt.steps:
        raise UserError(f"{ckpt['path']} is at step {start} already: give more --steps than that")
    before = ckpt["config"]["options"]["steps"] if ckpt else opt.steps
    if before != opt.steps:
        print0(f"--steps {before} -> {opt.steps} stretches the cosine: the learning rate goes from "
               f"{schedule(replace(opt, steps=before), start)[0]:.3g} to "
               f"{schedule(opt, start)[0]:.3g}")

    # ---- precision. our choice: bf16 autocast, which needs no loss scaling; paper: fp16
    torch.set_float32_matmul_precision("high")      # TF32 for what autocast leaves in float32
    if opt.dtype not in ("auto", "bfloat16", "float32"):
        raise UserError(f"--dtype {opt.dtype}: choose from auto, bfloat16, float32")
    bf16 = opt.dtype == "bfloat16"
    if opt.dtype == "auto" and device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    model, wrapped, optimizer = build(parts, module, ckpt, device)
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    # ---- data: opened before the output folder is touched, so that a wrong path leaves no trace
    samples = iter(data.make_loader(
        opt.data, parts["config"].inputs, batches(opt, start, accum, micro), device, opt.seed,
        opt.workers, scenes=parts["scenes"], videos=parts["videos"],
        motion_colours=opt.motion_colours,
        one_frame=int(opt.shift_warmup * opt.steps) * opt.batch_size))
    print0(f"{opt.model} {opt.preset} on {opt.data}: {sum(p.numel() for p in trained) / 1e6:.2f} M "
           f"trained parameters, {WORLD} x {device.type}, {'bfloat16' if bf16 else 'float32'}, "
           f"compile {opt.compile}, batch {accum} x {WORLD} x {micro}")
    if opt.bench:                       # the time of a step without that of loading
        batch = next(samples)
        samples = itertools.repeat(batch)
        flops = count_flops(type(model), parts["config"], batch)

    # ---- output folder
    lines = ckpt["log"] if ckpt else []             # of log.jsonl
    config = {part: asdict(values) for part, values in parts.items()}
    config.update(model=opt.model, preset=opt.preset)
    if RANK == 0 and not opt.bench:
        resuming = bool(ckpt) and ckpt["path"].resolve() == (out / "ckpt.pt").resolve()
        prepare_folder(out, resuming)
        write_log(out, lines, "w")
        with one_line(out / "config.json", warn=True):
            (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    # ---- train
    CAUGHT.clear()
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    good = f"{ckpt['path']} (step {start})" if ckpt else "none yet"
    window = []                         # meters since the last line of the log, on the device
    clock = time.perf_counter()
    ticks = [clock]                     # of --bench
    for step in range(start, opt.steps):
        lr, decay = schedule(opt, step)
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=decay if group.get("decayed", True) else 0.0)
        meters = {}
        for a in range(accum):
            batch = next(samples)
            number = (step * accum + a) * WORLD + RANK
            torch.manual_seed((opt.seed << 32) + number)            # random depth
            last = WORLD == 1 or a == accum - 1
            with nullcontext() if last else wrapped.no_sync():      # gradients travel once a step
                with autocast:
                    loss, logs = wrapped(batch)
                (loss / accum).backward()
            for name, value in dict(loss=loss.detach(), **logs).items():
                meters[name] = meters.get(name, 0) + value.float() / accum
        meters["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, opt.clip or math.inf)
        if hasattr(model, "before_step"):
            model.before_step(step / opt.steps)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / opt.steps)
        if opt.bench:
            if device.type != "cpu":
                torch.accelerator.synchronize()
            ticks.append(time.perf_counter())
            continue

        # ---- log and save; nothing above waits for the device
        window.append(meters)
        halt = bool(CAUGHT)
        if WORLD > 1:                   # all leave together; asked for every tenth step
            halt = step % 10 == 0 and mean_of_all(torch.tensor(halt * 1.0, device=device)) > 0
        save = halt or step + 1 == opt.steps or (step + 1) % opt.save_every == 0
        if not (save or step == start or (step + 1) % opt.log_every == 0):
            continue
        meters = {name: x for name, x in meters.items() if name in window[0]}
        rows = torch.stack([torch.stack([m[name] for name in meters]) for m in window])
        check_finite(opt, rows, step + 1 - len(window), good)
        means = mean_of_all(rows.mean(0)).tolist()
        seconds = (time.perf_counter() - clock) / len(window)
        line = dict(step=step + 1, loss=means[0], lr=lr, ms=1000 * seconds,
                    eta_min=(opt.steps - step - 1) * seconds / 60)
        line.update(zip(meters, means))
        line.update(samples_per_s=opt.batch_size / seconds, weight_decay=decay)
        text = "".join(f"{name} {value:.4g} | " for name, value in line.items())
        print0(text[:103].rpartition(" | ")[0])             # at most 100 columns
        if save:
            tried = mean_of_all(try_weights(model, trained, batch, autocast))
            check_finite(opt, tried[None], step + 1, good)
            good = f"{out / 'ckpt.pt'} (step {step + 1})"
        lines.append(line)
        if RANK == 0 and save:
            save_checkpoint(out / "ckpt.pt", dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1,
                config=config, log=lines))
            with one_line(out / "curves.png", warn=True):
                draw_curves(lines, out / "curves.png")
        if step + 1 == opt.steps and not halt:
            line["held_out"] = held_out(parts, device, model, autocast)
            for row, cells in line["held_out"].items():
                print0(f"{row:30}" + "".join(f"{x:11.4g} {name}" for name, x in cells.items()))
        if RANK == 0:
            write_log(out, [line], "a")
        window = []
        clock = time.perf_counter()
        if halt:
            break

    # ---- the end
    if opt.bench:
        print0(bench_line(device, ticks, micro, flops))
    else:
        print0(f"written: {out}/ckpt.pt at step {step + 1}, log.jsonl, curves.png")
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if not opt.bench and halt:
        print0(f"stopped. Go on with: python train.py --resume {out}")
        sys.exit(128 + (CAUGHT or [signal.SIGTERM])[0])

def cli(argv):
    """main(), but what the user can mend is one line on stderr, exit status 1, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # a path that can't be printed
    try:
        main(argv)
    except KeyboardInterrupt:                       # before the signals are caught
        sys.exit(130)
    except (UserError, AssertionError, ValueError, OSError, RuntimeError) as error:
        last = str(error).strip().split("\n")[-1]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            last = "out of memory: give a --micro-batch below --batch-size / processes"
        elif isinstance(error, RuntimeError):
            raise                                   # a bug, not the user's doing
        last = re.sub(r"^[A-Za-z]+Error: ", "", last)       # of a data process
        sys.stderr.write(f"train.py: error: {last}\n")
        sys.exit(1)

if __name__ == "__main__":
    cli(sys.argv[1:])
