"""What tests and benchmarks share: servers as processes, PD clusters, formats by their bits."""
