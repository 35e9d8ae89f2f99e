"""The numbers of the published models, from the config.json of each.

Both were trained on texts of 8,192 tokens, and have every third layer attend to the last 2,048.
"""

from dataclasses import replace

import numpy as np

from griffin_gguf.runtime.arch import Hyperparameters

TWO_B = Hyperparameters(
    layers=26, context=8192, hidden=2560, mlp_width=7680, vocab=256000, heads=10, kv_heads=1, head_width=256,
    window=2048, norm_eps=float(np.float32(1e-6)), rope_width=128, rope_base=10000.0, logit_cap=30.0,
    embedding_scale=50.5, conv_taps=4, lru_width=2560, gate_blocks=10, recurrent=tuple(i % 3 != 2 for i in range(26)),
)  # fmt: skip
NINE_B = replace(
    TWO_B, layers=38, hidden=4096, mlp_width=12288, heads=16, embedding_scale=64.0, lru_width=4096, gate_blocks=16,
    recurrent=tuple(i % 3 != 2 for i in range(38)),
)  # fmt: skip

#: Name -> numbers; instruction-tuned models have those of their base models.
PUBLISHED: dict[str, Hyperparameters] = {"2b": TWO_B, "9b": NINE_B}
