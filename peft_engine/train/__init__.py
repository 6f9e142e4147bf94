"""Training and what surrounds it: data, the Trainer glue, evaluation, generation, the run's record."""
