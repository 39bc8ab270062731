"""Attention: everything that attends calls a `Core`.

  reference.py       the definition           call.py     the data of a call, and the call
  choice.py          which form computes it   device.py   where it will run, what was asked for
  forms.py           the forms by name        tuning.py   every tuned constant
  online_softmax.py  the one softmax of tiles, for tiled.py (tiles of queries) and block_sparse/
  vendor.py, cpu.py  what others compute, and the loops that only a CPU wants
"""
# ruff: noqa: F401
import flax.linen as nn
import jax.numpy as jnp

from vitcompact.attention.call import DENSE, Core
from vitcompact.attention.choice import choose
from vitcompact.attention.device import (
    FORMS,
    Device,
    current,
    on,
    requested_form,
    split_over,
    using,
)
from vitcompact.attention.reference import SCOPE, scores, share, softmax_kept, weigh


def split() -> bool:
  """Whether the images of a batch lie on several devices."""
  return current().split


def portable() -> bool:
  """Whether the program is a graph that others run, in which a method too should have no loops and
  few kinds of operations: see `device.using`."""
  return requested_form() == "plain"


def loops_over_images() -> bool:
  """Whether what a method computes for itself should also loop: see `Device`."""
  return current().loops_over_images


def wants_maps(module: nn.Module) -> bool:
  """Whether somebody asked for attention maps: they are formed, and sown as "maps", only then."""
  return module.is_mutable_collection("maps") and not module.is_initializing()


def share_kept(collections) -> dict[str, float]:
  """{"attention_kept": share of the pairs of tokens, or of blocks of them, that are scored}, of all
  that was sown as "kept" in the collection "attention"; {} where nothing was."""
  shares = [jnp.mean(seen["kept"][0]) for block in collections.get("attention", {}).values()
            for seen in block.values() if "kept" in seen]
  return {"attention_kept": float(sum(shares) / len(shares))} if shares else {}


def wants_predictions(module: nn.Module) -> bool:
  """Whether somebody asked for what mask predictors are trained with, sown as "attention"."""
  return module.is_mutable_collection("attention") and not module.is_initializing()
