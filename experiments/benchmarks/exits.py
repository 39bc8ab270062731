"""Times deployed models in the runtimes that `vc.export` writes for."""
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

import vitcompact as vc
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Candidate, Setting
from experiments.benchmarks.model import LARGE_BATCH_PLANS, MODEL, PLANS
from vitcompact import runtimes
from vitcompact.export import onnx_file
from vitcompact.export.program import Program

BLOCKS = vc.Plan(attention=vc.Sparsifiner(keep=0.25, granularity="block"))


class Case(NamedTuple):
  """A model by name, the batch size, and the plans to time."""
  model: str
  batch: int
  plans: dict[str, vc.Plan]
  fields: Mapping = MappingProxyType({})


TWO_PLANS = {name: PLANS[name] for name in ("dense", "heads + ffn")}
CASES = [
    Case(MODEL, 8, {"dense": PLANS["dense"], "heads": PLANS["heads"], "ffn": PLANS["ffn"],
                    **{name: PLANS[name] for name in LARGE_BATCH_PLANS if name != "ffn both"}}),
    Case("deit3_small_patch16_224", 8, TWO_PLANS),
    Case("vit_small_patch14_dinov2", 1, TWO_PLANS),
    Case(MODEL, 1, {"dense": PLANS["dense"], "block-sparse 25%": BLOCKS}, {"image_size": 512}),
]
EXITS = ("ort", "openvino", "openvino-bf16")
RUNTIMES = {key: runtimes.TIMED[key][2] for key in ("xla", *EXITS)}
PEERS = ("torch f32", "torch.compile f32", "torch bf16")


def run(setting: Setting, cases=None, **sizes) -> Iterator[dict]:
  """Times every case. sizes: fields of the models that make them smaller, for tests."""
  if not setting.on_host:
    return
  for case in cases or CASES:
    with tempfile.TemporaryDirectory() as folder:
      candidates = {}
      for plan_name, plan in case.plans.items():
        model = vc.create_model(case.model, plan=plan, deploy=True, **{**case.fields, **sizes})
        candidates |= exits(model, case.batch, plan_name, pathlib.Path(folder))
        if plan_name == "dense":
          dense = model
      if case is CASES[0]:
        candidates |= measure.torch_candidates(setting, PEERS, dense, batch=case.batch)
      about = {"model": case.model, "image_size": dense.image_size, "batch": case.batch}
      yield from measure.rows(about, candidates, setting)
      if setting.torch:
        setting.torch.forget()


def exits(model, batch: int, plan_name: str, folder: pathlib.Path) -> dict[str, Candidate]:
  """Returns {"runtime: plan": candidate} for a deployed model with random weights."""
  size = np.broadcast_to(model.image_size, 2).tolist()
  images = measure.normal((batch, *size, model.in_chans))
  variables = measure.random_variables(model, images[:1])
  facts = {"macs": vc.count(model).macs, "plan": model.plan.to_json()}
  out = {f"XLA: {plan_name}": measure.compiled(model.apply, variables, images, **facts)}
  path = folder / f"{plan_name.replace(' ', '_')}.onnx"
  onnx_file.write(Program(model, variables, vc.preprocess(model)), path)
  inputs, logits = np.asarray(images), np.asarray(out[f"XLA: {plan_name}"].call())
  for runtime, precision, name in map(runtimes.TIMED.get, EXITS):
    try:
      one = runtimes.load(path, runtime, threads=1, precision=precision)
    except ValueError as error:   # a processor without bfloat16
      out[f"{name}: {plan_name}"] = Candidate(None, {**facts, "reason": str(error)})
      continue
    gap = float(np.abs(one(inputs) - logits).max() / np.abs(logits).max())
    out[f"{name}: {plan_name}"] = Candidate(lambda one=one: one(inputs), {
        **facts, "runtime": one.runtime, "max_rel": gap})
  return out
