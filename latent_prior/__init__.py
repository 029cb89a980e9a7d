"""The prior of stage two: diffusion over the latents of stage one, and the pipeline that samples pictures."""
