"""A DeiT in PyTorch as its users run it, built and timed on request: the other end of `peer.py`.

Reads one JSON object per line and answers each with one. Needs torch but not JAX; kinds with "timm"
also need timm.
"""
import json
import pathlib
import runpy
import sys
import time

try:
  import torch
  import torch.nn.functional as F
  from torch import nn
except ImportError as error:
  print(json.dumps({"error": str(error)}))
  raise SystemExit(0) from None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Attention(nn.Module):

  def __init__(self, width, heads, sdpa):
    super().__init__()
    self.heads, self.sdpa = heads, sdpa
    self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

  def forward(self, x_bnw):
    b, n, w = x_bnw.shape
    query, key, value = self.qkv(x_bnw).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    if self.sdpa:
      out = F.scaled_dot_product_attention(query, key, value)
    else:
      out = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value
    return self.proj(out.transpose(1, 2).reshape(b, n, w))


class Block(nn.Module):

  def __init__(self, width, heads, sdpa):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, heads, sdpa)
    self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DeiT(nn.Module):

  def __init__(self, image_size, depth, sdpa, width, heads, patch=16, classes=1000):
    super().__init__()
    self.patch_embed = nn.Conv2d(3, width, patch, patch)
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch) ** 2, width))
    self.blocks = nn.Sequential(*[Block(width, heads, sdpa) for _ in range(depth)])
    self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

  def forward(self, images):
    x = self.patch_embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
    return self.head(self.norm(self.blocks(x))[:, 0])


def from_timm(image_size, depth, width, heads):
  # Run as a file, because importing its package would import JAX, which this Python does not have.
  path = pathlib.Path(__file__).parents[2] / "vitcompact/timm_network.py"
  _, timm = runpy.run_path(str(path))["import_timm"]()
  return timm.create_model("deit_small_patch16_224", img_size=image_size, depth=depth,
                           embed_dim=width, num_heads=heads)


def product(sizes, half):
  m, k, n = sizes
  dtype = torch.bfloat16 if half else torch.float32
  x, y = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((m, k), (k, n)))
  return lambda: x @ y


def build(kind, batch=1, image_size=224, depth=12, width=384, heads=6, train=False, **more):
  """Returns a function without arguments. kind: any of the words f32, bf16, sdpa, compile, timm and
  gemm (with the sizes `product`)."""
  words = set(kind.split())
  if "gemm" in words:
    return product(more["product"], "bf16" in words)
  sizes = {"image_size": image_size, "depth": depth, "width": width, "heads": heads}
  if "timm" in words:
    model = from_timm(**sizes)
  else:
    model = DeiT(sdpa="sdpa" in words, **sizes)
  half = "bf16" in words
  model = model.to(DEVICE).train(train)
  images = torch.randn(batch, 3, image_size, image_size, device=DEVICE)
  if half and not train:
    model, images = model.bfloat16(), images.bfloat16()
  call = torch.compile(model) if "compile" in words else model
  if not train:
    def forward():
      with torch.inference_mode():
        return call(images)
    return forward
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
  labels = torch.randint(0, 1000, (batch,), device=DEVICE)

  def step():
    optimizer.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
      loss = F.cross_entropy(call(images), labels)
    loss.backward()
    optimizer.step()
  return step


def clock():
  """Returns CPU seconds on a host, like the parent process, or wall seconds once a GPU is done."""
  if DEVICE == "cpu":
    return time.process_time()
  torch.cuda.synchronize()
  return time.perf_counter()


def answer(question, functions):
  what = question.pop("do")
  if what == "about":
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
  if what == "build":
    functions.append(build(**question))
    return {"id": len(functions) - 1}
  if what == "forget":
    functions[:] = []
    return {}
  function, start = functions[question["id"]], clock()
  for _ in range(question["calls"]):
    function()
  return {"seconds": (clock() - start) / question["calls"]}


def main():
  torch.set_num_threads(1)
  # Only answers go to the pipe; what libraries print goes to stderr.
  pipe, sys.stdout = sys.stdout, sys.stderr
  functions = []
  for line in sys.stdin:
    try:
      out = answer(json.loads(line), functions)
    except Exception as error:   # a failing peer is reported and does not end the run
      out = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    print(json.dumps(out), file=pipe, flush=True)


if __name__ == "__main__":
  main()
