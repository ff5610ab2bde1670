"""
The tests: parity with the authors' models, exact data, a training loop that resumes and stops well.
Run them with `python -m pytest -q test_models.py`; no downloads, no GPU, four minutes on two cores.
"""
import argparse
import ast
import colorsys
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import zlib
from copy import deepcopy
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")      # before torch loads: small models, processes

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from midway import Config, DINOLoss, Midway, load_official

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "reference" / "midway.npz")

def close(a, b, tolerance):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance, f"off by {(a - b).abs().max():.2g}"

# ---- Midway: parity with the authors' model ------------------------------------------------------
NAMES = json.loads(REFERENCE["names"].tobytes())        # section of the file -> {key: shape}

def formula_input(name, *shape):
    random = np.random.RandomState(zlib.crc32(f"input/{name}".encode()))
    return torch.from_numpy(random.standard_normal(shape)).float()

def formula_image(name, size):
    """The fixtures' inputs are what the networks see: Midway's normalisation is undone."""
    mean, std = torch.tensor([midway.MEAN, midway.STD], dtype=torch.float64).view(2, 3, 1, 1)
    return formula_input(name, 2, 3, size, size) * std + mean

def formula_weight(section, key, shape):
    """The weights of the fixtures are a pure function of their names: made here, not stored."""
    z = np.random.RandomState(zlib.crc32(f"{section}/{key}".encode())).standard_normal(shape)
    wide = 3 if "gating_mlps" in key and "fc2" in key else 1
    kernel = 1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:])) * wide
    kinds = dict(center=0.05 * z, bias=0.1 * z, weight_g=1 + 0.1 * z)
    kinds |= dict.fromkeys(("cls_token", "pos_embed", "motion_tokens"), 0.2 * z)
    return torch.from_numpy(kinds.get(key.split(".")[-1], kernel)).float()

@pytest.fixture
def official_ckpt():
    ckpt = dict(optimizer={}, args=argparse.Namespace(arch="vit_small"))
    for section, keys in NAMES.items():
        ckpt[section] = {key: formula_weight(section, key, shape) for key, shape in keys.items()}
    return ckpt

@pytest.fixture
def official(official_ckpt, tmp_path):
    torch.save(official_ckpt, tmp_path / "tiny.pth")
    return load_official(tmp_path / "tiny.pth").double()

@torch.no_grad()
def level_losses(model):
    pairs = torch.stack([formula_image("tiny_x", 32), formula_image("tiny_y", 32)], 1)
    levels, _ = model.both_directions(pairs)
    return torch.stack([level.loss for level in levels])

def test_features_and_dynamics_equal_the_authors(official):
    x = formula_image("tiny_x", 32)
    y = formula_image("tiny_y", 32)
    # row 0 of the reference is x -> y of pair 0, row 1 is y -> x of pair 1
    source = torch.stack([x[0], y[1]])
    target = torch.stack([y[0], x[1]])
    for name in ("student", "teacher"):
        features = torch.stack(official.features(source, name == "teacher"))
        close(features, REFERENCE[f"{name}_features"], 1e-9)
    cls = official.features(torch.cat([x, y]))[-1][:, 0]
    close(official.student_head(cls), REFERENCE["student_dino_out"], 1e-9)
    for i, level in enumerate(official.predict(source, target)):
        for name in ("m", "v", "pred"):
            close(getattr(level, name), REFERENCE[f"{name}_{i}"], 1e-9)
        close(torch.stack(level.gates)[:, :, [0, 5, 11]], REFERENCE[f"gates_{i}"], 1e-9)
    close(level_losses(official), REFERENCE["losses"], 1e-9)

def test_dino_loss_gradient_and_center_equal_the_authors():
    loss = DINOLoss(64).double()
    assert loss.mask.nonzero().tolist() == sorted(REFERENCE["dino_pairs"].tolist())
    loss.center.copy_(0.1 * formula_input("dino_center", 1, 64))
    student = formula_input("dino_student", 60, 64).double().requires_grad_()
    teacher = formula_input("dino_teacher", 12, 64).double()
    value, _ = loss(student, teacher)
    value.backward()
    loss(student, teacher)                  # a second micro-batch: the center takes their mean
    loss.update_center()
    close(value.detach(), REFERENCE["dino_loss"], 2e-6)
    close(student.grad, REFERENCE["dino_grad"], 1e-6)
    close(loss.center, REFERENCE["dino_center"], 1e-6)
    assert not loss.seen.any()

def test_a_training_step_and_its_gradients_equal_the_authors(official):
    model = official.train()
    assert abs(model.student.blocks[-1].drop(torch.ones(9999, 1, 1)).mean() - 1) < 0.02
    for block in model.student.blocks:
        block.drop_path = 0.0
    crops = torch.stack([formula_image(f"step_g{i}", 32) for i in range(6)], 1)
    small = torch.stack([formula_image(f"step_l{i}", 16) for i in range(16)], 1)
    # they sum the levels where we average: DINO at a third, and all of it three times, is theirs
    model.cfg.dino_weight = 1 / 3
    globals = crops[:, 2:].unflatten(1, (2, 2))             # [frame, box]
    loss, logs = model(dict(
        motion=crops[:, :2], globals=globals, locals=small.unflatten(1, (2, 8))))
    (3 * loss).backward()
    model.after_step(0.0)
    close(logs["dino"], REFERENCE["step_dino"], 1e-6)
    close([logs[f"loss_{level}"] for level in (3, 6, 9)], REFERENCE["step_levels"], 1e-9)
    close(3 * loss.detach(), REFERENCE["step_dino"] + REFERENCE["step_levels"].sum(), 1e-6)
    close(model.dino_loss.center, REFERENCE["step_center"], 1e-9)
    # the gradients of their 542 trained tensors; some are the first, second, third part of ours
    expected = np.load(HERE / "reference" / "midway_gradients.npz")["norms"]
    keys = [(section, key) for section in ("student", "motion_loss") for key in NAMES[section]
            if "teacher" not in key]
    assert len(keys) == len(expected) == 542
    tensors = dict(student={}, teacher={}, motion_loss={})
    for number, (section, key) in enumerate(keys):
        tensors[section][key] = torch.tensor([number])
    for name, numbers in midway.convert(tensors).items():
        parts = model.get_parameter(name).grad.chunk(len(numbers))
        for part, n in zip(parts, numbers, strict=True):
            close(part.norm(), expected[n], 5e-6 * max(expected[n], 1e-4))

# ---- Midway: sizes, ablations, invariants --------------------------------------------------------
SMALL = Config(
    size=16, patch=8, dim=24, depth=4, heads=2, levels=(1, 2, 3, 4), motion_dim=12, motion_depth=1,
    motion_heads=2, forward_depth=2, forward_heads=2, head_hidden=16, head_bottleneck=8,
    prototypes=32, local_size=8, local_crops=2, drop_path=0.0)

def small_model(**change):
    torch.manual_seed(0)
    return Midway(replace(SMALL, **change))

def random_batch(cfg, B):
    big = (3, cfg.size, cfg.size)
    small = (cfg.local_crops, 3, cfg.local_size, cfg.local_size)
    return dict(motion=torch.rand(B, 2, *big), globals=torch.rand(B, 2, 2, *big),
                locals=torch.rand(B, 2, *small))

def size_of(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)

def test_sizes_and_cost_are_the_papers(monkeypatch):
    with torch.device("meta"):
        model = Midway(Config())
        batch = random_batch(model.cfg, 1)
        vit_b = Midway(Config(**midway.PRESETS["vit_b"])).student
    assert [size_of(vit_b), size_of(model.student)] == [85_798_656, 21_665_664]
    assert size_of(model) == 21_665_664 + 36_600_000 + size_of(model.student_head)
    ours = midway.Block.forward

    def theirs(self, x, n=None):                # computes also what nobody reads
        return ours(self, x)[:, :n]

    for forward, low, high in ((ours, 86.0, 86.5), (theirs, 90.3, 91.0)):       # paper: 90.8 G
        monkeypatch.setattr(midway.Block, "forward", forward)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(batch)
        assert low < counter.get_total_flops() / 2e9 < high     # multiply-adds

@pytest.mark.parametrize("row", [
    dict(latent_dynamics=False),                                # Table 3, rows 1 to 9
    dict(backward=False, multi_level=False, refinement=False, gating=False),
    dict(multi_level=False, refinement=False, gating=False), dict(refinement=False, gating=False),
    dict(gating=False), dict(), dict(backward=False), dict(multi_level=False),
    dict(refinement=False), dict(dino_weight=0.0), dict(local_crops=0)])
def test_every_ablation_trains_all_its_parameters(row):
    model = small_model(**row)
    loss, logs = model(random_batch(model.cfg, 3))
    loss.backward()
    assert loss.isfinite() and not any(value.requires_grad for value in logs.values())
    for name, p in model.named_parameters():        # one without a gradient: DDP waits for ever
        assert (p.grad is None) == (not p.requires_grad) == name.startswith("teacher")
    if model.cfg.latent_dynamics:                   # motion tokens learn each its own
        assert model.motion_tokens.grad.std(1).max() > 1e-3 * model.motion_tokens.grad.abs().max()

def test_ablations_do_what_they_name():
    x, y = torch.rand(2, 2, 3, 16, 16)
    model = small_model(backward=False, refinement=False).eval()
    z = model.features(x)
    zt = model.features(y, teacher=True)
    levels = model.predict(x, y)
    close(torch.stack([level.v for level in levels]), torch.stack(z[:3]), 1e-6)     # raw features
    above = model.infer(2, None, z[3], zt[3])
    close(levels[1].m, model.infer(1, above, z[1], zt[2]), 1e-6)        # the level's own features
    model.cfg.refinement = True
    levels = model.predict(x, y)
    close(levels[1].m, model.infer(1, above, levels[2].pred, zt[2]), 1e-6)      # prediction above
    model = small_model(multi_level=False, gating=False).eval()
    [level] = model.predict(x, y)
    close(level.target, model.features(y, teacher=True)[2], 1e-6)       # the highest but one stays
    assert level.gates == []

@pytest.mark.parametrize("progress, part", [(0.0, 1.0), (1 / 3, 0.75), (1.0, 0.0)])
def test_the_teacher_follows_and_the_last_layer_waits(progress, part):
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.data += p.requires_grad           # the student moves by 1
    model(random_batch(SMALL, 3))[0].backward()
    model.before_step(1 / 60)
    assert model.student_head.weight_v.grad.any()
    model.before_step(1 / 60 - 1e-9)
    assert model.student_head.weight_v.grad is model.student_head.weight_g.grad is None
    model.after_step(progress)
    for p, old in zip(model.parameters(), before, strict=True):
        if not p.requires_grad:             # the cosine: by 1 - ema at the start, by 0 at the end
            close((p - old).mean(), part * (1 - SMALL.ema), 1e-6)

def test_report_exchanges_latents_within_a_direction():
    model = small_model().eval()
    motion = torch.rand(3, 2, 3, 16, 16)
    row = model.report(dict(motion=motion))["2-2cos, level 1"]
    level = model.both_directions(motion)[0][0]
    order = [2, 0, 1, 5, 3, 4]              # rows x -> y of 3 pairs, then y -> x
    pred, _ = model.predict_forward(0, level.m[order], level.v)
    close(row["shuffled"], midway.prediction_loss(pred, level.target), 1e-6)
    x = model.features(motion[:, 0], teacher=True)[0]
    y = model.features(motion[:, 1], teacher=True)[0]
    close(row["copy"], midway.prediction_loss(x, y), 1e-6)
    assert "shuffled" not in model.report(dict(motion=motion[:1]))["2-2cos, mean"]

def test_features_take_other_sizes_and_bytes():
    image = torch.randint(256, (1, 3, 24, 40), dtype=torch.uint8)
    features = small_model().features(image)[-1]
    assert features.shape == (1, 1 + 3 * 5, 24)
    close(features, small_model().features(image / 255)[-1], 1e-6)

def test_known_shifts_put_motion_into_the_latents(tmp_path):
    """The tiny preset's start, on larger patches. A constant guess stays at 0.23 patches^2."""
    flags = ("--model midway --preset tiny --patch 8 --levels 2 3 --device cpu --workers 0 "
             "--steps 200 --shift-warmup 1 --dino-weight 0 --log-every 50 --out").split()
    train.main([*flags, str(tmp_path)])
    assert log(tmp_path)[-1]["shift"] < 0.16

# ---- MooG: parity with the authors' model --------------------------------------------------------
MOOG = {name: torch.from_numpy(np.atleast_1d(x))
        for name, x in np.load(HERE / "reference" / "moog.npz").items()}
MOOG_SHAPES = json.loads(MOOG["shapes"].numpy().tobytes())
MOOG_SEEDS = dict(
    released=1234, movi=777, point_head=61, box_head=62, point_readout=55, depth_readout=56)

def moog_arrays(kind):
    """The fixtures' weights, by the formula that they were made with, under the authors' names."""
    random = np.random.RandomState(MOOG_SEEDS[kind])
    arrays = {}
    for name, shape in sorted(MOOG_SHAPES[kind].items()):
        n = random.standard_normal(shape)
        of_heads = re.search("query/|key/|value/|embedding/", name)
        kernel = n / np.sqrt(shape[0] if of_heads else np.prod(shape[:-1]))
        kinds = dict(scale=1 + 0.1 * n, bias=0.1 * n, embeddings=0.2 * n)
        arrays[name] = torch.from_numpy(kinds.get(name.split("/")[-1], kernel)).float()
    return arrays

def moog_load(arrays, tmp_path, load=moog.load_official):
    np.savez(tmp_path / "authors.npz", **arrays)
    return load(tmp_path / "authors.npz")

def moog_equals(kind, outputs, tolerance=2e-5):
    for name, output in outputs.items():
        close(output, MOOG[f"{kind}/{name}"], tolerance)

@torch.no_grad()
def released_outputs(model):
    video = MOOG["released/video"].movedim(-1, -3)
    state = MOOG["released/state0"]
    states = model.unroll(video, state)
    before = model.predict_ahead(video, state)[:, :-1]
    frames, attention = model.decode(before, video.shape[-2:], return_attention=True)
    return dict(
        encoder_output=model.encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2]),
        states_after_sa=states.predicted, states_after_ca=states.corrected,
        decoder_input_states=before, recon=frames.movedim(-3, -1),
        dec_cross_attn_last=attention[:, 3:])

def test_moog_released_equals_the_authors(tmp_path):
    arrays = moog_arrays("released")
    prefixed = {f"pretrained_model/{name}": x for name, x in arrays.items()}
    moog_equals("released", released_outputs(moog_load(prefixed, tmp_path)))
    for name in [name for name in arrays if re.search("decoder/.*self_att", name)]:
        del arrays[name]                            # pixels that don't look at each other
    out = released_outputs(moog_load(arrays, tmp_path))
    for name in ("recon", "dec_cross_attn_last"):
        close(out[name], MOOG[f"released/{name}_xonly"], 2e-5)

def test_moog_of_the_paper_equals_the_authors(tmp_path):
    model = moog_load(moog_arrays("movi"), tmp_path)
    video = MOOG["movi/video"].movedim(-1, -3)
    states = model.unroll(video, model.state_norm(MOOG["movi/state0"]))
    predicted = states.predicted[:1]
    frames, attention = model.decode(predicted, (16, 16), return_attention=True)
    middle = model.decode(predicted, (16, 16), moog.subsample((16, 16), 4))
    moog_equals("movi", dict(
        encoder_output=model.encoder(video[0])[None], states_predicted=predicted,
        states_corrected=states.corrected[:1], video_predicted=frames.movedim(-3, -1),
        dec_cross_attn_last=attention[:, 3:], eval4_video_predicted=middle.unflatten(2, (4, 4))))
    for name, factor in (("movi/train2", 2), ("movi/train8", 8)):
        index = moog.subsample((16, 16), factor, MOOG[f"{name}_offsets"].long())
        colours = model.decode(predicted, (16, 16), index)
        close(moog.gather_pixels(video[:1], index), MOOG[f"{name}_targets"].flatten(2, 3), 0)
        close(colours, MOOG[f"{name}_video_predicted"].flatten(2, 3), 2e-5)

