"""Methods x codebook sizes x seeds, cell by cell."""
