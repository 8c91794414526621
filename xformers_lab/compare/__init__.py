"""A grid of configs, trained cell by cell: the main job. `run.compare` drives, `worker` trains in a process of its own."""
