"""One device, several plugins: budget, worth of the next step, the scheduler (pure), and the loop that carries it out."""
