"""Opens exported models in their runtime, as functions of images.

`Runner.about` holds the metadata that `export.program.Program.about` wrote.
"""
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

RUNTIMES = {"xla": (".stablehlo", ".safetensors"), "ort": (".onnx",),
            "openvino": (".xml", ".onnx")}
# What `vitcompact bench` compares: {name: (runtime, its precision, title)}. PyTorch reads none of
# our files: it runs timm's own network for a dense model, see `timm_network`.
TIMED = {"xla": ("xla", "float32", "XLA"), "xla-bf16": ("xla", "bfloat16", "XLA, bfloat16"),
         "ort": ("ort", "float32", "ONNX Runtime"),
         "openvino": ("openvino", "float32", "OpenVINO"),
         "openvino-bf16": ("openvino", "bfloat16", "OpenVINO, bfloat16"),
         "torch": ("torch", "float32", "PyTorch"),
         "torch-bf16": ("torch", "bfloat16", "PyTorch, bfloat16"),
         "torch-compile": ("torch", "float32", "PyTorch, compiled")}
NAMES = {name: TIMED[name][2] for name in RUNTIMES}
ORT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
EXTRA = "pip install 'vitcompact[export]'"


@dataclasses.dataclass(frozen=True)
class Runner:
  """images (B, H, W, C), as the file takes them -> logits (B, classes).

  about: the file's metadata; shape, dtype: of an image; batch: the batch size, None: any.
  """
  runtime: str
  call: Callable
  about: dict[str, str]
  shape: tuple[int, ...]
  dtype: np.dtype
  batch: int | None = None

  def __call__(self, images) -> np.ndarray:
    images = np.asarray(images)
    if (images.shape[1:], images.dtype.kind in "iu") != (self.shape, self.dtype.kind in "iu"):
      raise ValueError(f"images of shape {images.shape} and {images.dtype}: the file takes (n, "
                       f"{', '.join(map(str, self.shape))}) of {self.dtype}; prepare them as "
                       "`preprocess` says")
    if self.batch not in (None, len(images)):
      raise ValueError(f"the file takes {self.batch} images at a time, but {len(images)} were "
                       "given: use its batch size, or export without --batch")
    return np.asarray(self.call(np.ascontiguousarray(images, self.dtype)))

  @property
  def preprocess(self):
    """How images are prepared for it."""
    from vitcompact.data.evaluation import Preprocess

    settings = json.loads(self.about["preprocess"])
    return Preprocess(**{name: tuple(value) if isinstance(value, list) else value
                         for name, value in settings.items()})

  @property
  def classes(self) -> list[str] | None:
    return json.loads(self.about["classes"]) if "classes" in self.about else None


