"""Wrote this folder's models, plans and workdirs from before the renaming, and their outputs.

It ran with the code of commit 1927f33. It cannot run with later code, and need not run again:

  git worktree add ../before 1927f33
  cp -r tests/old tests/test_old.py ../before/tests
  cd ../before && python -m tests.old.make_old

on one of eight fake CPU devices, with FLAGS, which are those of tests/conftest.py.

  models/NAME.safetensors   small models with random leaves, as `convert.save` wrote them
  logits.npz                {NAME: logits in float32} of `common.images`
  plans.json                {NAME: text} of `Plan.to_json`
  workdirs/NAME.tar.xz      a run that was stopped midway
  workdirs/dense.safetensors  the initial weights of all of them, and the teacher of one
  ends/NAME.npz             the final variables after resuming from there
  made.json                 the kind of machine, and digests of the final parameters
"""
import json
import os
import pathlib
import shutil
import tarfile
import tempfile

import jax
import numpy as np
from tests.train.conftest import tiny_config

import vitcompact as vc
from tests import tiny
from tests.old import common
from vitcompact import convert, trees
from vitcompact.train import loop
from vitcompact.tune import MATRIX, with_forms

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
HERE = pathlib.Path(__file__).parent
DEIT = "deit_tiny_patch16_224"
SMALL = {"width": 16, "depth": 2, "heads": 4, "image_size": 16, "patch_size": 4, "num_classes": 5,
         "mlp_ratio": 2.0}
LVVIT = {**SMALL, "heads": 2, "stem_width": 4, "image_size": 32, "patch_size": 8}
PVT = {"image_size": 32, "num_classes": 5, "widths": (8, 10), "depths": (1, 1), "heads": (2, 5),
       "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
NEXTVIT = {"image_size": 64, "num_classes": 5, "stem_widths": (8, 4, 8, 8),
           "widths": (8, 12, 12, 12), "depths": (1, 1, 0, 0), "periods": (0, 1, 0, 0),
           "head_dim": 4}

BOTH = {"heads": vc.HMHSA(), "ffn": vc.CFFN()}
TOKEN_LINKS = vc.Sparsifiner(keep=0.5, rank=4, coefficients=2)
BLOCK_LINKS = vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0)
# name: (model, fields, plan); models that folding changes are saved folded as well.
MODELS = {
    "dense": (DEIT, SMALL, vc.Plan()),
    "heads_probs": (DEIT, SMALL, vc.Plan(heads=vc.HMHSA(rank=2))),
    "heads_logits": (DEIT, SMALL, vc.Plan(heads=vc.HMHSA(site="logits"))),
    "heads_grid": ("deit_tiny_distilled_patch16_224", {**SMALL, "heads": 8},
                   vc.Plan(heads=vc.HMHSA(layout="grid", rank=2, real_heads=3))),
    "links_paper": (DEIT, SMALL, vc.Plan(links=TOKEN_LINKS)),
    "links_code": (DEIT, SMALL, vc.Plan(links=vc.Sparsifiner(
        keep=0.5, variant="code", rank=3, coefficients=0.2))),
    "links_block": (DEIT, SMALL, vc.Plan(links=BLOCK_LINKS)),
    "tokens_evit": (DEIT, {**SMALL, "image_size": (16, 24)},
                    vc.Plan(tokens=vc.EViT(keep=0.6, blocks=(0,)))),
    "tokens_dynamicvit": (DEIT, SMALL, vc.Plan(tokens=vc.DynamicViT(keep=0.6, blocks=(0, 1)))),
    "tokens_tome": (DEIT, {**SMALL, "global_pool": "avg"}, vc.Plan(tokens=vc.ToMe(r=3))),
    "tokens_mctf": (DEIT, SMALL, vc.Plan(tokens=vc.MCTF(r=3))),
    "ffn_output": (DEIT, SMALL, vc.Plan(ffn=vc.CFFN())),
    "ffn_both": (DEIT, SMALL, vc.Plan(ffn=vc.CFFN(factor="both", branches=3, rank_ratio=0.25))),
    "all_axes": (DEIT, SMALL, vc.Plan(
        **BOTH, links=TOKEN_LINKS, tokens=vc.EViT(keep=0.7, blocks=(0,)),
        blocks={0: {"heads": None, "ffn": vc.CFFN(rep="scale", avg_skip=False)},
                1: {"links": BLOCK_LINKS, "ffn": vc.CFFN(rank_ratio=0.25, rep="none")}})),
    "backends": (DEIT, SMALL, vc.Plan(backends={1: "tiled"}, at_a_time=2)),
    "lvvit": ("lvvit_t", LVVIT, vc.Plan(**BOTH, tokens=vc.EViT(keep=0.6, blocks=(0,)))),
    "pvt": ("pvt_tiny", PVT, vc.Plan(**BOTH)),
    "pvt_v2": ("pvt_v2_b0", PVT, vc.Plan(**BOTH)),
    "nextvit": ("nextvit_small", NEXTVIT, vc.Plan(**BOTH)),
    "nextvit_links": ("nextvit_small", NEXTVIT, vc.Plan(
        **BOTH, blocks={1: {"links": vc.Sparsifiner(keep=0.5, rank=2)}})),
}
# Plans without a file: every method at its defaults, and every field at another value.
PLANS = {
    **{f"default_{type(spec).__name__.lower()}": vc.Plan(**{axis: spec}) for axis, spec in (
        ("heads", vc.HMHSA()), ("links", vc.Sparsifiner()), ("tokens", vc.EViT()),
        ("tokens", vc.DynamicViT()), ("tokens", vc.ToMe()), ("tokens", vc.MCTF()),
        ("ffn", vc.CFFN()))},
    "unusual_links": vc.Plan(links=vc.Sparsifiner(
        keep=1, variant="code", reduce_n=5, coefficients=0.05, basis_threshold=0.1, basis="signed",
        fit="used", rank=7, window=4, min_tokens=30, masked=False)),
    "unusual_heads_ffn": vc.Plan(
        heads=vc.HMHSA(rank=3, kernel=5, layout="grid", real_heads=2),
        ffn=vc.CFFN(rank_ratio=0.75, branches=4, rep="scale", avg_skip=False,
                    apply_to="attention_blocks", factor="both", merged=("fc1", "fc2"))),
    "unusual_mctf": vc.Plan(tokens=vc.MCTF(
        r=0.35, blocks=(3, 6, 9), tau_sim=2.0, tau_info=10.0, tau_size=30.0, one_step_ahead=2,
        bidirectional=False, pooling="size_attention_mean", order="code", prop_attn=False)),
    "unusual_tome": vc.Plan(tokens=vc.ToMe(r=8, schedule="decreasing", prop_attn=False,
                                           order="code")),
    "unusual_evit": vc.Plan(tokens=vc.EViT(keep=1, blocks=(7,), fuse=False)),
    "overrides": vc.Plan(heads=vc.HMHSA(), blocks={11: {"heads": None}, 2: {
        "heads": vc.HMHSA(site="logits"), "links": vc.Sparsifiner(), "ffn": vc.CFFN()}},
        backends={11: "images", 3: "einsum"}, at_a_time=8),
}

