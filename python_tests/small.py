"""Sizes of a model that trains in milliseconds."""

SIZES = {"num_codes": 8, "latent_dim": 4, "width": 8, "residual_blocks": 1, "crop": 16, "batch_size": 4}
