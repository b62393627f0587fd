"""How records become noised weights: DP-SGD with randomness that only the attempt's seed decides."""