TOTAL = 8
PLAIN = {"data.mixup": 0.0, "data.cutmix": 0.0, "data.erase": 0.0}   # compiles faster
# name: (stops after this step, plan, other settings). 16 patches, so that some can be dropped.
RUNS = {
    "heads_ffn": (4, vc.Plan(**BOTH), {"ema_half_life": 0.25}),
    "sparsifiner": (3, vc.Plan(links=TOKEN_LINKS), {
        **PLAIN, "teacher.file": "dense.safetensors",
        "reconstruct.steps": 5, "reconstruct.learning_rate": 2e-3,
        "loss.logits": 0.5, "loss.patches": 0.5}),
    "dynamicvit": (4, vc.Plan(tokens=vc.DynamicViT(keep=0.6, blocks=(0, 1))), {
        **PLAIN, "loss.kept_ratio": 2.0,
        "optim.rates": ((r".*/predict_tokens/.*", 2.0, 0), (r".*", 1.0, 2))}),
    # Its last two steps draw the same companion, so only one program is compiled.
    "mctf": (3, vc.Plan(tokens=vc.MCTF(r=3)), {
        **PLAIN, "total_steps": 5, "loss.consistency": 3.0, "loss.companion_r": 2}),
    "evit": (6, vc.Plan(tokens=vc.EViT(keep=0.5, blocks=(0, 1))), {
        **PLAIN, "keep_warmup.start": 1, "keep_warmup.steps": 16}),
}


