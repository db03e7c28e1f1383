"""The engine: schedules requests, runs denoising steps, reports events."""
