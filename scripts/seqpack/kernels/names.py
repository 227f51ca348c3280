"""The attention kernels a user may ask for; what each is stands in `seqpack.attention`. Imports no torch."""

AUTO = "auto"
ATTENTIONS = (AUTO, "avx512", "sdpa", "varlen", "flash_attn_2", "flash_attn_3")
