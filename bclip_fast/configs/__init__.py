"""Example configurations: TOML files, and Slurm scripts."""
