"""The definition of a named model: its class, its sizes, and how its images are preprocessed."""
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Variant(NamedTuple):
  """A row of a table of models.

  kind: the Linen module; sizes: its fields; mean, std: of RGB in [0, 1]; crop: share of the resized
  image that the central crop of evaluation keeps, None: the whole image, warped to a square;
  crop_384: crop at 384 pixels and above, if it differs; crop_mode: timm's "center" or "squash";
  plan: methods that are part of the named model, as `Plan.from_dict` takes them.
  """
  kind: type
  sizes: dict[str, Any]
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  crop: float | None = 0.9
  crop_384: float | None = None
  interpolation: str = "bicubic"
  crop_mode: str = "center"
  plan: Mapping[str, Any] = MappingProxyType({})
