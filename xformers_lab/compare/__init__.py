"""A grid of configs, trained cell by cell: the main job. `run` drives; `cell` is what a worker process does with one of
them."""
