"""Noise schedules, the denoiser, guidance and samplers. Everything works on x = x0 + sigma * eps; nothing here knows a network."""
