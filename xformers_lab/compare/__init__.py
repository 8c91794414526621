"""A grid of configs, trained cell by cell: the main job. `run` drives, `process` is its side of a process of its own in
which `worker` checks and trains."""
