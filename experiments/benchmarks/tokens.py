"""Times scaling with the number of tokens, 50 to 4097: each axis, all four, and dense peers.

The network is a DeiT-S with four blocks, in the last three of which EViT reduces tokens: a third of
DeiT-S's depth, with EViT's schedule scaled to match.
"""
from collections.abc import Iterator

import vitcompact as vc
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Setting
from experiments.benchmarks.model import BOTH, MODEL
from experiments.plain_deit import PlainDeiT

SIDES = (7, 10, 14, 20, 24, 32, 45, 64)   # patches; with the class token 50 to 4097 tokens
SPARSE = vc.Sparsifiner(keep=0.25, granularity="block")
EVIT = vc.EViT(keep=0.7, blocks=(1, 2, 3))
PLANS = {
    "dense": vc.Plan(),
    "heads": vc.Plan(heads=vc.HMHSA()),
    "attention": vc.Plan(attention=SPARSE),
    "tokens": vc.Plan(tokens=EVIT),
    "ffn": vc.Plan(ffn=BOTH),
    "all four": vc.Plan(heads=vc.HMHSA(), attention=SPARSE, tokens=EVIT, ffn=BOTH),
}
VARIANTS = {"heads": "heads", "attention": "block", "tokens": "evit", "ffn": "ffn_both",
            "all four": None}   # see model.VARIANTS
HOST_PEERS, DEVICE_PEERS = ("torch f32, SDPA",), ("torch bf16", "torch.compile bf16")


def run(setting: Setting, sides=SIDES, depth: int = 4, **sizes) -> Iterator[dict]:
  batch = 1 if setting.on_host else 16
  for side in sides:
    candidates = {}
    for name, plan in PLANS.items():
      model = vc.create_model(MODEL, plan=plan, deploy=True, dtype=setting.dtype, depth=depth,
                              image_size=16 * side, patch_size=16, **sizes)
      images = measure.normal((batch, 16 * side, 16 * side, 3), setting.dtype)
      variables = measure.random_variables(model, images[:1], setting.dtype)
      candidates[name] = measure.compiled(model.apply, variables, images,
                                          macs=vc.count(model).macs)
      if name == "dense":
        plain = PlainDeiT(model.width, depth, model.heads)
        candidates["plain Linen"] = measure.compiled(plain.apply, variables, images)
    names = HOST_PEERS if setting.on_host else DEVICE_PEERS
    candidates |= measure.torch_candidates(setting, names, model, batch=batch)
    case = {"model": f"{MODEL}, {depth} blocks", "tokens": 1 + side * side, "batch": batch,
            "dtype": setting.dtype}
    yield from measure.rows(case, candidates, setting)
    if setting.torch:
      setting.torch.forget()
