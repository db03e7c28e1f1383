"""Load on a service: traces, an open-loop client, goodput, capacity."""
