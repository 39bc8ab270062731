"""measure: where a dense model has slack, block by block and axis by axis, on the user's images."""
import hashlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from vitcompact import block as blocks
from vitcompact import trees
from vitcompact._version import __version__
from vitcompact.calibration import VALUES, Calibration, held_last, run, take, through
from vitcompact.doors import check_images, check_model, check_variables
from vitcompact.methods import METHODS, protocol
from vitcompact.models import fields_of
from vitcompact.plan import BY_BLOCK, BlockMethods, Plan
from vitcompact.planner import Costs
from vitcompact.report import Option, Report

SENSITIVITIES = ("none", "quick", "full")
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)   # of the keys that attention mass is told of
LOOKED_AT = 32                               # images that the pictures are made of
FEW_CLASSES = 0.5


def measure(model: nn.Module, variables, images, sensitivity: str = "quick",
            progress: Callable[[str, int, int], Any] | None = None) -> Report:
  """Returns a Report of what each block of a dense model could do without, and what that costs.

  For every block and axis: what the methods' own estimates say, statistics of its attention and
  tokens, and sensitivities: KL(model || model with this one change) of the logits, in nats per
  image, on images held out, after the change was fitted as `compact` fits it.

  Args:
    model: dense; variables: {"params", "batch_stats"?}.
    images: (B, H, W, C), normalised, of mixed classes, or an iterable of such batches; some 256
      large or 1,024 small ones. A quarter is held out.
    sensitivity: "quick" tries one option of each axis in each block, and infers the others from
      estimates; "full" tries all; "none" tries none, and such a report proposes no plan.
    progress: called with a block's name, how many are done, and of how many.
  """
  check_model(model)
  if sensitivity not in SENSITIVITIES:
    raise ValueError(f"sensitivity={sensitivity!r}: must be one of {', '.join(SENSITIVITIES)}")
  if model.plan != Plan() or model.deploy:
    raise ValueError("measure starts from a dense, unfolded model; this one has "
                     f"plan={model.plan.to_json()}, deploy={model.deploy}")
  if not hasattr(images, "shape"):
    images = np.concatenate([np.asarray(batch) for batch in images])
  check_images(model, images)
  check_variables(model, variables)
  jax.eval_shape(model.apply, variables, images)   # their size, in the model's own words
  looking = _Measurement(model, variables, images, sensitivity, progress)
  return looking.report()


