"""measure: which parts of each block a dense model could do without, on the user's images."""
import math
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import scipy

from vitcompact import block as blocks
from vitcompact import trees
from vitcompact._version import __version__
from vitcompact.attention.block_sparse.windows import on_grid
from vitcompact.batches import CHUNK_VALUES, hold_out_last, join_batches, take_images
from vitcompact.calibration import (
  ROWS_PER_CHANNEL,
  SUM_TOKENS,
  Calibration,
  observe_jitted,
  run,
  run_blocks,
  run_teacher,
)
from vitcompact.checks import (
  FEW_IMAGES,
  check_finite,
  check_images,
  check_model,
  check_values,
  check_variables,
  warn_if_few_classes,
)
from vitcompact.curvature import kl_per_error
from vitcompact.methods import METHODS, protocol
from vitcompact.models import fields_of
from vitcompact.plan import BY_BLOCK, BlockMethods, Plan
from vitcompact.planner import Costs
from vitcompact.report import Option, Report

SENSITIVITIES = ("none", "quick", "full")
KEY_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)   # shares of the keys, for attention mass
TABLE_IMAGES = 32       # images for the tables of attention and tokens
TINY = 1e-12
BLOCKS_PER_TRIAL = 12   # a quick report tries each method in one block out of this many
KL_EXPONENT = 1.5       # KL ~ (removed tokens)^this; 0.93 to 1.99 on Fashion-MNIST


def measure(model: nn.Module, variables, images, sensitivity: str = "quick",
            progress: Callable[[str, int, int], Any] | None = None) -> Report:
  """Returns a Report of which parts each block could do without, and what removing them costs.

  For every block and axis it contains the methods' own estimates, statistics of attention and
  tokens, and sensitivities: KL(model || model with this one change) of the logits, in nats per
  image, on held-out images, after the change was fitted as `compact` does it. For a model without a
  classifier it is the squared error of the features, relative to their variance over images.

  Args:
    model: dense; variables: {"params", "batch_stats"?}.
    images: (B, H, W, C), normalised, of mixed classes; about 256 large or 1,024 small images. Or an
      iterable of such batches, such as a data loader over a whole data set, which is read until
      `batches.MOST_VALUES` are in memory. A quarter is held out.
    sensitivity: "full" tries every option in every block. "quick" tries one option of each method
      in one out of twelve blocks of equal size. It infers the others from the methods' estimates
      and the curvature of the KL in each block (`curvature.kl_per_error`). "none" tries nothing,
      so the report cannot propose a plan.
    progress: called with a block's name, the number of blocks done, and the number of all blocks.
  """
  check_model(model)
  if sensitivity not in SENSITIVITIES:
    raise ValueError(f"sensitivity={sensitivity!r}: must be one of {', '.join(SENSITIVITIES)}")
  if model.plan != Plan() or model.deploy:
    raise ValueError("measure starts from a dense, unfolded model; this one has "
                     f"plan={model.plan.to_json()}, deploy={model.deploy}")
  check_variables(model, variables)
  images = join_batches(model, images)
  check_images(model, images)
  check_values(images)
  check_finite(variables)
  jax.eval_shape(model.apply, variables, images)   # raises the model's own error about sizes
  if len(images) < FEW_IMAGES:
    warnings.warn(f"few images ({len(images)}): estimates and KLs depend on which they are; give "
                  "at least 256", stacklevel=2)
  return _Measurement(model, variables, images, sensitivity, progress).report()


