"""Every tuned constant of attention, with where and when it was measured.

Commands: A is `taskset -c 0 python -m experiments.attention_speed`, with `--gradients` for backward
passes; B is A with `--layers dense sparse predictor`, C with `--layers dense merged --keep 0.5`,
D with `--layers dense regions`. Limits set by the hardware are in `kernels`.
"""
# name = value             measured, by    what it is

# One core of an AMD EPYC (AVX-512, 1 MiB of L2), float32, jax 0.10.2.
FEW_ENTRIES = 100 ** 2   # 2026-11-21, A   scores of a head; below, all are formed at once
MANY_ENTRIES = 400 ** 2  # 2026-11-21, A   below, one image after another; else in tiles
MANY_KEYS = 240          # 2026-11-28, A   the same, as a number of keys
STEP_QUERIES = 1024      # 2026-11-28, A   of a forward tile: with STEP_KEYS, 1 MB of scores. Fewer
STEP_KEYS = 256          # 2026-11-28, A   queries make slower products; backward, a tenth slower
TILE_ENTRIES = 2 ** 20   # 2026-11-21, A   scores of a tile over all keys (backward, and off a CPU)
MIN_TILE_QUERIES = 64    # 2026-11-21, A   minimum queries of such a tile
ROW_ENTRIES = 2 ** 18    # 2026-11-21, A   scores of all heads, in a tile that is filtered or masked
MIN_ROW_QUERIES = 16     # 2026-11-21, A   minimum queries of such a tile
BLOCK_ENTRIES = 2 ** 16  # 2026-11-21, B   scores that block-sparse attention forms in one step
BLOCK_MIN_TOKENS = 197   # 2026-11-21, B   block-sparse is 1.1 times as fast as dense, at keep 0.25
MERGE_MIN_TOKENS = 325   # 2026-11-29, C   merging keys is 1.1 times as fast as dense, at keep 0.5
REGION_MIN_TOKENS = 442  # 2026-11-29, D   7 x 7 regions are 1.08 times as fast, at keep 0.25

# GPU and TPU: chosen for memory, by estimate; never measured.
MAX_MAP_ENTRIES = 1024 ** 2   # not measured    scores of a head; beyond, in tiles
MIN_SPLASH_KEYS = 512         # not measured    minimum keys for which a TPU uses splash
