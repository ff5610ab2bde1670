"""
The tests: parity with the authors' models, exact data, a training loop that resumes, spreads and stops well.
Run them with `python -m pytest -q test_models.py`; no downloads, no GPU, under four minutes on two cores.
"""
import argparse
import ast
import colorsys
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from copy import deepcopy
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")      # before torch loads: small models, several processes

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluate
import melomotion
import midway
import moog
import train
from data import MultiCrop, Scenes, Videos, read_frames
from melomotion import FlowBaseline, MeloMotion, encode_latent, place, position_loss
from midway import Config, DINOLoss, GatedBlock, Midway, load_official

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "reference" / "midway.npz")


def close(a, b, tolerance):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance, f"off by {(a - b).abs().max():.2g}"


# ---- Midway: parity with the authors' model ------------------------------------------------------
def formula_input(name, *shape):
    return torch.from_numpy(
        np.random.RandomState(zlib.crc32(f"input/{name}".encode())).standard_normal(shape)).float()


def formula_weight(section, key, shape):
    """The weights of the fixtures are a pure function of their names: made here, not stored."""
    z = np.random.RandomState(zlib.crc32(f"{section}/{key}".encode())).standard_normal(shape)
    if key == "center":
        z = 0.05 * z
    elif key.endswith(".bias"):
        z = 0.1 * z
    elif key.endswith(("cls_token", "pos_embed", "motion_tokens")):
        z = 0.2 * z
    elif key.endswith("weight_g") or len(shape) == 1:
        z = 1 + 0.1 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:])) * (3 if "gating_mlps" in key and "fc2" in key else 1)
    return torch.from_numpy(z).float()


def as_image(x):
    """Undo Midway's normalisation: the fixtures' inputs are what the authors' networks see."""
    mean = torch.tensor(midway.MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(midway.STD, dtype=torch.float64).view(3, 1, 1)
    return x.double() * std + mean


@pytest.fixture(scope="module")
def official_names():
    return json.loads(REFERENCE["names"].tobytes())         # section -> {key: shape}


@pytest.fixture(scope="module")
def official_file(official_names, tmp_path_factory):
    ckpt = {section: {key: formula_weight(section, key, shape) for key, shape in keys.items()}
            for section, keys in official_names.items()}
    ckpt |= dict(optimizer=dict(state={}, param_groups=[1]), args=argparse.Namespace(arch="vit_small"))
    path = tmp_path_factory.mktemp("official") / "tiny.pth"
    torch.save(ckpt, path)
    return path


@pytest.fixture(scope="module")
def official(official_file):
    return load_official(official_file).double()


@pytest.fixture(scope="module")
def frames():
    return [as_image(formula_input(name, 2, 3, 32, 32)) for name in ("tiny_x", "tiny_y")]


def level_losses(model, frames):
    with torch.no_grad():
        return [level.loss.item() for level in model.both_directions(torch.stack(frames, 1))[0]]


@torch.no_grad()
def test_features_equal_the_authors(official, frames):
    images = torch.cat([frames[0][:1], frames[1][1:]])
    for who in ("student", "teacher"):
        levels = official.features(images, teacher=who == "teacher")
        for level, expected in zip(levels, REFERENCE[f"{who}_features"], strict=True):
            close(level, expected, 1e-9)
    cls = official.features(torch.cat(frames))[-1][:, 0]
    close(official.student_head(cls), REFERENCE["student_dino_out"], 1e-9)


@torch.no_grad()
def test_dynamics_equal_the_authors(official, frames):
    x, y = frames                   # row 0 of the reference is x -> y of pair 0, row 1 is y -> x of pair 1
    predictions = official.predict(torch.stack([x[0], y[1]]), torch.stack([y[0], x[1]]))
    for i, level in enumerate(predictions):
        for name in ("m", "v", "pred"):
            close(getattr(level, name), REFERENCE[f"{name}_{i}"], 1e-9)
        close(torch.stack(level.gates)[:, :, [0, 5, 11]], REFERENCE[f"gates_{i}"], 1e-9)
    close(level_losses(official, frames), REFERENCE["losses"], 1e-9)


def test_dino_loss_gradient_and_center_equal_the_authors():
    loss = DINOLoss(64).double()
    assert loss.mask.nonzero().tolist() == sorted(REFERENCE["dino_pairs"].tolist())
    loss.center.copy_(0.1 * formula_input("dino_center", 1, 64))
    student = formula_input("dino_student", 60, 64).double().requires_grad_()
    value, _ = loss(student, formula_input("dino_teacher", 12, 64).double())
    value.backward()
    loss.update_center()
    assert abs(value.item() - REFERENCE["dino_loss"]) < 2e-6
    close(student.grad, REFERENCE["dino_grad"], 1e-6)
    close(loss.center, REFERENCE["dino_center"], 1e-6)


@pytest.fixture(scope="module")
def official_step(official_file):
    """The authors' first training step in float64: the model with its gradients, the logs, the loss."""
    model = load_official(official_file).double().train()
    for block in model.student.blocks:
        block.drop_path = 0.0
    crops = [as_image(formula_input(f"step_g{i}", 2, 3, 32, 32)) for i in range(6)]
    small = [as_image(formula_input(f"step_l{i}", 2, 3, 16, 16)) for i in range(16)]
    # the authors sum the levels where we average: DINO at a third, and all of it three times, is theirs
    model.cfg.dino_weight = 1 / 3
    loss, logs = model(dict(
        motion=torch.stack(crops[:2], 1),
        globals=torch.stack(crops[2:], 1).unflatten(1, (2, 2)),         # [frame, box]
        locals=torch.stack(small, 1).unflatten(1, (2, 8))))
    (3 * loss).backward()
    return model, logs, 3 * loss.detach()


def test_a_training_step_equals_the_authors(official_step):
    model, logs, total = official_step
    close(logs["dino"], REFERENCE["step_dino"], 1e-6)
    close([logs[f"loss_{level}"] for level in (3, 6, 9)], REFERENCE["step_levels"], 1e-9)
    close(total, REFERENCE["step_dino"] + REFERENCE["step_levels"].sum(), 1e-6)
    model.after_step(0.0)
    close(model.dino_loss.center, REFERENCE["step_center"], 1e-9)


def test_gradients_equal_the_authors(official_step, official_names):
    """The norms of the gradients of their 542 trained tensors, of which some are two of ours."""
    expected = np.load(HERE / "reference" / "midway_gradients.npz")["norms"]
    # each element says which tensor it is of; so the converted tensors know whence their parts came
    tags, n = dict(student={}, teacher={}, motion_loss={}), 0
    for section, tensors in tags.items():
        for key, shape in official_names[section].items():
            trained = "teacher" not in section + key
            tensors[key] = torch.full(shape, n if trained else -1)
            n += trained
    origin, squares = midway.convert(tags), torch.zeros(n, dtype=torch.float64)
    for name, p in official_step[0].named_parameters():
        if p.requires_grad:
            squares.index_add_(0, origin[name].flatten(), p.grad.flatten().square())
    norms = squares.sqrt().numpy()
    assert n == 542 and (np.abs(norms - expected) / np.maximum(expected, 1e-4)).max() < 5e-6


def gate_from_own_input(model):
    def forward(self, h, gate, K):      # what Eq. 2 literally says; `gate` carries the gate's network
        residual = h if gate is None else torch.cat([h[:, :K], h[:, K:] * gate(h[:, K:])], 1)
        y = self.norm1(h)
        h = residual + self.attn(y, y)
        return h + self.mlp(self.norm2(h)), self.next_gate
    return dict(target=GatedBlock, name="forward", value=forward)


def residual_at_the_top(model):
    infer = Midway.infer
    def wrong(self, i, m, source, target):
        return infer(self, i, m, source, target) + (self.motion_tokens if m is None else 0)
    return dict(target=Midway, name="infer", value=wrong)


def swapped_positions(model):
    right = Midway.positions
    return dict(target=Midway, name="positions", value=lambda self, L: right(self, L)[::-1])


def without_cls(model):
    dynamics = Midway.dynamics
    halves = [half[:, 1:] for half in model.motion_pos.chunk(2, 1)]
    def wrong(self, z, zt):
        self.positions = lambda L: halves
        try:
            return dynamics(self, [t[:, 1:] for t in z], [t[:, 1:] for t in zt])
        finally:
            del self.positions
    return dict(target=Midway, name="dynamics", value=wrong)


def one_shared_embed(model):
    return dict(target=model, name="teacher_embed", value=model.student_embed)


@pytest.mark.parametrize("variant", [
    gate_from_own_input, residual_at_the_top, swapped_positions, without_cls, one_shared_embed])
def test_parity_would_catch(variant, official, frames, monkeypatch):
    monkeypatch.setattr(**variant(official))
    worst = np.abs(np.array(level_losses(official, frames)) - REFERENCE["losses"]).max()
    assert worst > 1e-4, f"{variant.__name__} would go unnoticed"


@pytest.fixture
def official_ckpt(official_file):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(official_file, weights_only=True)


def test_official_file_may_lack_head_and_center(official_ckpt, tmp_path, capsys):
    ckpt = official_ckpt
    for section in ("student", "teacher"):
        ckpt[section] = {key: x for key, x in ckpt[section].items() if "dino_head" not in key}
    del ckpt["dino_loss"]
    torch.save(ckpt, tmp_path / "bare.pth")
    model = load_official(tmp_path / "bare.pth")
    assert "no DINO head, no center in" in capsys.readouterr().out
    close(model.student.cls_token, ckpt["student"]["module.backbone.cls_token"], 0)


class Foreign:
    """An object that leaves a trace if whoever reads the file executes what it names."""
    def __reduce__(self):
        return os.system, ("touch executed",)


def write_torchscript(path):
    torch.jit.save(torch.jit.script(torch.nn.Identity()), path)


def write_tar(path):
    with tarfile.open(path, "w") as tar:        # the form of the first versions of torch
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Foreign())
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.mark.filterwarnings("ignore")           # torch on its own TorchScript
@pytest.mark.parametrize("content, exception, word", [
    (pickle.dumps(Foreign()), ValueError, "Unpickling"),
    (dict(student={}, args=Foreign()), ValueError, "Unpickling"),
    (write_torchscript, ValueError, "no checkpoint"), (write_tar, ValueError, "no checkpoint"),
    (b"", ValueError, "no checkpoint"), (b"PK no checkpoint at all", ValueError, "no checkpoint"),
    ([1, 2], ValueError, "authors"), (dict(model={}, step=3), ValueError, "student"),
    ("hole", ValueError, "motion_proj.weight"), ("cut", ValueError, "damaged"),
    (None, FileNotFoundError, "bad.pth")])
def test_official_loader_refuses(content, exception, word, official_ckpt, official_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content == "cut":
        content = official_file.read_bytes()[:100_000]
    if content == "hole":
        del official_ckpt["motion_loss"]["module.motion_proj.weight"]
        content = official_ckpt
    if callable(content):
        content("bad.pth")
    elif isinstance(content, bytes):
        Path("bad.pth").write_bytes(content)
    elif content:
        torch.save(content, "bad.pth")
    with pytest.raises(exception, match=word) as error:
        load_official("bad.pth")
    assert "bad.pth" in str(error.value) and "\n" not in str(error.value)
    assert not Path("executed").exists() and len(os.listdir()) <= 1


# ---- Midway: sizes, ablations, invariants --------------------------------------------------------
def random_batch(cfg, B, device="cpu"):
    return dict(
        motion=torch.rand(B, 2, 3, cfg.size, cfg.size, device=device),
        globals=torch.rand(B, 2, 2, 3, cfg.size, cfg.size, device=device),
        locals=torch.rand(B, 2, cfg.local_crops, 3, cfg.local_size, cfg.local_size, device=device))


SMALL = Config(
    size=16, patch=8, dim=24, depth=4, heads=2, levels=(1, 2, 3, 4), motion_dim=12, motion_depth=1,
    motion_heads=2, forward_depth=2, forward_heads=2, head_hidden=16, head_bottleneck=8, prototypes=32,
    local_size=8, local_crops=2, drop_path=0.0)


def test_sizes_and_cost_are_the_papers(monkeypatch):
    with torch.device("meta"):
        model = Midway(Config())
        vit_b = Midway(Config(**midway.PRESETS["vit_b"])).student
    assert sum(p.numel() for p in vit_b.parameters()) == 85_798_656
    def trained(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)
    encoder, head = trained(model.student), trained(model.student_head)
    assert (encoder, head, trained(model) - encoder - head) == (21_665_664, 22_352_128, 36_600_000)

    def giga():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(random_batch(model.cfg, 1, "meta"))
        return counter.get_total_flops() / 2e9
    assert 85.7 < giga() < 86.0     # here: last blocks don't compute what nobody reads
    plain = midway.Block.forward
    monkeypatch.setattr(midway.Block, "forward", lambda self, x, first=None: plain(self, x)[:, :first])
    assert 90.3 < giga() < 91.0     # paper, Table 9: 90.8 G multiply-adds


ROWS = [dict(latent_dynamics=False),                               # Table 3, rows 1 to 9
        dict(backward=False, multi_level=False, refinement=False, gating=False),
        dict(multi_level=False, refinement=False, gating=False), dict(refinement=False, gating=False),
        dict(gating=False), dict(), dict(backward=False), dict(multi_level=False), dict(refinement=False),
        dict(motion_dim=6), dict(motion_dim=24), dict(motion_depth=2), dict(forward_depth=1),
        dict(dino_weight=0.0), dict(local_crops=0)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(f"{k}={v}" for k, v in row.items()) or "full")
def test_every_ablation_trains_all_its_parameters(row):
    model = Midway(replace(SMALL, **row))
    loss, logs = model(random_batch(model.cfg, 3))
    loss.backward()
    assert loss.isfinite() and not any(value.requires_grad for value in logs.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)   # or DDP waits for ever
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("teacher"))
    assert logs["feature_std" if model.cfg.latent_dynamics else "cls_std"] > 0


def small_levels(**change):
    """Model in float64 with a change of SMALL, levels of sources and targets, what the dynamics say."""
    torch.manual_seed(0)
    model = Midway(replace(SMALL, **change)).double().eval()
    x, y = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64)
    return model, model.features(x), model.features(y, teacher=True), model.predict(x, y)


@torch.no_grad()
def test_the_saved_work_changes_nothing():
    model, z, zt, _ = small_levels()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    close(model.student(images, [4], first=1)[0], model.student(images, [4])[0][:, :1], 1e-12)
    whole = model.midway_path(2, None, z[3], zt[3])
    close(model.midway_path(2, None, z[3], zt[3], first=10), whole[:, :10], 1e-12)


@torch.no_grad()
def test_ablations_do_what_they_name():
    model, z, zt, levels = small_levels(backward=False, refinement=False)
    above = model.infer(2, None, z[3], zt[3])
    close(levels[2].m, above, 1e-12)
    close(levels[1].m, model.infer(1, above, z[1], zt[2]), 1e-12)       # the level's own features
    for i in range(3):
        close(levels[i].v, z[i], 0)                                     # raw features
        close(levels[i].target, zt[i], 0)
    model, z, zt, levels = small_levels(backward=False)
    close(levels[1].m, model.infer(1, above, levels[2].pred, zt[2]), 1e-12)     # the prediction above
    model, z, zt, levels = small_levels(multi_level=False)
    assert len(levels) == 1
    close(levels[0].target, zt[2], 0)                                   # the highest but one stays
    assert all(level.gates == [] for level in small_levels(gating=False)[-1])


def test_motion_tokens_differ_and_zero_ones_never_would():
    torch.manual_seed(0)
    for start, differs in ((1, True), (0, False)):
        model = Midway(SMALL)
        model.motion_tokens.data *= start
        model(random_batch(SMALL, 3))[0].backward()
        gradient = model.motion_tokens.grad
        assert (gradient.std(1).max() > 1e-3 * gradient.abs().max()) == differs


@pytest.mark.parametrize("progress, part", [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (1.0, 0.0)])
def test_after_step_moves_teacher_and_center(progress, part):
    torch.manual_seed(0)
    model = Midway(SMALL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad)         # the student moves by 1
    model(random_batch(SMALL, 3))
    model.after_step(progress)
    moved = [(p - before[name]).mean().item() for name, p in model.named_parameters() if "teacher" in name]
    assert len(moved) > 100                 # the cosine: 1 - ema at the start, 0 at the end
    assert all(abs(m - part * (1 - SMALL.ema)) < 1e-6 for m in moved)
    assert model.dino_loss.center.abs().max() > 0 and model.dino_loss.seen.abs().max() == 0


def test_the_last_layer_waits_for_a_sixtieth_of_the_run():
    model = Midway(SMALL)
    model(random_batch(SMALL, 3))[0].backward()
    model.before_step(1 / 60)
    assert model.student_head.weight_v.grad.abs().max() > 0
    model.before_step(1 / 60 - 1e-9)
    assert model.student_head.weight_v.grad is None and model.student_head.weight_g.grad is None


def test_report_exchanges_latents_within_a_direction():
    torch.manual_seed(0)
    model, motion = Midway(SMALL).eval(), torch.rand(3, 2, 3, 16, 16)
    table = model.report(dict(motion=motion))
    levels, _ = model.both_directions(motion)
    order = [2, 0, 1, 5, 3, 4]              # rows x -> y of 3 pairs, then y -> x
    pred, _ = model.predict_forward(0, levels[0].m[order], levels[0].v)
    close(table["2-2cos, level 1"]["shuffled"], midway.prediction_loss(pred, levels[0].target).detach(), 1e-6)
    with torch.no_grad():
        xt, yt = (model.features(motion[:, f], teacher=True)[0] for f in range(2))
    close(table["2-2cos, level 1"]["copy"], midway.prediction_loss(xt, yt), 1e-6)
    assert "shuffled" not in model.report(dict(motion=motion[:1]))["2-2cos, mean"]


@pytest.mark.parametrize("change, word", [
    (dict(size=20), "size=20 must be a multiple of patch=8: try 16"), (dict(heads=5), "heads=5"),
    (dict(levels=(1, 2, 3)), "depth=4"), (dict(drop_path=1.0), "drop_path"), (dict(ema=2.0), "ema"),
    (dict(latent_dynamics=False, dino_weight=0.0), "nothing to train")])
def test_wrong_configs_say_what_to_change(change, word):
    with pytest.raises(AssertionError, match=re.escape(word)):
        Midway(replace(SMALL, **change))


def test_wrong_shapes_say_what_to_change():
    model, batch = Midway(SMALL), random_batch(SMALL, 3)
    with pytest.raises(AssertionError, match="2 boxes"):
        model(batch | dict(globals=batch["globals"].flatten(1, 2)))
    with pytest.raises(ValueError, match="multiple of the patch size 8"):
        model.features(torch.rand(1, 3, 20, 16))
    with pytest.raises(ValueError, match="resize the frames to 16x16"):
        model.predict(*torch.rand(2, 1, 3, 24, 24))


def test_features_take_other_sizes_and_uint8():
    model = Midway(SMALL)
    assert [tuple(z.shape) for z in model.features(torch.rand(2, 3, 24, 40))] == 4 * [(2, 1 + 3 * 5, 24)]
    image = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    close(model.features(image)[-1].detach(), model.features(image / 255)[-1].detach(), 1e-6)


# ---- MooG: parity with the authors' model --------------------------------------------------------
MOOG = np.load(HERE / "reference" / "moog.npz")
MOOG_SHAPES = json.loads(MOOG["shapes"].tobytes())
MOOG_SEEDS = dict(released=1234, movi=777, point_head=61, box_head=62, point_readout=55, depth_readout=56)


def moog_ref(kind, name):
    return torch.from_numpy(np.atleast_1d(MOOG[f"{kind}/{name}"]))


def channels_first(video):
    return video.movedim(-1, -3)


def channels_last(frames):
    return frames.movedim(-3, -1)


def moog_arrays(kind):
    """The fixtures' weights, by the formula that they were made with, under the authors' names."""
    random = np.random.RandomState(MOOG_SEEDS[kind])
    arrays = {}
    for name, shape in sorted(MOOG_SHAPES[kind].items()):
        n = random.standard_normal(shape)
        fan_in = shape[0] if re.search("query/|key/|value/|embedding/", name) else np.prod(shape[:-1])
        kinds = dict(scale=1 + 0.1 * n, bias=0.1 * n, embeddings=0.2 * n, kernel=n / np.sqrt(fan_in))
        arrays[name] = kinds.get(name.split("/")[-1], kinds["kernel"]).astype(np.float32)
    return arrays


def moog_weights(kind):
    return moog.convert({name: torch.from_numpy(x) for name, x in moog_arrays(kind).items()})


@pytest.fixture(scope="module")
def moog_files(tmp_path_factory):
    """The authors' files, released.npz with a prefix; cross.npz has none, and a decoder without self_att."""
    folder = tmp_path_factory.mktemp("moog")
    for kind in ("movi", "point_head", "box_head"):
        np.savez(folder / f"{kind}.npz", **moog_arrays(kind))
    arrays = moog_arrays("released")
    prefixed = {f"pretrained_model/{name}": x for name, x in arrays.items()}
    np.savez(folder / "released.npz", step=np.int64(3), **prefixed)
    cross = {name: x for name, x in arrays.items() if not re.search("decoder/.*self_att", name)}
    np.savez(folder / "cross.npz", **cross)
    return folder


@pytest.fixture(scope="module")
def moog_models(moog_files):
    return {name: moog.load_official(moog_files / f"{name}.npz") for name in ("released", "cross", "movi")}


def released_outputs(model):
    video = channels_first(moog_ref("released", "video"))
    state = moog_ref("released", "state0")
    states = model.unroll(video, state)
    before = model.predict_ahead(video, state)[:, :-1]
    frames, attention = model.decode(before, video.shape[-2:], return_attention=True)
    return dict(
        encoder_output=model.encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2]),
        states_after_sa=states.predicted, states_after_ca=states.corrected, decoder_input_states=before,
        recon=channels_last(frames), dec_cross_attn_last=attention[:, 3:])


@torch.no_grad()
def test_moog_released_equals_the_authors(moog_models):
    for name, output in released_outputs(moog_models["released"]).items():
        close(output, moog_ref("released", name), 2e-5)
    out = released_outputs(moog_models["cross"])
    for name in ("recon", "dec_cross_attn_last"):
        close(out[name], moog_ref("released", f"{name}_xonly"), 2e-5)


