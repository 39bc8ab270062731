"""vitcompact: vision transformers made smaller and faster, measured and proved at each step.

The public names are imported when first used; importing the package starts no device.
"""
import importlib
import sys
import types

from vitcompact._version import __version__ as __version__

_HOMES = {
    "create_model": "models", "list_models": "models", "preprocess": "preprocess",
    "Plan": "plan", "METHODS": "methods", "HMHSA": "methods.heads.hmhsa",
    "Sparsifiner": "methods.attention.sparsifiner", "EViT": "methods.tokens.evit",
    "DynamicViT": "methods.tokens.dynamicvit", "ToMe": "methods.tokens.tome",
    "MCTF": "methods.tokens.mctf", "CFFN": "methods.ffn.cffn", "Execution": "execution",
    "from_torch": "convert", "to_torch": "convert", "save": "convert", "load": "convert",
    "features": "features", "compact": "compact", "fold": "fold", "verify": "verify",
    "count": "count", "tune": "tune",
}
__all__ = sorted(_HOMES)


class _Package(types.ModuleType):
  """Finds public names when first asked for, and keeps them: importing the submodule `fold` must
  not hide the function of the same name."""

  def __getattr__(self, name):
    if name not in _HOMES:
      raise AttributeError(f"module 'vitcompact' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vitcompact.{_HOMES[name]}"), name)
    setattr(self, name, value)
    return value

  def __setattr__(self, name, value):
    if name in _HOMES and isinstance(value, types.ModuleType):
      value = getattr(value, name)
    super().__setattr__(name, value)

  def __dir__(self):
    return [*super().__dir__(), *__all__]


sys.modules[__name__].__class__ = _Package
