"""Step caches: which denoising steps of a request run the model, and what stands in for it at the others."""
