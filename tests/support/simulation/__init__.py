"""Deterministic simulation of the transfer: one seed, virtual time, no sockets, no threads.

`run_seed` draws a scenario from a seed, runs real transfer threads step by step on simulated
sockets, and raises `Violation` when one of the promises of the transfer is broken.
"""
