"""Images: where they come from, and batches that are a function of seed and step."""
