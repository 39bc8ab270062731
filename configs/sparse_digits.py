"""Every axis alone and combined, fine-tuned on digits from a dense model, also the teacher.

Command:  python main.py --config=configs/sparse_digits.py:dense --workdir=runs/dense
          python main.py --config=configs/sparse_digits.py:token --workdir=runs/token \\
            --config.init_from=runs/dense/trained.safetensors \\
            --config.teacher.file=runs/dense/trained.safetensors
          with any other of PLANS below instead of token; tuned is the dense model, fine-tuned in
          the same way.
Data:     the 1,797 handwritten digits that scikit-learn ships; no download.
Cost:     about two minutes of CPU time for the dense model, one for each of the others.
Result:   python -m experiments.accuracy digits trains all of them on five folds and prints a table.
"""
from configs import base, digits

HEADS = {"heads": {"method": "hmhsa"}}
FFN = {"ffn": {"method": "cffn"}}
FFN_BOTH = {"ffn": {"method": "cffn", "factor": "both"}}
SPARSE = {"method": "sparsifiner", "keep": 0.25}
TOKEN = {"attention": {**SPARSE, "reduce_n": 8, "coefficients": 4}}
BLOCK = {"attention": {**SPARSE, "granularity": "block", "window": 2, "min_tokens": 0}}
EVIT = {"tokens": {"method": "evit", "keep": 0.7, "blocks": (1, 2)}}
EVIT_HALF = {"tokens": {"method": "evit", "keep": 0.5, "blocks": (1, 2)}}
DYNAMICVIT = {"tokens": {"method": "dynamicvit", "keep": 0.7, "blocks": (1, 2)}}
# About the same share of 36 patches in 3 blocks as 13 and 16 of 196 patches in 12 blocks.
TOME = {"tokens": {"method": "tome", "r": 8}}
MCTF = {"tokens": {"method": "mctf", "r": 9}}

PLANS = {"dense": {}, "tuned": {}, "heads": HEADS, "ffn": FFN, "ffn_both": FFN_BOTH,
         "heads_ffn": {**HEADS, **FFN}, "token": TOKEN, "block": BLOCK, "evit": EVIT,
         "evit_half": EVIT_HALF, "dynamicvit": DYNAMICVIT, "tome": TOME, "mctf": MCTF,
         "sparsif_evit": {**TOKEN, **EVIT}, "ffn_both_evit": {**FFN_BOTH, **EVIT},
         "heads_ffn_both_evit": {**HEADS, **FFN_BOTH, **EVIT}}


def get_config(argument=""):
  options = base.parse(argument, plan="token")
  config = digits.get_config()
  config.plan = PLANS[options.plan]
  config.model.image_size = 12    # pixels
  config.model.patch_size = 2     # pixels: 36 tokens and the class token
  config.model.depth = 3
  config.model.heads = 2
  config.model.position_std = 0.5
  config.log_every = 100
  if options.plan == "dense":
    config.total_steps = 500
    config.checkpoint_every = 500
    config.optim.warmup_steps = 50
    config.optim.learning_rate = 2e-3
  else:
    config = fine_tune(config, steps=150, learning_rate=1e-3)
  return base.finish(config, options, small(config))


def fine_tune(config, steps, learning_rate):
  """Sets up `steps` of fine-tuning; Sparsifiner first gets a fifth as many of reconstruction."""
  config.total_steps = steps
  config.checkpoint_every = steps
  config.ema_half_life = 0.1455   # of the run
  config.optim.schedule = "after_warmup"
  config.optim.learning_rate = learning_rate
  config.optim.warmup_steps = steps // 20
  config.optim.warmup_learning_rate = 0.0
  config.optim.final_learning_rate = 1e-5
  config.loss.logits = 0.5
  config.loss.patches = 0.5
  tokens = config.plan.get("tokens", {}).get("method")
  if tokens == "dynamicvit":
    config.loss.kept_ratio = 2.0
  if tokens == "mctf":
    config.loss.consistency = 3.0
    config.loss.second_pass_r = 3   # the second pass merges 0 to 3 tokens per block
  if "attention" in config.plan:
    config.reconstruct = base.ConfigDict()
    config.reconstruct.steps = steps // 5
    config.reconstruct.weight = 0.01
    config.reconstruct.learning_rate = 3e-3
    config.reconstruct.warmup_steps = steps // 20
    config.reconstruct.warmup_learning_rate = 0.0
    config.reconstruct.final_learning_rate = 3e-4
    config.total_steps += config.reconstruct.steps
  return config


def small(config):
  """Returns {key: value} for the methods' settings with `runlocal`: phases of a few steps, few
  programs to compile."""
  values = {}
  if config.plan.get("attention", {}).get("granularity") == "block":
    values |= {"plan.attention.window": 2, "plan.attention.min_tokens": 0}
  if "reconstruct" in config:
    values |= {"reconstruct.steps": 5, "reconstruct.warmup_steps": 2}
  if "second_pass_r" in config.loss:
    values["loss.second_pass_r"] = 1
  return values
