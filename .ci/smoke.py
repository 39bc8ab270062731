"""A short use of an installed vitcompact, from end to end: `python smoke.py CHECKOUT`.

Imports, counts, runs a model forward, trains a tiny one on digits, folds it, saves it, loads it.
It is run outside the checkout, so that what is imported is what was installed.
"""
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

import vitcompact as vc
from vitcompact import trees
from vitcompact.run import loop, report


def digits(checkout: pathlib.Path):
  """configs/digits.py, small: the checkout is not on the path, so it is loaded as a file."""
  spec = importlib.util.spec_from_file_location("digits", checkout / "configs" / "digits.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  with config.unlocked():
    config.update({"total_steps": 6, "checkpoint_every": 3, "log_every": 2, "batch_size": 16})
    config.model.update({"width": 16, "depth": 2, "heads": 2})
    config.optim.warmup_steps = 2
  return config


def main(checkout: pathlib.Path):
  assert checkout not in pathlib.Path(vc.__file__).parents, f"{vc.__file__} is not installed"
  plan = vc.Plan(heads=vc.HMHSA(), tokens=vc.EViT(keep=0.7, blocks=(1,)), ffn=vc.CFFN())
  model = vc.create_model("deit_tiny_patch16_224", plan=plan, image_size=64, depth=4)
  assert vc.count(model).macs < vc.count(model.clone(plan=vc.Plan())).macs
  images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
  variables = model.init(jax.random.key(1), images)
  assert np.isfinite(model.apply(variables, images)).all()
  with tempfile.TemporaryDirectory() as folder:
    result = loop.train(digits(checkout), folder)
    receipt = report.report(result, folder)
    assert (pathlib.Path(folder) / "receipt.json").is_file() and receipt.rows
    path = pathlib.Path(folder) / "deploy.safetensors"
    deploy, variables = vc.load(path)
    again = pathlib.Path(folder) / "again.safetensors"
    vc.save(again, deploy, variables)
    assert trees.digest(vc.load(again)[1]) == trees.digest(variables)
    for arguments in (["models", "pvt*"], ["count", str(path)]):
      subprocess.run([sys.executable, "-m", "vitcompact", *arguments], check=True,
                     stdout=subprocess.DEVNULL)
  print(f"Python {sys.version.split()[0]}, jax {jax.__version__}: ok")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]).resolve())
