"""Episodes on disk (zarr, crash-safe) and in RAM (windows, strata), and ways in and out for other formats."""
