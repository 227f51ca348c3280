"""The audit's references: each family's model and pooling implemented another time, for one segment at a time.

The models compute in float32 on the CPU, without a forward, kernel, pack, or pooling of the worker:

| family | module | reference |
|---|---|---|
| ESM-2 | `esm2` | fair-esm 2.0.0, or our own forward if it can't be imported |
| DNABERT-S, ESM C, ProtT5, ProstT5 | `dnabert_s`, `esmc`, `t5` | the model written out there, every score and bias |
"""
