"""Attention: everything that attends calls a `Core`.

  reference.py       the definition           call.py     the data of a call, and the call
  choice.py          which form computes it   device.py   where it will run, what was asked for
  forms.py           the forms by name        tuning.py   every tuned constant
  online_softmax.py  the one softmax of tiles, for tiled.py (tiles of queries) and block_sparse/
  vendor.py, cpu.py  what others compute, and the loops that only a CPU wants
"""
import flax.linen as nn

from vitcompact.attention.call import DENSE, Core
from vitcompact.attention.choice import Choice, choose
from vitcompact.attention.device import (
  FORMS,
  Device,
  asked,
  current,
  loops_over_images,
  on,
  split,
  split_over,
  using,
)
from vitcompact.attention.reference import SCOPE, scores, share, softmax_kept, weigh

__all__ = ["DENSE", "FORMS", "SCOPE", "Choice", "Core", "Device", "asked", "choose", "current",
           "loops_over_images", "on", "scores", "share", "softmax_kept", "split", "split_over",
           "using", "wants_maps", "wants_predictions", "weigh"]


def wants_maps(module: nn.Module) -> bool:
  """Whether somebody asked for attention maps: they are formed, and sown as "maps", only then."""
  return module.is_mutable_collection("maps") and not module.is_initializing()


def wants_predictions(module: nn.Module) -> bool:
  """Whether somebody asked for what mask predictors are trained with, sown as "attention"."""
  return module.is_mutable_collection("attention") and not module.is_initializing()
