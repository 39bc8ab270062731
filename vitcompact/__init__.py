"""vitcompact: vision transformers made smaller and faster, measured and verified at each step.

The public names are imported when first used; importing the package starts no device.
"""
import importlib
import sys
import types

from vitcompact._version import __version__ as __version__

_MODULES = {
    "create_model": "models", "list_models": "models", "preprocess": "preprocess",
    "Plan": "plan", "METHODS": "methods", "HMHSA": "methods.heads.hmhsa",
    "Sparsifiner": "methods.attention.sparsifiner", "KeyMerging": "methods.attention.key_merging",
    "BiFormer": "methods.attention.biformer",
    "EViT": "methods.tokens.evit",
    "DynamicViT": "methods.tokens.dynamicvit", "ToMe": "methods.tokens.tome",
    "MCTF": "methods.tokens.mctf", "FastPath": "methods.tokens.fastpath",
    "CFFN": "methods.ffn.cffn", "GLU": "methods.ffn.glu",
    "ConvGLU": "methods.ffn.glu", "Execution": "execution",
    "from_torch": "convert", "to_torch": "convert", "save": "convert", "load": "convert",
    "classes_of": "convert", "pretrained": "hub", "push": "hub",
    "features": "features", "compact": "compact", "fold": "fold", "verify": "verify",
    "count": "count", "tune": "tune", "measure": "measure", "Report": "report", "export": "export",
}
__all__ = sorted(_MODULES)


def _listed_method(name: str) -> type:
  """The class of this name in METHODS, so that listed methods need no entry in `_MODULES`."""
  methods = importlib.import_module("vitcompact.methods").METHODS
  for kinds in methods.values():
    for kind in kinds.values():
      if kind.__name__ == name:
        return kind
  raise AttributeError(f"module 'vitcompact' has no attribute {name!r}")


class _Package(types.ModuleType):
  """Imports public names on first use, and keeps them: importing the submodule `fold` must not hide
  the function of the same name."""

  def __getattr__(self, name):
    if name in _MODULES:
      value = getattr(importlib.import_module(f"vitcompact.{_MODULES[name]}"), name)
    elif name[:1].isupper():
      value = _listed_method(name)
    else:
      raise AttributeError(f"module 'vitcompact' has no attribute {name!r}")
    setattr(self, name, value)
    return value

  def __setattr__(self, name, value):
    if name in _MODULES and isinstance(value, types.ModuleType):
      value = getattr(value, name)
    super().__setattr__(name, value)

  def __dir__(self):
    return [*super().__dir__(), *__all__]


sys.modules[__name__].__class__ = _Package
