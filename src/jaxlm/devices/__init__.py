"""Devices: the mesh and its sharding rules, multi-process runs, and per-platform defaults."""
