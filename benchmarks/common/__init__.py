"""Servers, records, tables and plots that several benchmarks use."""
