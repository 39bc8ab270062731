"""Files of weights on this machine: from the Hugging Face hub, an address, or a folder.

Files of the hub lie in its own cache (HF_HOME), those of other addresses in ~/.cache/vitcompact
(VITCOMPACT_CACHE). Nothing is sent but the names of what is asked for.
"""
import hashlib
import os
import pathlib
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

from vitcompact.files import PICKLED, shards_of

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
           "pytorch_model.bin.index.json")   # in a folder or a repository, the preferred first
SUFFIXES = (".safetensors", ".npz", *PICKLED)
TIMEOUT = 30   # seconds without an answer
# The start of a file's sha256, in its name as torch.hub reads it: deit_small-cd65a155.pth.
IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
ASK_OFFLINE = "HF_HUB_OFFLINE"


class File(NamedTuple):
  """A file that is here, and where it is from.

  source: "hf-hub:org/repo@commit", an address, or a path. digest: its sha256, once it was checked.
  """
  path: pathlib.Path
  source: str
  digest: str = ""


def is_offline(offline: bool | None) -> bool:
  """What was asked for; without, whether the environment says so."""
  if offline is not None:
    return offline
  return os.environ.get(ASK_OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str | None:
  """Where the hub is, if not where its library says: HF_ENDPOINT as it is now."""
  return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def cache_folder(cache_dir=None) -> pathlib.Path:
  """Where files lie that are not of the hub, and what was made of weights."""
  home = os.environ.get("VITCOMPACT_CACHE")
  if home is None:
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vitcompact"
  return pathlib.Path(cache_dir or home).expanduser()


def sha256(path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def checked(file: File, wanted: Sequence[str], way_out: str) -> File:
  """The file with its digest; ValueError where that does not start as one of `wanted` says."""
  return file._replace(digest=_digest(file.path, wanted, str(file.path), way_out))


def _digest(path, wanted: Sequence[str], what: str, way_out: str) -> str:
  for start in wanted:
    if not re.fullmatch("[0-9a-f]{8,64}", start.lower()):
      raise ValueError(f"sha256={start!r}: must be 8 to 64 hexadecimal digits")
  digest = sha256(path)
  for start in wanted:
    if not digest.startswith(start.lower()):
      raise ValueError(f"{what} is damaged, or another file: its sha256 is {digest}, not {start}; "
                       f"{way_out}")
  return digest


def from_hub(repo: str, names: Sequence[str], *, revision: str | None = None, cache_dir=None,
             offline: bool | None = None) -> File:
  """The first of these files that a repository of the hub has, as its cache keeps it.

  Its source names the commit. Raises one line that says what is missing and how to fetch it.
  """
  hub = library()
  from huggingface_hub import errors

  offline, missing = is_offline(offline), None
  for name in names:
    try:
      # One that cannot be asked is asked once: the library tries for half a minute.
      path = pathlib.Path(hub.hf_hub_download(
          repo, name, revision=revision, cache_dir=cache_dir, endpoint=endpoint(),
          local_files_only=offline or missing is not None))
      # .../snapshots/COMMIT/NAME
      return File(path, f"hf-hub:{repo}@{path.parents[name.count('/')].name}")
    except errors.LocalEntryNotFoundError as error:
      missing = missing or (name, error)
    except errors.RevisionNotFoundError:
      raise ValueError(f"hf-hub:{repo} has no revision {revision!r}; leave it out for the newest, "
                       "or give a branch, a tag or a commit of it") from None
    except errors.GatedRepoError:
      raise ValueError(f"hf-hub:{repo} wants its licence accepted: do so on its page, then "
                       "`hf auth login`") from None
    except errors.RepositoryNotFoundError:
      raise ValueError(f"hf-hub:{repo}: no such repository, or a private one; check the name, or "
                       "`hf auth login`") from None
    except errors.EntryNotFoundError:
      continue
    except errors.HFValidationError:
      raise ValueError(f"hf-hub:{repo}: no name of a repository; wanted: "
                       "hf-hub:org/name, or hf-hub:org/name@revision") from None
    except errors.HfHubHTTPError as error:
      raise OSError(f"hf-hub:{repo}: {first_line(error)}; try again later") from None
  if missing is None:
    raise ValueError(f"hf-hub:{repo} has no file of weights; looked for: {', '.join(names)}"
                     if tuple(names) == WEIGHTS else f"hf-hub:{repo} has no {' or '.join(names)}")
  name, error = missing
  why = "offline" if offline else f"no answer from the hub ({first_line(error.__cause__)})"
  command = [f"hf download {repo} {name}", *([f"--revision {revision}"] if revision else []),
             *([f"--cache-dir {cache_dir}"] if cache_dir else [])]
  raise FileNotFoundError(f"{name} of hf-hub:{repo} is not in the cache, and {why}; with a network "
                          f"this fetches it: {' '.join(command)}")


def checked_of_hub(file: File, repo: str, wanted: Sequence[str] = ()) -> File:
  """As `checked`, with the digest that the hub told: its cache names large files by it."""
  # One link alone: what is shared by several caches may lie elsewhere, under another name.
  blob = pathlib.Path(os.readlink(file.path)).name if file.path.is_symlink() else ""
  told = [blob] if re.fullmatch("[0-9a-f]{64}", blob) else []
  return checked(file, [*wanted, *told], f"`hf download {repo} {file.path.name} --force-download` "
                 "fetches it again")


def parts_from_hub(file: File, repo: str, **options) -> list[File]:
  """The other files of weights that are in several: an index names them."""
  if not file.path.name.endswith(".index.json"):
    return []
  commit = file.source.rpartition("@")[2]
  return [from_hub(repo, [name], **{**options, "revision": commit})
          for name in sorted(shards_of(file.path))]


def from_address(address: str, *, cache_dir=None, offline: bool | None = None,
                 sha256: str | None = None) -> File:
  """The file of an http, https or file address, downloaded once; its digest is checked each time.

  sha256: of the file; without, the start of it that may stand in its name.
  """
  parsed = urllib.parse.urlsplit(address)
  name = pathlib.PurePosixPath(urllib.parse.unquote(parsed.path)).name
  if not name.lower().endswith(SUFFIXES):
    raise ValueError(f"{address}: must end in {', '.join(SUFFIXES)}")
  wanted = [sha256] if sha256 else IN_NAME.findall(name)
  if parsed.scheme == "file":
    path = pathlib.Path(urllib.request.url2pathname(parsed.path))
    if not path.is_file():
      raise FileNotFoundError(f"{address}: no such file")
    return checked(File(path, address), wanted, "give the file that was meant")
  folder = cache_folder(cache_dir) / "files" / hashlib.sha256(address.encode()).hexdigest()[:16]
  path, told = folder / name, folder / f"{name}.sha256"
  if not path.exists():
    if is_offline(offline):
      raise FileNotFoundError(f"{name} is not in the cache, and offline; with a network this "
                              f"fetches it: curl -L --create-dirs -o {path} {address}")
    _download(address, path, told, wanted)
  elif told.exists():
    wanted = [*wanted, told.read_text().strip()]
  return checked(File(path, address), wanted, f"remove it to download {address} again")


def _download(address: str, path: pathlib.Path, told: pathlib.Path, wanted):
  """Writes the file and, beside it, its digest; the file is whole or not there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  try:
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, open(partial, "wb") as file:
      shutil.copyfileobj(answer, file, 1 << 20)
      length = answer.headers.get("Content-Length")
    if length is not None and partial.stat().st_size != int(length):
      raise OSError(f"{partial.stat().st_size} of {length} bytes came")
    digest = _digest(partial, wanted, address, "it was not kept; check the address")
    told.write_text(f"{digest}\n")
    os.replace(partial, path)
  except urllib.error.HTTPError as error:
    raise ValueError(f"{address}: {error.code} {error.reason}; check the address") from None
  except OSError as error:
    raise OSError(f"{address} cannot be downloaded: {first_line(error)}; try again, or "
                  f"curl -L -o {path} {address}") from None
  finally:
    partial.unlink(missing_ok=True)


def library():
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError("weights of the Hugging Face hub need huggingface_hub: "
                     "pip install 'vitcompact[hub]', or pip install huggingface_hub") from None
  return huggingface_hub


def first_line(error) -> str:
  text = str(error).strip().split("\n")[0]
  return text or type(error).__name__
