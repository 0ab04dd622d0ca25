"""Where the GPUs are: regions, load, placement, telemetry."""