class _Measurement:
  """One call of `measure`: all options of each block are evaluated on its dense input."""

  def __init__(self, model, variables, images, sensitivity, progress):
    self.model, self.variables, self.sensitivity = model, variables, sensitivity
    self.progress = progress or (lambda name, done, total: None)
    self.images_digest = trees.digest({"images": np.asarray(images, np.float32)})
    self.images, held_out = hold_out_last(images)
    self.held_out = held_out or len(self.images)
    self.modules = model.compactable_blocks()
    self.done, self.outputs, self.fully_tried = [], {}, set()
    self.latest_calibration = None, None   # (block, its Calibration)
    self.legal = {name: {kind: found for axis in BY_BLOCK for kind in METHODS[axis].values()
                         if (found := self._legal(kind, axis, site))}
                  for name, site in self._sites()}
    self.stages = self._stages()
    self.sampled = self._sampled_blocks()
    values = CHUNK_VALUES // 2 if sensitivity == "quick" else CHUNK_VALUES
    count = min(self.held_out, max(32, values // max(math.prod(self._largest_stream()), 1)))
    self.kl_images = slice(len(self.images) - count, None)

  def _largest_stream(self) -> tuple[int, int]:
    """Returns (tokens, width) of the block with the largest residual stream."""
    return max(((module.site.queries, module.site.ffn_width) for module in self.modules.values()),
               key=math.prod)

  def _stages(self) -> dict[str, int]:
    """Returns {block: number of its stage}; the blocks of a stage have equal sizes."""
    sizes = {name: (site.tokens, site.heads, site.ffn_width, "attention" in site.provides)
             for name, site in self._sites()}
    order = list(dict.fromkeys(sizes.values()))
    return {name: order.index(size) for name, size in sizes.items()}

  def _sites(self):
    return [(name, module.site) for name, module in self.modules.items()]

  def _sampled_blocks(self) -> set[tuple[str, type]]:
    """Returns the {(block, class of methods)} that a quick report tries: the middle one of every
    `BLOCKS_PER_TRIAL` blocks of a stage that can have the class."""
    blocks_of = {}
    for name, kinds in self.legal.items():
      for kind in kinds:
        blocks_of.setdefault((self.stages[name], kind), []).append(name)
    sampled = set()
    for (_, kind), names in blocks_of.items():
      count = math.ceil(len(names) / BLOCKS_PER_TRIAL)
      sampled |= {(names[int((i + 0.5) * len(names) / count)], kind) for i in range(count)}
    return sampled

  def report(self) -> Report:
    model = self.model
    self.logits = None
    if self.sensitivity != "none":
      self.logits = self._run(self._dense)
    rows = []
    logits = run_blocks(model, self.variables, self.images,
                     lambda name, block, x: self._block(rows, name, block, x))
    if model.num_classes and not isinstance(logits, tuple):
      warn_if_few_classes(np.asarray(logits), stacklevel=3)
    kept = [] if self.sensitivity == "none" else self._reducers()
    if self.sensitivity == "quick":
      self._infer(rows)
    costs = Costs(model)
    return Report(
        vitcompact=__version__, model=model.variant, fields=described_fields(model),
        digest=trees.digest(self.variables), images=len(self.images),
        images_digest=self.images_digest,
        sensitivity=self.sensitivity, params=costs.dense.params, macs=costs.dense.macs,
        blocks=tuple(rows), tokens=tuple(kept))

  def _run(self, on_block):
    """Returns the logits on the images for the KL."""
    return np.asarray(run_blocks(self.model, self.variables, self.images[self.kl_images], on_block))

  def _dense(self, name, block, x):
    return run(block, self._variables(name), x)

  def _variables(self, name):
    return {"params": blocks.without_layer_scale(self.variables["params"][name]),
            "batch_stats": self.variables.get("batch_stats", {}).get(name, {})}

  def _block(self, rows, name, block, x):
    """Returns the dense output and adds the block's row to the report."""
    site, tables, options = self.modules[name].site, {}, []
    if "attention" in site.provides:
      prefix = site.prefix if "class token" in site.provides else 0
      seen = observe_jitted(block, self._variables(name), take_images(x, slice(TABLE_IMAGES)))
      tables |= attention_tables(seen, prefix) | block_attention_table(seen.maps, site)
    kinds = self.legal[name]
    out, sums = self._sums(name, block, x, list(kinds))
    self.outputs[name] = take_images(out, self.kl_images)
    for kind, found in kinds.items():
      new, more = self._options(found, name, block, x, *protocol.estimate(
          kind, found, site, sums.get(kind)))
      options += new
      tables |= more
    rows.append({"name": name, "tokens": site.tokens, "options": tuple(options), "tables": tables})
    self.done.append(name)
    self.progress(name, len(self.done), len(self.modules))
    return out

  def _legal(self, kind, axis: str, site):
    """Returns the options of a class of methods that this block can have."""
    found = []
    for method in protocol.options(kind, site):
      plan = Plan(blocks={site.block: {axis: method}})
      try:
        self.model.clone(plan=plan).check()
      except ValueError:
        continue
      if getattr(plan.at(site), axis) is not None:
        found.append(method)
    return found

  def _sums(self, name, block, x, kinds):
    """Returns (dense output, {class: statistics} of the classes that have any), in one pass."""
    params, stats = self._variables(name).values()
    asked = {kind: asked for kind in kinds if (asked := protocol.statistics(kind, params))}
    if not asked:
      return self._dense(name, block, x), {}
    data = Calibration(block, params, stats, x, None,
                       self.held_out if self.held_out < len(self.images) else 0, {})
    functions, arguments = zip(*asked.values(), strict=True)
    out, (sums, _) = data.outputs_and_sums(functions, *arguments)
    return out, dict(zip(asked, sums, strict=True))

  def _options(self, methods, name, block, x, errors, tables):
    """Returns ([Option], {name: table}) of one class of methods in one block. Options that a quick
    report does not try have no KL yet."""
    tried = methods if self.sensitivity == "full" else []
    if self.sensitivity == "quick" and (name, type(methods[0])) in self.sampled:
      order = range(len(methods)) if errors is None else np.argsort(errors, kind="stable")
      tried = [methods[int(order[len(methods) // 2])]]
      key = self.stages[name], type(methods[0])
      if errors is None and key not in self.fully_tried:
        self.fully_tried.add(key)
        tried = methods   # nothing but their KLs tells them apart
    found = {method: self._kl_of_option(name, block, method, x) for method in tried}
    return [Option(method.axis, method, None if errors is None else float(errors[i]),
                   found.get(method), method in found) for i, method in enumerate(methods)], tables

  def _infer(self, rows):
    """Infers the KL of the options that a quick report did not try: KL = unit x scale x factor.

    unit: the method's estimate of the option's error or, without estimates, its KL / scale where it
    was tried. scale: of the block and axis, from `curvature.kl_per_error`. factor: KL / (unit x
    scale) of the class where it was tried; its logarithm is interpolated linearly over the blocks
    of the stage.
    """
    costs = kl_per_error(self.model, self.variables, self.images[self.kl_images],
                         math.prod(self._largest_stream()))
    units, factors = {}, {}   # {(stage, option): unit}; {(stage, class): {place: log factor}}
    most = max((cost for row in costs.values() for cost in row.values()), default=0.0) or 1.0

    def scale(row, option):
      return max(costs[row["name"]].get(option.axis, most) / most, TINY)

    def unit(stage, option):
      return units[stage, option.method] if option.error is None else max(option.error, TINY)

    for place, row in enumerate(rows):
      stage = self.stages[row["name"]]
      for option in row["options"]:
        if option.measured:
          kl = max(option.kl, TINY) / scale(row, option)
          units.setdefault((stage, option.method), kl)
          factors.setdefault((stage, type(option.method)), {})[place] = math.log(
              kl / unit(stage, option))
    for place, row in enumerate(rows):
      stage = self.stages[row["name"]]
      row["options"] = tuple(
          option if option.measured else option._replace(
              kl=unit(stage, option) * scale(row, option) * math.exp(np.interp(
                  place, *zip(*factors[stage, type(option.method)].items(), strict=True))))
          for option in row["options"])

  def _kl_of_option(self, name, block, method, x) -> float:
    """Returns the KL of the logits with this method in this block alone, fitted as by `compact`."""
    module = self.modules[name]
    params, stats = self._variables(name).values()
    methods = BlockMethods(**{method.axis: method})
    data = self._calibration(name, block, x)
    new, new_stats = blocks.from_dense(module.site, methods, params, stats,
                                       lambda *_: data)
    changed = block.clone(methods=methods)

    def on_block(other, dense, x):
      if other == name:
        return run(changed, {"params": new, "batch_stats": new_stats}, x)
      if other in self.outputs and other in self.done:
        return self.outputs[other]
      return self._dense(other, dense, x)

    return self._kl(self._run(on_block))

  def _calibration(self, name, block, x) -> Calibration:
    """Returns the calibration that all options of a block are fitted to; kept until the next block.
    """
    if self.latest_calibration[0] != name:
      inputs, held_out = self._images_to_fit(x, self.modules[name].site)
      variables = self._variables(name)
      _, teacher = run_teacher(block, variables, inputs)
      self.latest_calibration = name, Calibration(block, *variables.values(), inputs, teacher,
                                                  held_out, {})
    return self.latest_calibration[1]

  def _images_to_fit(self, x, site):
    """Returns (images to fit an option to, how many of them are held out). A quick report uses only
    as many evenly spaced images as give enough tokens."""
    fitted = len(self.images) - self.held_out
    if not fitted:
      return x, 0
    tokens = math.prod(max(jax.tree.leaves(x), key=np.size).shape[1:-1])
    needed = max(TABLE_IMAGES, math.ceil(max(ROWS_PER_CHANNEL * site.hidden, SUM_TOKENS) / tokens))
    step = max(fitted // needed, 1) if self.sensitivity == "quick" else 1
    at = np.concatenate([np.arange(0, fitted, step), np.arange(fitted, len(self.images), step)])
    chosen = x if step == 1 else jax.tree.map(lambda leaf: leaf[at], x)
    return chosen, len(np.arange(fitted, len(self.images), step))

  def _kl(self, logits) -> float:
    distance = divergence if self.model.num_classes else feature_error
    return distance(self.logits, logits)

  def _reducers(self) -> list[Option]:
    """Returns the options of the tokens axis, each tried on the whole model. A quick report tries
    the middle one of each class and infers the others."""
    found, site = [], next(iter(self.modules.values())).site
    for kind in METHODS["tokens"].values():
      legal = {}
      for method in protocol.options(kind, site):
        small = self.model.clone(plan=Plan(tokens=method))
        try:
          small.check()
        except ValueError:
          continue
        legal[method] = small.clone(remat=False).submodules()
      removed = {method: _removed_share(method, site) for method in legal}
      tried = list(legal)
      if self.sensitivity == "quick":
        tried = sorted(legal, key=removed.get)[len(legal) // 2:][:1]
      kl = {method: self._kl_of_reducer(legal[method]) for method in tried}
      for method in legal:
        if method not in kl:
          kl[method] = kl[tried[0]] * (removed[method] / removed[tried[0]]) ** KL_EXPONENT
        found.append(Option("tokens", method, None, kl[method], method in tried))
      self.progress(kind.__name__, len(self.done), len(self.modules))
    return found

  def _kl_of_reducer(self, reduced) -> float:
    """Returns the KL of the logits with the reducers of these blocks, {name: module}. The proposed
    reducers have no parameters."""
    def on_block(name, block, x):
      return run(block.clone(methods=reduced[name].methods, site=block.site._replace(
          tokens_left=reduced[name].site.tokens_left)), self._variables(name), x)

    return self._kl(self._run(on_block))


def _removed_share(reducer, site) -> float:
  """Returns the share of tokens that a reducer has removed, averaged over the blocks."""
  plan = Plan(tokens=reducer)
  left = [plan.tokens_left(i + 1, site.depth, site.tokens, site.prefix) for i in range(site.depth)]
  return max(1 - sum(left) / (site.depth * site.tokens), TINY)


def divergence(dense, changed) -> float:
  """Returns the mean KL(dense || changed) of logits (B, K), in float64."""
  dense, changed = (scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
                    for logits in (dense, changed))
  return max(float(np.mean(np.sum(np.exp(dense) * (dense - changed), axis=-1))), 0.0)


def feature_error(dense, changed) -> float:
  """Returns E|changed - dense|^2 / E|dense - mean|^2 of features (B, ..., C), means over images."""
  dense, changed = (np.asarray(x, np.float64) for x in (dense, changed))
  variance = np.mean((dense - dense.mean(axis=0)) ** 2)
  return float(np.mean((changed - dense) ** 2) / max(variance, np.finfo(np.float32).tiny))


def attention_tables(seen, prefix: int) -> dict[str, list]:
  """Returns statistics of attention and tokens on a few images.

  attention_mass: the attention that the strongest keys of a query receive, by share of the keys;
  class_attention_mass: the same for the class token's attention to patches; map_likeness: cosines
  between the maps of heads; token_similarity: mean cosine of two patches.
  """
  maps = np.asarray(seen.maps)   # NumPy, because XLA sorts slowly on a CPU
  ordered = -np.sort(-maps, axis=-1)
  mass = np.cumsum(ordered.mean(axis=(0, 1, 2)))
  flat = maps.transpose(1, 0, 2, 3).reshape(maps.shape[1], -1)
  flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
  patches = np.asarray(seen.before_attention, np.float32)[:, prefix:]
  # Padding of windows is zero and must not become NaN.
  patches = patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-30)
  mean, count = patches.mean(axis=1), patches.shape[1]
  similarity = (count * np.sum(mean * mean, axis=-1) - 1) / max(count - 1, 1)
  out = {"attention_mass": mass[_last_keys(maps.shape[-1])].round(4).tolist(),
         "map_likeness": (flat @ flat.T).round(4).tolist(),
         "token_similarity": round(float(similarity.mean()), 4)}
  if prefix:
    by_class = -np.sort(-maps[:, :, 0, prefix:].mean(axis=1), axis=-1)
    by_class = np.cumsum((by_class / by_class.sum(axis=-1, keepdims=True)).mean(axis=0))
    out["class_attention_mass"] = by_class[_last_keys(count)].round(4).tolist()
  return out


def block_attention_table(maps, site, window: int = 8) -> dict[str, list]:
  """Returns {"block_attention_mass": ...}: of the attention of a block of window x window queries
  to patches, the part that its strongest blocks of keys receive, by share of the blocks. {} without
  a grid, or if the grid is a single block.

  maps: (B, h, N, M), with the same prefix among queries and keys.
  """
  if site.query_grid is None or site.key_grid is None:
    return {}
  rows, columns = (np.eye(cut.blocks)[cut.block_of()]
                   for cut in (on_grid(grid, window) for grid in (site.query_grid, site.key_grid)))
  maps = np.asarray(maps)[:, :, -len(rows):, -len(columns):]
  if columns.shape[1] == 1 or maps.shape[2:] != (len(rows), len(columns)):
    return {}
  mass = np.einsum("bhnm,nq,mk->bhqk", maps, rows, columns, optimize=True)
  ordered = -np.sort(-mass / mass.sum(axis=-1, keepdims=True), axis=-1)
  kept = np.cumsum(ordered.mean(axis=(0, 1, 2)))
  return {"block_attention_mass": kept[_last_keys(len(kept))].round(4).tolist()}


def _last_keys(keys: int) -> list[int]:
  """Returns the index of the last key of each share."""
  return [max(1, math.ceil(share * keys - 1e-9)) - 1 for share in KEY_SHARES]


def described_fields(model) -> dict[str, Any]:
  """Returns a dense model's fields as JSON values."""
  own = {key: value for key, value in fields_of(model).items()
         if key not in ("plan", "execution", "deploy")}
  return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