@pytest.mark.parametrize("recompute", [False, True])
def test_moog_loss_and_gradients_equal_the_authors(tmp_path, monkeypatch, recompute):
    model = moog_load(moog_arrays("movi"), tmp_path).train()
    model.cfg = replace(model.cfg, subsample=1, checkpoint=recompute)
    state = model.state_norm(MOOG["movi/state0"])
    monkeypatch.setattr(model, "initial_state", lambda B, tokens: state)
    loss, _ = model(dict(video=MOOG["movi/video"].movedim(-1, -3)))
    loss.backward()
    close(loss, MOOG["movi/loss"][0], 1e-6)
    # in the authors' layout, to compare the same few entries of each tensor
    for i, (name, shape) in enumerate(sorted(MOOG_SHAPES["movi"].items())):
        size = int(np.prod(shape))
        number = torch.arange(size, dtype=torch.float64).view(shape)
        [(key, order)] = moog.convert({name: number}).items()
        theirs = np.empty(size)
        theirs[order.flatten().long()] = model.get_parameter(key).grad.flatten()
        norm = MOOG["movi/grad_norm"][i]
        close(np.linalg.norm(theirs), norm, 1e-4 * norm)
        some = np.linspace(0, size - 1, 8).astype(int)
        close(np.resize(theirs[some], 8), MOOG["movi/grad_some"][i], 1e-4 * norm)

def test_moog_readouts_equal_the_authors(tmp_path):
    for kind in ("point_head", "box_head"):
        head = moog_load(moog_arrays(kind), tmp_path, moog.load_official_head)
        out = head(MOOG[f"{kind}/features"], MOOG[f"{kind}/queries"])
        close(out.values, MOOG[f"{kind}/values"], 2e-5)
        if kind == "point_head":
            visible, certain = out.logits.split(1, -1)
            moog_equals(kind, dict(logits_visible=visible, logits_certainty=certain))
    points = moog.PointReadout(32, 32, (3, 8, 32), 64)
    points.load_state_dict(moog.convert(moog_arrays("point_readout")))
    features = MOOG["point_readout/features"].requires_grad_()
    queries = MOOG["point_readout/queries"]
    out = points(features, queries, MOOG["point_readout/query_frame"])
    free = points(features, queries)
    assert (out.visible == MOOG["point_readout/visible"][..., 0]).all()
    for name in ("values", "logits", "state"):
        close(getattr(out, name), MOOG[f"point_readout/{name}"], 2e-5)
        close(getattr(free, name), MOOG[f"point_readout/nomask_{name}"], 2e-5)
    rest = points(features[:, 1:], queries, None, points(features[:, :1], queries).state)
    close(rest.values, free.values[:, 1:], 2e-5)                # it goes on from chunk to chunk
    [gradient] = torch.autograd.grad(free.values[:, -1].sum(), features)
    assert (gradient != 0).any(-1).all()                        # of the last frame, to all
    depth = moog.DepthReadout(32, (3, 8, 32), 64)
    depth.load_state_dict(moog.convert(moog_arrays("depth_readout")))
    features = MOOG["depth_readout/features"].flatten(0, 1)
    rolled = moog.subsample((16, 16), 4, MOOG["depth_readout/train4_offsets"].long()).flatten(0, 1)
    middle = moog.subsample((16, 16), 4)
    for name, index in dict(values=None, eval4_values=middle, train4_values=rolled).items():
        theirs = MOOG[f"depth_readout/{name}"]
        close(depth(features, (16, 16), index).view_as(theirs), theirs, 2e-5)

@pytest.mark.parametrize("place, name, wrong", [
    (Midway, "motion_pos", property(lambda self: self._parameters["motion_pos"].roll(17, 1))),
    (Midway, "teacher_embed", property(lambda self: self.student_embed)),
    (midway, "prediction_loss", lambda x, y, loss=midway.prediction_loss: loss(x[:, 1:], y[:, 1:])),
    (moog.F, "gelu", lambda x, approximate="none", gelu=F.gelu: gelu(x)),
    (moog, "axis_positions", lambda n, device=None: torch.linspace(-1, 1, n)),
    (moog, "grid_positions", lambda h, w, device=None, f=moog.grid_positions: f(h, w).flip(-1))])
def test_parity_would_catch(place, name, wrong, official, tmp_path, monkeypatch):
    model = moog_load(moog_arrays("released"), tmp_path)
    official._modules.pop(name, None)
    monkeypatch.setattr(place, name, wrong, raising=False)
    with pytest.raises(AssertionError, match="off by"):
        close(level_losses(official), REFERENCE["losses"], 1e-4)
        moog_equals("released", released_outputs(model), 1e-4)

# ---- MooG: sizes, recurrence, training -----------------------------------------------------------
def tiny_moog(**options):
    torch.manual_seed(0)
    return moog.MooG(moog.Config(**dict(
        size=16, frames=3, tokens=6, dim=16, channels=(8, 8, 16), strides=(2, 1, 2),
        encoder_bases=4, decoder_bases=4, predictor=(1, 2, 8), corrector=(1, 2, 16),
        decoder=(2, 2, 8), mlp=24, subsample=4) | options))

def test_moog_sizes_are_the_papers():
    released = moog.Config(**moog.PRESETS["released"])
    with torch.device("meta"):
        for config, size in ((moog.Config(), 34_726_787), (released, 35_193_811),
                             (moog.Config(grid=True, recurrent=False), 34_726_787),
                             (replace(released, decoder_self_attention=True), 36_967_507)):
            assert size_of(moog.MooG(config)) == size
        readouts = [moog.AttentionReadout(2), moog.AttentionReadout(4, heads=4, copies=1),
                    moog.PointReadout(), moog.DepthReadout()]
    assert [*map(size_of, readouts)] == [11_338_760, 11_424_832, 11_324_804, 10_434_817]

@pytest.mark.parametrize("options", [
    dict(), dict(released=True), dict(grid=True), dict(grid=True, recurrent=False)])
def test_moog_goes_on_from_chunk_to_chunk(options):
    model = tiny_moog(**options).eval()
    video = torch.randint(256, (2, 4, 3, 9, 7), dtype=torch.uint8)
    start = model.initial_state(2, 6)
    p, c, features, last = model.unroll(video, start)
    rest = model.unroll(video[:, 1:] / 255, model.unroll(video[:, :1], start).last)
    close(rest.features, features[:, 1:], 4e-6)
    released = model.cfg.released
    close(features, c if released else torch.cat([p, c], 2), 0)
    if model.cfg.grid:                              # tokens are places: sides / 4, rounded up
        e = model.encoder(video[:, 0] / 255)
        seen = e + model.corrector(e, p[:, 0] if model.cfg.recurrent else e)
        close(c[:, 0], model.state_norm(seen), 2e-6)
    # a frame is predicted from those before it; the last one is not seen at all
    known = [start[:, None], c] if released else [p, (last + model.predictor(last))[:, None]]
    close(model.predict_ahead(video, start), torch.cat(known, 1), 2e-6)

def test_moog_meters_are_of_the_same_pixels_and_not_of_frame_0(monkeypatch):
    model = tiny_moog(subsample=2)
    video = torch.rand(2, 1, 3, 16, 16) / 2 + torch.tensor([0, 0.1, 0.2]).view(3, 1, 1, 1)
    wrong = torch.tensor([0.5, 0.01, 0.1]).view(3, 1, 1)        # by how much, frame by frame
    calls = []

    def decode(states, size, index):
        calls.append((states, index))
        return moog.gather_pixels(video, index) + wrong

    monkeypatch.setattr(model, "decode", decode)
    torch.manual_seed(1)
    loss, logs = model(dict(video=video))
    torch.manual_seed(1)
    table = model.report(dict(video=video))
    (states, index), (same_states, _) = calls
    assert len(index.flatten(0, 1).unique(dim=0)) in (3, 4)     # of 4: each frame draws its own
    close(same_states, states, 1e-6)
    close(loss, wrong.square().mean(), 1e-6)
    close([logs["psnr"], logs["copy_psnr"]], [(40 + 20) / 2, 20], 1e-3)
    close([[*row.values()] for row in table.values()], [[(40 + 20) / 2, 20], [20, 20]], 1e-3)

@torch.no_grad()
@pytest.mark.parametrize("together", [False, True])
def test_moog_decodes_in_chunks_unless_pixels_see_each_other(together, monkeypatch):
    model = tiny_moog(decoder_self_attention=together).eval()
    states = torch.randn(2, 3, 6, 16)
    frames, seen = model.decode(states, (16, 16), return_attention=True)
    sizes = []
    model.decoder.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    monkeypatch.setattr(moog, "DECODE_CHUNK", 60)               # 10 pixels of 2 x 3 frames
    close(model.decode(states, (16, 16)), frames, 2e-6)
    assert max(sizes) == (256 if together else 10)
    used = seen[:1].mean(2).argmax(-1).unique()                 # of 6 tokens, by any pixel
    close(model.tokens_used(states[:1], (16, 16), None), len(used) / 6, 1e-6)

def test_moog_starts_as_it_says():
    model = tiny_moog(dim=64, state_scale=0.5, released=True)
    state = model.initial_state(4, 50)
    assert abs(state.std() - 0.5) < 0.02 and (state[0] != state[1]).any()
    query = model.predictor.layers[0].self_attention.query.weight
    assert abs(query.std() * 64 ** 0.5 - 1) < 0.3               # variance 1 / fan-in
    frames = model.decode(state[None, :3], (16, 16))
    assert abs(frames.mean() - 0.5) < 0.1 and frames.std() < 0.2            # near grey
    normed = tiny_moog(state_scale=1.0).initial_state(4, 50)
    close(normed.square().mean(-1), torch.ones(4, 50), 1e-2)

def test_moog_losses_on_hand_made_cases():
    points = moog.PointReadout(8, 8, (1, 1, 8), 8)
    yes = torch.ones(1, 1, 1, dtype=torch.bool)
    middle = torch.full((1, 1, 1, 2), 0.5)

    def loss(x, visible=yes, valid=None, target=middle):        # x pixels off, sure of itself
        values = middle + torch.tensor([x / 256, 0.0])
        readout = moog.Readout(values, torch.full_like(values, 20.0))
        return points.loss(readout, target, visible, valid)

    close(loss(0), 0, 1e-6)                                     # there, visible and certain
    close(loss(2), 0.05 * 2 ** 2 / 2, 1e-4)                     # quadratic below 4 pixels
    close(loss(8), 0.05 * 4 * (8 - 2) + 20, 1e-4)               # linear; certain but wrong
    close(loss(8, visible=~yes, target=middle * float("nan")), 20, 1e-4)    # visibility alone
    close(loss(8, valid=~yes), 0, 0)
    box = torch.tensor([[[[0.0, 0.0, 0.5, 0.5]]]])
    others = torch.cat([box, box * 0.72, box * 0.69, box + 0.5])    # overlap 1, 0.52, 0.48, 0
    error, near = moog.BoxReadout(8, 8, (1, 1, 8), 8).error(others, box.expand_as(others))
    assert near.flatten().tolist() == [True, True, False, False]
    close(error[3].item(), 0.05 * 4 * (128 - 2), 1e-4)
    depth = moog.DepthReadout(8, (1, 1, 8), 8, bases=2)
    target = torch.tensor([3.0, float("inf")])
    close(depth.loss(torch.tensor([1.0, 5.0]), target, target.isfinite()), 4, 1e-6)

def test_moog_is_compiled_by_the_step():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_moog(state_scale=0.0, subsample=1)             # nothing is drawn
    batch = dict(video=torch.rand(2, 3, 3, 16, 16))
    eager, _ = model(batch)
    model.compile(backend="aot_eager", dynamic=False)
    close(model(batch)[0], eager, 1e-6)
    model.report(batch)                             # with another number of pixels: not compiled
    assert 4 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8     # not one a frame

@pytest.mark.parametrize("call, word", [
    (partial(small_model, size=20), "size=20"), (partial(tiny_moog, strides=(2,)), "strides"),
    (partial(small_model, latent_dynamics=False, dino_weight=0.0), "no loss"),
    (lambda: small_model().predict(*torch.rand(2, 1, 3, 20, 20)), "patch size 8"),
    (lambda: small_model(local_crops=3)(random_batch(SMALL, 1)), "3 boxes"),
    (lambda: MeloMotion(melomotion.Config(pooling="mean")), "rgb")])
def test_wrong_configs_and_shapes_say_what_to_change(call, word):
    with pytest.raises((AssertionError, ValueError), match=word):
        call()

class Foreign:
    def __reduce__(self):                           # leaves a trace if a reader executes it
        return open, ("executed", "w")

@pytest.mark.parametrize("name, word", [
    ("object.pth", "Unpickling"), ("hole.pth", "motion_tokens"), ("cut.pth", "authors"),
    ("object.npz", "allow_pickle"), ("shape.npz", "mlp.0.bias")])
