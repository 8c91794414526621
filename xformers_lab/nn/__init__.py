"""The small modules that every shelf uses: sizes, linear layers, what a layer knows of its rows and gives besides."""
