"""Tokens of a trained autoencoder, priors over them, and samples."""
