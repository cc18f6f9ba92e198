"""Plain functions for numerics: attention, norms, rotary."""
