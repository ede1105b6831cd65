"""Conventional methods: used to start, to compare and as candidates."""
