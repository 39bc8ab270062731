"""Runs PyTorch as a peer in another Python, driven over a pipe, so that both sides take turns."""
import json
import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).with_name("torch_peer.py")


class TorchPeer:
  """A process of `python` that builds PyTorch networks and times them on request.

  When idle it waits on its pipe and uses no CPU; it shares the core that its parent is pinned to.
  about: {"torch": version, ...}; raises ValueError if that Python has no torch.
  """

  def __init__(self, python: str):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                   "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
      self.process = subprocess.Popen([python, str(SCRIPT)], env=environment, text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
      raise ValueError(f"--torch={python}: {error.strerror}; give a Python that has torch"
                       ) from None
    self.about = self._ask({"do": "about"})
    if "error" in self.about:
      self.close()
      raise ValueError(f"--torch={python}: {self.about['error']}")

  def build(self, **what):
    """Returns (an object with `seconds(calls)`, None), or (None, the reason for a failure)."""
    answer = self._ask({"do": "build", **what})
    if "error" in answer:
      return None, answer["error"]
    return _Network(self, answer["id"]), None

  def forget(self):
    """Frees every network that was built."""
    self._ask({"do": "forget"})

  def close(self):
    self.process.stdin.close()
    self.process.wait()

  def _ask(self, question: dict) -> dict:
    try:
      self.process.stdin.write(json.dumps(question) + "\n")
      self.process.stdin.flush()
      line = self.process.stdout.readline()
    except BrokenPipeError:
      line = ""
    if not line:
      return {"error": f"the process of torch ended with {self.process.wait()}"}
    return json.loads(line)


class _Network:
  """One network in the peer's process."""

  def __init__(self, peer: TorchPeer, number: int):
    self.peer, self.number = peer, number

  def seconds(self, calls: int) -> float:
    answer = self.peer._ask({"do": "time", "id": self.number, "calls": calls})
    if "error" in answer:
      raise ValueError(f"torch: {answer['error']}")
    return answer["seconds"]