@torch.no_grad()
def test_moog_of_the_paper_equals_the_authors(moog_models):
    model = moog_models["movi"]
    video = channels_first(moog_ref("movi", "video"))
    states = model.unroll(video, model.state_norm(moog_ref("movi", "state0")))
    predicted = states.predicted[:1]
    encoded = model.encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2])
    frames, attention = model.decode(predicted, (16, 16), return_attention=True)
    middle = model.decode(predicted, (16, 16), moog.subsample((16, 16), 4))
    for name, output in dict(
            encoder_output=encoded[:1], states_predicted=predicted, states_corrected=states.corrected[:1],
            video_predicted=channels_last(frames), dec_cross_attn_last=attention[:, 3:],
            eval4_video_predicted=middle.unflatten(2, (4, 4))).items():
        close(output, moog_ref("movi", name), 2e-5)
    for factor in (2, 8):
        index = moog.subsample((16, 16), factor, moog_ref("movi", f"train{factor}_offsets").long())
        target = moog_ref("movi", f"train{factor}_targets").flatten(2, 3)
        close(moog.gather_pixels(video[:1], index), target, 0)
        colours = moog_ref("movi", f"train{factor}_video_predicted").flatten(2, 3)
        close(model.decode(predicted, (16, 16), index), colours, 2e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_moog_loss_and_gradients_equal_the_authors(moog_files, monkeypatch, recompute):
    model = moog.load_official(moog_files / "movi.npz").train()
    model.cfg = replace(model.cfg, subsample=1, checkpoint=recompute)
    state = moog_ref("movi", "state0")
    monkeypatch.setattr(model, "initial_state", lambda B, tokens: model.state_norm(state))
    loss, _ = model(dict(video=channels_first(moog_ref("movi", "video"))))
    loss.backward()
    close(loss.detach(), MOOG["movi/loss"], 1e-6)
    # in the authors' layout, to compare the same few entries of each tensor
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for i, (name, shape) in enumerate(sorted(MOOG_SHAPES["movi"].items())):
        number = torch.arange(np.prod(shape), dtype=torch.float64).view(shape)
        [(key, order)] = moog.convert({name: number}).items()
        theirs = torch.empty(number.numel())
        theirs[order.flatten().long()] = gradients[key].flatten()
        norm = MOOG["movi/grad_norm"][i]
        assert abs(theirs.double().norm() - norm) <= 1e-4 * norm, name
        entries = np.resize(theirs[np.linspace(0, len(theirs) - 1, 8).astype(int)], 8)
        assert np.abs(entries - MOOG["movi/grad_some"][i]).max() <= 1e-4 * norm, name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["point_head", "box_head"])
def test_moog_heads_equal_the_authors(moog_files, kind):
    head = moog.load_official_head(moog_files / f"{kind}.npz")
    out = head(moog_ref(kind, "features"), moog_ref(kind, "queries"))
    close(out.values, moog_ref(kind, "values"), 2e-5)
    if kind == "point_head":
        close(out.logits[..., :1], moog_ref(kind, "logits_visible"), 2e-5)
        close(out.logits[..., 1:], moog_ref(kind, "logits_certainty"), 2e-5)
        assert (out.visible == moog_ref(kind, "visible")[..., 0]).all()


@torch.no_grad()
def test_moog_point_readout_equals_the_authors():
    points = moog.PointReadout(32, 32, (3, 8, 32), 64)
    points.load_state_dict(moog_weights("point_readout"))
    features, queries, when, visible = (
        moog_ref("point_readout", name) for name in ("features", "queries", "query_frame", "visible"))
    out = points(features, queries, when)
    free = points(features, queries)
    assert (out.visible == visible[..., 0]).all()
    for name in ("values", "logits", "state"):
        close(getattr(out, name), moog_ref("point_readout", name), 2e-5)
        close(getattr(free, name), moog_ref("point_readout", f"nomask_{name}"), 2e-5)


@torch.no_grad()
def test_moog_depth_readout_equals_the_authors():
    depth = moog.DepthReadout(32, (3, 8, 32), 64)
    depth.load_state_dict(moog_weights("depth_readout"))
    features = moog_ref("depth_readout", "features").flatten(0, 1)
    offsets = moog_ref("depth_readout", "train4_offsets").long()
    rolled = moog.subsample((16, 16), 4, offsets)
    middle = moog.subsample((16, 16), 4)
    for name, index in dict(values=None, eval4_values=middle, train4_values=rolled.flatten(0, 1)).items():
        theirs = moog_ref("depth_readout", name)
        close(depth(features, (16, 16), index).view_as(theirs), theirs, 2e-5)


def normed_keys(self, x, y=None, forward=moog.Block.forward):
    return forward(self, x, y if y is None else F.layer_norm(y, y.shape[-1:]))


def after_seeing(self, video, state):
    return self.recurrence(torch.cat([video, video[:, :1]], 1), state)[0]


NEAR_MISSES = {
    "exact gelu": (moog.F, "gelu", lambda x, approximate, gelu=F.gelu: gelu(x)),
    "torch's linspace": (moog, "axis_positions", lambda n, device=None: torch.linspace(-1, 1, n)),
    "padding before": (moog.F, "pad", lambda x, pad, old=F.pad: old(x, [pad[i ^ 1] for i in range(len(pad))])),
    "(x, y) order": (moog, "grid_positions",
                     lambda h, w, device=None, grid=moog.grid_positions: grid(h, w).flip(-1)),
    "normed keys and values": (moog.Block, "forward", normed_keys),
    "decoding the prediction": (moog.MooG, "predict_ahead", after_seeing),
}


@torch.no_grad()
@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_moog_parity_would_catch(miss, moog_models, monkeypatch):
    monkeypatch.setattr(*NEAR_MISSES[miss])
    out = released_outputs(moog_models["released"])
    assert max((x - moog_ref("released", name)).abs().max() for name, x in out.items()) > 1e-4


# ---- MooG: sizes, recurrence, training -----------------------------------------------------------
def tiny_moog(**options):
    torch.manual_seed(0)
    return moog.MooG(moog.Config(**dict(
        size=16, frames=3, tokens=6, dim=16, channels=(8, 8, 16), strides=(2, 1, 2),
        encoder_bases=4, decoder_bases=4, predictor=(1, 2, 8), corrector=(1, 2, 16), decoder=(2, 2, 8),
        mlp=24, subsample=4) | options))


MOOG_VARIANTS = [dict(), dict(released=True), dict(grid=True), dict(grid=True, recurrent=False)]


def test_moog_sizes_are_the_papers():
    paper = moog.Config(**moog.PRESETS["paper"])
    released = moog.Config(**moog.PRESETS["released"])
    with torch.device("meta"):
        sizes = [
            (moog.MooG(paper), 34_726_787),
            (moog.MooG(replace(paper, grid=True)), 34_726_787),
            (moog.MooG(replace(paper, grid=True, recurrent=False)), 34_726_787),
            (moog.MooG(released), 35_193_811),
            (moog.MooG(replace(released, decoder_self_attention=True)), 36_967_507),
            (moog.AttentionReadout(2), 11_338_760),
            (moog.AttentionReadout(4, heads=4, copies=1), 11_424_832),
            (moog.PointReadout(), 11_324_804),
            (moog.DepthReadout(), 10_434_817)]
    for module, size in sizes:
        assert sum(p.numel() for p in module.parameters()) == size


@torch.no_grad()
@pytest.mark.parametrize("options", MOOG_VARIANTS)
def test_moog_recurrence_is_the_formula(options):
    model = tiny_moog(**options).eval()
    video = torch.rand(2, 3, 3, 16, 16)
    norm = model.state_norm
    start = s = model.initial_state(2, 16)
    predicted, corrected = [], []
    for t in range(3):
        e = model.encoder(video[:, t])
        s = norm(s) if model.cfg.released else s
        p = s + model.predictor(s)
        if not model.cfg.grid:
            c = p + model.corrector(p, e)
        else:
            c = e + model.corrector(e, p if model.cfg.recurrent else e)
        s = c if model.cfg.released else norm(c)
        predicted.append(p)
        corrected.append(s)
    p, c = torch.stack(predicted, 1), torch.stack(corrected, 1)
    states = model.unroll(video, start)
    for ours, oracle in zip(states, (p, c, c if model.cfg.released else torch.cat([p, c], 2), s)):
        close(ours, oracle, 2e-6)
    known = torch.cat([start[:, None], c], 1) if model.cfg.released else torch.cat(
        [p, (s + model.predictor(s))[:, None]], 1)
    close(model.predict_ahead(video, start), known, 2e-6)


@torch.no_grad()
@pytest.mark.parametrize("options", MOOG_VARIANTS)
def test_moog_predicts_before_it_sees(options):
    model = tiny_moog(**options).eval()
    state = model.initial_state(1, 16)
    video = torch.rand(1, 4, 3, 16, 16)
    known = model.decode(model.predict_ahead(video, state), (16, 16))
    for t in range(4):
        other = video.clone()
        other[:, t] = 1 - other[:, t]
        differs = (model.decode(model.predict_ahead(other, state), (16, 16)) - known).abs().amax((0, 2, 3, 4))
        assert differs.shape == (5,) and not differs[:t + 1].any()
        assert differs[t + 1] > 1e-5
        remembers = model.cfg.recurrent
        assert (differs[t + 2:] > 0).all() if remembers else not differs[t + 2:].any()


@pytest.mark.parametrize("options", MOOG_VARIANTS)
def test_moog_loss_is_of_each_frame_at_the_pixels_drawn(options, monkeypatch):
    model = tiny_moog(**options, subsample=8)
    video = torch.rand(2, 3, 3, 16, 16)
    state = model.initial_state(2, 16).detach()
    decode, drawn = model.decode, []

    def spy(states, size, index):
        drawn.append(index)
        return decode(states, size, index)

    with monkeypatch.context() as patch:
        patch.setattr(model, "initial_state", lambda B, tokens: state)
        patch.setattr(model, "decode", spy)
        loss, logs = model(dict(video=video))
        model(dict(video=video))
    assert len({tuple(index.tolist()) for index in torch.cat(drawn).flatten(0, 1)}) > 8     # of 12
    frames = decode(model.predict_ahead(video, state)[:, :-1], (16, 16)).detach()
    error = moog.gather_pixels((frames - video).square(), drawn[0])             # (B, T, P, 3)
    close(loss.detach(), error.mean(), 1e-6)
    close(logs["psnr"], -10 * error[:, 1:].mean((2, 3)).log10().mean(), 1e-4)   # not of frame 0
    copied = moog.gather_pixels((video[:, 1:] - video[:, :-1]).square(), drawn[0][:, 1:])
    close(logs["copy_psnr"], -10 * copied.mean((2, 3)).log10().mean(), 1e-4)
    assert not any(value.requires_grad for value in logs.values())


def test_moog_random_pixels_cover_the_frame_evenly():
    torch.manual_seed(0)
    index = moog.subsample((8, 12), 4, torch.randint(4, (4000, 2)))
    counts = torch.bincount(index.flatten(), minlength=96)
    assert index.shape == (4000, 6) and (counts / 250 - 1).abs().max() < 0.25
    rows, columns = index // 12, index % 12
    assert (columns.view(4000, 2, 3).diff(dim=2) % 12 == 4).all()
    assert (rows.view(4000, 2, 3).diff(dim=1) % 8 == 4).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (9, 7)])
