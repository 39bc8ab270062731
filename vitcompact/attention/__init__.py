"""Attention: every module that attends calls a `Core`.

  reference.py       the definition           call.py     `Core`: a call and its options
  choice.py          which form computes it   device.py   where it runs, and the requested form
  forms.py           the forms by name        tuning.py   every tuned constant
  online_softmax.py  the softmax over tiles, for tiled.py (tiles of queries) and block_sparse/
  vendor.py, cpu.py  other libraries' fused kernels, and loops that pay off only on a CPU
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
  """Whether the images of a batch are split over several devices."""
  return current().split


def portable() -> bool:
  """Whether the program is for another runtime, so that methods, too, should use no loops and few
  kinds of operations: see `device.using`."""
  return requested_form() == "plain"


def loops_over_images() -> bool:
  """Whether methods should loop over images in their own computations: see `Device`."""
  return current().loops_over_images


def wants_maps(module: nn.Module) -> bool:
  """Whether the caller asked for attention maps: only then are they formed, and sown as "maps"."""
  return module.is_mutable_collection("maps") and not module.is_initializing()


def share_kept(collections) -> dict[str, float]:
  """Returns {"attention_kept": share of pairs of tokens, or of blocks of tokens, that are scored},
  the mean of all that was sown as "kept" in the collection "attention"; {} if nothing was."""
  shares = [jnp.mean(seen["kept"][0]) for block in collections.get("attention", {}).values()
            for seen in block.values() if "kept" in seen]
  return {"attention_kept": float(sum(shares) / len(shares))} if shares else {}


def wants_predictions(module: nn.Module) -> bool:
  """Whether the caller asked for the training signals of mask predictors, sown as "attention"."""
  return module.is_mutable_collection("attention") and not module.is_initializing()
