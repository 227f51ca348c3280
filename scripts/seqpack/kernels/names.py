"""The attention kernels a user may ask for. Imports no torch.

What each is stands in `seqpack.attention` (ESM-2) and `seqpack.alibi` (DNABERT-S), which have some alike.
"""

AUTO = "auto"
ATTENTIONS = (AUTO, "avx512", "sdpa", "varlen", "flash_attn_2", "flash_attn_3", "triton")
