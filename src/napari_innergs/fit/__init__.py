"""Fitting: losses, optimiser, engine, validation and the combination of candidates."""
