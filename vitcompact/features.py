"""features: intermediate features and attention maps, for dense tasks and for inspection."""
from typing import NamedTuple

import flax.linen as nn
import jax

from vitcompact import trees
from vitcompact.checks import check_fitting


class Features(NamedTuple):
  """logits (B, num_classes); features: {"stage_1": (B, h, w, C), ...} for hierarchical models (the
  pyramid), {"block_0": (B, N, width), ...} for isotropic ones; maps: {"blocks_0": (B, heads, N, M),
  ...} for the blocks with attention, if requested, with hallucinated heads after the real ones."""
  logits: jax.Array
  features: dict[str, jax.Array]
  maps: dict[str, jax.Array]


def features(model: nn.Module, variables, images, *, maps: bool = False) -> Features:
  """Runs inference and returns its features, and its attention maps if `maps` is set."""
  check_fitting(model, variables, images)
  kept = ["features", "maps"] if maps else ["features"]
  logits, state = model.apply(variables, images, mutable=kept)
  return Features(logits, {name: values[0] for name, values in state.get("features", {}).items()},
                  maps_of(state))


def maps_of(state) -> dict[str, jax.Array]:
  """{name of a block: its attention map}, from the collections that a model has sown."""
  return {name.split("/")[0]: value
          for name, value in trees.named_leaves(state.get("maps", {})).items()}
