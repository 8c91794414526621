"""What a config would cost on devices that need not be here: its programs compiled for them, and looked at."""
