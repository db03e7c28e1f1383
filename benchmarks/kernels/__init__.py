"""The kernels: checked against float64 on the device, then measured beside their peers, in one run."""
