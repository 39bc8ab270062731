"""Times inference of DeiT-S: the deployed form of every plan, plain Linen and PyTorch."""
from collections.abc import Iterator

import vitcompact as vc
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Setting
from experiments.plain_deit import PlainDeiT

MODEL = "deit_small_patch16_224"
BOTH = vc.CFFN(rank_ratio=0.5, factor="both")
PLANS = {
    "dense": vc.Plan(),
    "heads": vc.Plan(heads=vc.HMHSA()),
    "ffn": vc.Plan(ffn=vc.CFFN(rank_ratio=0.5)),
    "ffn both": vc.Plan(ffn=BOTH),
    "heads + ffn": vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(rank_ratio=0.5)),
    "EViT 0.7": vc.Plan(tokens=vc.EViT(keep=0.7)),
    "EViT 0.5": vc.Plan(tokens=vc.EViT(keep=0.5)),
    "ToMe 13": vc.Plan(tokens=vc.ToMe(r=13)),
    "MCTF 16": vc.Plan(tokens=vc.MCTF(r=16)),
    "DynamicViT 0.7": vc.Plan(tokens=vc.DynamicViT(keep=0.7)),
    "ffn both + EViT 0.7": vc.Plan(ffn=BOTH, tokens=vc.EViT(keep=0.7)),
    "heads + ffn both + EViT 0.7": vc.Plan(heads=vc.HMHSA(), ffn=BOTH, tokens=vc.EViT(keep=0.7)),
}
# {name of a plan: variant of `experiments.accuracy` whose accuracy its row shows}
VARIANTS = {"dense": "dense", "heads": "heads", "ffn": "ffn", "ffn both": "ffn_both",
            "heads + ffn": "heads_ffn", "EViT 0.7": "evit", "EViT 0.5": "evit_half",
            "ToMe 13": "tome", "MCTF 16": "mctf", "DynamicViT 0.7": "dynamicvit",
            "ffn both + EViT 0.7": "ffn_both_evit",
            "heads + ffn both + EViT 0.7": "heads_ffn_both_evit"}
# On a host, larger batches are computed in chunks of this many images, as `vc.tune` would choose. A
# call then takes seconds, so only some plans are timed.
CHUNK = 8
LARGE_BATCH_PLANS = ("dense", "heads", "ffn both", "heads + ffn", "EViT 0.7",
                     "heads + ffn both + EViT 0.7")
HOST_PEERS = ("torch f32", "torch f32, SDPA", "torch bf16")
SLOW_HOST_PEERS = ("torch.compile f32", "timm f32")   # half a minute each to build on a host
DEVICE_PEERS = ("torch bf16", "torch.compile bf16", "timm bf16")
HOST_BATCHES, DEVICE_BATCHES = (1, 8, 32), (1, 32, 256)


def run(setting: Setting, batches=None, **sizes) -> Iterator[dict]:
  """Times every plan. sizes: fields of the model that make it smaller, for tests."""
  for batch in batches or (HOST_BATCHES if setting.on_host else DEVICE_BATCHES):
    candidates = {}
    chunked = setting.on_host and batch > CHUNK
    for name, plan in PLANS.items():
      if chunked and name not in LARGE_BATCH_PLANS:
        candidates[name] = measure.Candidate(None, {"reason": f"not at batch {batch}"})
        continue
      execution = vc.Execution(chunk=CHUNK if chunked else None)
      model = vc.create_model(MODEL, plan=plan, execution=execution, deploy=True,
                              dtype=setting.dtype, **sizes)
      images = measure.normal((batch, model.image_size, model.image_size, 3), setting.dtype)
      variables = measure.random_variables(model, images[:1], setting.dtype)
      candidates[name] = measure.compiled(model.apply, variables, images,
                                          macs=vc.count(model).macs, plan=plan.to_json())
      if name == "dense":
        dense = model
        plain = PlainDeiT(model.width, model.depth, model.heads, patch_size=model.patch_size)
        candidates["plain Linen"] = measure.compiled(plain.apply, variables, images)
        if chunked:
          at_once = model.clone(execution=vc.Execution()).apply
          candidates["dense, all at once"] = measure.compiled(at_once, variables, images)
    names = HOST_PEERS[chunked:] if setting.on_host else DEVICE_PEERS
    names += SLOW_HOST_PEERS if setting.on_host and batch == CHUNK else ()
    candidates |= measure.torch_candidates(setting, names, dense, batch=batch)
    case = {"model": MODEL, "tokens": dense.prefix + dense.grid[0] * dense.grid[1],
            "batch": batch, "dtype": setting.dtype,
            "chunk": CHUNK if chunked else batch}
    yield from measure.rows(case, candidates, setting)
    if setting.torch:
      setting.torch.forget()

