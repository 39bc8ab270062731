"""Every axis by itself and with others, fine-tuned on digits from a dense model that also teaches.

Command:  python main.py --config=configs/sparse_digits.py:dense --workdir=runs/dense
          python main.py --config=configs/sparse_digits.py:token --workdir=runs/token \\
            --config.init_from=runs/dense/trained.safetensors \\
            --config.teacher.file=runs/dense/trained.safetensors
          with any other of PLANS below in place of token; tuned is dense, fine-tuned alike.
Data:     the 1,797 handwritten digits that scikit-learn ships; no download.
Cost:     about two minutes of processor time for the dense model, one for each other.
Result:   python -m experiments.accuracy digits trains them all in five folds, and prints a table.
"""
from configs import digits

HEADS = '"heads": {"method": "hmhsa"}'
FFN = '"ffn": {"method": "cffn"}'
BOTH = '"ffn": {"method": "cffn", "factor": "both"}'
LINKS = '"links": {"method": "sparsifiner", "keep": 0.25, %s}'
TOKEN = LINKS % '"reduce_n": 8, "coefficients": 4'
BLOCK = LINKS % '"granularity": "block", "window": 2, "min_tokens": 0'
FEWER = '"tokens": {"method": "%s", "keep": %s, "blocks": [1, 2]}'
EVIT = FEWER % ("evit", 0.7)
# Of 36 patches in 3 blocks about the share that 13 and 16 are of 196 in 12.
MERGED = '"tokens": {"method": "%s", "r": %d}'

AXES = {"dense": (), "tuned": (), "heads": (HEADS,), "ffn": (FFN,), "ffn_both": (BOTH,),
        "heads_ffn": (HEADS, FFN), "token": (TOKEN,), "block": (BLOCK,), "evit": (EVIT,),
        "evit_half": (FEWER % ("evit", 0.5),), "dynamicvit": (FEWER % ("dynamicvit", 0.7),),
        "tome": (MERGED % ("tome", 8),), "mctf": (MERGED % ("mctf", 9),),
        "sparsif_evit": (TOKEN, EVIT), "ffn_both_evit": (BOTH, EVIT),
        "heads_ffn_both_evit": (HEADS, BOTH, EVIT)}
PLANS = {name: f"{{{', '.join(axes)}}}" if axes else "" for name, axes in AXES.items()}


def get_config(plan="token"):
  config = digits.get_config()
  config.plan = PLANS[plan]
  config.model.image_size = 12    # pixels
  config.model.patch_size = 2     # pixels: 36 tokens and the class token
  config.model.depth = 3
  config.model.heads = 2
  config.model.position_std = 0.5
  config.log_every = 100
  if plan == "dense":
    config.total_steps = 500
    config.checkpoint_every = 500
    config.optim.warmup_steps = 50
    config.optim.learning_rate = 2e-3
    return config
  return fine_tune(config, steps=150, learning_rate=1e-3)


def fine_tune(config, steps, learning_rate):
  """`steps` of fine-tuning; with links, after a fifth as many of reconstruction."""
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
  if "dynamicvit" in config.plan:
    config.loss.kept_ratio = 2.0
  if "mctf" in config.plan:
    config.loss.consistency = 3.0
    config.loss.companion_r = 3   # the second pass merges 0 to 3 tokens a block
  if "sparsifiner" in config.plan:
    config.reconstruct.steps = steps // 5
    config.reconstruct.learning_rate = 3e-3
    config.reconstruct.warmup_steps = steps // 20
    config.reconstruct.final_learning_rate = 3e-4
    config.total_steps += config.reconstruct.steps
  return config
