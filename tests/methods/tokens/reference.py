"""What each reducer does to the tokens of one image, from the definitions, by loops over lists.

A token is {"x": features, "size": number, "of": source positions it holds, "patch": bool}, where
"patch" is False for a fused remainder.
"""
import math

import numpy as np


def start(x_nw):
  return [{"x": x, "size": 1.0, "of": [i], "patch": True} for i, x in enumerate(x_nw)]


def maps(query_nhd, key_nhd, size_n=None):
  """Returns (h, N, M) attention, float64."""
  scores = np.einsum("nhd,mhd->hnm", query_nhd, key_nhd) / query_nhd.shape[-1] ** 0.5
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  weights = weights * (1 if size_n is None else np.asarray(size_n)[None, None])
  return weights / weights.sum(axis=-1, keepdims=True)


def evit(tokens, query_nhd, key_nhd, prefix, keep, fuse):
  score = maps(query_nhd[:1], key_nhd)[:, 0].mean(axis=0)
  patches = range(prefix, len(tokens))
  count = math.ceil(round(keep * len(patches), 6))
  best = sorted(patches, key=lambda i: -score[i])[:count]
  kept = tokens[:prefix] + [tokens[i] for i in sorted(best)]
  rest = [i for i in patches if i not in best]
  if fuse:
    kept.append({"x": sum(score[i] * tokens[i]["x"] for i in rest), "size": 1.0, "patch": False,
                 "of": sorted(i for j in rest for i in tokens[j]["of"])})
  return kept


def merge(tokens, groups, order, weight=None, pooling="mean"):
  """groups: {kept index: all indices merged into it}; order: kept indices."""
  out = []
  for i in order:
    parts = [tokens[j] for j in groups[i]]
    size = np.array([t["size"] for t in parts])
    w = size if weight is None else np.array([weight[j] for j in groups[i]])
    x = np.stack([t["x"] for t in parts])
    x = x.max(axis=0) if pooling == "max" else (w[:, None] * x).sum(axis=0) / w.sum()
    out.append({"x": x, "size": size.sum(), "patch": True,
                "of": sorted(i for t in parts for i in t["of"])})
  return out


def cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def code_order(kept, prefix, sort_key=lambda i: i):
  """Returns prefix, then even positions, then odd positions sorted by `late`."""
  return ([i for i in kept if i < prefix] + [i for i in kept if i >= prefix and i % 2 == 0] +
          sorted((i for i in kept if i >= prefix and i % 2), key=sort_key))


def tome(tokens, key_nhd, prefix, r, order):
  metric = key_nhd.mean(axis=1)
  odd = [j for j in range(1, len(tokens), 2) if j >= prefix]
  best = {i: max(odd, key=lambda j: cosine(metric[i], metric[j]))
          for i in range(0, len(tokens), 2) if i >= prefix}
  chosen = sorted(best, key=lambda i: -cosine(metric[i], metric[best[i]]))[:r]
  groups = {i: [i] for i in range(len(tokens)) if i not in chosen}
  for i in chosen:
    groups[best[i]].append(i)
  kept = sorted(groups)
  return merge(tokens, groups, kept if order == "position" else code_order(kept, prefix))


def mctf(tokens, query_nhd, key_nhd, prefix, r, spec):
  """Returns (tokens, attention): one image's fused tokens and its maps (h, K, K) one step ahead.

  Columns of the maps A before fusion are summed over each fused token; then rows are pooled in the
  same way as the features.
  """
  size = np.array([t["size"] for t in tokens])
  before = maps(query_nhd, key_nhd, size if spec.prop_attn else None)
  received = before.mean(axis=(0, 1))
  info, small = (1 / received) / (1 / received).max(), (1 / size) / (1 / size).max()

  def weight(i, j):
    similar = (cosine(tokens[i]["x"], tokens[j]["x"]) + 1) / 2
    return (similar ** (1 / spec.tau_sim) * (info[i] * info[j]) ** (1 / spec.tau_info) *
            (small[i] * small[j]) ** (1 / spec.tau_size))

  free = range(prefix, len(tokens))
  even, odd = [i for i in free if i % 2 == 0], [j for j in free if j % 2]
  groups = {i: [i] for i in range(len(tokens))}
  first = r // 2 if spec.bidirectional else r
  best = {i: max(odd, key=lambda j: weight(i, j)) for i in even}
  chosen = sorted(even, key=lambda i: -weight(i, best[i]))[:first]
  for i in chosen:
    groups[best[i]] += groups.pop(i)
  left = [i for i in even if i not in chosen]
  back = {j: max(left, key=lambda i: weight(i, j)) for j in odd}
  score = {j: weight(back[j], j) for j in odd}
  for j in sorted(odd, key=lambda j: -score[j])[:r - first] if spec.bidirectional else []:
    groups[back[j]] += groups.pop(j)
  kept = sorted(groups)
  if spec.order == "code":
    kept = code_order(kept, prefix, (lambda j: -score[j]) if spec.bidirectional else int)
  by = {"size_mean": size, "size_attention_mean": size * received, "mean": np.ones_like(size),
        "max": size}[spec.pooling]
  columns = np.stack([before[:, :, groups[i]].sum(axis=2) for i in kept], axis=2)
  rows = [columns[:, groups[i]] for i in kept]
  if spec.pooling == "max":
    ahead = [parts.max(axis=1) for parts in rows]
  else:
    ahead = [np.average(parts, axis=1, weights=by[groups[i]])
             for i, parts in zip(kept, rows, strict=True)]
  return merge(tokens, groups, kept, by, spec.pooling), np.stack(ahead, axis=1)


def predict(params, x_pw, keep_mask_p):
  """DynamicViT: log pi (P, 2) of (keep, drop), float64, for one image's patches x (P, width)."""
  p = {name: {leaf: np.asarray(array, float) for leaf, array in layer.items()}
       for name, layer in params.items()}

  def linear(x, name):
    return x @ p[name]["kernel"] + p[name]["bias"]

  def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2 ** 0.5)) / 2

  x = x_pw - x_pw.mean(-1, keepdims=True)
  x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
  u = gelu(linear(x, "in_proj"))
  half = u.shape[1] // 2
  mean = (u[:, half:] * keep_mask_p[:, None]).sum(0) / keep_mask_p.sum()
  u = np.concatenate([u[:, :half], np.tile(mean, (len(u), 1))], axis=1)
  z = linear(gelu(linear(gelu(linear(u, "out1")), "out2")), "out3")
  return z - np.log(np.exp(z).sum(-1, keepdims=True))
