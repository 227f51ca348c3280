"""What needs no biology and no torch: files, HDF5, locks, signals, the machine, words."""