def drawn(model):
  """Returns variables like `tiny.init`, but scales are around one: images affect the logits."""
  leaves = trees.named_leaves(tiny.init(model))
  return trees.nested({name: leaf + name.endswith("scale") for name, leaf in leaves.items()})


def make_models():
  """Writes models/ and logits.npz; returns {name: plan}."""
  (HERE / "models").mkdir()
  logits, plans = {}, {}

  def write(name, model, variables):
    convert.save(HERE / "models" / f"{name}.safetensors", model, variables)
    logits[name] = np.asarray(jax.jit(model.apply)(variables, common.images(model)))
    assert logits[name].dtype == np.float32
    plans[name] = model.plan

  for name, (variant, fields, plan) in MODELS.items():
    model = vc.create_model(variant, plan=plan, **fields)
    variables = drawn(model)
    write(name, model, variables)
    if name == "nextvit_links":   # this commit's `fold` loses its predictor
      continue
    deploy, folded = vc.fold(model, variables)
    if trees.digest(folded) != trees.digest(variables):
      write(f"{name}_folded", deploy, folded)
    if name == "ffn_output":   # as by `tune` if one matrix is faster than two
      layer = ("blocks_1", "mlp", "fc2")
      tuned, tuned_variables = with_forms(deploy, folded, {layer: MATRIX})
      assert tuned.plan.at(1).ffn.merged == ("fc2",)
      write("ffn_merged", model.clone(plan=tuned.plan), variables)
      write("ffn_merged_folded", tuned, tuned_variables)
  np.savez(HERE / "logits.npz", **logits)
  return plans


def config_of(plan, changes):
  config = tiny_config()
  config.total_steps = TOTAL
  config.log_every, config.ema_half_life, config.mesh.fsdp = 2, 0.0, 1
  config.plan, config.init_from = plan.to_json(), "dense.safetensors"
  config.model.update(patch_size=2, mlp_ratio=2.0)
  # Gradients that are only rounding errors, such as those of key biases, must not move much.
  config.optim.update(eps=1e-5, warmup_steps=2, learning_rate=2e-3)
  config.update_from_flattened_dict(changes)
  return config


def make_dense():
  """Writes dense.safetensors, random but confident: MCTF's loss needs confident predictions."""
  model = loop.build(loop.resolve(config_of(vc.Plan(), {}))).model
  variables = drawn(model)
  variables["params"]["head"]["kernel"] *= 4
  convert.save("dense.safetensors", model, variables)


def pack(path, name):
  """Writes a .tar.xz of a directory, without dates and owners."""
  def bare(info):
    info.mtime = info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info

  with tarfile.open(path, "w:xz", preset=9) as tar:
    tar.add(name, filter=bare)


def make_runs():
  """Writes workdirs/ and ends/; returns {name: digest of its last parameters}."""
  for part in ("workdirs", "ends"):
    (HERE / part).mkdir()
  first, digests = jax.devices()[:1], {}
  jax.devices = lambda *_: first
  with tempfile.TemporaryDirectory() as directory:
    os.chdir(directory)
    make_dense()
    shutil.copy("dense.safetensors", HERE / "workdirs")
    for name, (stop, plan, changes) in RUNS.items():
      config = config_of(plan, changes)
      loop.train(config, name, until=stop)
      for path in pathlib.Path(name).glob("events.*"):   # names the machine
        path.unlink()
      (pathlib.Path(name) / "lock").unlink()             # as does this
      pack(HERE / "workdirs" / f"{name}.tar.xz", name)
      uninterrupted = loop.train(config, f"{name}_straight")
      end = loop.train(config, name)
      np.savez_compressed(HERE / "ends" / f"{name}.npz", **common.variables_of(end.state))
      digests[name] = end.metrics["params_digest"]
      assert digests[name] == uninterrupted.metrics["params_digest"]
  return digests


def main():
  os.environ["XLA_FLAGS"] = FLAGS   # read when the first device is asked for
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_numpy_rank_promotion", "raise")
  assert jax.device_count() == 8
  for part in ("models", "workdirs", "ends"):
    shutil.rmtree(HERE / part, ignore_errors=True)
  plans = make_models() | PLANS | {f"run_{name}": plan for name, (_, plan, _) in RUNS.items()}
  texts = {name: plan.to_json() for name, plan in plans.items()}
  (HERE / "plans.json").write_text(json.dumps(texts, indent=1) + "\n")
  record = {"machine": common.machine(), "params_digests": make_runs()}
  (HERE / "made.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
