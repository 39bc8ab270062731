"""timm's own network for a dense model, as a function to time in PyTorch.

timm has no networks for compact plans: `refusal` says which models it has. `import_timm` uses
nothing else of this package, so that a Python with only PyTorch can load this file.
"""
import os
import sys
from collections.abc import Callable

INSTALL = "pip install torch timm"
# {field of an isotropic model: timm's option}, passed if it differs from the named model's.
OPTIONS = {"image_size": "img_size", "patch_size": "patch_size", "width": "embed_dim",
           "depth": "depth", "heads": "num_heads", "mlp_ratio": "mlp_ratio",
           "global_pool": "global_pool"}
# Fields that are always passed, or that do not affect a dense model's inference.
OTHERS = {"num_classes", "in_chans", "plan", "execution", "deploy", "drop_path_rate", "dtype",
          "remat", "position_std"}


def import_timm():
  """(torch, timm), or ImportError."""
  import torch

  try:
    import timm
  except RuntimeError:
    # "operator torchvision::nms does not exist": torchvision was compiled for another torch. timm
    # needs only its transforms, which import once these operators are declared.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
      library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
  return torch, timm


def installed():
  """(torch, timm), or a ValueError that says how to install them."""
  if "torch" not in sys.modules:
    # OpenMP reads it when it is loaded. Threads that spin while waiting add CPU seconds to what is
    # timed, and on shared cores they made a network 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
  try:
    return import_timm()
  except ModuleNotFoundError as error:
    raise ValueError(f"timing in PyTorch needs {error.name}, which is not installed; {INSTALL}"
                     ) from None
  except ImportError as error:   # incompatible versions, or an incomplete installation
    raise ValueError(f"PyTorch or timm is installed and does not import ({error}); "
                     f"{INSTALL.replace('install', 'install --upgrade')}") from None


def refusal(model) -> str | None:
  """Why timm has no network equivalent to a deployed model; None if it has one."""
  from vitcompact.plan import Plan

  acting = [model.plan.at(site) for site in model.sites()]
  if any(methods.heads or methods.attention or methods.tokens for methods in acting):
    return "timm has no network of its plan"
  # Merged factorised layers have the dense layers' names and shapes.
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
  """A function without arguments that runs timm's network for a deployed model on the CPU, on
  random images.

  threads: None: one for each core that the process may use. precision: "float32" or "bfloat16".
  compiled: use torch.compile, and compile before this returns.
  """
  import numpy as np

  from vitcompact.runtimes import thread_count

  if compiled:   # otherwise it forks workers, which is unsafe in a process with JAX's threads
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
    except Exception as error:   # many exception classes; most often there is no compiler
      raise ValueError(f"torch.compile fails here ({type(error).__name__}: "
                       f"{(str(error).splitlines() or [''])[0]}); install a C++ compiler, or leave "
                       "torch-compile out") from None
  return run


def network(model, variables):
  """timm's module in evaluation mode, with the weights of a dense deployed model."""
  from vitcompact import convert

  torch, timm = installed()
  module = timm.create_model(model.variant, pretrained=False, num_classes=model.num_classes,
                             in_chans=model.in_chans, **_options(model))
  state = {name: torch.from_numpy(array.copy())
           for name, array in convert.to_torch(model, variables).items()}
  try:
    module.load_state_dict(state)   # strict: names and shapes must match
  except RuntimeError as error:
    raise ValueError(f"timm's network of {model.variant} does not take its weights: "
                     f"{' '.join(str(error).split())[:200]}; leave torch out of --runtime"
                     ) from None
  return module.eval()


def _options(model) -> dict:
  """timm's options for the fields in which a model differs from the named one."""
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
  from vitcompact.checks import variable_shapes

  leaves = trees.named_leaves(variable_shapes(model))
  shapes = {name: leaf.shape for name, leaf in leaves.items()}
  entries = model.torch_entries()
  covered = {leaf for entry in entries for leaf in entry.leaves}
  own = {name: shape for name, shape in shapes.items() if name not in covered}
  return {entry.torch: entry.shape(shapes) for entry in entries
          if set(entry.leaves) <= shapes.keys()} | own
