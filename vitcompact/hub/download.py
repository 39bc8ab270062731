"""Downloads files of weights from the Hugging Face hub or a URL, and checks their digests.

Files of the hub are kept in its own cache (HF_HOME), others in ~/.cache/vitcompact
(VITCOMPACT_CACHE). Nothing is sent except the names of the requested files.
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

from vitcompact.files import PICKLED, sha256, shards_of

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
           "pytorch_model.bin.index.json")   # in a folder or a repository, preferred first
SUFFIXES = (".safetensors", ".npz", *PICKLED)
TIMEOUT = 30   # seconds without an answer
# The first digits of a file's sha256 in its name, torch.hub's convention: deit_small-cd65a155.pth.
IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
ASK_OFFLINE = "HF_HUB_OFFLINE"


class File(NamedTuple):
  """A local file, and where it is from.

  source: "hf-hub:org/repo@commit", a URL, or a path. digest: its sha256, once it has been checked.
  """
  path: pathlib.Path
  source: str
  digest: str = ""


def is_offline(offline: bool | None) -> bool:
  """The argument, or if it is None, the setting in the environment."""
  if offline is not None:
    return offline
  return os.environ.get(ASK_OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str | None:
  """The current value of HF_ENDPOINT, the hub's URL; None for the library's default."""
  return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def cache_folder(cache_dir=None) -> pathlib.Path:
  """Folder for files that are not from the hub, and for converted weights."""
  home = os.environ.get("VITCOMPACT_CACHE")
  if home is None:
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vitcompact"
  return pathlib.Path(cache_dir or home).expanduser()


def checked(file: File, expected: Sequence[str], hint: str) -> File:
  """The file with its digest; ValueError unless that starts with each of `expected`."""
  return file._replace(digest=_digest(file.path, expected, str(file.path), hint))


def _digest(path, expected: Sequence[str], what: str, hint: str) -> str:
  for start in expected:
    if not re.fullmatch("[0-9a-f]{8,64}", start.lower()):
      raise ValueError(f"sha256={start!r}: must be 8 to 64 hexadecimal digits")
  digest = sha256(path)
  for start in expected:
    if not digest.startswith(start.lower()):
      raise ValueError(f"{what} is damaged, or another file: its sha256 is {digest}, not {start}; "
                       f"{hint}")
  return digest


def from_hub(repo: str, names: Sequence[str], *, revision: str | None = None, cache_dir=None,
             offline: bool | None = None) -> File:
  """The first of these files that a repository on the hub has, in the hub's cache.

  Its source names the commit. Errors are one line: what is missing and how to fetch it.
  """
  hub = library()
  from huggingface_hub import errors

  offline, missing = is_offline(offline), None
  for name in names:
    try:
      # A hub that does not answer is tried only once: the library waits for half a minute.
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
      raise ValueError(f"hf-hub:{repo}: not a name of a repository; expected "
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


def checked_of_hub(file: File, repo: str, expected: Sequence[str] = ()) -> File:
  """As `checked`, also with the hub's digest, by which its cache names large files."""
  # Follows one link only: a file shared by several caches may be elsewhere, under another name.
  blob = pathlib.Path(os.readlink(file.path)).name if file.path.is_symlink() else ""
  hub_digest = [blob] if re.fullmatch("[0-9a-f]{64}", blob) else []
  return checked(file, [*expected, *hub_digest], f"`hf download {repo} {file.path.name} "
                 "--force-download` fetches it again")


def parts_from_hub(file: File, repo: str, **options) -> list[File]:
  """The files of weights that an index names; [] if the file is not an index."""
  if not file.path.name.endswith(".index.json"):
    return []
  commit = file.source.rpartition("@")[2]
  return [from_hub(repo, [name], **{**options, "revision": commit})
          for name in sorted(shards_of(file.path))]


def from_address(address: str, *, cache_dir=None, offline: bool | None = None,
                 sha256: str | None = None) -> File:
  """The file at an http, https or file URL, downloaded once; its digest is checked each time.

  sha256: of the file; by default the first digits that its name may contain.
  """
  parsed = urllib.parse.urlsplit(address)
  name = pathlib.PurePosixPath(urllib.parse.unquote(parsed.path)).name
  if not name.lower().endswith(SUFFIXES):
    raise ValueError(f"{address}: must end in {', '.join(SUFFIXES)}")
  expected = [sha256] if sha256 else IN_NAME.findall(name)
  if parsed.scheme == "file":
    path = pathlib.Path(urllib.request.url2pathname(parsed.path))
    if not path.is_file():
      raise FileNotFoundError(f"{address}: no such file")
    return checked(File(path, address), expected, "give the intended file")
  folder = cache_folder(cache_dir) / "files" / hashlib.sha256(address.encode()).hexdigest()[:16]
  path, digest_file = folder / name, folder / f"{name}.sha256"
  if not path.exists():
    if is_offline(offline):
      raise FileNotFoundError(f"{name} is not in the cache, and offline; with a network this "
                              f"fetches it: curl -L --create-dirs -o {path} {address}")
    _download(address, path, digest_file, expected)
  elif digest_file.exists():
    expected = [*expected, digest_file.read_text().strip()]
  return checked(File(path, address), expected, f"remove it to download {address} again")


def _download(address: str, path: pathlib.Path, digest_file: pathlib.Path, expected):
  """Writes the file atomically, and its digest to `digest_file`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  try:
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, open(partial, "wb") as file:
      shutil.copyfileobj(answer, file, 1 << 20)
      length = answer.headers.get("Content-Length")
    if length is not None and partial.stat().st_size != int(length):
      raise OSError(f"only {partial.stat().st_size} of {length} bytes arrived")
    digest = _digest(partial, expected, address, "it was not kept; check the address")
    digest_file.write_text(f"{digest}\n")
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
