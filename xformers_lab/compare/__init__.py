"""A grid of configs, trained cell by cell: the main job. `run` drives, `worker` trains in a process of its own."""
