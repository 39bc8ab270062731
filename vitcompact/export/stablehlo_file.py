"""StableHLO by jax.export: one file for CPUs, GPUs and TPUs, which JAX runs without this library.

A zip archive of `program.jax_export`, serialised by `jax.export`, and the metadata `about.json`:

  import io, json, zipfile
  import jax.export

  archive = zipfile.ZipFile("model.stablehlo")
  about = json.loads(archive.read("about.json"))
  program = jax.export.deserialize(bytearray(archive.read("program.jax_export")))
  logits = program.call(images)    # normalised float32 (B, H, W, 3), see about["preprocess"]
"""
import json
import pathlib
import struct
import zipfile

import jax
import jax.export

from vitcompact.attention import Device
from vitcompact.export.program import PORTABLE, Program

LACKS = "StableHLO files need flatbuffers, which is not installed; pip install flatbuffers"
PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, ABOUT = "program.jax_export", "about.json"


def exported(program: Program) -> jax.export.Exported:
  """The program for all platforms, each with the form of attention that suits it.

  Loops over images, for CPUs, would be slow on a GPU, and what a GPU computes at once does not fit
  into a CPU's caches. Vendor kernels are left out: they depend on more than the platform.
  """
  batch = "batch" if program.batch is None else program.batch
  on_cpu, elsewhere = program.on(Device("cpu")), program.on(PORTABLE)

  def run(images):
    # Passing the weights in here puts them into the file once, not once per platform.
    return jax.lax.platform_dependent(program.variables, images, cpu=on_cpu, cuda=elsewhere,
                                      tpu=elsewhere)

  shape = jax.export.symbolic_shape(", ".join(map(str, (batch, *program.image_shape))))
  return jax.export.export(jax.jit(run), platforms=PLATFORMS)(
      jax.ShapeDtypeStruct(shape, program.dtype))


def write(program: Program, path: pathlib.Path):
  """Writes the program; needs flatbuffers."""
  try:
    data = exported(program).serialize()
  except ImportError:
    raise ValueError(LACKS) from None
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(ABOUT, json.dumps(program.about()))
    archive.writestr(PROGRAM, bytes(data))


def read(path) -> tuple[jax.export.Exported, dict[str, str]]:
  """(program, metadata); ValueError for other files."""
  try:
    with zipfile.ZipFile(path) as archive:
      about = json.loads(archive.read(ABOUT))
      return jax.export.deserialize(bytearray(archive.read(PROGRAM))), about
  except ImportError:
    raise ValueError(LACKS) from None
  except (zipfile.BadZipFile, KeyError, ValueError, TypeError, IndexError, struct.error) as error:
    # The last three: a truncated program.
    raise ValueError(f"{path} is not a StableHLO file of `vitcompact export`: {error}") from None
