"""Every choice of every shelf as users run it: compiled at XLA's default flags, in a process of its own."""