def test_other_files_than_the_authors_are_refused(name, word, official_ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                     # where a pickle would leave its trace
    torch.save(dict(official_ckpt, args=Foreign()), "object.pth")
    torch.save(dict(official_ckpt, motion_loss={}), "hole.pth")
    Path("cut.pth").write_bytes(Path("hole.pth").read_bytes()[:20_000])
    movi = moog_arrays("movi")
    np.savez("object.npz", **movi, x=np.array([Foreign()], object))
    np.savez("shape.npz", **movi | {"corrector/layer_0/MLP_in/bias": np.zeros(3)})
    with pytest.raises(ValueError, match=word) as error:
        (load_official if name.endswith("pth") else moog.load_official)(name)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not Path("executed").exists()

def test_official_file_may_lack_head_and_center(official_ckpt, tmp_path, capsys):
    del official_ckpt["dino_loss"]
    torch.save(official_ckpt, tmp_path / "bare.pth")
    model = load_official(tmp_path / "bare.pth")
    assert "no DINO head or center" in capsys.readouterr().out and not model.cfg.dino_weight

# ---- crops and colours ---------------------------------------------------------------------------
def blurred(x, sigma):
    """One crop (1, 3, S, S) by a plain convolution; what lies outside has no weight."""
    S = x.shape[-1]
    line = torch.arange(1.0 - S, S)
    weight = torch.exp(-line ** 2 / (2 * sigma ** 2))
    kernel = (weight[:, None] * weight).expand(3, 1, -1, -1)
    inside = F.conv2d(torch.ones_like(x), kernel, padding=S - 1, groups=3)
    return F.conv2d(x, kernel, padding=S - 1, groups=3) / inside

def hue_turned(x, turn):
    pixels = []
    for pixel in x[0].flatten(1).T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        pixels.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    return torch.tensor(pixels).T.reshape(x.shape)

def coloured(x, order, factors, gray, blur, solarize):
    """photometric of one crop (1, 3, S, S), operation by operation."""
    def luma(x):
        return (0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).expand_as(x)

    for number in order.tolist():
        factor = factors[number].item()
        if number == 3:
            x = hue_turned(x, factor)
        else:
            other = [0 * x, luma(x).mean((2, 3), keepdim=True), luma(x)][number]
            x = (factor * x + (1 - factor) * other).clamp(0, 1)
    x = luma(x) if gray else x
    x = blurred(x, blur) if blur > 0 else x
    return torch.minimum(x, 1 - x) if solarize else x

def test_crops_get_each_their_own_colours():
    params = MultiCrop(8, 8, 30).draw(np.random.default_rng(0), 90, 120)[2]
    params["solarize"] = torch.arange(66) % 3 == 0      # else of one crop in 66 only
    x = torch.rand(66, 3, 8, 8)
    x[:, :, 0, 0] = 0.4                                 # grey has no hue
    together = data.photometric(x, params)
    for i in range(66):
        own = {name: value[i] for name, value in params.items()}
        close(together[i:i + 1], coloured(x[i:i + 1], **own), 3e-6)
    assert params["gray"].any() and (params["blur"] > 0).any()

def test_a_crop_is_its_box_resized_and_flipped():
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    expected = torch.from_numpy(frame[5:25, 12:32]).permute(2, 0, 1)
    assert torch.equal(data.crop_uint8(frame, (5, 12, 20, 20), 20), expected)
    assert torch.equal(data.crop_uint8(frame, (5, 12, 20, 20), 20, flip=True), expected.flip(-1))
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    small = data.crop_uint8(stripes, (0, 0, 64, 64), 15).int()
    assert (small[..., 2:-2] - 127).abs().max() <= 8           # too fine to be seen: grey, no moire

@pytest.fixture(scope="module")
def drawn():
    """Boxes, flips and parameters of 400 pairs, 6 + 2 * 8 crops each, of frames 360 x 640."""
    crops = MultiCrop(224, 96, 8)
    draws = [crops.draw(np.random.default_rng(i), 360, 640) for i in range(400)]
    boxes, flips, params = torch.utils.data.default_collate(draws)
    return boxes.numpy(), flips.numpy(), {name: value.numpy() for name, value in params.items()}

def test_multicrop_boxes_follow_the_papers_rules(drawn):
    boxes, flips, _ = drawn
    assert (boxes[:, 0] == boxes[:, 1]).all() and not flips[:, :2].any()    # motion: one, no flip
    assert (boxes[:, 2:4] == boxes[:, 4:6]).all()                   # globals: alike in both frames
    assert (flips[:, 2:4] == flips[:, 4:6]).all()
    for one, other in ((2, 3), (2, 6), (6, 14), (6, 7)):            # the others are independent
        assert (boxes[:, one] != boxes[:, other]).any(-1).mean() > 0.9
        assert abs((flips[:, one] != flips[:, other]).mean() - 0.5) < 0.1
    top, left, h, w = boxes[:, 0].T                                 # anywhere, as often
    for place in (top / (360 - h), left / (640 - w)):
        close(np.quantile(place, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], 0.1)
    close([(w / h).min(), (w / h).max()], [3 / 4, 4 / 3], 0.03)
    share = boxes[..., 2:].prod(-1) / (360 * 640)
    near = boxes[:, 2:, :2]                                         # of those in the initial crop
    far = near + boxes[:, 2:, 2:]
    initial = (far.max(1) - near.min(1)).prod(-1) / (360 * 640)
    for value, least, most in (
            (share[:, 0], 0.2, 0.4), (share[:, 2:6], 0.05 * 0.4, 0.2),
            (share[:, 6:], 0.05 * 0.05, 0.2 * 0.4), (initial, 0.05, 0.2)):
        close([value.min(), value.max()], [least, most], 0.02)

def test_multicrop_colours_follow_the_papers_rules(drawn):
    params = drawn[2]
    factors = params["factors"]
    blur = params["blur"]
    jittered = (factors != data.NEUTRAL).any(-1)
    chances = ([0, 2, 4], 1, 0), ([1, 3, 5], 0.1, 0.2), (range(6, 22), 0.5, 0)      # T1, T2, T3
    for crops, blurs, solarizes in chances:
        for found, chance in ((jittered, 0.8), (params["gray"], 0.2), (blur > 0, blurs),
                              (params["solarize"], solarizes)):
            share = found[:, crops].mean(0)
            close(share, np.full(len(crops), chance), 0.08 if 0 < chance < 1 else 0)
    close(factors[jittered].min(0), [0.6, 0.6, 0.8, -0.1], 0.01)
    close(factors[jittered].max(0), [1.4, 1.4, 1.2, 0.1], 0.01)
    close([blur[blur > 0].min(), blur.max()], [0.1, 2.0], 0.01)
    assert len(np.unique(params["order"].reshape(-1, 4), axis=0)) == 24                 # any order
    assert (factors[:, 0] != factors[:, 1]).any(1).mean() > 0.9

def cropped(frames, **options):
    crops = MultiCrop(32, 16, 3, **options)
    pair = crops(frames, np.random.default_rng(5))
    return crops.finish(torch.utils.data.default_collate([pair]))

@pytest.mark.parametrize("mode", ["shared", "none"])
def test_motion_colours_concern_the_motion_crops_alone(mode):
    still = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    free = cropped([still, still])                      # so that only colours can differ
    other = cropped([still, still], motion_colours=mode)
    expected = free if mode == "shared" else cropped([still, still], colours=False)
    for crop in other["motion"][0]:
        close(crop, expected["motion"][0, 0], 1e-6)
    assert free["motion"].diff(dim=1).abs().max() > 0.05
    for name in ("globals", "locals"):
        close(other[name], free[name], 0)

def test_multicrop_cuts_the_boxes_that_it_draws():
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    boxes, flips, _ = MultiCrop(32, 16, 3).draw(np.random.default_rng(5), 90, 120)
    batch = cropped(frames, colours=False)
    crops = [*batch["motion"][0], *batch["globals"][0].flatten(0, 1)]
    crops += batch["locals"][0].flatten(0, 1)
    sources = frames[[0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]]
    sizes = [32] * 6 + [16] * 6
    for crop, frame, box, size, flip in zip(crops, sources, boxes, sizes, flips, strict=True):
        close(crop, data.crop_uint8(frame, box, size, flip) / 255, 1e-6)

def test_loader_is_a_pure_function_of_the_sample_number():
    scenes = data.SceneOptions(size=24, sprites=1)

    def load(*batches, workers=0, split="train"):
        return list(data.make_loader(
            "scenes", SMALL.inputs, batches, seed=3, workers=workers, split=split, scenes=scenes))

    [whole] = load(range(6))
    parts = load(range(2), range(2, 6))
    spread = load(range(2), range(2, 6), workers=2)
    for name in whole:
        close(torch.cat([part[name] for part in parts]), whole[name], 1e-5)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(parts, spread))
    assert not torch.equal(load(range(6), split="eval")[0]["motion"], whole["motion"])

# ---- synthetic scenes ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scenes():
    return Scenes(), Scenes().batch(range(6), truth=True)

def truth(count=64, **options):
    """Scenes without motion, but for the options."""
    options = dict(speed=0, pan=0, zoom=0, roll=0, textures=8) | options
    return Scenes(**options).batch(range(count), truth=True)

def look(scenes, index, points, t):
    """Colours (P, 3) and owners (P,) at any points (P, 2) of frame t of clip `index`."""
    world = scenes._world([np.random.default_rng((scenes.seed, index))])
    world.a = world.a[:, t:t + 1]
    world.b = world.b[:, t:t + 1]
    points = torch.view_as_complex(points.contiguous())
    owner = scenes._owner(world, points)
    return scenes._colour(world, owner, points)[0, :, 0].T, owner[0]

def test_scene_colour_does_not_change_along_the_flow(scenes):
    s, d = scenes
    pixels = torch.view_as_real(s.pixels)                                           # (H*W, 2)
    for i, t in np.ndindex(6, s.frames - 1):
        landed = pixels + d["flow"][i, t].flatten(1).T
        colour, owner = look(s, i, landed, t + 1)
        change = (colour - d["video"][i, t].flatten(1).T).abs()                     # (H*W, 3)
        seen = ~d["occluded"][i, t].flatten()
        assert change[seen].max() < 1e-3
        assert torch.equal(owner[seen], d["ids"][i, t].flatten()[seen])
        assert -0.5 <= landed[seen].min() and landed[seen].max() <= 63.5
        assert change[~seen].mean() > 0.05                          # hidden: another colour
    assert Scenes(frames=1, size=32).batch([0], truth=True)["flow"].shape == (1, 0, 2, 32, 32)

def test_scene_tracks_follow_the_flow_and_visibility_the_occlusion(scenes):
    s, d = scenes
    tracks, visible = d["tracks"], d["visible"]
    assert visible[:, 0].all() and not visible.all()
    close(tracks[:, 0].round(), tracks[:, 0], 1e-6)                         # at pixels of frame 0
    x, y = tracks[:, 0].round().long().unbind(-1)
    batch = torch.arange(6)[:, None]
    flow = d["flow"][:, 0].movedim(1, -1)[batch, y, x]
    close(tracks[:, 0] + flow, tracks[:, 1], 1e-3)
    assert torch.equal(visible[:, 1], ~d["occluded"][batch, 0, y, x])
    for i, t in np.ndindex(6, s.frames):
        start, owner = look(s, i, tracks[i, 0], 0)
        colour, at = look(s, i, tracks[i, t], t)
        seen = visible[i, t]
        close(colour[seen], start[seen], 1e-3)
        assert torch.equal(at[seen], owner[seen])

def test_scene_parallax_is_one_over_depth_and_nearer_sprites_hide():
    d = truth(4, frames=2, sprites=3, pan=6)
    for flow, ids, depth in zip(d["flow"][:, 0], d["ids"][:, 0], d["depth"][:, 0]):
        background = flow[:, ids == 0].mean(1)
        close(flow, background[:, None, None] / depth, 1e-3)
        nearer = depth.flatten()[ids.flatten().argsort()]
        assert (nearer.diff() <= 0).all()                               # the larger id, the nearer
        assert len(depth.unique()) == len(ids.unique()) and depth.min() >= 0.4

@pytest.mark.parametrize("option, most", [("pan", 4), ("pan", 16), ("zoom", 0.1), ("roll", 0.1)])
def test_scene_camera_moves_by_as_much_as_asked(option, most):
    flow = truth(frames=2, sprites=0, **{option: most})["flow"][:, 0]
    flow = torch.complex(*flow.flatten(2).unbind(1))                    # (B, H*W) x + i y
    if option == "pan":
        amount = flow[:, 0]
        assert (flow - amount[:, None]).abs().max() < 1e-4              # the same everywhere
    else:
        from_middle = Scenes().pixels - (31.5 + 31.5j)
        factor = 1 + flow[:, 0] / from_middle[0]
        assert ((factor[:, None] - 1) * from_middle - flow).abs().max() < 1e-3
        rate = factor.log()                                             # log scale + i radians
        amount, none = (rate.imag, rate.real) if option == "roll" else (rate.real, rate.imag)
        assert none.abs().max() <= 1e-5
    assert 0.9 * most < amount.abs().max() <= most
    assert 0.35 * most < amount.abs().mean() < 0.65 * most
    assert amount.mean().abs() < 0.25 * most                            # either sign, any direction

def test_scene_paths_are_quadratic_and_keep_the_speeds_bounds():
    steps = truth(frames=9, sprites=0, pan=8)["flow"][..., 0, 0]        # (B, 8, 2) pixels per frame
    assert steps.diff(n=2, dim=1).abs().max() <= 1e-3
    change = (steps[:, -1] - steps[:, 0]).norm(dim=-1).max()    # 7/8 of that from end to end
    assert 7 < steps[:, 3:5].mean(1).norm(dim=-1).max() <= 8
    assert 0.85 * 7 < change <= 7
    still = truth(4)
    assert still["flow"].abs().max() < 1e-5
    assert still["visible"].all() and not still["occluded"].any()

def test_scene_boxes_are_tight_around_their_shapes():
    areas = data.silhouettes()[0].mean((1, 2)) * 64**2                  # if as large as the frame
    alone = Scenes(sprites=1, frames=1, radius=(0.2, 0.4)).batch(range(64), truth=True)
    tight = 0
    for mask, box in zip(alone["classes"][:, 0], alone["boxes"][:, 0, 0]):
        where = mask.nonzero().flip(1)                                  # (N, 2) x, y
        if len(where) and box.min() > 0 and box.max() < 63:             # wholly inside
            close(torch.cat([where.amin(0), where.amax(0)]), box, 2)
            share = len(where) / areas[mask.max() - 1]
            assert 0.9 * 0.4**2 < share < 1.1 * 0.8**2
            tight += 1
    assert tight > 10

def test_scene_depends_on_its_number_and_split_alone(scenes):
    s, d = scenes
    for name, value in s.batch([4, 1], truth=True).items():
        close(value, d[name][[4, 1]], 1e-4)
    assert torch.equal(Scenes().batch([2])["video"][0], d["video"][2])          # without truth
    assert torch.equal(d["classes"] > 0, d["ids"] > 0)
    assert not torch.equal(Scenes(seed=1).batch([2])["video"][0], d["video"][2])
    held_out = Scenes(split="eval")
    other = held_out.batch(range(40))["video"][:, 0]
    assert (d["video"][:, None, 0] - other).abs().mean((2, 3, 4)).min() > 0.05
    likeness = s.bank.flatten(1) @ held_out.bank.flatten(1).T
    assert likeness.abs().max() < 0.9 * s.bank[0].numel()