@pytest.mark.parametrize("released", [False, True])
def test_moog_chunks_are_one_long_unroll(released, size):
    model = tiny_moog(released=released).eval()
    video = torch.rand(2, 7, 3, *size)
    state = model.initial_state(2, 20)              # not as many tokens as in training
    whole = model.unroll(video, state)
    first = model.unroll(video[:, :3], state)
    rest = model.unroll(video[:, 3:], first.last)
    for name in ("predicted", "corrected", "features"):
        close(torch.cat([getattr(first, name), getattr(rest, name)], 1), getattr(whole, name), 4e-6)
    close(rest.last, whole.last, 4e-6)
    assert model.encoder(video[:, 0]).shape[1] == -(-size[0] // 4) * -(-size[1] // 4)     # h, w rounded up
    assert model.decode(whole.predicted, size).shape == video.shape


@torch.no_grad()
def test_moog_tokens_have_no_order_and_no_place():
    model = tiny_moog().eval()
    video = torch.rand(1, 3, 3, 16, 16)
    state, order = model.initial_state(1, 9), torch.randperm(9)
    a, b = model.unroll(video, state), model.unroll(video, state[:, order])
    close(a.corrected[:, :, order], b.corrected, 2e-6)
    close(model.decode(a.predicted, (16, 16)), model.decode(b.predicted, (16, 16)), 2e-6)
    assert model.unroll(video, tokens=5).predicted.shape == (1, 3, 5, 16)
    assert tiny_moog(grid=True).unroll(video).predicted.shape == (1, 3, 16, 16)     # one for each place


@torch.no_grad()
def test_moog_decodes_each_pixel_by_itself(monkeypatch):
    model = tiny_moog().eval()
    states = model.unroll(torch.rand(2, 3, 3, 16, 16)).predicted
    whole, attention = model.decode(states, (16, 16), return_attention=True)
    close(attention.sum(-1), torch.ones(2, 3, 2, 256), 1e-5)
    index = torch.randint(256, (2, 3, 5))
    close(model.decode(states, (16, 16), index), moog.gather_pixels(whole, index), 2e-6)
    monkeypatch.setattr(moog, "DECODE_CHUNK", 60)       # 10 pixels at once
    in_chunks = model.decode(states, (16, 16), return_attention=True)
    close(in_chunks[0], whole, 2e-6)
    close(in_chunks[1], attention, 2e-6)
    together = tiny_moog(decoder_self_attention=True).eval()     # pixels that see each other stay together
    few = together.decode(states, (16, 16))
    monkeypatch.undo()
    close(few, together.decode(states, (16, 16)), 0)


def test_moog_meters_on_hand_made_cases():
    close(moog.psnr(torch.full((1, 1, 4, 3), 0.6), torch.full((1, 1, 4, 3), 0.5)), 20.0, 1e-4)
    same = torch.ones(1, 3, 6, 16)
    index = moog.subsample((16, 16), 4).expand(1, 3, -1)
    assert tiny_moog().tokens_used(same, (16, 16), index) == 1 / 6      # tokens alike: always the first


def test_moog_starts_as_it_says():
    model = tiny_moog(dim=64, state_scale=0.5, released=True)
    state = model.initial_state(4, 50)
    assert state.shape == (4, 50, 64) and abs(state.std() - 0.5) < 0.02
    normed = moog.MooG(replace(model.cfg, released=False)).initial_state(4, 50)
    close(normed.std(-1, correction=0).detach(), torch.ones(4, 50), 1e-3)
    assert (normed[0] != normed[1]).any()                                       # other noise for each clip
    query = model.predictor.layers[0].self_attention.query.weight
    assert abs(query.std() * 64 ** 0.5 - 1) < 0.3                               # variance 1 / fan-in
    frames = model.decode(model.predict_ahead(torch.rand(1, 2, 3, 16, 16)), (16, 16))
    assert abs(frames.mean() - 0.5) < 0.1 and frames.std() < 0.2                # near grey
    [group] = model.param_groups(1e-4)                                          # all decay
    assert len(group["params"]) == len(list(model.parameters())) and group["weight_decay"] == 1e-4


@torch.no_grad()
def test_moog_report_is_of_frames_not_yet_seen():
    model = tiny_moog().eval()
    video = torch.rand(3, 4, 3, 16, 16)
    torch.manual_seed(5)
    table = model.report(dict(video=video))
    torch.manual_seed(5)
    frames = model.decode(model.predict_ahead(video[:, :-1]), (16, 16))

    def level(a, b):                                # of every fourth pixel
        error = (a - b)[..., 2::4, 2::4].square().mean((2, 3, 4))               # (B, T)
        return (-10 * error.log10()).mean()

    for row, first in (("PSNR in dB, t >= 1", 1), ("PSNR in dB, t = 3", 3)):
        close(table[row]["predicted"], level(frames[:, first:], video[:, first:]), 1e-4)
        close(table[row]["copy"], level(video[:, first - 1:-1], video[:, first:]), 1e-4)


def test_moog_takes_bytes_and_any_precision():
    video = torch.randint(256, (1, 3, 3, 16, 16), dtype=torch.uint8)
    model = tiny_moog().eval()
    state = model.initial_state(1, 6)
    with torch.no_grad():
        close(model.unroll(video, state).last, model.unroll(video / 255, state).last, 1e-6)
        double = model.double().unroll(video, state.double())
        assert double.last.dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            close(model.float().unroll(video, state).last, double.last, 0.2)


def test_moog_learns_one_clip():
    model = tiny_moog(tokens=16, dim=32, channels=(16, 16, 32), mlp=64, subsample=1)
    clip = Scenes(size=16, frames=3, sprites=1, speed=3, textures=4, seed=3).batch([0])["video"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss, _ = model(dict(video=clip))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * clip.var((0, 1, 3, 4), correction=0).mean()


def test_moog_readouts_start_where_they_are_asked_and_go_on():
    torch.manual_seed(0)
    features, queries = torch.randn(2, 5, 6, 16), torch.rand(2, 3, 4)
    when = torch.tensor([[0, 2, 3], [1, 0, 4]])
    readout = moog.BoxReadout(16, 8, (1, 2, 8), 16)
    whole = readout(features, queries, when)
    first = readout(features[:, :2], queries, when)
    rest = readout(features[:, 2:], queries, when - 2, first.state)
    close(torch.cat([first.values, rest.values], 1).detach(), whole.values.detach(), 1e-6)
    close(torch.cat([first.logits, rest.logits], 1).detach(), whole.logits.detach(), 1e-6)
    other = features.clone()
    other[:, 1] += 1                                # before the query of (0, 1) and (0, 2): must not matter
    close(readout(other, queries, when).values[0, 2:, 1].detach(), whole.values[0, 2:, 1].detach(), 0)
    assert (readout(other, queries, when).values[0, 1:, 0] - whole.values[0, 1:, 0]).abs().max() > 1e-5


def test_moog_readouts_train_the_model_end_to_end():
    model = tiny_moog()
    features = model.unroll(torch.rand(2, 3, 3, 16, 16)).features
    features.retain_grad()
    for kind, coordinates in ((moog.PointReadout, 2), (moog.BoxReadout, 4)):
        out = kind(16, 8, (1, 2, 8), 16)(features, torch.rand(2, 3, coordinates))
        [gradient] = torch.autograd.grad(out.values[:, -1].sum(), features, retain_graph=True)
        assert (gradient != 0).any(-1).all()        # of the last frame's answer, to all frames' tokens
    depth = moog.DepthReadout(16, (1, 2, 8), 16)
    depth(features.flatten(0, 1), (16, 16)).sum().backward()
    assert (features.grad != 0).any(-1).all()
    assert all(p.grad.any() for part in (model.encoder, model.predictor) for p in part.parameters())


def test_moog_point_loss_on_hand_made_cases():
    points = moog.PointReadout(8, 8, (1, 1, 8), 8)
    yes = torch.ones(1, 1, 1, dtype=torch.bool)
    target = torch.full((1, 1, 1, 2), 0.5)

    def loss(x, visible=yes, valid=None, target=target):        # x pixels off, sure of itself
        values = torch.full((1, 1, 1, 2), 0.5) + torch.tensor([x / 256, 0.0])
        sure = torch.full((1, 1, 1, 2), 20.0)
        return points.loss(moog.Readout(values, sure, None, None), target, visible, valid).detach()

    close(loss(0), 0, 1e-6)                                     # there, visible and certain
    close(loss(2), 0.05 * 2 ** 2 / 2, 1e-4)                     # quadratic below 4 pixels
    close(loss(8), 0.05 * 4 * (8 - 2) + 20, 1e-4)               # linear; certain but wrong
    close(loss(8, visible=~yes), 20, 1e-4)                      # hidden: only its visibility counts
    close(loss(8, visible=~yes, target=target * float("nan")), 20, 1e-4)
    close(loss(8, valid=~yes), 0, 0)


def test_moog_boxes_are_certain_above_half_overlap_and_depth_skips_what_is_invalid():
    boxes = moog.BoxReadout(8, 8, (1, 1, 8), 8)
    box = torch.tensor([[[[0.0, 0.0, 0.5, 0.5]]]])
    for values, near in [(box, True), (box * 0.72, True), (box * 0.69, False), (box + 0.5, False)]:
        assert boxes.error(values, box)[1].item() == near       # overlap 1, 0.52, 0.48, 0
    close(boxes.error(box + 2 / 256, box)[0], [[[0.05 * 2 ** 2 / 2]]], 1e-5)
    depth = moog.DepthReadout(8, (1, 1, 8), 8, bases=2)
    valid = torch.tensor([True, False])
    close(depth.loss(torch.tensor([1.0, 5.0]), torch.tensor([3.0, float("inf")]), valid), 2, 1e-6)


def test_moog_is_compiled_by_the_step():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, video = tiny_moog(), torch.rand(2, 3, 3, 16, 16)
    torch.manual_seed(1)
    eager, _ = model(dict(video=video))
    model.compile(backend="aot_eager", dynamic=False)
    torch.manual_seed(1)
    compiled, _ = model(dict(video=video))
    close(compiled.detach(), eager.detach(), 1e-6)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 4 <= graphs <= 8                         # not one for each frame
    model.report(dict(video=video))                 # with another number of pixels
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not any("_orig_mod" in key for key in model.state_dict())


class Touch:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture(scope="module")
def bad_moog_files(moog_files):
    folder = moog_files / "bad"
    folder.mkdir()
    arrays = moog_arrays("movi")
    whole = (moog_files / "movi.npz").read_bytes()
    (folder / "text.npz").write_text("hello")
    (folder / "short.npz").write_bytes(whole[:len(whole) // 2])
    np.savez(folder / "objects.npz", **arrays, x=np.array([Touch()], dtype=object))
    (folder / "pickle.npz").write_bytes(pickle.dumps(Touch()))
    np.savez(folder / "lacks.npz", **{name: x for name, x in arrays.items() if "recon" not in name})
    np.savez(folder / "shape.npz", **arrays | {"corrector/layer_0/MLP_in/bias": np.zeros(3, np.float32)})
    return moog_files


@pytest.mark.parametrize("call, argument, error, word", [
    (tiny_moog, dict(strides=(2,)), ValueError, "strides"),
    (tiny_moog, dict(decoder=(1, 3, 8)), ValueError, "multiple"),
    (tiny_moog, dict(size=18), ValueError, "size=18"),
    (tiny_moog, dict(grid=True, released=True), ValueError, "released"),
    (tiny_moog, dict(recurrent=False), ValueError, "grid=True"),
    (moog.subsample, dict(size=(16, 16), factor=3), ValueError, "16x16"),
    (moog.load_official, "none.npz", FileNotFoundError, "none"),
    (moog.load_official, "bad/text.npz", ValueError, "text"),
    (moog.load_official, "bad/short.npz", ValueError, "short"),
    (moog.load_official, "bad/objects.npz", ValueError, "allow_pickle"),
    (moog.load_official, "bad/pickle.npz", ValueError, "allow_pickle"),
    (moog.load_official, "bad/lacks.npz", ValueError, "recon"),
    (moog.load_official, "bad/shape.npz", ValueError, "mlp_in.bias"),
    (moog.load_official, "box_head.npz", ValueError, "backbone"),
    (moog.load_official_head, "movi.npz", ValueError, "head")])
def test_moog_refuses(call, argument, error, word, bad_moog_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                     # where a pickle would leave its trace
    with pytest.raises(error, match=word):
        call(**argument) if isinstance(argument, dict) else call(bad_moog_files / argument)
    assert not Path("executed").exists()


# ---- crops and colours ---------------------------------------------------------------------------
def colours(x, **changes):
    """photometric with neutral parameters but for the changes, the same for all crops."""
    params = dict(order=(0, 1, 2, 3), factors=data.NEUTRAL, gray=False, blur=0.0, solarize=False)
    params = {name: torch.tensor([v] * len(x)) for name, v in (params | changes).items()}
    return data.photometric(x, params)


def luma(x):
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


@pytest.mark.parametrize("changes, expected", [
    (dict(), lambda x: x),
    (dict(factors=(1.3, 1, 1, 0.0)), lambda x: (1.3 * x).clamp(0, 1)),
    (dict(factors=(1, 0.7, 1, 0.0)), lambda x: 0.7 * x + 0.3 * luma(x).mean((2, 3), keepdim=True)),
    (dict(factors=(1, 1, 0.8, 0.0)), lambda x: 0.8 * x + 0.2 * luma(x)),
    (dict(factors=(1, 1, 1, 1 / 3)), lambda x: x[:, [2, 0, 1]]),        # red becomes green, green blue, ...
    (dict(factors=(1, 1, 1, -1 / 3)), lambda x: x[:, [1, 2, 0]]),
    (dict(gray=True), lambda x: luma(x).expand_as(x)),
    (dict(solarize=True), lambda x: torch.minimum(x, 1 - x)),
    (dict(factors=(1.4, 1, 0.8, 0.0), order=(2, 0, 1, 3)),
     lambda x: (1.4 * (0.8 * x + 0.2 * luma(x))).clamp(0, 1)),
    (dict(factors=(1.4, 1, 0.8, 0.0), order=(0, 2, 1, 3)),
     lambda x: 0.8 * (1.4 * x).clamp(0, 1) + 0.2 * luma((1.4 * x).clamp(0, 1))),
    (dict(gray=True, solarize=True), lambda x: torch.minimum(luma(x), 1 - luma(x)).expand_as(x)),
])
def test_each_colour_operation_does_what_its_formula_says(changes, expected):
    x = torch.rand(4, 3, 8, 8)
    close(colours(x, **changes), expected(x), 3e-6)


def test_hue_is_that_of_hsv():
    x = torch.rand(1, 3, 6, 6)
    x[0, :, 0, 0] = 0.4                                        # grey has no hue and keeps its value
    turned = colours(x, factors=(1, 1, 1, 0.07))[0].permute(1, 2, 0).reshape(-1, 3)
    for before, after in zip(x[0].permute(1, 2, 0).reshape(-1, 3).tolist(), turned.tolist()):
        h, s, v = colorsys.rgb_to_hsv(*before)
        close(after, colorsys.hsv_to_rgb((h + 0.07) % 1, s, v), 1e-5)


def test_crops_are_coloured_one_by_one():
    params = MultiCrop(8, 8, 30).draw(np.random.default_rng(0), 90, 120)[2]
    x = torch.rand(len(params["gray"]), 3, 8, 8)
    alone = [data.photometric(x[i:i + 1], {name: value[i:i + 1] for name, value in params.items()})
             for i in range(len(x))]
    close(data.photometric(x, params), torch.cat(alone), 1e-6)


def test_blur_is_gaussian():
    x, sigma = torch.rand(1, 3, 33, 33), 1.5
    g = torch.exp(-torch.arange(-8, 9.0) ** 2 / (2 * sigma ** 2))
    kernel = (g[:, None] * g / g.sum() ** 2).expand(3, 1, -1, -1)
    expected = F.conv2d(x, kernel, padding=8, groups=3)
    close(colours(x, blur=sigma)[..., 10:-10, 10:-10], expected[..., 10:-10, 10:-10], 1e-6)
    close(colours(torch.ones(1, 3, 9, 9), blur=2.0), torch.ones(1, 3, 9, 9), 1e-6)      # borders not darkened


def test_a_crop_is_its_box_resized_and_flipped():
    frame = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    top, left, side = 5, 12, 20
    box = torch.from_numpy(frame[5:25, 12:32]).permute(2, 0, 1)
    assert torch.equal(data.crop_uint8(frame, (top, left, side, side), side), box)
    assert torch.equal(data.crop_uint8(frame, (top, left, side, side), side, flip=True), box.flip(-1))
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    small = data.crop_uint8(stripes, (0, 0, 64, 64), 16).int()
    assert (small[..., 2:-2] - 127).abs().max() <= 8           # too fine to be seen: grey, no moire


def test_random_boxes_have_the_area_and_aspect_asked_for():
    boxes = data.random_boxes(np.random.default_rng(0), 900, 1200, (0.2, 0.4), 2000)
    top, left, h, w = boxes.T
    assert top.min() >= 0 and (top + h).max() <= 900
    assert left.min() >= 0 and (left + w).max() <= 1200
    for share, least, most in ((h * w / (900 * 1200), 0.2, 0.4), (w / h, 3 / 4, 4 / 3)):
        close([share.min(), share.max()], [least, most], 0.01)
    for corner, room in ((top, 900 - h), (left, 1200 - w)):             # anywhere, as often
        close(np.quantile(corner / room, (0.25, 0.5, 0.75)), [0.25, 0.5, 0.75], 0.05)
    long = data.random_boxes(np.random.default_rng(0), 4, 400, (0.5, 1.0), 3)
    assert long.tolist() == 3 * [[0, 197, 4, 5]]                       # centred, aspect at most 4/3


@pytest.fixture(scope="module")
def drawn():
    """Boxes, flips and parameters of 400 pairs, 6 + 2 * 8 crops each, of frames 360 x 640."""
    draws = [MultiCrop(224, 96, 8).draw(np.random.default_rng(i), 360, 640) for i in range(400)]
    boxes, flips, params = zip(*draws)
    params = torch.utils.data.default_collate(params)
    return np.stack(boxes), np.stack(flips), {name: value.numpy() for name, value in params.items()}


def test_multicrop_boxes_follow_the_papers_rules(drawn):
    boxes, flips, _ = drawn
    assert (boxes[:, 0] == boxes[:, 1]).all() and not flips[:, :2].any()  # motion: one box, no flip
    assert (boxes[:, 2:4] == boxes[:, 4:6]).all()                    # globals: alike in both frames
    assert (flips[:, 2:4] == flips[:, 4:6]).all() and (flips[:, 2] != flips[:, 3]).mean() > 0.4
    assert (boxes[:, 6:14] != boxes[:, 14:]).any(-1).all()                     # locals: independent
    assert abs(flips[:, 2:].mean() - 0.5) < 0.03
    share = boxes[..., 2] * boxes[..., 3] / (360 * 640)
    inside = boxes[:, 2:]                                           # an initial crop of 0.05 to 0.2
    extent = (inside[..., :2] + inside[..., 2:]).max(1) - inside[..., :2].min(1)
    initial = extent.prod(-1) / (360 * 640)
    for value, least, most, slack in (
            (share[:, 0], 0.2, 0.4, 0.01), (share[:, 2:6], 0.05 * 0.4, 0.2, 0.02),
            (share[:, 6:], 0.05 * 0.05, 0.2 * 0.4, 0.01), (initial, 0.05, 0.2, 0.02)):
        close([value.min(), value.max()], [least, most], slack)


def test_multicrop_colours_follow_the_papers_rules(drawn):
    params = drawn[2]
    jittered = (params["factors"] != data.NEUTRAL).any(-1)
    blurred = params["blur"] > 0
    t1, t2, t3 = [0, 2, 4], [1, 3, 5], slice(6, None)       # motion [frame], globals [frame, box], locals
    for chance, found in (
            (0.8, jittered), (0.2, params["gray"]), (1, blurred[:, t1]), (0.1, blurred[:, t2]),
            (0.5, blurred[:, t3]), (0, params["solarize"][:, t1]), (0.2, params["solarize"][:, t2]),
            (0, params["solarize"][:, t3])):
        assert abs(found.mean() - chance) < (0.03 if 0 < chance < 1 else 1e-9)
    factors = params["factors"][jittered]
    close(factors.min(0), [0.6, 0.6, 0.8, -0.1], 0.01)
    close(factors.max(0), [1.4, 1.4, 1.2, 0.1], 0.01)
    close([params["blur"][blurred].min(), params["blur"].max()], [0.1, 2.0], 0.01)
    assert len(np.unique(params["order"].reshape(-1, 4), axis=0)) == 24         # any order
    assert (params["factors"][:, 0] != params["factors"][:, 1]).any(1).mean() > 0.9    # independent


def cropped(frames, **options):
    crops = MultiCrop(32, 16, 3, **options)
    pair = crops(frames, np.random.default_rng(5))
    return crops.finish(torch.utils.data.default_collate([pair]))


@pytest.mark.parametrize("mode", ["shared", "none"])
def test_motion_colours_concern_the_motion_crops_alone(mode):
    still = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    free, other = cropped([still, still]), cropped([still, still], motion_colours=mode)
    expected = free if mode == "shared" else cropped([still, still], colours=False)
    for frame in range(2):                              # one frame twice: only colours could differ
        close(other["motion"][0, frame], expected["motion"][0, 0], 1e-6)
    assert (free["motion"][0, 0] - free["motion"][0, 1]).abs().max() > 0.05
    close(other["globals"], free["globals"], 0)
    close(other["locals"], free["locals"], 0)


def test_multicrop_cuts_the_boxes_that_it_draws():
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    boxes, flips, _ = MultiCrop(32, 16, 3).draw(np.random.default_rng(5), 90, 120)
    batch = cropped(frames, colours=False)
    where = [("motion", 0, (0,)), ("motion", 1, (1,))]
    where += [("globals", f, (f, box)) for f in range(2) for box in range(2)]
    where += [("locals", f, (f, box)) for f in range(2) for box in range(3)]
    for (name, frame, at), box, flip in zip(where, boxes, flips, strict=True):
        size = 16 if name == "locals" else 32
        close(batch[name][0][at], data.crop_uint8(frames[frame], box, size, flip) / 255, 1e-6)
    assert set(batch) == {"motion", "globals", "locals"}
    none = MultiCrop(32, 16, 0)(frames, np.random.default_rng(5))["locals"]
    assert none.shape == (2, 0, 3, 16, 16)


def test_loader_is_a_pure_function_of_the_sample_number():
    def load(batches, **options):
        return list(data.make_loader("scenes", SMALL.inputs, batches, seed=3,
                                     scenes=data.SceneOptions(size=24, sprites=1), **options))
    whole = load([range(6)], workers=0)[0]
    parts = load([range(2), range(2, 6)], workers=0)
    spread = load([range(2), range(2, 6)], workers=2)
    for name in whole:
        close(torch.cat([part[name] for part in parts]), whole[name], 1e-5)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(parts, spread))
    assert not torch.equal(load([range(6)], workers=0, split="eval")[0]["motion"], whole["motion"])


# ---- synthetic scenes ----------------------------------------------------------------------------
CLIPS = range(6)


@pytest.fixture(scope="module")
def scenes():
    return Scenes(), Scenes().batch(CLIPS, truth=True)


def truth(count=64, **options):
    """Scenes without motion, but for the options."""
    options = dict(speed=0, pan=0, zoom=0, roll=0, textures=8) | options
    return Scenes(**options).batch(range(count), truth=True)


def test_scene_shapes_and_ranges(scenes):
    s, d = scenes
    B, T, K, S, P = 6, 8, 4, 64, 32
    shapes = dict(video=(B, T, 3, S, S), flow=(B, T - 1, 2, S, S), occluded=(B, T - 1, S, S),
                  classes=(B, T, S, S), ids=(B, T, S, S), depth=(B, T, S, S),
                  boxes=(B, T, K, 4), tracks=(B, T, P, 2), visible=(B, T, P))
    assert {name: tuple(value.shape) for name, value in d.items()} == shapes
    assert all(value.shape == d[name].shape[1:] for name, value in s[3].items())
    assert 0 <= d["video"].min() and d["video"].max() <= 1 and d["depth"].min() >= 0.4
    assert torch.equal(d["classes"] > 0, d["ids"] > 0) and torch.equal(d["depth"] < 1, d["ids"] > 0)
    assert Scenes(frames=1, size=32).batch([0], truth=True)["video"].shape == (1, 1, 3, 32, 32)


def test_scene_colour_does_not_change_along_the_flow(scenes):
    s, d = scenes
    pixels = torch.view_as_real(s.pixels)                                           # (H*W, 2)
    for t in range(s.frames - 1):
        source = d["video"][:, t].flatten(2).mT                                     # (B, H*W, 3)
        target, owner = s.at(CLIPS, pixels + d["flow"][:, t].flatten(2).mT, t + 1)
        seen = ~d["occluded"][:, t].flatten(1)
        assert (target - source)[seen].abs().max() < 1e-3
        assert torch.equal(owner[seen], d["ids"][:, t].flatten(1)[seen])
        assert (target - source)[~seen].abs().mean() > 0.05                 # hidden: another colour


def test_scene_flow_warps_the_next_frame_onto_this_one():
    d = truth(frames=2, pan=4, zoom=0.05, roll=0.05, sprites=0)    # the pixels alone, not Scenes.at
    line = torch.arange(64.0)
    x, y = d["flow"][:, 0].unbind(1)
    grid = (torch.stack([x + line, y + line[:, None]], -1) + 0.5) / 32 - 1
    warped = F.grid_sample(d["video"][:, 1], grid, align_corners=False)
    seen = ~d["occluded"][:, 0, None].expand_as(warped)
    error, unmoved = (
        (image - d["video"][:, 0])[seen].square().mean() for image in (warped, d["video"][:, 1]))
    assert error < 0.1 * unmoved


def test_scene_tracks_follow_the_flow_and_visibility_the_occlusion(scenes):
    d, batch = scenes[1], torch.arange(6)[:, None]
    assert d["visible"][:, 0].all() and not d["visible"].all()
    x, y = d["tracks"][:, 0].long().unbind(-1)                            # (B, P) pixels of frame 0
    assert torch.equal(torch.stack([x, y], -1).float(), d["tracks"][:, 0])
    flow = d["flow"][:, 0].movedim(1, -1)[batch, y, x]
    assert (d["tracks"][:, 0] + flow - d["tracks"][:, 1]).abs().max() < 1e-3
    assert torch.equal(d["visible"][:, 1], ~d["occluded"][:, 0][batch, y, x])


def test_scene_points_keep_colour_and_owner_while_visible(scenes):
    s, d = scenes
    start, owner = s.at(CLIPS, d["tracks"][:, 0], 0)
    for t in range(1, s.frames):
        colour, at = s.at(CLIPS, d["tracks"][:, t], t)
        assert (colour - start)[d["visible"][:, t]].abs().max() < 1e-3
        assert torch.equal(at[d["visible"][:, t]], owner[d["visible"][:, t]])


def test_scene_parallax_is_one_over_depth_and_nearer_sprites_hide():
    d = truth(4, frames=2, sprites=3, pan=6)
    for flow, ids, depth in zip(d["flow"][:, 0], d["ids"][:, 0], d["depth"][:, 0]):
        camera = flow[:, ids == 0].mean(1)
        found = [depth[ids == k] for k in range(4) if (ids == k).any()]
        assert all(len(values.unique()) == 1 for values in found)
        assert [v[0].item() for v in found] == sorted((v[0].item() for v in found), reverse=True)
        close(flow, camera[:, None, None] / depth, 1e-3)


def complex_flow(**options):
    """Flow x + i y (64, H*W) from the first frame of scenes without sprites."""
    flow = truth(frames=2, sprites=0, **options)["flow"][:, 0].movedim(1, -1)
    return torch.view_as_complex(flow.contiguous()).flatten(1)


def spread_up_to(most, amounts):
    return 0.9 * most < amounts.max() <= most and 0.35 * most < amounts.mean() < 0.65 * most


@pytest.mark.parametrize("most", [4, 16])
def test_scene_camera_pans_by_as_much_as_asked(most):
    flow = complex_flow(pan=most)
    assert (flow - flow[:, :1]).abs().max() < 1e-4                  # the same everywhere
    assert spread_up_to(most, flow[:, 0].abs())
    assert flow[:, 0].mean().abs() < 0.25 * most                    # in any direction


def test_scene_camera_zooms_and_rolls_about_the_middle_by_as_much_as_asked():
    from_middle = Scenes().pixels - (31.5 + 31.5j)
    for option, other in (("zoom", "imag"), ("roll", "real")):
        flow = complex_flow(**{option: 0.1})
        rate = torch.log(1 + flow[:, 0] / from_middle[0])           # log scale + i radians
        assert ((torch.exp(rate)[:, None] - 1) * from_middle - flow).abs().max() < 1e-3
        assert getattr(rate, other).abs().max() < 1e-5
        found = rate.real if option == "zoom" else rate.imag
        assert spread_up_to(0.1, found.abs()) and found.min() < -0.05 and found.max() > 0.05


def test_scene_paths_are_quadratic_and_keep_the_speeds_bounds():
    steps = truth(frames=9, sprites=0, pan=8)["flow"][:, :, :, 0, 0]    # (B, 8, 2) pixels per frame
    close(steps.diff(n=2, dim=1), torch.zeros(64, 6, 2), 1e-3)
    middle = steps[:, 3:5].mean(1).norm(dim=-1)
    change = (steps[:, -1] - steps[:, 0]).norm(dim=-1)      # 7/8 of that from end to end
    assert 7 < middle.max() <= 8 and 0.85 * 7 < change.max() <= 7
    still = truth(4)
    assert still["flow"].abs().max() < 1e-5
    assert not still["occluded"].any() and still["visible"].all()


def test_scene_boxes_are_tight_and_silhouettes_have_the_area_of_their_class(scenes):
    areas = data.silhouettes()[0].double().mean((1, 2)) * (0.9 * 64) ** 2
    for radius in ((0.2, 0.2), (0.45, 0.45)):
        d = Scenes(sprites=1, frames=1, radius=radius).batch(range(64), truth=True)
        for mask, classes, box in zip(d["ids"][:, 0] > 0, d["classes"][:, 0], d["boxes"][:, 0, 0]):
            if min(box[:2]) > 0 and max(box[2:]) < 63:                          # wholly inside
                y, x = mask.nonzero().unbind(1)
                close(torch.stack([x.min(), y.min(), x.max(), y.max()]), box, 2)
                expected = areas[classes.max() - 1] * (radius[0] / 0.45) ** 2
                assert abs(mask.sum() - expected) < 0.06 * expected + 4
    s, d = scenes
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for k in range(s.options.sprites):                                  # none sticks out of its box
        x1, y1, x2, y2 = d["boxes"][:, :, k, :, None, None].unbind(2)
        inside = (x > x1 - 0.01) & (x < x2 + 0.01) & (y > y1 - 0.01) & (y < y2 + 0.01)
        assert inside[d["ids"] == k + 1].all()


def test_scene_depends_on_its_number_alone(scenes):
    s, d = scenes
    for name, value in s.batch([4, 1], truth=True).items():
        close(value, d[name][[4, 1]], 1e-4)
    assert torch.equal(Scenes().batch([2])["video"][0], Scenes()[2]["video"])       # with and without truth
    assert not torch.equal(Scenes(seed=1).batch([2])["video"][0], d["video"][2])


def test_scene_splits_share_no_clip_and_no_texture():
    train_scenes, held_out = Scenes(), Scenes(split="eval")
    a, b = (s.batch(range(40))["video"][:, 0] for s in (train_scenes, held_out))
    assert (a[:, None] - b).abs().mean((2, 3, 4)).min() > 0.05
    likeness = train_scenes.bank.flatten(1) @ held_out.bank.flatten(1).T
    assert likeness.abs().max() < 0.9 * train_scenes.bank[0].numel()


def test_scene_statistics_are_sane():
    d = Scenes().batch(range(32), truth=True)
    assert 0.6 < d["flow"].norm(dim=2).mean() < 1.8
    assert 0.03 < d["occluded"].float().mean() < 0.12
    assert 0.12 < (d["ids"] > 0).float().mean() < 0.30
    assert (d["video"].std((1, 3, 4)).mean() > 0.12) and 0.3 < d["video"].mean() < 0.7
    assert set(d["classes"].unique().tolist()) == set(range(9))


@pytest.mark.parametrize("call, word", [
    (partial(Scenes, textures=0), "textures=0"), (partial(Scenes, sprites=-1), "sprites=-1"),
    (partial(Scenes, radius=(0.2,)), "radius"), (partial(Scenes, size=4), "size=4"),
    (partial(Scenes, seed=-1), "seed=-1"), (partial(Scenes, seed=10**9), "seed"),
    (partial(Scenes, split="test"), "split"), (partial(data.MovingSquares, mode="both"), "mode"),
    (partial(data.MovingSquares, shape="star"), "shape"), (partial(data.MovingSquares, speed=0.3), "inside"),
    (lambda: data.MovingSquares(objects=40)[0], "no room"), (partial(data.MovingSquares, seed=-1), "seed=-1"),
    (partial(MultiCrop, 32, 16, 2, motion_colours="some"), "motion_colours"),
])
def test_wrong_options_of_made_data_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# ---- your own videos -----------------------------------------------------------------------------
def bars(i, size=(256, 64)):
    """A frame (H, W, 3) that shows the bits of i as ten bars in the lower half, and is red on top left."""
    image = np.full((size[1], size[0], 3), 255, np.uint8)
    image[:size[1] // 4, :48] = 255, 0, 0
    for bit in range(10):
        image[size[1] // 2:, bit * 24:bit * 24 + 24] = 255 * (i >> bit & 1)
    return image


def encode(path, times, size=(256, 64), gop=12, matrix=None, codec="libx264", frames=2, sound=0.0):
    """Writes a video whose frame i is bars(i) at times[i]; frames: B-frames in a row; sound: its seconds."""
    with av.open(str(path), "w") as out:
        options = {"bf": str(frames)} | ({"preset": "ultrafast"} if codec == "libx264" else {})
        stream = out.add_stream(codec, rate=30, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        tick = Fraction(1, 30) if codec == "mpeg4" else Fraction(1, 15360)
        stream.codec_context.time_base = tick
        if matrix:
            stream.set_display_matrix(matrix)
        audio = out.add_stream("aac", rate=48000) if sound else None
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(bars(i, size), "rgb24")
            frame.pts, frame.time_base = round(t / tick), tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        for n in range(int(sound * 48000) // 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 48000, n * 1024
            out.mux(audio.encode(silence))
        out.mux(audio.encode() if audio else [])
    return path


def number(image):
    """Image (H, W, 3) or (3, H, W) -> the frame number that encode wrote into it."""
    image = torch.as_tensor(image)
    gray = (image if image.shape[-1] == 3 else image.permute(1, 2, 0))[..., 1]
    return sum((gray[-8, 24 * bit + 12] > 128).item() << bit for bit in range(10))


def numbers(dataset, indices):
    return [[number(image) for image in sample["video"]] for sample in dataset.__getitems__(list(indices))]


CONSTANT = [i / 30 for i in range(120)]
VARIABLE = np.cumsum([0] + [(1, 4, 2, 1, 7, 1)[i % 6] / 60 for i in range(119)]).tolist()
BURSTS = [5 * (i // 30) + i % 30 / 30 for i in range(120)]         # a second of frames, then nothing for four


@pytest.mark.parametrize("gop", [12, 250])
@pytest.mark.parametrize("name", ["constant.mp4", "constant.ts", "variable.mkv", "late.mkv", "late.ts"])
def test_read_frames_finds_the_first_frame_at_or_after(tmp_path, name, gop):
    times = VARIABLE if name.startswith("variable") else CONSTANT
    late = 2.5 if name.startswith("late") else 0
    path = encode(tmp_path / name, [t + late for t in times], gop=gop)
    wanted = np.sort(np.random.default_rng(0).uniform(0, times[-1], 12)).tolist() + [times[-1]]
    images, true = read_frames(path, wanted)
    assert [number(image) for image in images] == [int(np.searchsorted(times, t - 1e-3)) for t in wanted]
    assert np.allclose(true, [times[number(image)] for image in images], atol=1e-3)
    backwards, _ = read_frames(path, times[::-9])           # dear, but not wrong
    assert [number(image) for image in backwards] == list(range(119, -1, -9))
    assert [number(image) for image in data.read_video(path)] == list(range(120))
    with pytest.raises(ValueError, match="wanted"):
        read_frames(path, [0.0, times[-1] + 1])


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("mirror", [1, -1])
def test_all_eight_orientations_come_upright(tmp_path, turn, mirror):
    a, b = ((1, 0), (0, 1), (-1, 0), (0, -1))[turn]         # shown x = a x + c y, y = b x + d y
    stored = encode(tmp_path / "a.mp4", CONSTANT[:5])
    c, d = -mirror * b, mirror * a
    matrix = [a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30]
    path = encode(tmp_path / "b.mp4", CONSTANT[:5], matrix=matrix)
    plain, shown = data.read_video(stored)[3], data.read_video(path)[3]
    y, x = np.mgrid[:plain.shape[0], :plain.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    expected = np.empty(shown.shape, np.uint8)
    expected[to_y - to_y.min(), to_x - to_x.min()] = plain
    assert np.array_equal(shown, expected)


def test_pairs_and_clips_count_true_frames(tmp_path):
    path = encode(tmp_path / "a.MP4", CONSTANT)
    gaps = [b - a for a, b in numbers(Videos(path, gap=(0.5, 1.0)), range(60))]
    assert 15 <= min(gaps) <= 17 and 28 <= max(gaps) <= 30
    variable = encode(tmp_path / "variable.mp4", VARIABLE)
    gaps = [VARIABLE[b] - VARIABLE[a] for a, b in numbers(Videos(variable, gap=(0.5, 0.5)), range(40))]
    assert 0.5 - 0.025 <= min(gaps) and max(gaps) <= 0.5 + 0.025          # half the mean frame
    for clip in numbers(Videos(variable, frames=5, stride=7), range(20)):
        assert set(np.diff(clip)) == {7}
    assert numbers(Videos(path, frames=120, repeat=1), [0]) == [list(range(120))]         # all of it fits


def test_pairs_do_not_reach_over_a_pause(tmp_path):
    dataset = Videos(encode(tmp_path / "a.mp4", BURSTS), gap=(0.5, 0.9))
    gaps = [BURSTS[b] - BURSTS[a] for a, b in numbers(dataset, range(40))]
    assert 0.48 < min(gaps) and max(gaps) < 0.92 and not dataset.broken.any()


@pytest.mark.parametrize("name", ["late.mkv", "sound.mkv", "sound.ts"])
def test_headers_that_promise_too_much_break_nothing(tmp_path, name):
    late, sound = (2.5, 0) if name.startswith("late") else (0, 7)
    path = encode(tmp_path / name, [t + late for t in CONSTANT[:90]], sound=sound)
    dataset = Videos(path)
    pairs = numbers(dataset, range(60))
    assert not dataset.broken.any() and min(pairs)[0] < 12 and max(b for _, b in pairs) > 78
    assert [numbers(Videos(path), [i])[0] for i in range(0, 60, 7)] == pairs[::7]


def test_avi_without_b_frames_is_read_and_with_them_refused(tmp_path):
    assert number(read_frames(encode(tmp_path / "a.avi", CONSTANT, codec="mpeg4", frames=0), [2.0])[0][0]) == 60
    with pytest.raises(ValueError, match="ffmpeg -i"):
        data.Reader(encode(tmp_path / "b.avi", CONSTANT, codec="mpeg4"))


def test_the_best_of_two_streams_is_read(tmp_path):
    with av.open(str(tmp_path / "a.ts"), "w") as out:
        for width in (64, 256):
            stream = out.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        for stream in out.streams.video:
            for i in range(5):
                image = bars(i) if stream.width == 256 else np.zeros((64, 64, 3), np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            out.mux(stream.encode())
    assert data.read_video(tmp_path / "a.ts").shape[1:] == (64, 256, 3)


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    for name in ("a.m4v", "deep/er/b.mov", "deep/c.mkv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        encode(tmp_path / "x.mp4", CONSTANT).rename(tmp_path / name)
    (tmp_path / "._a.mp4").write_bytes(b"left by macOS")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    dataset = Videos(tmp_path, repeat=3, seed=4)
    assert len(dataset) == 12 and sorted(dataset.files)[0] == "a.m4v"
    one_by_one = torch.stack([dataset[i]["video"] for i in reversed(range(12))]).flip(0)
    pickle.dumps(dataset)                                   # with files open
    for workers, start in ((0, None), (2, "fork"), (2, "spawn")):
        loader = torch.utils.data.DataLoader(dataset, 5, num_workers=workers, multiprocessing_context=start)
        assert torch.equal(torch.cat([batch["video"] for batch in loader]), one_by_one)
    assert numbers(dataset, range(12)) != numbers(dataset, range(12, 24))
    assert numbers(dataset, range(12)) != numbers(Videos(tmp_path, repeat=3, seed=5), range(12))


def test_a_video_is_opened_once_for_its_repeats(tmp_path, monkeypatch):
    for name in "abcd":
        encode(tmp_path / f"{name}.mp4", CONSTANT)
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda path: opened.append(path) or real(path))
    numbers(Videos(tmp_path, repeat=5), range(20))
    assert len(opened) == len(set(opened)) == 4             # a pass takes every file, each once


def test_a_bug_in_a_transform_is_not_taken_for_a_broken_file(tmp_path):
    def bug(frames, rng):
        raise ValueError(f"a bug after {rng.integers(10**9)}")

    dataset = Videos(encode(tmp_path / "a.mp4", CONSTANT), transform=bug)
    for i in (0, 3):
        with pytest.raises(ValueError, match=f"a bug after {np.random.default_rng((0, i, 1)).integers(10**9)}"):
            dataset[i]


def write_frames(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in names.items():
        iio.imwrite(folder / name, np.full((8, 8, 3), value, np.uint8))


def test_frame_folders_pair_by_number_within_a_sequence(tmp_path, capfd):
    write_frames(tmp_path / "x", {f"drive_{i:04d}.png": i for i in range(0, 100, 5)})
    write_frames(tmp_path / "y", {f"drive_{i}.png": 100 + i for i in range(0, 100, 5)} | {"cover.png": 0})
    iio.imwrite(tmp_path / "y" / "drive_0.png", np.full((8, 8), 100, np.uint8))             # gray is fine
    pairs = [sample["video"][:, 0, 0, 0].tolist() for sample in Videos(tmp_path, gap=(0.5, 1.0), fps=30)]
    assert "cover.png" in capfd.readouterr().err
    assert {b - a for a, b in pairs} == {15, 20, 25, 30} and all((a < 100) == (b < 100) for a, b in pairs)
    os.remove(tmp_path / "x" / "drive_0050.png")
    dataset = Videos(tmp_path, frames=4, stride=2)
    clips = [sample["video"][:, 0, 0, 0].tolist() for sample in dataset]
    assert all(np.diff(clip).tolist() == [10, 10, 10] for clip in clips)    # none over the hole
    assert {clip[0] for clip in clips} >= {5, 10, 60, 65, 105, 110}


def test_nanoseconds_as_frame_numbers_stay_whole(tmp_path):
    start = 1403636579763555584
    write_frames(tmp_path, {f"{start + i * 5 * 10**7}.png": i for i in range(30)})
    with pytest.raises(ValueError, match="neighbours are"):
        Videos(tmp_path)
    pairs = [sample["video"][:, 0, 0, 0].tolist() for sample in Videos(tmp_path, fps=1e9)]
    assert {b - a for a, b in pairs} <= set(range(10, 21))


def test_broken_files_are_named_once_and_replaced(tmp_path, capfd):
    good = encode(tmp_path / "good.mp4", CONSTANT)
    content = good.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[:len(content) // 2])
    (tmp_path / "junk.mkv").write_bytes(b"junk" * 999)
    (tmp_path / "odd.mp4").write_bytes(content.replace(b"avc1", b"zzzz"))
    encode(tmp_path / "short.mp4", CONSTANT[:9])
    encode(tmp_path / "sparse.mp4", [5.0 * i for i in range(9)])
    dataset = Videos(tmp_path)
    loader = torch.utils.data.DataLoader(dataset, 10, num_workers=2)
    assert sum(len(batch["video"]) for batch in loader) == 30
    lines = sorted(line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped"))
    assert [line.split()[3].strip(":") for line in lines] == ["cut.mp4", "junk.mkv", "odd.mp4", "short.mp4",
                                                              "sparse.mp4"]
    assert "too short" in lines[3] and "too sparse" in lines[4]
    assert dataset.broken.sum() == 5                        # the workers counted together


def test_damaged_videos_give_the_same_samples_alone_and_in_a_batch(tmp_path):
    for n in range(3):                      # textured frames: many bits to lose, in all but the last file
        tiles = np.random.default_rng(n).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        tiles = tiles.repeat(4, 0).repeat(4, 1)
        with av.open(str(tmp_path / f"{n}.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = 96, 64, "yuv420p", 40
            for i in range(120):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(tiles, 3 * i, 1), "rgb24")))
            out.mux(stream.encode())
        content = bytearray((tmp_path / f"{n}.mp4").read_bytes())
        for place in np.random.default_rng(10 + n).integers(len(content) // 4, 3 * len(content) // 4, 8):
            content[place] ^= 255 if n < 2 else 0
        (tmp_path / f"{n}.mp4").write_bytes(content)
    together = Videos(tmp_path).__getitems__(list(range(30)))
    for i in range(30):
        assert torch.equal(Videos(tmp_path)[i]["video"], together[i]["video"]), i


def test_ten_broken_files_in_a_row_stop_the_run(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.mp4").write_bytes(b"junk")
    with pytest.raises(OSError, match=r"ten videos tried in a row.*\.mp4: Invalid data"):
        Videos(tmp_path)[0]
    write_frames(tmp_path / "frames", {"a1.png": 1, "a16.png": 2})
    (tmp_path / "frames" / "a16.png").write_bytes(b"junk")
    with pytest.raises(OSError, match="ten frames tried in a row.*a16.png"):
        Videos(tmp_path / "frames")[0]


def test_what_lies_in_a_folder_is_opened_if_it_is_a_regular_video(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    encode(tmp_path / "a.mp4", CONSTANT)
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "b.wmv").write_text("")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).write_text("a name that can't be printed")
    dataset = Videos("~")
    assert len(numbers(dataset, range(10))) == 10 and len(dataset.files) == 2
    said = capfd.readouterr().err
    assert ".wmv" in said and "udcff.mp4" in said
    assert len(read_frames("~/a.mp4", [0.0])[0]) == 1


@pytest.mark.parametrize("name, kind, word", [
    ("nowhere", FileNotFoundError, "no such file"), ("empty", ValueError, "no videos and no frames"),
    ("notes.txt", ValueError, "neither"), ("fifo.mp4", FileNotFoundError, "no such file"),
    ("unnumbered", ValueError, "frame number"), ("far", ValueError, "--gap or --fps")])
def test_paths_that_hold_no_samples_say_so(tmp_path, name, kind, word):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    os.mkfifo(tmp_path / "fifo.mp4")
    write_frames(tmp_path / "unnumbered", {"cover.jpg": 0})
    write_frames(tmp_path / "far", {"a1.png": 0, "a99.png": 0})
    with pytest.raises(kind, match=f"{name}.*{word}"):
        Videos(tmp_path / name)


# ---- the loop ------------------------------------------------------------------------------------
TINY = ("--model midway --device cpu --workers 0 --batch-size 4 --size 16 --dim 24 --depth 4 --heads 2 "
        "--levels 1 2 4 --motion-dim 12 --motion-depth 1 --motion-heads 2 --forward-heads 2 --head-hidden 16 "
        "--head-bottleneck 8 --prototypes 32 --local-size 8 --local-crops 2 "
        "--scene-size 24 --scene-textures 8 --log-every 1").split()

TINY_MOOG = ("--model moog --device cpu --workers 0 --batch-size 4 --size 16 --frames 3 --tokens 6 --dim 16 "
             "--channels 8 16 --strides 2 2 --encoder-bases 4 --decoder-bases 4 --predictor 1 2 8 "
             "--corrector 1 2 16 --decoder 1 2 8 --mlp 24 --subsample 4 --scene-textures 8 "
             "--log-every 1").split()
SQUARES = "--model melomotion --device cpu --batch-size 4 --warmup 0.3 --log-every 1".split()
FAMILIES = dict(midway=(TINY + ["--drop-path", "0.3"], Midway),
                moog=(TINY_MOOG, moog.MooG),
                melomotion=(SQUARES, MeloMotion))


def command(*args, processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone",
              f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, str(HERE / "train.py"), *map(str, args)]


def run(*args, processes=1, status=0):
    done = subprocess.run(command(*args, processes=processes), capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == status, done.stdout + done.stderr
    return done


def weights(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def error_of(capsys, args, *status):
    """The one line on stderr with which train.py leaves."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        train.cli([str(arg) for arg in args])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert leaving.value.code in status and len(lines) == 1, lines
    assert lines[0].startswith("train.py: error: ")
    return lines[0]


def test_schedules_are_dinos():
    opt = train.Options(steps=525_000, lr=3.90625e-4, min_lr=1e-6, warmup=1 / 30,
                        weight_decay=0.04, weight_decay_end=0.4)
    for step, lr, decay in REFERENCE["schedule"].T:
        close(train.schedule(opt, int(step)), [lr, decay], 1e-12)
    assert midway.RECIPES["vit_s"]["lr"] == 3.90625e-4 and midway.RECIPES["vit_s"]["batch_size"] == 200


@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps_are_a_plain_loops(name, tmp_path, monkeypatch):
    """AdamW written out, on the very batches of the run."""
    small, model_class = FAMILIES[name]
    made, batches, forward = [], [], model_class.forward
    def recording(self, batch):
        if not made:
            made.append(deepcopy(self))
        batches.append(deepcopy(batch))
        return forward(self, batch)
    monkeypatch.setattr(model_class, "forward", recording)
    flags = ["--drop-path", "0"] if name == "midway" else []
    train.main([*small, *flags, "--steps", "3", "--lr", "1e-2", "--min-lr", "1e-3", "--warmup", "0", "--clip",
                "0.1", "--betas", "0.8", "0.95", "--weight-decay", "0.2", "--weight-decay-end", "0.4",
                "--out", str(tmp_path)])
    monkeypatch.undo()
    model = made[0]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p), [0]) for p in model.parameters()}
    for step in range(3):
        half = (1 + np.cos(np.pi * step / 3)) / 2
        lr, decay = 1e-3 + 9e-3 * half, 0.4 - 0.2 * half
        torch.manual_seed(step)
        model(batches[step])[0].backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        if hasattr(model, "before_step"):
            model.before_step(step / 3)
        with torch.no_grad():
            for p in (p for p in trained if p.grad is not None):
                first, second, count = moments[p]
                count[0] += 1
                gradient = p.grad * min(1, 0.1 / (norm.item() + 1e-6))
                first.lerp_(gradient, 0.2)
                second.lerp_(gradient ** 2, 0.05)
                p.mul_(1 - lr * decay * (p.ndim > 1 or name == "moog"))     # MooG's authors decay all
                mean, square = first / (1 - 0.8 ** count[0]), second / (1 - 0.95 ** count[0])
                p.sub_(lr * mean / (square.sqrt() + 1e-8))
        model.zero_grad()
        model.after_step((step + 1) / 3)
    saved = weights(tmp_path)
    for key, value in model.state_dict().items():
        close(value, saved[key], 2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_four_steps_are_two_and_a_resume_and_two(name, tmp_path, capsys):
    small, model_class = FAMILIES[name]
    train.main(small + ["--steps", "4", "--save-every", "2", "--out", f"{tmp_path}/whole"])
    stop_after(2, small + ["--steps", "4", "--save-every", "500", "--out", f"{tmp_path}/parts"], model_class)
    train.main(["--resume", f"{tmp_path}/parts", "--workers", "1"])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    lines = [[{key: value for key, value in line.items() if key not in ("ms", "samples_per_s")}
              for line in log(tmp_path / folder)] for folder in ("whole", "parts")]
    assert lines[0] == lines[1] and {"step", "loss", "lr"} <= lines[0][0].keys()
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {"ckpt.pt", "log.jsonl", "curves.png", "config.json"}
    said = capsys.readouterr().out
    assert [row for row in lines[0][-1]["held_out"] if row not in said] == []
    assert max(len(line) for line in said.splitlines() if line.startswith("step ")) <= 100


def stop_after(steps, args, model_class=Midway):
    """Runs train.main in this process and sends it SIGTERM while step number `steps` is under way."""
    after_step, count = model_class.after_step, []
    def counting(self, progress):
        after_step(self, progress)
        count.append(progress)
        if len(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
    model_class.after_step = counting
    try:
        with pytest.raises(SystemExit) as leaving:
            train.main(args)
        assert leaving.value.code == 128 + signal.SIGTERM
    finally:
        model_class.after_step = after_step


@pytest.mark.parametrize("name", ("midway", "moog"))
def test_two_processes_equal_one(name, tmp_path):
    common = FAMILIES[name][0] + ["--steps", "3", "--clip", "0.1", "--save-every", "100"]
    common += ["--drop-path", "0"] if name == "midway" else []
    run(*common, "--out", tmp_path / "two", "--micro-batch", "1", processes=2)      # 2 x 2 accumulated
    # what is random in the step is drawn for each micro-batch
    train.main(common + ["--out", f"{tmp_path}/one"] + (["--micro-batch", "1"] if name == "moog" else []))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        close(one[key].float(), two[key].float(), 1e-6)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5


def test_resume_stays_in_the_folder_of_its_checkpoint(tmp_path, capsys):
    for steps in (1, 2):
        train.main(TINY + ["--steps", str(steps), "--out", f"{tmp_path}/run"])      # the first is now run.1
    train.main(["--resume", f"{tmp_path}/run.1", "--steps", "3"])
    assert "stretches" in capsys.readouterr().out
    train.main(["--resume", f"{tmp_path}/run.1", "--steps", "4", "--out", f"{tmp_path}/other"])
    steps = {name: torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["step"]
             for name in ("run", "run.1", "other")}
    assert steps == {"run": 2, "run.1": 3, "other": 4}


def test_sigkill_leaves_a_whole_checkpoint_and_until_then_no_second_run_starts(tmp_path, capsys):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(*TINY, "--steps", 100_000, "--save-every", 2, "--out", out),
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"step ([5-9]|\d\d)", line):
            break
    assert "another run" in error_of(capsys, [*TINY, "--out", out], 1)
    process.kill()
    process.wait()
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert step >= 4 and step % 2 == 0
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 1, "lo\n[3]\n')
    train.main(["--resume", str(out), "--workers", "0", "--steps", str(step + 1)])
    assert [line["step"] for line in log(out)] == list(range(1, step + 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_goes_on_after_any_learning_rate(name, tmp_path, capsys):
    args = [*FAMILIES[name][0], "--steps", "20", "--warmup", "0.3", "--save-every", "1", "--out", tmp_path]
    message = error_of(capsys, [*args, "--lr", "1e6"], 1)
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert re.search(rf"step {step + 2}: the loss is .*last good checkpoint: .*\(step {step}\)", message)
    train.main(["--resume", str(tmp_path), "--lr", "1e-4", "--steps", str(step + 2)])
    assert all(np.isfinite(line["loss"]) for line in log(tmp_path))


def test_a_full_disk_spares_the_old_checkpoint(tmp_path, monkeypatch):
    out, save, count = tmp_path / "full", torch.save, []
    def full(obj, file):
        count.append(1)
        if len(count) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(obj, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(train.UserError, match="No space left.*is whole"):
        train.main(TINY + ["--steps", "9", "--save-every", "1", "--out", str(out)])
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 1 and not list(out.glob("*.tmp"))


def test_log_and_curves_stop_no_run(tmp_path, capsys):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    train.main(TINY + ["--steps", "1", "--out", f"{tmp_path}/run"])
    assert "warning" in capsys.readouterr().err and (tmp_path / "run" / "ckpt.pt").exists()


CLI_ERRORS = [
    ("", 2, "--model"),
    ("--model midwya", 2, "midway, moog, melomotion"),
    ("--model midway --batch-sise 3", 2, "did you mean --batch-size?"),
    ("--model midway --preset huge", 2, "tiny, vit_s, vit_b"),
    ("--model midway --steps 0", 2, "--steps"),
    ("--model midway --betas 0.9", 2, "--betas"),
    ("--model midway --betas 0.9 1", 2, "--betas"),
    ("--model midway --lr inf", 2, "--lr"),
    ("--model midway --scene-pan nan", 2, "--scene-pan"),
    ("--model midway --workers 10000", 2, "--workers"),
    ("--model midway --scene-size 1000000", 2, "--scene-size"),
    ("--model midway --micro-batch -1", 2, "--micro-batch"),
    ("TINY --micro-batch 3", 1, "try --batch-size 3"),
    ("TINY --dtype float8", 1, "bfloat16"),
    ("TINY --heads 0", 1, "heads"),
    ("TINY --size 20", 1, "multiple"),
    ("TINY --data {}/nowhere", 1, "nowhere"),
    ("TINY --data {}", 1, "{}"),
    ("--resume {}/nowhere", 1, "no checkpoint at"),
    ("--model melomotion --init {}/nowhere", 1, "no checkpoint at"),
]


@pytest.mark.parametrize("args, status, word", CLI_ERRORS)
def test_wrong_arguments_are_told_in_one_line(args, status, word, tmp_path, capsys):
    args = args.replace("TINY", " ".join(TINY)).format(tmp_path).split()
    if status == 1:
        args += ["--out", f"{tmp_path}/never"]
    assert word.format(tmp_path) in error_of(capsys, args, status)
    assert not (tmp_path / "never").exists()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    train.main(TINY + ["--steps", "2", "--out", str(out)])
    return out / "ckpt.pt"


def spoil(ckpt, place, value):
    """Puts a value, or nothing for KeyError, at a/b/c of a checkpoint."""
    *path, last = place.split("/")
    for key in path:
        ckpt = ckpt[int(key) if key.isdigit() else key]
    if value is KeyError:
        del ckpt[last]
    else:
        ckpt[int(last) if last.isdigit() else last] = value


CHECKPOINT_ERRORS = [(place, value) for place in (
    "model", "optimizer", "optimizer/state", "optimizer/state/0/exp_avg", "optimizer/param_groups", "step", "config",
    "config/model", "config/preset", "config/options", "config/options/lr", "config/options/betas",
    "config/scenes", "config/scenes/radius", "config/videos", "config/videos/gap", "config/config",
    "config/config/dim", "config/config/levels") for value in (KeyError, None, "text", [1.5], {"a": 1}, float("nan"))]
CHECKPOINT_ERRORS += [
    ("config/model", "os"), ("config/options/new", 1), ("config/config/new", 1), ("config/config/dim", 7),
    ("config/config/heads", 0), ("config/scenes/new", 1), ("model/new", torch.zeros(1)), ("model/new", 3),
    ("step", -1), ("optimizer/state/0/exp_avg", torch.zeros(1)), ("optimizer/state/0/exp_avg_sq", torch.zeros(3, 3)),
    ("optimizer/state/0/step", torch.zeros(2)), ("optimizer/state/9999", {}),
    ("optimizer/param_groups", []), ("optimizer/param_groups/0/params", [0])]


@pytest.mark.parametrize("place", sorted({place for place, _ in CHECKPOINT_ERRORS}))
def test_what_does_not_fit_in_a_checkpoint_is_told_in_one_line(place, small_run, tmp_path, capsys):
    for value in (value for where, value in CHECKPOINT_ERRORS if where == place):
        ckpt = torch.load(small_run, weights_only=True)
        spoil(ckpt, place, value)
        torch.save(ckpt, tmp_path / "ckpt.pt")
        message = error_of(capsys, ["--resume", tmp_path, "--steps", "3"], 1, 2)    # 2: as a flag's value
        assert any(word in message for word in ("ckpt.pt", "preset", "betas")), value


def test_checkpoints_of_others_and_damaged_ones_are_refused(small_run, tmp_path, capsys):
    assert "midway" in error_of(capsys, ["--model", "moog", "--resume", small_run], 1)
    assert "midway" in error_of(capsys, [*SQUARES, "--init", small_run, "--out", tmp_path / "never"], 1)
    assert "can't change" in error_of(capsys, ["--resume", small_run, "--dim", "48"], 1)
    assert "--steps" in error_of(capsys, ["--resume", small_run], 1)
    (tmp_path / "ckpt.pt").write_bytes(small_run.read_bytes()[:-1000])
    assert "damaged" in error_of(capsys, ["--resume", tmp_path], 1)


def test_only_bugs_have_a_traceback(monkeypatch, capsys, tmp_path):
    def fails(self, batch):
        raise error
    monkeypatch.setattr(Midway, "forward", fails)
    args = TINY + ["--steps", "1", "--out", str(tmp_path / "run")]
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert "--micro-batch" in error_of(capsys, args, 1)
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        train.cli(args)


def test_help_names_presets_and_the_defaults_that_count(capsys):
    with pytest.raises(SystemExit) as leaving:
        train.cli(["--model", "melomotion", "--preset", "fast", "--device", "cpu", "--help"])
    said = capsys.readouterr().out
    assert leaving.value.code == 0 and ", ".join(melomotion.PRESETS) in said
    assert re.search(r"--steps N[^-]*188", said)


@pytest.mark.parametrize("name", FAMILIES)
def test_bench_and_bfloat16_run(name, tmp_path, capsys):
    train.main(FAMILIES[name][0] + ["--bench", "--dtype", "bfloat16", "--out", f"{tmp_path}/never"])
    said = capsys.readouterr().out
    assert re.search(r"bench: [\d.]+ ms a step .* GFLOP a sample .* MFU n/a", said) and "bfloat16" in said
    assert not (tmp_path / "never").exists()


def test_recomputing_activations_is_not_the_models_work():
    cfg = moog.Config(**moog.PRESETS["tiny"])
    batch = dict(video=torch.zeros(1, 4, 3, 64, 64))
    flops = [train.count_flops(moog.MooG, replace(cfg, checkpoint=flag), batch) for flag in (False, True)]
    assert flops[0] == flops[1] > 0


def test_an_unprintable_path_ends_no_run(tmp_path):
    run(*SQUARES, "--steps", "1", "--out", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))


def test_training_on_videos_and_on_frames(tmp_path):
    encode(tmp_path / "clip.mp4", CONSTANT[:60], size=(256, 256))
    (tmp_path / "frames").mkdir()
    for n in range(0, 90, 15):
        iio.imwrite(tmp_path / "frames" / f"drive_{n:04d}.png", np.full((40, 60, 3), 2 * n, np.uint8))
    for name, workers in (("clip.mp4", "1"), ("frames", "0")):
        train.main(TINY + ["--data", str(tmp_path / name), "--workers", workers, "--steps", "2",
                           "--out", f"{tmp_path}/out-{workers}"])
        last = log(tmp_path / f"out-{workers}")[-1]
        assert last["step"] == 2 and "shuffled" in last["held_out"]["2-2cos, mean"]
        train.main(TINY_MOOG + ["--data", str(tmp_path / name), "--workers", workers, "--steps", "2",
                                "--stride", "2", "--out", f"{tmp_path}/moog-{workers}"])
        assert log(tmp_path / f"moog-{workers}")[-1]["held_out"]["PSNR in dB, t >= 1"]["predicted"] > 3
    data.show(str(tmp_path / "clip.mp4"), str(tmp_path / "look.png"))
    assert iio.imread(tmp_path / "look.png").shape[0] > 100


def test_loader_start_methods_agree(tmp_path):
    encode(tmp_path / "clip.mp4", CONSTANT[:60], size=(256, 256))
    batches, loaded = [[0, 1], [2, 3]], []
    for method, workers in ((None, 0), ("fork", 2), ("spawn", 1)):
        loader = data.make_loader(str(tmp_path / "clip.mp4"), SMALL.inputs, batches, workers=workers)
        loader.loader.multiprocessing_context = method
        loaded.append(list(loader))
    for other in loaded[1:]:
        for a, b in zip(loaded[0], other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_images_of_other_kinds_are_read_right(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    iio.imwrite(tmp_path / "grey.png", grey)
    iio.imwrite(tmp_path / "deep.png", grey.astype(np.uint16) * 256 + 7)
    iio.imwrite(tmp_path / "alpha.png", np.dstack([grey, grey, grey, np.full_like(grey, 200)]))
    for name in ("grey.png", "deep.png", "alpha.png"):
        assert np.array_equal(data.read_image(tmp_path / name), np.dstack([grey, grey, grey])), name


def test_an_error_with_workers_running_still_ends(tmp_path):
    script = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import data\n"
              "loader = iter(data.make_loader('scenes', dict(frames=2, size=16), [range(2)] * 9, workers=1,"
              " scenes=data.SceneOptions(textures=3)))\nnext(loader); raise RuntimeError('a bug')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().endswith("RuntimeError: a bug"), done.stderr


# ---- metrics and labelled data -------------------------------------------------------------------
METRICS = np.load(HERE / "reference" / "metrics.npz")


def metric_case(*names):
    return [METRICS["_".join(names) + f"_{x}"] for x in ("pred", "gt")]


@pytest.mark.parametrize("case", ["sparse", "large", "boundary", "boundary5pct"])
def test_flow_metrics_equal_the_reference(case):
    pred, target = metric_case("flow", case)
    valid, scores = METRICS[f"flow_{case}_valid"], METRICS[f"flow_{case}_scores"]
    close([evaluate.end_point_error(pred, target, valid), evaluate.fl_all(pred, target, valid)], scores, 1e-9)
    close([evaluate.end_point_error(pred, target), evaluate.fl_all(pred, target)], scores, 1e-9)


@pytest.mark.parametrize("case", ["camvid", "ignore255", "absent_both", "absent_gt_or_pred",
                                  "one_image_all_void", "single_class_perfect"])
def test_mean_iou_equals_the_reference(case):
    classes, ignored, *scores = METRICS[f"miou_{case}_scores"].tolist()
    miou, per_class, right = evaluate.mean_iou(*metric_case("miou", case), int(classes), int(ignored))
    close([miou, right], scores, 1e-9)
    expected = torch.as_tensor(METRICS[f"miou_{case}_iou"])
    assert (per_class.isnan() == expected.isnan()).all()
    close(per_class.nan_to_num(-1), expected.nan_to_num(-1), 1e-9)


@pytest.mark.parametrize("mode", ["first", "strided"])
@pytest.mark.parametrize("case", ["2", "3", "5"])
def test_tracking_metrics_equal_tapvids(case, mode):
    of = {name: METRICS[f"tapvid_{case}_{name}"] for name in (
        "query_points", "gt_occluded", "gt_tracks", "pred_occluded", "pred_tracks", mode)}
    inputs = (of["pred_tracks"], ~of["pred_occluded"], of["gt_tracks"], ~of["gt_occluded"],
              of["query_points"][..., 0].astype(int), mode)
    scores = evaluate.tracking_metrics(*inputs)
    ours = {"average_pts_within_thresh": "delta_avg"} | {
        f"pts_within_{n}": f"delta_{n}" for n in (1, 2, 4, 8, 16)}
    for name, expected in zip(METRICS["tapvid_names"].tolist(), of[mode], strict=True):
        close(scores[ours.get(name, name)], expected, 1e-9)
    close(evaluate.average_jaccard(*inputs), scores["average_jaccard"], 0)


@pytest.mark.parametrize("case", ["radial", "smooth", "rubberwhale"])
def test_flow_colours_are_middleburys(case):
    close(evaluate.colour_wheel(), METRICS["colour_wheel"], 0)
    flow, fastest = METRICS[f"colour_{case}_flow"], float(METRICS[f"colour_{case}_fastest"])
    for turned in (flow, torch.from_numpy(flow).permute(2, 0, 1)):
        picture = evaluate.flow_to_color(turned, fastest)
        assert picture.dtype == np.uint8
        close(picture.astype(int), METRICS[f"colour_{case}_rgb"].astype(int), 1)


def test_depth_and_box_metrics_by_hand():
    depth, target = [[1.0, 2.0], [3.0, 9.0]], [[2.0, 2.0], [2.5, 0.0]]          # 0: not measured
    scores = evaluate.depth_metrics(depth, target)
    assert evaluate.abs_rel(depth, target) == scores["abs_rel"] == pytest.approx((0.5 + 0 + 0.2) / 3)
    assert scores["rmse"] == pytest.approx(((1 + 0.25) / 3) ** 0.5)
    assert scores["delta_1.25"] == pytest.approx(2 / 3)
    boxes, target = [[0, 0, 2, 4], [0, 0, 1, 1], [5, 5, 5, 5]], [[1, 2, 3, 6], [2, 2, 3, 3], [5, 5, 5, 5]]
    close(evaluate.box_iou(boxes, target), [2 / 14, 0, 0], 1e-12)


def test_flow_files_equal_the_reference(tmp_path):
    flo, png = tmp_path / "a.flo", tmp_path / "a%02d.png"           # FFmpeg must not take % for a pattern
    flo.write_bytes(METRICS["flo_bytes"].tobytes())
    assert np.array_equal(data.read_flo(flo), METRICS["flo_flow"])
    data.write_flo(tmp_path / "b.flo", METRICS["flo_flow"])
    assert (tmp_path / "b.flo").read_bytes() == flo.read_bytes()
    png.write_bytes(METRICS["kitti_bytes"].tobytes())
    flow, valid = data.read_kitti_flow(png)
    assert np.array_equal(flow, METRICS["kitti_flow"]) and np.array_equal(valid, METRICS["kitti_valid"])
    assert flow.dtype == data.read_flo(flo).dtype == np.float32
    write_kitti_flow(tmp_path / "b.png", flow, valid)
    again, known = data.read_kitti_flow(tmp_path / "b.png")
    assert np.array_equal(flow, again) and np.array_equal(valid, known)
    edges = np.array([[[-512, 2**15 / 64 - 1 / 64], [1 / 64, -1 / 64]]])        # every bit of the two bytes
    write_kitti_flow(png, edges, [[True, True]])
    assert np.array_equal(data.read_kitti_flow(png)[0], edges)


def write_kitti_flow(path, flow, valid):
    """Flow (H, W, 2) in pixels and valid (H, W) -> KITTI's PNG: 64 * flow + 2^15 in 16 bits."""
    valid = np.asarray(valid, bool)[..., None]
    steps = np.rint(np.where(valid, flow, 0) * 64.0 + 2**15)
    pixels = np.concatenate([steps, valid], -1).astype(np.uint16)
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = valid.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb48be", Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le").reformat(format="rgb48be")
    path.write_bytes(b"".join(map(bytes, encoder.encode(frame) + encoder.encode(None))))


def write_pfm(path, flow, order="<"):
    rows = np.concatenate([flow, np.full_like(flow[..., :1], 7)], -1)[::-1].astype(f"{order}f4")
    head = f"PF\n{flow.shape[1]} {flow.shape[0]}\n{'-' * (order == '<')}1.0\n"
    path.write_bytes(head.encode() + rows.tobytes())


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_runs_from_the_bottom_up(tmp_path, order):
    flow = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    write_pfm(tmp_path / "a.pfm", flow, order)
    assert np.array_equal(data.read_pfm(tmp_path / "a.pfm"), flow)


FLO, PNG = METRICS["flo_bytes"].tobytes(), METRICS["kitti_bytes"].tobytes()


@pytest.mark.parametrize("name, content, word", [
    ("short.flo", FLO[:-1], "cut short"), ("long.flo", FLO + b"x", "there are 2573"),
    ("sign.flo", FLO[:4] + b"\xff" * 4 + FLO[8:], "damaged"), ("magic.flo", b"X" + FLO[1:], "begin"),
    ("huge.flo", FLO[:4] + b"\xff\xff\xff\x7f" * 2 + FLO[12:], "damaged"), ("empty.flo", b"", "begin"),
    ("eight.png", iio.imwrite("<bytes>", np.zeros((4, 4, 3), np.uint8), extension=".png"), "16 bits"),
    ("short.png", PNG[:-40], "cut short"), ("bits.png", PNG[:900] + b"\0\0" + PNG[902:], "damaged"),
    ("text.png", b"hello", "16 bits"), ("grey.pfm", b"Pf\n1 1\n-1\n1234", "three channels"),
    ("short.pfm", b"PF\n2 1\n-1\n" + b"1234" * 5, "need 24 bytes")])
def test_broken_flow_files_are_named_in_one_line(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    read = {"flo": data.read_flo, "png": data.read_kitti_flow, "pfm": data.read_pfm}[name[-3:]]
    with pytest.raises(ValueError, match=f"{name}: .*{word}") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def put(path, value, size=(4, 6)):
    """Writes an image of one colour, or an array as it is, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = value if isinstance(value, np.ndarray) else np.full((*size, 3), value, np.uint8)
    iio.imwrite(path, image, plugin="pillow")
    return path


def sample_flow(value=0):
    flow = np.arange(48, dtype=np.float32).reshape(4, 6, 2) / 64 + value
    flow[1, 2, 0] = np.nan
    flow[3, 0, 1] = 1e10
    return flow


def write_flow_layout(root, layout):
    """A tiny data set: three pairs, the frames of pair k of colours 2 k and 2 k + 1, its flow from k on."""
    known = (abs(sample_flow()) < 1e9).all(-1)
    for k in range(3):
        flow, image = sample_flow(k), lambda name, t: put(root / name, 2 * k + t)
        if layout == "yours":
            image(f"a/{k}/frame1.png", 0), image(f"a/{k}/frame2.png", 1)
            if k:
                data.write_flo(root / f"a/{k}/flow.flo", flow)
            else:
                write_kitti_flow(root / f"a/{k}/flow.png", flow, known)
        elif layout == "sintel":
            scene, at = ("alley_1", "temple_2", "temple_3")[k], root / "training"
            for t in (0, 1):
                image(f"training/clean/{scene}/frame_{9 + t:04d}.png", t)
            put(at / f"invalid/{scene}/frame_0009.png", np.uint8(255 * (np.indices((4, 6)).sum(0) == 8)))
            (at / f"flow/{scene}").mkdir(parents=True)
            data.write_flo(at / f"flow/{scene}/frame_0009.flo", flow)
        elif layout == "chairs":
            image(f"data/{k + 1:05d}_img1.ppm", 0), image(f"data/{k + 1:05d}_img2.ppm", 1)
            data.write_flo(root / f"data/{k + 1:05d}_flow.flo", flow)
            (root / "FlyingChairs_train_val.txt").write_text("1\n2\n2\n")
        elif layout == "things":
            part = ("TRAIN", "TEST", "TEST")[k]
            for t in (0, 1):
                image(f"frames_cleanpass/{part}/A/000{k}/left/{6 + t:04d}.png", t)
            for number in (6, 7):                               # the last frame has flow to where no frame is
                at = root / f"optical_flow/{part}/A/000{k}/into_future/left"
                at.mkdir(parents=True, exist_ok=True)
                write_pfm(at / f"OpticalFlowIntoFuture_{number:04d}_L.pfm", flow)
        else:
            image(f"training/{layout}/{k:06d}_10.png", 0), image(f"training/{layout}/{k:06d}_11.png", 1)
            (root / "training/flow_occ").mkdir(exist_ok=True)
            write_kitti_flow(root / f"training/flow_occ/{k:06d}_10.png", flow, known)


@pytest.mark.parametrize("layout", ["yours", "sintel", "chairs", "things", "image_2", "colored_0"])
def test_flow_pairs_of_each_layout(tmp_path, layout, capfd):
    write_flow_layout(tmp_path, layout)
    pairs = data.FlowPairs(tmp_path, "all")
    assert len(pairs) == len(set(pairs.names)) == 3
    valid = np.ones((4, 6), bool)
    valid[1, 2] = valid[3, 0] = False
    valid[3, 5] = layout != "sintel"
    for k, pair in enumerate(sorted(pairs, key=lambda pair: pair["frames"].sum())):
        assert pair["frames"].dtype == np.uint8 and pair["flow"].dtype == np.float32
        assert pair["frames"].shape == (2, 4, 6, 3)
        assert pair["frames"][:, 1, 2, 0].tolist() == [2 * k, 2 * k + 1]
        assert np.array_equal(pair["valid"], valid)
        assert np.array_equal(pair["flow"], np.where(valid, sample_flow(k).transpose(2, 0, 1), 0))
    parts = {part: [pair["frames"][0, 0, 0, 0] for pair in data.FlowPairs(tmp_path, part)]
             for part in ("train", "val")}
    split = layout in ("sintel", "chairs", "things")
    assert parts == (dict(train=[0], val=[2, 4]) if split else dict(train=[0, 2, 4], val=[0, 2, 4]))
    assert ("left out 3 flows without both frames" in capfd.readouterr().err) == (layout == "things")


@pytest.mark.parametrize("name, content, word", [
    ("yours/a/1/frame2.png", np.zeros((4, 5, 3), np.uint8), "size of"),
    ("yours/a/1/flow.flo", FLO, r"the flow is \[20, 16\]"), ("yours/a/1/frame1.png", b"no image", "can't be read"),
    ("chairs/FlyingChairs_train_val.txt", b"1\n2\n", "pair 00003"),
    ("chairs/FlyingChairs_train_val.txt", b"1\n1\n1\n", "no pairs of split 'val'"),
    ("none/a.txt", b"", "no flow with its two frames")])
def test_flow_pairs_say_what_is_wrong(tmp_path, name, content, word):
    layout = name.split("/")[0]
    (tmp_path / layout).mkdir()
    if layout != "none":
        write_flow_layout(tmp_path / layout, layout)
    put(tmp_path / name, content) if isinstance(content, np.ndarray) else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=word):
        data.FlowPairs(tmp_path / layout)[1]


# layout: (image, label) of split and name, values in the labels, the classes they mean, number of classes
SEGMENTED = {
    "camvid": ("{s}/{n}.jpg", "{s}annot/{n}.png", [0, 10, 11], [0, 10, 255], 11),
    "cityscapes": ("leftImg8bit/{s}/bonn/{n}_leftImg8bit.png", "gtFine/{s}/bonn/{n}_gtFine_labelTrainIds.png",
                   [0, 18, 255], [0, 18, 255], 19),
    "cityscapes ids": ("leftImg8bit/{s}/bonn/{n}_leftImg8bit.png", "gtFine/{s}/bonn/{n}_gtFine_labelIds.png",
                       [7, 33, 14], [0, 18, 255], 19),
    "bdd": ("images/10k/{s}/{n}.jpg", "labels/sem_seg/masks/{s}/{n}.png", [0, 18, 255], [0, 18, 255], 19),
    "ade": ("images/{s}/{n}.jpg", "annotations/{s}/{n}.png", [1, 150, 0], [0, 149, 255], 150),
    "yours": ("images/{s}/deep/{n}.jpg", "labels/{s}/deep/{n}.png", [0, 4, 255], [0, 4, 255], 5)}


def label(values):
    """A label (4, 6) of the first value, but for the second at row 1, column 4 and the third in row 3."""
    image = np.full((4, 6), values[0], np.uint8)
    image[1, 4], image[3] = values[1:]
    return image


@pytest.mark.parametrize("layout", SEGMENTED)
def test_segmentation_of_each_layout(tmp_path, layout, capfd):
    image, truth, values, classes, num_classes = SEGMENTED[layout]
    names = dict(train="training", val="validation") if layout == "ade" else dict(train="train", val="val")
    for k, (split, folder) in enumerate(names.items()):
        for n in range(2 + k):
            put(tmp_path / image.format(s=folder, n=f"x{n}"), 40 * k + 10 * n)
            if n < 2:
                used = values if split == "val" else [values[0], values[0], values[2]]    # the scan sees both
                put(tmp_path / truth.format(s=folder, n=f"x{n}"), label(used))
    train_set, val_set = (data.Segmentation(tmp_path, split) for split in names)
    assert "left out 1 images without label" in capfd.readouterr().err and len(train_set) == len(val_set) == 2
    assert train_set.num_classes == num_classes and "x1" in os.path.basename(train_set.files[1][0])
    assert train_set.names is None if layout in ("ade", "yours") else len(train_set.names) == num_classes
    sample = val_set[1]
    assert sample["image"].shape == (4, 6, 3) and abs(sample["image"].astype(int) - 50).max() <= 2
    assert sample["classes"].dtype == np.int64 and np.array_equal(sample["classes"], label(classes))
    with pytest.raises(ValueError, match="has no split 'test', only train, val"):
        data.Segmentation(tmp_path, "test")


def test_segmentation_without_splits_validates_on_every_fifth(tmp_path):
    for n in range(11):
        put(tmp_path / f"images/{n // 6}/{n:02d}.png", n)
        put(tmp_path / f"labels/{n // 6}/{n:02d}.png", np.full((4, 6), n, np.uint8))
    parts = {split: data.Segmentation(tmp_path, split) for split in ("train", "val")}
    assert [s["image"][0, 0, 0] for s in parts["val"]] == [s["classes"][0, 0] for s in parts["val"]] == [4, 9]
    assert [s["classes"][0, 0] for s in parts["train"]] == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert parts["train"].num_classes == parts["val"].num_classes == 11
    ignoring = data.Segmentation(tmp_path, "train", num_classes=12, ignore_index=3)
    assert ignoring.num_classes == 12 and ignoring[3]["classes"][0, 0] == 255
    assert data.Segmentation(tmp_path, "train", ignore_index=10).num_classes == 10


def write_png(path, values, bits, kind):
    """A PNG of a few bits a pixel; kind 0: grey, 3: a palette of colours."""
    rows = [np.unpackbits(np.uint8(row)[:, None], axis=1)[:, 8 - bits:].ravel() for row in values]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    head = len(values[0]).to_bytes(4, "big") + len(values).to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", head), (b"PLTE", bytes([200, 0, 0, 0, 90, 0, 0, 0, 70])),
                       (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        if name != b"PLTE" or kind == 3:
            content += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("bits, kind", [(1, 0), (2, 0), (4, 0), (8, 0), (2, 3), (8, 3)])
def test_labels_are_numbers_neither_colours_nor_shades(tmp_path, bits, kind):
    values = [[0, 1, 0, 1]] * 3 if bits == 1 else [[0, 1, 2, 1]] * 3
    put(tmp_path / "images/train/a.png", 9, (3, 4))
    write_png(tmp_path / "labels/train/a.png", values, bits, kind)
    labelled = data.Segmentation(tmp_path)
    assert labelled.num_classes == np.max(values) + 1 and labelled[0]["classes"].tolist() == values


def turned_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "jpeg", exif=exif)
    return content.getvalue()


GOOD = np.arange(24, dtype=np.uint8).reshape(4, 6) % 2


@pytest.mark.parametrize("name, content, options, word", [
    ("labels/train/a.png", GOOD * 7, dict(num_classes=5), "value 7"),
    ("labels/train/a.png", GOOD.T, {}, r"is \[6, 4\]"),
    ("labels/train/a.png", GOOD.astype(np.uint16), {}, "8 bits"),
    ("labels/train/a.png", np.zeros((4, 6, 3), np.uint8), {}, "RGB"), ("labels/train/a.png", b"no", {}, "damaged"),
    ("labels/train/a.png", GOOD * 255, {}, "two classes"),
    ("labels/train/a.png", GOOD * 255, dict(num_classes=2), "two classes"),
    ("images/train/a.jpg", turned_image, {}, "EXIF"), ("images/train/a.jpg", None, {}, "none of its 0"),
    ("labels/train/a.png", GOOD, dict(num_classes=300), "--classes"), ("x", GOOD, dict(split="val"), "no split"),
    ("images", None, {}, "known layout")])
def test_wrong_labels_are_named_in_one_line(tmp_path, name, content, options, word):
    put(tmp_path / "images/train/a.jpg", 9, (4, 4) if callable(content) else (4, 6))
    put(tmp_path / "labels/train/a.png", GOOD[:, :4] if callable(content) else GOOD)
    path = tmp_path / name
    content = content() if callable(content) else content
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        put(path.with_suffix(".png"), content)
    with pytest.raises(ValueError, match=word) as error:
        data.Segmentation(tmp_path, **options)[0]
    assert "\n" not in str(error.value)


def write_rgbd(folder, frames=4):
    for t in range(frames):
        put(folder / f"rgb_{t:02d}.png", 10 * t)
        depth = np.arange(24, dtype=np.uint16).reshape(4, 6) * 300 + t        # needs 16 bits
        put(folder / f"depth_{t:02d}.png", depth)
    tracks = np.random.default_rng(0).uniform(0, 4, (3, 4, 2)).astype(np.float32)
    tracks[1, 2] = np.nan
    np.savez(folder / "tracks.npz", tracks=tracks, query_frame=np.array([0, 0, 2]),
             status=np.array([[0, 0, 1, 2], [0, 0, 1, 0], [0, 1, 0, 0]], np.int8))
    return tracks


def test_rgbd_clips(tmp_path):
    tracks = write_rgbd(tmp_path / "clips/a")
    write_rgbd(tmp_path / "clips/b")
    clips = data.PointTracks(tmp_path / "clips")
    assert clips.names == ["a", "b"] and data.PointTracks(tmp_path / "clips/a").names == ["a"]
    clip = clips[0]
    assert clip["video"].shape == (4, 4, 6, 3) and clip["video"][:, 2, 5, 0].tolist() == [0, 10, 20, 30]
    assert clip["depth"].dtype == np.float32 and clip["depth"][3, 2, 5] == np.float32(17 * 300 + 3) / 1000
    visible = [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]]      # (T, P): before its query nothing is known
    assert clip["visible"].tolist() == (np.array(visible) > 0).tolist()
    valid = [[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert clip["valid"].dtype == bool and clip["valid"].tolist() == (np.array(valid) > 0).tolist()
    expected = np.where(clip["visible"][..., None], tracks.transpose(1, 0, 2), 0)
    assert np.array_equal(clip["tracks"], expected) and clip["tracks"].dtype == np.float32
    assert clip["query_frames"].tolist() == [0, 0, 2] and clip["query_frames"].dtype == np.int64
    os.remove(tmp_path / "clips/b/depth_03.png")
    with pytest.raises(ValueError, match="4 images rgb_00.jpg, ... and 3 depth_00.png"):
        clips[1]
    os.remove(tmp_path / "clips/a/rgb_03.png"), os.remove(tmp_path / "clips/a/depth_03.png")
    with pytest.raises(ValueError, match="tracks.npz: .*through 4 frames, but the video has 3"):
        clips[0]
    for t in range(3):
        os.remove(tmp_path / f"clips/b/depth_{t:02d}.png")
    assert "depth" not in clips[1]


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["davis", "stacking", "kinetics", "shards"])
def test_tapvid_pickles(tmp_path, kind, protocol):
    video = np.zeros((3, 8, 16, 3), np.uint8)
    video[1] = 50
    points = np.array([[[0.25, 0.5]] * 3, [[0.5, 0.25]] * 3, [[0, 0]] * 3])                     # (P, T, 2)
    clip = dict(video=video, points=points, occluded=np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0]], bool))
    if kind in ("kinetics", "shards"):
        jpegs = [iio.imwrite("<bytes>", image, extension=".jpeg") for image in video]
        clip["video"] = np.array(jpegs) if kind == "shards" else jpegs
    content = pickle.dumps({"dogs": clip} if kind == "davis" else [clip], protocol)
    if protocol == 2:                                           # as numpy 1 writes it
        content = content.replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "a.pkl").write_bytes(content)
    if kind == "shards":
        (tmp_path / "b.pkl").write_bytes(content)
    tapvid = data.PointTracks(tmp_path if kind == "shards" else tmp_path / "a.pkl")
    assert tapvid.names == dict(davis=["dogs"], shards=["0", "1"]).get(kind, ["0"])
    sample = tapvid[len(tapvid) - 1]
    assert abs(sample["video"].astype(int) - video).max() <= 1 and sample["valid"].all()
    assert sample["visible"].T.tolist() == [[False, True, False], [True, True, True]]   # one is never seen
    assert sample["tracks"][1].tolist() == [[3.5, 3.5], [-0.5, -0.5]] and not sample["tracks"][0, 0].any()
    assert sample["query_frames"].tolist() == [1, 0] and sample["tracks"].dtype == np.float32


@pytest.mark.parametrize("content, word", [
    (np.array([None]), "not of numbers"), (np.zeros(2, "i4,O"), "not of numbers"), (eval, "eval"),
    (np.load, "refused"), (bytearray(3), "refused"), ([3], ""), ({"a": {"video": 0}}, "TAP-Vid"), ([], "TAP-Vid"),
    ([dict(video=np.zeros((3, 2, 2, 3), np.uint8), points=np.zeros((1, 2, 2)), occluded=np.zeros((1, 2)))],
     "2 frames, but the video has 3")])
def test_pickles_of_anything_else_are_refused(tmp_path, content, word):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=f"a.pkl: .*{word}") as error:
        data.PointTracks(tmp_path / "a.pkl")[0]
    assert "\n" not in str(error.value)


def test_pickles_can_call_nothing(tmp_path):
    evil, path = Evil(), tmp_path / "evil.pkl"
    evil.mark = tmp_path / "executed"
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match="system"):
        data.PointTracks(path)
    assert not evil.mark.exists()
    pickle.loads(pickle.dumps(evil))
    assert evil.mark.exists()                                   # it would have been


def test_marked_joints_belong_to_the_frames_of_their_clip(tmp_path):
    clip = encode(tmp_path / "clip.mp4", CONSTANT[:9])
    tracks = np.random.default_rng(0).uniform(0, 60, (3, 9, 2)).astype(np.float32)
    annotated = np.zeros((3, 9), bool)
    annotated[0, [1, 6]] = annotated[2, [4]] = True
    tracks[~annotated] = np.nan
    np.savez(tmp_path / "joints.npz", tracks=tracks, annotated=annotated)
    points = data.PointTracks(tmp_path / "joints.npz", video=clip)
    sample = points[0]
    assert points.names == ["joints"] and [number(image) for image in sample["video"]] == list(range(9))
    assert np.array_equal(sample["visible"], annotated[[0, 2]].T)
    assert np.array_equal(sample["valid"], sample["visible"]) and sample["query_frames"].tolist() == [1, 4]
    assert np.array_equal(sample["tracks"], np.nan_to_num(tracks[[0, 2]]).transpose(1, 0, 2))
    with pytest.raises(ValueError, match="joints.npz: points are tracked through 9 frames.*has 8"):
        data.PointTracks(tmp_path / "joints.npz", encode(tmp_path / "short.mp4", CONSTANT[:8]))[0]


@pytest.mark.parametrize("names, kind, word", [
    (["nowhere"], FileNotFoundError, "nowhere"), (["nowhere.pkl"], FileNotFoundError, "nowhere"),
    (["."], ValueError, "no clip"), (["a.txt"], ValueError, "neither"), (["a.npz"], ValueError, "give video"),
    (["a.npz", "no.mp4"], FileNotFoundError, "no.mp4"), (["a.npz", "a.txt"], ValueError, "Invalid data"),
    (["b.npz", "a.txt"], ValueError, "no array 'annotated'")])
def test_point_tracks_say_what_is_wrong(tmp_path, names, kind, word):
    (tmp_path / "a.txt").write_text("hello")
    np.savez(tmp_path / "a.npz", tracks=np.zeros((1, 2, 2)), annotated=np.ones((1, 2), bool))
    np.savez(tmp_path / "b.npz", tracks=np.zeros((1, 2, 2)))
    with pytest.raises(kind, match=word):
        data.PointTracks(*(tmp_path / name for name in names))[0]


def test_box_tracks(tmp_path):
    for t in (2, 10, 9):                                        # by number, not by name
        put(tmp_path / f"a/b/{t}.png", t)
    put(tmp_path / "a/b/cover.png", 0)
    (tmp_path / "a/b/boxes_xyxy.txt").write_text("0.5 1 2 3\n1,2,3,4\n2, 3\t4 5\n\n")
    boxes = data.BoxTracks(tmp_path)
    assert boxes.names == ["a/b"] and data.BoxTracks(tmp_path / "a/b").names == ["b"]
    assert boxes[0]["video"][:, 0, 0, 0].tolist() == [2, 9, 10] and boxes[0]["video"].shape == (3, 4, 6, 3)
    assert boxes[0]["boxes"].tolist() == [[0.5, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    for text, word in (("1 2 3 4\n", "1 boxes for 3"), ("1 2 3 4\n5 6 2 2\n", "line 2"), ("1 2 3\n", "line 1"),
                       ("1 2 x 4\n", "'x'"), ("", "0 boxes")):
        (tmp_path / "a/b/boxes_xyxy.txt").write_text(text)
        with pytest.raises(ValueError, match=f"boxes_xyxy.txt: .*{word}"):
            boxes[0]


def test_worker_counts_have_a_bound():
    with pytest.raises(ValueError, match="--workers 10000"):
        data.make_loader("scenes", dict(frames=2, size=16), [], workers=10000)


# ---- evaluation: MooG -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def moog_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("moog") / "run"
    train.main(TINY_MOOG + ["--steps", "1", "--out", str(out), "--scene-radius", "0.2", "0.3"])
    return out


@pytest.fixture
def few(monkeypatch):
    """MooG's readouts on few clips."""
    for name, value in dict(POOL=6, TESTS=32, POINTS=6, QUERIES=4, PCA_CLIPS=3).items():
        monkeypatch.setattr(evaluate, name, value)


def test_eval_paints_tokens(moog_run, tmp_path, few, capsys):
    evaluate.main([str(moog_run), "--task", "tokens", "--out", str(tmp_path)])
    [row] = json.loads((tmp_path / "results.json").read_text())["tokens"]["tables"].popitem()[1]
    assert all(0 <= row[name] <= 1 for name in row if name) and len(row) == 4
    assert iio.imread(tmp_path / "tokens.png").shape[1] > 400
    assert iio.imread(tmp_path / "tokens.gif", index=None).shape[0] == 8
    assert "where the point went" in capsys.readouterr().out
    encode(tmp_path / "clip.mp4", CONSTANT[:60], size=(40, 30))
    evaluate.main([str(moog_run / "ckpt.pt"), "--task", "tokens", "--data", str(tmp_path / "clip.mp4"),
                   "--out", str(tmp_path / "video")])
    assert {p.name for p in (tmp_path / "video").iterdir()} == {
        "results.json", "tokens.png", "tokens.gif", "tokens_single.png", "tokens_pca.png"}


@torch.no_grad()
def test_top_tokens_are_the_attentions_argmax(moog_run):
    model, *_ = evaluate.load(moog_run)
    states = model.unroll(torch.rand(2, 3, 3, 16, 16)).predicted
    attention = model.decode(states, (16, 16), return_attention=True)[1]
    assert (evaluate.top_tokens(model, states, (16, 16)) == attention.mean(2).argmax(-1)).all()


@torch.no_grad()
@pytest.mark.parametrize("follows", [True, False])
def test_follow_tells_tokens_of_things_from_tokens_of_places(moog_run, monkeypatch, follows):
    model, _, config, _ = evaluate.load(moog_run)
    options = config["scenes"] | dict(size=16, frames=8, split="eval", seed=0)
    ids = Scenes(**options).batch(range(1000, 1064), truth=True)["ids"].flatten(2)
    monkeypatch.setattr(evaluate, "top_tokens", lambda model, states, size, index: (
        ids.gather(2, index) if follows else index))
    went, was, other = evaluate.follow(model, config, argparse.Namespace(seed=0, device="cpu"))
    if follows:                                     # one token a sprite; rounded tracks miss some at the rim
        assert went > 0.75 and was < 0.2 and 0.1 < other < 0.9
    else:                                           # one token a pixel
        assert was == 1 and went < 0.35


def moog_tables(run, task, out, *more):
    evaluate.main([str(run), "--task", task, "--steps", "2", "--batch-size", "2", "--out", str(out), *more])
    tables = json.loads((out / "results.json").read_text())[task]["tables"]
    assert len(tables) == 1 and 400 < iio.imread(out / f"{task}.png").shape[1] <= 1600
    [rows] = tables.values()
    assert all(np.isfinite([cell for name, cell in row.items() if name]).all() for row in rows)
    return {row[""]: row for row in rows}


def eval_lessons(run, task="points", path="scenes"):
    model, _, config, _ = evaluate.load(run)
    return evaluate.Lessons(model, config, argparse.Namespace(
        seed=0, device=torch.device("cpu"), data=str(path), stride=1), task)


def test_eval_points(moog_run, tmp_path, few):
    rows = moog_tables(moog_run, "points", tmp_path)
    assert set(rows["delta_avg"]) == {"", "this model", "random init", "stays put"} and len(rows) == 7
    tests = eval_lessons(moog_run).tests                        # by hand: how near points are to their query
    near, away = [], []
    both = (torch.cat([test[name] for test in tests]) for name in ("tracks", "visible"))
    for tracks, visible in zip(*both):
        gone = [256 * (tracks[t, p] - tracks[0, p]).norm().item()
                for t in range(1, 8) for p in range(6) if visible[t, p]]
        near += [np.mean([[d < n for d in gone] for n in (1, 2, 4, 8, 16)])] if gone else []
        away += [np.mean(gone)] if gone else []
    close(rows["delta_avg"]["stays put"], np.mean(near), 1e-6)
    close(rows["mean distance, pixels"]["stays put"], np.mean(away), 1e-3)
    assert moog_tables(moog_run, "points", tmp_path / "tuned", "--finetune")


def test_eval_boxes(moog_run, tmp_path, few):
    rows = moog_tables(moog_run, "boxes", tmp_path)
    overlap = []
    for test in eval_lessons(moog_run, "boxes").tests:
        for box, inside in zip(test["boxes"], test["inside"]):
            overlap += [evaluate.box_iou(box[0, k], box[t, k]).item() for t in range(1, 8)
                        for k in range(box.shape[1]) if inside[0, k] and inside[t, k]]
    close(rows["mean, frames after the query"]["keeps its first box"], np.mean(overlap), 1e-6)


def test_eval_depth_and_longer_clips(moog_run, tmp_path, few):
    rows = moog_tables(moog_run, "depth", tmp_path)
    target = torch.cat([test["depth"] for test in eval_lessons(moog_run, "depth").tests])[:, 3::4].double()
    close(rows["AbsRel"]["median"], ((1 - target) / target).mean(), 1e-6)      # most is background: at 1
    rows = moog_tables(moog_run, "unroll", tmp_path)
    assert list(rows) == ["t = 1-7", "t = 8-15", "t = 16-23", "t = 24-35"] and len(rows["t = 1-7"]) == 6


def test_perfect_tracks_score_one_and_readouts_begin_at_their_query(moog_run, few):
    [test, *_] = eval_lessons(moog_run).tests
    scores = evaluate.point_scores(test["tracks"], test["visible"], test["visible"], test)
    for name in ("average Jaccard", "occlusion accuracy", "delta_avg"):
        assert scores[name].nanmean() == 1, name
    readout = evaluate.tracker(moog.PointReadout, tiny_moog().cfg)
    torch.nn.init.zeros_(readout.values[-1].weight)
    queries = torch.rand(2, 5, 2)
    out = evaluate.answers(readout, torch.rand(2, 3, 6, 16), queries)
    close(out.values.detach(), queries[:, None].expand(-1, 3, -1, -1), 1e-6)


@pytest.fixture
def labelled(tmp_path):
    """Three RGB-D clips of ten frames whose red says x and green y, with points that stand still; a box."""
    y, x = np.mgrid[:24, :32]
    picture = np.stack([8 * x, 8 * y, 0 * x], -1).astype(np.uint8)
    for name in ("a", "b", "c", "boxes"):
        (tmp_path / name).mkdir()
        for t in range(10):
            iio.imwrite(tmp_path / name / f"rgb_{t:02}.png", picture)
            if name != "boxes":
                iio.imwrite(tmp_path / name / f"depth_{t:02}.png", (1000 + 100 * x).astype(np.uint16))
        if name == "boxes":
            (tmp_path / name / "boxes_xyxy.txt").write_text("3 4 12 14\n" * 10)
            continue
        tracks = np.tile(np.array([[4, 5], [20, 12], [9, 18]], np.float32)[:, None], (1, 10, 1))
        np.savez(tmp_path / name / "tracks.npz", tracks=tracks, status=np.zeros((3, 10), np.int8),
                 query_frame=np.array([0, 0, 5]))
    return tmp_path


def test_eval_of_readouts_on_real_clips(moog_run, labelled, tmp_path, few, capsys):
    rows = moog_tables(moog_run, "points", tmp_path / "points", "--data", str(labelled))
    assert "trained on 2 clips, tested on c\n" in capsys.readouterr().out
    assert rows["delta_avg"]["stays put"] == 1 and rows["mean distance, pixels"]["stays put"] == 0
    rows = moog_tables(moog_run, "depth", tmp_path / "depth", "--data", str(labelled))
    assert 0.1 < rows["AbsRel"]["median"] < 0.5
    rows = moog_tables(moog_run, "boxes", tmp_path / "boxes", "--data", str(labelled / "boxes"))
    assert "trained on scenes, tested on boxes\n" in capsys.readouterr().out
    close(rows["mean, frames after the query"]["keeps its first box"], 1, 1e-9)
    for task, path, words in (("points", labelled / "boxes", "no clip in it"),
                              ("boxes", labelled / "a", "boxes_xyxy.txt"),
                              ("depth", labelled / "nowhere", "nowhere")):
        with pytest.raises(SystemExit) as leaving:
            evaluate.cli([str(moog_run), "--task", task, "--data", str(path)])
        assert words in leaving.value.code and "\n" not in leaving.value.code


def test_windows_of_real_clips_keep_points_on_their_pixels(moog_run, labelled, few, monkeypatch):
    monkeypatch.setattr(evaluate, "POOL", 40)
    clips, mirrored = eval_lessons(moog_run, "points", labelled).clips, 0
    assert clips["video"].shape[1:] == (8, 3, 16, 16)
    for b in range(len(clips["video"])):
        frames, tracks = clips["video"][b].float(), clips["tracks"][b]
        mirrored += (frames[0, 0, 0, 0] > frames[0, 0, 0, -1]).item()
        grid = (2 * tracks - 1)[:, None]                        # (T, 1, P, 2)
        red, green, _ = F.grid_sample(frames, grid, align_corners=False)[:, :, 0].unbind(1)
        for p in range(tracks.shape[1]):
            t = clips["query_frames"][b, p]
            assert clips["visible"][b, t, p] and clips["valid"][b, t, p]
            close(min(abs(red[t, p] - 8 * x) + abs(green[t, p] - 8 * y) for x, y in (
                (4, 5), (20, 12), (9, 18))), 0, 6)
    assert 0 < mirrored < len(clips["video"])


def test_eval_says_what_is_wrong(moog_run, moog_files, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("hello")
    for args, words in [
            ([str(tmp_path / "nowhere")], "no checkpoint at"),
            ([str(tmp_path / "nowhere.npz")], "no checkpoint at"),
            ([str(tmp_path / "text.npz")], "not a .npz"),
            ([str(moog_run), "--task", "fly"], "moog has no task 'fly': choose from tokens"),
            ([str(moog_run), "--data", str(tmp_path / "nowhere")], "nowhere")]:
        with pytest.raises(SystemExit) as leaving:
            evaluate.cli(args)
        assert words in leaving.value.code and "\n" not in leaving.value.code


# ---- evaluation: Midway --------------------------------------------------------------------------
TINY_MIDWAY = dict(size=16, patch=4, dim=16, depth=4, heads=2, levels=(1, 2, 4), drop_path=0.0,
                   motion_tokens=3, motion_dim=12, motion_depth=1, motion_heads=3, forward_depth=2,
                   forward_heads=2, head_hidden=8, head_bottleneck=4, prototypes=8, local_size=8,
                   local_crops=1)
SMALL_SCENES = dict(size=24, frames=2, sprites=0, speed=3.0, pan=10.0, zoom=0.0, roll=0.0, radius=(0.15, 0.3),
                    grain=6.0, textures=6, flat=0.0)


@pytest.fixture(scope="module")
def small_midway():
    torch.manual_seed(0)
    model = Midway(Config(**TINY_MIDWAY)).eval()
    with torch.no_grad():                   # zero at the start: positions; a gate at 1/2 is one to be seen
        model.motion_pos.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def midway_file(small_midway, tmp_path_factory):
    """A checkpoint as train.py writes it."""
    path = tmp_path_factory.mktemp("midway") / "ckpt.pt"
    options = vars(train.Options(model="midway", preset="tiny"))
    config = dict(model="midway", preset="tiny", options=options, config=vars(small_midway.cfg),
                  scenes=SMALL_SCENES)
    torch.save(dict(model=small_midway.state_dict(), optimizer={}, step=1, config=config), path)
    return path


def eval_tables(path, out, *flags):
    evaluate.main([str(path), "--out", str(out), "--device", "cpu", *map(str, flags)])
    task = flags[flags.index("--task") + 1]
    tables = json.loads((out / "results.json").read_text())[task]["tables"]
    for rows in tables.values():
        for row in rows:
            assert None not in row.values(), row        # null: not finite
    return tables


def test_perturbation_equals_finite_differences(small_midway):
    """The cosines are those of what a small change of one token does to each predicted token."""
    model, draws = deepcopy(small_midway).double(), 3
    torch.manual_seed(1)
    source, target = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        level = model.predict(source, target)[1]
    token, i = torch.tensor([5, 14]), model.predicted[1]
    heat = evaluate.perturb(model, i, level.m, level.v, token, draws, seed=7)
    assert heat.shape == (2, 16)

    r = torch.randn(draws, 2, 16, generator=torch.Generator().manual_seed(7)).double()
    expected = torch.zeros(2, 16, dtype=torch.float64)
    with torch.no_grad():
        for k in range(draws):
            ahead, behind = level.v.clone(), level.v.clone()
            for b in range(2):
                ahead[b, 1 + token[b]] += 1e-5 * r[k, b]
                behind[b, 1 + token[b]] -= 1e-5 * r[k, b]
            change = (model.predict_forward(i, level.m, ahead)[0] -
                      model.predict_forward(i, level.m, behind)[0])[:, 1:] / 2e-5
            assert (change.norm(dim=-1) > 1e-6).all()           # every token feels it
            expected += F.cosine_similarity(change, r[k][:, None], dim=-1) / draws
    close(heat, expected, 1e-7)


def test_heatmap_of_a_known_shift_peaks_at_the_shifted_token(small_midway, monkeypatch):
    model, grid = deepcopy(small_midway), 4

    def shift(i, m, v):                     # one down, two to the right; CLS stays
        moved = v[:, 1:].unflatten(1, (grid, grid)).roll((1, 2), (1, 2)).flatten(1, 2)
        return torch.cat([v[:, :1], moved], 1), []
    monkeypatch.setattr(model, "predict_forward", shift)
    token = torch.tensor([0, 5, 9])
    heat = evaluate.perturb(model, 0, torch.zeros(3, 3, 12), torch.randn(3, 17, 16), token, 4)
    assert heat.argmax(1).tolist() == [6, 11, 15]
    close(heat.amax(1), torch.ones(3), 1e-5)
    assert (heat.sort(1).values[:, :-1] == 0).all()
    # five tokens are hot at most, so a token that moves as the double says is followed whatever the features
    clip = torch.rand(3, 3, 16, 16)
    alike = lambda images, teacher=False: [torch.ones(len(images), 17, 16)] * 3
    monkeypatch.setattr(model, "features", alike)
    tracks = evaluate.follow_tokens(model, clip, torch.tensor([0, 1]), torch.tensor([0, 1]), draws=2)
    assert tracks[0].tolist() == [[0, 1], [6, 1], [8, 7]]       # the second is asked for in frame 1


def test_moving_tokens_land_where_the_scene_moves_them(small_midway):
    args = argparse.Namespace(seed=0, device=torch.device("cpu"))
    scenes = evaluate.cut_scenes(small_midway, dict(scenes=SMALL_SCENES), args)
    batch = scenes(range(24))
    assert batch["video"].shape == (24, 2, 3, 16, 16) and batch["flow"].shape == (24, 1, 2, 16, 16)
    rows, token, truth = evaluate.moving_tokens(small_midway, batch, torch.Generator().manual_seed(0))
    assert len(rows) > 4
    for row, k, (down, right) in zip(rows.tolist(), token.tolist(), truth.tolist()):
        y, x = 4 * (k // 4) + 2, 4 * (k % 4) + 2
        dx, dy = batch["flow"][row, 0, :, y, x].tolist()
        assert np.hypot(dx, dy) >= 4 and abs((y + dy + 0.5) / 4 - 0.5 - down) < 1e-5
        assert abs((x + dx + 0.5) / 4 - 0.5 - right) < 1e-5
        assert batch["seen"][row, 0, y, x]
        # what is there looks the same, as far as a camera's pan by parts of pixels lets it
        there = batch["video"][row, 1, :, round(y + dy), round(x + dx)]
        assert (there - batch["video"][row, 0, :, y, x]).abs().max() < 0.5


def test_linear_probe_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    x, y = torch.randn(400, 30), torch.randn(400, 2)
    assert evaluate.ridge_r2(x, x[:, :2] - x[:, 3:5], 100) > 0.99
    assert evaluate.ridge_r2(x, y, 100) < 0.1


def test_midways_analyses_run(midway_file, tmp_path):
    tables = {}
    for task in ("latents", "heatmap", "identity-bias", "track"):
        flags = ["--against", midway_file] if task == "identity-bias" else []
        tables |= eval_tables(midway_file, tmp_path, "--task", task, "--draws", 2, "--batch-size", 4, *flags)
    rows = {row[""]: row for table in tables.values() for row in table}
    assert rows["always at the source"]["nearer to the source"] == 1.0
    assert rows["anywhere, by chance"]["patches from truth"] > 0.5
    assert rows["best that a grid can do"]["within 1 patch"] == 1.0
    assert rows["stays put"]["patches"] > rows["best that a grid can do"]["patches"]
    assert rows["level 1"]["right"] < 4
    for name in ("heatmap.png", "track.png"):
        assert 300 < iio.imread(tmp_path / name).shape[1] <= 1600


def test_midways_analyses_take_videos(midway_file, tmp_path):
    video = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (60, 36, 64, 3), dtype=np.uint8)
    iio.imwrite(video, frames, plugin="pyav", codec="libx264", fps=30)
    np.savez(tmp_path / "truth.npz", tracks=np.full((2, 60, 2), 20.0),
             annotated=np.arange(60) % 7 == np.array([[0], [3]]))
    tables = eval_tables(midway_file, tmp_path, "--task", "heatmap", "--data", video, "--draws", 2,
                         "--at", 0.9, 0.1)
    assert len(tables) == 1
    assert not eval_tables(midway_file, tmp_path, "--task", "track", "--data", video, "--draws", 2,
                           "--gap", 0.1, 0.2, "--stride", 2)
    (table,) = eval_tables(midway_file, tmp_path, "--task", "track", "--data", video, "--draws", 2,
                           "--tracks", tmp_path / "truth.npz", "--stride", 7).values()
    # the second point is seen in no frame that is looked at, the first stays where it is
    assert {row[""]: row["patches"] for row in table}["stays put"] < 0.71


def test_laplacian_loss_and_tiles_equal_croco():
    z = np.load(HERE / "reference" / "metrics.npz")
    pred, conf, gt = (torch.from_numpy(z[f"laplacian_{name}"]).double()
                      for name in ("pred", "conf_logit", "gt"))
    for valid, loss in ((torch.from_numpy(z["laplacian_valid"]), "loss"),
                        (torch.ones(2, 8, 10, dtype=torch.bool), "loss_all_valid")):
        close(evaluate.laplacian_loss(pred, conf[:, 0], gt, valid), z[f"laplacian_{loss}"], 1e-12)
    ends = np.cumsum(z["tiling_count"])
    for length, window, overlap, a, b in zip(
            z["tiling_total"], z["tiling_window"], z["tiling_overlap"], ends - z["tiling_count"], ends):
        found = evaluate.tile_offsets(int(length), int(window), float(overlap))
        assert found == z["tiling_offsets"][a:b].tolist()


@pytest.mark.parametrize("size", [(23, 40), (10, 40), (16, 16), (8, 9)])
def test_tiles_cover_images_of_any_size(small_midway, size):
    """A double that reads the flow off the image's colours."""
    class Reads(torch.nn.Module):
        model = small_midway

        def forward(self, source, target):
            return 20 * source[:, :2] - 10, source[:, 2]
    H, W = size
    y, x = torch.meshgrid(torch.linspace(0.2, 0.8, H), torch.linspace(0.3, 0.7, W), indexing="ij")
    frames = torch.stack([x, y, 1 - x]).expand(2, 3, H, W)
    flow = evaluate.tiled_flow(Reads(), frames, 0.5)
    scale = torch.tensor([W / max(W, 16), H / max(H, 16)]).view(2, 1, 1)
    close(flow, (20 * torch.stack([x, y]) - 10) * scale, 0.35 if min(size) < 16 else 1e-4)


def test_flow_crops_keep_flow_true_to_their_frames():
    """Scaled, stretched, flipped and cut: the second crop, seen where the flow points, is the first."""
    y, x = np.mgrid[:60, :80].astype(np.float32)
    dx, dy = 5.0, -3.0
    ramp = lambda x, y: np.stack([2.5 * x + 20, 3 * y + 30, x + y + 60], -1).clip(0, 255).astype(np.uint8)
    pair = dict(frames=np.stack([ramp(x, y), ramp(x - dx, y - dy)]), valid=x > 4,
                flow=np.stack([np.full_like(x, dx), np.full_like(y, dy)]))
    crops, flips = evaluate.FlowCrops([pair], 24, seed=0), set()
    for i in range(24):
        frames, flow, valid = crops[i]
        assert frames.shape == (2, 3, 24, 24) and flow.shape == (2, 24, 24) and valid.dtype == torch.bool
        red, green = frames.float()[:, :2, 4:-4, 4:-4].unbind(1)            # ramps along x, along y
        per_x, per_y = red.diff(dim=2).mean().item(), green.diff(dim=1).mean().item()
        flips.add((per_x > 0, per_y > 0))
        close((red[0] - red[1]).mean() / per_x, flow[0].mean(), 0.4)
        close((green[0] - green[1]).mean() / per_y, flow[1].mean(), 0.4)
    assert len(flips) > 1


def test_dpt_learns_flow_that_its_maps_tell():
    torch.manual_seed(0)
    head = evaluate.DPT((24, 24, 24, 24), 24)
    flow = F.interpolate(3 * torch.randn(8, 2, 4, 4), (16, 16), mode="bilinear")
    maps = [F.interpolate(flow, (4, 4)).repeat(1, 12, 1, 1)] * 4
    valid = torch.ones(8, 16, 16, dtype=torch.bool)
    before = flow.norm(dim=1).mean()

    def loss(i):
        out = head(maps, (16, 16))
        return evaluate.laplacian_loss(out[:, :2], out[:, 2], flow, valid)
    evaluate.fit([head], loss, 120, "test", lr=3e-3)
    out = head(maps, (16, 16))
    assert (out[:, :2] - flow).norm(dim=1).mean() < 0.5 * before
    assert not head.training
    # 16-pixel patches: twice the finest map, as in CroCo v2; 4-pixel patches: less than it
    for n in (64, 16):
        assert head(maps, (n, n)).shape == (8, 3, n, n)


def test_flow_reads_the_four_inputs(small_midway):
    net = evaluate.FlowNet(small_midway, frozen=True)
    source, target = torch.rand(2, 2, 3, 16, 16)
    with torch.no_grad():
        levels, z = small_midway.predict(source, target), small_midway.features(source)[-1]
        zt = small_midway.features(target, teacher=True)[-1]
        tokens = small_midway.midway_path(1, None, z, zt)
        maps = net.maps(source, target)
    for a, b in zip(maps, (z[:, 1:], tokens[:, 3 + 17 + 1:], levels[1].pred[:, 1:], levels[0].pred[:, 1:])):
        close(a.flatten(2).mT, b, 0)
    alone = evaluate.encoder_only(small_midway, argparse.Namespace(seed=0, device="cpu"))
    images = torch.rand(1, 3, 16, 16)
    for teacher in (False, True):
        close(alone.features(images, teacher)[-1], small_midway.features(images, teacher)[-1], 0)
    assert (alone.motion_tokens - small_midway.motion_tokens).abs().max() > 0.01


def labelled_folder(root, count=10, values=(0, 1, 2)):
    """Images in two halves of plain colours, each colour a class; a corner that is to be left out."""
    rng, colours = np.random.default_rng(0), np.array([(220, 40, 40), (40, 200, 60), (50, 60, 220)])
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for n in range(count):
            a, b = rng.permutation(3)[:2]
            classes = np.full((32, 48), a, np.uint8)
            classes[:, 24:] = b
            image = colours[classes] + rng.integers(-20, 20, (32, 48, 3))
            classes = np.array(values, np.uint8)[classes]
            classes[:8, :8] = 255
            iio.imwrite(root / "images" / split / f"{n}.png", image.clip(0, 255).astype(np.uint8))
            iio.imwrite(root / "labels" / split / f"{n}.png", classes)
    return root


@pytest.mark.parametrize("flags", [[], ["--features", "backward"], ["--head", "upernet"], ["--finetune"]])
def test_segmentation_learns_colours_from_a_folder(midway_file, tmp_path, flags):
    root = labelled_folder(tmp_path / "data")
    (rows,) = eval_tables(midway_file, tmp_path, "--task", "segmentation", "--data", root, "--steps", 60,
                          "--batch-size", 4, "--lr", 0.02, *flags).values()
    rows = {row[""]: row for row in rows}
    assert rows["mIoU"]["this model"] > 75 > rows["mIoU"]["position prior"]
    assert rows["mIoU"]["random init"] > 60
    assert len(rows) == 5                   # two means, three classes: the ignored value is none
    assert iio.imread(tmp_path / "segmentation.png").shape[1] <= 1600


def test_frozen_readouts_leave_the_model_alone(small_midway, tmp_path):
    before = {name: x.clone() for name, x in small_midway.state_dict().items()}
    args = argparse.Namespace(seed=0, device=torch.device("cpu"), finetune=True, head="linear", size=16,
                              lr=1e-2, features="encoder", data="scenes", steps=2, batch_size=2)
    task = evaluate.SegmentationTask(small_midway, dict(scenes=SMALL_SCENES), args)
    for args.finetune in (True, False):
        net = evaluate.train_segmenter(small_midway, task, args, "test")
        changed = any((net.model.state_dict()[name] - x).abs().max() > 0 for name, x in before.items())
        assert changed == args.finetune and not net.training
    assert all((small_midway.state_dict()[name] == x).all() for name, x in before.items())
    assert not small_midway.training


@pytest.mark.parametrize("flags", [["--finetune"], ["--encoder-only"]])
def test_flow_on_scenes_and_on_pairs(midway_file, tmp_path, flags):
    rng = np.random.default_rng(0)
    pair = tmp_path / "pairs" / "one"
    pair.mkdir(parents=True)
    for name in ("frame1", "frame2"):
        iio.imwrite(pair / f"{name}.png", rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    truth = np.zeros((20, 30, 2), np.float32) + (3, 4)
    truth[0, 0] = 1e10                      # unknown
    data.write_flo(pair / "flow.flo", truth)
    for source in ("scenes", pair.parent):
        (rows,) = eval_tables(midway_file, tmp_path, "--task", "flow", "--data", source, "--steps", 2,
                              "--batch-size", 2, "--overlap", 0.1, *flags).values()
        rows = {row[""]: row for row in rows}
        assert ("this model" in rows["mean over pixels"]) == ("--finetune" in flags)
    assert rows["one"]["zero"] == rows["mean over pixels"]["zero"] == 5.0
    assert rows["one"]["best constant"] < 1e-6 and rows["per cent of outliers (Fl-all)"]["zero"] == 100


def test_flow_trains_on_a_training_split_and_leaves_out_what_it_tests(midway_file, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for scene in ("alley_1", "temple_2", "temple_3"):           # laid out as Sintel
        (tmp_path / "training/clean" / scene).mkdir(parents=True)
        for n in (1, 2):
            iio.imwrite(tmp_path / f"training/clean/{scene}/frame_000{n}.png",
                        rng.integers(0, 255, (22, 34, 3), dtype=np.uint8))
        truth = np.zeros((22, 34, 2), np.float32) + (6, 8)
        (tmp_path / "training/flow" / scene).mkdir(parents=True)
        data.write_flo(tmp_path / f"training/flow/{scene}/frame_0001.flo", truth if scene != "temple_3" else
                       0 * truth + 1e10)                        # where nothing is known
    training, test = evaluate.flow_pairs(argparse.Namespace(data=tmp_path / "training"))
    assert len(training) == 1 and len(test) == 2 and "alley" in training.items[0][1]
    seen, crops = [], evaluate.FlowCrops
    monkeypatch.setattr(evaluate, "FlowCrops", lambda *of: seen.append(len(of[0])) or crops(*of))
    ((title, rows),) = eval_tables(midway_file, tmp_path, "--task", "flow", "--data", tmp_path / "training",
                                   "--steps", 2, "--batch-size", 2, "--overlap", 0.1).items()
    assert seen == [1, 1] and "on the training split" in title
    assert [row["zero"] for row in rows[:2]] == [10.0, 10.0] and rows[0][""].endswith("temple_2/frame_0001")
    (tmp_path / "training/flow/alley_1/frame_0001.flo").unlink()
    assert evaluate.flow_pairs(argparse.Namespace(data=tmp_path / "training"))[0] is None       # then scenes


def test_an_error_of_a_data_process_is_one_line_and_ends_the_program(midway_file, tmp_path):
    root = labelled_folder(tmp_path / "wrong", values=(0, 1, 7))
    done = subprocess.run(
        [sys.executable, HERE / "eval.py", midway_file, "--task", "segmentation", "--data", root,
         "--classes", "3", "--out", tmp_path / "out", "--device", "cpu", "--batch-size", "2"],
        capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert re.fullmatch(r"eval.py: error: \S+\.png: value 7 is neither .*\n", done.stderr), done.stderr


def test_evaluation_tells_what_is_wrong_in_one_line(midway_file, moog_run, tmp_path, capsys):
    root = tmp_path
    (tmp_path / "empty").mkdir()
    plain = tmp_path / "plain.pt"
    ckpt = torch.load(midway_file, weights_only=True)
    ckpt["config"]["config"]["latent_dynamics"] = False
    ckpt["model"] = Midway(Config(**ckpt["config"]["config"])).state_dict()
    torch.save(ckpt, plain)
    for args, message in (
            ([midway_file, "--task", "tokens"], "midway has no task 'tokens': choose from latents, heatmap"),
            ([moog_run, "--task", "flow"], "moog has no task 'flow'"),
            ([midway_file, "--task", "segmentation", "--batch-size", 1], "--batch-size of 2 or more"),
            ([midway_file, "--task", "identity-bias", "--data", root], "only scenes have"),
            ([midway_file, "--task", "track", "--tracks", "points.npz"], "give the video"),
            ([midway_file, "--task", "segmentation", "--data", tmp_path / "empty"], "no labelled images"),
            ([midway_file, "--task", "segmentation", "--data", tmp_path / "nowhere"], "no such folder"),
            ([midway_file, "--task", "segmentation", "--size", 30], "times the patch size"),
            ([midway_file, "--task", "flow", "--data", tmp_path / "empty"], "no flow with its two frames"),
            ([midway_file, "--task", "heatmap", "--data", tmp_path / "empty"], "no videos and no frames"),
            ([midway_file, "--task", "identity-bias", "--against", moog_run], "want another Midway"),
            ([plain, "--task", "heatmap"], "no latent dynamics"),
            ([plain, "--task", "segmentation", "--features", "backward"], "--features encoder"),
            ([midway_file, "--task", "segmentation", "--head", "upernet", "--features", "backward"], "four")):
        with pytest.raises(SystemExit) as stop:
            args = [*args, "--out", tmp_path / "out", "--steps", 1, "--device", "cpu"]
            evaluate.cli([str(a) for a in args])
        assert message in str(stop.value) and "\n" not in str(stop.value), (args, stop.value)
    for flags in (["--overlap", "1"], ["--at", "2", "0"], ["--draws", "0"], ["--gap", "2", "1"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(midway_file), *flags])
        assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


# ---- MeloMotion: parts ---------------------------------------------------------------------------
def squares(count=4, **options):
    return data.MovingSquares(**options).batch(range(count))


def test_every_row_of_table_1():
    sizes = {}
    parts = dict(MeloMotion(melomotion.Config()).named_children(), baseline=FlowBaseline())
    for name, part in parts.items():
        sizes[name] = sum(p.numel() for p in part.parameters())
    assert sizes == dict(predictors=3 * 2_146, rgb_proj=256, camera=742, encoder=1_088,     # 43,111
                         decoder=34_587, baseline=34_587 + 322_862)


def test_position_loss_is_the_velocity_error_of_rigid_labels():
    v, true = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    d = torch.arange(1, 16)[:, None] * true[:, :, None]                 # (5, 3, 15, 2)
    error = 2 * F.mse_loss(v, true)                                     # x and y are summed
    close(position_loss(v, d), error, 1e-5)
    close(position_loss(v, d, normalize=False), error * 1240 / 15, 1e-3)


@pytest.mark.parametrize("normalize, ratio", [(True, 1), (False, 225)])
def test_gradient_of_frame_15_over_that_of_frame_1(normalize, ratio):
    d = torch.arange(1.0, 16)[:, None].repeat(1, 1, 1, 2).requires_grad_()      # v is off by 1
    grad, = torch.autograd.grad(position_loss(torch.zeros(1, 1, 2), d, normalize), d)
    close(15 * grad[0, 0, 14], ratio * grad[0, 0, 0], 1e-5)     # on v: t times as much


def test_place_equals_slicing_and_clips_at_the_border():
    torch.manual_seed(0)
    for h, w in ((16, 16), (8, 12)):
        layers = torch.randn(2, 3, 4, h, w)
        d = 2.4 * torch.rand(2, 3, 9, 2) - 1.2
        d[:, :, 0] = torch.tensor([0.5, 2.5]) / w                       # halves: to the even cell
        want = torch.zeros(2, 3, 9, 4, h, w)
        for b, n, t in np.ndindex(2, 3, 9):
            dx, dy = (round(x) for x in (d[b, n, t] * w).tolist())
            top, bottom = np.clip([dy, h + dy], 0, h)
            left, right = np.clip([dx, w + dx], 0, w)
            block = layers[b, n, :, top - dy:bottom - dy, left - dx:right - dx]
            want[b, n, t, :, top:bottom, left:right] = block
        close(place(layers, d), want, 0)
    x = torch.rand(3, 2, 16, 16)
    d = torch.tensor([[1, 0], [-3, 5], [0, 20]]) / 16                   # whole cells: like warp()
    placed = place(x[:, None], d[:, None, None])[:, 0, 0]
    close(melomotion.warp(x, d[..., None, None]), placed, 1e-5)


class CellColours(torch.nn.Module):
    """In the decoder's place: paints each cell in the colour that its latent has."""

    def forward(self, latents):
        return latents[:, :, 1:4].repeat_interleave(8, 3).repeat_interleave(8, 4)


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_true_velocities_draw_the_true_frames(phase):
    masks = torch.zeros(1, 2, 64, 64)                                   # two tiles
    masks[0, 0, 24:32, 0:16] = 1
    masks[0, 1, 40:48, 40:48] = 1
    a, b = masks[0, :, None] * torch.rand(2, 3, 1, 1)                   # (3, H, W)
    v = torch.tensor([[[1.0, 0.0], [-1.0, -1.0]]]) / 8                  # a cell a frame
    frames = [a.roll(8 * t, 2) + b.roll((-8 * t, -8 * t), (1, 2)) for t in range(5)]
    video = torch.stack(frames)[None]
    model = MeloMotion(melomotion.Config(size=64, frames=5, objects=2, phase=phase))
    model.decoder = CellColours()
    draw = model.warped if phase == 0 else model.draw
    close(draw(video[:, 0], masks, v, torch.tensor([[3, 1]])), video[:, [3, 1]], 1e-5)
    batch = dict(first_frame=video[:, 0], masks=masks, video=video)
    assert model.l1(batch, v) < 1e-5 and model.l1(batch, v, one=True) < 1e-5
    assert model.l1(batch | dict(video=video.roll(1, 1)), v) > 1e-3


def test_what_an_object_leaves_behind_looks_like_the_rest():
    model = MeloMotion(melomotion.Config(size=64, objects=1))
    model.decoder = CellColours()
    image = torch.full((1, 3, 64, 64), 0.5)
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 8:16, 8:16] = 1
    frame = model.draw(image, masks, torch.tensor([[[0.25, 0.0]]]), torch.tensor([[1]]))
    frame[..., 8:16, 24:32] -= 0.5                                      # where it has gone, on top
    close(frame[0, 0], image[0], 1e-6)


def test_latent_keeps_means_over_4_pixels_and_has_colours_in_channels_1_to_3():
    image, occupancy = torch.rand(2, 3, 16, 24), torch.rand(2, 1, 16, 24)
    latent = encode_latent(image, occupancy)
    close(latent[:, :4], F.avg_pool2d(torch.cat([occupancy, image], 1), 8), 1e-6)
    # linear, with 16 independent outputs for the 16 means of a cell
    blocks = torch.eye(16).view(16, 4, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.linalg.matrix_rank(encode_latent(blocks[:, 1:], blocks[:, :1]).view(16, 16)) == 16


def test_colours_are_read_off_exactly_wherever_the_object_lies():
    batch = squares(32, shape="any")
    model = MeloMotion(melomotion.Config())
    layers = model.extract(batch["first_frame"], batch["masks"])
    close(model.pool(layers), colours_of(batch) / 255, 1e-5)


@pytest.mark.parametrize("change", [
    {}, dict(shared_predictor=True, object_index=True), dict(normalize=False), dict(pooling="avg"),
    dict(pooling="max"), dict(pooling="full", shared_predictor=True), dict(phase=0), dict(phase=2),
    dict(frames=4, objects=2)], ids=str)
def test_every_variant_trains_what_it_should(change):
    torch.manual_seed(0)
    cfg = melomotion.Config(**change, pos_weight=0.0 if "phase" in change else 10.0)
    model, batch = MeloMotion(cfg), squares(2, frames=cfg.frames, **cfg.inputs["squares"])
    loss, logs = model(batch)
    loss.backward()
    features = "rgb_proj" if cfg.pooling == "rgb" else "encoder"
    trained = {0: {"decoder"}, 1: {"predictors", features}, 2: {"predictors", features, "decoder"}}
    for name, p in model.named_parameters():            # or else DDP would wait for ever
        assert (p.grad is not None) == (name.split(".")[0] in trained[cfg.phase]), name
    assert (logs.get("spread") == 0) == (cfg.pooling == "full")         # one feature for all
    if cfg.phase == 1:
        want = position_loss(model.motion(batch), batch["displacements"], cfg.normalize)
        close(loss, 10 * want, 1e-6)
    if cfg.phase == 2:              # L1 alone: placing rounds, so velocities get nothing from it
        assert all(p.grad.abs().max() == 0 for p in model.predictors.parameters())
        assert all(p.grad.abs().max() > 0 for p in model.decoder.parameters())
    assert ("l1" in logs) == (cfg.phase != 1)
    assert not any(value.requires_grad for value in logs.values())
    video = model.render(batch["first_frame"], batch["masks"], frames=3)
    assert video.shape == (2, 3, 3, 128, 128) and 0 <= video.min() and video.max() <= 1
    assert all(row["model"].isfinite() for row in model.report(batch).values())


@pytest.mark.parametrize("change, objects, height, exception, word", [
    (dict(pooling="mean"), 3, 128, AssertionError, "rgb"), (dict(phase=3), 3, 128, KeyError, "3"),
    (dict(object_index=True, pooling="avg"), 3, 128, RuntimeError, "shapes"),
    ({}, 5, 128, AssertionError, "5 objects"), ({}, 3, 100, AssertionError, "100x128")])
def test_what_does_not_fit_melomotion_is_refused(change, objects, height, exception, word):
    with pytest.raises(exception, match=word):
        model = MeloMotion(melomotion.Config(**change))
        model.render(torch.rand(1, 3, height, 128), torch.ones(1, objects, height, 128))


def test_flow_baseline_starts_still_and_its_windows_are_closed():
    batch, model, once = squares(1), FlowBaseline(), FlowBaseline(one_shot=True)
    once.load_state_dict(model.state_dict())
    loss, _ = model(batch)
    loss.backward()
    assert model.head[-1].weight.grad.abs().max() > 0                   # through the decoder
    for model_ in (model, once):
        model_.head[-1].bias.data = torch.tensor([0.0625, 0])           # a cell a frame
    close(once(batch)[0].detach(), model(batch)[0].detach(), 1e-4)
    assert (model(batch)[0] - loss).abs() > 1e-5
    for shift, near, far in ((0, 7 * 17, 8 * 17), (4, 3 * 17, 15 * 17)):    # on the diagonal
        block, x = melomotion.SwinBlock(shift), torch.randn(1, 256, 64)
        changed = x.clone()
        changed[0, 0] += 1.0
        moved = (block(changed) - block(x)).abs().amax(-1)[0]
        assert moved[near] > 0 and moved[far] == 0, shift


# ---- MeloMotion: data ----------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    dict(), dict(mode="all-move", shape="any"), dict(mode="random-mover", video=False)])
def test_squares_depend_on_their_number_alone(options):
    clips = data.MovingSquares(**options)
    together = clips.batch([5, 2, 9])
    for row, i in enumerate((5, 2, 9)):
        assert all(torch.equal(value, together[name][row]) for name, value in clips[i].items())
    other = data.MovingSquares(**options, split="eval")[5]
    assert not torch.equal(other["first_frame"], together["first_frame"][0])


def colours_of(batch):
    """(B, N, 3), each object's in frame 0."""
    return (batch["first_frame"][:, None] * batch["masks"][:, :, None]).flatten(3).amax(3)


@pytest.mark.parametrize("mode, movers", [("differentiated", [0]), ("all-move", [0, 1, 2])])
def test_red_is_speed_to_the_right_and_green_down(mode, movers):
    batch = squares(40, mode=mode, frames=5)
    colours = colours_of(batch)
    v = 0.1 * (colours[..., :2].double() - 128) / 255
    v[:, [n for n in range(3) if n not in movers]] = 0
    close(batch["displacements"], v[:, :, None] * torch.arange(1, 5)[:, None], 1e-7)    # t v, not rounded
    assert colours[..., 2].min() >= 128 and 0.045 < v.max() <= 0.05 and -0.0503 < v.min() < -0.045


@pytest.mark.parametrize("mode", ["differentiated", "all-move"])
def test_squares_are_painted_where_the_labels_say(mode):
    batch = squares(6, mode=mode, shape="any", frames=24)
    batch = {name: value.numpy() for name, value in batch.items()}
    for masks, frames, moved in zip(batch["masks"], batch["video"], batch["displacements"]):
        colours = [frames[0][:, mask][:, 0] for mask in masks]
        for t in (0, 1, 7, 15, 23):
            canvas = np.zeros((3, 128, 128), np.uint8)
            for n in range(3):                                          # painter's order
                dx, dy = np.rint(moved[n, t - 1].astype(float) * 128).astype(int) if t else (0, 0)
                ys, xs = masks[n].nonzero()
                ys, xs = ys + dy, xs + dx
                inside = (ys >= 0) & (ys < 128) & (xs >= 0) & (xs < 128)
                assert inside.all() or t > 15                           # nobody leaves in 16 frames
                canvas[:, ys[inside], xs[inside]] = colours[n][:, None]
            assert np.array_equal(canvas, frames[t])
    assert np.array_equal(batch["first_frame"], batch["video"][:, 0])


def test_worlds_differ_in_who_moves():
    random = squares(40, mode="random-mover")["displacements"].flatten(2).any(-1)       # (B, N)
    assert (random.sum(1) == 1).all() and set(random.float().argmax(1).tolist()) == {0, 1, 2}
    known = squares(20, mode="colour-mover")
    assert (colours_of(known)[:, 1:, :2] == 128).all() and not known["displacements"][:, 1:].any()


@pytest.mark.parametrize("options", [dict(), dict(mode="all-move"), dict(objects=5, side=16)])
def test_no_two_objects_share_a_latent_cell(options):
    cells = F.max_pool2d(squares(200, video=False, **options)["masks"].float(), 8)
    assert cells.sum(1).max() == 1


# ---- MeloMotion: what it learns ------------------------------------------------------------------
def learnt(mode, lr=1e-2, **change):
    """What the report's training, cut to 2,000 clips, comes to: {heading: number}."""
    torch.manual_seed(0)
    models = [MeloMotion(melomotion.Config(**change))]
    evaluate.train_together(models, mode, **evaluate.ADAMW | dict(epochs=1, lr=lr))
    return {name: numbers[0] for name, numbers in evaluate.measure(models, mode).items()}


def test_decoupled_predictors_tell_objects_apart_and_a_shared_one_does_not():
    decoupled = learnt("differentiated")
    index = learnt("differentiated", shared_predictor=True, object_index=True)
    assert decoupled["POS"] < 1e-4 and index["POS"] < 1e-4              # nothing moves: 6e-4
    assert decoupled["object 0, slope of v on truth"] > 0.8
    assert decoupled["POS, objects permuted"] > decoupled["POS, nothing moves"]
    shared = learnt("differentiated", shared_predictor=True)
    assert shared["POS"] > 3e-4 and shared["dead units"] > 0.8      # most seeds lose all
    # at a gentler rate it gives a third of each colour's velocity: right on average, and useless
    gentle = learnt("differentiated", 3e-3, shared_predictor=True)
    assert gentle["POS"] > 3e-4 and gentle["outputs differ"] == 1 and gentle["dead units"] < 1
    assert 0.15 < gentle["object 0, slope of v on truth"] < 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_a_mover_that_nothing_tells_is_found_by_nobody(shared):
    assert learnt("random-mover", shared_predictor=shared)["POS"] > 3e-4


@pytest.mark.parametrize("how", ["ADAMW", "SGD"])
def test_many_trainings_at_once_equal_one_by_one(how, monkeypatch):
    monkeypatch.setattr(evaluate, "EPOCH", 20)
    evaluate.pooled_clips.cache_clear()
    cfg = melomotion.Config(pooling="avg")
    models, alone = [MeloMotion(cfg), MeloMotion(cfg)], []
    for seed, start in enumerate(models):
        model = deepcopy(start)
        options = dict(getattr(evaluate, how))
        optimizer = options.pop("optimizer")(model.parameters(), **options)
        clips = data.MovingSquares(mode="all-move", seed=seed, video=False)
        for step in range(40):
            model(clips.batch([step]))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        alone.append(model)
    evaluate.train_together(models, "all-move", **getattr(evaluate, how))
    evaluate.pooled_clips.cache_clear()
    for together, model in zip(models, alone):
        for a, b in zip(together.parameters(), model.parameters()):
            close(a.detach(), b.detach(), 1e-5)


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("melomotion") / "fast"
    train.main(["--model", "melomotion", "--preset", "fast", "--device", "cpu", "--out", str(out)])
    return out


def test_fast_preset_learns_the_law(fast_run):
    lines = log(fast_run)
    assert lines[-1]["held_out"]["POS: squared error of v"]["model"] < 5e-6
    assert lines[-1]["held_out"]["POS: squared error of v"]["zero"] > 4e-4
    assert all({"step", "loss", "lr", "pos", "spread"} <= line.keys() for line in lines)


def test_melomotion_resumes_starts_from_weights_and_takes_squares_only(fast_run, tmp_path, capsys):
    small = ["--model", "melomotion", "--preset", "phase2", "--device", "cpu", "--batch-size", "2"]
    for name, steps in (("whole", 3), ("parts", 2)):
        train.main([*small, "--steps", str(steps), "--init", str(fast_run), "--min-lr", "2e-3",
                    "--out", f"{tmp_path}/{name}"])
    train.main(["--resume", f"{tmp_path}/parts", "--steps", "3"])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    first = weights(fast_run)
    assert torch.equal(whole["camera.0.weight"], first["camera.0.weight"])
    assert not torch.equal(whole["decoder.8.weight"], first["decoder.8.weight"])
    close(whole["predictors.w2"], first["predictors.w2"], 0.01)
    for args, word in (
            ([*small, "--data", "scenes"], "--data squares"),
            ([*small, "--objects", "4", "--init", str(fast_run)], "does not fit"),
            (["--model", "midway", "--init", str(fast_run)], "holds a melomotion model")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train.cli([*args, "--out", f"{tmp_path}/never"])
        assert word in capsys.readouterr().err
    train.main([*small, "--bench", "--out", f"{tmp_path}/never"])
    assert not (tmp_path / "never").exists()


def test_eval_writes_every_table_and_picture(fast_run, tmp_path, monkeypatch):
    for name, value in dict(EPOCH=10, ROUNDS=2).items():
        monkeypatch.setattr(evaluate, name, value)
    evaluate.pooled_clips.cache_clear()
    evaluate.main([str(fast_run), "--seeds", "2", "--out", str(tmp_path)])
    evaluate.pooled_clips.cache_clear()
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]["tables"]
    rows = {row[""]: row for table in tables.values() for row in table}
    for title, (headings, trainings) in evaluate.TABLES.items():
        assert {row[""] for row in tables[title]} == trainings.keys()
        assert all(len(row[heading]) == 2 for row in tables[title] for heading in headings)
    assert rows["total"]["ours"] == 43_111 and rows["baseline's Swin"]["ours"] == 322_862
    assert rows["warped 15 times, as in a flow pipeline"]["peak"] < 0.5 < rows["placed"]["peak"]
    assert rows["MeloMotion, nothing drawn"]["times the baseline"] > 10
    assert rows["pixels off at t = 63"]["model"] < rows["pixels off at t = 63"]["nothing moves"] / 4
    assert iio.imread(tmp_path / "motion.gif").shape[0] == 32
    assert iio.imread(tmp_path / "figure1.png").shape[1] > 800


def test_results_of_other_tasks_stay_and_all_leaves_out_what_does_not_fit(midway_file, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"earlier": {"tables": {}}, "foreign": 3')      # damaged
    evaluate.save_results(tmp_path / "results.json", "one", dict(tables={"t": [{"a": float("nan")}]}))
    evaluate.save_results(tmp_path / "results.json", "two", dict(tables={}))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {"one": {"tables": {"t": [{"a": None}]}}, "two": {"tables": {}}}
    ckpt = torch.load(midway_file, weights_only=True)       # the DINO baseline has but its features
    ckpt["config"]["config"]["latent_dynamics"] = False
    ckpt["model"] = Midway(Config(**ckpt["config"]["config"])).state_dict()
    torch.save(ckpt, tmp_path / "plain.pt")
    evaluate.main([str(tmp_path / "plain.pt"), "--out", str(tmp_path), "--steps", "1", "--batch-size", "2",
                   "--device", "cpu"])
    assert "left out: flow: this model has no latent dynamics" in capsys.readouterr().out
    assert {*json.loads((tmp_path / "results.json").read_text())} == {"one", "two", "segmentation"}


def test_eval_tells_what_is_wrong_in_one_line(fast_run, tmp_path):
    def message(*args):
        with pytest.raises(SystemExit) as leaving:
            evaluate.cli([str(a) for a in args])
        assert "\n" not in leaving.value.code
        return leaving.value.code

    assert "no checkpoint at" in message(tmp_path / "nowhere")
    assert "no task 'flow': choose from tables, figures" in message(fast_run, "--task", "flow")
    (tmp_path / "ckpt.pt").write_bytes(b"damaged")
    assert "damaged" in message(tmp_path)


# ---- the house -----------------------------------------------------------------------------------
def test_model_files_stand_alone():
    for name in train.MODELS:
        if (HERE / f"{name}.py").exists():
            for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
                modules = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                           [node.module] if isinstance(node, ast.ImportFrom) else [])
                assert all(m.split(".")[0] in sys.stdlib_module_names | {"torch"} for m in modules), (
                    f"{name}.py imports {modules}")


def test_readme_names_only_what_exists():
    text = (HERE / "README.md").read_text()
    known = {f.name.replace("_", "-") for cls in (train.Options, Config, moog.Config, melomotion.Config)
             for f in fields(cls)}
    known |= {f.name for f in fields(data.VideoOptions)} | {"scene-" + f.name for f in fields(data.SceneOptions)}
    known |= {"no-" + name for name in known}
    known |= set(re.findall(r'add\("--([\w-]+)"', (HERE / "eval.py").read_text()))
    known |= {"help", "index-url", "nproc_per_node", "nnodes", "rdzv-backend",
              "rdzv-endpoint",
              "shm-size"}        # of other programs
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) <= known
    for picture in re.findall(r"\((assets/[^)]+)\)", text):
        assert (HERE / picture).exists(), picture
    lengths = dict(re.findall(r"`(\w+\.py)`[^|\n]*\| *(\d+) lines", text))
    assert lengths.keys() == {path.name for path in HERE.glob("*.py")}
    for name, lines in lengths.items():
        assert len((HERE / name).read_text().splitlines()) == int(lines), f"{name} has not {lines} lines"