class _Measurement:
  """One call of `measure`: the dense stream of every block, and what it is asked."""

  def __init__(self, model, variables, images, sensitivity, progress):
    self.model, self.variables, self.sensitivity = model, variables, sensitivity
    self.progress = progress or (lambda name, done, total: None)
    self.images, held = held_last(images)
    self.held = held or len(self.images)
    self.modules = {name: module for name, module in model.submodules().items()
                    if hasattr(module, "methods")}
    self.done, self.outputs = [], {}
    tried = min(self.held, max(32, VALUES // max(math.prod(self._stream()), 1)))
    self.tried = slice(len(self.images) - tried, None)

  def _stream(self) -> tuple[int, int]:
    """(tokens, width) where the stream is largest."""
    return max(((module.site.queries, module.site.ffn_width) for module in self.modules.values()),
               key=math.prod)

  def report(self) -> Report:
    model = self.model
    self.logits = None
    if self.sensitivity != "none":
      self.logits = np.asarray(through(model, self.variables, self.images[self.tried], self._dense))
    rows = []
    logits = through(model, self.variables, self.images,
                     lambda name, block, x: self._block(rows, name, block, x))
    if model.num_classes and not isinstance(logits, tuple):
      self._check_classes(np.asarray(logits))
    kept = [] if self.sensitivity == "none" else self._reducers()
    costs = Costs(model)
    return Report(
        vitcompact=__version__, model=model.variant, fields=described_fields(model),
        digest=trees.digest(self.variables), images=len(self.images),
        images_digest=hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest(),
        sensitivity=self.sensitivity, params=costs.dense.params, macs=costs.dense.macs,
        blocks=tuple(rows), tokens=tuple(kept))

  def _dense(self, name, block, x):
    return run(block, self._variables(name), x)

  def _variables(self, name):
    return {"params": self.variables["params"][name],
            "batch_stats": self.variables.get("batch_stats", {}).get(name, {})}

  def _block(self, rows, name, block, x):
    """The dense output; adds a row of the report."""
    out = self._dense(name, block, x)
    self.outputs[name] = take(out, self.tried)
    few = Calibration(block, *self._variables(name).values(), take(x, slice(LOOKED_AT)), block,
                      self.variables["params"][name], None, 0, {})
    site, tables, options = self.modules[name].site, {}, []
    if "attention" in site.provides:
      prefix = site.prefix if "class token" in site.provides else 0
      sums = few.sums(_attention_of, jnp.zeros(prefix))[0]
      tables |= {key: (value / sums["images"]).round(4).tolist() for key, value in sums.items()
                 if key != "images" and value.size}
    for axis in BY_BLOCK:
      for kind in METHODS[axis].values():
        found = self._legal(kind, axis, self.modules[name].site)
        if found:
          new, more = self._options(axis, kind, found, name, block, x)
          options += new
          tables |= more
    rows.append({"name": name, "tokens": site.tokens, "options": tuple(options), "tables": tables})
    self.done.append(name)
    self.progress(name, len(self.done), len(self.modules))
    return out

  def _legal(self, kind, axis: str, site):
    """The options of a class that this block can have."""
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

  def _options(self, axis, kind, methods, name, block, x):
    """([Option], {name: table}) of one class of methods in one block."""
    site = self.modules[name].site
    params = self.variables["params"][name]
    data = Calibration(block, *self._variables(name).values(), x, block, params, None, self.held
                       if self.held < len(self.images) else 0, {})
    errors, tables = protocol.estimate(kind, methods, site, params, data)
    tried = {"none": [], "full": methods, "quick": methods}[self.sensitivity]
    if self.sensitivity == "quick" and errors is not None:
      # The middle one, by its error: the others are inferred from it.
      tried = [methods[int(np.argsort(errors, kind="stable")[len(errors) // 2])]]
    found = {method: self._tried(name, block, axis, method, x) for method in tried}
    options = []
    for i, method in enumerate(methods):
      error = None if errors is None else float(errors[i])
      if method in found:
        kl, measured = found[method], True
      elif found:
        reference = methods.index(tried[0])
        kl, measured = found[tried[0]] * error / max(errors[reference], 1e-12), False
      else:
        kl, measured = None, False
      options.append(Option(axis, method, error, kl, measured))
    return options, tables

  def _tried(self, name, block, axis, method, x) -> float:
    """KL of the logits with this method in this block alone, fitted to the images not held out."""
    module, held = self.modules[name], self.held if self.held < len(self.images) else 0
    params, stats = self._variables(name).values()
    methods = BlockMethods(**{axis: method})
    data = Calibration(block, params, stats, x, block, params, None, held, {})
    new, new_stats = blocks.from_dense(module.site, methods, params, stats,
                                       lambda *_: data)
    changed = block.clone(methods=methods)

    def on_block(other, dense, x):
      if other == name:
        return run(changed, {"params": new, "batch_stats": new_stats}, x)
      if other in self.outputs and other in self.done:
        return self.outputs[other]
      return self._dense(other, dense, x)

    logits = np.asarray(through(self.model, self.variables, self.images[self.tried], on_block))
    return self._kl(logits)

  def _kl(self, logits) -> float:
    return divergence(self.logits, logits)

  def _reducers(self):
    """[Option] of the tokens axis, each tried on the whole model."""
    found, site = [], next(iter(self.modules.values())).site
    for kind in METHODS["tokens"].values():
      for method in protocol.options(kind, site):
        small = self.model.clone(plan=Plan(tokens=method))
        try:
          small.check()
        except ValueError:
          continue
        reduced = small.clone(remat=False).submodules()

        def on_block(name, block, x, reduced=reduced):
          # Reducers that are offered need no parameters.
          return run(block.clone(methods=reduced[name].methods, site=block.site._replace(
              tokens_left=reduced[name].site.tokens_left)), self._variables(name), x)

        logits = through(self.model, self.variables, self.images[self.tried], on_block)
        found.append(Option("tokens", method, None, self._kl(np.asarray(logits)), True))
        self.progress(type(method).__name__, len(self.done), len(self.modules))
    return found

  def _check_classes(self, logits):
    classes = len(np.unique(logits.argmax(-1)))
    wanted = min(logits.shape[-1], len(logits) // 8)
    if classes < FEW_CLASSES * wanted:
      warnings.warn(f"the {len(logits)} images are of few classes: the model sees {classes} of "
                    f"{logits.shape[-1]}; shuffle the data, or are the images not normalised as "
                    "vc.preprocess(model) does?", stacklevel=4)


def divergence(wanted, got) -> float:
  """Mean KL(wanted || got) of logits (B, K), in float64."""
  wanted, got = (log_softmax(np.asarray(x, np.float64), axis=-1) for x in (wanted, got))
  return max(float(np.mean(np.sum(np.exp(wanted) * (wanted - got), axis=-1))), 0.0)


def _attention_of(seen, prefix):
  """Sums over images of what attention is like. mass: that the strongest keys of each query get, by
  the share of the keys; of the class token's, and how alike the patches' inputs are."""
  images, _heads, _queries, keys = seen.maps.shape
  ordered = -jnp.sort(-seen.maps, axis=-1)
  mass = jnp.cumsum(ordered.mean(axis=(1, 2)), axis=-1)
  counts = [max(1, math.ceil(share * keys - 1e-9)) - 1 for share in SHARES]
  norms = seen.maps / jnp.linalg.norm(seen.maps, axis=(2, 3), keepdims=True)
  alike = jnp.einsum("bhnm,bgnm->hg", norms, norms)
  patches = seen.before_attention[:, prefix.shape[0]:].astype(jnp.float32)
  patches = patches / jnp.linalg.norm(patches, axis=-1, keepdims=True)
  mean = patches.mean(axis=1)
  count = patches.shape[1]
  similarity = (count * jnp.sum(mean * mean) - images) / max(count - 1, 1)
  out = {"images": jnp.float32(images), "attention_mass": mass[:, jnp.asarray(counts)].sum(axis=0),
         "map_likeness": alike, "token_similarity": similarity}
  if prefix.shape[0]:
    by_class = -jnp.sort(-seen.maps[:, :, 0, prefix.shape[0]:].mean(axis=1), axis=-1)
    by_class = jnp.cumsum(by_class / by_class.sum(axis=-1, keepdims=True), axis=-1)
    counts = [max(1, math.ceil(share * count - 1e-9)) - 1 for share in SHARES]
    out["class_attention_mass"] = by_class[:, jnp.asarray(counts)].sum(axis=0)
  return out


def described_fields(model) -> dict[str, Any]:
  """A dense model's fields, as JSON has them."""
  own = {key: value for key, value in fields_of(model).items()
         if key not in ("plan", "execution", "deploy")}
  return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
