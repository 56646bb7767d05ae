"""What a call and what a training step costs: clocks, peers, rooflines and profiles."""
