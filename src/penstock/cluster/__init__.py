"""Servers as Slurm jobs: scripts, the registry on the shared file system, discovery, tunnels, staging."""
