"""A DeiT, dense or compact, in plain PyTorch: loads what `--to-torch` wrote, for PyTorch users.

  vitcompact convert compact.safetensors --to-torch --out compact_torch.safetensors
  python -m experiments.torch_deit compact_torch.safetensors        # counts its parameters

  from experiments.torch_deit import load
  model = load("compact_torch.safetensors")     # images (B, C, H, W) -> logits (B, classes)

Needs torch and safetensors but not vitcompact: sizes and plan are in the file's metadata. For
inference only. Tensors have timm's names; those of compact layers are listed in
vitcompact/torch_names.py, function `block`.
"""
import json
import sys

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


def filter_tokens(x_bgrnd, taps, gain, grid):
  """Correlates tokens n with taps: (g, r, K) along the order of tokens, or (g, r, K, K) on their
  grid, in which case the prefix tokens are scaled by gain (g, r, prefix)."""
  b, g, r, n, d = x_bgrnd.shape
  planes = x_bgrnd.permute(0, 4, 1, 2, 3).reshape(b * d, g * r, n)
  half = taps.shape[-1] // 2
  if taps.ndim == 3:
    planes = F.conv1d(planes, taps.reshape(g * r, 1, -1), padding=half, groups=g * r)
  else:
    prefix = gain.shape[-1]
    patches = planes[..., prefix:].reshape(b * d, g * r, *grid)
    patches = F.conv2d(patches, taps.reshape(g * r, 1, *taps.shape[2:]), padding=half,
                       groups=g * r)
    planes = torch.cat([planes[..., :prefix] * gain.reshape(g * r, -1), patches.flatten(2)], dim=2)
  return planes.reshape(b, d, g, r, n).permute(0, 2, 3, 4, 1)


class Hallucinate(nn.Module):
  """Attention in which the hallucinated heads use filtered maps of real heads.

  The filter along keys is applied to the values, the filter along queries to the output.
  """

  def __init__(self, spec, real, heads, grid, prefix):
    super().__init__()
    self.grid, self.logits_site = grid, spec["site"] == "logits"
    hallucinated, size = heads - real, spec["kernel"]
    if self.logits_site:
      self.mix = nn.Parameter(torch.zeros(real, hallucinated))
      self.taps = nn.Parameter(torch.zeros(hallucinated, size, size))
      return
    on_grid = spec["layout"] == "grid"
    shape = (hallucinated, spec["rank"], *(size,) * (2 if on_grid else 1))
    for side in ("key", "query"):
      self.register_parameter(f"{side}_taps", nn.Parameter(torch.zeros(shape)))
      gain = nn.Parameter(torch.ones(*shape[:2], prefix)) if on_grid else None
      self.register_parameter(f"{side}_gain", gain)

  def forward(self, scores_bfnm, value_bhmd):
    if self.logits_site:
      mixed = torch.einsum("bfnm,fg->bgnm", scores_bfnm, self.mix)
      extra = F.conv2d(mixed, self.taps[:, None], padding=self.taps.shape[-1] // 2,
                       groups=len(self.taps))
      return torch.cat([scores_bfnm, extra], dim=1).softmax(-1) @ value_bhmd
    maps = scores_bfnm.softmax(-1)
    real = maps.shape[1]
    # Correlating the map's key axis with taps equals correlating the values with reversed taps.
    reversed_taps = self.key_taps.flip(list(range(2, self.key_taps.ndim)))
    value = value_bhmd[:, real:, None].expand(-1, -1, self.key_taps.shape[1], -1, -1)
    spread = filter_tokens(value, reversed_taps, self.key_gain, self.grid)
    source = torch.arange(len(self.key_taps)) % real
    out = filter_tokens(maps[:, source, None] @ spread, self.query_taps, self.query_gain,
                        self.grid).sum(2)
    return torch.cat([maps @ value_bhmd[:, :real], out], dim=1)


class Attention(nn.Module):
  """Attention with queries and keys of the real heads only, and values of all heads."""

  def __init__(self, width, heads, spec, grid, prefix):
    super().__init__()
    self.heads, self.real = heads, count_real(spec, heads)
    self.head_width = width // heads
    self.qkv = nn.Linear(width, (2 * self.real + heads) * self.head_width)
    self.proj = nn.Linear(width, width)
    self.hallucinate = (Hallucinate(spec, self.real, heads, grid, prefix)
                        if self.real < heads else None)

  def forward(self, x_bnw):
    heads = self.qkv(x_bnw).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
    query, key, value = heads.split([self.real, self.real, self.heads], dim=1)
    scores = query @ key.transpose(-1, -2) * self.head_width ** -0.5
    out = self.hallucinate(scores, value) if self.hallucinate else scores.softmax(-1) @ value
    return self.proj(out.transpose(1, 2).flatten(2))


