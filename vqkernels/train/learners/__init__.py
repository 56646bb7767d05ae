"""What a run does with a batch: learners, the procedures and losses they are made of."""
