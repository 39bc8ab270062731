"""verify: checks on images that two models compute the same function."""
import dataclasses

import flax.linen as nn
import jax
import numpy as np

from vitcompact.checks import check_fitting, describe_value


@dataclasses.dataclass(frozen=True)
class Proof:
  """How much two models' outputs differ.

  max_abs: largest absolute difference of logits; max_rel: that over the largest absolute logit;
  top1_agreement: share of images with the same top-1 class; images: how many were compared;
  first_difference: name of the first block whose outputs differ by more than `tolerance` of their
  largest value, or None.
  """
  max_abs: float
  max_rel: float
  top1_agreement: float
  images: int
  tolerance: float
  first_difference: str | None

  @property
  def ok(self) -> bool:
    """Whether the logits agree to the tolerance (false for NaN)."""
    return self.max_rel <= self.tolerance


def verify(model: nn.Module, variables, deploy: nn.Module, deploy_variables, images, *,
           tolerance: float = 1e-5) -> Proof:
  """Compares two models on normalised images (B, H, W, C), block by block and at the logits."""
  check_fitting(model, variables, images)
  check_fitting(deploy, deploy_variables, images, "deploy ")
  if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or tolerance < 0:
    raise ValueError(f"tolerance: {describe_value(tolerance)} was given, expected a number of "
                     "at least 0")
  reference, reference_blocks = _run(model, variables, images)
  logits, logits_blocks = _run(deploy, deploy_variables, images)
  if logits.shape != reference.shape:
    raise ValueError(f"the models' outputs have shapes {reference.shape} and {logits.shape}: to "
                     "compute the same function they must have the same number of classes")
  max_abs, max_rel = _difference(logits, reference)
  # Not `> tolerance`, which is false for NaN.
  first = next((name for name in reference_blocks if name in logits_blocks and not
                _difference(logits_blocks[name], reference_blocks[name])[1] <= tolerance), None)
  return Proof(max_abs, max_rel, float(np.mean(logits.argmax(-1) == reference.argmax(-1))),
               len(images), tolerance, first)


def _run(model, variables, images):
  """(logits, {block: its output})."""
  names = tuple(model.submodules())
  paths = {(name,) for name in names}

  @jax.jit
  def run(variables, images):
    logits, state = model.apply(variables, images, mutable=["intermediates"],
                                capture_intermediates=lambda m, _: m.path in paths)
    outputs = [state["intermediates"][name]["__call__"][0] for name in names]
    # Blocks of isotropic models pass on Tokens.
    return logits, [getattr(out, "x", out) for out in outputs]

  logits, outputs = run(variables, images)
  return np.asarray(logits), dict(zip(names, map(np.asarray, outputs), strict=True))


def _difference(x, reference) -> tuple[float, float]:
  """(largest absolute difference, that over the largest absolute value of the reference)."""
  x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
  max_abs = float(np.max(np.abs(x - reference)))
  return max_abs, max_abs / max(float(np.max(np.abs(reference))), np.finfo(np.float32).tiny)
