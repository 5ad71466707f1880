"""Other packages on seqkern's kernels; each module needs its package installed."""
