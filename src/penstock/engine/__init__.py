"""From request to token: scheduler, block pool, runner, sampler, and the process they live in."""
