"""timm's own network of a dense model, as a function that is timed in PyTorch.

PyTorch has no network of a compact plan: `refusal` says of which models there is one. `import_timm`
uses nothing of this package, so that a Python that has PyTorch alone can load this file.
"""
import os
import sys
from collections.abc import Callable

INSTALL = "pip install torch timm"
# {field of an isotropic model: timm's option}, for those that differ from the named model's.
OPTIONS = {"image_size": "img_size", "patch_size": "patch_size", "width": "embed_dim",
           "depth": "depth", "heads": "num_heads", "mlp_ratio": "mlp_ratio",
           "global_pool": "global_pool"}
# Always passed, or without effect on a dense model's inference.
OTHERS = {"num_classes", "in_chans", "plan", "execution", "deploy", "drop_path_rate", "dtype",
          "remat", "position_std"}


def import_timm():
  """(torch, timm), or ImportError."""
  import torch

  try:
    import timm
  except RuntimeError:
    # "operator torchvision::nms does not exist": the compiled part of torchvision is of another
    # torch. timm needs its transforms alone, which import once these operators are declared.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
  return torch, timm


def installed():
  """(torch, timm), or ValueError that says how to get them."""
  if "torch" not in sys.modules:
    # OpenMP reads it when it is loaded. Threads that spin while they wait count as CPU seconds of
    # whatever is timed, and on cores that others use too they made a network 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
  try:
    return import_timm()
  except ModuleNotFoundError as error:
    raise ValueError(f"timing in PyTorch needs {error.name}, which is not installed; {INSTALL}"
                     ) from None
  except ImportError as error:   # of versions that do not go together, or half an installation
    raise ValueError(f"PyTorch or timm is installed and does not import ({error}); "
                     f"{INSTALL.replace('install', 'install --upgrade')}") from None


def refusal(model) -> str | None:
  """Why timm has no network that computes what a deployed model does; None: it has one."""
  from vitcompact.plan import Plan

  acting = [model.plan.at(site) for site in model.sites()]
  if any(methods.heads or methods.attention or methods.tokens for methods in acting):
    return "timm has no network of its plan"
  # Factorised layers that are merged have the dense layers' names and shapes.
  dense = model.clone(plan=Plan(), execution=type(model.execution)())
  if _tensors(model) != _tensors(dense):
    return "timm has no network of its plan"
  if not installed()[1].is_model(model.variant.partition(".")[0]):
    return f"timm has no network named {model.variant}"
  if _tensors(dense) != _tensors(dense.clone(deploy=False)):
    return "timm has no network of its deployed form, whose norms are folded into other layers"
  try:
    _options(model)
  except ValueError as error:
    return str(error)
  return None


def forward(model, variables, batch: int, *, threads: int | None = None,
            precision: str = "float32", compiled: bool = False) -> Callable[[], object]:
  """A function without arguments: timm's network of a deployed model, on random images, on the CPU.

  threads: None: one for each core that the process may use. precision: "float32" or "bfloat16".
  compiled: by torch.compile, before this returns.
  """
  import numpy as np

  from vitcompact.runtimes import thread_count

  if compiled:   # else it forks workers, which a process with JAX's threads in it must not do
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
  torch, _ = installed()
  torch.set_num_threads(thread_count(threads))
  dtype = getattr(torch, precision)
  module = network(model, variables).to(dtype)
  size = np.broadcast_to(model.image_size, 2).tolist()
  images = torch.randn(batch, model.in_chans, *size).to(dtype)
  call = torch.compile(module) if compiled else module

  def run():
    with torch.inference_mode():
      return call(images)

  if compiled:
    try:
      run()
    except Exception as error:   # of many classes of its own, most often for want of a compiler
      raise ValueError(f"torch.compile fails here ({type(error).__name__}: "
                       f"{(str(error).splitlines() or [''])[0]}); install a C++ compiler, or leave "
                       "torch-compile out") from None
  return run


def network(model, variables):
  """timm's module with the weights of a dense deployed model, in evaluation mode."""
  from vitcompact import convert

  torch, timm = installed()
  module = timm.create_model(model.variant, pretrained=False, num_classes=model.num_classes,
                             in_chans=model.in_chans, **_options(model))
  state = {name: torch.from_numpy(array.copy())
           for name, array in convert.to_torch(model, variables).items()}
  try:
    module.load_state_dict(state)   # strict: the same network has the same names and shapes
  except RuntimeError as error:
    raise ValueError(f"timm's network of {model.variant} does not take its weights: "
                     f"{' '.join(str(error).split())[:200]}; leave torch out of --runtime"
                     ) from None
  return module.eval()


def _options(model) -> dict:
  """timm's options for the sizes in which a model differs from the one of its name."""
  from vitcompact.models import create_model, fields_of
  from vitcompact.models.backbone import Isotropic

  usual = fields_of(create_model(model.variant))
  changed = {field: value for field, value in fields_of(model).items()
             if field not in OTHERS and value != usual[field]}
  if not isinstance(model, Isotropic):
    changed.pop("image_size", None)   # timm's pyramids take images of any size
  if unknown := [field for field in changed
                 if field not in OPTIONS or not isinstance(model, Isotropic)]:
    raise ValueError(f"timm's network of {model.variant} has no option for "
                     f"{unknown[0]}={changed[unknown[0]]!r}")
  return {OPTIONS[field]: value for field, value in changed.items()}


def _tensors(model) -> dict[str, tuple[int, ...]]:
  """{PyTorch's name: shape} of a model's weights."""
  from vitcompact import trees
  from vitcompact.doors import variable_shapes

  leaves = trees.named_leaves(variable_shapes(model))
  shapes = {name: leaf.shape for name, leaf in leaves.items()}
  entries = model.torch_entries()
  held = {leaf for entry in entries for leaf in entry.leaves}
  own = {name: shape for name, shape in shapes.items() if name not in held}
  return {entry.torch: entry.shape(shapes) for entry in entries
          if set(entry.leaves) <= shapes.keys()} | own