# ---- your own videos -----------------------------------------------------------------------------
def bars(i, size):
    """A frame (H, W, 3): i's bits as ten bars in the lower half, red on top left, else white."""
    image = np.full((size[1], size[0], 3), 255, np.uint8)
    image[:size[1] // 4, :48] = 255, 0, 0
    for bit in range(10):
        image[size[1] // 2:, bit * 24:bit * 24 + 24] = 255 * (i >> bit & 1)
    return image

def texture(i, size):
    """Noise that moves by 3 pixels a frame: many bits to lose."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return np.roll(noise, 3 * i, 1)

def encode(path, times, size=(256, 64), gop=12, codec="libx264", b_frames=2, matrix=None,
           paint=bars):
    """Writes a video whose frame i is paint(i) at times[i]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tick = Fraction(1, 30) if codec == "mpeg4" else Fraction(1, 15360)
    with av.open(str(path), "w") as out:
        preset = {"preset": "ultrafast"} if codec == "libx264" else {}
        stream = out.add_stream(codec, rate=30, options=preset | {"bf": str(b_frames)})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = tick
        if matrix:
            stream.set_display_matrix(matrix)
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(paint(i, size), "rgb24")
            frame.pts = round(t / tick)
            frame.time_base = tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path

def number(image):
    """Image (H, W, 3) or (3, H, W) -> the frame number that encode wrote into it."""
    image = torch.as_tensor(image)
    green = image[..., 1] if image.shape[-1] == 3 else image[1]
    lit = green[-8, 12:240:24] > 128
    return sum(1 << bit for bit in range(10) if lit[bit])

def numbers(dataset, indices):
    samples = dataset.__getitems__(list(indices))
    return [list(map(number, sample["video"])) for sample in samples]

CONSTANT = [i / 30 for i in range(120)]
VARIABLE = np.cumsum([0] + [(1, 4, 2, 1, 7, 1)[i % 6] / 60 for i in range(119)]).tolist()
BURSTS = [5 * (i // 30) + i % 30 / 30 for i in range(120)]     # a second, then nothing for four

@pytest.mark.parametrize("name, gop", [("constant.mp4", 12), ("variable.mkv", 250),
                                       ("late.mkv", 12), ("late.ts", 250), ("constant.ts", 12)])
def test_read_frames_finds_the_first_frame_at_or_after(tmp_path, name, gop):
    times = VARIABLE if "variable" in name else CONSTANT
    path = encode(tmp_path / name, np.add(times, 2.5 * ("late" in name)), gop=gop)
    wanted = np.sort(np.random.default_rng(0).uniform(0, times[-1], 12)).tolist() + [times[-1]]
    images, true = read_frames(path, wanted)
    shown = list(map(number, images))
    assert shown == np.searchsorted(times, np.subtract(wanted, 1e-3)).tolist()
    assert np.allclose(true, np.array(times)[shown], atol=1e-3)
    backwards, _ = read_frames(path, times[::-9])           # dear, but not wrong
    assert list(map(number, backwards)) == list(range(119, -1, -9))
    with pytest.raises(ValueError, match="ends at"):
        read_frames(path, [0.0, times[-1] + 1])

@pytest.mark.parametrize("a, b, c, d", [
    (1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1), (-1, 0, 0, 1),
    (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0), (0, -1, 1, 0)])
def test_all_eight_orientations_come_upright(tmp_path, a, b, c, d):
    """x is shown at a x + c y, and y at b x + d y."""
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    plain = read_frames(encode(tmp_path / "a.mp4", CONSTANT[:2]), [0.0])[0][0]
    shown = read_frames(encode(tmp_path / "b.mp4", CONSTANT[:2], matrix=matrix), [0.0])[0][0]
    turned = plain if a else plain.swapaxes(0, 1)
    assert np.array_equal(shown, turned[::b + d, ::a + c])

@pytest.mark.parametrize("times, low, high, slack, name", [
    (CONSTANT, 0.5, 1.0, 1 / 60, "a.MP4"), (VARIABLE, 0.5, 0.5, 0.025, "a.MP4"),
    (BURSTS, 0.5, 0.9, 1 / 60, "a.MP4"), (CONSTANT, 0.5, 1.0, 1 / 60, "late.mkv")])
def test_pairs_lie_in_the_gap_to_half_a_local_frame(tmp_path, times, low, high, slack, name):
    path = encode(tmp_path / name, np.add(times, 2.5 * (name == "late.mkv")))
    dataset = Videos(path, gap=(low, high))
    gaps = [times[b] - times[a] for a, b in numbers(dataset, range(60))]
    assert low - slack - 1e-3 < min(gaps) and max(gaps) < high + slack + 1e-3
    assert max(gaps) - min(gaps) >= 0.7 * (high - low) and not dataset.broken.any()

def test_clips_are_consecutive_decoded_frames(tmp_path):
    path = encode(tmp_path / "variable.mp4", VARIABLE)
    assert (np.diff(numbers(Videos(path, frames=5, stride=7), range(20))) == 7).all()
    assert numbers(Videos(path, frames=120, repeat=1), [0]) == [list(range(120))]   # all of it

def test_avi_without_b_frames_is_read_and_with_them_refused(tmp_path):
    good = encode(tmp_path / "a.avi", CONSTANT, codec="mpeg4", b_frames=0)
    assert number(read_frames(good, [2.0])[0][0]) == 60
    with pytest.raises(ValueError, match="ffmpeg -i"):
        data.Reader(encode(tmp_path / "b.avi", CONSTANT, codec="mpeg4"))

def test_the_best_of_two_streams_is_read(tmp_path):
    with av.open(str(tmp_path / "a.ts"), "w") as out:
        for width in (64, 256):
            stream = out.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        for stream in out.streams.video:
            image = np.zeros((64, stream.width, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            out.mux(stream.encode())
    assert read_frames(tmp_path / "a.ts", [0.0])[0][0].shape == (64, 256, 3)

def test_samples_depend_on_seed_and_number_alone(tmp_path):
    for name in ("a.m4v", "deep/er/b.mov", "deep/c.mkv"):
        video = encode(tmp_path / "x.mp4", CONSTANT)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        video.rename(tmp_path / name)
    (tmp_path / "._a.mp4").write_bytes(b"left by macOS")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    dataset = Videos(tmp_path, repeat=3, seed=4)
    assert list(map(os.path.basename, dataset.files)) == ["a.m4v", "bad.mp4", "c.mkv", "b.mov"]
    drawn = numbers(dataset, range(12))
    assert [numbers(dataset, [i])[0] for i in reversed(range(12))] == drawn[::-1]
    assert drawn != numbers(dataset, range(12, 24))
    assert drawn != numbers(Videos(tmp_path, repeat=3, seed=5), range(12))

def test_the_samples_of_a_video_are_one_sweep_of_decoding(tmp_path, monkeypatch):
    for name in "abcd":
        encode(tmp_path / f"{name}.mp4", CONSTANT)
    opened = []
    frames = []
    real_open, real_keep = av.open, data.Reader.keep
    monkeypatch.setattr(av, "open", lambda path: opened.append(path) or real_open(path))
    monkeypatch.setattr(data.Reader, "keep", lambda self, frame: (
        frames.append((self, frame.pts)), real_keep(self, frame))[1])
    pairs = numbers(Videos(tmp_path, gap=(0.1, 0.1)), range(20))
    assert len(opened) == len(set(opened)) == 4             # a pass takes every file, each once
    assert len(frames) == len(set(frames)) < 4 * 120        # and decodes no frame twice
    assert (np.diff(np.reshape(pairs, (4, 5, 2)), axis=1) >= 0).all()      # in order of time

def write_frames(folder, colours):
    for name, value in colours.items():
        put(folder / name, value, (8, 8))

def first_pixels(dataset):
    return np.array([sample["video"][:, 0, 0, 0].tolist() for sample in dataset])

def test_frame_folders_pair_by_number_within_a_sequence(tmp_path, capfd):
    write_frames(tmp_path / "x", {f"drive_{i:04d}.png": i for i in range(0, 100, 5)})
    write_frames(tmp_path / "y", {f"drive_{i}.png": 100 + i for i in range(0, 100, 5)})
    write_frames(tmp_path / "y", {"cover.png": 0})
    pairs = first_pixels(Videos(tmp_path, gap=(0.5, 1.0), fps=30))
    assert "cover.png" in capfd.readouterr().err
    assert set(np.diff(pairs).ravel()) == {15, 20, 25, 30}
    assert np.ptp(pairs // 100, axis=1).max() == 0          # both of x, or both of y
    os.remove(tmp_path / "x" / "drive_0050.png")
    clips = first_pixels(Videos(tmp_path, frames=4, stride=2))
    assert (np.diff(clips) == 10).all()                     # none over the hole
    assert set(clips[:, 0]) >= {5, 10, 15, 55, 60, 65, 105, 115, 165}

def test_nanoseconds_as_frame_numbers_stay_whole(tmp_path):
    start = 1403636579763555584
    write_frames(tmp_path, {f"{start + i * 5 * 10**7}.png": i for i in range(30)})
    steps = np.diff(first_pixels(Videos(tmp_path, fps=1e9)))
    assert 10 <= steps.min() and steps.max() <= 20

def test_broken_files_are_named_once_and_replaced(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    content = encode(tmp_path / "good.mp4", CONSTANT).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[:len(content) // 2])
    (tmp_path / "odd.mp4").write_bytes(content.replace(b"avc1", b"zzzz"))
    encode(tmp_path / "short.mp4", CONSTANT[:9])
    encode(tmp_path / "sparse.mp4", [5.0 * i for i in range(9)])
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "b.wmv").write_text("")
    (tmp_path / "\udcff.mp4").write_text("a name that can't be printed")
    dataset = Videos("~")
    assert "(.wmv)" in capfd.readouterr().err
    loader = torch.utils.data.DataLoader(dataset, 10, num_workers=2)
    assert sum(len(batch["video"]) for batch in loader) == 30
    lines = re.findall(r"(?m)^skipped.*/(.*)\.mp4: ", capfd.readouterr().err)
    assert sorted(lines) == ["\\udcff", "cut", "odd", "short", "sparse"]
    assert dataset.broken.sum() == 5                        # the workers counted together

@pytest.mark.parametrize("name, kind, word", [
    ("nowhere", FileNotFoundError, "no such"), ("empty", ValueError, "no videos and no frames"),
    ("fifo.mp4", FileNotFoundError, "no such"), ("far", ValueError, "neighbours are"),
    ("unnumbered", ValueError, "frame number"), ("junk", OSError, "ten files"),
    ("bad", OSError, "a16.png")])
def test_paths_that_hold_no_samples_say_so(tmp_path, name, kind, word):
    (tmp_path / "empty").mkdir()
    for i in range(12):
        put(tmp_path / f"junk/{i}.mp4", b"")
    os.mkfifo(tmp_path / "fifo.mp4")
    write_frames(tmp_path / "unnumbered", {"cover.jpg": 0})
    write_frames(tmp_path / "far", {"a1.png": 0, "a99.png": 0})
    write_frames(tmp_path / "bad", {"a1.png": 1, "a16.png": b"junk"})
    with pytest.raises(kind, match=f"{name}.*{word}"):
        Videos(tmp_path / name)[0]

# ---- the loop ------------------------------------------------------------------------------------
SHORT = "--device cpu --workers 0 --batch-size 4 --log-every 1 --scene-textures 8"
FAMILIES = dict(
    midway=(f"--model midway {SHORT} --dim 24 --head-hidden 16 --prototypes 32 --local-crops 2 "
            "--drop-path 0.3".split(), Midway),
    moog=(f"--model moog {SHORT} --size 16 --frames 3 --tokens 6 --dim 16 --channels 8 16 "
          "--strides 2 2 --predictor 1 2 8 --mlp 24 --subsample 4".split(), moog.MooG),
    melomotion=("--model melomotion --device cpu --batch-size 4 --warmup 0.3 --log-every 1".split(),
                MeloMotion))
TINY = FAMILIES["midway"][0]

def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)

def weights(folder):
    return checkpoint(folder)["model"]

def assert_same(a, b, tolerance=0):
    """Of two runs' folders: the weights."""
    for (name, x), (other, y) in zip(weights(a).items(), weights(b).items(), strict=True):
        assert name == other
        close(x.float(), y.float(), tolerance)

def log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]

def error_of(args):
    """The one line with which train.py leaves."""
    with pytest.raises(SystemExit) as leaving:
        train.cli([str(arg) for arg in args])
    line = leaving.value.code
    assert line.startswith("train.py: error: ") and "\n" not in line
    return line

def test_schedules_are_dinos():
    opt = train.Options(steps=525_000, lr=3.90625e-4, min_lr=1e-6, warmup=1 / 30,
                        weight_decay=0.04, weight_decay_end=0.4)
    for step, lr, decay in REFERENCE["schedule"].T:
        close(train.schedule(opt, int(step)), [lr, decay], 1e-12)

@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps_are_a_plain_loops(name, tmp_path, monkeypatch):
    """Of AdamW with the very batches of the run."""
    small, model_class = FAMILIES[name]
    forward = model_class.forward
    seen = []

    def recording(self, batch):
        seen.append((deepcopy(self), deepcopy(batch)))
        return forward(self, batch)

    flags = "--steps 3 --lr 1e-2 --min-lr 1e-3 --warmup 0 --clip 0.1 --betas 0.8 0.95"
    decays = "--weight-decay 0.2 --weight-decay-end 0.4"
    with monkeypatch.context() as patch:
        patch.setattr(model_class, "forward", recording)
        train.main([*small, *flags.split(), *decays.split(), "--out", str(tmp_path)])
    model = seen[0][0]
    groups = [dict(params=[p]) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    for step, (_, batch) in enumerate(seen[:3]):
        half = (1 + np.cos(np.pi * step / 3)) / 2
        for group in optimizer.param_groups:
            decayed = group["params"][0].ndim > 1 or name == "moog"     # its authors decay all
            group.update(lr=1e-3 + 9e-3 * half, weight_decay=(0.4 - 0.2 * half) * decayed)
        torch.manual_seed(step)
        model(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if hasattr(model, "before_step"):
            model.before_step(step / 3)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / 3)
    for key, value in weights(tmp_path).items():
        close(model.state_dict()[key], value, 2e-5)

@pytest.mark.parametrize("name", FAMILIES)
def test_four_steps_are_two_and_a_resume_and_two(name, tmp_path, capfd, monkeypatch):
    small, model_class = FAMILIES[name]
    train.main([*small, "--steps", "4", "--save-every", "2", "--out", f"{tmp_path}/whole"])
    after_step = model_class.after_step

    def stopping(self, progress):
        after_step(self, progress)
        if progress == 0.5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(model_class, "after_step", stopping)
        status = train.main([*small, "--steps", "4", "--out", f"{tmp_path}/parts"])
    assert status == 128 + signal.SIGTERM and checkpoint(tmp_path / "parts")["step"] == 2
    train.main(["--resume", f"{tmp_path}/parts", "--workers", "1"])
    assert_same(tmp_path / "whole", tmp_path / "parts")
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
        assert {key for key in a if a[key] != b[key]} <= {"ms", "eta_min", "samples_per_s"}
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {"ckpt.pt", "log.jsonl", "curves.png", "config.json"}
    said, told = capfd.readouterr()
    assert "again to leave now" in told and all(row in said for row in a["held_out"])
    assert max(len(line) for line in said.splitlines() if line.startswith("step ")) <= 100

def test_two_processes_equal_one(tmp_path):
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]
    # of midway the variance is of a micro-batch in the warm-up
    change = dict(midway="--drop-path 0 --shift-warmup 0".split(), moog=["--micro-batch", "1"])
    for name, flags in change.items():
        args = [*FAMILIES[name][0], "--steps", "3", "--clip", "0.1", *flags, "--out"]
        two = subprocess.Popen([*launch, HERE / "train.py", *args, tmp_path / f"{name}2",
                                "--micro-batch", "1"], stderr=subprocess.DEVNULL)   # 2 x 2 passes
        train.main([*args, str(tmp_path / name)])
        assert two.wait() == 0
        assert_same(tmp_path / name, tmp_path / f"{name}2", 1e-6)
        for a, b in zip(log(tmp_path / name), log(tmp_path / f"{name}2"), strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-5

def test_sigkill_leaves_a_whole_checkpoint_and_until_then_no_second_run_starts(tmp_path, capsys):
    out = tmp_path / "\udcff"                           # a path that can't be printed
    args = [*TINY, "--steps", "100000", "--save-every", "2", "--out", str(out)]
    process = subprocess.Popen([sys.executable, HERE / "train.py", *args], stdout=subprocess.PIPE,
                               text=True)
    next(line for line in process.stdout if re.match("step ([5-9]|[1-9][0-9])", line))
    assert "another run" in error_of([*args, "--steps", "1"])
    process.kill()
    process.wait()
    step = checkpoint(out)["step"]
    assert step >= 4 and step % 2 == 0
    (out / "log.jsonl").write_text('{"step": 1, "lo\n[3]\n')
    train.main(["--resume", str(out), "--steps", str(step + 1)])
    assert "stretches" in capsys.readouterr().out
    assert [line["step"] for line in log(out)] == list(range(1, step + 2))
    train.main([*TINY, "--steps", "1", "--out", str(out)])
    assert checkpoint(tmp_path / "\udcff.1")["step"] == step + 1 and checkpoint(out)["step"] == 1

@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_goes_on_after_any_learning_rate(name, tmp_path):
    args = [*FAMILIES[name][0], "--steps", "20", "--save-every", "1", "--out", tmp_path]
    message = error_of([*args, "--warmup", "0.3", "--lr", "1e6"])
    step = checkpoint(tmp_path)["step"]
    assert re.search(rf"step {step + 2}: .* last good checkpoint: .*\(step {step}\)", message)
    train.main(["--resume", str(tmp_path), "--lr", "1e-4", "--steps", str(step + 2)])
    assert all(np.isfinite(line["loss"]) for line in log(tmp_path))

def test_a_full_disk_spares_the_checkpoint_and_a_log_that_fails_stops_no_run(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").mkdir()
    train.main([*TINY, "--steps", "1", "--out", str(tmp_path)])
    assert "warning" in capsys.readouterr().err

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space" in error_of(["--resume", tmp_path, "--steps", "3"])
    assert checkpoint(tmp_path)["step"] == 1

@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    train.main([*TINY, "--steps", "2", "--out", str(out)])
    (out / "cut.pt").write_bytes((out / "ckpt.pt").read_bytes()[:-1000])
    return out

@pytest.mark.parametrize("args, word", [
    ("", "midway, moog, melomotion"),
    ("--model midway --batch-sise 3", "did you mean --batch-size?"),
    ("--model midway --preset huge", "tiny, vit_s, vit_b"),
    ("--model midway --lr nan", "lr"),
    ("TINY --micro-batch 3", "try 3"),
    ("TINY --size 18", "multiple"),
    ("TINY --data OUT/nowhere", "nowhere"),
    ("--resume OUT/nowhere", "no checkpoint at"),
    ("--model moog --resume RUN", "holds a midway model"),
    ("--model melomotion --init RUN", "does not fit"),
    ("--model melomotion --data scenes", "--data squares"),
    ("--resume RUN --dim 48 --steps 3", "does not fit"),
    ("--resume RUN", "--steps"),
    ("--resume RUN/cut.pt", "damaged")])
def test_wrong_arguments_are_told_in_one_line(args, word, tmp_path, small_run):
    args = args.replace("TINY", " ".join(TINY)).replace("RUN", str(small_run))
    args = args.replace("OUT", str(tmp_path)).split()
    if "--model" in args:
        args += ["--out", f"{tmp_path}/never"]
    assert word in error_of(args)
    assert not (tmp_path / "never").exists()

@pytest.mark.parametrize("place, value", [
    ("config", None), ("config/options/new", 1), ("config/config/dim", 7), ("model/new", 3),
    ("optimizer/state/0/exp_avg", torch.zeros(1)), ("optimizer/param_groups", [])])
def test_what_does_not_fit_in_a_checkpoint_is_told_in_one_line(place, value, small_run, tmp_path):
    ckpt = checkpoint(small_run)
    inner = ckpt
    *path, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    for key in path:
        inner = inner[key]
    inner[last] = value
    torch.save(ckpt, tmp_path / "ckpt.pt")
    error = error_of(["--resume", tmp_path, "--steps", "3"])
    assert "ckpt.pt" in error or last in error

def test_only_bugs_have_a_traceback(monkeypatch, tmp_path):
    def fails(self, batch):
        raise error
    monkeypatch.setattr(Midway, "forward", fails)
    args = [*TINY, "--steps", "1", "--out", str(tmp_path / "run")]
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert "--micro-batch" in error_of(args)
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        train.cli(args)

@pytest.mark.parametrize("name", FAMILIES)
def test_bench_and_bfloat16_run(name, tmp_path, capsys):
    train.main([*FAMILIES[name][0], *f"--bench --dtype bfloat16 --out {tmp_path}/never".split()])
    said = capsys.readouterr().out
    assert re.search(r"[\d.]+ ms a step.* [\d.]+ GFLOP a sample.* MFU nan", said)
    assert "bfloat16" in said and not (tmp_path / "never").exists()

def test_recomputing_activations_is_not_the_models_work():
    cfg = moog.Config(**moog.PRESETS["tiny"])
    batch = dict(video=torch.zeros(1, 4, 3, 64, 64))
    recomputed = train.count_flops(moog.MooG, replace(cfg, checkpoint=True), batch)
    assert train.count_flops(moog.MooG, cfg, batch) == recomputed > 0

def test_training_on_videos_and_on_frames(tmp_path):
    path = encode(tmp_path / "clip.mp4", CONSTANT[:60], size=(256, 256))
    write_frames(tmp_path / "frames", {f"drive_{n:04d}.png": 2 * n for n in range(0, 90, 15)})
    flags = ["--steps", "2", "--out", str(tmp_path / "run"), "--data"]
    train.main([*TINY, *flags, str(path), "--workers", "1"])
    assert "shuffled" in log(tmp_path / "run")[-1]["held_out"]["2-2cos, mean"]
    train.main([*FAMILIES["moog"][0], *flags, f"{tmp_path}/frames", "--stride", "2"])
    assert log(tmp_path / "run")[-1]["held_out"]["PSNR in dB, t >= 1"]["predicted"] > 3

def test_data_can_be_looked_at_and_timed(tmp_path, capsys):
    path = str(encode(tmp_path / "a.mp4", CONSTANT[:60], size=(256, 256)))
    for source in (path, "scenes"):
        data.show(source, str(tmp_path / "look.png"))
    assert iio.imread(tmp_path / "look.png").shape[0] > 100
    data.bench(path)
    assert float(re.search("a.mp4: (.*) CPU-seconds", capsys.readouterr().out)[1]) > 0

@pytest.mark.parametrize("kind", ["grey", "deep", "alpha"])
def test_images_of_other_kinds_are_read_right(tmp_path, kind):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    colour = np.dstack([grey, grey, grey])
    written = dict(grey=grey, deep=grey.astype(np.uint16) * 256 + 7,
                   alpha=np.dstack([colour, np.full_like(grey, 200)]))
    iio.imwrite(tmp_path / "a.png", written[kind])
    assert np.array_equal(data.read_image(tmp_path / "a.png"), colour)

def test_help_names_presets_and_the_defaults_that_count(capsys):
    with pytest.raises(SystemExit):
        train.cli("--model melomotion --preset fast --device cpu --help".split())
    said = capsys.readouterr().out
    assert ", ".join(melomotion.PRESETS) in said and re.search(r"--steps int[^-]*\(188\)", said)

def test_an_error_with_workers_running_still_ends():
    script = """if True:
        import data
        scenes = data.SceneOptions(textures=4)
        loader = data.make_loader("scenes", dict(frames=2, size=16), [range(2)] * 9, workers=1,
                                  scenes=scenes)
        next(iter(loader))
        raise RuntimeError("a bug")"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, cwd=HERE)
    assert done.returncode == 1 and done.stderr.strip().endswith(b"RuntimeError: a bug")

# ---- metrics and labelled data -------------------------------------------------------------------
METRICS = np.load(HERE / "reference" / "metrics.npz")

def reference(case, *names):
    return [METRICS[f"{case}_{name}"] for name in names]

@pytest.mark.parametrize("case", ["sparse", "large", "boundary", "boundary5pct"])
def test_flow_metrics_equal_the_reference(case):
    pred, target, valid, scores = reference(f"flow_{case}", "pred", "gt", "valid", "scores")
    for mask in ([valid], []):
        errors = [metric(pred, target, *mask)
                  for metric in (evaluate.end_point_error, evaluate.fl_all)]
        close(errors, scores, 1e-9)

@pytest.mark.parametrize("case", ["camvid", "ignore255", "absent_both", "absent_gt_or_pred",
                                  "one_image_all_void", "single_class_perfect"])
def test_mean_iou_equals_the_reference(case):
    pred, target, scores, expected = reference(f"miou_{case}", "pred", "gt", "scores", "iou")
    classes, ignored, *scores = scores.tolist()
    miou, per_class, right = evaluate.mean_iou(pred, target, int(classes), int(ignored))
    close([miou, right], scores, 1e-9)
    assert np.allclose(per_class, expected, rtol=0, atol=1e-9, equal_nan=True)

@pytest.mark.parametrize("mode", ["first", "strided"])
@pytest.mark.parametrize("case", ["2", "3", "5"])
def test_tracking_metrics_equal_tapvids(case, mode):
    queries, gt_occluded, gt_tracks, occluded, tracks, expected = reference(
        f"tapvid_{case}", "query_points", "gt_occluded", "gt_tracks", "pred_occluded",
        "pred_tracks", mode)
    inputs = tracks, ~occluded, gt_tracks, ~gt_occluded, queries[..., 0].astype(int), mode
    scores = evaluate.tracking_metrics(*inputs)
    for name, value in zip(METRICS["tapvid_names"].tolist(), expected, strict=True):
        ours = name.replace("average_pts_within_thresh", "delta_avg")
        close(scores[ours.replace("pts_within", "delta")], value, 1e-9)
    close(evaluate.average_jaccard(*inputs), scores["average_jaccard"], 0)

def test_flow_colours_tell_direction_and_speed():
    flow = torch.tensor([[[4.0, -4, 0, 2]], [[0.0, 0, 0, 0]]])          # right, left, still, slower
    colours = [[255, 0, 0], [0, 255, 255], [255, 255, 255], [255, 127, 127]]
    for turned in (flow, flow.movedim(0, -1)):
        close(evaluate.flow_to_color(turned)[0].astype(int), colours, 1)

def test_depth_and_box_metrics_by_hand():
    depth = [[1.0, 2.0], [3.0, 9.0]]
    target = [[2.0, 2.0], [2.5, 0.0]]                           # 0: not measured
    close(evaluate.abs_rel(depth, target), 0.7 / 3, 1e-6)
    boxes = [[0, 0, 2, 4], [0, 0, 1, 1], [5, 5, 5, 5]]
    target = [[1, 2, 3, 6], [2, 2, 3, 3], [5, 5, 5, 5]]
    close(evaluate.box_iou(boxes, target), [2 / 14, 0, 0], 1e-12)

FLO = METRICS["flo_bytes"].tobytes()
PNG = METRICS["kitti_bytes"].tobytes()

def test_flow_files_equal_the_reference(tmp_path):
    put(tmp_path / "a.flo", FLO)
    flow = data.read_flo(tmp_path / "a.flo")
    assert np.array_equal(flow, METRICS["flo_flow"]) and flow.dtype == np.float32
    data.write_flo(tmp_path / "b.flo", METRICS["flo_flow"])
    assert (tmp_path / "b.flo").read_bytes() == FLO
    put(tmp_path / "a%02d.png", PNG)                            # FFmpeg: no pattern
    flow, valid = data.read_kitti_flow(tmp_path / "a%02d.png")
    assert np.array_equal(flow, METRICS["kitti_flow"]) and flow.dtype == np.float32
    assert np.array_equal(valid, METRICS["kitti_valid"])

def put(path, value, size=(4, 6), **options):
    """Writes bytes or an array as they are, or an image of one colour; makes the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
        return
    image = value if isinstance(value, np.ndarray) else np.full((*size, 3), value, np.uint8)
    iio.imwrite(path, image, plugin="pillow", **options)

# layout: first frame, second, flow of pair k, of scene s; frames' colours are 2 k and 2 k + 1
FLOWS = {
    "yours": ("a/{k}/frame1.png", "a/{k}/frame2.png", "a/{k}/flow.flo"),
    "sintel": ("training/clean/{s}/frame_0009.png", "training/clean/{s}/frame_0010.png",
               "training/flow/{s}/frame_0009.flo"),
    "chairs": ("data/0000{k}_img1.ppm", "data/0000{k}_img2.ppm", "data/0000{k}_flow.flo"),
    "things": ("frames_finalpass/{p}/A/000{k}/left/0006.png",
               "frames_finalpass/{p}/A/000{k}/left/0007.png",
               "optical_flow/{p}/A/000{k}/into_future/left/OpticalFlowIntoFuture_0006_L.pfm"),
    "kitti": ("image_2/00000{k}_10.png", "image_2/00000{k}_11.png", "flow_occ/00000{k}_10.png")}

def write_flow_layout(root, layout):
    """Three pairs; the first is training's. Flow k everywhere, not known in the first row."""
    for k, scene in ((1, "alley_1"), (2, "temple_2"), (3, "temple_3")):
        part = "TRAIN" if k == 1 else "TEST"
        first, second, file = (root / path.format(k=k, s=scene, p=part) for path in FLOWS[layout])
        put(first, 2 * k)
        put(second, 2 * k + 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        flow = np.full((4, 6, 2), k, np.float32)
        flow[0, :3] = np.nan
        flow[0, 3:] = 1e10
        if layout == "sintel":
            last = 255 * (np.indices((4, 6)).sum(0) == 8)
            put(root / f"training/invalid/{scene}/frame_0009.png", last.astype(np.uint8))
        if layout == "things":              # from the bottom up, a third channel, either byte order
            head, kind = (b"PF\n6 4\n-1.0\n", "<f4") if k == 2 else (b"PF\n6 4\n1.0\n", ">f4")
            put(file, head + np.dstack([flow, flow[..., :1] * 0])[::-1].astype(kind).tobytes())
            continue
        if layout != "kitti":
            data.write_flo(file, flow)
            continue
        pixels = np.full((4, 6, 3), [64 * k + 2**15, 64 * k + 2**15, 1], np.uint16)
        pixels[0] = 0
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le")
        encoder = av.CodecContext.create("png", "w")
        encoder.width, encoder.height, encoder.pix_fmt = 6, 4, "rgb48be"
        encoder.time_base = Fraction(1)
        packets = encoder.encode(frame.reformat(format="rgb48be")) + encoder.encode(None)
        file.write_bytes(b"".join(map(bytes, packets)))
    if layout == "chairs":
        (root / "FlyingChairs_train_val.txt").write_text("1\n2\n2\n")

@pytest.mark.parametrize("layout", FLOWS)
def test_flow_pairs_of_each_layout(tmp_path, layout):
    write_flow_layout(tmp_path, layout)
    pairs = data.FlowPairs(tmp_path, "all")
    assert len(pairs) == len(set(pairs.names)) == 3 and not pairs.names[0].startswith("/")
    valid = np.ones((4, 6), bool)
    valid[0] = False
    valid[3, 5] = layout != "sintel"
    for k, pair in enumerate(sorted(pairs, key=lambda pair: pair["frames"].sum()), 1):
        assert pair["frames"].dtype == np.uint8 and pair["flow"].dtype == np.float32
        assert pair["frames"].shape == (2, 4, 6, 3)
        assert pair["frames"][:, 1, 2, 0].tolist() == [2 * k, 2 * k + 1]
        assert np.array_equal(pair["valid"], valid)
        assert np.array_equal(pair["flow"], np.where(valid, k, 0)[None].repeat(2, 0))
    split = layout in ("sintel", "chairs", "things")
    for part, expected in (("train", [2] if split else [2, 4, 6]),
                           ("val", [4, 6] if split else [2, 4, 6])):
        shown = [pair["frames"][0, 0, 0, 0] for pair in data.FlowPairs(tmp_path, part)]
        assert shown == expected

THINGS = "optical_flow/TEST/A/0003/into_future/left/OpticalFlowIntoFuture"

@pytest.mark.parametrize("layout, name, content, word", [
    ("yours", "a/2/frame2.png", np.zeros((4, 5, 3), np.uint8), "size of"),
    ("yours", "a/2/flow.flo", FLO, "flow.flo: the flow is"),
    ("yours", "a/2/flow.flo", b"X" + FLO[1:], "begin"),
    ("yours", "a/2/frame1.png", b"no image", "frame1.png: can't be read"),
    ("things", f"{THINGS}_0006_L.pfm", b"Pf\n1 1\n-1\n1234", "three channels"),
    ("kitti", "flow_occ/000002_10.png", PNG[:900] + b"\0\0" + PNG[902:], "damaged"),
    (None, "a.txt", b"", "no flow with its two frames"),
    ("chairs", "FlyingChairs_train_val.txt", b"1\n1\n1\n", "frames of split 'val'")])
def test_flow_pairs_say_what_is_wrong(tmp_path, layout, name, content, word):
    if layout:
        write_flow_layout(tmp_path, layout)
    put(tmp_path / name, content)
    with pytest.raises(ValueError, match=word) as error:
        data.FlowPairs(tmp_path)[1]
    assert "\n" not in str(error.value)

# layout: (image, label) of split and name, values in the labels, the classes they mean, how many
SEGMENTED = {
    "camvid": ("{s}/{n}.jpg", "{s}annot/{n}.png", [0, 10, 11], [0, 10, 255], 11),
    "cityscapes": ("leftImg8bit/{s}/bonn/{n}_leftImg8bit.png",
                   "gtFine/{s}/bonn/{n}_gtFine_labelTrainIds.png",
                   [0, 18, 255], [0, 18, 255], 19),
    "cityscapes ids": ("leftImg8bit/{s}/bonn/{n}_leftImg8bit.png",
                       "gtFine/{s}/bonn/{n}_gtFine_labelIds.png", [7, 33, 14], [0, 18, 255], 19),
    "bdd": ("images/10k/{s}/{n}.jpg", "labels/sem_seg/masks/{s}/{n}.png",
            [0, 18, 255], [0, 18, 255], 19),
    "ade": ("images/{s}/{n}.jpg", "annotations/{s}/{n}.png", [1, 150, 0], [0, 149, 255], 150),
    "yours": ("images/{s}/deep/{n}.jpg", "labels/{s}/deep/{n}.png",
              [0, 4, 255], [0, 4, 255], 5)}

def label(values):
    """A label (4, 6) of the first value, but the second at row 1, column 4, the third in row 3."""
    image = np.full((4, 6), values[0], np.uint8)
    image[1, 4] = values[1]
    image[3] = values[2]
    return image

@pytest.mark.parametrize("layout", SEGMENTED)
def test_segmentation_of_each_layout(tmp_path, layout, capfd):
    image, truth, values, classes, num_classes = SEGMENTED[layout]
    splits = ("training", "validation") if layout == "ade" else ("train", "val")
    few = [values[0], values[0], values[2]]                     # the scan sees both splits
    for split, used, count, colour in ((splits[0], few, 2, 10), (splits[1], values, 3, 50)):
        for n in range(count):
            put(tmp_path / image.format(s=split, n=f"x{n}"), colour * n)
            if n < 2:
                put(tmp_path / truth.format(s=split, n=f"x{n}"), label(used))
    train_set, val_set = (data.Segmentation(tmp_path, split) for split in ("train", "val"))
    assert "left out 1 images without label" in capfd.readouterr().err
    assert len(train_set) == len(val_set) == 2 and train_set.num_classes == num_classes
    assert len(train_set.names or []) == (0 if layout in ("ade", "yours") else num_classes)
    sample = val_set[1]
    assert sample["image"].shape == (4, 6, 3) and sample["classes"].dtype == np.int64
    assert abs(sample["image"].astype(int) - 50).max() <= 2
    assert np.array_equal(sample["classes"], label(classes))

def test_segmentation_without_splits_validates_on_every_fifth(tmp_path):
    for n in range(11):
        put(tmp_path / f"images/{n // 6}/{n:02d}.png", n)
        put(tmp_path / f"labels/{n // 6}/{n:02d}.png", np.full((4, 6), n, np.uint8))
    for split, expected in (("train", [0, 1, 2, 3, 5, 6, 7, 8, 10]), ("val", [4, 9])):
        labelled = data.Segmentation(tmp_path, split)
        assert labelled.num_classes == 11
        assert [sample["classes"][0, 0] for sample in labelled] == expected
        assert [sample["image"][0, 0, 0] for sample in labelled] == expected
    ignoring = data.Segmentation(tmp_path, "train", num_classes=12, ignore_index=3)
    assert ignoring.num_classes == 12 and ignoring[3]["classes"][0, 0] == 255

def few_bits(values, bits, kind):
    """The bytes of a PNG of a few bits a pixel; kind 0: grey, 3: a palette of colours."""
    written = np.unpackbits(np.uint8(values)[..., None], axis=2)[..., 8 - bits:]
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in written)
    head = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + head, b"PLTE" + bytes([200, 0, 0, 0, 90, 0, 0, 0, 70]),
                 b"IDAT" + zlib.compress(rows), b"IEND"):
        if kind or body[:4] != b"PLTE":
            content += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return content

@pytest.mark.parametrize("bits, kind", [(1, 0), (2, 0), (4, 0), (8, 0), (2, 3), (8, 3)])
def test_labels_are_numbers_neither_colours_nor_shades(tmp_path, bits, kind):
    values = [[0, 1, 1 if bits == 1 else 2, 1]] * 3
    put(tmp_path / "images/train/a.png", 9, (3, 4))
    put(tmp_path / "labels/train/a.png", few_bits(values, bits, kind))
    assert data.Segmentation(tmp_path)[0]["classes"].tolist() == values

GOOD = np.arange(24, dtype=np.uint8).reshape(4, 6) % 2
TURN = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"   # orientation 6

@pytest.mark.parametrize("content, options, word", [
    (GOOD * 7, dict(num_classes=5), "value 7"), (GOOD.T, {}, r"is \(6, 4\)"),
    (b"no", {}, "damaged"), (GOOD.astype(np.uint16), {}, "one channel"),
    (np.zeros((4, 6, 3), np.uint8), {}, "RGB"), (GOOD * 255, {}, "two classes"),
    (GOOD * 255, dict(num_classes=2), "two classes"), (TURN, {}, "EXIF"),
    (GOOD, dict(num_classes=300), "--classes"), (GOOD, dict(split="val"), "split 'val'")])
def test_wrong_labels_are_named_in_one_line(tmp_path, content, options, word):
    turned = content is TURN
    put(tmp_path / "images/train/a.jpg", 9, exif=TURN if turned else b"")
    put(tmp_path / "labels/train/a.png", GOOD if turned else content)
    with pytest.raises(ValueError, match=word) as error:
        data.Segmentation(tmp_path, **options)[0]
    assert "\n" not in str(error.value)

def write_rgbd(folder):
    for t in range(4):
        put(folder / f"rgb_{t:02d}.png", 10 * t)
        depth = np.arange(24, dtype=np.uint16).reshape(4, 6) * 300 + t        # needs 16 bits
        put(folder / f"depth_{t:02d}.png", depth)
    tracks = np.random.default_rng(0).uniform(0, 4, (3, 4, 2)).astype(np.float32)
    tracks[1, 2] = np.nan
    status = np.array([[0, 0, 1, 2], [0, 0, 1, 0], [0, 1, 0, 0]], np.int8)
    np.savez(folder / "tracks.npz", tracks=tracks, query_frame=[0, 0, 2], status=status)
    return tracks

def test_rgbd_clips(tmp_path):
    tracks = write_rgbd(tmp_path / "clips/a")
    write_rgbd(tmp_path / "clips/b")
    clips = data.PointTracks(tmp_path / "clips")
    assert clips.names == ["a", "b"] and data.PointTracks(tmp_path / "clips/a").names == ["a"]
    clip = clips[0]
    visible = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]], bool)  # (T, P)
    valid = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1]], bool)    # from its query on
    shown = np.where(visible[..., None], tracks.transpose(1, 0, 2), 0)
    for name, expected in (("visible", visible), ("valid", valid), ("tracks", shown),
                           ("query_frames", np.array([0, 0, 2]))):
        assert np.array_equal(clip[name], expected) and clip[name].dtype == expected.dtype, name
    assert clip["video"][:, 2, 5, 0].tolist() == [0, 10, 20, 30]
    assert clip["depth"][3, 2, 5] == np.float32(17 * 300 + 3) / 1000
    os.remove(tmp_path / "clips/b/depth_03.png")
    with pytest.raises(ValueError, match="wants a depth"):
        clips[1]
    for t in range(3):
        os.remove(tmp_path / f"clips/b/depth_{t:02d}.png")
    assert "depth" not in clips[1]
    os.remove(tmp_path / "clips/b/rgb_03.png")
    with pytest.raises(ValueError, match="tracks.npz: .*do not fit 3 frames"):
        clips[1]

@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["davis", "stacking", "kinetics", "shards"])
def test_tapvid_pickles(tmp_path, kind, protocol):
    video = np.zeros((3, 8, 16, 3), np.uint8)
    video[1] = 50
    occluded = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)            # one is never seen
    points = np.repeat([[[0.25, 0.5]], [[0.5, 0.25]], [[0, 0]]], 3, 1)      # (P, T, 2)
    clip = dict(video=video, points=points, occluded=occluded)
    if kind in ("kinetics", "shards"):
        jpegs = [iio.imwrite("<bytes>", image, extension=".jpeg") for image in video]
        clip["video"] = np.array(jpegs) if kind == "shards" else jpegs
    content = pickle.dumps({"dogs": clip} if kind == "davis" else [clip], protocol)
    if protocol == 2:                                           # as numpy 1 writes it
        content = content.replace(b"numpy._core.", b"numpy.core.")
    for name in "ab" if kind == "shards" else "a":
        put(tmp_path / f"{name}.pkl", content)
    tapvid = data.PointTracks(tmp_path)
    assert tapvid.names == dict(davis=["dogs"], shards=["0", "1"]).get(kind, ["0"])
    sample = tapvid[len(tapvid) - 1]
    assert abs(sample["video"].astype(int) - video).max() <= 1 and sample["valid"].all()
    assert np.array_equal(sample["visible"], ~occluded[[0, 2]].T)
    assert sample["tracks"].dtype == np.float32 and not sample["tracks"][0, 0].any()
    assert sample["tracks"][1].tolist() == [[3.5, 3.5], [-0.5, -0.5]]
    assert sample["query_frames"].tolist() == [1, 0]