class Factored(nn.Module):
  """y = (x A) B + b."""

  def __init__(self, inputs, outputs, rank):
    super().__init__()
    self.a = nn.Linear(inputs, rank, bias=False)
    self.b = nn.Linear(rank, outputs)

  def forward(self, x):
    return self.b(self.a(x))


class Mlp(nn.Module):

  def __init__(self, width, hidden, spec):
    super().__init__()
    rank = spec and max(1, int(spec["rank_ratio"] * width + 0.5))
    merged = spec.get("merged", ()) if spec else ()
    factored1 = spec and spec["factor"] == "both" and "fc1" not in merged
    factored2 = spec and "fc2" not in merged
    self.fc1 = Factored(width, hidden, rank) if factored1 else nn.Linear(width, hidden)
    self.fc2 = Factored(hidden, width, rank) if factored2 else nn.Linear(hidden, width)

  def forward(self, x):
    return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):

  def __init__(self, width, heads, hidden, plan, grid, prefix):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, heads, plan["heads"], grid, prefix)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = Mlp(width, hidden, plan["ffn"])

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):

  def __init__(self, in_chans, width, patch_size):
    super().__init__()
    self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)

  def forward(self, images):
    return self.proj(images).flatten(2).transpose(1, 2)


class CompactDeiT(nn.Module):
  """The network described by `fields` (of our VisionTransformer) and `plan` (its parsed JSON)."""

  def __init__(self, fields, plan):
    super().__init__()
    if fields["global_pool"] != "token":
      raise ValueError(f"global_pool={fields['global_pool']!r}: only 'token' is written here")
    axes = {axis for some in (plan, *plan.get("blocks", {}).values())
            for axis, spec in some.items() if spec is not None} - {
                "heads", "ffn", "blocks", "backends", "at_a_time"}
    if axes:
      raise ValueError(f"the plan has {' and '.join(sorted(axes))}: only heads and ffn are written "
                       "here, another plan would compute another function")
    size, width, patch = fields["image_size"], fields["width"], fields["patch_size"]
    height_width = size if isinstance(size, list) else [size, size]
    grid = tuple(side // patch for side in height_width)
    self.prefix = 2 if fields["distilled"] else 1
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    if fields["distilled"]:
      self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + grid[0] * grid[1], width))
    self.patch_embed = PatchEmbed(fields["in_chans"], width, patch)
    self.blocks = nn.Sequential(*[
        Block(width, fields["heads"], int(width * fields["mlp_ratio"]), plan_at(plan, i), grid,
              self.prefix) for i in range(fields["depth"])])
    self.norm = nn.LayerNorm(width, eps=1e-6)
    if classes := fields["num_classes"]:
      self.head = nn.Linear(width, classes)
      if fields["distilled"]:
        self.head_dist = nn.Linear(width, classes)

  def forward(self, images):
    x = self.patch_embed(images)
    tokens = [self.cls_token, self.dist_token] if self.prefix == 2 else [self.cls_token]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)
    x = self.norm(self.blocks(x + self.pos_embed))
    if not hasattr(self, "head"):
      return x[:, :self.prefix].mean(1)
    if self.prefix == 1:
      return self.head(x[:, 0])
    return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


def plan_at(plan, block):
  """Returns {"heads": spec or None, "ffn": spec or None} for one block."""
  default = {"heads": plan.get("heads"), "ffn": plan.get("ffn")}
  return {**default, **plan.get("blocks", {}).get(str(block), {})}


def count_real(spec, heads):
  if spec is None or heads == 1:
    return heads
  return (heads + 1) // 2 if spec["real_heads"] == "half" else spec["real_heads"]


def load(path):
  """Returns the network of a file that `--to-torch` wrote, with its weights, in eval mode."""
  with safe_open(path, framework="pt") as file:
    about = file.metadata() or {}
    if not {"fields", "plan"} <= about.keys():
      raise ValueError(f"{path}: no fields and plan in its metadata; write it with "
                       "vitcompact convert --to-torch")
    state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  model = CompactDeiT(json.loads(about["fields"]), json.loads(about["plan"]))
  model.load_state_dict(state)
  return model.eval()


if __name__ == "__main__":
  network = load(sys.argv[1])
  parameters = sum(p.numel() for p in network.parameters())
  print(f"{sys.argv[1]}: {parameters:,} parameters, {len(network.blocks)} blocks")
