"""The commands of `python -m vqkernels`, one file each; nothing else of the package prints."""
