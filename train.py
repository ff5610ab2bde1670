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
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# CPU threads that wait should soon sleep: OpenMP's spinning stalls a run beside other processes
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
    preset: str = ""            # a preset; default: the first without a GPU, else the second
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
    steps=(1, 1e9), batch_size=(1, 1e6), warmup=(0, 0.99), seed=(0, 1e9), workers=(-1, 128),
    log_every=(1, 1e9), save_every=(1, 1e9), size=(1, 4096), sprites=(0, 1e3), textures=(1, 1e5))

class UserError(Exception):
    """Ends the program with one line on stderr and exit status 1."""

@contextmanager
def one_line(what, warn=False):
    """Any failure inside becomes one line, an error or a mere warning, if `what` isn't empty."""
    try:
        yield
    except Exception as error:
        if not what or isinstance(error, torch.OutOfMemoryError):
            raise
        text = " ".join(f"{what}: {type(error).__name__}: {error}".split())[:300]
        if not warn:
            raise UserError(text) from None
        print(f"warning: {text}", file=sys.stderr)

# ---- command line --------------------------------------------------------------------------------
def add_flags(parser, part, cls, defaults):
    """A flag for each field of a dataclass, explained by the comment that stands beside it."""
    comments = dict(re.findall(r"^ +(\w+): [^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    group = parser.add_argument_group(part)
    for field in fields(cls):
        default = defaults[field.name]
        many = isinstance(field.default, tuple)
        kind = type(field.default[0] if many else field.default)
        flag = dict(type=os.path.expanduser if kind is str else kind, metavar=kind.__name__,
                    default=default if many else str(default))
        if many:
            flag["nargs"] = "+" if "..." in str(field.type) else len(field.default)
        if kind in (bool, type(None)):
            flag = dict(action=argparse.BooleanOptionalAction, default=default)
        text = comments.get(field.name, "").replace("%", "%%")
        name = "scene_" + field.name if part == "scenes" else field.name
        group.add_argument("--" + name.replace("_", "-"), dest=f"{part}.{field.name}",
                           help=f"{text} (%(default)s)", **flag)

def preset_values(module, name, first):
    """{part: values} of the preset that is asked for, or of the first; on a GPU of the second."""
    on_gpu = choose_device(first.device).type == "cuda"
    preset = first.preset or list(module.PRESETS)[on_gpu]
    if preset not in module.PRESETS:
        raise UserError(f"--preset {preset}: choose from {', '.join(module.PRESETS)}")
    recipe = dict(module.RECIPES[preset], model=name, preset=preset, out=f"out/{name}-{preset}")
    scenes = recipe.pop("scenes", {})
    return dict(options=recipe, scenes=scenes, config=module.PRESETS[preset])

def parse(argv):
    """Command line -> {part: dataclass}, the model's module, the checkpoint to resume or None."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("model", "preset", "resume", "device"):
        first.add_argument(f"--{name}", default="")
    first, _ = first.parse_known_args(argv)
    ckpt = read_checkpoint(first.resume) if first.resume else None
    name = ckpt["config"]["model"] if ckpt else first.model
    if name not in MODELS:
        if {"-h", "--help"} & {*argv}:
            print(__doc__)
        raise UserError(f"--model {name}: choose from {', '.join(MODELS)}")
    module = importlib.import_module(name)
    start = ckpt["config"] if ckpt else preset_values(module, name, first)
    if first.model not in ("", name) or ckpt and first.preset not in ("", start["preset"]):
        raise UserError(f"{ckpt['path']} holds a {name} model, preset {start['preset']}")
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"presets: {', '.join(module.PRESETS)}", allow_abbrev=False,
        exit_on_error=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = dict(options=Options, scenes=data.SceneOptions, videos=data.VideoOptions,
                 config=module.Config)
    with one_line(ckpt and f"{ckpt['path']} does not fit this version"):
        for part, cls in parts.items():
            add_flags(parser, part, cls, asdict(cls(**start.get(part, {}))))
    given, unknown = parser.parse_known_args(argv)              # --help ends here
    if unknown:
        close = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1)
        raise UserError(f"no flag {unknown[0]}: did you mean {' '.join(close) or '--help'}?")
    for part, cls in parts.items():
        values = {field.name: getattr(given, f"{part}.{field.name}") for field in fields(cls)}
        for name, value in values.items():
            least, most = LIMITS.get(name, (0, 1e12))
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(x, (int, float)) and not least <= x <= most:
                    raise UserError(f"{name} {x}: want {least:g} to {most:g}")
            if isinstance(value, list):
                values[name] = tuple(value)
        parts[part] = cls(**values)
    return parts, module, ckpt

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
    with one_line("--device: choose from cuda, mps, cpu"):
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.device(name or best)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        return torch.empty(1, device=device).device

# ---- checkpoints ---------------------------------------------------------------------------------
def read_checkpoint(path):
    """A checkpoint of ours, from its path or its folder. Nothing in the file is executed."""
    path = Path(path).expanduser()
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    with one_line(f"{path} is damaged or no checkpoint"):
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        assert ckpt["config"]["model"] in MODELS and ckpt["step"] >= 0, "of no model of ours"
        ckpt["config"]["options"]["out"] = str(path.parent)              # where it lies now
        return dict(log=[]) | ckpt | dict(path=path)

def load_moments(optimizer, saved):
    """AdamW's moments, of the parameters' shapes: its fused update would write beyond smaller."""
    params = []
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        params += group["params"]
        assert len(group["params"]) == len(other["params"]), "other groups of parameters"
    for i, moments in saved["state"].items():
        step_device = "cpu" if params[i].device.type == "mps" else params[i].device
        state = optimizer.state[params[i]]
        state["step"] = torch.tensor(float(moments["step"]), device=step_device)
        for name in ("exp_avg", "exp_avg_sq"):
            assert moments[name].shape == params[i].shape, f"shape of {name} {i}"
            state[name] = torch.empty_like(params[i]).copy_(moments[name])

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
    from matplotlib.figure import Figure
    panels = {}
    for name in dict.fromkeys(itertools.chain(*lines)):
        points = {line["step"]: line[name] for line in lines if name in line}
        if name not in ("step", "ms", "eta_min", "held_out") and len({*points.values()}) > 1:
            family = re.sub(r"_\d+$", "_*", name.removeprefix("copy_"))
            panels.setdefault(family, {})[name] = points
    figure = Figure(figsize=(13, 9), layout="constrained")
    for number, curves in enumerate(panels.values(), 1):
        axis = figure.add_subplot(math.ceil(len(panels) / 4), 4, number)
        for name, points in curves.items():
            axis.plot(points.keys(), points.values(), label=name)
        axis.legend(fontsize=7)
        low, high = axis.dataLim.intervaly
        if 0 < 30 * low < high:                     # decades
            axis.set_yscale("log")
    figure.savefig(path, dpi=90)

# ---- the steps -----------------------------------------------------------------------------------
def build(parts, module, ckpt, device):
    """What the steps share; model and optimiser new or as the checkpoint has them."""
    opt = parts["options"]
    micro = opt.micro_batch or max(opt.batch_size // WORLD, 1)      # samples a pass and process
    accum, rest = divmod(opt.batch_size, micro * WORLD)             # passes a step
    if rest:
        raise UserError(f"--batch-size must be a multiple of micro batch x processes, {micro} x "
                        f"{WORLD}: try {opt.batch_size - rest or micro * WORLD}")
    torch.manual_seed(opt.seed)
    source = ckpt or (opt.init and read_checkpoint(opt.init))
    with one_line(source and f"{source['path']} does not fit this version"):
        model = getattr(module, MODELS[opt.model])(parts["config"]).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in trained if p.ndim > 1]),
                  dict(params=[p for p in trained if p.ndim <= 1], decayed=False)]
        if hasattr(model, "param_groups"):
            groups = model.param_groups(opt.weight_decay)
        optimizer = torch.optim.AdamW(groups, opt.lr, opt.betas, fused=device.type != "mps")
        if source:
            model.load_state_dict(source.pop("model"))
        if ckpt:
            load_moments(optimizer, ckpt.pop("optimizer"))
    if opt.compile is None:
        opt.compile = device.type == "cuda" and sys.platform == "linux"
    if opt.compile:
        model.compile(dynamic=False)                # in place, so state dict keys stay clean
    wrapped = model             # for calls: shares gradients, and buffers only by after_step()
    if WORLD > 1:
        renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters   # in torch 2.13
        wrapped = DDP(model, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})
    # our choice: bf16 autocast, which needs no loss scaling; paper: fp16
    if opt.dtype == "auto":
        modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        opt.dtype = "bfloat16" if modern else "float32"
    if opt.dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype {opt.dtype}: choose from auto, bfloat16, float32")
    torch.set_float32_matmul_precision("high")      # TF32 for what autocast leaves in float32
    return argparse.Namespace(
        parts=parts, opt=opt, accum=accum, micro=micro, device=device,
        model=model, wrapped=wrapped, optimizer=optimizer,
        trained=[p for group in optimizer.param_groups for p in group["params"]],
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=opt.dtype == "bfloat16"))

def cosine(start, end, progress):
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

def schedule(opt, step):
    """DINO's learning rate (linear from 0, then cosine), weight decay (cosine). paper: Table 8"""
    warm = int(opt.warmup * opt.steps)
    lr = cosine(opt.lr, opt.min_lr, (step - warm) / (opt.steps - warm))
    if step < warm:
        lr = opt.lr * step / max(warm - 1, 1)
    return lr, cosine(opt.weight_decay, opt.weight_decay_end, step / opt.steps)

def train_step(run, samples, step):
    """One update -> its meters, scalars on the device, and the last batch. Waits for nothing."""
    opt = run.opt
    lr, decay = schedule(opt, step)
    for group in run.optimizer.param_groups:
        group.update(lr=lr, weight_decay=decay if group.get("decayed", True) else 0.0)
    meters = {}
    for a in range(run.accum):
        batch = next(samples)
        number = (step * run.accum + a) * WORLD + RANK
        torch.manual_seed((opt.seed << 32) + number)                # random depth
        last = WORLD == 1 or a == run.accum - 1
        with nullcontext() if last else run.wrapped.no_sync():      # gradients travel once a step
            with run.autocast:
                loss, logs = run.wrapped(batch)
            (loss / run.accum).backward()
        for name, value in dict(loss=loss.detach(), **logs).items():
            meters[name] = meters.get(name, 0) + value.float() / run.accum
    meters["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.trained, opt.clip or math.inf)
    if hasattr(run.model, "before_step"):
        run.model.before_step(step / opt.steps)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.model.after_step((step + 1) / opt.steps)
    return meters, batch

def check_finite(opt, values, step, good):
    """values (steps, meters): loss first, norm of the gradient last. Stops at a bad one."""
    for number, (loss, *_, norm) in enumerate(values.tolist(), step):
        if not math.isfinite(loss + norm):
            raise UserError(
                f"step {number + 1}: loss {loss:g}, gradient norm {norm:g} at lr "
                f"{schedule(opt, number)[0]:.3g}; last good checkpoint: {good}. "
                f"Go on, or start again, with a lower --lr or --clip (now {opt.clip:g})")

def try_weights(run, batch):
    """(1, 2): loss and norm of the gradient after the update, in no more memory than a step takes;
    gradients and buffers stay as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
    with run.autocast:
        loss, _ = run.model(batch)
    gradients = torch.autograd.grad(loss, run.trained, allow_unused=True)
    for buffer, before in buffers:
        buffer.copy_(before)
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return mean_of_all(torch.stack([loss.detach().float(), norm.float()]))[None]

def held_out(run):
    """Means of model.report over 8 batches of unseen scenes, or of other draws from the videos."""
    inputs = run.parts["config"].inputs
    n = inputs.get("held_out", min(run.opt.batch_size, 32))
    numbers = [range(i * n, (i + 1) * n) for i in range(8)]
    table = {}
    run.model.eval()
    for batch in data.make_loader(
            run.opt.data, inputs, numbers, run.device, run.opt.seed, split="eval", colours=False,
            scenes=run.parts["scenes"], videos=run.parts["videos"]):
        with run.autocast:
            report = run.model.report(batch)
        for row, columns in report.items():
            cells = table.setdefault(row, dict.fromkeys(columns, 0.0))
            for column, value in columns.items():
                cells[column] += value.item() / 8
    run.model.train()
    for row, cells in table.items():
        print0(f"{row:30}" + "".join(f"{x:11.4g} {name}" for name, x in cells.items()))
    return table

def log_line(opt, window, step, clock, good):
    """What the log tells of the steps up to this one: means of their meters. Prints it."""
    names = [name for name in window[-1] if name in window[0]]
    values = torch.stack([torch.stack([meters[name] for name in names]) for meters in window])
    check_finite(opt, values, step + 1 - len(window), good)
    means = mean_of_all(values.mean(0)).tolist()
    seconds = (time.perf_counter() - clock) / len(window)
    lr, decay = schedule(opt, step)
    line = dict(step=step + 1, loss=means[0], lr=lr, ms=1000 * seconds,
                eta_min=(opt.steps - step - 1) * seconds / 60)
    line.update(zip(names, means), samples_per_s=opt.batch_size / seconds, weight_decay=decay)
    text = "".join(f"{name} {value:.4g} | " for name, value in line.items())
    print0(text[:103].rpartition(" | ")[0])                     # at most 100 columns
    return line

def train(run, samples, start, ckpt):
    """From step `start` to the last one, or to a signal: then its exit status."""
    opt = run.opt
    out = Path(opt.out)
    good = f"{ckpt['path']} (step {start})" if ckpt else "none yet"
    lines = ckpt["log"] if ckpt else []             # of log.jsonl
    config = {part: asdict(values) for part, values in run.parts.items()}
    config.update(model=opt.model, preset=opt.preset)
    if RANK == 0:
        prepare_folder(out, bool(ckpt) and ckpt["path"].resolve() == (out / "ckpt.pt").resolve())
        write_log(out, lines, "w")
        with one_line(out / "config.json", warn=True):
            (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    caught = []                         # signals

    def on_signal(number, frame):
        """The step ends, then the run; a second signal ends it at once."""
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        if RANK == 0:
            os.write(2, b"\nfinishing the step, then saving; again to leave now\n")

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    window = []                         # meters since the last line of the log, on the device
    clock = time.perf_counter()
    for step in range(start, opt.steps):
        meters, batch = train_step(run, samples, step)
        window.append(meters)
        halt = bool(caught)
        if WORLD > 1:                   # all leave together; asked for every tenth step
            halt = step % 10 == 0 and mean_of_all(torch.tensor(halt * 1.0, device=run.device)) > 0
        save = halt or step + 1 == opt.steps or (step + 1) % opt.save_every == 0
        if not (save or step == start or (step + 1) % opt.log_every == 0):
            continue
        line = log_line(opt, window, step, clock, good)         # nothing above waits for the device
        lines.append(line)
        if save:
            check_finite(opt, try_weights(run, batch), step + 1, good)
            good = f"{out / 'ckpt.pt'} (step {step + 1})"
        if save and RANK == 0:
            save_checkpoint(out / "ckpt.pt", dict(
                model=run.model.state_dict(), optimizer=run.optimizer.state_dict(), step=step + 1,
                config=config, log=lines))
            with one_line(out / "curves.png", warn=True):
                draw_curves(lines, out / "curves.png")
        if step + 1 == opt.steps and not halt:
            line["held_out"] = held_out(run)
        if RANK == 0:
            write_log(out, [line], "a")
        window = []
        clock = time.perf_counter()
        if halt:
            break
    print0(f"written: {out}/ckpt.pt at step {step + 1}, log.jsonl, curves.png")
    if halt:
        print0(f"stopped. Go on with: python train.py --resume {out}")
        return 128 + (caught or [signal.SIGTERM])[0]

# ---- the time of a step --------------------------------------------------------------------------
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

def bench(run, samples, start):
    """Times 20 steps on one batch, after three that warm up: without loading."""
    batch = next(samples)
    times = []
    for step in range(start, start + 23):
        clock = time.perf_counter()
        train_step(run, itertools.repeat(batch), step)
        if run.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - clock)
    seconds = sorted(times[3:])[10]
    cuda = run.device.type == "cuda"
    hardware = torch.cuda.get_device_name(run.device) if cuda else run.device.type
    peak = next((peak for name, peak in PEAK_BF16.items() if name in hardware), math.nan)
    flops = count_flops(type(run.model), run.parts["config"], batch)
    speed = flops * run.accum * run.micro / seconds     # of each process
    print0(f"bench on {hardware}: {1000 * seconds:.1f} ms a step, median of 20; "
           f"{run.opt.batch_size / seconds:.2f} samples/s, {flops / 1e9:.1f} GFLOP a sample, "
           f"{speed / 1e12:.2f} TFLOP/s a process, MFU {100 * speed / peak:.1f} % of bf16 peak, "
           f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GB of GPU memory")

# ---- all of it -----------------------------------------------------------------------------------
def main(argv):
    parts, module, ckpt = parse(argv)
    opt = parts["options"]
    start = ckpt["step"] if ckpt else 0
    if start >= opt.steps:
        raise UserError(f"{ckpt['path']} is at step {start} already: give more --steps than that")
    before = ckpt["config"]["options"]["steps"] if ckpt else opt.steps
    if before != opt.steps:
        old, new = (schedule(replace(opt, steps=n), start)[0] for n in (before, opt.steps))
        print0(f"--steps {before} -> {opt.steps} stretches the cosine: the learning rate goes from "
               f"{old:.3g} to {new:.3g}")
    device = choose_device(opt.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = build(parts, module, ckpt, device)
    # sample numbers are never random. Opened before the folder is touched: a path may be wrong
    firsts = range(start * opt.batch_size + RANK * run.micro, opt.steps * opt.batch_size,
                   WORLD * run.micro)
    samples = iter(data.make_loader(
        opt.data, parts["config"].inputs, (range(i, i + run.micro) for i in firsts), device,
        opt.seed, opt.workers, scenes=parts["scenes"], videos=parts["videos"],
        motion_colours=opt.motion_colours,
        one_frame=int(opt.shift_warmup * opt.steps) * opt.batch_size))
    size = sum(p.numel() for p in run.trained)
    print0(f"{opt.model} {opt.preset} on {opt.data}: {size / 1e6:.2f} M trained parameters, "
           f"{WORLD} x {device.type}, {opt.dtype}, compile {opt.compile}, "
           f"batch {run.accum} x {WORLD} x {run.micro}")
    status = bench(run, samples, start) if opt.bench else train(run, samples, start, ckpt)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    return status

def cli(argv):
    """main(), but what the user can mend is one line on stderr, exit status 1, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # a path that can't be printed
    try:
        sys.exit(main(argv))
    except KeyboardInterrupt:                               # before train() catches the signals
        sys.exit(130)
    except torch.OutOfMemoryError:
        text = "out of memory: give a --micro-batch below --batch-size / processes"
    except (UserError, argparse.ArgumentError, AssertionError, ValueError, OSError) as error:
        text = str(error).strip().split("\n")[-1]           # of a data process: the last line
        text = re.sub(r"^[A-Za-z]+Error: ", "", text)
    sys.exit(f"train.py: error: {text}")

if __name__ == "__main__":
    cli(sys.argv[1:])
