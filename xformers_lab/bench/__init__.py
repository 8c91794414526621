"""What mechanisms cost when they run alone: `cells` measures them, `supervised` does so in a worker process."""
