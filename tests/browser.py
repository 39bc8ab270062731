"""A headless Chromium that tests control through a pipe, using only the standard library.

It speaks the DevTools protocol: JSON messages, each ended by a zero byte, on descriptors 3 and 4.
"""
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--remote-debugging-pipe")
AS_3_AND_4 = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
              "os.execv(sys.argv[3], sys.argv[3:])")


class Browser:
  """One page. errors: console messages above the level of information, and requests that failed."""

  def __init__(self, write: int, read: int):
    self.write, self.read, self.buffer, self.count, self.errors = write, read, b"", 0, []
    self.session = None
    target = self.ask("Target.createTarget", url="about:blank")["targetId"]
    self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Runtime", "Log", "Page", "DOM", "Network"):
      self.ask(f"{domain}.enable")

  def ask(self, method: str, seconds: float = 120, **params):
    self.count += 1
    message = {"id": self.count, "method": method, "params": params}
    if self.session:
      message["sessionId"] = self.session
    os.write(self.write, json.dumps(message).encode() + b"\0")
    end = time.monotonic() + seconds
    while True:
      answer = self._message(end, method)
      if answer.get("id") == self.count:
        assert "error" not in answer, answer
        return answer["result"]
      self._note(answer)

  def _message(self, end: float, method: str):
    while b"\0" not in self.buffer:
      ready, _, _ = select.select([self.read], [], [], max(0, end - time.monotonic()))
      assert ready, f"no answer to {method}; {self.errors=}"
      piece = os.read(self.read, 1 << 20)
      assert piece, f"the browser ended during {method}"
      self.buffer += piece
    first, _, self.buffer = self.buffer.partition(b"\0")
    return json.loads(first)

  def _note(self, event):
    if event.get("method") == "Runtime.exceptionThrown":
      self.errors.append(event["params"]["exceptionDetails"])
    elif event.get("method") == "Log.entryAdded":
      self.errors.append(event["params"]["entry"])
    elif event.get("method") == "Runtime.consoleAPICalled" and event["params"]["type"] in (
        "error", "warning", "assert"):
      self.errors.append(event["params"]["args"])

  def run(self, script: str):
    """Returns the value of an expression, awaited if it is a promise."""
    answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")

  def wait(self, script: str, seconds: float = 60):
    """Waits until an expression is true."""
    end = time.monotonic() + seconds
    while not self.run(script):
      assert time.monotonic() < end, (script, self.errors)
      time.sleep(0.05)

  def choose(self, selector: str, *paths):
    """Chooses files in an <input type="file">."""
    root = self.ask("DOM.getDocument")["root"]["nodeId"]
    node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    self.ask("DOM.setFileInputFiles", nodeId=node, files=list(map(str, paths)))


@contextlib.contextmanager
def browser(folder):
  """Yields a Browser without network, whose profile is in `folder`."""
  if CHROMIUM is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
  (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
  process = subprocess.Popen(
      [sys.executable, "-c", AS_3_AND_4, str(theirs_in), str(theirs_out), CHROMIUM, *FLAGS,
       f"--user-data-dir={folder}"], pass_fds=(theirs_in, theirs_out),
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  os.close(theirs_in)
  os.close(theirs_out)
  try:
    page = Browser(ours_out, ours_in)
    page.ask("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1,
             uploadThroughput=-1)
    yield page
  finally:
    os.close(ours_out)   # ends Chromium
    try:
      process.wait(20)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    os.close(ours_in)
