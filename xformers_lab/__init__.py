"""xformers_lab: which Transformer variant should I use, and what does it cost?"""

__version__ = "0.1.0"
