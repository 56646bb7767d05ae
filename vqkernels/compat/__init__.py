"""Drop-in faces of the libraries people use today, one module per library, and `convert`, which swaps them in."""
