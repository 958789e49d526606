"""The mathematics of diffusion in pure functions: flow, Gaussian steps, losses. Knows no network and no scheduler."""
