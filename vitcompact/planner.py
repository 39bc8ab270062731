"""The search for a plan: what each option costs and saves, and a knapsack over blocks and axes."""
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact.calibration import BlockKey, run_blocks
from vitcompact.count import count, count_block
from vitcompact.plan import BlockMethods, Plan
from vitcompact.token_state import Tokens

BINS = 2000          # of the dense model's total: savings are rounded down to whole bins
MIN_KL = 1e-6        # smaller KLs are rounding errors, and count as 0
TIE_BREAKER = 1e-9   # KL that saving all the parameters that could be saved is worth


class Choice(NamedTuple):
  """Options for one block, {axis: Option}, with the KL that they cost and what they save."""
  options: dict
  kl: float
  saved: float
  params: int


class Costs:
  """MACs and parameters of a model's blocks under options, in deployed form, for one image.

  An option saves the difference from the dense block. Savings of the FFN and of attention add up;
  methods of the heads and attention axes are counted together; the reducer always acts.
  """

  def __init__(self, model: nn.Module):
    self.model = model.clone(plan=Plan(), deploy=True, remat=False)
    self.dense = count(self.model)
    self._inputs = self._shapes()

  def _shapes(self):
    """{block: shape of its input} for one image."""
    shapes = {}

    def on_block(name, block, x):
      shapes[name] = x
      return _zero_output(block, x)

    images = jnp.zeros((1, *np.broadcast_to(self.model.image_size, 2).tolist(),
                        self.model.in_chans))
    variables = jax.eval_shape(self.model.init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    run_blocks(self.model, zeros, images, on_block)
    return {name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
            for name, x in shapes.items()}

  def at(self, name: str, methods: BlockMethods, tokens: int | None = None) -> tuple[int, int]:
    """(MACs, parameters) of a block under methods, at `tokens` tokens (isotropic models)."""
    block, x = self.model.compactable_blocks()[name], self._inputs[name]
    if tokens is not None:
      native = x.x.shape[1]
      source = jax.ShapeDtypeStruct((1, native), jnp.int32) if tokens != native else None
      x = Tokens(jax.ShapeDtypeStruct((1, tokens, x.x.shape[2]), x.x.dtype), source=source)
    return _cached_count(BlockKey(block.clone(methods=methods)), jax.tree.structure(x),
                    tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(x)))

  def saved(self, name: str, methods: dict, tokens: int | None = None,
            reducer=None) -> tuple[int, int]:
    """(MACs, parameters) that a block saves with {axis: method}, with the reducer acting too."""
    dense = BlockMethods(tokens=reducer)
    before = self.at(name, dense, tokens)
    after = self.at(name, dense._replace(**methods), tokens)
    return before[0] - after[0], before[1] - after[1]


def _zero_output(block: nn.Module, x):
  """Zeros in the shape of a block's output."""
  out = jax.eval_shape(lambda x: block.init_with_output(jax.random.key(0), x)[0], x)
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), out)


@functools.lru_cache(maxsize=4096)
def _cached_count(key: BlockKey, tree, leaves) -> tuple[int, int]:
  x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves])
  return count_block(key.block, x)


def combinations(options: dict[str, list[Any]]) -> list[dict[str, Any]]:
  """Every combination with at most one option of each axis."""
  found = [{}]
  for axis, choices in options.items():
    found = [{**base, **more} for base in found
             for more in [{}, *({axis: choice} for choice in choices)]]
  return found


class Knapsack:
  """Finds the choice for each block that costs the least KL and saves at least a given total.

  choices: {block: [Choice]}, the dense one first. Deterministic: ties go to the choice with fewer
  parameters, then to the first.
  """

  def __init__(self, choices: dict[str, list[Choice]], scale: float):
    self.choices, self.bin = choices, scale / BINS

  def most_saved(self) -> float:
    """The most that can be saved, in whole bins."""
    return self.bin * sum(max(self._bins(choice) for choice in choices)
                          for choices in self.choices.values())

  def saved(self, picks: dict[str, int]) -> float:
    """What {block: index of its choice} saves, in whole bins."""
    return self.bin * sum(self._bins(self.choices[name][i]) for name, i in picks.items())

  def _bins(self, choice: Choice) -> int:
    return int(np.floor(choice.saved / self.bin + 1e-9))

  def best(self, need: float, forbidden: tuple[str, int] | None = None):
    """({block: index of its choice}, KL), or None if `need` cannot be saved."""
    bins = max(0, int(np.ceil(need / self.bin - 1e-9)))
    cost = np.full(bins + 1, np.inf)     # of saving at least j bins in the blocks so far
    cost[0] = 0
    best_choices = []
    most = max(1, sum(max(choice.params for choice in choices)
                      for choices in self.choices.values()))
    for name, choices in self.choices.items():
      table = np.full((len(choices), bins + 1), np.inf)
      for i, choice in enumerate(choices):
        if forbidden == (name, i):
          continue
        step = self._bins(choice)
        kl = 0.0 if choice.kl < MIN_KL else choice.kl
        before = _shift_costs(cost, step)
        table[i] = before + kl - TIE_BREAKER * choice.params / most
      best = table.argmin(axis=0)
      best_choices.append((name, best))
      cost = table[best, np.arange(bins + 1)]
    if not np.isfinite(cost[bins]):
      return None
    picks, left = {}, bins
    for name, best in reversed(best_choices):
      picks[name] = int(best[left])
      left = max(0, left - self._bins(self.choices[name][picks[name]]))
    picks = dict(reversed(picks.items()))
    return picks, sum(self.choices[name][i].kl for name, i in picks.items())


def _shift_costs(cost: np.ndarray, step: int) -> np.ndarray:
  """The cost of saving at least j bins once a choice has saved `step` bins (or added, if negative).
  """
  if step >= 0:
    return cost[np.maximum(np.arange(len(cost)) - step, 0)]
  out = np.full(len(cost), np.inf)
  out[:step] = cost[-step:]
  return out
