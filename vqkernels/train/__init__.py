"""Training: data, the loop, checkpoints, measurements and pictures. Needs the extra [train]."""
