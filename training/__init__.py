"""What a training run is made of: DeepSpeed's engine, memory, checkpoints, checks, trackers, the run's folder."""