def load(path, runtime: str | None = None, *, threads: int | None = None,
           precision: str = "float32") -> Runner:
  """Returns a model file as a function.

  Args:
    runtime: "xla", "ort" or "openvino"; None: the first that reads files with this suffix.
    threads: of ONNX Runtime or OpenVINO. None: one for each core that the process may use, as in
      XLA.
    precision: of OpenVINO's products, "float32" or "bfloat16".
  Raises:
    ValueError, FileNotFoundError: the file does not exist, the runtime is unknown or not installed,
      or it does not read the file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  fitting = [name for name, suffixes in RUNTIMES.items() if path.suffix in suffixes]
  if runtime is not None and runtime not in RUNTIMES:
    raise ValueError(f"runtime {runtime!r}: must be one of {', '.join(RUNTIMES)}")
  if not fitting or (runtime and runtime not in fitting):
    suffixes = ", ".join(RUNTIMES[runtime] if runtime else sum(RUNTIMES.values(), ()))
    who = f"{NAMES[runtime]} reads no" if runtime else "no runtime reads"
    raise ValueError(f"{path}: {who} {path.suffix} files; give one that ends in {suffixes}")
  if precision not in ("float32", "bfloat16"):
    raise ValueError(f"precision {precision!r}: must be float32 or bfloat16")
  runtime = runtime or fitting[0]
  if precision != "float32" and runtime != "openvino":
    raise ValueError(f"precision {precision}: {NAMES[runtime]} computes as its file says; OpenVINO "
                     "takes both")
  return {"xla": _xla, "ort": _ort, "openvino": _openvino}[runtime](
      path, thread_count(threads), precision)


def _xla(path, threads, precision) -> Runner:
  import jax

  if path.suffix == ".stablehlo":
    from vitcompact.export import stablehlo_file

    program, about = stablehlo_file.read(path)
    (image,) = program.in_avals
    batch, *shape = image.shape
    return Runner(f"XLA on a {jax.default_backend()}", jax.jit(program.call), about,
                  tuple(shape), np.dtype(image.dtype), batch if isinstance(batch, int) else None)
  from vitcompact import convert
  from vitcompact.export.program import Program
  from vitcompact.preprocess import preprocess

  model, variables = convert.load(path)
  about = Program(model, variables, preprocess(path),
                  classes=convert.classes_of(path)).about()
  apply = jax.jit(model.apply)
  shape = (*np.broadcast_to(model.image_size, 2).tolist(), model.in_chans)
  return Runner(f"XLA on a {jax.default_backend()}", lambda images: apply(variables, images), about,
                shape, np.dtype(np.float32))


def _ort(path, threads, precision) -> Runner:
  try:
    import onnxruntime
  except ImportError:
    raise ValueError(f"ONNX Runtime is not installed; {EXTRA}") from None
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3   # errors only; it would warn about each constant that it folds
  # By default it uses all cores of the machine, even those that this process may not use.
  options.intra_op_num_threads = threads
  try:
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
  except Exception as error:   # ONNX Runtime has many exception classes
    raise ValueError(f"ONNX Runtime does not take {path}: {str(error).splitlines()[0]}") from None
  names = [out.name for out in session.get_outputs()]
  image, *others = session.get_inputs()
  batch, shape = _sizes(path, image.shape, len(others) + 1)
  if image.type not in ORT_TYPES:
    raise ValueError(f"{path} takes a {image.type}, but images are of {', '.join(ORT_TYPES)}")
  return Runner(f"ONNX Runtime {onnxruntime.__version__}",
                lambda images: session.run(names[:1], {image.name: images})[0],
                dict(session.get_modelmeta().custom_metadata_map), shape,
                np.dtype(ORT_TYPES[image.type]), batch)


def _openvino(path, threads, precision) -> Runner:
  try:
    import openvino
  except ImportError:
    raise ValueError(f"OpenVINO is not installed; {EXTRA}") from None
  from openvino import properties

  # By default it computes in bfloat16 if the processor has it.
  options = {properties.hint.inference_precision(): {
      "float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[precision]}
  options[properties.inference_num_threads()] = threads
  core = openvino.Core()
  if precision == "bfloat16" and "BF16" not in core.get_property(
      "CPU", properties.device.capabilities()):
    raise ValueError("precision bfloat16: this processor has none, and OpenVINO would compute in "
                     "float32 without saying so; ask for float32")
  try:
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", options)
  except RuntimeError as error:
    raise ValueError(f"OpenVINO does not take {path}: {str(error).strip().splitlines()[-1]}"
                     ) from None
  image, *others = model.inputs
  ranks = image.get_partial_shape()
  sizes = [] if ranks.rank.is_dynamic else [
      None if size.is_dynamic else size.get_length() for size in ranks]
  batch, shape = _sizes(path, sizes, len(others) + 1)
  about = model.get_rt_info(["vitcompact"]).astype(dict) if \
      model.has_rt_info(["vitcompact"]) else {}
  about = {key: str(getattr(value, "value", value)) for key, value in about.items()}
  return Runner(f"OpenVINO {openvino.__version__.split('-')[0]}",
                lambda images: compiled(images)[0], about, shape,
                np.dtype(image.get_element_type().to_dtype()), batch)


def thread_count(threads: int | None) -> int:
  """The number of threads, checked; None: one for each core that the process may use."""
  most = os.cpu_count() or 1
  if threads is not None and not 1 <= threads <= most:   # thousands would use up the memory
    raise ValueError(f"threads={threads}: must be from 1 to {most}, the cores of this machine")
  return threads or cores()


def cores() -> int:
  """Number of cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sizes(path, sizes, inputs: int) -> tuple[int | None, tuple[int, ...]]:
  """(batch size, None: any; the shape of an image) of a file's input, where sizes that are no int
  are dynamic; ValueError unless the file has one input of fixed image size."""
  if inputs != 1:
    raise ValueError(f"{path} takes {inputs} inputs, but images are one")
  if not sizes or not all(isinstance(size, int) for size in sizes[1:]):
    raise ValueError(f"{path} takes images of any size, so the right one is unknown: give a file "
                     "with a fixed image size, as `vitcompact export` writes")
  return sizes[0] if isinstance(sizes[0], int) else None, tuple(sizes[1:])
