"""vitcompact: vision transformers made smaller and faster, measured and proved at each step.

The public names are imported when first used; importing the package starts no device.
"""
import importlib
import sys
import types

_HOMES = {
    "create_model": "models", "list_models": "models", "preprocess": "preprocess",
    "Plan": "plan", "HMHSA": "methods.heads.hmhsa", "CFFN": "methods.ffn.cffn",
    "Sparsifiner": "methods.attention.sparsifiner", "EViT": "methods.tokens.evit", "ToMe": "methods.tokens.tome",
    "DynamicViT": "methods.tokens.dynamicvit", "MCTF": "methods.tokens.mctf",
    "from_torch": "convert", "to_torch": "convert", "save": "convert", "load": "convert",
    "features": "features", "compact": "compact", "fold": "fold", "verify": "verify",
    "count": "count", "tune": "tune",
}
__all__ = sorted(_HOMES)


class _Package(types.ModuleType):
  """Finds public names when first asked for, and keeps them: importing the submodule `fold` must
  not hide the function `fold` behind it."""

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
