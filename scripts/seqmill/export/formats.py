"""The formats of exports by name, and what each writes beside its file. Light: imports nothing."""

FORMATS = ("parquet", "npy", "h5ad", "h5", "h5_residues", "faiss", "pt")

IDS, NAMES = ".ids.txt", ".names.tsv"
# What lies beside a file is called as the file is, with this at the end.
BESIDE = {"npy": IDS, "faiss": IDS, "h5": NAMES, "h5_residues": NAMES}
