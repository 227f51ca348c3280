"""Code without biology and without torch: files, HDF5, locks, signals, the machine, words."""