CLIP = dict(video=np.zeros((3, 2, 2, 3), np.uint8), points=np.zeros((1, 2, 2)),
            occluded=np.zeros((1, 2)))

class Evil:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)

@pytest.mark.parametrize("content, word", [
    ([CLIP | dict(video=np.array([None]))], "not of numbers"), (eval, "eval"),
    (np.load, "refused"), ([CLIP | dict(points=np.zeros(2, "i4,O"))], "not of numbers"),
    (bytearray(3), "refused"), ([3], ""), ([CLIP], "fit 3 frames"), (Evil(), "system")])
def test_pickles_of_anything_else_are_refused_and_can_call_nothing(tmp_path, content, word):
    Evil.mark = tmp_path / "executed"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=f"a.pkl: .*{word}"):
        data.PointTracks(tmp_path / "a.pkl")[0]
    assert not Evil.mark.exists()
    if word == "system":
        pickle.loads(pickle.dumps(content))
        assert Evil.mark.exists()                               # it would have been

def test_box_tracks(tmp_path):
    for name, value in (("2", 2), ("10", 10), ("9", 9), ("cover", 0)):
        put(tmp_path / f"a/b/{name}.png", value)
    text = tmp_path / "a/b/boxes_xyxy.txt"
    text.write_text("0.5 1 2 3\n1,2,3,4\n2, 3\t4 5\n\n")
    boxes = data.BoxTracks(tmp_path)
    assert boxes.names == ["a/b"] and data.BoxTracks(tmp_path / "a/b").names == ["b"]
    assert boxes[0]["video"].shape == (3, 4, 6, 3)
    assert boxes[0]["video"][:, 0, 0, 0].tolist() == [2, 9, 10]     # by number, not by name
    assert boxes[0]["boxes"].tolist() == [[0.5, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    for wrong in ("1 2 3 4\n", "1 2 3 4\n5 6 2 2\n1 2 3 4\n", "1 2 3\n" * 3, "1 2 x 4\n" * 3):
        text.write_text(wrong)
        with pytest.raises(ValueError, match="boxes_xyxy.txt: "):
            boxes[0]

# ---- evaluation: every task runs -----------------------------------------------------------------
TINY_MIDWAY = dict(size=16, patch=4, dim=16, depth=4, heads=2, levels=(1, 2, 4), drop_path=0.0,
                   motion_tokens=3, motion_dim=12, motion_depth=1, motion_heads=3, forward_depth=2,
                   forward_heads=2, head_hidden=8, head_bottleneck=4, prototypes=8, local_size=8,
                   local_crops=1)
SMALL_SCENES = dict(size=24, sprites=2, speed=3.0, pan=10.0, zoom=0.0, roll=0.0, radius=(0.2, 0.3),
                    grain=6.0, textures=6, flat=0.0)

@pytest.fixture(scope="module")
def small_midway():
    torch.manual_seed(0)
    model = Midway(Config(**TINY_MIDWAY)).eval()
    with torch.no_grad():                   # zero at the start: positions
        model.motion_pos.normal_(std=0.5)
    return model

@pytest.fixture(scope="module")
def checkpoints(small_midway, tmp_path_factory):
    """{name: path} of a Midway, one without dynamics, two MooGs, a MeloMotion, as if trained."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    models = dict(midway=small_midway, dino=Midway(Config(**TINY_MIDWAY, latent_dynamics=False)),
                  moog=tiny_moog(), grid=tiny_moog(grid=True),
                  melomotion=MeloMotion(melomotion.Config()))
    for name, model in models.items():
        config = dict(model=type(model).__name__.lower(), preset="tiny", options={},
                      config=vars(model.cfg), scenes=SMALL_SCENES, videos={})
        state = dict(model=model.state_dict(), optimizer={}, step=1, config=config)
        torch.save(state, root / f"{name}.pt")
    return {name: root / f"{name}.pt" for name in models}

@pytest.fixture
def few(monkeypatch):
    """Few clips, random vectors and tiles."""
    for name, value in dict(POOL=6, TESTS=32, POINTS=6, DRAWS=2, OVERLAP=0.1).items():
        monkeypatch.setattr(evaluate, name, value)

FAST = ("--steps", 2, "--batch-size", 2)

def evaluated(path, out, *flags):
    """Tables {title: {row: {column: cell}}} of a run of eval.py, of which every cell is finite."""
    evaluate.main([str(path), "--out", str(out), "--device", "cpu", *map(str, flags)])
    task = flags[flags.index("--task") + 1]
    tables = json.loads((out / "results.json").read_text())[task]["tables"]
    for rows in tables.values():
        for row in rows:
            assert all(cell == cell for cell in row.values()), row          # not nan
    return {title: {row[""]: row for row in rows} for title, rows in tables.items()}

def evaluation(path, **changes):
    """A Run as main() makes it."""
    args = evaluate.parse([str(path)])
    args.device = torch.device("cpu")
    vars(args).update(changes)
    model, _, config, path = evaluate.load(path)
    return evaluate.Run(model, config, args, path.parent)

@pytest.mark.parametrize("name, task, flags, column", [
    ("midway", "latents", (), "same motion"), ("midway", "heatmap", ("--at", 0.4, 0.6), "level 2"),
    ("midway", "identity-bias", ("--against", "self"), "patches from truth"),
    ("midway", "track", (), "patches"), ("midway", "segmentation", (), "position prior"),
    ("midway", "segmentation", ("--features", "backward", "--finetune"), "this model"),
    ("midway", "flow", ("--finetune",), "encoder only"), ("dino", "flow", (), "encoder only"),
    ("moog", "tokens", (), "this model"),
    ("moog", "unroll", (), "0.25x tokens"), ("grid", "unroll", (), "copy"),
    ("moog", "points", (), "stays put"), ("moog", "points", ("--finetune",), "random init"),
    ("moog", "boxes", (), "stays put"), ("moog", "depth", (), "median")])
def test_every_task_runs(checkpoints, tmp_path, few, name, task, flags, column):
    flags = [checkpoints["midway"] if flag == "self" else flag for flag in flags]
    tables = evaluated(checkpoints[name], tmp_path, "--task", task, *FAST, *flags)
    rows = next(iter(tables.values()))
    assert all(column in row for row in rows.values())
    pictures = [path for path in tmp_path.iterdir() if path.suffix == ".png"]
    drawn = ("heatmap", "track", "segmentation", "flow", "tokens", "depth")
    assert [path.stem for path in pictures] == [task] * (task in drawn)
    assert all(300 < iio.imread(path).shape[1] <= 1600 for path in pictures)
    if task == "identity-bias":
        assert rows["this model, level 2"] != rows["random init, level 2"]
        assert 0 < rows["anywhere, by chance"]["nearer to the source"] < 1

def test_results_of_other_tasks_stay_and_all_leaves_out_what_does_not_fit(
        checkpoints, tmp_path, few, capsys):
    evaluated(checkpoints["moog"], tmp_path, "--task", "unroll")
    root = make_rgbd(tmp_path / "clips") / "boxes"
    flags = ["--out", tmp_path, "--data", root, *FAST]
    evaluate.main([str(flag) for flag in (checkpoints["moog"], *flags)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"unroll", "boxes"} <= set(results) and "points" not in results
    assert "left out: points" in capsys.readouterr().out
    assert results["boxes"]["command"][0] == "eval.py" and results["boxes"]["versions"]["torch"]

# ---- evaluation: Midway --------------------------------------------------------------------------
@torch.no_grad()
def test_perturbation_equals_finite_differences(small_midway):
    """The cosines are those of what a small change of one token does to each predicted token."""
    model = deepcopy(small_midway).double()
    torch.manual_seed(1)
    source, target = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64)
    level = model.predict(source, target)[1]
    token = torch.tensor([5, 14])
    i = model.predicted[1]
    heat = evaluate.perturb(model, i, level.m, level.v, token, 3, seed=7)
    noise = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(7)).double()
    cosines = []
    for r in noise:
        step = torch.zeros_like(level.v)
        step[torch.arange(2), 1 + token] = 1e-5 * r
        ahead, _ = model.predict_forward(i, level.m, level.v + step)
        behind, _ = model.predict_forward(i, level.m, level.v - step)
        change = (ahead - behind)[:, 1:] / 2e-5
        assert (change.norm(dim=-1) > 1e-6).all()           # every token feels it
        cosines.append(F.cosine_similarity(change, r[:, None], dim=-1))
    close(heat, sum(cosines) / 3, 1e-7)

def test_tokens_of_a_known_shift_are_followed(small_midway, monkeypatch):
    def shift(i, m, v):                     # one down, two to the right; CLS stays
        moved = v[:, 1:].unflatten(1, (4, 4)).roll((1, 2), (1, 2)).flatten(1, 2)
        return torch.cat([v[:, :1], moved], 1), []

    def alike(images, teacher=False):       # so that the hottest token comes first
        return [torch.ones(len(images), 17, 16)] * 3

    model = deepcopy(small_midway)
    monkeypatch.setattr(model, "predict_forward", shift)
    monkeypatch.setattr(model, "features", alike)
    tracks = evaluate.follow_tokens(model, torch.rand(3, 3, 16, 16), torch.tensor([0, 1]), 2)
    assert tracks[0].tolist() == [[0, 1], [6, 7], [8, 9]]

def test_moving_tokens_land_where_the_scene_moves_them(checkpoints):
    run = evaluation(checkpoints["midway"])
    pairs, token, truth = evaluate.moving_tokens(run, 20, 24)
    y = 4 * (token // 4) + 2
    x = 4 * (token % 4) + 2
    there = 4 * (truth + 0.5) - 0.5         # pixels
    shift = there - torch.stack([y, x], 1)
    assert 4 < len(pairs) <= 20 and (shift.norm(dim=1) >= 4).all()
    assert ((there > -0.51) & (there < 15.51)).all()
    to_y, to_x = there.round().long().clamp(0, 15).unbind(1)
    each = torch.arange(len(pairs))
    change = pairs[each, 1, :, to_y, to_x] - pairs[each, 0, :, y, x]
    assert change.abs().max() < 0.5         # the same thing, but for half pixels

def test_latents_of_the_same_motion_tell_motion_from_content(small_midway, monkeypatch):
    """A double whose prediction is right if and only if its latents say the true motion."""
    motion = torch.tensor([[0.0, 0], [8, 8], [0.1, 0], [8, 8.1], [-5, 3], [-5, 3.1]])
    target = torch.randn(6, 17, 16)

    def predict(i, m, v):
        off = (m[:, 0, :2] - motion).norm(dim=1) > 1
        return torch.where(off[:, None, None], -target, target), []

    model = deepcopy(small_midway)
    monkeypatch.setattr(model, "predict_forward", predict)
    m = F.pad(motion, (0, 10))[:, None].expand(-1, 3, -1)
    errors = evaluate.latent_errors(model, 0, m, target, target, motion)
    assert errors["right"] < 1e-6 and errors["same motion"] < 1e-6 and errors["shuffled"] > 2

def test_linear_readout_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    x = torch.randn(400, 300)
    assert evaluate.ridge(x[:, :30], x[:, :2] - x[:, 3:5], 100)[0] > 0.99
    # 300 features fit 300 pairs, not those held out
    assert evaluate.ridge(x, torch.randn(400, 2), 100)[0] < 0.1

def test_midways_analyses_take_videos(checkpoints, tmp_path, few):
    video = encode(tmp_path / "clip.mp4", CONSTANT[:60], (64, 36), paint=texture)
    tables = []
    for task, *flags in (["heatmap", "--at", 0.9, 0.1], ["latents", "--gap", 0.1, 0.2], ["track"],
                         ["heatmap", "--time", 0.5, "--gap", 0.2, 0.3]):
        flags = ["--task", task, "--data", video, *FAST, *flags]
        tables.append(evaluated(checkpoints["midway"], tmp_path, *flags))
    assert iio.imread(tmp_path / "heatmap.gif", index=None).shape[0] == 8
    assert not tables[2]                                        # no truth, no table
    assert evaluate.model_view(np.zeros((36, 64, 3), np.uint8)) == (0, 14, 36, 36)

# ---- evaluation: segmentation and flow -----------------------------------------------------------
def labelled_folder(root, values=(0, 1, 2)):
    """Images in two halves of plain colours, each a class; a corner that is to be left out."""
    rng = np.random.default_rng(0)
    colours = np.array([(220, 40, 40), (40, 200, 60), (50, 60, 220)])
    for name in (f"{split}/{n}.png" for split in ("train", "val") for n in range(10)):
        classes = rng.permutation(3)[:2].repeat(24)[None].repeat(32, 0)
        image = colours[classes] + rng.integers(-20, 20, (32, 48, 3))
        labels = np.array(values, np.uint8)[classes]
        labels[:8, :8] = 255
        put(root / "images" / name, image.clip(0, 255).astype(np.uint8))
        put(root / "labels" / name, labels)
    return root

@pytest.mark.parametrize("flags", [
    [], ["--features", "backward"], ["--head", "upernet"], ["--finetune"]])
def test_segmentation_learns_colours_from_a_folder(checkpoints, tmp_path, flags):
    root = labelled_folder(tmp_path / "data")
    [rows] = evaluated(checkpoints["midway"], tmp_path, "--task", "segmentation", "--data", root,
                       "--steps", 60, "--batch-size", 4, "--lr", 0.02, *flags).values()
    assert rows["mIoU"]["this model"] > 75 > rows["mIoU"]["position prior"]

def test_flow_crops_keep_flow_true_to_their_frames(checkpoints):
    """Scaled, mirrored and cut: the second crop, seen where the flow points, is the first."""
    def ramp(x, y):
        return np.stack([2.5 * x + 20, 3 * y + 30, x + y + 60], -1).clip(0, 255).astype(np.uint8)

    y, x = np.mgrid[:60, :80].astype(np.float32)
    flow = np.stack([np.full_like(x, 5), np.full_like(y, -3)])
    task = evaluate.Flow(evaluation(checkpoints["midway"]))
    task.training = [dict(frames=np.stack([ramp(x, y), ramp(x - 5, y + 3)]), flow=flow,
                          valid=(x > 40) & (y > 20))]
    task.size = 24
    mirrored = set()
    for sample in map(task.crop, range(24)):
        ramps = 255 * sample["image"][:, :2]                    # frame, along x and y
        inner = ramps[..., 4:-4, 4:-4]
        slope = torch.stack([inner[:, 0].diff(dim=-1).mean(), inner[:, 1].diff(dim=-2).mean()])
        mirrored.add((slope[0] < 0).item())
        change = (inner[0] - inner[1]).mean((1, 2))
        close(change / slope, sample["flow"].mean((1, 2)), 0.4)
        at_x = (ramps[0, 0] - 20) / 2.5                         # what the pixel shows
        at_y = (ramps[0, 1] - 30) / 3
        clear = ((at_x - 40.5).abs() > 3) & ((at_y - 20.5).abs() > 3)
        assert (sample["valid"] == (at_x > 40) & (at_y > 20))[clear].all()
    assert len(mirrored) == 2

@pytest.mark.parametrize("task, finetune, trained", [
    (evaluate.Segmentation, False, set()), (evaluate.Flow, False, set()),
    (evaluate.Segmentation, True, {"student"}),         # flow trains both branches, as in CroCo v2
    (evaluate.Flow, True, {"student", "teacher_embed", "teacher_backward", "forward_blocks"})])
def test_frozen_models_stay_and_finetuned_ones_are_trained_whole(
        checkpoints, task, finetune, trained):
    run = evaluation(checkpoints["midway"], finetune=finetune, steps=2, batch_size=2, lr=1e-2)
    before = deepcopy(run.model.state_dict())
    model, head = evaluate.train_readout(task(run), run.model, "test")
    changed = set()
    for name, x in model.state_dict().items():
        assert torch.equal(before[name], run.model.state_dict()[name])
        if not torch.equal(x, before[name]):
            changed.add(name.split(".")[0])
    assert not head.training and not model.training
    assert changed >= trained if len(trained) > 1 else changed == trained

def test_laplacian_loss_and_tiles_equal_croco():
    pred, conf, gt, valid = (torch.from_numpy(METRICS[f"laplacian_{name}"])
                             for name in ("pred", "conf_logit", "gt", "valid"))
    for mask, loss in ((valid, "loss"), (torch.ones_like(valid), "loss_all_valid")):
        ours = evaluate.laplacian_loss(pred.double(), conf[:, 0].double(), gt.double(), mask)
        close(ours, METRICS[f"laplacian_{loss}"], 1e-12)
    cases = zip(*(METRICS[f"tiling_{name}"].tolist() for name in ("total", "window", "overlap")))
    ours = [evaluate.tile_offsets(*case) for case in cases]
    assert list(map(len, ours)) == METRICS["tiling_count"].tolist()
    assert sum(ours, []) == METRICS["tiling_offsets"].tolist()

@pytest.mark.parametrize("H, W", [(23, 40), (16, 16)])
def test_tiles_cover_images_and_count_by_their_confidence(H, W):
    """A double that reads flow off the colours, and is unsure and wrong in the last column."""
    def predict(tiles):
        flow = 20 * tiles[:, 0, :2] - 10
        confidence = torch.full_like(flow[:, 0], -30.0)         # small d: sure
        flow[..., -1] = 1000
        confidence[..., -1] = 30
        return flow, confidence

    y, x = torch.meshgrid(torch.linspace(0.2, 0.8, H), torch.linspace(0.3, 0.7, W), indexing="ij")
    frames = torch.stack([x, y, 1 - x]).expand(2, 3, H, W)
    flow = evaluate.tiled_flow(predict, frames, 16, 0.5)
    close(flow[..., :-2], 20 * torch.stack([x, y])[..., :-2] - 10, 1e-2)

def test_dpt_learns_flow_that_its_maps_tell():
    torch.manual_seed(0)
    head = evaluate.DPT((24, 24, 24, 24), 24)
    flow = F.interpolate(3 * torch.randn(8, 2, 4, 4), (16, 16), mode="bilinear")
    maps = [F.interpolate(flow, (4, 4)).repeat(1, 12, 1, 1)] * 4
    valid = torch.ones(8, 16, 16, dtype=torch.bool)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(120):
        out = head(maps, (16, 16))
        evaluate.laplacian_loss(out[:, :2], out[:, 2], flow, valid).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (out[:, :2] - flow).norm(dim=1).mean() < 0.5 * flow.norm(dim=1).mean()

@torch.no_grad()
def test_flow_reads_the_four_inputs(checkpoints):
    task = evaluate.Flow(evaluation(checkpoints["midway"]))
    model = task.run.model
    frames = torch.rand(2, 2, 3, 16, 16)
    seen = []
    last = model.motion_blocks["1"][-1]                         # of the highest midway path
    hook = last.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    lowest, highest = model.predict(*frames.unbind(1))
    hook.remove()
    z = model.features(frames[:, 0])[-1]
    tokens = last(seen[0])                                      # latents, source, target
    inputs = (z[:, 1:], tokens[:, 3 + 17 + 1:], highest.pred[:, 1:], lowest.pred[:, 1:])
    for a, b in zip(task.features(model, dict(image=frames)), inputs, strict=True):
        close(a.flatten(2).mT, b, 0)
    alone = task.models()["encoder only"]
    for teacher in (False, True):
        same = [net.features(frames[:, 0], teacher)[-1] for net in (alone, model)]
        close(*same, 0)
    assert (alone.motion_tokens - model.motion_tokens).abs().max() > 0.01

def test_flow_is_scored_where_it_is_known(checkpoints, tmp_path, few):
    truth = np.zeros((24, 32, 2), np.float32) + (6, 8)
    truth[:, 16:] = 1e10                                        # unknown
    for name in ("frame1.png", "frame2.png"):
        put(tmp_path / "pair" / name, 90, (24, 32))
    data.write_flo(tmp_path / "pair/flow.flo", truth)
    flags = ["--task", "flow", "--data", tmp_path, *FAST]
    [(title, rows)] = evaluated(checkpoints["midway"], tmp_path, *flags).items()
    assert "learnt on scenes" in title
    assert rows["end-point error"]["zero"] == 10
    assert rows["end-point error"]["best constant"] < 1e-6
    assert rows["per cent of outliers (Fl-all)"]["zero"] == 100

def test_flow_learns_from_a_training_split(checkpoints, tmp_path):
    write_flow_layout(tmp_path, "sintel")
    task = evaluate.Flow(evaluation(checkpoints["midway"], data=str(tmp_path), batch_size=2))
    assert len(task.training) == 1 and task.tests == 2
    [batch] = task.train_batches(1)
    assert batch["image"].shape == (2, 2, 3, 16, 16) and "the training split" in task.title

# ---- evaluation: MooG ----------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("follows", [True, False])
def test_follow_tells_tokens_of_things_from_tokens_of_places(checkpoints, monkeypatch, follows):
    run = evaluation(checkpoints["moog"])
    ids = run.truth(run.scenes("eval", 8), range(1000, 1032))["ids"].flatten(2)
    places = torch.arange(256).expand_as(ids)
    tops = iter((ids if follows else places).split(4))
    monkeypatch.setattr(evaluate, "attention", lambda *_: F.one_hot(next(tops), 256))
    went, was, other = evaluate.follow_tracks(run).values()
    if follows:                             # one token a sprite; rounding misses some at the rim
        assert went > 0.75 and was < 0.2 and 0.1 < other < 0.95
    else:                                   # one token a pixel
        assert was == 1 and went < 0.35

@torch.no_grad()
@pytest.mark.parametrize("released", [False, True])
def test_open_loop_leaves_the_corrector_out(released):
    torch.manual_seed(0)
    model = tiny_moog(released=released).eval()
    video = torch.rand(1, 3, 3, 16, 16)
    torch.manual_seed(1)
    states = evaluate.predict_open_loop(model, video, 3)
    torch.manual_seed(1)
    close(states[:, :1], model.predict_ahead(video)[:, -1:], 1e-6)          # what comes next
    model.corrector = None
    state = states[:, 0]
    for k in (1, 2):
        state = model.predict(state if released else model.state_norm(state))
        close(states[:, k], state, 1e-6)

def test_points_are_on_sprites_and_their_baseline_stays_put(checkpoints, few):
    task = evaluate.Points(evaluation(checkpoints["moog"]))
    on_sprites = []
    for test in task.testing:
        scores = task.measure(task.baselines(test)["stays put"], test)
        gone = 256 * (test["tracks"][:, 1:] - test["tracks"][:, :1]).norm(dim=-1)
        gone = gone.masked_fill(~test["visible"][:, 1:], torch.nan).flatten(1)
        distance = scores["mean distance, pixels of 256"]
        close(distance.nanmean(), gone.nanmean(1).nanmean(), 1e-3)
        x, y = (16 * test["tracks"][:, 0] - 0.5).round().long().unbind(-1)          # (B, P)
        near = test["depth"][:, 0] < 1
        shown = near[torch.arange(len(x))[:, None], y, x].float().mean(1)
        on_sprites.append(shown[near.float().mean((1, 2)) > 0.1])                   # if any
    assert torch.cat(on_sprites).mean() > 0.99

class PlacesOfSprites(evaluate.Points):
    """Oracle features: each sprite's name and place."""

    def features(self, model, batch):
        y1, x1, y2, x2 = batch["boxes"].unbind(-1)                      # (B, T, K)
        place = moog.fourier(torch.stack([x1 + x2, y1 + y2], -1) - 1, 8)
        name = torch.eye(place.shape[2]).expand(*place.shape[:3], -1)
        features = torch.cat([place, name], -1)
        return F.pad(features, (0, 64 - features.shape[-1]))

def test_points_learn_from_features_that_tell_places(checkpoints, monkeypatch):
    """A plateau of the training would show here."""
    monkeypatch.setattr(evaluate, "POOL", 256)
    run = evaluation(checkpoints["moog"], steps=250)
    run.cfg = run.model.cfg = replace(run.cfg, dim=64)
    run.config["scenes"] = SMALL_SCENES | dict(speed=4.0, pan=0.0)
    task = PlacesOfSprites(run)
    model, head = evaluate.train_readout(task, run.model, "oracle")
    away = dict(learnt=[], still=[])
    for batch in task.testing:
        with torch.no_grad():
            answers = dict(still=task.baselines(batch)["stays put"])
            answers["learnt"] = task.test(model, head, batch)
        for name, answer in answers.items():
            away[name].append(task.measure(answer, batch)["mean distance, pixels of 256"])
    assert torch.cat(away["learnt"]).nanmean() < 40 < torch.cat(away["still"]).nanmean()

PLACES = np.array([[4, 5], [20, 12], [9, 18]], np.float32)              # of the points below

def make_rgbd(root):
    """Three RGB-D clips of ten frames, red says x, green y, with points that stand still; a box."""
    y, x = np.mgrid[:24, :32]
    picture = np.stack([8 * x, 8 * y, 0 * x], -1).astype(np.uint8)
    for name in ("a/rgb", "b/rgb", "c/rgb", "boxes/rgb"):
        for t in range(10):
            put(root / f"{name}_{t:02}.png", picture)
    for name in "abc":
        for t in range(10):
            put(root / name / f"depth_{t:02}.png", (1000 + 100 * x).astype(np.uint16))
        np.savez(root / name / "tracks.npz", tracks=PLACES[:, None].repeat(10, 1),
                 status=np.zeros((3, 10), np.int8), query_frame=[0, 0, 5])
    (root / "boxes/boxes_xyxy.txt").write_text("3 4 12 14\n" * 10)
    return root

@pytest.mark.parametrize("task, folder, learnt, column, row, low, high", [
    ("points", "", "2 clips", "stays put", "delta_avg", 1, 1),
    ("depth", "", "2 clips", "median", "abs_rel", 0.1, 0.5),
    ("boxes", "boxes", "scenes", "stays put", "mean intersection over union", 0.999, 1)])
def test_readouts_of_real_clips(
        checkpoints, tmp_path, few, task, folder, learnt, column, row, low, high):
    root = make_rgbd(tmp_path / "clips") / folder
    flags = ["--task", task, "--data", root, *FAST]
    [(title, rows)] = evaluated(checkpoints["moog"], tmp_path, *flags).items()
    assert f"trained on {learnt}, " in title and f"tested on {folder or 'c'}; " in title
    assert low <= rows[row][column] <= high + 1e-3

def test_windows_of_real_clips_keep_points_on_their_pixels(checkpoints, tmp_path, few, monkeypatch):
    monkeypatch.setattr(evaluate, "POOL", 40)
    pool = evaluate.Points(evaluation(checkpoints["moog"], data=str(make_rgbd(tmp_path)))).pool
    assert pool["video"].shape == (10, 8, 3, 16, 16)
    for b, p in np.ndindex(10, 6):
        t = pool["query_frames"][b, p]
        assert pool["visible"][b, t, p] and pool["valid"][b, t, p]
        place = (2 * pool["tracks"][b, t, p] - 1).view(1, 1, 1, 2)
        shown = F.grid_sample(pool["video"][b, t][None].float(), place, align_corners=False)
        off = shown[0, :2, 0, 0] - 8 * torch.from_numpy(PLACES)
        assert off.norm(dim=1).min() < 6

# ---- evaluation: what is wrong is told in one line -----------------------------------------------
@pytest.mark.parametrize("name, flags, word", [
    ("nowhere", "", "nowhere"), ("nowhere.npz", "", "nowhere"), ("text.npz", "", "text.npz"),
    ("evil", "", "no model of ours"),
    ("midway", "--task tokens", "latents"), ("moog", "--task flow", "unroll"),
    ("midway", "--task identity-bias --data empty", "scenes"),
    ("midway", "--task identity-bias --against moog", "no Midway"),
    ("midway", "--task segmentation --data empty", "empty"),
    ("midway", "--task segmentation --data wrong --classes 3 --batch-size 2", ".png"),
    ("midway", "--task flow --data nowhere", "nowhere"),
    ("midway", "--task heatmap --data empty", "empty"), ("dino", "--task heatmap", "dynamics"),
    ("dino", "--task segmentation --features backward", "backward"),
    ("midway", "--task segmentation --head upernet --features backward", "backward"),
    ("moog", "--task points --data empty", "empty"),
    ("moog", "--task depth --data clips/a", "two"),
    ("moog", "--task boxes --data empty", "boxes_xyxy.txt")])
def test_what_is_wrong_is_told_in_one_line(
        checkpoints, tmp_path, monkeypatch, few, name, flags, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("hello")
    if "wrong" in flags:
        labelled_folder(tmp_path / "wrong", values=(0, 1, 7))
    if "clips" in flags:
        make_rgbd(tmp_path / "clips")
    evil = torch.load(checkpoints["midway"], weights_only=True)
    evil["config"]["model"] = "os"          # a module that is no model of ours is not imported
    torch.save(evil, tmp_path / "evil")
    flags = [str(checkpoints.get(flag, flag)) for flag in flags.split()]
    with pytest.raises(SystemExit) as stop:
        evaluate.cli([str(checkpoints.get(name, name)), "--out", "out", "--device", "cpu", *flags])
    assert word in stop.value.code and "\n" not in stop.value.code

# ---- MeloMotion: parts ---------------------------------------------------------------------------
def squares(count=4, **options):
    return data.MovingSquares(**options).batch(range(count))

def colours_of(batch):
    """(B, N, 3), each object's in frame 0."""
    return (batch["first_frame"][:, None] * batch["masks"][:, :, None]).flatten(3).amax(3)

def test_every_row_of_table_1():
    parts = dict(MeloMotion(melomotion.Config()).named_children(), baseline=FlowBaseline())
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert sizes == dict(predictors=3 * 2_146, rgb_proj=256, camera=742, encoder=1_088,     # 43,111
                         decoder=34_587, baseline=34_587 + 322_862)

def test_position_loss_is_the_velocity_error_of_rigid_labels():
    v, true = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    d = torch.arange(1, 16)[:, None] * true[:, :, None]                 # (5, 3, 15, 2)
    error = 2 * F.mse_loss(v, true)                                     # x and y are summed
    close(position_loss(v, d), error, 1e-5)
    close(position_loss(v, d, normalize=False), error * 1240 / 15, 1e-3)

def test_place_equals_slicing_and_clips_at_the_border():
    torch.manual_seed(0)
    h, w = 8, 12
    layers = torch.randn(2, 3, 4, h, w)
    d = 2.4 * torch.rand(2, 3, 9, 2) - 1.2
    d[:, :, 0] = torch.tensor([0.5, 2.5]) / w                           # halves: to the even cell
    want = torch.zeros(2, 3, 9, 4, h, w)
    for b, n, t in np.ndindex(2, 3, 9):
        dx, dy = (d[b, n, t] * w).round().int().tolist()
        top, bottom = np.clip([dy, h + dy], 0, h)
        left, right = np.clip([dx, w + dx], 0, w)
        block = layers[b, n, :, top - dy:bottom - dy, left - dx:right - dx]
        want[b, n, t, :, top:bottom, left:right] = block
    close(place(layers, d), want, 0)

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
    grey = 0.5 * (phase > 0)                                            # flow has no background
    v = torch.tensor([[[1.0, 0.0], [-1.0, -1.0]]]) / 8                  # a cell a frame
    frames = [a.roll(8 * t, 2) + b.roll((-8 * t, -8 * t), (1, 2)) + grey for t in range(5)]
    frames[0] -= grey * masks.sum(1)
    video = torch.stack(frames)[None]
    model = MeloMotion(melomotion.Config(size=64, frames=5, objects=2, phase=phase))
    model.decoder = CellColours()
    draw = model.warped if phase == 0 else model.draw
    close(draw(video[:, 0], masks, v, torch.tensor([[3, 1]])), video[:, [3, 1]], 1e-5)
    batch = dict(first_frame=video[:, 0], masks=masks, video=video)
    assert model.l1(batch, v) < 1e-5 and model.l1(batch, v, one=True) < 1e-5
    assert model.l1(batch | dict(video=video.roll(1, 1)), v) > 1e-3

def test_latent_keeps_means_over_4_pixels_and_has_colours_in_channels_1_to_3():
    image = torch.rand(2, 3, 16, 24)
    occupancy = torch.rand(2, 1, 16, 24)
    latent = encode_latent(image, occupancy)
    close(latent[:, :4], F.avg_pool2d(torch.cat([occupancy, image], 1), 8), 1e-6)
    # linear, with 16 independent outputs for the 16 means of a cell
    blocks = torch.eye(16).view(16, 4, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.linalg.matrix_rank(encode_latent(blocks[:, 1:], blocks[:, :1]).view(16, 16)) == 16

@pytest.mark.parametrize("change", [
    {}, dict(shared_predictor=True, object_index=True), dict(normalize=False), dict(pooling="avg"),
    dict(pooling="max"), dict(pooling="full", shared_predictor=True),
    dict(phase=0, pos_weight=0.0), dict(phase=2, pos_weight=0.0), dict(frames=4, objects=2)])
def test_every_variant_trains_what_it_should(change):
    torch.manual_seed(0)
    cfg = melomotion.Config(**change)
    model = MeloMotion(cfg)
    batch = squares(2, frames=cfg.frames, **cfg.inputs["squares"])
    loss, logs = model(batch)
    loss.backward()
    features = "rgb_proj" if cfg.pooling == "rgb" else "encoder"
    trained = ({"decoder"}, {"predictors", features}, {"predictors", features, "decoder"})
    for name, p in model.named_parameters():            # or else DDP would wait for ever
        assert (p.grad is not None) == (name.split(".")[0] in trained[cfg.phase]), name
    assert (logs.get("spread") == 0) == (cfg.pooling == "full")         # one feature for all
    assert ("l1" in logs) == (cfg.phase != 1)
    if cfg.phase == 1:
        want = position_loss(model.motion(batch), batch["displacements"], cfg.normalize)
        close(loss, 10 * want, 1e-6)
    if cfg.phase == 2:              # L1 alone: placing rounds, so velocities get nothing from it
        assert all(p.grad.abs().max() == 0 for p in model.predictors.parameters())
        assert all(p.grad.abs().max() > 0 for p in model.decoder.parameters())
    video = model.render(batch["first_frame"], batch["masks"], frames=3)
    assert video.shape == (2, 3, 3, 128, 128) and 0 <= video.min() and video.max() <= 1
    assert all(row["model"].isfinite() for row in model.report(batch).values())

def test_flow_baseline_starts_still_and_can_be_warped_at_once():
    batch = squares(1)
    model = FlowBaseline()
    once = FlowBaseline(one_shot=True)
    once.load_state_dict(model.state_dict())
    loss, _ = model(batch)
    loss.backward()
    assert model.head[-1].weight.grad.abs().max() > 0                   # through the decoder
    for flow in (model, once):
        flow.head[-1].bias.data = torch.tensor([0.0625, 0])             # a cell a frame
    close(once(batch)[0].detach(), model(batch)[0].detach(), 1e-4)
    assert (model(batch)[0] - loss).abs() > 1e-5

@pytest.mark.parametrize("shift, near, far", [(0, 7, 8), (4, 3, 15)])   # on the diagonal
def test_swin_windows_are_closed(shift, near, far):
    block = melomotion.SwinBlock(shift)
    x = torch.randn(1, 256, 64)
    changed = x.clone()
    changed[0, 0] += 1.0
    moved = (block(changed) - block(x)).abs().amax(-1)[0]
    assert moved[near * 17] > 0 and moved[far * 17] == 0

# ---- MeloMotion: data ----------------------------------------------------------------------------
def test_squares_depend_on_their_number_alone():
    clips = data.MovingSquares(shape="any")
    together = clips.batch([5, 2])
    for name, value in clips[2].items():
        assert torch.equal(value, together[name][1])
    other = data.MovingSquares(shape="any", split="eval")[5]
    assert not torch.equal(other["first_frame"], together["first_frame"][0])

@pytest.mark.parametrize("mode, share", [
    ("differentiated", [1, 0, 0]), ("all-move", [1, 1, 1]),
    ("random-mover", [1 / 3, 1 / 3, 1 / 3]), ("colour-mover", [1, 0, 0])])
def test_red_is_speed_to_the_right_and_green_down_and_read_off_exactly(mode, share):
    batch = squares(100, mode=mode, frames=5, shape="any")
    colours = colours_of(batch)
    model = MeloMotion(melomotion.Config())
    close(model.pool(model.extract(batch["first_frame"], batch["masks"])), colours / 255, 1e-5)
    v = 0.1 * (colours[..., :2].double() - 128) / 255
    moves = batch["displacements"].flatten(2).any(-1)                                   # (B, N)
    path = v[:, :, None] * torch.arange(1, 5)[:, None] * moves[..., None, None]
    close(batch["displacements"], path, 1e-7)
    assert colours[..., 2].min() >= 128
    assert 0.045 < v.max() <= 0.05 and -0.0503 < v.min() < -0.045
    close(moves.float().mean(0), share, 0.15)
    assert mode == "all-move" or (moves.sum(1) == 1).all()
    assert (mode == "colour-mover") == (not v[:, 1:].any())             # known by their colours

def test_squares_are_painted_where_the_labels_say_and_share_no_cell():
    batch = squares(6, mode="all-move", shape="any", frames=24)
    steps = (128 * batch["displacements"].double()).round().long()      # (B, N, T - 1, 2)
    colours = colours_of(batch)
    for b, t in np.ndindex(6, 24):
        canvas = torch.zeros(3, 128, 128, dtype=torch.uint8)
        for n, mask in enumerate(batch["masks"][b]):                    # painter's order
            y, x = mask.nonzero().T
            if t:
                x = x + steps[b, n, t - 1, 0]
                y = y + steps[b, n, t - 1, 1]
            inside = (y >= 0) & (y < 128) & (x >= 0) & (x < 128)
            assert inside.all() or t > 15                               # nobody leaves in 16 frames
            canvas[:, y[inside], x[inside]] = colours[b, n, :, None]
        assert torch.equal(canvas, batch["video"][b, t])
    for options in (dict(), dict(mode="all-move"), dict(objects=5, side=16)):
        cells = F.max_pool2d(squares(200, video=False, **options)["masks"].float(), 8)
        assert cells.sum(1).max() == 1

# ---- MeloMotion: what it learns ------------------------------------------------------------------
def learnt(mode, lr=1e-2, **change):
    """What the report's training, cut to 2,000 clips, comes to: {heading: number}."""
    torch.manual_seed(0)
    models = [MeloMotion(melomotion.Config(**change))]
    evaluate.train_together(models, mode, **evaluate.ADAMW | dict(epochs=1, lr=lr))
    return {name: values[0] for name, values in evaluate.measure(models, mode).items()}

def test_decoupled_predictors_tell_objects_apart_and_a_shared_one_does_not():
    decoupled = learnt("differentiated")
    index = learnt("differentiated", shared_predictor=True, object_index=True)
    assert decoupled["POS"] < 1e-4 and index["POS"] < 1e-4              # nothing moves: 6e-4
    assert decoupled["object 0, slope of v on truth"] > 0.8
    assert decoupled["POS, objects permuted"] > decoupled["POS, nothing moves"]
    shared = learnt("differentiated", shared_predictor=True)
    assert shared["POS"] > 3e-4 and shared["dead units"] > 0.8          # most seeds lose all
    # at a gentler rate it gives a third of each colour's velocity: right on average, and useless
    gentle = learnt("differentiated", 3e-3, shared_predictor=True)
    assert gentle["POS"] > 3e-4 and gentle["outputs differ"] == 1 and gentle["dead units"] < 1
    assert 0.15 < gentle["object 0, slope of v on truth"] < 0.5
    assert learnt("random-mover")["POS"] > 3e-4                         # nothing tells it

@pytest.mark.parametrize("how", ["ADAMW", "SGD"])
def test_many_trainings_at_once_equal_one_by_one(how, monkeypatch):
    monkeypatch.setattr(evaluate, "EPOCH", 20)
    evaluate.pooled_clips.cache_clear()
    models = [MeloMotion(melomotion.Config(pooling="avg")) for _ in range(2)]
    alone = deepcopy(models)
    evaluate.train_together(models, "all-move", **getattr(evaluate, how))
    evaluate.pooled_clips.cache_clear()
    for seed, model in enumerate(alone):
        options = dict(getattr(evaluate, how))
        optimizer = options.pop("optimizer")(model.parameters(), **options)
        clips = data.MovingSquares(mode="all-move", seed=seed, video=False)
        for step in range(40):
            model(clips.batch([step]))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(models[seed].parameters(), model.parameters()):
            close(a.detach(), b.detach(), 1e-5)

@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("melomotion") / "fast"
    train.main(["--model", "melomotion", "--preset", "fast", "--device", "cpu", "--out", str(out)])
    return out

def test_fast_preset_learns_the_law_and_the_decoder_goes_on_from_it(fast_run, tmp_path):
    error = log(fast_run)[-1]["held_out"]["POS: squared error of v"]
    assert error["model"] < 5e-6 and error["zero"] > 4e-4
    train.main([*"--model melomotion --preset phase2 --device cpu --batch-size 2 --steps 3".split(),
                "--init", str(fast_run), "--min-lr", "2e-3", "--out", str(tmp_path)])
    first = weights(fast_run)
    second = weights(tmp_path)
    assert torch.equal(second["camera.0.weight"], first["camera.0.weight"])
    assert not torch.equal(second["decoder.8.weight"], first["decoder.8.weight"])
    close(second["predictors.w2"], first["predictors.w2"], 0.01)

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
    assert rows["MeloMotion, nothing drawn"]["times the baseline"] > 10
    assert rows["pixels off at t = 63"]["model"] < rows["pixels off at t = 63"]["nothing moves"] / 4
    assert iio.imread(tmp_path / "motion.gif").shape[0] == 32
    assert iio.imread(tmp_path / "figure1.png").shape[1] > 800

# ---- the repository ------------------------------------------------------------------------------
README = (HERE / "README.md").read_text()

def test_model_files_stand_alone():
    """They import the standard library and torch; MooG's loader of .npz also numpy."""
    for name in train.MODELS:
        allowed = sys.stdlib_module_names | {"torch"} | ({"numpy"} if name == "moog" else set())
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            assert {module.split(".")[0] for module in modules} <= allowed, name

def test_readme_names_only_what_exists():
    classes = (train.Options, Config, moog.Config, melomotion.Config, data.VideoOptions)
    known = {field.name.replace("_", "-") for cls in classes for field in fields(cls)}
    known |= {"scene-" + field.name for field in fields(data.SceneOptions)}
    known |= {"no-" + name for name in known} | {"help"}
    for name in ("eval.py", "data.py"):
        known |= set(re.findall(r'add(?:_argument)?\("--([\w-]+)"', (HERE / name).read_text()))
    known |= {"nproc_per_node", "nnodes", "rdzv-backend", "rdzv-endpoint", "shm-size", "index-url"}
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", README)) <= known
    for file in re.findall(r"\((assets/[^)]+)\)", README) + re.findall(r"`(\w+\.py)`", README):
        assert (HERE / file).exists(), file

def test_readmes_python_runs_as_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, preset in (("midway", "tiny"), ("moog", "tiny"), ("melomotion", "fast")):
        train.main(["--model", name, "--preset", preset, "--steps", "1", "--batch-size", "2",
                    "--device", "cpu", "--workers", "0"])
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, {})
